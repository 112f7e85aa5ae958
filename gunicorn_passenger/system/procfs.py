"""What the system tells of a process.

Runs in: the master, the supervisor and the command line. Must never: raise for one that is gone.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int | None:
    """Bytes resident; ``None`` when the process is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


def started(pid: int) -> float | None:
    """Unix time of its start; ``None`` when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # the name, in parentheses, may have any character in it
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
    return round(_booted() + ticks / _TICK, 2)


@lru_cache(maxsize=1)
def _booted() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
