"""The grace period: how long ports and daemons stay after the last worker has stopped using them.

Process: the master. Never: closes or ends anything; the caller does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class GraceTimer(Generic[Key]):
    """Measures for how long each of several things has been unused.

    The timer is paused while a worker boots, however long its imports take: that worker may be about to use
    the thing, and a reload must never end one.
    """

    def __init__(self) -> None:
        #: the key of each unused thing, and since when (monotonic seconds)
        self._unused_since: dict[Key, float] = {}

    def restart(self, key: Key) -> None:
        """A worker uses the thing, or has used it."""
        self._unused_since.pop(key, None)

    def expired(self, unused: Iterable[Key], now: float, grace: float, settled: bool) -> list[Key]:
        """The things that have been unused for the grace period; each is reported once.

        :param unused: all things that no worker uses now.
        :param now: monotonic seconds.
        :param grace: the grace period in seconds.
        :param settled: whether no worker boots.
        """
        self._unused_since = {key: self._unused_since.get(key, now) for key in unused} if settled else {}
        found = [key for key, since in self._unused_since.items() if now - since >= grace]
        for key in found:
            del self._unused_since[key]
        return found

    def deadline(self, grace: float) -> float | None:
        """When the next thing expires (monotonic seconds).

        :param grace: the grace period in seconds.
        """
        return min(self._unused_since.values()) + grace if self._unused_since else None
