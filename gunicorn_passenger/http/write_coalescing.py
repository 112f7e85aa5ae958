"""Answers that leave together at the end of the loop's turn.

Runs in: a worker, one for each loop. Must never: wait for a client, or hold anything while requests are
known to be slow.

To send an answer to a client that sleeps is to wake it, which can cost more than all else that a server
does for a request. A client that was woken stays awake while more answers come. So in a busy worker the
answers of one turn of the loop are held until its end, and sent one after the other.

But then an answer that is finished waits for other requests' code, and nobody can tell beforehand how long
that will run. So answers are held only after a long streak of requests that all were quick, and leave

- at the end of the turn: before the loop waits for anything;
- when a request begins and the first of them has waited for 3 ms (``_LONG``);
- when there are 32 (``_MANY``);
- when one request has taken more than 1 ms, which also ends the streak.

What remains is the first slow request after a streak: answers finished in the 3 ms before it wait for its
code, until it ends or waits for something itself. The next 200 answers are sent at once. The same holds for
greenlets in the middle of something that wake up in that turn. The clients' next requests would have waited
for that code in any case.
"""

from __future__ import annotations

import os
from math import inf
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

from gevent import get_hub

from gunicorn_passenger.http.faults import report_fault

#: Of how many requests one is timed, while there is no streak.
SAMPLE = 16

#: Seconds that requests of a streak take. With quicker ones, clients hardly have the time to fall asleep, and
#: holding answers costs more than it saves; with slower ones the wait would be long and the gain small.
_LEAST, _MOST = 25e-6, 1e-3
#: How many there must be, one after the other, before answers are held.
_STREAK = 200
#: How many answers are held, and for how many seconds, before the next request begins.
_MANY = 32
_LONG = 3e-3


class WriteCoalescer:
    """The answers that the present turn of the loop holds."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self.holding: list[Any] = []
        #: how many requests in a row have been quick, and whether answers are held for that
        self.streak = 0
        self.holds = False
        #: when (by ``perf_counter``) a request that begins lets them go first
        self.due = inf

    def took(self, seconds: float) -> None:
        """A request is over: all of it, from the call of the application to its ``close()``."""
        if _LEAST < seconds < _MOST:
            self.streak += 1
            self.holds = self.streak >= _STREAK
        else:
            self.streak = 0
            self.holds = False
            self.let_go()

    def hold(self, connection: Any, answer: bytes) -> None:
        """Send it at the end of the turn.

        :param connection: gets it as ``held``; its ``let_go()`` sends that without waiting.
        """
        connection.held = answer
        connection.gateway.sent += len(answer)
        self.holding.append(connection)
        if len(self.holding) == 1:
            self.due = perf_counter() + _LONG
            self._loop.run_callback(self.let_go)
        elif len(self.holding) >= _MANY:
            self.let_go()

    def let_go(self) -> None:
        """Send what is held."""
        holding, self.holding = self.holding, []
        self.due = inf
        for connection in holding:
            try:
                connection.let_go()
            except Exception as error:
                report_fault("a response was not sent", error)
                connection.close()

    def forget(self) -> None:
        """In a forked child: the parent sends it."""
        for connection in self.holding:
            connection.forget()
        self.holding.clear()


_turns: WeakKeyDictionary[Any, WriteCoalescer] = WeakKeyDictionary()


def coalescer_for_hub() -> WriteCoalescer:
    """The one of the current thread's loop: whoever serves in it runs others' code between answers."""
    hub = get_hub()
    turn = _turns.get(hub)
    if turn is None:
        turn = _turns[hub] = WriteCoalescer(hub.loop)
    return turn


def _forget() -> None:
    for turn in _turns.values():
        turn.forget()


os.register_at_fork(after_in_child=_forget)
