"""What processes and other programs use of the machine, as /proc tells it."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def all_processes() -> Iterator[tuple[int, list[str]]]:
    """All processes, each with its fields of /proc/PID/stat from the state on."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """A process and its descendants, the eldest first."""
    children: dict[int, list[int]] = {}
    for child, fields in all_processes():
        children.setdefault(int(fields[1]), []).append(child)
    found = [pid]
    for member in found:
        found.extend(sorted(children.get(member, [])))
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """The CPU time that processes have used, user's and system's, with that of threads which have ended.

    The clock is that of clock_getcpuclockid(3), which has nanoseconds where /proc has ticks.
    """
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def busy_seconds(cores: Sequence[int]) -> float:
    """The time for which cores were not idle, a hypervisor's theft included."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name in [f"cpu{core}" for core in cores]:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, counts)
            ticks += user + nice + system + irq + softirq + steal
    return ticks / TICK


def memory_of(pid: int, file: str = "smaps_rollup") -> dict[str, int]:
    """The amounts in kB in a file of /proc/PID: ``smaps_rollup``, or ``status``, which has the peak."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[-2]) for line in lines if line.endswith(" kB")}
