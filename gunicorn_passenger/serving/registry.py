"""The servers of this process: which one is the primary, where each gets its socket, when it accepts.

Runs in: a worker, plain Python, and the master with ``--preload``, where servers wait for the fork.
Must never: leave a server half registered; a ``listen()`` that fails leaves no trace.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import Any, NamedTuple

import gevent
from gevent import socket as gsocket

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import Auto, SockAddr, Tcp, Unix, format_sockname
from gunicorn_passenger.config.port_allocation import PortAllocation, account_name, format_ports
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.listener_context import StandaloneWorker
from gunicorn_passenger.ipc.scoreboard import Counters, Scoreboard
from gunicorn_passenger.serving import events, server_errors, standalone
from gunicorn_passenger.serving.acceptors import ListenerHandler, make_acceptor, secondary_config
from gunicorn_passenger.serving.broker_client import AcceptGrant, BrokerClient, PortLease
from gunicorn_passenger.serving.server import (
    CLOSED,
    LISTENING,
    LOST,
    STOPPED,
    WAITING,
    ListenAddress,
    Server,
    WSGIApp,
)

#: How often a leaving worker looks for connections to give away, and when it tries again after a refusal, in
#: seconds.
_LOOK, _RETRY = 0.1, 0.5
#: Seconds for which the master's word on other processes' servers is believed.
_FRESH = 1.0


class _ServerInfo(NamedTuple):
    name: str
    address: tuple[str, int] | str | None
    placement: str
    state: str


class ServerInfo(_ServerInfo):
    """One server of the application, as :func:`gunicorn_passenger.servers` lists it.

    A named tuple of ``name``, ``address``, ``placement`` and ``state``.
    """

    #: the pid of the worker that serves it, with the placement "each"
    worker: int | None = None


class ThirdPartyServer:
    """A server that is not ours: all that is known of it is its socket."""

    def __init__(
        self,
        kind: str,
        address: tuple[str, int] | str | None,
        key: str,
        state: str = LISTENING,
        placement: str = "shared",
    ) -> None:
        self.kind = kind
        self.address = address
        self.key = key
        self.state = state
        self.placement = placement
        self.position = 0
        #: what the master says of it
        self.lease: PortLease | None = None
        #: where the worker counts its connections, and how many it has accepted
        self.slot = -1
        self.accepted = 0

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.position}" if self.position else self.kind

    @property
    def listening(self) -> bool:
        return self.state == LISTENING

    def __repr__(self) -> str:
        return f"<Foreign server {self.name!r} {self.state}>"


class ServerRegistry:
    """All servers of the program in this process."""

    def __init__(self) -> None:
        self.servers: list[Server | ThirdPartyServer] = []
        self.primary: Server | ThirdPartyServer | None = None
        #: a script run by ``gunicorn-passenger start``: its first listen becomes the primary
        self.script = False
        self.worker: Any = None
        self.link: BrokerClient | None = None
        self.log: Any = None
        #: called when a server becomes the primary
        self.on_primary: Callable[[], object] = lambda: None
        #: the last refusal, which a program may have turned into its own ``sys.exit()``
        self.refusal: errors.PassengerError | None = None
        self._in_master = False
        self._accepting = False
        self._acceptors: dict[Server, ListenerHandler] = {}
        #: acceptors of closed servers whose connections go on
        self._draining: list[ListenerHandler] = []
        #: all acceptors by the slot that they are counted in, and what is left of those that are done
        self._counted: list[tuple[int, ListenerHandler]] = []
        self._counts: dict[int, Counters] = {}
        self._leaving = False
        #: whether a connection is on its way to a sibling; those of which nobody knows whether they got there
        self.handing = False
        self._undecided: list[Any] = []
        #: where servers of other processes are: name to addresses, and until when that is believed
        self._found: dict[str, tuple[tuple[tuple[str, int] | str, ...], float]] = {}
        self._turns = count()
        self._lifecycle: Any = StandaloneWorker()
        self._cfg: Any = None

    # --- where it runs ---------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether the program runs under the worker class (or its master)."""
        return self._in_master or self.worker is not None

    def run_as_master(self) -> None:
        """This process is a gunicorn master; servers made now start in the workers."""
        self._in_master = True

    def run_as_worker(self, worker: Any, link: BrokerClient) -> None:
        """This process is a worker, just forked."""
        self._in_master = False
        self.worker = worker
        self.link = link
        self.log = worker.log
        self._lifecycle = worker
        link.adopt = self.adopt
        self._cfg = secondary_config(worker.cfg)

    def start(self) -> None:
        """The program is loaded: open what waited for the fork, and accept on everything."""
        for server in list(self.servers):
            if isinstance(server, Server) and server.state == WAITING and server._lease is None:
                self._open(server)
        self._accepting = True
        for server in list(self.servers):
            if server.state == LISTENING:
                self._begin(server)

    # --- servers come and go ---------------------------------------------------------------------

    def add(self, server: Server) -> None:
        """A server of ours wants to listen. Any thread may ask; its sockets belong to the worker's.

        :raises errors.PassengerError: when it may not.
        """
        if self.link is not None:
            self.link.call(lambda: self._add(server))
        else:
            self._add(server)

    def _add(self, server: Server) -> None:
        try:
            self._claim_name(server)
            if server.is_primary or settings.auto_install(self.script):
                self.install(server, str(server.want))
            self.servers.append(server)
            try:
                if self._in_master:
                    server.attach(None, WAITING)
                else:
                    self._open(server)
            except BaseException:
                self._forget(server)
                raise
            if server is self.primary:
                self.on_primary()
        except errors.PassengerError as error:
            self.refusal = error
            raise
        if self._accepting and server.state == LISTENING:
            self._begin(server)

    def remove(self, server: Server) -> None:
        """A server of ours closes: it accepts no more and its port is given back."""
        if self.link is not None:
            self.link.call(lambda: self._remove(server))
        else:
            self._remove(server)

    def _remove(self, server: Server) -> None:
        accepting = self._acceptors.pop(server, None)
        if accepting is not None:
            accepting.stop_accepting()
            self._draining = [a for a in (*self._draining, accepting) if not a.idle()]
        sock = server._socket
        if sock is not None and accepting is None and sock.sock is not None:
            sock.sock.close()
        if server._lease is not None:
            self._give_back(server._lease.key, server._lease.number)
        self._forget(server)

    def on_third_party_listen(self, server: ThirdPartyServer) -> None:
        """An unmodified server has its socket."""
        if server in self.servers:
            return  # one server on two sockets, such as asyncio's on both families
        self.servers.append(server)
        if server is self.primary:
            self.on_primary()
        if self._accepting:
            events.emit("listening", server, self.log)

    def on_third_party_closing(self, server: ThirdPartyServer) -> None:
        """An unmodified server is closing its socket: another may take its place."""
        self._forget(server)

    def on_third_party_closed(self, server: ThirdPartyServer) -> None:
        """An unmodified server has closed its socket."""
        self._forget(server)
        if server.key and not self.holds(server.key):
            self._give_back(server.key)
        elif not server.key and server.lease is not None:
            self._give_back("", server.lease.number)

    def _forget(self, server: Server | ThirdPartyServer) -> None:
        if server in self.servers:
            self.servers.remove(server)
        if self.primary is server:
            self.primary = None
            if self.worker is not None:
                self.worker.set_primary_app(None)

    def _give_back(self, key: str, number: int = 0) -> None:
        if self.link is not None and (key or number):
            self.link.close(key, number)

    def _claim_name(self, server: Server) -> None:
        for other in self.servers:
            if server._name is not None and other is not server and other.name == server._name:
                raise server_errors.name_taken(server.name, _where(other))

    def install(self, server: Server | ThirdPartyServer, label: str) -> None:
        """Make a server the primary, which there is one of.

        :param label: where it was asked to listen.
        :raises errors.AlreadyInstalled: with the text that fits the mode.
        """
        if self.primary is not None:
            if settings.auto_install(self.script):
                raise server_errors.auto_installed_twice(_where(self.primary), label)
            raise server_errors.passenger_twice(self.primary.name)
        self.primary = server

    # --- sockets ---------------------------------------------------------------------------------

    def _open(self, server: Server) -> None:
        if self.worker is None:
            server.attach(standalone.open_socket(server.want, server is self.primary), LISTENING)
        elif server is self.primary:
            server.attach(ListenAddress(None, self.worker.primary_name()), LISTENING)
            if self._accepting:
                self.worker.set_primary_app(server.app)
        else:
            try:
                self._open_by_master(server)
            except errors.BrokerUnavailable as error:
                self.log.error("%s", error)
                server.attach(None, LOST)

    def _open_by_master(self, server: Server) -> None:
        assert self.link is not None
        want = server.want
        assert isinstance(want, Tcp | Auto | Unix)
        within = self.check_program_allocation(want.port if isinstance(want, Tcp) else None)
        name = self._auto_name(server) if isinstance(want, Auto) else server.kind
        lease = self.link.open(want, name, server.placement, within=within)
        grant = lease.first()
        if lease.key and self.holds(lease.key):
            if grant is not None:
                os.close(grant.fd)
            self.link.forget(lease)
            raise listen_errors.duplicate_listen(lease.key)
        server._lease = lease
        if grant is not None:
            self._take(server, grant)
        else:
            # another worker accepts; with "each" it is not even known where this one will
            server.attach(ListenAddress(None, lease.sockname, lease.key), LISTENING if lease.key else WAITING)
        lease.watch(lambda grant: self._granted(server, grant), lambda: self._pause(server))

    def _take(self, server: Server, grant: AcceptGrant) -> None:
        family = gsocket.AF_UNIX if isinstance(grant.sockname, str) else _family(grant.sockname)
        sock = gsocket.socket(family, gsocket.SOCK_STREAM, fileno=grant.fd)
        server.position = grant.position
        server.slot = grant.slot
        server.attach(ListenAddress(sock, grant.sockname, grant.key), LISTENING)

    def _granted(self, server: Server, grant: AcceptGrant) -> None:
        """The master lets this worker accept."""
        if self._leaving or server.state == CLOSED:
            os.close(grant.fd)
            if server._lease is not None:
                self._give_back(grant.key, server._lease.number)
            return
        self._take(server, grant)
        if self._accepting:
            self._begin(server)

    def _pause(self, server: Server) -> None:
        """The master stops it, for good or for a moment."""
        sock = server._socket
        if sock is None or server._lease is None or server.state == CLOSED:
            return
        accepting = self._acceptors.pop(server, None)
        if accepting is not None:
            accepting.stop_accepting()
            self._draining = [a for a in (*self._draining, accepting) if not a.idle()]
        elif sock.sock is not None:
            sock.sock.close()
        server.attach(ListenAddress(None, sock.sockname, sock.key), STOPPED)
        assert self.link is not None
        self.link.paused(sock.key)

    def check_program_allocation(self, port: int | None) -> str:
        """What the program itself narrowed the port allocation to.

        :returns: the ports as text, empty where the program set none.
        :raises errors.PortNotAllocated: when ``port`` is not among them.
        """
        layer = settings.program_layer()
        if layer is None:
            return ""
        if port is not None:
            PortAllocation(account_name(os.geteuid()), (layer,)).check(port)
        return format_ports(layer.ports)

    def holds(self, key: str) -> bool:
        """Whether a server of this process already has the port."""
        for server in self.servers:
            if isinstance(server, ThirdPartyServer) and server.key == key:
                return True
            if isinstance(server, Server) and server._lease is not None and server._lease.key == key:
                return True
        return False

    def _auto_name(self, server: Server) -> str:
        """Tells equal servers of one program apart: the n-th of a name, counted alike in each worker."""
        same = [
            other
            for other in self.servers
            if isinstance(other, Server) and isinstance(other.want, Auto) and other.kind == server.kind
        ]
        position = same.index(server)
        return server.kind if position == 0 else f"{server.kind}#{position + 1}"

    # --- accepting -------------------------------------------------------------------------------

    def _begin(self, server: Server | ThirdPartyServer) -> None:
        """Let a server accept, and tell the program."""
        if isinstance(server, Server) and server not in self._acceptors:
            sock = server._socket
            if sock is not None and sock.sock is not None:
                self._accept(server, sock)
            elif server is not self.primary:
                return  # another worker accepts
        elif isinstance(server, Server):
            return
        events.emit("listening", server, self.log)

    def _accept(self, server: Server, sock: ListenAddress) -> None:
        cfg, log = self._configuration()
        accepting = self._acceptors[server] = make_acceptor(sock.sock, server.app, cfg, log, self._lifecycle)
        self.count(server.slot, accepting)
        accepting.start()

    def _configuration(self) -> tuple[Any, Any]:
        if self._cfg is None:  # plain Python: gunicorn's defaults
            from gunicorn.config import Config

            self._cfg = Config()
            self.log = self._cfg.logger_class(self._cfg)
        return self._cfg, self.log

    def run_standalone(self) -> None:
        """Plain Python: accept until interrupted (Ctrl-C or SIGTERM), then finish what is in hand."""
        import signal

        import gevent
        from gevent.event import Event

        end = Event()
        watchers = [gevent.signal_handler(number, end.set) for number in (signal.SIGINT, signal.SIGTERM)]
        self.start()
        events.emit("ready", None, self.log)
        try:
            end.wait()
        finally:
            for watcher in watchers:
                watcher.cancel()
            self.stop_accepting()
            self.wait_idle(self._configuration()[0].graceful_timeout)
            events.emit("exit", None, self.log)
            for server in list(self.servers):
                if isinstance(server, Server):
                    standalone.unlink(server.address)

    # --- leaving ---------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """Close the listening sockets of our own servers; their connections go on."""
        self._leaving = True
        for server, accepting in self._acceptors.items():
            accepting.stop_accepting()
            if server.placement != "shared" and server._lease is not None:
                # the next worker need not wait for the connections of this one
                self._give_back(server._lease.key, server._lease.number)

    def pause(self) -> None:
        """In a child that the program has forked from the worker: leave the connections to the worker."""
        for accepting in self._acceptors.values():
            accepting.pause()

    def idle(self) -> bool:
        """Whether no server of ours has a connection."""
        return not self.handing and all(a.idle() for a in (*self._acceptors.values(), *self._draining))

    def kill(self, timeout: float) -> None:
        for accepting in (*self._acceptors.values(), *self._draining):
            accepting.kill(timeout)

    def wait_idle(self, seconds: float) -> None:
        import time

        import gevent

        deadline = time.monotonic() + seconds
        while not self.idle() and time.monotonic() < deadline:
            gevent.sleep(0.05)
        self.kill(1)

    # --- connections between workers ---------------------------------------------------------------

    def hand_over(self, primaries: Callable[[], Iterable[ListenerHandler]], keepalive: float) -> None:
        """A leaving worker gives connections that wait for a request to siblings: none has to be closed.

        One after the other, and each is this worker's until a sibling says that it serves it. A request that
        comes meanwhile waits in the connection. Runs in a greenlet of its own, until it is killed.

        :param keepalive: seconds for which it is tried. Each try lets an idle connection's time begin anew.
        """
        link = self.link
        assert link is not None
        until = monotonic() + keepalive
        later: dict[str, float] = {}
        while monotonic() < until:
            for key, accepting in self._places_of(primaries()):
                while link.heir and monotonic() >= later.get(key, 0.0):
                    if not self._hand_one(link, key, accepting):
                        later[key] = monotonic() + _RETRY
            gevent.sleep(_LOOK)

    def _places_of(self, primaries: Iterable[ListenerHandler]) -> list[tuple[str, ListenerHandler]]:
        places = [(primary_key(accepting), accepting) for accepting in primaries]
        return places + [(s._lease.key, a) for s, a in self._acceptors.items() if s._lease is not None]

    def _hand_one(self, link: BrokerClient, key: str, accepting: ListenerHandler) -> bool:
        """:returns: false when there is none to give, or nobody takes it."""
        given = accepting.waiting(1)
        for sock, addr in given:
            try:
                self.handing = True
                taken = link.hand(key, addr, sock.fileno())
            except errors.BrokerUnavailable:
                # a sibling may serve it: it must not be read here again
                link.heir = False
                self._undecided.append(sock)
                return False
            finally:
                self.handing = False
            if not taken:
                accepting.adopt(sock, addr, begun=True)
                return False
            sock.release()
        return bool(given)

    def adopt(self, key: str, addr: Any, fd: int) -> Callable[[], object] | None:
        """Take a connection that a sibling gives away.

        :returns: what begins to serve it; ``None`` when nobody here can.
        """
        accepting = next((a for s, a in self._acceptors.items() if s._lease and s._lease.key == key), None)
        if accepting is None:
            accepting = next((a for a in self.worker.primaries() if primary_key(a) == key), None)
        if self._leaving or not isinstance(accepting, Acceptor) or not accepting.has_capacity():
            return None
        with socket.socket(fileno=os.dup(fd)) as probe:
            family, proto = probe.family, probe.proto
        os.set_blocking(fd, False)
        sock = ClientSocket(family, socket.SOCK_STREAM, proto, fd)
        return lambda: accepting.adopt(sock, addr, begun=True)

    # --- counting --------------------------------------------------------------------------------

    def count(self, slot: int, accepting: ListenerHandler) -> None:
        """From now on, count what an acceptor does in this slot of the board."""
        self._counted.append((slot, accepting))

    def write_counts(self, board: Scoreboard) -> None:
        """Bring the worker's board up to date. Called once a second, and at the end."""
        for slot, accepting in self._counted:
            if accepting.done():
                self._counts[slot] = self._counts.get(slot, Counters()).plus(accepting.counts())
        self._counted = [(slot, accepting) for slot, accepting in self._counted if not accepting.done()]
        now = dict(self._counts)
        for slot, accepting in self._counted:
            now[slot] = now.get(slot, Counters()).plus(accepting.counts())
        for slot, counts in now.items():
            board.write(slot, counts)

    # --- what others see -------------------------------------------------------------------------

    def list(self) -> list[ServerInfo]:
        """The servers of this process, and those of the placement "each" that other workers have."""
        found = []
        for server in self.servers:
            info = ServerInfo(server.name, server.address, server.placement, server.state)
            if server.placement == "each" and server.position:
                info.worker = os.getpid()
            found.append(info)
        kinds = {server.kind for server in self.servers if server.placement == "each"}
        return [*found, *(self._elsewhere(kinds, {i.name for i in found}) if kinds else ())]

    def resolve_server(self, name: str) -> tuple[str, int] | str:
        """Where a server of the application can be reached, in whichever process it is.

        :param name: its name; that of an ``"each"`` server without the number means all of them in turn.
        :raises LookupError: when there is none, or it listens nowhere yet.
        """
        for server in self.servers:
            if server.name == name and server.address:
                return server.address
        now = monotonic()
        found, until = self._found.get(name, ((), 0.0))
        if now >= until:
            with suppress(errors.BrokerUnavailable):  # what was known is better than nothing
                found = tuple(self._places(name))
            self._found[name] = found, now + _FRESH
        if not found:
            self._found.pop(name, None)
            raise LookupError(name)
        return found[next(self._turns) % len(found)]

    def _places(self, name: str) -> Iterator[tuple[str, int] | str]:
        """All addresses under a name, as the master knows them; daemons too."""
        report = self.report()
        for entry in [*report["servers"], *report.get("daemons", ())]:
            known, address = entry["name"], entry["address"]
            if entry.get("placement") == "each" and name != known:
                known = known.rpartition(".")[0]
            served = entry["state"] == "running" or (entry["state"] == "listening" and entry.get("workers"))
            if known == name and address and served:
                if address.startswith("unix:"):
                    yield address
                else:
                    host, _, port = address.rpartition(":")
                    yield host.strip("[]"), int(port)

    def _elsewhere(self, kinds: set[str], known: set[str]) -> Iterator[ServerInfo]:
        try:
            servers = self.report()["servers"]
        except errors.BrokerUnavailable:
            return
        for entry in servers:
            name = entry["name"]
            if entry["placement"] == "each" and name not in known and name.rpartition(".")[0] in kinds:
                host, _, port = entry["address"].rpartition(":")
                info = ServerInfo(name, (host.strip("[]"), int(port)), "each", entry["state"])
                info.worker = next(iter(entry["workers"]), None)
                yield info

    def report(self) -> dict[str, Any]:
        """The whole application, from the master (see ``status/report.py``).

        :raises errors.BrokerUnavailable: outside a worker, or when the master cannot be reached.
        """
        if self.link is None:
            raise server_errors.broker_unavailable(
                "the report", "is that of gunicorn, which does not run here"
            )
        return self.link.report()

    def has_standalone_listener(self) -> bool:
        return any(isinstance(server, Server) and server.state == LISTENING for server in self.servers)


def primary_key(accepting: ListenerHandler) -> str:
    """What a listener of the primary is called between workers."""
    return f"primary {format_sockname(accepting.sockname)}"


def _where(server: Server | ThirdPartyServer) -> str:
    address = server.address
    if isinstance(server, Server):
        return str(server.want)
    if isinstance(address, tuple):
        return format_sockname(address)
    return str(server.name)


def _family(sockname: SockAddr) -> int:
    return int(gsocket.AF_INET6 if len(sockname) == 4 else gsocket.AF_INET)


registry = ServerRegistry()


def create_server(app: WSGIApp, **options: object) -> Server:
    """Make a server for a WSGI application; ``.listen(address)`` starts it.

    :param app: a WSGI callable.
    :raises TypeError: when it is not callable, or for an option: this version has none.
    """
    for name in options:
        raise errors.UnknownSetting(
            f"create_server() has no option {name!r}; what it takes is the application"
        )
    return Server(app, registry)


def listen(address: object, app: WSGIApp, **options: Any) -> Server:
    """``create_server(app).listen(address, **options)`` in one call; see :meth:`.server.Server.listen`."""
    return create_server(app).listen(address, **options)


def serve_forever() -> None:
    """Serve until interrupted. Under the worker, which serves anyway, it returns at once.

    With plain ``python``: until Ctrl-C or SIGTERM, finishing the requests that are being answered.

    :raises PassengerError: with plain ``python``, when no server listens.
    """
    if registry.active:
        return
    if not registry.has_standalone_listener():
        raise errors.PassengerError("serve_forever() has nothing to serve: call listen() on a server first")
    registry.run_standalone()


def active() -> bool:
    """Whether the program runs under ``gunicorn_passenger.Worker``."""
    return registry.active


def servers() -> list[ServerInfo]:
    """The servers of this application: name, address, placement, state."""
    return registry.list()
