"""Messages between the workers, for the parts of the package that need no more than that.

Process: a worker; plain Python, where there are no siblings; and the master with ``--preload``, likewise.
Never: wait for a sibling.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gunicorn_passenger.ipc.subscribers import Receive, Subscribers
from gunicorn_passenger.serving.registry import registry

if TYPE_CHECKING:
    from gunicorn_passenger.serving.mailboxes import Mailboxes

T = TypeVar("T")

#: of a process that is not a worker
_subscribers = Subscribers()


def publish(topic: str, data: bytes, here: bool = False) -> None:
    """Send a message to the siblings that have subscribed to its topic. Any thread may call.

    :param here: whether the subscribers of this process receive it, too.
    :raises ValueError: when the topic or the data is too long (see :mod:`gunicorn_passenger.ipc.mailbox`).
    """

    def send(mailboxes: Mailboxes | None) -> None:
        if mailboxes is not None:
            mailboxes.publish(topic, data, here)
        elif here:
            _subscribers.deliver(topic, data)

    _in_hub(send)


def subscribe(topic: str, receive: Receive) -> Subscribers:
    """Have the messages of a topic that are published from now on. Any thread may call.

    :param receive: called in the hub with each message.
    :returns: where to remove ``receive`` again.
    """
    subscribers = _in_hub(lambda mailboxes: _subscribers if mailboxes is None else mailboxes.subscribers)
    subscribers.add(topic, receive)
    return subscribers


def tag() -> str:
    """The tag of this worker; empty where it has no mailbox. Any thread may call."""
    return _in_hub(lambda mailboxes: "" if mailboxes is None else mailboxes.tag)


def in_worker() -> bool:
    """Whether this process is a worker, and not a child that the program has forked."""
    return (
        registry.broker is not None and registry.scheduler is not None and registry.worker.pid == os.getpid()
    )


def _in_hub(use: Callable[[Mailboxes | None], T]) -> T:
    """Use this worker's mailboxes; ``None`` in any other process."""
    if not in_worker():
        return use(None)
    assert registry.scheduler is not None
    return registry.scheduler.run_in_hub(partial(_use, use))


def _use(use: Callable[[Mailboxes | None], T]) -> T:
    registry.connect_siblings()
    mailboxes = registry.acceptors.mailboxes
    if mailboxes is not None:
        mailboxes.open()
    return use(mailboxes)
