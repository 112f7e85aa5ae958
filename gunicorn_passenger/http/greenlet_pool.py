"""Greenlets that serve one connection after another.

Process: a serving process, in its hub.
Never: let a connection see what another one has left in its greenlet.

A new greenlet costs more than a small request: the system maps its stack, and unmaps it again. So a greenlet
whose connection has ended, or is idle, waits here for the next one. Until then everything goes that the
application can have left in it: the values of each ``threading.local`` (gevent keeps them for each greenlet),
of each context variable, and its attributes. A greenlet that other code still refers to ends instead: that
code may wake or end it later (``gevent.Timeout``), or keep values for it (``WeakKeyDictionary``).

If the application has left nothing at all, and has not waited, the greenlet accepts the next connection
itself: that saves two switches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import Context
from sys import getrefcount
from typing import Any, Protocol
from weakref import getweakrefcount

import gevent
from gevent import get_hub, getcurrent
from greenlet import gettrace

from gunicorn_passenger.http.faults import report_fault

#: How many greenlets wait at most. Each keeps some 20 kB.
_MOST = 64
#: Seconds after which the greenlets that were not needed meanwhile end.
_TRIM_INTERVAL = 1.0


class Served(Protocol):
    def serve(self, greenlet: gevent.Greenlet) -> None:
        """Serve the connection in this greenlet until it is idle or ends."""

    def close(self) -> None:
        """Close the connection, which has no greenlet."""


class _Nothing:
    def serve(self, greenlet: gevent.Greenlet) -> None:
        """Return at once."""

    def close(self) -> None:
        """Do nothing."""


#: Returns the next connection to serve; ``None`` when there is none now.
Source = Callable[[], "Served | None"]


class _ServingGreenlet(gevent.Greenlet):
    __slots__ = ("_pool", "connection", "source")

    # of the base class, which has no annotations
    spawn_tree_locals: dict[Any, Any]
    gr_context: Context | None

    # gevent would record the stack that spawned it, which is always the same
    spawning_stack_limit = 0

    def __init__(self, pool: GreenletPool) -> None:
        super().__init__()
        # gevent has given it those of the hub, which all greenlets would share
        self.spawn_tree_locals = {}  # type: ignore[misc]
        self.gr_context = Context()  # type: ignore[misc]
        self._pool = pool
        self.connection: Served | None = None
        #: where the next connection comes from, until this greenlet waits
        self.source: Source | None = None

    def _run(self) -> None:
        wait, pool = get_hub().switch, self._pool
        while (connection := self.connection) is not None:
            try:
                connection.serve(self)
            except BaseException as error:
                _give_up(connection, error)
            self.connection = connection = None
            if self.has_links():
                # What is linked to the end of a greenlet must run in the hub. gevent's locals are, and so
                # is code that waits for the greenlet.
                pool.put_after_links(self)
            elif self.source is not None and self._is_unused():
                self.connection = self._next_connection(self.source)
                if self.connection is not None:
                    continue
                if not pool.put(self):
                    return
            elif not pool.put(self):
                return
            try:  # noqa: SIM105 - contextlib.suppress() would cost each connection three calls
                wait()
            except BaseException:  # noqa: S110 - meant for the connection that has ended
                pass
        pool.discard(self)

    def _is_unused(self) -> bool:
        """Whether the application has left nothing in this greenlet, and no other code knows it."""
        return self._pool.is_unknown(getrefcount(self)) and not (
            self.__dict__
            or self.spawn_tree_locals
            or self.gr_context
            or getweakrefcount(self)
            # of :mod:`~gunicorn_passenger.serving.gevent_asyncio`, which puts away a running event loop at a
            # switch, or of a profiler
            or gettrace() is not None
        )

    @staticmethod
    def _next_connection(source: Source) -> Served | None:
        try:
            return source()
        except BaseException as error:
            report_fault("no connection was accepted", error)
            return None

    def forget(self) -> None:
        """Forget what the application has left. Called in the hub, while the greenlet waits."""
        if self.__dict__:
            self.__dict__.clear()
        # empty or not, greenlets that the application has spawned may share it
        self.spawn_tree_locals = {}  # type: ignore[misc]
        if self.gr_context:
            self.gr_context = Context()  # type: ignore[misc]

    def rawlink(self, callback: Any) -> None:
        """Call a function at the end of the greenlet, which comes soon if it waits for a connection."""
        super().rawlink(callback)
        if self.connection is None:
            self._pool.end_soon(self)

    def notify_links(self) -> None:
        """Run what is linked to the end of the greenlet. Called in the hub."""
        self._notify_links()


def _no_connection() -> None:
    return None


def _give_up(connection: Served, error: BaseException) -> None:
    report_fault("a connection was closed", error)
    with contextlib.suppress(Exception):
        connection.close()


class GreenletPool:
    """The greenlets of one listener that wait for a connection."""

    def __init__(self) -> None:
        self._free: list[_ServingGreenlet] = []
        self._hub = get_hub()
        self._timer: Any = None
        #: the fewest greenlets that have waited since the timer has fired
        self._spare = 0
        #: how many references :meth:`_take` sees to a greenlet that no other code refers to
        self._references = 0
        #: the same for a greenlet that serves one connection after another
        self._own_references = 0

    def __len__(self) -> int:
        return len(self._free)

    def serve(self, connection: Served) -> None:
        """Serve a connection in a greenlet: at once when called in the hub, otherwise when the hub runs.

        A connection that cannot have a greenlet, because the system lacks memory, is closed.
        """
        if getcurrent() is not self._hub:
            self._hub.loop.run_callback(self.serve, connection)
            return
        try:
            greenlet = self._take() or _ServingGreenlet(self)
            greenlet.connection = connection
            greenlet.switch()
        except Exception as error:
            _give_up(connection, error)

    def serve_each(self, source: Source, source_in_greenlet: Source) -> None:
        """Serve one connection after another, until there is none. Called in the hub.

        :param source: called in the hub.
        :param source_in_greenlet: called in the greenlet of a connection that has ended without waiting.
        """
        while (connection := source()) is not None:
            try:
                self._start(self._take() or _ServingGreenlet(self), connection, source_in_greenlet)
            except Exception as error:
                _give_up(connection, error)

    @staticmethod
    def _start(greenlet: _ServingGreenlet, connection: Served, source: Source) -> None:
        greenlet.connection, greenlet.source = connection, source
        try:
            greenlet.switch()
        finally:
            greenlet.source = None

    def is_unknown(self, references: int) -> bool:
        """Whether no other code refers to a greenlet that runs.

        :param references: how many it sees to itself.
        """
        if not self._own_references:
            self._own_references = references  # of the first one, in which nothing has happened
        return references <= self._own_references

    def _take(self) -> _ServingGreenlet | None:
        free = self._free
        if not self._references:
            # nothing has happened in this greenlet, so there are as many references as have to be
            self._start(_ServingGreenlet(self), _Nothing(), _no_connection)
            greenlet = free.pop()
            self._references = getrefcount(greenlet)
            return greenlet
        while free:
            greenlet = free.pop()
            self._spare = min(self._spare, len(free))
            greenlet.forget()
            if getrefcount(greenlet) <= self._references and not getweakrefcount(greenlet):
                return greenlet
            greenlet.switch()  # it has no connection, so it ends
        return None

    def put(self, greenlet: _ServingGreenlet) -> bool:
        """Called by a greenlet whose connection has ended or is idle.

        :returns: whether it waits here for the next one.
        """
        if len(self._free) >= _MOST:
            return False
        self._free.append(greenlet)
        if self._timer is None:
            self._spare = 0
            self._timer = self._hub.loop.timer(_TRIM_INTERVAL, _TRIM_INTERVAL)
            self._timer.start(self.trim)
        return True

    def put_after_links(self, greenlet: _ServingGreenlet) -> None:
        self._hub.loop.run_callback(self._put_after_links, greenlet)

    def _put_after_links(self, greenlet: _ServingGreenlet) -> None:
        greenlet.notify_links()
        if greenlet.dead:
            return  # other code has ended it meanwhile: it would serve no connection
        if not self.put(greenlet):
            greenlet.switch()  # it has no connection, so it ends

    def end_soon(self, greenlet: _ServingGreenlet) -> None:
        """Other code waits for the end of a greenlet that may wait here: ``kill()`` and ``join()`` do."""
        self._hub.loop.run_callback(self._end, greenlet)

    def _end(self, greenlet: _ServingGreenlet) -> None:
        if greenlet in self._free:
            self._free.remove(greenlet)
            greenlet.switch()

    def discard(self, greenlet: _ServingGreenlet) -> None:
        """A greenlet ends."""
        with contextlib.suppress(ValueError):
            self._free.remove(greenlet)

    def trim(self) -> None:
        """End the greenlets that have not been needed since the last call."""
        for _ in range(min(self._spare, len(self._free))):
            self._free.pop(0).switch()
        self._spare = len(self._free)
        if not self._free:
            self._timer.close()
            self._timer = None
