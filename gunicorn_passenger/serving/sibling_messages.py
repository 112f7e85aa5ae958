"""Messages between the workers, for the parts of the package that need no more than that.

Process: a worker; plain Python, where there are no siblings; and the master with ``--preload``, likewise.
Never: wait for a sibling.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gunicorn_passenger.serving.registry import registry

if TYPE_CHECKING:
    from gunicorn_passenger.serving.mailboxes import Mailboxes

T = TypeVar("T")


def publish(topic: str, data: bytes) -> None:
    """Send a message to the siblings that have subscribed to its topic. Any thread may call.

    :raises ValueError: when the topic or the data is too long (see :mod:`gunicorn_passenger.ipc.mailbox`).
    """
    _in_hub(lambda mailboxes: mailboxes.publish(topic, data), None)


def subscribe(topic: str, receive: Callable[[bytes], object]) -> None:
    """Have the messages of a topic that siblings publish from now on. Any thread may call.

    :param receive: called in the hub with each message; it must not wait.
    """
    _in_hub(lambda mailboxes: mailboxes.subscribe(topic, receive), None)


def tag() -> str:
    """The tag of this worker; empty where it has no mailbox. Any thread may call."""
    return _in_hub(lambda mailboxes: mailboxes.tag, "")


def _in_hub(use: Callable[[Mailboxes], T], otherwise: T) -> T:
    """Use this worker's mailboxes, if it has any. A child that the program has forked has none."""
    if registry.broker is None or registry.scheduler is None or registry.worker.pid != os.getpid():
        return otherwise
    return registry.scheduler.run_in_hub(partial(_use, use, otherwise))


def _use(use: Callable[[Mailboxes], T], otherwise: T) -> T:
    registry.prepare_migration()
    mailboxes = registry.acceptors.mailboxes
    return use(mailboxes) if mailboxes is not None and mailboxes.open() else otherwise
