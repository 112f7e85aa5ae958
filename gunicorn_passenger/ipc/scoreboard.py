"""The scoreboard: a worker's counters, in memory that the master can read at any time.

Process: a worker, which writes its own, and the master, which reads all. Never: trusted by the master,
since a worker can write any number into its own.

A scoreboard is a page of memory that the master shares with one worker. So the master can read the counters
of a worker that is busy, or was killed. A worker writes it once a second and when it exits: what it has
counted in the last second before it was killed is lost. A thread writes at once what has blocked the worker,
which could not write it then.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

from gunicorn_passenger.ipc.connection_table import Seat

#: Servers that a worker can count; more are served and not counted.
SLOTS = 64
#: Where the primary is counted, and its key among those of the ports.
PRIMARY_SLOT = 0
PRIMARY_KEY = "primary"
_FIELDS = 5
#: Where a worker notes how its event loop was blocked, after the slots.
_BLOCKING = SLOTS * _FIELDS
#: Where it counts what it and its siblings have passed each other, after that.
_MAILBOX = _BLOCKING + 2
#: The largest count: what a JSON number and a Prometheus sample hold exactly. A worker can write more.
_LIMIT = (1 << 53) - 1


class Counters(NamedTuple):
    """What one server has done in one worker, or in all."""

    #: open now
    connections: int = 0
    #: accepted in all
    accepted: int = 0
    #: with a response
    requests: int = 0
    #: sent to clients, headers included
    bytes: int = 0
    #: responses of 500 and above, and incomplete ones
    errors: int = 0

    def plus(self, other: Counters) -> Counters:
        return Counters(*(min(a + b, _LIMIT) for a, b in zip(self, other, strict=True)))


class Blocking(NamedTuple):
    """How often a worker's event loop was blocked for too long, and the longest time."""

    times: int = 0
    milliseconds: int = 0

    def plus(self, other: Blocking) -> Blocking:
        return Blocking(
            min(self.times + other.times, _LIMIT), min(max(self.milliseconds, other.milliseconds), _LIMIT)
        )


class MailboxCounters(NamedTuple):
    """What a worker has sent to its siblings, and the sessions that bind clients to it."""

    #: connections that a sibling serves now
    passed: int = 0
    #: connections of a request that belongs to a sibling, which did not take it in time
    kept: int = 0
    #: messages
    published: int = 0
    #: messages that one sibling or one subscriber has missed, since too many waited for it
    dropped: int = 0
    #: requests with the Socket.IO session of no worker of this machine
    unknown: int = 0
    #: of Socket.IO, open now
    sessions: int = 0

    def plus(self, other: MailboxCounters) -> MailboxCounters:
        return MailboxCounters(*(min(a + b, _LIMIT) for a, b in zip(self, other, strict=True)))


class Scoreboard:
    """One worker's page."""

    def __init__(self) -> None:
        """
        :raises OSError: when the system has no memory for it.
        """
        #: the worker's place in the table that its siblings read
        self.seat: Seat | None = None
        self._map = mmap.mmap(-1, (_MAILBOX + len(MailboxCounters._fields)) * 8)
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

    def write_blocking(self, blocking: Blocking) -> None:
        """Called from a thread of its own, while the worker is blocked."""
        self._words[_BLOCKING], self._words[_BLOCKING + 1] = blocking

    def read_blocking(self) -> Blocking:
        return Blocking(*self._words[_BLOCKING:_MAILBOX]).plus(Blocking())

    def write_mailbox(self, counts: MailboxCounters) -> None:
        for offset, value in enumerate(counts):
            self._words[_MAILBOX + offset] = value

    def read_mailbox(self) -> MailboxCounters:
        return MailboxCounters(*self._words[_MAILBOX:]).plus(MailboxCounters())

    def close(self) -> None:
        self._words.release()
        self._map.close()


class RetiredCounters:
    """The counters of workers that have exited, by the key of a port."""

    def __init__(self) -> None:
        self._gone: dict[str, Counters] = {}
        self._blocking = Blocking()
        self._mailboxes = MailboxCounters()

    def retire(self, scoreboard: Scoreboard | None, ports: Iterable[Any]) -> None:
        """A worker has exited: keep its counters."""
        if scoreboard is None:
            return
        for key, slot in [(PRIMARY_KEY, PRIMARY_SLOT), *((port.key, port.slot) for port in ports)]:
            counts = scoreboard.read(slot)._replace(connections=0)
            self._gone[key] = self._gone.get(key, Counters()).plus(counts)
        self._blocking = self._blocking.plus(scoreboard.read_blocking())
        self._mailboxes = self._mailboxes.plus(scoreboard.read_mailbox()._replace(sessions=0))
        scoreboard.close()

    def forget(self, key: str) -> None:
        """The port is closed."""
        self._gone.pop(key, None)

    def total(self, key: str, slot: int, scoreboards: Iterable[Scoreboard]) -> Counters:
        """The counters of all workers, including those that have exited."""
        return reduce(Counters.plus, (s.read(slot) for s in scoreboards), self._gone.get(key, Counters()))

    def blocking(self, scoreboards: Iterable[Scoreboard]) -> Blocking:
        """How the event loops of all workers were blocked, including those that are gone."""
        return reduce(Blocking.plus, (s.read_blocking() for s in scoreboards), self._blocking)

    def mailboxes(self, scoreboards: Iterable[Scoreboard]) -> MailboxCounters:
        """What all workers, including those that are gone, have sent to their siblings."""
        return reduce(MailboxCounters.plus, (s.read_mailbox() for s in scoreboards), self._mailboxes)
