"""Waits for what another process does."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Seconds that any condition may take to come true on a loaded machine.
PATIENCE = 60.0


def wait_for(condition: Callable[[], Any], what: object = "the condition", timeout: float = PATIENCE) -> Any:
    """Call ``condition`` until it returns something true, and return that; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.001  # what another thread of this process does is often done within a moment
    while True:
        began = time.thread_time()
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s for {what() if callable(what) else what}")
        # a condition that costs much (it searches a long log) leaves the processor to what it waits for
        time.sleep(max(pause, 3 * (time.thread_time() - began)))
        pause = min(2 * pause, 0.02)


def stop(pid: int) -> None:
    """Stop a process, and return when all of its threads stand still.

    ``SIGSTOP`` is delivered to one thread, which stops the others once it runs; until then they continue.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: stands_still(pid), f"process {pid} to stand still")


def stands_still(pid: int) -> bool:
    """Whether all threads of a process are stopped or have ended."""
    stats = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.read_text().rpartition(")")[2].split()[0] in "TZ" for stat in stats)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process; what happens meanwhile, it meets at once when it continues."""
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
