"""Decides whether this worker leaves the next connection to a sibling that has fewer.

Process: a worker, in its hub.
Never: keep a client waiting for a sibling that does not come.

All workers wait for the same listening socket, and the kernel wakes them all. Without this, the worker that
wakes first would get most connections, and keep WebSockets for life. So a worker that has clearly more
connections on a server than a sibling accepts nothing for some milliseconds (:mod:`.http.acceptor`). If the
client still waits then, the siblings are busy: the worker accepts it. Each time this happens again, it
accepts twice as many before it waits for its siblings. So busy workers do not wait for each other. And it
does not wait again for a sibling whose number of connections stays as it was: that one may be blocked.
"""

from __future__ import annotations

from time import monotonic

from gunicorn_passenger.ipc.connection_table import Seat

#: How many connections in a row are accepted, at most, after the siblings were busy.
_MOST_CREDIT = 64
#: Seconds after which a worker waits again for a sibling that may have been blocked.
_BLOCKED_FOR = 1.0


class AcceptBalance:
    """The connections of this worker on one server, and those of its siblings."""

    def __init__(self, seat: Seat | None = None, slot: int = -1) -> None:
        """
        :param seat: the worker's; without one, it does not know its siblings.
        :param slot: the server's slot of the scoreboard.
        """
        self._seat = seat
        self._cells = seat.cells(slot) if seat is not None else None
        self._number = seat.number if seat is not None else 0
        self._connections = 0
        self._acceptors = 0
        #: how many connections it accepts without regard to its siblings, now and when they are busy again
        self._credit = 0
        self._next_credit = 1
        #: the cells of the siblings that were waited for in vain, by seat, and until when they are ignored
        self._blocked: dict[int, int] = {}
        self._blocked_until = 0.0

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
        if self._cells is not None and self._acceptors:
            self._cells[self._number] = self._connections + 1

    def _write(self) -> None:
        if self._cells is not None:
            # one more than the number, because 0 stands for a worker that does not accept
            self._cells[self._number] = self._connections + 1 if self._acceptors else 0

    def sibling_has_fewer(self) -> bool:
        """Whether a sibling has clearly fewer connections, and does not seem to be blocked."""
        if self._connections < 2 or self._seat is None or self._seat.used() < 2:
            return False
        fewer = self._siblings_with_fewer()
        if fewer and self._blocked:
            if monotonic() > self._blocked_until:
                self._blocked = {}
            return any(self._blocked.get(number) != cell for number, cell in fewer.items())
        return bool(fewer)

    def _siblings_with_fewer(self) -> dict[int, int]:
        """The cells of the siblings that have clearly fewer connections, by seat."""
        if self._cells is None or self._seat is None:
            return {}
        mine = self._connections
        cells = self._cells[: self._seat.used()].tolist()
        # a cell is one more than the number of connections
        return {n: cell for n, cell in enumerate(cells) if cell and mine > cell + (cell - 1) // 16}

    def use_credit(self) -> bool:
        """Whether this worker accepts the next connection although a sibling has fewer."""
        self._credit -= 1
        return self._credit >= 0

    def sibling_was_busy(self) -> None:
        """A client still waits although this worker has waited for its siblings."""
        self._blocked = self._siblings_with_fewer()
        self._blocked_until = monotonic() + _BLOCKED_FOR
        # this connection, too, is one of them
        self._credit = self._next_credit - 1
        self._next_credit = min(2 * self._next_credit, _MOST_CREDIT)

    def sibling_has_accepted(self) -> None:
        """A sibling has accepted while this worker waited."""
        self._credit, self._next_credit = 0, 1
