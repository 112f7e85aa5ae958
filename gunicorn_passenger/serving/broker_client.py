"""The worker's end of the channel to the master's port broker.

Process: a worker.
Never: block gevent's hub, or treat the silence of a lost master as a response.
"""

from __future__ import annotations

import _socket
import errno
import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import Address, Auto, Once, SockAddr, Tcp, Unix, format_tcp, resolve
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.messages import (
    AcceptGranted,
    AcceptPaused,
    Acknowledged,
    AssignConnections,
    AssignResult,
    AssignSettled,
    BindClaimed,
    BootFailure,
    BootVerdict,
    GetReport,
    KeepBind,
    MailboxOpened,
    Message,
    OfferConnections,
    OfferSettled,
    OpenMailbox,
    OpenPort,
    PacketRejected,
    PauseAccept,
    PortOpened,
    ReleaseMailbox,
    ReleasePort,
    ReportSent,
    RequestDenied,
    RequestSuccessor,
    SiblingChanged,
    SiblingJoined,
    SuccessorReady,
    WorkerLeaving,
    WorkerReady,
)
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.serving.port_lease import AcceptGrant, PortLease
from gunicorn_passenger.serving.scheduler import Result, Scheduler
from gunicorn_passenger.system.text import MAX_NAME

#: Seconds that a worker waits for the broker, which responds within milliseconds unless it hangs.
RESPONSE_TIMEOUT = 10.0


class AssignedConnection(NamedTuple):
    """A sibling's connection that this worker can serve, and must not read from yet."""

    serve: Callable[[], object]
    #: closes this worker's copy of it
    close: Callable[[], object]


TakeConnections = Callable[[str, list[Any], list[int]], list[AssignedConnection]]


class BrokerClient:
    """Requests ports from the master. Any greenlet may use it, and so may threads of the system."""

    def __init__(self, end: _socket.socket | None, log: Log, scheduler: Scheduler) -> None:
        """:param end: the worker's end of the channel, or ``None`` where the broker has failed."""
        self.log = log
        self.scheduler = scheduler
        self._unavailable = "" if end is not None else "could not be reached when the worker started"
        self._numbers = itertools.count(1)
        self._pending: dict[int, Result] = {}
        self._leases: dict[int, PortLease] = {}
        #: whether a sibling can take the connections of this worker while it drains
        self.successor_ready = False
        #: receives a sibling's connections: the key of their server, the clients' addresses and the
        #: descriptors. Takes the first few of them, as many as this worker can serve.
        self.on_connections_assigned: TakeConnections | None = None
        #: connections of siblings that wait for the master's decision, by the ``id`` of their message
        self._assigned: dict[int, list[AssignedConnection]] = {}
        #: whether this worker has announced its exit
        self.exit_announced = False
        #: binds on which the primary is served because the master did not respond in time, by ``id``
        self._undecided: dict[int, str] = {}
        #: called with the key of a bind that a server listens on from now on
        self.on_bind_claimed: Callable[[str], object] = lambda key: None
        #: called when a sibling has a mailbox, with its sending end, and when the sibling's state changes
        self.on_sibling: Callable[[SiblingJoined | SiblingChanged, int | None], object] | None = None
        #: called when the master has closed the channel
        self.on_lost: Callable[[], object] = lambda: None
        self._pid = os.getpid()
        self._reading = False
        self._sock: Any = None
        if end is not None:
            self._sock = scheduler.own_socket(end)
            os.register_at_fork(after_in_child=self._close_in_child)

    def start_reading(self) -> None:
        """Read the master's messages from now on; the first request has the same effect."""
        if not self._reading and self._sock is not None:
            self._reading = True
            self.scheduler.start_task(self._read_messages)

    def _close_in_child(self) -> None:
        """A child of the worker must not keep the worker's channel open."""
        if self._sock is not None:
            os.close(self._sock.detach())
            self._sock = None
            self._unavailable = "responds to the worker, not to the worker's child processes"

    # --- requests ---------------------------------------------------------------------------------

    def open_port(
        self,
        address: Address | Once,
        name: str,
        placement: str = "shared",
        backlog: int = 0,
        v6only: bool = False,
        within: str = "",
        counts: bool = True,
        again: bool = False,
        opened: int | None = None,
    ) -> PortLease:
        """Ask the master to let this worker accept on an address.

        :param name: the name of the server. The end of a name made from the program's own may be cut off.
        :param within: the ports that the program allows itself, as text; empty for no limit of its own.
        :param counts: whether the worker will count the requests of the server.
        :param again: whether this worker may have the port already (``SO_REUSEPORT``).
        :param opened: a descriptor of a socket that listens there already, for the master to share.
        :returns: the lease. The listening socket is in its initial grant
            (:meth:`.port_lease.PortLease.take_initial_grant`), or in a grant that comes later, even when the
            master did not respond in time, since it may be stopped for a while.
        :raises errors.ListenError: when the worker may not listen on the address.
        """
        number = next(self._numbers)
        name = name[:MAX_NAME]
        if isinstance(address, Unix):
            message = OpenPort(number, "unix", path=address.path, name=name, backlog=backlog)
        elif isinstance(address, Once):
            message = OpenPort(number, "once", name=name)
        elif isinstance(address, Tcp | Auto):
            kind, port = ("auto", 0) if isinstance(address, Auto) else ("tcp", address.port)
            _, host = resolve(address.host, port)
            message = OpenPort(number, kind, host, port, "", name, backlog, v6only, within)
        else:
            raise TypeError(f"the master does not open {address!r}")
        label = format_tcp(message.host, message.port) if isinstance(address, Tcp) else str(address)
        message = message.replace(placement=placement, counts=counts, again=again)
        lease = self._leases[number] = PortLease(number, self.scheduler)
        if isinstance(address, Tcp) and placement != "each":
            lease.sockname = _sockname(message)
        try:
            response, _ = self._request(message, label, opened)
            if isinstance(response, RequestDenied):
                kind_of_error = errors.REFUSALS.get(response.kind, errors.ListenError)
                raise kind_of_error(response.errno, response.text)
            if not isinstance(response, PortOpened):
                raise server_errors.broker_unavailable(
                    label, "did not understand the request (does the master run another version?)"
                )
            self._on_port_opened(lease, response)
            if response.granted and not self.scheduler.run(lambda: lease.wait_for_grant(RESPONSE_TIMEOUT)):
                raise _timed_out(label)
        except BaseException as error:
            if isinstance(error, errors.BrokerUnavailable) and error.errno == errno.ETIMEDOUT:
                self.log.error("%s", error)
                lease.is_late = True
                return lease
            self._leases.pop(number, None)
            raise
        return lease

    @staticmethod
    def _on_port_opened(lease: PortLease, response: PortOpened) -> None:
        if response.key:
            lease.key, lease.sockname = response.key, _sockname(response)

    def release_port(self, key: str, number: int = 0) -> None:
        """The worker no longer accepts on ``key``, or no longer waits for the port that it requested.

        :param number: that of the :class:`.port_lease.PortLease`.
        """
        leases = list(self._leases.items())  # any thread may come here
        for known in [n for n, lease in leases if (n == number if number else lease.key == key)]:
            self._leases.pop(known, None)
        self._notify(ReleasePort(number, key))

    def discard(self, lease: PortLease) -> None:
        """Drop a lease that another server of this worker has, too; the port stays the worker's."""
        self._leases.pop(lease.number, None)

    def confirm_pause(self, key: str) -> None:
        """The worker has stopped accepting on ``key``, and waits for a grant."""
        self._notify(AcceptPaused(0, key))

    def keep_bind(self, key: str, for_good: bool) -> bool:
        """Ask whether this worker serves the primary on one of gunicorn's binds (see :class:`.KeepBind`).

        The master decides, since another thread may be asking for the port at this moment.
        """
        self._notify(KeepBind(0, key, for_good))
        if not self._reading:
            return True  # it has asked for no port yet, and from now on the master refuses this one
        message = KeepBind(next(self._numbers), key, for_good)
        with suppress(errors.BrokerUnavailable):
            if not self._undecided:
                response, _ = self._request(message, key)
                return isinstance(response, Acknowledged)
            # the master does not respond: the worker waits once, not once for each bind
            self._notify(message)
        self._undecided[message.id] = key
        return True

    def announce_ready(self, primary: str, serves_primary: bool) -> None:
        """The worker serves.

        :param primary: the name of the primary's server.
        :param serves_primary: see :class:`~gunicorn_passenger.ipc.messages.WorkerReady`.
        """
        self._notify(WorkerReady(0, primary, serves_primary))

    def announce_exit(self) -> None:
        """The worker accepts nowhere any more. No connection of a sibling comes after the return."""
        self.exit_announced = True
        with suppress(errors.BrokerUnavailable):
            self._request(WorkerLeaving(next(self._numbers)), "the worker")

    def offer_connections(self, key: str, addrs: list[Any], fds: list[int]) -> int:
        """Offer connections that wait for a request to the siblings. Called in the worker's own thread.

        :param key: see :class:`~gunicorn_passenger.ipc.messages.OfferConnections`.
        :param addrs: the clients' addresses, as from ``accept()``; at most ``MAX_OFFERED``.
        :param fds: remain the caller's.
        :returns: which of them a sibling serves from now on: bit n is set for connection n.
        :raises errors.BrokerUnavailable: when that cannot be known, since the master is gone.
        """
        message = OfferConnections(next(self._numbers), key, json.dumps(addrs))
        # without a timeout: until the master responds, a sibling may read from them
        response, _ = self._send_and_wait(message, "a connection", fds, None)
        return response.taken if isinstance(response, OfferSettled) else 0

    def open_mailbox(self) -> tuple[MailboxOpened, int]:
        """Ask for this worker's mailbox; :attr:`on_sibling` is told of those of the siblings.

        :returns: what the master says of it, and the receiving end, which the caller owns.
        :raises errors.BrokerUnavailable: when the master cannot be reached, or has no descriptor for it.
        """
        response, fd = self._request(OpenMailbox(next(self._numbers)), "the mailbox")
        if not isinstance(response, MailboxOpened) or fd is None:
            why = response.text if isinstance(response, RequestDenied) else "no descriptor is free"
            if isinstance(response, MailboxOpened):
                self._notify(ReleaseMailbox(0))
            raise server_errors.broker_unavailable("the mailbox", f"cannot make it ({why})")
        return response, fd

    def report(self) -> dict[str, Any]:
        """The state of the whole application (see ``status/report.py``).

        :raises errors.BrokerUnavailable: when the master cannot be reached.
        """
        response, fd = self._request(GetReport(next(self._numbers)), "the report")
        if not isinstance(response, ReportSent) or fd is None:
            raise server_errors.broker_unavailable("the report", "sent no report")
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            found: dict[str, Any] = json.loads(file.read())
            return found

    def request(self, message: Message, label: str) -> Message:
        """Send a request of another module to the master.

        :param message: its ``id`` is replaced.
        :param label: names the subject of the request in an error.
        :returns: the response.
        :raises errors.BrokerUnavailable: when the master cannot be reached.
        """
        response, fd = self._request(message.replace(id=next(self._numbers)), label)
        if fd is not None:
            os.close(fd)
        return response

    def request_successor(self) -> bool:
        """Ask the master for a worker in place of this one, which serves until gunicorn stops it.

        :returns: whether the master can be reached.
        """
        self._notify(RequestSuccessor(0))
        return not self._unavailable

    def report_boot_failure(self, text: str) -> BootVerdict:
        """Tell the master why this worker cannot start.

        :returns: what this worker does.
        :raises errors.BrokerUnavailable: when the master cannot be reached.
        """
        response, _ = self._request(BootFailure(next(self._numbers), text), "the worker")
        if not isinstance(response, BootVerdict):
            raise server_errors.broker_unavailable("the worker", "did not say whether to halt")
        return response

    # --- the wire ---------------------------------------------------------------------------------

    def _notify(self, message: Message) -> None:
        """Send a message that has no response; do not wait, since a garbage collection may come here."""
        if not self._unavailable:
            self.scheduler.call(partial(_send, self._sock, message))

    def _request(self, message: Message, label: str, fd: int | None = None) -> tuple[Message, int | None]:
        fds = [] if fd is None else [fd]
        return self.scheduler.run(lambda: self._send_and_wait(message, label, fds, RESPONSE_TIMEOUT))

    def _send_and_wait(
        self, message: Message, label: str, fds: list[int], timeout: float | None
    ) -> tuple[Message, int | None]:
        if self._unavailable:
            raise server_errors.broker_unavailable(label, self._unavailable)
        self.start_reading()
        pending = self._pending[message.id] = self.scheduler.result()
        try:
            # the kernel takes a packet whole or not at all, so greenlets need no lock
            channel.send(self._sock, message, *fds)
            pending.wait(timeout)
            if not pending.ready():
                raise _timed_out(label)
            if pending.exception is not None:
                raise pending.exception
            response: tuple[Message, int | None] = pending.value
            return response
        except (channel.ChannelClosed, OSError) as error:
            if isinstance(error, errors.ListenError):
                raise
            raise server_errors.broker_unavailable(label, "has closed the channel") from None
        finally:
            self._pending.pop(message.id, None)

    # --- messages from the master -----------------------------------------------------------------

    def _read_messages(self) -> None:
        """Dispatch each message of the master. No message may end this greenlet."""
        while True:
            try:
                message, fds = channel.receive(self._sock)
            except channel.MalformedPacket as error:
                self.log.warning(
                    "gunicorn-passenger: the worker ignores a malformed message from the master: %s; restart "
                    "gunicorn if the master and its workers may run different versions",
                    error,
                )
                continue
            except (channel.ChannelClosed, OSError):
                break
            try:
                if isinstance(message, AssignConnections):
                    self._on_assign_connections(message, fds)
                else:
                    handler = self._HANDLERS.get(type(message), BrokerClient._on_response)
                    handler(self, message, fds[0] if fds else None)
            except Exception:
                self.log.exception(
                    "gunicorn-passenger: the worker could not act on the master's message %s",
                    type(message).__name__,
                )
        if os.getpid() != self._pid:
            return
        self._unavailable = "has closed the channel"
        for pending in list(self._pending.values()):
            pending.set_exception(server_errors.broker_unavailable("the port", self._unavailable))
        for number in list(self._assigned):
            self._on_assign_settled(AssignSettled(number, False), None)
        self.on_lost()

    def _on_response(self, message: Message, fd: int | None) -> None:
        pending = self._pending.get(message.id)
        if pending is not None:
            pending.set((message, fd))
            return
        # the greenlet that sent the request waits no longer
        if fd is not None:
            os.close(fd)
        undecided = self._undecided.pop(message.id, "")
        if undecided and isinstance(message, RequestDenied):
            self.on_bind_claimed(undecided)
        lease = self._leases.get(message.id)
        if lease is not None and isinstance(message, PortOpened):
            self._on_port_opened(lease, message)
        elif lease is not None and isinstance(message, RequestDenied):
            del self._leases[message.id]
            self.log.error("gunicorn-passenger: a server of this worker gets no port: %s", message.text)

    def _on_packet_rejected(self, message: PacketRejected, fd: int | None) -> None:
        self.log.error("gunicorn-passenger: the master rejected a message of this worker: %s", message.text)
        self._on_response(message, fd)

    def _on_successor_ready(self, _message: SuccessorReady, _fd: int | None) -> None:
        self.successor_ready = True

    def _on_bind_claimed(self, message: BindClaimed, _fd: int | None) -> None:
        self.on_bind_claimed(message.key)

    def _on_sibling(self, message: SiblingJoined | SiblingChanged, fd: int | None) -> None:
        if self.on_sibling is not None:
            self.scheduler.run(partial(self.on_sibling, message, fd))
        elif fd is not None:
            os.close(fd)

    def _on_pause_accept(self, message: PauseAccept, fd: int | None) -> None:
        for lease in list(self._leases.values()):
            if lease.key == message.key:
                lease.pause()
        if fd is not None:
            os.close(fd)

    def _on_accept_granted(self, message: AcceptGranted, fd: int | None) -> None:
        lease = self._leases.get(message.id)
        if fd is None:
            # the kernel drops the descriptor when this process has no room for it (EMFILE)
            error = errors.BrokerUnavailable(errno.EMFILE, str(server_errors.no_descriptor(message.key)))
            self.release_port(message.key, message.id)
            if lease is None or not lease.reject(error):
                self.log.error("gunicorn-passenger: %s", error)
        elif lease is None:
            # the worker has released the port meanwhile
            os.close(fd)
            self.release_port(message.key, message.id)
        else:
            lease.grant(AcceptGrant(fd, message.key, _sockname(message), message.slot, message.position))

    def _on_assign_connections(self, message: AssignConnections, fds: list[int]) -> None:
        """Take connections of a sibling that drains, and serve them when the master says so."""
        taken: list[AssignedConnection] = []
        addrs = [tuple(addr) if isinstance(addr, list) else addr for addr in json.loads(message.addrs)]
        take = self.on_connections_assigned
        if take is not None and not self.exit_announced and len(fds) == len(addrs):
            taken = self.scheduler.run(partial(take, message.key, addrs, fds))
        for fd in fds[len(taken) :]:
            os.close(fd)
        self._assigned[message.id] = taken
        with suppress(channel.ChannelClosed, OSError):
            channel.send(self._sock, AssignResult(message.id, len(taken)))

    def _on_assign_settled(self, message: AssignSettled, _fd: int | None) -> None:
        for connection in self._assigned.pop(message.id, ()):
            try:
                self.scheduler.run(connection.serve if message.serve else connection.close)
            except Exception:
                self.log.exception(
                    "gunicorn-passenger: a connection that a sibling has passed here was closed"
                )

    #: what the client does with the master's messages that are not responses
    _HANDLERS: ClassVar[dict[type[Message], Callable[[BrokerClient, Any, int | None], object]]] = {
        AcceptGranted: _on_accept_granted,
        BindClaimed: _on_bind_claimed,
        PauseAccept: _on_pause_accept,
        AssignSettled: _on_assign_settled,
        SuccessorReady: _on_successor_ready,
        PacketRejected: _on_packet_rejected,
        SiblingJoined: _on_sibling,
        SiblingChanged: _on_sibling,
    }


def _send(sock: Any, message: Message) -> None:
    with suppress(channel.ChannelClosed, OSError):  # a lost master needs no message
        channel.send(sock, message)


def _sockname(message: OpenPort | PortOpened | AcceptGranted) -> SockAddr | str:
    if message.path:
        return message.path
    host, port = message.host, message.port
    return (host, port, 0, 0) if ":" in host else (host, port)


def _timed_out(label: str) -> errors.BrokerUnavailable:
    why = f"did not respond within {RESPONSE_TIMEOUT:g} s"
    return server_errors.broker_unavailable(label, why, errno.ETIMEDOUT)
