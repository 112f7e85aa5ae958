"""What the benchmarks share: servers on pinned cores, loads, interleaved rounds, goals, tables."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
APPS = ROOT / "bench" / "apps"

#: Seconds that any single step may take on a loaded machine.
PATIENCE = 60.0


class Failed(Exception):
    """A measurement that cannot be had, and why."""


class PortTaken(Failed):
    """Another program took a port between the search for a free one and its use."""
