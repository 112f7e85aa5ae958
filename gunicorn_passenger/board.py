"""The scoreboard: what a worker counts, where the master can read it at any time.

Runs in: a worker, which writes its own, and the master, which reads all. Must never: be trusted: a worker
can write whatever it likes into its own.

A board is a page of memory that the master shares with one worker. So the counts of a worker can be read
while it is busy with anything, and after it was killed. A worker writes it once a second and when it leaves:
what it had counted in the last second before it was killed is lost.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

#: Servers that a worker can count; more are served and not counted.
SLOTS = 64
#: Where the primary is counted.
PRIMARY_SLOT = 0
_FIELDS = 5
#: The largest count: what a JSON number and a Prometheus sample hold exactly. A worker can write more.
_LIMIT = (1 << 53) - 1


class Counts(NamedTuple):
    """What one server has done in one worker, or in all."""

    #: open now
    connections: int = 0
    #: accepted in all
    accepted: int = 0
    #: answered
    requests: int = 0
    #: sent to clients, heads included
    bytes: int = 0
    #: answers of 500 and above, and those that broke off
    errors: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(min(a + b, _LIMIT) for a, b in zip(self, other, strict=True)))


class Board:
    """One worker's page."""

    def __init__(self) -> None:
        """
        :raises OSError: when the system has no memory for it.
        """
        self._map = mmap.mmap(-1, SLOTS * _FIELDS * 8)
        self._words = memoryview(self._map).cast("Q")

    def write(self, slot: int, counts: Counts) -> None:
        """:param slot: as the master has given it; one that is out of range is not counted."""
        if 0 <= slot < SLOTS:
            at = slot * _FIELDS
            for offset, value in enumerate(counts):
                self._words[at + offset] = min(max(value, 0), _LIMIT)

    def read(self, slot: int) -> Counts:
        if not 0 <= slot < SLOTS:
            return Counts()
        at = slot * _FIELDS
        return Counts(*(min(value, _LIMIT) for value in self._words[at : at + _FIELDS]))

    def close(self) -> None:
        self._words.release()
        self._map.close()
