"""``bind`` and ``listen`` replaced, so that unmodified servers get the master's sockets.

Process: a worker, from just after the fork.
Never: touches a socket that does not bind a TCP port to listen: client sockets, UDP, port 0, UNIX sockets.

Facts and rules:

- A bind to a TCP port is noted and not done; see :mod:`.deferred_bind`.
- ``listen`` puts the master's socket under the program's own descriptor (``dup2``), so the program keeps its
  socket object; see :mod:`.leased_sockets`. The options that the program has set are set on the master's
  socket.
- The two classes get the replacements from which all Python sockets derive their system calls: the standard
  library's ``socket.socket`` and gevent's inner socket. So they also hold for names that were imported
  before.
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
import socketserver
from typing import Any

from gevent import _socket3

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import SockAddr, Tcp, format_sockname, format_tcp
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.interposition import inet_facade, third_party_drain
from gunicorn_passenger.interposition.deferred_bind import (
    DeferredBind,
    DeferredBinds,
    already_bound,
    deferred,
    is_port,
)
from gunicorn_passenger.interposition.leased_sockets import LeasedSockets, describe
from gunicorn_passenger.interposition.own_fds import fds_of, inode_of
from gunicorn_passenger.interposition.socket_options import (
    FOREVER,
    changed_options,
    is_tcp,
    keep_nonblocking,
    set_options,
    shares_port,
    unreachable_listener,
)
from gunicorn_passenger.ipc.scoreboard import PRIMARY_SLOT, Scoreboard
from gunicorn_passenger.serving import program_metrics
from gunicorn_passenger.serving.registry import ServerRegistry, check_program_allocation
from gunicorn_passenger.serving.server import LISTENING, LOST, WAITING, ListenAddress
from gunicorn_passenger.serving.third_party import ThirdPartyServer
from gunicorn_passenger.system import listening_sockets


class SocketPatch:
    """Decides what the replaced calls do."""

    def __init__(self, registry: ServerRegistry) -> None:
        self._registry = registry
        self._pid = os.getpid()
        self.binds = DeferredBinds()
        self.leased = LeasedSockets(registry)
        #: the address to which the program has bound the captured primary
        self._primary_name: SockAddr | None = None

    # --- the calls -------------------------------------------------------------------------------

    def bind(self, sock: _socket.socket, address: Any) -> bool:
        """Note a bind.

        :returns: false when the bind is not to a TCP port to listen on, and must be done.
        """
        if os.getpid() != self._pid or not is_tcp(sock) or not is_port(address):
            return False
        fd = _socket.socket.fileno(sock)
        if fd < 0 or self.leased.find(fd) is not None:
            return False
        if self.binds.find(fd) is not None:
            raise already_bound()
        bind = deferred(sock, address)
        if bind is None:
            return False  # let the kernel refuse the second bind
        if not shares_port(sock) and any(e.name[:2] == bind.name[:2] for e in self.leased.open_entries()):
            raise listen_errors.duplicate_listen(format_tcp(bind.host, bind.port))
        self.binds.add(fd, bind)
        return True

    def listen(self, sock: _socket.socket, backlog: int) -> bool:
        """Put the master's socket under a descriptor that was bound.

        :returns: false when no bind was noted for the socket, and the call must be done.
        """
        fd = _socket.socket.fileno(sock)
        if self.leased.find(fd) is not None:
            return True  # a second listen() would only change the queue that the siblings share
        bind = self.binds.find(fd)
        if bind is None:
            return False
        try:
            if settings.auto_install(self._registry.script):
                server, source = self._take_primary(bind)
            else:
                server, source = self._request_port(sock, bind, backlog)
        except errors.PassengerError as error:
            self._registry.last_error = error
            raise
        options = changed_options(sock)
        inode = inode_of(fd)
        try:
            for copy in fds_of(inode):  # dup() had made them one socket, and they stay one
                os.dup2(source.fileno(), copy, inheritable=os.get_inheritable(copy))
        finally:
            source.close()
        self.binds.remove(inode)
        self.leased.add(fd, server, bind.name, options)
        set_options(sock, options)
        keep_nonblocking(sock)
        self._registry.on_third_party_listen(server)
        self._warn_of_separate_metrics(server)
        return True

    def _warn_of_separate_metrics(self, server: ThirdPartyServer) -> None:
        several = (
            server.lease is not None
            and server.placement == "shared"
            and self._registry.worker.cfg.workers > 1
        )
        if several and not os.environ.get(program_metrics.VARIABLE) and program_metrics.exporter_calls():
            self._registry.log.warning(
                "%s shows the metrics of whichever worker responds, which are different at each request: set "
                "PASSENGER_PROMETHEUS=1, or configure(prometheus=True) in gunicorn.conf.py, to show the sums "
                "over all workers",
                server.name,
            )

    def _take_primary(self, bind: DeferredBind) -> tuple[ThirdPartyServer, _socket.socket]:
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
        source = registry.worker.dup_primary_socket()
        self._primary_name = bind.name
        inet_facade.enable()
        return server, source

    def _request_port(
        self, sock: _socket.socket, bind: DeferredBind, backlog: int
    ) -> tuple[ThirdPartyServer, _socket.socket]:
        """An unmodified server gets a port: the server and the master's socket, or an unreachable one."""
        registry, label = self._registry, format_tcp(bind.host, bind.port)
        check_program_allocation(bind.port)
        placement = settings.placement(bind.port, "shared")
        assert registry.broker is not None
        v6only = sock.family == socket.AF_INET6 and bool(
            sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        )
        try:
            lease = registry.broker.open_port(
                Tcp(bind.host, bind.port),
                label,
                placement,
                min(max(0, backlog), 65535),
                v6only,
                counts=False,
                again=shares_port(sock),
            )
        except errors.BrokerUnavailable as error:
            registry.log.error("%s", error)
            inet_facade.enable()
            return ThirdPartyServer(label, (bind.host, bind.port), "", LOST), unreachable_listener()
        grant = lease.take_initial_grant()
        source = _socket.socket(fileno=grant.fd) if grant is not None else unreachable_listener()
        if grant is None:
            inet_facade.enable()  # until the grant comes, an AF_UNIX socket is under the program's object
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
        bind = self.binds.find(_socket.socket.fileno(sock))
        if bind is not None:
            return bind.name
        if not isinstance(real, tuple) and sock.family in inet_facade.INET:
            if (entry := self.leased.find(_socket.socket.fileno(sock))) is not None and entry.server.lease:
                return entry.name
            return self._primary_name or inet_facade.PEER[sock.family]
        return real

    # --- what the worker calls -------------------------------------------------------------------

    def reap_closed_fds(self) -> None:
        """Notice descriptors that were closed without their socket object; called once a second."""
        self.binds.reap()
        self.leased.reap()

    def write_counts(self, scoreboard: Scoreboard) -> None:
        """Bring the worker's page of the scoreboard up to date."""
        self.leased.write_counts(scoreboard)

    def stop_accepting(self) -> None:
        """The worker drains: unmodified servers accept nothing more, and each response is their last."""
        self.leased.stop_accepting()
        third_party_drain.force_connection_close()

    def idle(self) -> bool:
        """Whether no connection is open that an unmodified server has accepted."""
        return self.leased.idle()

    def shutdown_idle_connections(self) -> None:
        """End the connections on which an unmodified server waits for a request."""
        third_party_drain.shutdown_idle_connections()


# --- the replaced methods -------------------------------------------------------------------------

_installed: list[SocketPatch] = []


def install(registry: ServerRegistry) -> SocketPatch:
    """Replace the calls in this process."""
    patch = SocketPatch(registry)
    if not _installed:
        _installed.append(patch)
        for cls in inet_facade.CLASSES:
            _replace_calls(cls)
        _notice_deferred_closes()
        _never_wait_after_a_selector()
    _installed[:] = [patch]
    return patch


def _notice_deferred_closes() -> None:
    """gevent may close a descriptor in its next loop iteration; for the program the socket is closed now."""
    close_later = _socket3.socket._drop_events_and_close

    def _drop_events_and_close(self: Any, closefd: bool = True, *args: Any) -> None:
        if closefd:
            _installed[0].leased.on_deferred_close(_socket.socket.fileno(self._sock))
        close_later(self, closefd, *args)

    _socket3.socket._drop_events_and_close = _drop_events_and_close


def _never_wait_after_a_selector() -> None:
    """Let socketserver's ``accept`` fail where a sibling was faster; socketserver ignores that OSError.

    It accepts when its selector reports a connection. If it waited for the next one, it could not be shut
    down.
    """
    accept = socketserver.TCPServer.get_request

    def get_request(self: Any) -> Any:
        if not _installed[0].leased.has(self.socket.fileno()):
            return accept(self)
        before = self.socket.gettimeout()
        self.socket.settimeout(0.0)
        try:
            return accept(self)
        finally:
            self.socket.settimeout(before)

    socketserver.TCPServer.get_request = get_request  # type: ignore[method-assign]


def _replace_calls(cls: Any) -> None:
    def bind(self: Any, address: Any) -> None:
        if not _installed[0].bind(self, address):
            _socket.socket.bind(self, address)

    def listen(self: Any, *args: int) -> None:
        if not _installed[0].listen(self, args[0] if args else 128):
            _socket.socket.listen(self, *args)

    def connect(self: Any, address: Any) -> None:
        _installed[0].binds.perform(self)
        _socket.socket.connect(self, address)

    def connect_ex(self: Any, address: Any) -> int:
        try:
            _installed[0].binds.perform(self)
        except OSError as error:
            return error.errno or errno.EADDRINUSE
        return _socket.socket.connect_ex(self, address)

    def _accept(self: Any) -> tuple[int, Any]:
        while True:
            try:
                fd, peer = _socket.socket._accept(self)  # type: ignore[attr-defined]
                break
            except BlockingIOError:
                # a blocking copy that was made after listen(), and that does not poll yet
                if _socket.socket.gettimeout(self) is not None or not _installed[0].leased.has(self.fileno()):
                    raise
                keep_nonblocking(self)
        _installed[0].leased.on_accept(_socket.socket.fileno(self), fd)
        if not isinstance(peer, tuple) and self.family in inet_facade.INET:
            peer = inet_facade.PEER[self.family]
        return fd, peer

    def getsockname(self: Any) -> Any:
        return _installed[0].sockname(self, _socket.socket.getsockname(self))

    def settimeout(self: Any, value: Any) -> None:
        if value is None and _installed[0].leased.has(_socket.socket.fileno(self)):
            value = FOREVER  # the description that the siblings share must never block
        _socket.socket.settimeout(self, value)

    def setblocking(self: Any, flag: bool) -> None:
        settimeout(self, None if flag else 0.0)

    # gevent's inner socket is closed by close(), the standard library's by _real_close()
    if cls is inet_facade.NATIVE:
        real_close = cls._real_close

        def _real_close(self: Any, *args: Any, **kwargs: Any) -> None:
            _installed[0].on_close(_socket.socket.fileno(self))
            real_close(self, *args, **kwargs)

        cls._real_close = _real_close
        cls.settimeout = settimeout
        cls.setblocking = setblocking
    else:

        def close(self: Any) -> None:
            _installed[0].on_close(_socket.socket.fileno(self))
            _socket.socket.close(self)

        cls.close = close
    for function in (bind, listen, connect, connect_ex, getsockname, _accept):
        function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
        setattr(cls, function.__name__, function)


def unmanaged_listeners(inherited: set[int]) -> list[str]:
    """Addresses that this process listens on without the master: opened without Python's socket module.

    :param inherited: inodes of sockets that the master had open at the fork.
    """
    known = inherited.union(*(patch.leased.inodes() for patch in _installed))
    listeners = listening_sockets.own_listeners().items()
    return [format_sockname(name) for inode, name in listeners if inode not in known]
