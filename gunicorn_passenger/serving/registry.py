"""The servers of this process: which one is the primary, where each gets its socket, when it accepts.

Process: a worker, plain Python, and the master with ``--preload``, where servers wait for the fork.
Never: leave a server half registered; a ``listen()`` that fails leaves no trace. Never import gevent, which
a worker of another class needs only once it has a server of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import Auto, Tcp, Unix, format_sockname
from gunicorn_passenger.config.port_allocation import PortAllocation, account_name, format_ports
from gunicorn_passenger.config.settings import OFF, settings
from gunicorn_passenger.serving import events, server_errors, standalone
from gunicorn_passenger.serving.acceptor_table import AcceptorTable
from gunicorn_passenger.serving.asgi_server import AsgiServer
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.serving.discovery import ServerDiscovery
from gunicorn_passenger.serving.port_lease import AcceptGrant, PortLease
from gunicorn_passenger.serving.server import (
    CLOSED,
    LISTENING,
    LOST,
    STOPPED,
    WAITING,
    ListenAddress,
    Server,
)
from gunicorn_passenger.serving.third_party import ThirdPartyServer

if TYPE_CHECKING:
    from gunicorn_passenger.serving.connection_migration import ConnectionMigration
    from gunicorn_passenger.serving.scheduler import Scheduler


#: Seconds that an ASGI application may take to end when another one cannot start.
_KILL_TIMEOUT = 1.0
#: Seconds of the graceful timeout that are left to ASGI applications when connections do not end.
_SHUTDOWN_SECONDS = 1.5


class ServerRegistry:
    """All servers of the program in this process."""

    def __init__(self) -> None:
        self.servers: list[Server | ThirdPartyServer] = []
        self.primary: Server | ThirdPartyServer | None = None
        self.acceptors = AcceptorTable()
        self.discovery = ServerDiscovery(self.servers, self.report)
        self.migration: ConnectionMigration | None = None
        #: a script that ``gunicorn-passenger start`` runs: its first listen becomes the primary
        self.script = False
        #: the port of the script's listen that becomes the primary instead (``--primary``); 0 for the first
        self.script_primary = 0
        self._primary_elsewhere = False
        self.worker: Any = None
        self.broker: BrokerClient | None = None
        #: how this process waits, once it serves
        self.scheduler: Scheduler | None = None
        self.log: Any = None
        #: called when the worker begins to drain; each returns when what it ends has ended
        self.before_drain: list[Callable[[], object]] = []
        #: whether the worker has begun to drain: it starts nothing any more
        self.draining = False
        #: called when a server becomes the primary
        self.on_primary: Callable[[], object] = lambda: None
        #: the last error of a ``listen()``, which a program may have turned into its own ``sys.exit()``
        self.last_error: errors.PassengerError | None = None
        self._in_master = False
        #: whether the worker has loaded the program, and its servers accept
        self.started = False

    # --- where it runs ---------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether the program runs in a worker (or its master)."""
        return self._in_master or self.worker is not None

    def captures(self, port: int | None) -> bool:
        """Whether a listen becomes the primary although it names a port, in auto-install mode.

        In a worker of another class the primary is gunicorn's own.

        :param port: the port; ``None`` for an address without one.
        """
        if self._primary_elsewhere:
            return False
        return settings.auto_install(self.script) and self.script_primary in (0, port)

    def run_as_master(self) -> None:
        """This process is a gunicorn master; servers that the program makes now start in the workers."""
        self._in_master = True

    def run_as_worker(
        self, worker: Any, broker: BrokerClient, is_patched: bool = True, primary_elsewhere: bool = False
    ) -> None:
        """This process is a worker, just forked.

        :param is_patched: whether gevent has patched the program.
        :param primary_elsewhere: whether gunicorn's own class serves the primary, and not we.
        """
        self._in_master = False
        self.worker = worker
        self.broker = broker
        self.scheduler = broker.scheduler
        self.log = worker.log
        self.acceptors.configure(worker.cfg, worker.log, worker, is_patched)
        self._primary_elsewhere = primary_elsewhere

    def start(self) -> None:
        """The program is loaded: open what waited for the fork, and accept on everything."""
        self._run(self._start, *self.servers)

    def _start(self) -> None:
        for server in list(self.servers):
            if isinstance(server, Server) and server.state == WAITING and server.lease is None:
                self._open(server)
        try:
            for server in list(self.servers):
                self._start_application(server)
        except BaseException:
            self.acceptors.kill(_KILL_TIMEOUT)
            raise
        self.started = True
        for server in list(self.servers):
            if server.state == LISTENING:
                self._begin(server)

    # --- servers come and go ---------------------------------------------------------------------

    def add(self, server: Server) -> None:
        """A server of ours starts to listen. Any thread may call; sockets belong to the hub's thread.

        :raises errors.PassengerError: when the server may not.
        """
        self._run(lambda: self._add(server), server)

    def _add(self, server: Server) -> None:
        try:
            _check_name(server, self.servers)
            if server.is_primary and self._primary_elsewhere:
                raise server_errors.primary_elsewhere(self.worker.cfg.worker_class_str)
            address = server.requested_address
            port = address.port if isinstance(address, Tcp) else None
            if server.is_primary or self.captures(port):
                if isinstance(server, AsgiServer):
                    raise server_errors.asgi_primary(server.name)
                self.set_primary(server, str(server.requested_address))
            self.servers.append(server)
            try:
                if self._in_master:
                    server.set_socket(None, WAITING)
                else:
                    self._open(server)
                if self.started:
                    self._start_application(server)
            except BaseException:
                self._remove(server)
                raise
            if server is self.primary:
                self.on_primary()
        except errors.PassengerError as error:
            self.last_error = error
            raise
        if self.started and server.state == LISTENING:
            self._begin(server)

    def remove(self, server: Server) -> None:
        """A server of ours closes: it stops accepting, and this worker releases the port."""
        self._run(lambda: self._remove(server), server)

    def _start_application(self, server: Server | ThirdPartyServer) -> None:
        """Start what an ASGI application needs before its first request, and wait for it."""
        if isinstance(server, AsgiServer) and not self.draining:
            assert self.scheduler is not None
            self.acceptors.start_application(server, self.scheduler)

    def _remove(self, server: Server) -> None:
        self.acceptors.stop(server)
        if isinstance(server, AsgiServer) and server.thread is not None:
            server.thread.finish()
        self._release(server.lease)
        self.forget(server)

    def _run(self, function: Callable[[], None], *servers: Server | ThirdPartyServer) -> None:
        """Run a function where the sockets of the servers belong."""
        if self.scheduler is None:
            function()
        elif any(_needs_hub(server, self.broker is not None) for server in servers):
            self.scheduler.run_in_hub(function)
        else:
            self.scheduler.run(function)

    def on_third_party_listen(self, server: ThirdPartyServer) -> None:
        """An unmodified server has its socket."""
        if server in self.servers:
            return  # one server on two sockets, such as asyncio's on both address families
        self.servers.append(server)
        if server is self.primary:
            self.on_primary()
        if self.started:
            events.emit("listening", server, self.log)

    def on_third_party_closed(self, server: ThirdPartyServer) -> None:
        """An unmodified server has closed its socket."""
        self.forget(server)
        if self.broker is not None:
            if server.key and not self.has_port(server.key):
                self.broker.release_port(server.key)
            elif not server.key and server.lease is not None:
                self.broker.release_port("", server.lease.number)

    def forget(self, server: Server | ThirdPartyServer) -> None:
        """A server is closing its socket: another may take its place."""
        if server in self.servers:
            self.servers.remove(server)
        if self.primary is server:
            self.primary = None
            if self.worker is not None:
                self.worker.set_primary_app(None)

    def _release(self, lease: PortLease | None) -> None:
        if self.broker is not None and lease is not None:
            self.broker.release_port(lease.key, lease.number)

    def set_primary(self, server: Server | ThirdPartyServer, label: str) -> None:
        """Make a server the primary, of which the program has one.

        :param label: the address that the program gave to ``listen()``.
        :raises errors.AlreadyInstalled: with the text that fits the mode.
        """
        if self.primary is not None:
            if settings.auto_install(self.script):
                raise server_errors.auto_installed_twice(_requested(self.primary), label)
            raise server_errors.passenger_twice(self.primary.name)
        self.primary = server

    # --- sockets ---------------------------------------------------------------------------------

    def _open(self, server: Server) -> None:
        if self.worker is None:
            is_primary = server is self.primary
            server.set_socket(standalone.open_socket(server.requested_address, is_primary), LISTENING)
        elif server is self.primary:
            server.set_socket(ListenAddress(None, self.worker.primary_name()), LISTENING)
            if self.started:
                self.worker.set_primary_app(server.app)
        else:
            try:
                self._request_port(server)
            except errors.BrokerUnavailable as error:
                self.log.error("%s", error)
                server.set_socket(None, LOST)

    def _request_port(self, server: Server) -> None:
        assert self.broker is not None
        address = server.requested_address
        assert isinstance(address, Tcp | Auto | Unix)
        within = check_program_allocation(address.port if isinstance(address, Tcp) else None)
        name = _auto_name(server, self.servers) if isinstance(address, Auto) else server.base_name
        lease = self.broker.open_port(address, name, server.placement, within=within)
        grant = lease.take_initial_grant()
        if lease.key and self.has_port(lease.key):
            if grant is not None:
                os.close(grant.fd)
            self.broker.discard(lease)
            raise listen_errors.duplicate_listen(lease.key)
        server.lease = lease
        if grant is not None:
            server.use_grant(grant)
        else:
            # another worker accepts; with "each" the address of this worker is not known yet
            state = LISTENING if lease.key else LOST if lease.is_late else WAITING
            server.set_socket(ListenAddress(None, lease.sockname, lease.key), state)
        lease.subscribe(lambda grant: self._on_grant(server, grant), lambda: self._on_pause(server))

    def _on_grant(self, server: Server, grant: AcceptGrant) -> None:
        """The master lets this worker accept."""
        if self.draining or server.state == CLOSED:
            os.close(grant.fd)
            self._release(server.lease)
            return
        server.use_grant(grant)
        if self.started:
            self._begin(server)

    def _on_pause(self, server: Server) -> None:
        """The master stops this worker's accepting, for good or for a moment."""
        sock = server.socket
        if sock is None or server.lease is None or server.state == CLOSED:
            return
        self.acceptors.stop(server)
        server.set_socket(ListenAddress(None, sock.sockname, sock.key), STOPPED)
        assert self.broker is not None
        self.broker.confirm_pause(sock.key)

    def has_port(self, key: str) -> bool:
        """Whether a server of this process already has the port."""
        for server in self.servers:
            if isinstance(server, ThirdPartyServer) and server.key == key:
                return True
            if isinstance(server, Server) and server.lease is not None and server.lease.key == key:
                return True
        return False

    # --- accepting -------------------------------------------------------------------------------

    def _begin(self, server: Server | ThirdPartyServer) -> None:
        """Let a server accept, and tell the program."""
        if isinstance(server, Server):
            if self.draining or server in self.acceptors:
                return
            if isinstance(server, AsgiServer) and server.thread is None:
                return  # it accepts once its application has started
            if server.socket is not None and server.socket.sock is not None:
                self.connect_siblings()
                self.acceptors.open_mailbox(server.sticky)
                # that may have waited for the master
                if self.draining or server in self.acceptors or server.socket.sock is None:
                    return
                self.acceptors.start(server, server.socket.sock)
            elif server is not self.primary:
                return  # another worker accepts
        events.emit("listening", server, self.log)

    def connect_siblings(self) -> None:
        """Prepare to exchange connections and messages with the siblings, before this worker needs it."""
        if self.migration is None and self.broker is not None:
            from gunicorn_passenger.serving.connection_migration import ConnectionMigration
            from gunicorn_passenger.serving.mailboxes import Mailboxes

            self.migration = ConnectionMigration(self.broker, self.acceptors)
            self.acceptors.mailboxes = Mailboxes(self.broker, self.acceptors.by_key)
            self.broker.on_connections_assigned = self.migration.receive_connections

    def stop_accepting(self) -> None:
        """Close the listening sockets, the primary's too; their open connections continue."""
        self.draining = True
        if self.scheduler is not None:
            self.scheduler.run_all(self.before_drain)
        if (agent := sys.modules.get("gunicorn_passenger.proxy.agent")) is not None:
            agent.keep_no_connections()
        for server in self.acceptors.stop_all():
            if server.placement != "shared":
                # the next worker need not wait for the connections of this one
                self._release(server.lease)

    def idle(self) -> bool:
        """Whether no server of ours has a connection."""
        return not (self.migration is not None and self.migration.in_flight) and self.acceptors.idle()

    def shutdown_seconds(self, graceful_timeout: float) -> float:
        """What the lifespans of ASGI applications may take of it after the last connections were ended.

        gunicorn kills a worker at the end of the graceful timeout, and their shutdown would not run.
        """
        return min(_SHUTDOWN_SECONDS, graceful_timeout / 4) if self.acceptors.has_applications() else 0.0

    def kill(self, timeout: float) -> None:
        """End the connections that are left, and then the ASGI applications.

        :param timeout: seconds that each of these may take.
        """
        self.acceptors.kill(timeout)

    # --- what others see -------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The state of the whole application, from the master (see ``status/report.py``).

        :raises errors.BrokerUnavailable: outside a worker, or when the master cannot be reached.
        """
        if self.broker is None:
            raise server_errors.broker_unavailable("the report", "does not run, because gunicorn does not")
        return self.broker.report()


def _needs_hub(server: Server | ThirdPartyServer, in_worker: bool) -> bool:
    """Whether a server accepts in a hub, or has a mailbox, which a hub reads."""
    return isinstance(server, Server) and (
        server.needs_hub or (in_worker and server.sticky not in (None, OFF))
    )


def check_program_allocation(port: int | None) -> str:
    """The ports that the program itself allows, which it can only narrow.

    :returns: the ports as text, empty where the program set none.
    :raises errors.PortNotAllocated: when ``port`` is not among them.
    """
    layer = settings.program_layer()
    if layer is None:
        return ""
    if port is not None:
        PortAllocation(account_name(os.geteuid()), (layer,)).check(port)
    return format_ports(layer.ports)


def _check_name(server: Server, servers: Iterable[Server | ThirdPartyServer]) -> None:
    for other in servers:
        if server.given_name is not None and other is not server and other.name == server.given_name:
            raise server_errors.name_taken(server.name, _requested(other))


def _auto_name(server: Server, servers: Iterable[Server | ThirdPartyServer]) -> str:
    """Tells equal servers of one program apart: the n-th of a name, counted alike in each worker."""
    same = [
        other
        for other in servers
        if isinstance(other, Server)
        and isinstance(other.requested_address, Auto)
        and other.base_name == server.base_name
    ]
    position = same.index(server)
    return server.base_name if position == 0 else f"{server.base_name}#{position + 1}"


def _requested(server: Server | ThirdPartyServer) -> str:
    if isinstance(server, Server):
        return str(server.requested_address)
    return format_sockname(server.address) if isinstance(server.address, tuple) else server.name


registry = ServerRegistry()
