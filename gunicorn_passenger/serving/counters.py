"""What the acceptors of this worker have done, summed up by slot of the scoreboard.

Process: a worker.
Never: lose the counts of a server that has closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gunicorn_passenger.ipc.scoreboard import Counters, Scoreboard

if TYPE_CHECKING:
    from gunicorn_passenger.serving.acceptors import ListenerHandler


class AcceptorCounters:
    """Writes the counters of all acceptors to the worker's page of the scoreboard."""

    def __init__(self) -> None:
        self._acceptors: list[tuple[int, ListenerHandler]] = []
        #: the counts of acceptors that are done
        self._finished: dict[int, Counters] = {}

    def register(self, slot: int, acceptor: ListenerHandler) -> None:
        """From now on, count an acceptor's work in a slot of the scoreboard."""
        self._acceptors.append((slot, acceptor))

    def write(self, scoreboard: Scoreboard) -> None:
        """Bring the worker's page up to date. Called once a second, and at the end."""
        for slot, acceptor in self._acceptors:
            if acceptor.is_drained():
                self._finished[slot] = self._finished.get(slot, Counters()).plus(acceptor.counts())
        self._acceptors = [(slot, a) for slot, a in self._acceptors if not a.is_drained()]
        totals = dict(self._finished)
        for slot, acceptor in self._acceptors:
            totals[slot] = totals.get(slot, Counters()).plus(acceptor.counts())
        for slot, counts in totals.items():
            scoreboard.write(slot, counts)
