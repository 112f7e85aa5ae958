"""Whether an application is healthy, judged by its report: for ``/health`` and ``gunicorn-passenger health``.

Process: a worker, the status daemon, the command line. Never: ask for a report.
"""

from __future__ import annotations

from gunicorn_passenger.ipc.report_types import Report


def count_workers(report: Report) -> dict[str, int]:
    """How many workers are in each state. ``"running"`` of another worker class counts as ``"ready"``."""
    counts = {"ready": 0, "leaving": 0, "booting": 0}
    for worker in report["workers"]:
        state = "ready" if worker["state"] == "running" else worker["state"]
        counts[state] = counts.get(state, 0) + 1
    return counts


def serves(counts: dict[str, int]) -> bool:
    """Whether at least one worker serves; a draining worker still finishes its requests."""
    return counts["ready"] + counts["leaving"] > 0
