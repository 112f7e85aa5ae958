"""This worker's mailbox, and those of its siblings: connections and messages that they pass each other.

Process: a worker, in its hub.
Never: wait for a sibling in the hub, or let two workers serve one connection.

A worker passes a connection with a claim, of which the kernel lets one process have it. The greenlet of the
connection waits until a sibling has claimed the connection, and claims it back after a second. So a sibling
that is busy or was killed loses no request. The worker that claims a connection owns it.
"""

from __future__ import annotations

import _socket
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gevent import get_hub
from gevent import socket as gsocket
from gevent.lock import Semaphore

from gunicorn_passenger import errors
from gunicorn_passenger.http.client_socket import adopt
from gunicorn_passenger.http.faults import log_from_hub, report_fault
from gunicorn_passenger.ipc import mailbox
from gunicorn_passenger.ipc.messages import SiblingChanged, SiblingJoined
from gunicorn_passenger.ipc.scoreboard import MailboxCounters
from gunicorn_passenger.ipc.subscribers import Subscribers
from gunicorn_passenger.serving.acceptors import ListenerHandler
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.system.unpatched import unpatched

#: Seconds that a sibling has to claim a connection.
CLAIM_TIME = 1.0
#: Packets that are read before other greenlets run.
_BURST = 32
#: Messages, and their bytes, that wait for room in the mailbox of one sibling.
_MAX_WAITING = 10_000
_MAX_WAITING_BYTES = 64 << 20
#: Seconds until the next attempt when a mailbox has room, and the system has none.
_PAUSE = 0.05


class Sibling:
    """Another worker, as the mailboxes know it."""

    def __init__(self, tag: str, fd: int, serving: bool) -> None:
        self.tag = tag
        #: whether it is ready, and does not drain
        self.serving = serving
        self.sending = _socket.socket(fileno=fd)
        #: messages for which its mailbox has had no room: topic and data
        self.waiting: deque[tuple[str, bytes]] = deque()
        self.waiting_bytes = 0
        self.has_room: Any = None
        #: a timer while the system has no room for a message
        self.pause: Any = None

    def close(self) -> None:
        if self.pause is not None:
            self.pause.close()
            self.pause = None
        if self.has_room is not None:
            self.has_room.close()
            self.has_room = None
        self.sending.close()


class Mailboxes:
    """Passes connections and messages to siblings, and takes theirs. All methods are called in the hub."""

    def __init__(
        self, broker: BrokerClient, acceptors: Callable[[], list[tuple[str, ListenerHandler]]]
    ) -> None:
        """
        :param acceptors: returns this worker's, see :meth:`.acceptor_table.AcceptorTable.by_key`.
        """
        self._broker = broker
        self._acceptors = acceptors
        #: names this worker in what clients get to see; empty while it has no mailbox
        self.tag = ""
        #: signs what names a worker in a cookie; the siblings have the same
        self.key = b""
        self._siblings: dict[str, Sibling] = {}
        #: the subscribers of this worker
        self.subscribers = Subscribers()
        self._receiving: _socket.socket | None = None
        self._readable: Any = None
        #: the event loop's epoll set
        self._epoll: Any = None
        #: the topics of which a subscriber in this worker has missed a message
        self._overfull: set[str] = set()
        self._failed = False
        #: whether it lacks the mailbox of a sibling
        self._deaf = False
        self._opening = Semaphore()
        self._passed = self._kept = self._published = self._dropped = 0
        #: requests with the Socket.IO session of no worker that it knows
        self.unknown = 0

    def open(self) -> bool:
        """Have a mailbox, which the siblings know when this returns.

        :returns: false when the master cannot make one; the log says so once.
        """
        with self._opening:
            if not self.tag and not self._failed:
                self._open()
        return bool(self.tag)

    def _open(self) -> None:
        self._broker.on_sibling = self._on_sibling
        try:
            opened, fd = self._broker.open_mailbox()
        except errors.BrokerUnavailable as error:
            self._failed = True
            self._broker.log.error(
                "gunicorn-passenger: this worker has no mailbox, so it serves the requests that belong to "
                "its siblings itself, and gets none of their messages. Raise the limit on open files "
                "(ulimit -n), then reload gunicorn. The reason: %s",
                error.strerror or error,
            )
            return
        self.tag, self.key = opened.tag, opened.key.encode()
        self._receiving = _socket.socket(fileno=fd)
        self._receiving.setblocking(False)
        os.register_at_fork(after_in_child=self.close)  # the child has copies of all ends
        loop = get_hub().loop
        if getattr(loop, "backend", "") == "epoll":
            # the object closes its descriptor; without one, libev does more work
            with suppress(OSError):
                self._epoll = unpatched("select", "epoll").fromfd(os.dup(loop.fileno()))
        self._readable = loop.io(fd, 1)
        self._readable.start(self._receive)

    def counts(self) -> MailboxCounters:
        return MailboxCounters(self._passed, self._kept, self._published, self._dropped, self.unknown)

    # --- siblings ---------------------------------------------------------------------------------

    def _on_sibling(self, message: SiblingJoined | SiblingChanged, fd: int | None) -> None:
        if isinstance(message, SiblingJoined):
            if fd is not None:
                self._siblings[message.tag] = Sibling(message.tag, fd, message.serving)
            elif not self._deaf:
                self._deaf = True
                self._broker.log.error(
                    "gunicorn-passenger: this worker has no descriptor for the mailbox of a sibling, which "
                    "gets no messages and no requests from it; raise the limit on open files (ulimit -n) and "
                    "reload gunicorn (pid:%s)",
                    os.getpid(),
                )
            return
        sibling = self._siblings.get(message.tag)
        if sibling is not None:
            sibling.serving = message.serving
            if message.gone:
                del self._siblings[message.tag]
                sibling.close()

    def sibling(self, tag: str) -> Sibling | None:
        """The sibling of that tag, even while it drains."""
        return self._siblings.get(tag)

    @property
    def is_leaving(self) -> bool:
        """Whether this worker drains."""
        return self._broker.exit_announced

    def serving(self) -> list[str]:
        """The tags of the workers that take new clients, this one included. Any thread may call."""
        own = [] if self.is_leaving else [self.tag]
        return own + [tag for tag, sibling in list(self._siblings.items()) if sibling.serving]

    # --- connections ------------------------------------------------------------------------------

    def pass_connection(self, sibling: Sibling, key: str, fd: int, data: bytes) -> bool:
        """Have a sibling serve a connection. The calling greenlet waits for it, for at most a second.

        :param key: of the server, as :meth:`.acceptor_table.AcceptorTable.by_key` gives it.
        :param fd: the connection; the caller closes its copy, and does not read from it meanwhile.
        :param data: what was read of the connection.
        :returns: whether the connection is the sibling's; if not, it is the caller's again.
        """
        try:
            claim = mailbox.make_claim()
        except OSError:
            self._kept += 1
            return False
        try:
            mailbox.post(sibling.sending, mailbox.CONNECTION, key, data, (fd, claim))
            with suppress(TimeoutError):
                gsocket.wait_write(claim, CLAIM_TIME)
            kept = mailbox.take_back(claim)
            if kept is None:
                with suppress(TimeoutError):
                    gsocket.wait_read(claim, CLAIM_TIME)
                # one that was killed at this moment has taken the connection with it
                kept = bool(mailbox.take_back(claim))
            if kept:
                self._kept += 1
                return False
            self._leave_epoll(fd, claim)
        except (mailbox.MailboxFull, mailbox.MailboxGone, ValueError):
            self._kept += 1
            return False
        finally:
            os.close(claim)
        self._passed += 1
        return True

    def _take_connection(self, packet: mailbox.Packet) -> None:
        fd, claim = packet.fds
        try:
            acceptor = next((a for known, a in self._acceptors() if known == packet.name), None)
            if acceptor is None or not acceptor.make_room():
                mailbox.refuse(claim)
                os.close(fd)
                return
            # the address comes from the kernel: a worker need not believe what another one says of a client
            sock, addr = adopt(fd)
            if addr is not None and mailbox.claim(claim):
                acceptor.attach(sock, addr, begun=True, data=packet.data)
            else:
                mailbox.refuse(claim)
                sock.release()
        finally:
            os.close(claim)

    # --- messages ---------------------------------------------------------------------------------

    def publish(self, topic: str, data: bytes, here: bool) -> None:
        """Send a message to all siblings. One that reads too slowly misses the newest messages.

        :param here: whether the subscribers of this worker receive it, too.
        :raises ValueError: when the topic or the data is too long.
        """
        try:
            packet, files = mailbox.pack(mailbox.MESSAGE, topic, data)
        except mailbox.MailboxFull:
            packet, files = b"", []
        self._published += 1
        try:
            for sibling in list(self._siblings.values()):
                if sibling.waiting or not packet:
                    self._wait_for_room(sibling, topic, data)
                    continue
                try:
                    mailbox.forward(sibling.sending, packet, files)
                except mailbox.MailboxFull:
                    self._wait_for_room(sibling, topic, data)
                except mailbox.MailboxGone:
                    pass  # the master is about to say so
        finally:
            for file in files:
                os.close(file)
        if here:
            self._deliver(topic, data)

    def _deliver(self, topic: str, data: bytes) -> None:
        dropped = self.subscribers.deliver(topic, data)
        if dropped and topic not in self._overfull:
            self._overfull.add(topic)
            log_from_hub(
                "gunicorn-passenger: a subscriber of %r is too slow, and its queue in this worker is full: "
                "the newest messages are dropped (pid:%s). Let its handler return sooner, or publish fewer "
                "messages",
                topic,
                os.getpid(),
            )
        self._dropped += dropped

    def _wait_for_room(self, sibling: Sibling, topic: str, data: bytes) -> None:
        if len(sibling.waiting) >= _MAX_WAITING or sibling.waiting_bytes + len(data) > _MAX_WAITING_BYTES:
            if not self._dropped:
                self._broker.log.warning(
                    "gunicorn-passenger: a sibling of this worker does not read its messages. %d wait for it "
                    "already, so the newest are dropped (pid:%s). If a function blocks the sibling's event "
                    "loop, gunicorn's log names the function",
                    len(sibling.waiting),
                    os.getpid(),
                )
            self._dropped += 1
            return
        sibling.waiting.append((topic, data))
        sibling.waiting_bytes += len(data)
        if sibling.has_room is None:
            sibling.has_room = get_hub().loop.io(sibling.sending.fileno(), 2)
        if sibling.pause is None and not sibling.has_room.active:
            sibling.has_room.start(self._send_waiting, sibling)

    def _pause(self, sibling: Sibling) -> None:
        """The mailbox stays writable: without a pause the hub would try again without end."""
        sibling.has_room.stop()
        sibling.pause = get_hub().loop.timer(_PAUSE)
        sibling.pause.start(self._end_pause, sibling)

    def _end_pause(self, sibling: Sibling) -> None:
        sibling.pause.close()
        sibling.pause = None
        sibling.has_room.start(self._send_waiting, sibling)

    def _send_waiting(self, sibling: Sibling) -> None:
        for number in range(_BURST):
            if not sibling.waiting:
                break
            topic, data = sibling.waiting[0]
            try:
                mailbox.post(sibling.sending, mailbox.MESSAGE, topic, data)
            except mailbox.MailboxFull:
                if not number:
                    # it was writable: the system lacks a descriptor, or memory
                    self._pause(sibling)
                return
            except mailbox.MailboxGone:
                sibling.waiting.clear()
                break
            sibling.waiting.popleft()
            sibling.waiting_bytes -= len(data)
        if not sibling.waiting:
            sibling.waiting_bytes = 0
            sibling.has_room.stop()

    # --- receiving --------------------------------------------------------------------------------

    def _receive(self) -> None:
        assert self._receiving is not None
        for _ in range(_BURST):
            try:
                taken = mailbox.take(self._receiving)
            except BlockingIOError:
                return
            except OSError:
                taken = None
            if taken is None:
                self._readable.stop()  # the master has closed it
                return
            try:
                packet = mailbox.unpack(*taken)
                if packet is None:
                    continue
                if packet.kind == mailbox.CONNECTION:
                    self._take_connection(packet)
                else:
                    self._deliver(packet.name, packet.data)
            except Exception as error:
                # gevent would stop this watcher
                report_fault("a packet of a sibling was ignored", error)

    def leave(self) -> None:
        """Take what siblings have sent until now, and no more: this worker has nothing else to finish.

        A sibling that sends later finds the mailbox gone, and serves the connection itself.
        """
        if self._receiving is not None:
            self._receiving.shutdown(socket.SHUT_RD)
            while self._readable.active:  # until the end of the mailbox
                self._receive()

    def close(self) -> None:
        """Close this process's copies of all mailboxes."""
        if self._epoll is not None:
            self._epoll.close()
        if self._readable is not None:
            self._readable.close()
        if self._receiving is not None:
            self._receiving.close()
        for sibling in self._siblings.values():
            sibling.close()
        self._siblings.clear()

    def _leave_epoll(self, *fds: int) -> None:
        """Take descriptors, which the caller closes next, out of the event loop's epoll set.

        libev leaves that to ``close``, which has no such effect while a sibling has the same open file. The
        next event of the file would then make libev build its whole set anew.
        """
        if self._epoll is not None:
            for fd in fds:
                with suppress(FileNotFoundError):
                    self._epoll.unregister(fd)
