"""Creates the mailboxes of the workers, and tells each worker about those of its siblings.

Process: the master, in the broker's thread and around a fork. Never: read the mailbox of a
worker that may still read it, or trust what is in a packet.

The receiving end of a worker's mailbox stays open in the master. When a worker exits, the master closes the
mailbox to its siblings, and puts the connections that the worker has not taken into the mailbox of another
one. Messages that it has not read were for that worker alone. A process that is not a worker, such as a
daemon, has a mailbox for messages; the workers know it as a sibling that serves no clients.

A worker that does not read its channel learns of its siblings later: the news must not fill the channel,
which other messages need.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import secrets
import socket
import struct
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from gunicorn_passenger.ipc import channel, mailbox
from gunicorn_passenger.ipc.messages import (
    MailboxOpened,
    Message,
    OpenMailbox,
    ReleaseMailbox,
    RequestDenied,
    SiblingChanged,
    SiblingJoined,
)
from gunicorn_passenger.ipc.scoreboard import MailboxCounters
from gunicorn_passenger.master.worker_channels import WorkerChannel

#: Random bytes of a tag.
TAG_BYTES = 12
#: Random bytes of the key for signatures.
_KEY_BYTES = 32
#: Seconds until a worker that has not read its channel is told the rest.
_RETRY_INTERVAL = 0.05
#: How many descriptors at most are taken out of the mailbox of a worker that has exited.
_MOST_TAKEN = 1024
#: The part of a channel that the news may fill.
_SHARE = 0.5


@dataclass(eq=False)
class _Mailbox:
    tag: str
    sending: _socket.socket
    #: ``None`` for a process that is not a worker
    worker: WorkerChannel | None = None
    #: the master's copy of a worker's end
    receiving: _socket.socket | None = None
    #: what the worker has been told of its siblings: whether each one serves, by its tag
    told: dict[str, bool] = field(default_factory=dict)

    @property
    def serving(self) -> bool:
        return self.worker is not None and self.worker.serving


class MailboxExchange:
    """The mailboxes of the workers, and of other processes, that have asked for one."""

    def __init__(self, reply: Callable[[WorkerChannel, Message, int | None], bool]) -> None:
        """:param reply: sends a message to a worker; closes the channel and returns false when that fails."""
        self._reply = reply
        self._by_tag: dict[str, _Mailbox] = {}
        #: those of workers, by the age of the worker
        self._by_age: dict[int, _Mailbox] = {}
        #: the workers that have not been told everything
        self._behind: set[int] = set()
        self._published = self._dropped = 0
        #: of the workers' signatures
        self._key = secrets.token_hex(_KEY_BYTES)

    # --- mailboxes of workers --------------------------------------------------------------------

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
        own = self._by_age[worker.age] = self._add(_Mailbox(_new_tag(), sending, worker, receiving))
        self._tell(own, self._by_tag)
        # a failed reply closes the channel, and with it the mailbox
        if receiving.fileno() >= 0:
            self._reply(worker, MailboxOpened(message.id, own.tag, self._key), receiving.fileno())

    def _add(self, own: _Mailbox) -> _Mailbox:
        self._by_tag[own.tag] = own
        self._tell_others(own)
        return own

    def on_worker_changed(self, worker: WorkerChannel) -> None:
        """A worker is ready, or drains."""
        if worker.age in self._by_age:
            self._tell_others(self._by_age[worker.age])

    def release(self, worker: WorkerChannel, _message: ReleaseMailbox, _fd: int | None) -> None:
        """A worker cannot use its mailbox."""
        self.on_worker_gone(worker)

    def on_worker_gone(self, worker: WorkerChannel) -> None:
        """A worker has exited: its siblings take the connections in its mailbox."""
        self._behind.discard(worker.age)
        own = self._by_age.pop(worker.age, None)
        if own is None or own.receiving is None:
            return
        self._remove(own)
        with suppress(OSError):
            # from now on no sibling can send; what is in the mailbox stays
            own.receiving.shutdown(socket.SHUT_RD)
        with suppress(OSError):
            count = 0
            while (
                count < _MOST_TAKEN
                and (taken := mailbox.take(own.receiving, worker.closer.close)) is not None
            ):
                packet, fds = taken
                count += len(fds)
                if packet[:1].lower() == mailbox.CONNECTION.encode():
                    self._give_to_sibling(packet, fds)
                for fd in fds:
                    worker.closer.close(fd)
        # with what a sibling has sent without end
        worker.closer.close(own.receiving.detach())

    def _remove(self, own: _Mailbox) -> None:
        del self._by_tag[own.tag]
        self._tell_others(own)
        own.sending.close()

    def _give_to_sibling(self, packet: bytes, fds: list[int]) -> None:
        for other in self._by_age.values():
            if other.serving and other.worker is not None and not other.worker.stopped:
                with suppress(mailbox.MailboxFull, mailbox.MailboxGone):
                    mailbox.forward(other.sending, packet, fds)
                    return

    # --- mailboxes of other processes ------------------------------------------------------------

    def open_outside(self) -> tuple[str, _socket.socket]:
        """Make a mailbox for the messages of the workers.

        :returns: the tag for :meth:`close_outside`, and the receiving end, which the caller owns.
        :raises OSError: when the system gives no socketpair.
        """
        receiving, sending = mailbox.pair()
        return self._add(_Mailbox(_new_tag(), sending)).tag, receiving

    def close_outside(self, tag: str) -> None:
        """The process has exited, or needs its mailbox no longer."""
        if tag in self._by_tag:
            self._remove(self._by_tag[tag])

    # --- what the workers know -------------------------------------------------------------------

    def _tell_others(self, changed: _Mailbox) -> None:
        for other in list(self._by_age.values()):
            if other is not changed:
                self._tell(other, [changed.tag])

    def _tell(self, own: _Mailbox, tags: Iterable[str]) -> None:
        """Tell a worker what it does not know yet of these siblings."""
        worker = own.worker
        assert worker is not None
        if worker.age in self._behind:
            tags = {**self._by_tag, **own.told}
            self._behind.discard(worker.age)
        for tag in list(tags):
            sibling = self._by_tag.get(tag)
            known = own.told.get(tag)
            if sibling is own or known == (None if sibling is None else sibling.serving):
                continue
            try:
                if _is_filled(worker.sock):
                    raise BlockingIOError
                if sibling is None:
                    channel.send(worker.sock, SiblingChanged(0, tag, False, True))
                    del own.told[tag]
                    continue
                if known is None:
                    joined = SiblingJoined(0, tag, sibling.serving)
                    channel.send(worker.sock, joined, sibling.sending.fileno())
                else:
                    channel.send(worker.sock, SiblingChanged(0, tag, sibling.serving))
                own.told[tag] = sibling.serving
            except channel.ChannelClosed:
                return  # the dispatcher is about to notice
            except OSError:
                # it does not read; or the system has no room for more descriptors on their way (ETOOMANYREFS)
                self._behind.add(worker.age)
                return

    def tick(self, now: float) -> float | None:
        """Tell the workers that have read their channel the rest.

        :returns: when to call this again.
        """
        for age in list(self._behind):
            if age in self._by_age:
                self._tell(self._by_age[age], ())
        return now + _RETRY_INTERVAL if self._behind else None

    # --- messages --------------------------------------------------------------------------------

    def publish(self, topic: str, data: bytes) -> int:
        """Send a message to all workers, and to the other processes that have a mailbox.

        :returns: how many of them have it in their mailbox; one that reads too slowly misses it.
        :raises ValueError: when the topic or the data is too long.
        """
        try:
            packet, files = mailbox.pack(mailbox.MESSAGE, topic, data)
        except mailbox.MailboxFull:
            self._dropped += len(self._by_tag)
            return 0
        self._published += 1
        reached = 0
        for own in self._by_tag.values():
            try:
                mailbox.forward(own.sending, packet, files)
                reached += 1
            except mailbox.MailboxFull:
                self._dropped += 1
            except mailbox.MailboxGone:
                pass
        for file in files:
            os.close(file)
        return reached

    def counts(self) -> MailboxCounters:
        """What was published by way of the master."""
        return MailboxCounters(published=self._published, dropped=self._dropped)

    def after_fork_in_child(self) -> None:
        """The child has copies of all ends."""
        for own in self._by_tag.values():
            for end in own.receiving, own.sending:
                with suppress(OSError):
                    if end is not None:
                        end.close()
        self._by_tag.clear()
        self._by_age.clear()


def _new_tag() -> str:
    return secrets.token_urlsafe(TAG_BYTES)


def _is_filled(sock: _socket.socket) -> bool:
    """Whether the other end has not read what fills a good part of a channel."""
    unread: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0]
    return unread > _SHARE * sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
