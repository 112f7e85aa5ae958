"""All that is printed: tables, progress, the machine, and the figures in cells."""

import contextlib
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def progress(text: str = "") -> None:
    """Say on a terminal what is done now; without a text, remove what was said last."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found[1] if found else model
    return f"{os.cpu_count()} CPUs, {model}, {platform.system()} {platform.release()}"


def print_machine(versions: Mapping[str, str]) -> None:
    progress()
    print(f"Machine: {machine()}")
    print("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def percentile(values: Sequence[float], percent: float) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
