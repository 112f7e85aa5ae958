"""Decides whether this worker leaves the next connection to a sibling that has fewer.

Process: a worker, in its hub.
Never: keep a client waiting for a sibling that does not come.

All workers wait for the same listening socket, and the kernel wakes them all. Without this, the worker that
wakes first would get most connections, and keep WebSockets for life. So a worker that has clearly more
connections on a server than a sibling accepts nothing for some milliseconds (:mod:`.http.acceptor`). If the
client still waits then, the siblings are busy: the worker accepts it. Each time this happens again, it
accepts twice as many before it waits for its siblings. So busy workers do not wait for each other.
"""

from __future__ import annotations

from gunicorn_passenger.ipc.connection_table import Seat

#: How many connections in a row are accepted, at most, after the siblings were busy.
_MOST_CREDIT = 64


class AcceptBalance:
    """The connections of this worker on one server, and those of its siblings."""

    def __init__(self, seat: Seat | None = None, slot: int = -1) -> None:
        """
        :param seat: the worker's; without one, it does not know its siblings.
        :param slot: the server's slot of the scoreboard.
        """
        self._cells = seat.cells(slot) if seat is not None else None
        self._number = seat.number if seat is not None else 0
        self._connections = 0
        self._acceptors = 0
        #: how many connections it accepts without regard to its siblings, now and when they are busy again
        self._credit = 0
        self._next_credit = 1

    def begin(self) -> None:
        """An acceptor begins to accept."""
        self._acceptors += 1
        self._write()

    def end(self) -> None:
        """An acceptor stops accepting; its connections continue."""
        self._acceptors -= 1
        self._write()

    def add(self, count: int) -> None:
        """So many connections have come; -1 when one has ended."""
        self._connections += count
        self._write()

    def _write(self) -> None:
        if self._cells is not None:
            # one more than the number, because 0 stands for a worker that does not accept
            self._cells[self._number] = self._connections + 1 if self._acceptors else 0

    def sibling_has_fewer(self) -> bool:
        """Whether a sibling has clearly fewer connections."""
        mine = self._connections
        if mine < 2 or self._cells is None:
            return False
        fewest = min(filter(None, self._cells.tolist()), default=mine + 1) - 1
        return mine > fewest + 1 + fewest // 16

    def use_credit(self) -> bool:
        """Whether this worker accepts the next connection although a sibling has fewer."""
        self._credit -= 1
        return self._credit >= 0

    def sibling_was_busy(self) -> None:
        """A client still waits although this worker has waited for its siblings."""
        # this connection, too, is one of them
        self._credit = self._next_credit - 1
        self._next_credit = min(2 * self._next_credit, _MOST_CREDIT)

    def sibling_has_accepted(self) -> None:
        """A sibling has accepted while this worker waited."""
        self._credit, self._next_credit = 0, 1
