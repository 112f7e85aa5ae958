"""Which functions of this process receive the messages of a topic.

Process: every process. Never: wait, or know how a message has come here.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

#: Is called with a message, and must not wait; raises ``queue.Full`` when it has no room for the message.
Receive = Callable[[bytes], object]


class Subscribers:
    """The subscribers of one process. Any thread may call, also a finalizer: no method takes a lock."""

    def __init__(self) -> None:
        self._by_topic: dict[str, dict[Receive, None]] = {}

    def add(self, topic: str, receive: Receive) -> None:
        self._by_topic.setdefault(topic, {})[receive] = None

    def remove(self, topic: str, receive: Receive) -> None:
        self._by_topic.get(topic, {}).pop(receive, None)

    def deliver(self, topic: str, data: bytes) -> int:
        """Give all subscribers of a topic a message.

        :returns: how many of them had no room for it.
        """
        dropped = 0
        for receive in list(self._by_topic.get(topic, ())):
            try:
                receive(data)
            except queue.Full:
                dropped += 1
        return dropped
