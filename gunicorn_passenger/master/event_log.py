"""The last events of the application: reloads, crashes, takeovers, daemons that died.

Process: the master. Never: grow without bound.
"""

from __future__ import annotations

import time
from collections import Counter, deque

from gunicorn_passenger.ipc.report_types import EventEntry

#: How many events are remembered.
_EVENTS = 100


class EventLog:
    """The last events: reloads, crashes, takeovers, daemons that died."""

    def __init__(self) -> None:
        self._events: deque[EventEntry] = deque(maxlen=_EVENTS)
        #: how many there were of each kind
        self.totals: Counter[str] = Counter()

    def record(self, kind: str, text: str) -> None:
        """
        :param kind: one word, such as ``"crash"``.
        :param text: one line for people.
        """
        self.totals[kind] += 1
        self._events.append({"time": round(time.time(), 3), "kind": kind, "text": text})

    def list(self) -> list[EventEntry]:
        """The oldest first."""
        return list(self._events)
