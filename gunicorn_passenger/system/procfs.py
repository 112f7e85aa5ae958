"""What the system tells about processes (proc(5)).

Process: the master and the command line. The supervisor may import only the standard library, and reads
/proc by itself. Never: raise for a process that has exited.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache

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


def started(pid: int) -> float | None:
    """Start in Unix time; ``None`` when the process has exited."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # the name, in parentheses, may contain any character
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
    return round(_booted() + ticks / _TICK, 2)


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
