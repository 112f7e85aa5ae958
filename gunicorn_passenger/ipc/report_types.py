"""The report of an application, as ``/status.json`` and ``gunicorn-passenger status --json`` show it.

Process: the master, which makes it (``status/report.py``); all that show it. Never: have code.
"""

from __future__ import annotations

from typing import TypedDict


class WorkerEntry(TypedDict):
    """A worker."""

    pid: int
    number: int
    #: Unix time; ``None`` when the worker has just exited
    started: float | None
    #: ``"booting"``, ``"ready"``, ``"leaving"``; ``"running"`` under another worker class
    state: str
    #: resident bytes
    memory: int | None


class ServerCounts(TypedDict):
    """What all workers, including those that have exited, have counted of a server."""

    connections: int
    accepted: int
    #: these three are ``None`` for a third-party server
    requests: int | None
    bytes: int | None
    errors: int | None


class ServerEntry(ServerCounts):
    """A server."""

    name: str
    address: str
    placement: str
    #: ``"listening"`` or ``"stopped"``
    state: str
    #: the pids of those that accept
    workers: list[int]


class DaemonEntry(TypedDict):
    """A daemon."""

    name: str
    pid: int | None
    #: see ``daemons/state.py``
    state: str
    address: str | None
    #: Unix time
    started: float | None
    restarts: int
    command: str
    #: resident bytes
    memory: int | None
    user: str


class PortsEntry(TypedDict):
    """The ports of an application, as texts such as ``"9000-9002"``."""

    limited: bool
    allocated: str | None
    open: str
    free: str | None


class BlockingEntry(TypedDict):
    """How the event loops of workers were blocked for longer than the setting ``max_blocking_time``."""

    times: int
    #: seconds
    longest: float


class MailboxesEntry(TypedDict):
    """What the workers have sent each other, see :class:`.scoreboard.MailboxCounters`."""

    passed: int
    kept: int
    published: int
    dropped: int
    unknown: int
    sessions: int


class EventEntry(TypedDict):
    """An event."""

    #: Unix time
    time: float
    kind: str
    #: one line for people
    text: str


class _Always(TypedDict):
    version: str
    name: str
    pid: int
    user: str
    #: Unix time
    started: float
    #: ``"starting"``, ``"running"`` or ``"stopping"``
    state: str
    #: why new workers cannot start, such as ``"reload failed: ..."``; empty when they can
    failure: str
    #: resident bytes of the master alone
    memory: int | None
    workers: list[WorkerEntry]
    servers: list[ServerEntry]
    blocking: BlockingEntry
    mailboxes: MailboxesEntry
    #: the oldest first
    events: list[EventEntry]
    #: how many events of each kind there were
    totals: dict[str, int]


class Report(_Always, total=False):
    """An application."""

    ports: PortsEntry
    #: where a master of this package starts daemons
    daemons: list[DaemonEntry]
    #: when the status application got the report (Unix time)
    now: float
