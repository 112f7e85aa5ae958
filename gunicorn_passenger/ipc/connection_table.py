"""How many connections each worker has on each server, in memory that all workers share.

Process: the master, which gives each worker a seat, and the workers.
Never: trusted. A worker can write any number anywhere in it, so a number may only decide which worker
accepts the next connection, and that for a moment.
"""

from __future__ import annotations

import mmap

#: Workers that take part; more serve, and their siblings do not know their numbers.
SEATS = 64


class Seat:
    """One worker's place in the table."""

    def __init__(self, table: ConnectionTable, number: int) -> None:
        self.number = number
        self._table = table

    def cells(self, slot: int) -> memoryview | None:
        """The numbers of all workers on one server, by seat; 0 for a worker that does not accept there.

        :param slot: the server's slot of the scoreboard; ``None`` is returned for one that is out of range.
        """
        at = slot * SEATS
        return self._table.words[at : at + SEATS] if 0 <= slot < self._table.slots else None

    def used(self) -> int:
        """How many seats have been taken so far: only their cells can differ from 0."""
        return self._table.words[-1]

    def leave(self) -> None:
        """Called in the master: the worker has exited."""
        for slot in range(self._table.slots):
            self._table.words[slot * SEATS + self.number] = 0
        self._table.free.append(self.number)


class ConnectionTable:
    """The table of one master."""

    def __init__(self, slots: int) -> None:
        """
        :param slots: the servers that can be counted.
        :raises OSError: when the system has no memory for it.
        """
        self.slots = slots
        #: the cells of each slot, and how many seats have been taken
        self.words = memoryview(mmap.mmap(-1, (slots * SEATS + 1) * 4)).cast("I")
        #: the numbers of the seats that no worker has
        self.free = list(reversed(range(SEATS)))

    def take_seat(self) -> Seat | None:
        """A seat for a new worker; ``None`` when all are taken."""
        if not self.free:
            return None
        number = self.free.pop()
        self.words[-1] = max(self.words[-1], number + 1)
        return Seat(self, number)
