"""``bind`` and ``listen`` replaced, so that unmodified servers get the master's sockets.

Process: a worker, from just after the fork.
Never: touch a socket that does not bind a TCP port to listen: UDP, port 0, UNIX sockets, client sockets. Only
a client's connection to this worker's own server is redirected (:mod:`.self_connection`).

Facts and rules:

- The kernel does every ``bind``; :mod:`.pending_bind` says what happens until the program listens.
- ``listen`` puts the master's socket under the program's own descriptor (``dup2``), so the program keeps its
  socket object; see :mod:`.leased_sockets`. The options that the program has set are set on the master's
  socket.
- The siblings share the open file description, and so its ``O_NONBLOCK``, which the master sets. A socket of
  the standard library that the program sets to block keeps it: the socket waits with a timeout that never
  ends, for which Python polls.
- A captured primary is an AF_UNIX socket under an object that says AF_INET; see :mod:`.inet_facade`.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import threading
from contextlib import closing, suppress
from time import monotonic
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import SockAddr, Tcp, format_tcp
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.interposition import inet_facade, third_party_drain
from gunicorn_passenger.interposition.fd_swap import swap_fds
from gunicorn_passenger.interposition.leased_sockets import LeasedSockets, describe
from gunicorn_passenger.interposition.own_fds import fds_of, room
from gunicorn_passenger.interposition.pending_bind import (
    PendingBind,
    PendingBinds,
    bind_locks,
    is_port,
    pending_bind,
    set_reuse,
)
from gunicorn_passenger.interposition.self_connection import SelfConnections
from gunicorn_passenger.interposition.socket_options import (
    changed_options,
    is_tcp,
    keep_nonblocking,
    set_options,
    shares_port,
    unreachable_listener,
)
from gunicorn_passenger.interposition.unmanaged_listeners import UnmanagedListeners
from gunicorn_passenger.ipc.scoreboard import PRIMARY_SLOT
from gunicorn_passenger.serving import program_metrics, server_errors
from gunicorn_passenger.serving.registry import ServerRegistry, check_program_allocation
from gunicorn_passenger.serving.server import LISTENING, LOST, WAITING, ListenAddress
from gunicorn_passenger.serving.third_party import ThirdPartyServer

#: Seconds between two checks of a bind for which siblings wait.
_WATCH_INTERVAL = 0.01


class SocketPatch:
    """Decides what the replaced calls do."""

    def __init__(self, registry: ServerRegistry, inherited: set[int]) -> None:
        """
        :param registry: that of a worker; its client of the broker exists.
        :param inherited: inodes of the sockets on which the master listened at the fork.
        """
        self._registry = registry
        assert registry.broker is not None
        self._scheduler = registry.broker.scheduler
        self._pid = os.getpid()
        self._watching = False
        self.binds = PendingBinds(self._on_listening, self._on_lock)
        self.leased = LeasedSockets(registry)
        self._self_connections = SelfConnections(registry, self.leased)
        self._idle_connections = third_party_drain.IdleConnections()
        self._unmanaged = UnmanagedListeners(registry, inherited)
        #: the address to which the program has bound the captured primary
        self._primary_name: SockAddr | None = None

    # --- the calls -------------------------------------------------------------------------------

    def bind(self, sock: _socket.socket, address: Any) -> bool:
        """Bind a socket to a TCP port.

        Where the kernel refuses the port because a server of this application has it, or because it is
        privileged, the socket becomes one of the master's at once.

        :returns: false when the call must be done as it is.
        """
        if not (os.getpid() == self._pid and is_tcp(sock) and is_port(address)):
            return False
        fd, port = _socket.socket.fileno(sock), address[1]
        if fd < 0 or _socket.socket.getsockname(sock)[1:2] != (0,) or settings.placement(port, "") == "off":
            return False  # the kernel refuses a second bind
        bind = pending_bind(sock, address)
        if not shares_port(sock) and any(e.name[:2] == bind.name[:2] for e in self.leased.open_entries()):
            raise listen_errors.duplicate_listen(format_tcp(bind.host, port))
        self.binds.wait_for_siblings(port, self._scheduler.sleep)
        try:
            _socket.socket.bind(sock, bind.name)
        except OSError as error:
            try:
                self._on_refused(sock, bind, error)
            finally:
                self.binds.release(port)
            return True
        self.binds.add(bind)
        if not self._watching:
            self._watching = True
            self._scheduler.start_task(self._watch)
        return True

    def _on_refused(self, sock: _socket.socket, bind: PendingBind, error: OSError) -> None:
        """The kernel refuses a bind: share the port, if it is this application's.

        :raises OSError: the kernel's error, with the owner of the port where that can be told.
        """
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise error
        label = format_tcp(bind.host, bind.port)
        if (pid := bind_locks.owner(bind.port)) and error.errno == errno.EADDRINUSE:
            raise listen_errors.bound_by_sibling(label, pid) from None
        try:
            self._replace(sock, bind, 0)
        except errors.PortInUse:
            raise
        except errors.PassengerError:
            if error.errno == errno.EACCES:
                raise
            # not a server: perhaps a client that wants a local port
            raise error from None

    def listen(self, sock: _socket.socket, backlog: int) -> bool:
        """Put the master's socket under a descriptor that was bound.

        :returns: false when the program has not bound the socket to a TCP port, and the call must be done.
        """
        fd = _socket.socket.fileno(sock)
        if self.leased.has(fd):
            return True  # a second listen() would only change the queue that the siblings share
        if os.getpid() != self._pid or (bind := self.binds.find(fd)) is None:
            return False
        bind.listens = True
        try:
            self._replace(sock, bind, backlog)
        except BaseException:
            bind.listens, bind.since = False, monotonic()
            raise
        self.binds.remove(bind)
        return True

    def connect(self, sock: _socket.socket, address: Any) -> bool:
        """:returns: false when the call must be done as it is."""
        if os.getpid() != self._pid:
            return False
        self.binds.on_connect(_socket.socket.fileno(sock))
        return self._self_connections.connect(sock, address)

    def shutdown(self, sock: _socket.socket) -> bool:
        """End this worker's accepting on one of the master's sockets, as ``shutdown`` does for a socket.

        :returns: false when the socket is not the master's, and the call must be done.
        """
        fd = _socket.socket.fileno(sock)
        if not self.leased.has(fd):
            return False
        if os.getpid() == self._pid:
            self.leased.on_shutdown(fd)
            return True
        with closing(unreachable_listener()) as unreachable:
            os.dup2(unreachable.fileno(), fd, inheritable=os.get_inheritable(fd))
            unreachable.shutdown(socket.SHUT_RDWR)  # accept() fails from now on
        return True

    def _replace(
        self, sock: _socket.socket, bind: PendingBind, backlog: int, opened: bool = False
    ) -> ThirdPartyServer:
        """Put the master's socket under the descriptors of a socket that the program has bound.

        :param opened: whether the socket listens already, and the master is to share this one.
        :raises errors.PassengerError: when the program may not listen there; its socket is as before.
        """
        try:
            server = self._share(sock, bind, backlog, opened)
        except errors.PassengerError as error:
            self._registry.last_error = error
            raise
        self._registry.on_third_party_listen(server)
        self._warn_of_separate_metrics(server)
        return server

    def _share(self, sock: _socket.socket, bind: PendingBind, backlog: int, opened: bool) -> ThirdPartyServer:
        try:
            options = changed_options(sock)
            if self._registry.captures(bind.port):
                server, source = self._take_primary(bind)
            else:
                server, source = self._request_port(sock, bind, backlog, opened)
            try:
                self.leased.add(bind, source, server, options)
            except OSError:
                if server not in self._registry.servers:
                    self._registry.on_third_party_closed(server)
                raise
        except OSError as error:
            if isinstance(error, errors.ListenError) or error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise server_errors.no_descriptor(format_tcp(bind.host, bind.port)) from None
        set_options(sock, options)
        keep_nonblocking(sock)
        return server

    def _warn_of_separate_metrics(self, server: ThirdPartyServer) -> None:
        several = (
            server.lease is not None
            and server.placement == "shared"
            and self._registry.worker.cfg.workers > 1
        )
        if several and not os.environ.get(program_metrics.VARIABLE) and program_metrics.exporter_calls():
            self._registry.log.warning(
                "%s shows the metrics of whichever worker responds, so the numbers change from one request "
                "to the next: set PASSENGER_PROMETHEUS=1, or configure(prometheus=True) in "
                "gunicorn.conf.py, to show the sums over all workers",
                server.name,
            )

    # --- what becomes of a bind ------------------------------------------------------------------

    def _watch(self) -> None:
        """Look often at the binds for which siblings wait."""
        try:
            while self.binds.check():
                self._scheduler.sleep(_WATCH_INTERVAL)
        finally:
            self._watching = False

    def _on_listening(self, bind: PendingBind) -> None:
        """Something other than Python's socket module listens on a socket: have the master share that."""
        label = format_tcp(bind.host, bind.port)
        self.binds.take(bind)
        try:
            with room():
                sock = _socket.socket(fileno=os.dup(bind.fd))
            with closing(sock):
                self._share_native(sock, bind, label)
        except (errors.PassengerError, OSError) as error:
            self._registry.log.error(
                "%s: %s; only this worker listens there (pid:%s)", label, error, self._pid
            )
        finally:
            self.binds.release(bind.port)

    def _share_native(self, sock: _socket.socket, bind: PendingBind, label: str) -> None:
        if os.get_blocking(bind.fd):
            # a thread or a child waits in accept(), and must be able to
            self._registry.log.warning(
                "%s: only this worker listens there (pid:%s), because the program listens without "
                "Python's socket module, on a blocking socket; make the socket non-blocking, and the "
                "workers share it",
                label,
                self._pid,
            )
            return
        try:
            self._replace(sock, bind, 0, opened=True)
        except errors.PortNotAllocated as error:
            try:
                with closing(unreachable_listener()) as unreachable:
                    swap_fds([fd for fd in fds_of(bind.inode) if fd != sock.fileno()], unreachable)
            finally:
                # the master, or a child of the program, may have a copy: the socket stops listening for all
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._registry.log.error("%s; the server gets no connections", error)
            return
        self._registry.log.info(
            "%s: the program listens there without Python's socket module; the workers share its socket",
            label,
        )

    def _on_lock(self, bind: PendingBind) -> None:
        """A port is bound and not listened on: a lock, if it was bound without ``SO_REUSEADDR``."""
        if not bind.reuse:
            self._registry.log.info(
                "%s is bound by this worker, which does not listen there: other workers cannot bind it "
                "(pid:%s)",
                format_tcp(bind.host, bind.port),
                self._pid,
            )

    def _take_primary(self, bind: PendingBind) -> tuple[ThirdPartyServer, _socket.socket]:
        """An unmodified server becomes the primary: the server and a copy of the primary socket."""
        registry, known = self._registry, self._primary_name
        current = registry.primary
        same_port = known is not None and known[1] == bind.port and known[0] != bind.host
        if isinstance(current, ThirdPartyServer) and same_port:
            # one server that listens on both address families, as asyncio does without a host
            return current, registry.worker.dup_primary_socket()
        label = format_tcp(bind.host, bind.port)
        name = registry.worker.primary_name()
        server = ThirdPartyServer(label, f"unix:{name}" if isinstance(name, str) else name[:2], "")
        server.slot = PRIMARY_SLOT
        registry.set_primary(server, label)
        try:
            source = registry.worker.dup_primary_socket()
        except OSError:
            registry.on_third_party_closed(server)
            raise
        self._primary_name = bind.name
        inet_facade.enable(self.leased.connections.peer)
        return server, source

    def _request_port(
        self, sock: _socket.socket, bind: PendingBind, backlog: int, opened: bool
    ) -> tuple[ThirdPartyServer, _socket.socket]:
        """An unmodified server gets a port: the server and the master's socket, or an unreachable one.

        :param opened: whether ``sock`` listens already; then the master shares it.
        """
        registry, label = self._registry, format_tcp(bind.host, bind.port)
        check_program_allocation(bind.port)
        placement = settings.placement(bind.port, "shared")
        assert registry.broker is not None
        v6only = sock.family == socket.AF_INET6 and bool(
            sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        )
        own = [] if opened else self.binds.of_port(bind.port)
        for other in own:
            set_reuse(other, True)
        try:
            lease = registry.broker.open_port(
                Tcp(bind.host, bind.port),
                label,
                placement,
                min(max(0, backlog), 65535),
                v6only,
                counts=False,
                again=shares_port(sock),
                opened=sock.fileno() if opened else None,
            )
        except errors.BrokerUnavailable as error:
            registry.log.error("%s", error)
            inet_facade.enable(self.leased.connections.peer)
            return ThirdPartyServer(label, (bind.host, bind.port), "", LOST), unreachable_listener()
        finally:
            for other in own:
                set_reuse(other, other.reuse)
        grant = lease.take_initial_grant()
        try:
            source = _socket.socket(fileno=grant.fd) if grant is not None else unreachable_listener()
        except OSError:
            registry.broker.release_port(lease.key, lease.number)
            raise
        if grant is None:
            # until the grant comes, an AF_UNIX socket is under the program's object
            inet_facade.enable(self.leased.connections.peer)
        if lease.key and registry.has_port(lease.key) and not shares_port(sock):
            source.close()
            registry.broker.discard(lease)
            raise listen_errors.duplicate_listen(lease.key)
        address = ListenAddress(None, lease.sockname).address
        state = LISTENING if lease.key else LOST if lease.is_late else WAITING
        server = ThirdPartyServer(label, address, lease.key, state, placement)
        server.lease = lease
        if grant is not None:
            describe(server, grant)
        return server, source

    def on_close(self, fd: int) -> None:
        """A socket object is about to close its descriptor."""
        self.binds.on_close(fd)
        self.leased.on_close(fd)

    def sockname(self, sock: _socket.socket, real: Any) -> Any:
        """What ``getsockname()`` returns; ``real`` is what the kernel says."""
        if not isinstance(real, tuple) and sock.family in inet_facade.INET:
            if (entry := self.leased.find(_socket.socket.fileno(sock))) is not None and entry.server.lease:
                return entry.name
            if (name := self.leased.connections.local_address(_socket.socket.fileno(sock))) is not None:
                return name
            return self._primary_name or inet_facade.PEER[sock.family]
        return real

    # --- what the worker calls -------------------------------------------------------------------

    def reap_closed_fds(self) -> None:
        """Notice what the program does without its socket objects; called once a second."""
        self.binds.check()
        self.leased.reap()
        self._unmanaged.check(lambda: self.leased.inodes() | self.binds.inodes())

    def server_threads(self) -> set[threading.Thread]:
        """The threads in which unmodified servers accepted until the drain began."""
        return {thread for thread in threading.enumerate() if thread.ident in self.leased.server_threads}

    def stop_accepting(self) -> None:
        """The worker drains: unmodified servers accept nothing more, and each response is their last."""
        self.leased.stop_accepting()
        third_party_drain.force_connection_close()

    def idle(self) -> bool:
        """Whether no connection is open that an unmodified server has accepted."""
        return self.leased.connections.drained()

    def shutdown_idle_connections(self) -> None:
        """End the connections on which an unmodified server waits for a request."""
        self.leased.connections.explain_half_closed()  # before the worker itself shuts down some of them
        self._idle_connections.shutdown()
