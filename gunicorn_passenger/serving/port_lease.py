"""The right of one worker to accept on one port, as the master grants and pauses it.

Process: a worker.
Never: calls a server from the greenlet that reads the channel; each callback gets a greenlet of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gevent
from gevent.event import AsyncResult

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import SockAddr


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

    def __init__(self, number: int) -> None:
        """:param number: the ``id`` of the ``OpenPort`` message."""
        self.number = number
        #: the master's name of the port; empty while no port is free
        self.key = ""
        #: what the socket is bound to; ``None`` while that is not known
        self.sockname: SockAddr | str | None = None
        #: whether the master did not respond in time
        self.is_late = False
        self._initial: AsyncResult[AcceptGrant] = AsyncResult()
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
        self._initial.wait(timeout=timeout)
        if self._initial.exception is not None:
            raise self._initial.exception
        return bool(self._initial.ready())

    def take_initial_grant(self) -> AcceptGrant | None:
        """The grant that came with the response; ``None`` when another worker accepts."""
        grant: AcceptGrant | None = self._initial.get(block=False) if self._initial.ready() else None
        self._initial = AsyncResult()
        return grant

    def subscribe(self, on_grant: Callable[[AcceptGrant], object], on_pause: Callable[[], object]) -> None:
        """From now on call these, each in a greenlet of its own, and at once for what has come before."""
        self._on_grant, self._on_pause = on_grant, on_pause
        if (grant := self.take_initial_grant()) is not None:
            gevent.spawn(on_grant, grant)
        if self._pause_due:
            self._pause_due = False
            gevent.spawn(on_pause)

    def grant(self, grant: AcceptGrant) -> None:
        """The master lets this worker accept."""
        self.key, self.sockname = grant.key, grant.sockname
        if self._on_grant is None:
            self._initial.set(grant)
        else:
            gevent.spawn(self._on_grant, grant)

    def reject(self, error: errors.ListenError) -> bool:
        """The grant came, and this process cannot use it.

        :returns: whether :meth:`wait_for_grant` reports the error; later the log is the only place for it.
        """
        if self._on_grant is not None:
            return False
        self._initial.set_exception(error)
        return True

    def pause(self) -> None:
        """The master stops this worker's accepting, and waits for the confirmation: no pause may be lost."""
        if self._on_pause is None:
            self._pause_due = True
        else:
            gevent.spawn(self._on_pause)
