"""The heartbeat of a worker for which the master could not create a heartbeat file.

Process: the master and a worker.
Never: let the master end the worker for its silence.
"""

from __future__ import annotations

import time
from typing import Any


class NullHeartbeat:
    """Stands in for gunicorn's ``WorkerTmp`` where the system has no room for its file."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def notify(self) -> None:
        """Do nothing: no file holds the time."""

    def last_update(self) -> float:
        """Always now, so that the master does not end the worker for its silence."""
        return time.monotonic()

    def fileno(self) -> int:
        """A listener's descriptor: gunicorn closes it on exec, as it does with the listeners anyway."""
        return int(self._worker.sockets[0].fileno())

    def close(self) -> None:
        """Do nothing: no file is open."""
