"""The grace period: how long ports and daemons stay after the last worker has stopped using them.

Process: the master. Never: close or stop anything; the caller does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class GraceTimer(Generic[Key]):
    """Measures for how long each of several things has been unused.

    The timer is paused while workers come and go, however long their imports or their last requests take: a
    worker that boots may be about to use the thing, and a reload must never end one.
    """

    def __init__(self) -> None:
        #: the key of each unused thing, and for how many seconds it has been unused, without the pauses
        self._unused_for: dict[Key, float] = {}
        #: when that was true (monotonic seconds)
        self._updated = 0.0
        self._paused = True

    def restart(self, key: Key) -> None:
        """A worker uses the thing, or has used it."""
        self._unused_for.pop(key, None)

    def expired(self, unused: Iterable[Key], now: float, grace: float, settled: bool) -> list[Key]:
        """The things that have been unused for the grace period; each is reported once.

        :param unused: all things that no worker uses now.
        :param now: monotonic seconds.
        :param grace: the grace period in seconds.
        :param settled: whether all workers serve; the timer is paused while it is false.
        """
        elapsed = 0.0 if self._paused else now - self._updated
        before, self._unused_for = self._unused_for, {}
        for key in unused:
            self._unused_for[key] = before[key] + elapsed if key in before else 0.0
        self._updated, self._paused = now, not settled
        found = [key for key, seconds in self._unused_for.items() if settled and seconds >= grace]
        for key in found:
            del self._unused_for[key]
        return found

    def deadline(self, grace: float) -> float | None:
        """When the next thing expires (monotonic seconds).

        :param grace: the grace period in seconds.
        """
        if self._paused or not self._unused_for:
            return None
        return self._updated + grace - max(self._unused_for.values())
