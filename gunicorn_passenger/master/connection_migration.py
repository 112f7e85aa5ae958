"""Connection migration: passes idle connections of draining workers to their siblings.

Process: the master, in the broker's thread. Never: keeps a connection; it is either the old worker's or the
new one's.

The draining worker sends OfferConnection; the broker sends the descriptor to a sibling in AssignConnection
and waits for its AssignResult. Only then the draining worker gets Acknowledged or OfferRejected, and closes
the connection or keeps it.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.messages import (
    MAX_KEY,
    Acknowledged,
    AssignConnection,
    AssignResult,
    Message,
    OfferConnection,
    OfferRejected,
)
from gunicorn_passenger.master.descriptors import is_connection
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels

#: Characters of a client's address, as JSON.
_MAX_PEER = 1000


class _Offer(NamedTuple):
    """A connection on its way from one worker to another."""

    giver: WorkerChannel
    #: the ``id`` of its OfferConnection
    number: int
    successor: WorkerChannel


class MigrationRelay:
    """The connections on their way between workers, one for each draining worker at a time."""

    def __init__(
        self,
        workers: WorkerChannels,
        listeners: Listeners,
        reply: Callable[[WorkerChannel, Message], object],
    ) -> None:
        """:param reply: sends a message to a worker, and closes the channel when that fails."""
        self._workers = workers
        self._listeners = listeners
        self._reply = reply
        #: by the ``id`` of the AssignConnection
        self._offers: dict[int, _Offer] = {}
        #: connections so far, which numbers them and takes turns between the successors
        self._count = 0

    def offer(self, giver: WorkerChannel, message: OfferConnection, fd: int | None, stopping: bool) -> None:
        """A draining worker offers a connection.

        :param fd: the connection's descriptor, which stays the caller's.
        :param stopping: whether all workers drain, so that none can take it.
        """
        port = self._listeners.ports.get(message.key)
        ages = port.accepting if port is not None else self._workers.ages()
        successors = sorted(age for age in ages if age != giver.age and self._workers.is_serving(age))
        offered = any(offer.giver is giver for offer in self._offers.values())
        valid = len(message.key) <= MAX_KEY and _is_peer(message.addr)
        if successors and valid and fd is not None and is_connection(fd) and not offered and not stopping:
            self._count += 1
            successor = self._workers.by_age(successors[self._count % len(successors)])
            assert successor is not None
            # a successor that is gone, or does not read, is noticed elsewhere
            with suppress(BlockingIOError, channel.ChannelClosed, OSError):
                channel.send(successor.sock, AssignConnection(self._count, message.key, message.addr), fd)
                self._offers[self._count] = _Offer(giver, message.id, successor)
                return
        self._reply(giver, OfferRejected(message.id))

    def on_assign_result(self, successor: WorkerChannel, message: AssignResult) -> None:
        """A successor serves the connection that it was sent, or cannot."""
        offer = self._offers.get(message.id)
        if offer is not None and offer.successor is successor:
            del self._offers[message.id]
            self._reply(offer.giver, (Acknowledged if message.taken else OfferRejected)(offer.number))

    def on_worker_gone(self, worker: WorkerChannel) -> None:
        """A worker is gone: the connections on their way to it stay their givers'."""
        for key, offer in list(self._offers.items()):
            # a reply that fails closes the giver's channel, which leads here again
            if worker in (offer.giver, offer.successor) and self._offers.pop(key, None) is None:
                continue
            if offer.successor is worker and offer.giver.sock.fileno() >= 0:
                self._reply(offer.giver, OfferRejected(offer.number))


def _is_peer(text: str) -> bool:
    """Whether a worker's text is an address as ``accept()`` gives one."""
    if len(text) > _MAX_PEER:
        return False
    try:
        addr = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(addr, list):
        return (
            len(addr) in (2, 4)
            and _is_ip(addr[0])
            and all(type(part) is int and 0 <= part < 1 << 32 for part in addr[1:])
        )
    return addr is None or isinstance(addr, str)


def _is_ip(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
