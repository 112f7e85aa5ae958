"""A worker's end of the channel to the master's port broker.

Runs in: a worker. Must never: block the gevent hub, or go on as if a lost master had answered.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import gevent
from gevent import socket as gsocket
from gevent.event import AsyncResult

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import Address, Auto, SockAddr, Tcp, Unix, format_tcp, resolve
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.channel import (
    AcceptGranted,
    AcceptPaused,
    Acknowledged,
    AssignConnection,
    AssignResult,
    BootFailure,
    GetReport,
    Message,
    OfferConnection,
    OpenPort,
    PacketRejected,
    PauseAccept,
    PortOpened,
    ReleasePort,
    ReportSent,
    RequestDenied,
    SuccessorReady,
    WorkerLeaving,
    WorkerReady,
)
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.text import MAX_NAME

#: Seconds that a worker waits for the broker; it answers within milliseconds or it hangs.
ANSWER_TIMEOUT = 10.0

T = TypeVar("T")


class AcceptGrant(NamedTuple):
    """The right to accept, now."""

    #: a descriptor that whoever takes the grant owns
    fd: int
    key: str
    #: what the socket is bound to
    sockname: SockAddr | str
    #: where the worker counts
    slot: int
    #: with the placement "each": which of its kind
    position: int


class PortLease:
    """What the master has answered to an ``Open``, and what it says of it later."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.key = ""
        #: what the socket is bound to; ``None`` while that is not known
        self.sockname: SockAddr | str | None = None
        self._first: AsyncResult = AsyncResult()
        self._granted: Callable[[AcceptGrant], object] | None = None
        self._paused: Callable[[], object] | None = None

    def first(self) -> AcceptGrant | None:
        """The grant that has come with the answer, if one has."""
        grant: AcceptGrant | None = self._first.get(block=False) if self._first.ready() else None
        self._first = AsyncResult()
        return grant

    def watch(self, granted: Callable[[AcceptGrant], object], paused: Callable[[], object]) -> None:
        """From now on call these, each in a greenlet of its own."""
        self._granted, self._paused = granted, paused
        if (grant := self.first()) is not None:
            gevent.spawn(granted, grant)

    def grant(self, grant: AcceptGrant) -> None:
        self.key, self.sockname = grant.key, grant.sockname
        if self._granted is None:
            self._first.set(grant)
        else:
            gevent.spawn(self._granted, grant)

    def fail(self, error: errors.ListenError) -> None:
        """It cannot be had after all."""
        if self._granted is None:
            self._first.set_exception(error)

    def pause(self) -> None:
        if self._paused is not None:
            gevent.spawn(self._paused)


class BrokerClient:
    """Asks the master for ports; used by any greenlet, and by threads of the system."""

    def __init__(self, end: Any, log: Any) -> None:
        """:param end: the worker's end of the channel, or ``None`` where the broker has failed."""
        self.log = log
        self._lost = "" if end is not None else "could not be reached when the worker started"
        self._numbers = itertools.count(1)
        self._waiting: dict[int, AsyncResult] = {}
        self._leases: dict[int, PortLease] = {}
        #: whether a sibling can take the connections of this worker, which leaves
        self.heir = False
        #: takes a sibling's connection: its server's key, the client's address and the descriptor
        #: Gives the function that begins to serve it, or ``None`` when nobody here does.
        self.adopt: Callable[[str, Any, int], Callable[[], object] | None] | None = None
        #: whether this worker leaves
        self.leaves = False
        #: called when the master has closed the channel
        self.on_lost: Callable[[], object] = lambda: None
        self._pid = os.getpid()
        self._hub = gevent.get_hub()
        self._thread = unpatched.unpatched("_thread", "get_ident")()
        self._sock: Any = None
        if end is not None:
            self._sock = gsocket.socket(end.family, end.type, end.proto, fileno=end.detach())
            os.register_at_fork(after_in_child=self._forked)
            gevent.spawn(self._read)

    def _forked(self) -> None:
        """A child of the worker must not keep the worker's channel open."""
        if self._sock is not None:
            os.close(self._sock.detach())
            self._sock = None
            self._lost = "answers the worker, not its child processes"

    def open(
        self,
        want: Address,
        name: str,
        placement: str = "shared",
        backlog: int = 0,
        v6only: bool = False,
        within: str = "",
        counts: bool = True,
        again: bool = False,
    ) -> PortLease:
        """Ask the master to let this worker accept on an address.

        :param name: of the server; one that was made from the program's own and is too long is cut.
        :param counts: whether its requests will be counted.
        :param again: whether this worker may have it already.
        :returns: what it has answered. The listening socket is in the grant that has come with it
            (:meth:`Lease.first`), or in one that comes later.
        :raises errors.ListenError: when the address is not to be had.
        """
        number = next(self._numbers)
        name = name[:MAX_NAME]
        if isinstance(want, Unix):
            ask = OpenPort(number, "unix", path=want.path, name=name, backlog=backlog)
        elif isinstance(want, Tcp | Auto):
            auto = isinstance(want, Auto)
            port = 0 if isinstance(want, Auto) else want.port
            _, host = resolve(want.host, port)
            ask = OpenPort(number, "auto" if auto else "tcp", host, port, "", name, backlog, v6only, within)
        else:
            raise TypeError(f"{want!r} is not the master's to open")
        label = format_tcp(ask.host, ask.port) if isinstance(want, Tcp) else str(want)
        ask = dataclasses.replace(ask, placement=placement, counts=counts, again=again)
        lease = self._leases[number] = PortLease(number)
        try:
            answer, _ = self._ask(ask, label)
            if isinstance(answer, RequestDenied):
                kind = errors.REFUSALS.get(answer.kind, errors.ListenError)
                raise kind(answer.errno, answer.text)
            if not isinstance(answer, PortOpened):
                raise server_errors.broker_unavailable(
                    label, "did not understand this worker (different versions?)"
                )
            if answer.key:
                lease.key, lease.sockname = answer.key, _sockname(answer)
            if answer.granted:
                self.call(lambda: self._await_grant(lease, label))
        except BaseException:
            self._leases.pop(number, None)
            raise
        return lease

    def _await_grant(self, lease: PortLease, label: str) -> None:
        if not lease._first.wait(timeout=ANSWER_TIMEOUT):
            raise server_errors.broker_unavailable(label, f"did not answer within {ANSWER_TIMEOUT:g} s")

    def close(self, key: str, number: int = 0) -> None:
        """The worker no longer accepts on ``key``, or no longer waits for what it asked for.

        :param number: that of the :class:`PortLease`.
        """
        for known in [n for n, le in self._leases.items() if (n == number if number else le.key == key)]:
            del self._leases[known]
        self._tell(ReleasePort(number, key))

    def forget(self, lease: PortLease) -> None:
        """What was asked for is not used, and another of this worker's has the same."""
        self._leases.pop(lease.number, None)

    def paused(self, key: str) -> None:
        """The worker has stopped to accept there, and waits for a grant."""
        self._tell(AcceptPaused(0, key))

    def ready(self, primary: str) -> None:
        """:param primary: the name of the primary's server."""
        self._tell(WorkerReady(0, primary))

    def leaving(self) -> None:
        """The worker accepts nowhere any more; when this returns, no connection of a sibling comes."""
        self.leaves = True
        with suppress(errors.BrokerUnavailable):
            self._ask(WorkerLeaving(next(self._numbers)), "the worker")

    def report(self) -> dict[str, Any]:
        """What the application looks like (see ``status/report.py``).

        :raises errors.BrokerUnavailable: when the master cannot be reached.
        """
        answer, fd = self._ask(GetReport(next(self._numbers)), "the report")
        if not isinstance(answer, ReportSent) or fd is None:
            raise server_errors.broker_unavailable("the report", "gave none")
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            found: dict[str, Any] = json.loads(file.read())
            return found

    def ask(self, question: Message, label: str) -> Message:
        """Put a question of another module to the master.

        :param question: its ``id`` is replaced.
        :param label: what it is about, for the error.
        :raises errors.BrokerUnavailable: when the master cannot be reached.
        """
        answer, fd = self._ask(dataclasses.replace(question, id=next(self._numbers)), label)
        if fd is not None:
            os.close(fd)
        return answer

    def fault(self, text: str) -> bool:
        """Have the master log, once for all workers, why this one cannot start.

        :returns: whether this worker's exit is to halt gunicorn.
        :raises errors.BrokerUnavailable: when the master cannot be reached.
        """
        answer, _ = self._ask(BootFailure(next(self._numbers), text), "the worker")
        return not isinstance(answer, Acknowledged) or answer.halt

    # --- the wire ---------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the worker's own thread, whichever thread asks; its result."""
        if unpatched.unpatched("_thread", "get_ident")() == self._thread:
            return function()
        # The hub belongs to the worker's thread: let it work, and wait here without a hub.
        done = unpatched.lock()
        done.acquire()
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.extend((function(), None))
            except BaseException as error:
                outcome.extend((None, error))
            finally:
                done.release()

        self._hub.loop.run_callback_threadsafe(gevent.spawn, run)
        done.acquire()
        result, error = outcome
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _tell(self, message: Message) -> bool:
        if self._lost:
            return False
        try:
            self.call(lambda: self._send(message))
        except (channel.ChannelClosed, OSError):
            return False
        return True

    def _send(self, message: Message, fd: int | None = None) -> None:
        # a packet goes whole or not at all, so greenlets need no lock
        channel.send(self._sock, message, fd)

    def _ask(self, ask: Message, label: str, fd: int | None = None) -> tuple[Message, int | None]:
        if self._lost:
            raise server_errors.broker_unavailable(label, self._lost)
        return self.call(lambda: self._exchange(ask, label, fd))

    def _exchange(self, ask: Message, label: str, fd: int | None) -> tuple[Message, int | None]:
        result = self._waiting[ask.id] = AsyncResult()
        try:
            self._send(ask, fd)
            answer: tuple[Message, int | None] = result.get(timeout=ANSWER_TIMEOUT)
            return answer
        except gevent.Timeout:
            raise server_errors.broker_unavailable(
                label, f"did not answer within {ANSWER_TIMEOUT:g} s"
            ) from None
        except (channel.ChannelClosed, OSError) as error:
            if isinstance(error, errors.ListenError):
                raise
            raise server_errors.broker_unavailable(label, "has closed the channel") from None
        finally:
            self._waiting.pop(ask.id, None)

    def hand(self, key: str, addr: Any, fd: int) -> bool:
        """Give a connection that waits for a request to a sibling.

        :param key: see :class:`~gunicorn_passenger.ipc.channel.OfferConnection`.
        :param addr: what ``accept()`` gave.
        :param fd: remains the caller's.
        :returns: whether one serves it from now on.
        :raises errors.BrokerUnavailable: when that cannot be known.
        """
        answer, _ = self._ask(OfferConnection(next(self._numbers), key, json.dumps(addr)), "a connection", fd)
        return isinstance(answer, Acknowledged)

    def _adopt(self, message: AssignConnection, fd: int | None) -> None:
        """A connection of a sibling that leaves."""
        take = None
        if fd is not None and self.adopt is not None and not self.leaves:
            addr = json.loads(message.addr)
            take = self.adopt(message.key, tuple(addr) if isinstance(addr, list) else addr, fd)
        if take is not None:
            try:
                self._send(AssignResult(message.id, True))
            except (channel.ChannelClosed, OSError):
                take = None
        if take is not None:
            take()
            return
        if fd is not None:
            os.close(fd)
        with suppress(channel.ChannelClosed, OSError):
            self._send(AssignResult(message.id, False))

    def _told(
        self, message: AcceptGranted | PauseAccept | AssignConnection | SuccessorReady, fd: int | None
    ) -> None:
        """What the master says without having been asked. Nothing of it may end the reader."""
        try:
            if isinstance(message, SuccessorReady):
                self.heir = True
            elif isinstance(message, AssignConnection):
                self._adopt(message, fd)
            else:
                self._heard(message, fd)
        except Exception:
            self.log.exception("gunicorn-passenger: a message of the master's could not be acted on")

    def _heard(self, message: AcceptGranted | PauseAccept, fd: int | None) -> None:
        """The master says of itself what may be accepted."""
        if isinstance(message, PauseAccept):
            for lease in list(self._leases.values()):
                if lease.key == message.key:
                    lease.pause()
        elif fd is None:
            # this process has no room for it (EMFILE)
            self.log.error(
                "gunicorn-passenger: %s cannot be served: no descriptor is left; raise the limit of open "
                "files (ulimit -n)",
                message.key,
            )
            wanted = self._leases.get(message.id)
            self.close(message.key, message.id)
            if wanted is not None:
                wanted.fail(server_errors.no_descriptor(message.key))
        else:
            lease_of = self._leases.get(message.id)
            if lease_of is None:
                # it was given back meanwhile
                os.close(fd)
                self.close(message.key, message.id)
            else:
                lease_of.grant(
                    AcceptGrant(fd, message.key, _sockname(message), message.slot, message.position)
                )
            return
        if fd is not None:
            os.close(fd)

    def _read(self) -> None:
        """Hand each answer to the greenlet that waits for it."""
        while True:
            try:
                message, fd = channel.receive(self._sock)
            except channel.MalformedPacket as error:
                self.log.warning("gunicorn-passenger: the master sent a message that is none: %s", error)
                continue
            except (channel.ChannelClosed, OSError):
                break
            if isinstance(message, AcceptGranted | PauseAccept | AssignConnection | SuccessorReady):
                self._told(message, fd)
                continue
            if isinstance(message, PacketRejected):
                self.log.error("gunicorn-passenger: the master rejected a message: %s", message.text)
            waiting = self._waiting.get(message.id)
            if waiting is not None:
                waiting.set((message, fd))
            elif fd is not None:
                os.close(fd)  # answered too late
        if os.getpid() != self._pid:
            return
        self._lost = "has closed the channel"
        for waiting in list(self._waiting.values()):
            waiting.set_exception(server_errors.broker_unavailable("the port", self._lost))
        self.on_lost()


def _sockname(answer: PortOpened | AcceptGranted) -> SockAddr | str:
    if answer.path:
        return answer.path
    return (answer.host, answer.port, 0, 0) if ":" in answer.host else (answer.host, answer.port)
