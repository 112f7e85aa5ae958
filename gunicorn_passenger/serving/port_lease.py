"""What a worker holds of a port from ``OpenPort`` to ``ReleasePort``, and the grants and pauses in between.

Process: a worker.
Never: call a server from the greenlet or thread that reads the channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import SockAddr
from gunicorn_passenger.serving.scheduler import Scheduler
from gunicorn_passenger.system import unpatched


class AcceptGrant(NamedTuple):
    """The right to accept, from now on."""

    #: a descriptor of the listening socket; the code that takes the grant owns it
    fd: int
    key: str
    #: what the socket is bound to
    sockname: SockAddr | str
    #: the slot of the scoreboard in which the worker counts
    slot: int
    #: with the placement "each": the number of this server among those of its name, from 1
    position: int


class PortLease:
    """The master's response to an ``OpenPort``, and the grants and pauses that follow it."""

    def __init__(self, number: int, scheduler: Scheduler) -> None:
        """:param number: the ``id`` of the ``OpenPort`` message."""
        self.number = number
        self._scheduler = scheduler
        #: held for a moment, since a grant and :meth:`subscribe` may come from two threads
        self._lock = unpatched.lock()
        #: the master's name of the port; empty while no port is free
        self.key = ""
        #: what the socket is bound to; ``None`` while that is not known
        self.sockname: SockAddr | str | None = None
        #: whether the master did not respond in time
        self.is_late = False
        self._initial = scheduler.result()
        self._on_grant: Callable[[AcceptGrant], object] | None = None
        self._on_pause: Callable[[], object] | None = None
        #: whether a pause came before the server could act on it
        self._pause_due = False

    def wait_for_grant(self, timeout: float) -> bool:
        """Wait for the first grant.

        :param timeout: seconds.
        :returns: false when no grant has come in that time.
        :raises errors.ListenError: the error that :meth:`reject` was given.
        """
        self._initial.wait(timeout)
        if self._initial.exception is not None:
            raise self._initial.exception
        return self._initial.ready()

    def take_initial_grant(self) -> AcceptGrant | None:
        """The grant that came with the response; ``None`` when another worker accepts."""
        with self._lock:
            return self._take_initial_grant()

    def _take_initial_grant(self) -> AcceptGrant | None:
        initial, self._initial = self._initial, self._scheduler.result()
        grant: AcceptGrant | None = initial.value
        return grant

    def subscribe(self, on_grant: Callable[[AcceptGrant], object], on_pause: Callable[[], object]) -> None:
        """From now on have the scheduler call these, and at once for what has come before."""
        with self._lock:
            self._on_grant, self._on_pause = on_grant, on_pause
            grant, pause_due = self._take_initial_grant(), self._pause_due
            self._pause_due = False
        if grant is not None:
            self._scheduler.spawn(on_grant, grant)
        if pause_due:
            self._scheduler.spawn(on_pause)

    def grant(self, grant: AcceptGrant) -> None:
        """The master lets this worker accept."""
        with self._lock:
            self.key, self.sockname = grant.key, grant.sockname
            if self._on_grant is None:
                self._initial.set(grant)
                return
        self._scheduler.spawn(self._on_grant, grant)

    def reject(self, error: errors.ListenError) -> bool:
        """The grant came, and this process cannot use it.

        :returns: whether :meth:`wait_for_grant` reports the error; later the log is the only place for it.
        """
        with self._lock:
            if self._on_grant is None:
                self._initial.set_exception(error)
            return self._on_grant is None

    def pause(self) -> None:
        """The master stops this worker's accepting, and waits for the confirmation: no pause may be lost."""
        with self._lock:
            if self._on_pause is None:
                self._pause_due = True
                return
        self._scheduler.spawn(self._on_pause)
