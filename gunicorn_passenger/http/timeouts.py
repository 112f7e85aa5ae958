"""Timeouts of many waiting connections, without a timer for each.

Process: a serving process.
Never: cost anything while no connection waits.

A timer per wait would cost more than the wait. All waits of a kind have the same duration, so the first that
began is the first that ends: an insertion-ordered dictionary is the queue, and one timer of the loop stands
for its first entry.

Code that does not yield stops the loop, and a timeout can pass meanwhile. The peer is not at fault for that:

- what has arrived in time counts. The loop runs the watchers of sockets first, and they end their waits;
- a wait begins when it begins, and not with the loop's iteration, whose clock stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from time import monotonic
from typing import Any, Protocol

from gevent import get_hub

from gunicorn_passenger.http.connection_state import ConnectionState
from gunicorn_passenger.http.faults import report_fault

_expire = methodcaller("expire")

#: The priority of the timer: in one iteration, watchers of sockets have the default, 0, and run before it.
_AFTER_SOCKETS = -1


class TimeoutQueue:
    """Wakes what has waited for longer than ``seconds``."""

    def __init__(self, seconds: float, on_timeout: Callable[[Any], object] = _expire) -> None:
        """
        :param on_timeout: called with what has waited, in the hub: it must not block. By default it calls the
            method ``expire()``.
        """
        self.seconds = seconds
        self._on_timeout = on_timeout
        self._loop = get_hub().loop
        #: what waits, and since when on the monotonic clock
        self._since: dict[Any, float] = {}
        self._timer: Any = None
        #: Every wait for a request calls :meth:`add` and ``remove``, so ``remove`` is the dictionary's own.
        self.remove = self._since.pop

    def add(self, waiting: Any) -> None:
        """Begin a wait, which lasts until ``remove(waiting, None)``."""
        self._since[waiting] = monotonic()
        if self._timer is None:
            self._start(self.seconds)

    def __len__(self) -> int:
        return len(self._since)

    def longest(self) -> Any:
        """What has waited longest; ``None`` when nothing waits."""
        return next(iter(self._since), None)

    def clear(self) -> None:
        """Forget all waits: no timeout is called any more."""
        self._since.clear()
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _start(self, seconds: float) -> None:
        self._timer = self._loop.timer(max(seconds, 0.001), priority=_AFTER_SOCKETS)
        self._timer.start(self._fire)

    def _fire(self) -> None:
        self._timer.close()
        self._timer = None
        # a timer may be early, by less than a millisecond
        limit = monotonic() - self.seconds + 0.001
        while self._since:
            waiting, since = next(iter(self._since.items()))
            if since > limit:
                if self._timer is not None:
                    self._timer.close()  # a timeout has added a wait, which started a timer
                self._start(since - limit)
                return
            del self._since[waiting]
            try:
                self._on_timeout(waiting)
            except Exception as error:
                # all other waits need the timer: it has to be started again
                report_fault("a connection was not closed at its timeout", error)


class IdleConnection(Protocol):
    state: ConnectionState
    #: the tick in which it became idle
    idle_since: int
    #: whether the ticker checks it at each tick
    tracked: bool

    def expire(self) -> None:
        """Its client has been idle for a tick. Called in the hub: it must not block."""


class IdleTicker:
    """Notices busy connections that become idle, without a queue that each of their waits goes through.

    A busy connection waits thousands of times a second and is never idle for long. So it only records the
    tick in which a wait began. The ticker finds the connections that have waited for a whole tick.
    """

    def __init__(self, seconds: float) -> None:
        """
        :param seconds: the length of a tick; a connection expires after one to two ticks.
        """
        self.tick = 1
        self._seconds = seconds
        self._tracked: set[IdleConnection] = set()
        self._timer: Any = None

    def track(self, connection: IdleConnection) -> None:
        """Check a waiting connection at each tick, until it expires or is found busy."""
        connection.tracked = True
        self._tracked.add(connection)
        if self._timer is None:
            self._timer = get_hub().loop.timer(self._seconds, self._seconds)
            self._timer.start(self._next)

    def untrack(self, connection: IdleConnection) -> None:
        connection.tracked = False
        self._tracked.discard(connection)

    def clear(self) -> None:
        """Track no connection any more."""
        self._tracked.clear()
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _next(self) -> None:
        self.tick += 1
        begun = self.tick - 2
        for connection in list(self._tracked):
            if connection.state is not ConnectionState.IDLE:
                # a long request: the connection is tracked again when it waits for the next one
                self.untrack(connection)
            elif connection.idle_since <= begun and connection.tracked:
                self.untrack(connection)
                try:
                    connection.expire()
                except Exception as error:
                    report_fault("an idle connection kept its greenlet", error)
        if not self._tracked:
            self.clear()
