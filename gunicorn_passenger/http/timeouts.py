"""Timeouts of many waiting connections, without a timer for each.

Process: a worker.
Never: cost anything while no connection waits.

A timer per wait would cost more than the wait. All waits of a kind have the same duration, so the
first that began is the first that ends: an insertion-ordered dictionary is the queue, and one timer
of the loop stands for its head.
"""

from __future__ import annotations

from typing import Any, Protocol

from gevent import get_hub

from gunicorn_passenger.http.connection_state import ConnectionState
from gunicorn_passenger.http.faults import report_fault


class Expirable(Protocol):
    def expire(self) -> None:
        """Its time is over. Called in the hub: it must not block."""


class TimeoutQueue:
    """Wakes what has waited for longer than ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._loop = get_hub().loop
        #: who waits, and since when on the loop's clock
        self._since: dict[Any, float] = {}
        self._timer: Any = None
        #: :meth:`add` and :meth:`remove` bracket every wait for a request: these two are the fast way
        self.remove = self._since.pop

    def add(self, waiting: Expirable) -> None:
        """It waits from now on, until ``remove(waiting, None)``."""
        self._since[waiting] = self._loop.now()
        if self._timer is None:
            self._start(self.seconds)

    def __len__(self) -> int:
        return len(self._since)

    def _start(self, seconds: float) -> None:
        self._timer = self._loop.timer(max(seconds, 0.001))
        self._timer.start(self._fire)

    def _fire(self) -> None:
        self._timer.close()
        self._timer = None
        # The loop's clock is that of its last turn; a timer is never early by the same clock.
        limit = self._loop.now() - self.seconds + 0.001
        while self._since:
            waiting, since = next(iter(self._since.items()))
            if since > limit:
                if self._timer is not None:
                    self._timer.close()  # of one that was added meanwhile
                self._start(since - limit)
                return
            del self._since[waiting]
            try:
                waiting.expire()
            except Exception as error:
                # the timer stands for all that wait: it has to be started again
                report_fault("a connection was not closed at its timeout", error)


class IdleConnection(Protocol):
    state: ConnectionState
    #: the tick in which it became idle
    idle_since: int
    #: whether the ticker checks it at each tick
    tracked: bool

    def expire(self) -> None:
        """Its client has paused. Called in the hub: it must not block."""


class IdleTicker:
    """Wakes busy connections whose clients pause, without a queue that each of their waits goes through.

    A busy connection waits thousands of times in a second and is never late. So it only notes the tick in
    which a wait began; who has waited for a whole tick is found when the next one ends.
    """

    def __init__(self, seconds: float) -> None:
        """
        :param seconds: the length of a tick; a pause lasts between one and two of them.
        """
        self.tick = 1
        self._seconds = seconds
        self._tracked: set[IdleConnection] = set()
        self._timer: Any = None

    def track(self, connection: IdleConnection) -> None:
        """It waits, and is looked at from now on until it pauses or is found to be doing something else."""
        connection.tracked = True
        self._tracked.add(connection)
        if self._timer is None:
            self._timer = get_hub().loop.timer(self._seconds, self._seconds)
            self._timer.start(self._next)

    def untrack(self, connection: IdleConnection) -> None:
        connection.tracked = False
        self._tracked.discard(connection)

    def _next(self) -> None:
        self.tick += 1
        begun = self.tick - 2
        for connection in list(self._tracked):
            if connection.state is not ConnectionState.IDLE:
                # it may be long: it comes back with its next wait
                self.untrack(connection)
            elif connection.idle_since <= begun and connection.tracked:
                self.untrack(connection)
                try:
                    connection.expire()
                except Exception as error:
                    report_fault("an idle connection kept its greenlet", error)
        if not self._tracked:
            self._timer.close()
            self._timer = None
