"""What the system tells about processes (proc(5)).

Process: the master, a worker, the supervisor and the command line. Never: raise for a process that has
exited, or import anything but the standard library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")
#: Bytes of an environment that are read.
_MAX_ENVIRON = 1 << 20


def pids() -> Iterator[int]:
    """The pid of each process."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            yield int(name)


def memory(pid: int) -> int | None:
    """Resident bytes; ``None`` when the process has exited."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


class Stat(NamedTuple):
    """Fields of /proc/PID/stat."""

    #: ``Z`` and ``X``: it has exited
    state: str
    #: pids
    parent: int
    session: int
    #: clock ticks since the system booted
    start_ticks: int


def stat(pid: int) -> Stat | None:
    """``None`` when the process has exited and was reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # the name, in parentheses, may contain any character
            fields = file.read().rpartition(")")[2].split()
        return Stat(fields[0], int(fields[1]), int(fields[3]), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def started(pid: int) -> float | None:
    """Start in Unix time; ``None`` when the process has exited."""
    found = stat(pid)
    return None if found is None else round(_booted() + found.start_ticks / _TICK, 2)


@lru_cache(maxsize=1)
def _booted() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def environment(pid: int) -> list[bytes]:
    """The ``NAME=value`` entries that a process was started with; empty where they cannot be read."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read(_MAX_ENVIRON).split(b"\0")
    return []


def owner(pid: int) -> int | None:
    """The user id of a process; ``None`` when it has exited."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def own_descriptors() -> list[int]:
    """The open descriptors of this process; one of them, for the listing itself, is closed again."""
    with suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/fd")]
    return []
