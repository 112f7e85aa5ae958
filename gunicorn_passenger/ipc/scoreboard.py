"""The scoreboard: what a worker counts, where the master can read it at any time.

Runs in: a worker, which writes its own, and the master, which reads all. Must never: be trusted: a worker
can write whatever it likes into its own.

A board is a page of memory that the master shares with one worker. So the counts of a worker can be read
while it is busy with anything, and after it was killed. A worker writes it once a second and when it leaves:
what it had counted in the last second before it was killed is lost.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any, NamedTuple

#: Servers that a worker can count; more are served and not counted.
SLOTS = 64
#: Where the primary is counted, and its key among those of the ports.
PRIMARY_SLOT = 0
PRIMARY_KEY = "primary"
_FIELDS = 5
#: The largest count: what a JSON number and a Prometheus sample hold exactly. A worker can write more.
_LIMIT = (1 << 53) - 1


class Counters(NamedTuple):
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

    def plus(self, other: Counters) -> Counters:
        return Counters(*(min(a + b, _LIMIT) for a, b in zip(self, other, strict=True)))


class Scoreboard:
    """One worker's page."""

    def __init__(self) -> None:
        """
        :raises OSError: when the system has no memory for it.
        """
        self._map = mmap.mmap(-1, SLOTS * _FIELDS * 8)
        self._words = memoryview(self._map).cast("Q")

    def write(self, slot: int, counts: Counters) -> None:
        """:param slot: as the master has given it; one that is out of range is not counted."""
        if 0 <= slot < SLOTS:
            at = slot * _FIELDS
            for offset, value in enumerate(counts):
                self._words[at + offset] = min(max(value, 0), _LIMIT)

    def read(self, slot: int) -> Counters:
        if not 0 <= slot < SLOTS:
            return Counters()
        at = slot * _FIELDS
        return Counters(*(min(value, _LIMIT) for value in self._words[at : at + _FIELDS]))

    def close(self) -> None:
        self._words.release()
        self._map.close()


class RetiredCounters:
    """What workers that are gone have counted, by the key of a port."""

    def __init__(self) -> None:
        self._gone: dict[str, Counters] = {}

    def gone(self, board: Scoreboard | None, ports: Iterable[Any]) -> None:
        """A worker is gone: keep what it has counted."""
        if board is None:
            return
        for key, slot in [(PRIMARY_KEY, PRIMARY_SLOT), *((port.key, port.slot) for port in ports)]:
            counts = board.read(slot)._replace(connections=0)
            self._gone[key] = self._gone.get(key, Counters()).plus(counts)
        board.close()

    def forget(self, key: str) -> None:
        """The port is closed."""
        self._gone.pop(key, None)

    def total(self, key: str, slot: int, boards: Iterable[Scoreboard]) -> Counters:
        """Of all workers, those that are gone included."""
        found = self._gone.get(key, Counters())
        for board in boards:
            found = found.plus(board.read(slot))
        return found
