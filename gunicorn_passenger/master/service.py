"""The base class of what the broker's loop serves in addition to the workers.

Process: the master. Never: block, or raise an exception because of what another process has sent.
"""

from __future__ import annotations

from gunicorn_passenger.config.gunicorn_types import Arbiter
from gunicorn_passenger.ipc.messages import Message
from gunicorn_passenger.ipc.report_types import DaemonEntry


class BrokerService:
    """A service with descriptors of its own in the broker's loop. The methods here do nothing.

    Called with the broker's lock held, where a method does not say otherwise.
    """

    def started(self, arbiter: Arbiter) -> None:
        """The master is ready (gunicorn's ``when_ready``). Called in its main thread."""

    def reloaded(self) -> None:
        """gunicorn has read its configuration again (``HUP``). Called in its main thread."""

    def descriptors(self) -> dict[int, int]:
        """What to poll: descriptor to events of ``select.poll``."""
        return {}

    def serve(self, fd: int, events: int) -> None:
        """A descriptor is ready. The service handles its own failures; an exception is logged."""

    def tick(self, now: float) -> float | None:
        """Called in every iteration of the loop.

        :param now: seconds on the monotonic clock.
        :returns: when (on that clock) to call it again; ``None`` when only a descriptor matters.
        """
        return None

    def message(self, age: int, message: Message) -> Message | None:
        """A worker has sent a message that the broker itself does not handle.

        :param age: the worker's number.
        :returns: the response; ``None`` when the service does not handle the message either.
        """
        return None

    def left(self, age: int) -> None:
        """A worker has exited."""

    def daemons(self) -> list[DaemonEntry] | None:
        """The daemons of the application, for its report; ``None`` from a service that has none."""
        return None

    def command(self, verb: str, name: str) -> str | None:
        """``restart`` or ``stop`` what has this name.

        :returns: what was done, for people; ``None`` when the service has nothing of that name.
        :raises PassengerError: when it cannot be done.
        """
        return None

    def stop(self) -> None:
        """gunicorn exits, and its workers have exited: stop everything, within a time limit.

        Called in the main thread, without the lock.
        """

    def forked(self, upgrades: bool) -> None:
        """In a child of the master: close what is the master's.

        :param upgrades: whether the child becomes the next master (``USR2``).
        """
