"""What the broker's thread looks after besides the workers.

Runs in: the master. Must never: block, or raise for what somebody else sent.
"""

from __future__ import annotations

from typing import Any, Protocol

from gunicorn_passenger.ipc.channel import Message


class BrokerService(Protocol):
    """Something with descriptors of its own in the broker's loop.

    Called with the broker's gate held, where it does not say otherwise.
    """

    def started(self, arbiter: Any) -> None:
        """The master is ready (gunicorn's ``when_ready``). Called in its main thread."""

    def reloaded(self) -> None:
        """gunicorn has read its configuration again (``HUP``). Called in its main thread."""

    def descriptors(self) -> dict[int, int]:
        """What to poll: descriptor to events of ``select.poll``."""

    def serve(self, fd: int, events: int) -> None:
        """One of them is ready. A failure is the part's own to handle; what it raises is logged."""

    def tick(self, now: float) -> float | None:
        """Called in every round.

        :param now: seconds on the monotonic clock.
        :returns: when (on that clock) to be called again at the latest; ``None`` when only a descriptor
        matters.
        """

    def message(self, age: int, message: Message) -> Message | None:
        """A worker has sent a message that the broker does not know.

        :param age: the worker's number.
        :returns: the answer; ``None`` when the message is none of this part's.
        """

    def left(self, age: int) -> None:
        """A worker is gone."""

    def report(self) -> dict[str, Any]:
        """What it adds to the report of the application, by key."""

    def command(self, verb: str, name: str) -> str | None:
        """``restart`` or ``stop`` what has this name; the answer for people, ``None`` when it has none such.

        :raises PassengerError: when it cannot.
        """

    def stop(self) -> None:
        """gunicorn exits, its workers are gone: end everything, within a bound. In the main thread."""

    def forked(self) -> None:
        """In a child of the master: close what is the master's."""
