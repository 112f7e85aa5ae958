"""Finds the processes of a daemon in the process tree.

Process: the supervisor, and the master when the supervisor has died. Never: signal a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from gunicorn_passenger.system import procfs

#: The variable in the environment of all processes of a daemon; its value is the supervisor's key for it.
KEY_VARIABLE = "PASSENGER_DAEMON_KEY"


def descendants() -> dict[int, procfs.Stat]:
    """All running processes below this one, by pid."""
    table = {pid: stat for pid in procfs.pids() if (stat := procfs.stat(pid)) is not None}
    below = _with_children({os.getpid()}, table) - {os.getpid()}
    return {pid: table[pid] for pid in below if table[pid].state not in "ZX"}


def processes_of(first: int, key: str) -> list[int]:
    """The processes of a daemon: of its session, with its key in their environment, or below these.

    :param first: the pid of the daemon's first process, which leads the session.
    """
    below = descendants()
    of_session = {pid for pid, stat in below.items() if first in (stat.session, pid)}
    return sorted(_with_children(of_session | with_keys([key], below), below))


def with_keys(keys: Iterable[str], pids: Iterable[int]) -> set[int]:
    """Those of the processes that have one of the keys in their environment."""
    marks = {f"{KEY_VARIABLE}={key}".encode() for key in keys}
    return {pid for pid in pids if marks.intersection(procfs.environment(pid))}


def _with_children(pids: set[int], table: dict[int, procfs.Stat]) -> set[int]:
    found, new = set(pids), set(pids)
    while new:
        new = {pid for pid, stat in table.items() if stat.parent in new} - found
        found |= new
    return found
