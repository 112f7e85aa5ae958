"""Makes the workers' mailboxes, and tells the workers of those of their siblings.

Process: the master, in the broker's thread and around a fork. Never: read the mailbox of a worker that runs,
or act on what is in a packet.

The receiving end of each mailbox stays open in the master. When a worker exits, the master closes the mailbox
to its siblings, and puts the connections that the worker has not taken into the mailbox of another one.
Messages that it has not read were for that worker alone.
"""

from __future__ import annotations

import _socket
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from gunicorn_passenger.ipc import mailbox
from gunicorn_passenger.ipc.messages import (
    MailboxOpened,
    Message,
    OpenMailbox,
    RequestDenied,
    SiblingChanged,
    SiblingJoined,
)
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels

#: Random bytes of a tag.
TAG_BYTES = 12


class _Mailbox(NamedTuple):
    tag: str
    receiving: _socket.socket
    sending: _socket.socket


class MailboxExchange:
    """The mailboxes of the workers that have asked for one."""

    def __init__(
        self, workers: WorkerChannels, reply: Callable[[WorkerChannel, Message, int | None], bool]
    ) -> None:
        """:param reply: sends a message to a worker; closes the channel and returns false when that fails."""
        self._workers = workers
        self._reply = reply
        #: by the age of the worker that reads it
        self._by_age: dict[int, _Mailbox] = {}

    def open(self, worker: WorkerChannel, message: OpenMailbox, _fd: int | None) -> None:
        """A worker wants its mailbox."""
        if worker.age in self._by_age:
            self._reply(worker, RequestDenied(message.id, "listen", 0, "the worker has its mailbox"), None)
            return
        try:
            receiving, sending = mailbox.pair()
        except OSError as error:
            self._reply(worker, RequestDenied(message.id, "listen", 0, error.strerror or ""), None)
            return
        receiving.setblocking(False)
        own = _Mailbox(secrets.token_urlsafe(TAG_BYTES), receiving, sending)
        siblings = self._others(worker)
        self._by_age[worker.age] = own
        for other, theirs in siblings:
            # a failed reply closes a channel, and with it a mailbox
            if sending.fileno() < 0:
                return
            self._reply(other, SiblingJoined(0, own.tag, worker.serving), sending.fileno())
            if theirs.sending.fileno() >= 0 and sending.fileno() >= 0:
                self._reply(worker, SiblingJoined(0, theirs.tag, other.serving), theirs.sending.fileno())
        if own.receiving.fileno() >= 0:
            self._reply(worker, MailboxOpened(message.id, own.tag), receiving.fileno())

    def _others(self, worker: WorkerChannel) -> list[tuple[WorkerChannel, _Mailbox]]:
        return [(w, self._by_age[w.age]) for w in self._workers if w is not worker and w.age in self._by_age]

    def on_worker_changed(self, worker: WorkerChannel, gone: bool = False) -> None:
        """A worker is ready, drains, or has exited."""
        if worker.age in self._by_age:
            own = self._by_age[worker.age]
            for other, _ in self._others(worker):
                self._reply(other, SiblingChanged(0, own.tag, worker.serving and not gone, gone), None)

    def on_worker_gone(self, worker: WorkerChannel) -> None:
        """A worker has exited: its siblings take the connections in its mailbox."""
        own = self._by_age.get(worker.age)
        if own is None:
            return
        self.on_worker_changed(worker, gone=True)
        del self._by_age[worker.age]
        own.sending.close()
        with suppress(OSError):
            # from now on no sibling can send; what is in the mailbox stays
            own.receiving.shutdown(socket.SHUT_RD)
        with suppress(OSError):
            while (taken := mailbox.take(own.receiving, worker.closer.close)) is not None:
                packet, fds = taken
                if packet[:1].lower() == mailbox.CONNECTION.encode():
                    self._give_to_sibling(worker, packet, fds)
                for fd in fds:
                    worker.closer.close(fd)
        worker.closer.close_socket(own.receiving)

    def _give_to_sibling(self, worker: WorkerChannel, packet: bytes, fds: list[int]) -> None:
        for other, theirs in self._others(worker):
            if other.serving and not other.stopped:
                with suppress(mailbox.MailboxFull, mailbox.MailboxGone):
                    mailbox.forward(theirs.sending, packet, fds)
                    return

    def publish(self, topic: str, data: bytes) -> int:
        """Send all workers a message.

        :returns: how many of them have it in their mailbox; one that reads too slowly misses it.
        :raises ValueError: when the topic or the data is too long.
        """
        reached = 0
        for own in self._by_age.values():
            with suppress(mailbox.MailboxFull, mailbox.MailboxGone):
                mailbox.post(own.sending, mailbox.MESSAGE, topic, data)
                reached += 1
        return reached

    def after_fork_in_child(self) -> None:
        """The child has copies of all ends."""
        for own in self._by_age.values():
            for end in own.receiving, own.sending:
                with suppress(OSError):
                    end.close()
        self._by_age.clear()
