"""Connection migration: passes idle connections of draining workers to their siblings.

Process: the master, in the broker's thread. Never: keep a connection, or let two workers read from one.

The draining worker sends OfferConnections; the relay sends the descriptors to a sibling in AssignConnections.
The sibling responds with AssignResult and waits. Then the relay decides, once for both: AssignSettled has the
sibling serve the connections, and OfferSettled has the draining worker close its copies. A sibling that does
not respond in time is busy: the draining worker keeps the connections, and the sibling gets AssignSettled
with the opposite decision when its response finally comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

from gunicorn_passenger.config.address import is_ip
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.messages import (
    MAX_KEY,
    AssignConnections,
    AssignResult,
    AssignSettled,
    Message,
    OfferConnections,
    OfferSettled,
)
from gunicorn_passenger.master.descriptors import is_connection
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels

#: Seconds that a sibling has to respond. Until then a request on an offered connection waits.
RESPONSE_TIME = 0.1


class _Offer(NamedTuple):
    """Connections on their way from one worker to another."""

    giver: WorkerChannel
    #: the ``id`` of its OfferConnections
    number: int
    successor: WorkerChannel
    #: which of the offered connections the successor was sent
    positions: list[int]
    #: monotonic seconds
    deadline: float


class MigrationRelay:
    """The connections on their way between workers; each draining worker has one offer at a time."""

    def __init__(
        self,
        workers: WorkerChannels,
        listeners: Listeners,
        reply: Callable[[WorkerChannel, Message], bool],
    ) -> None:
        """:param reply: sends a message to a worker; closes the channel and returns false when that fails."""
        self._workers = workers
        self._listeners = listeners
        self._reply = reply
        #: by the ``id`` of the AssignConnections
        self._offers: dict[int, _Offer] = {}
        #: ages of workers that did not respond in time, until they respond
        self._busy: set[int] = set()
        #: offers so far, which numbers them and takes turns between the successors
        self._count = 0

    def offer(
        self, giver: WorkerChannel, message: OfferConnections, fds: Sequence[int], stopping: bool
    ) -> None:
        """A draining worker offers connections.

        :param fds: their descriptors, which stay the caller's.
        :param stopping: whether all workers drain, so that none can take them.
        """
        addrs = _peers(message.addrs)
        offered = any(offer.giver is giver for offer in self._offers.values())
        valid = len(addrs) == len(fds) and not offered and not stopping
        successors = self._successors(message.key, giver) if valid else []
        checked = zip(addrs, fds, strict=True) if successors else ()
        positions = [n for n, (addr, fd) in enumerate(checked) if _is_peer(addr) and is_connection(fd)]
        if positions:
            self._count += 1
            successor = successors[self._count % len(successors)]
            passed_on = json.dumps([addrs[n] for n in positions])
            # a successor that has exited, or does not read, is handled elsewhere
            with suppress(BlockingIOError, channel.ChannelClosed, OSError):
                channel.send(
                    successor.sock,
                    AssignConnections(self._count, message.key, passed_on),
                    *(fds[n] for n in positions),
                )
                deadline = monotonic() + RESPONSE_TIME
                self._offers[self._count] = _Offer(giver, message.id, successor, positions, deadline)
                return
        self._reply(giver, OfferSettled(message.id, 0))

    def _successors(self, key: str, giver: WorkerChannel) -> list[WorkerChannel]:
        """The workers that may take a connection of a server.

        They are among the youngest ``num_workers``, and gunicorn has not stopped them: a busy
        worker may not know yet that it has to leave.
        """
        port = self._listeners.ports.get(key) if len(key) <= MAX_KEY else None
        youngest = sorted(self._workers, key=lambda worker: worker.age)[-max(self._workers.planned, 1) :]
        return [
            worker
            for worker in youngest
            if worker.serving
            and not worker.stopped
            and worker is not giver
            and worker.age not in self._busy
            and (port is None or worker.age in port.accepting)
        ]

    def on_assign_result(self, successor: WorkerChannel, message: AssignResult) -> None:
        """A successor can serve the connections that it was sent, or only the first few of them."""
        self._busy.discard(successor.age)
        offer = self._offers.get(message.id)
        if offer is None or offer.successor is not successor:
            self._reply(successor, AssignSettled(message.id, False))
            return
        del self._offers[message.id]
        taken = offer.positions[: max(message.taken, 0)]
        if not self._reply(successor, AssignSettled(message.id, bool(taken))):
            taken = []
        self._settle(offer, taken)

    def _settle(self, offer: _Offer, taken: list[int]) -> None:
        if offer.giver.sock.fileno() >= 0:
            self._reply(offer.giver, OfferSettled(offer.number, sum(1 << position for position in taken)))

    def tick(self, now: float) -> float | None:
        """Take back the connections of successors that do not respond in time.

        :param now: monotonic seconds.
        :returns: when to call it again; ``None`` when no offer is pending.
        """
        for number, offer in list(self._offers.items()):
            if offer.deadline <= now and self._offers.pop(number, None) is not None:
                self._busy.add(offer.successor.age)
                self._settle(offer, [])
        return min((offer.deadline for offer in self._offers.values()), default=None)

    def on_worker_gone(self, worker: WorkerChannel) -> None:
        """A worker has exited: connections on their way to it stay with the workers that offered them."""
        self._busy.discard(worker.age)
        for number, offer in list(self._offers.items()):
            # a reply that fails closes the giver's channel, which leads here again
            if offer.successor is worker and self._offers.pop(number, None) is not None:
                self._settle(offer, [])


def _peers(text: str) -> list[Any]:
    """The addresses of an offer; empty when a worker's text is not a list."""
    with suppress(ValueError, RecursionError):
        addrs = json.loads(text)
        if isinstance(addrs, list):
            return addrs
    return []


def _is_peer(addr: object) -> bool:
    """Whether a worker's value is an address as ``accept()`` gives one; a UNIX client's has no name."""
    if not isinstance(addr, list):
        return addr == ""
    return (
        len(addr) in (2, 4)
        and is_ip(addr[0])
        and all(type(part) is int and 0 <= part < 1 << 32 for part in addr[1:])
    )
