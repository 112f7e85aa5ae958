"""``bind`` and ``listen`` replaced, so that unmodified servers get the master's sockets.

Runs in: a worker, from just after the fork. Must never: touch a socket that does not bind a TCP
port to listen: one that connects, UDP, port 0, UNIX sockets.

Facts and rules:

- ``bind`` cannot know whether ``listen`` or ``connect`` follows. So a bind to a TCP port is noted
  and not done; ``listen`` then takes the master's socket, ``connect`` first does the real bind.
  In between ``getsockname`` answers what was asked for, as it would for a bound socket.
- ``listen`` puts the master's socket under the program's own descriptor (``dup2``), so the program
  keeps its socket object. Options that the program had set are set on the master's socket.
- The replacement is made on the two classes that all Python sockets derive their system calls from:
  the standard library's ``socket.socket`` and gevent's inner socket. Names imported before are
  reached too.
- The open file description is shared with the siblings, so its ``O_NONBLOCK`` is too. The master
  sets it; a standard library socket that is set to block keeps it, and waits with a timeout that
  never ends, which Python does by polling.
- A captured primary is an AF_UNIX socket under an object that says AF_INET; see :mod:`.inet_facade`.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import socketserver
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gevent import _socket3

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import SockAddr, Tcp, format_sockname, format_tcp, resolve
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.interposition import inet_facade
from gunicorn_passenger.ipc.scoreboard import PRIMARY_SLOT, Counters, Scoreboard
from gunicorn_passenger.serving.broker_client import AcceptGrant
from gunicorn_passenger.serving.registry import ServerRegistry, ThirdPartyServer
from gunicorn_passenger.serving.server import CLOSED, LISTENING, LOST, STOPPED, WAITING, ListenAddress
from gunicorn_passenger.system import listening_sockets

#: Options that a program sets on a listening socket for the connections accepted from it.
_OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 4),
    (socket.SOL_SOCKET, socket.SO_LINGER, 8),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, 4),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, 4),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 4),
    (socket.IPPROTO_IP, socket.IP_TOS, 4),
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 4),
]

#: Seconds; poll(2) takes its timeout in milliseconds as an int.
_FOR_EVER = 2_000_000.0


@dataclass
class DeferredBind:
    """A bind that is noted: not done until it is known what for."""

    host: str
    port: int
    name: SockAddr
    address: Any


@dataclass
class LeasedFd:
    """A descriptor of this process under which the master's socket lies."""

    inode: int
    server: ThirdPartyServer
    name: SockAddr
    #: what the program has set on its own socket
    options: list[tuple[int, int, bytes]]


def _replace_under(fd: int, source: Any) -> None:
    """See :func:`~.fd_swap.swap_fd`, which needs what few workers have a use for."""
    from gunicorn_passenger.interposition import fd_swap

    fd_swap.swap_fd(fd, source)


class SocketPatch:
    """The state behind the replaced calls, by descriptor.

    A descriptor may be closed behind our back (``os.close``) and its number reused, so a leased one
    carries the inode of its socket and counts only while that is still the same.
    """

    def __init__(self, application: ServerRegistry) -> None:
        self.application = application
        self._pid = os.getpid()
        self._bound: dict[int, DeferredBind] = {}  # by inode: a copy (dup) of the socket is bound too
        self._leased: dict[int, LeasedFd] = {}
        #: connections accepted from leased descriptors: descriptor -> inode, and whose they are
        self._accepted: dict[int, tuple[int, ThirdPartyServer]] = {}
        #: connections of servers that have closed, by slot
        self._past: Counter[int] = Counter()
        #: what a captured primary was asked to be bound to
        self._primary_name: SockAddr | None = None

    # --- the calls -------------------------------------------------------------------------------

    def bind(self, sock: Any, address: Any) -> bool:
        """Note a bind; False when it is not ours and must be done."""
        if os.getpid() != self._pid or not _is_tcp(sock) or not _is_port(address):
            return False
        fd = _socket.socket.fileno(sock)
        if fd < 0 or self.leased(fd) is not None:
            return False
        if self.bound(fd) is not None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as the kernel says of a second bind
        if _socket.socket.getsockname(sock)[1] != 0:
            return False  # the kernel has bound it already; let it say so
        host, port = address[0], address[1]
        if isinstance(host, bytes | bytearray):
            host = bytes(host).decode("idna")
        if host in ("", "<broadcast>"):
            host = {"": ("0.0.0.0", "::")[sock.family == socket.AF_INET6]}.get(host, host)
        _, numeric = resolve(host, port, sock.family)
        name: SockAddr = (numeric, port)
        if sock.family == socket.AF_INET6:
            flow, scope = (*address[2:4], 0, 0)[:2]
            name = (numeric, port, flow, scope)
        for other in list(self._leased):
            entry = self.leased(other)
            if entry is None or entry.server.state == CLOSED or _shares_port(sock):
                continue
            if entry.name[:2] == name[:2]:
                raise listen_errors.duplicate_listen(format_tcp(numeric, port))
        self._bound[_inode(fd)] = DeferredBind(numeric, port, name, address)
        return True

    def bound(self, fd: int) -> DeferredBind | None:
        """The bind that was noted for a descriptor's socket."""
        return self._bound.get(_inode(fd)) if self._bound else None

    def leased(self, fd: int) -> LeasedFd | None:
        entry = self._leased.get(fd)
        if entry is not None and entry.inode != _inode(fd):
            self._end_lease(fd)
            return None
        return entry

    def perform_deferred_bind(self, sock: Any) -> None:
        """The socket connects after all: do the bind that was noted."""
        if self._bound:
            entry = self._bound.pop(_inode(_socket.socket.fileno(sock)), None)
            if entry is None:
                return
            _socket.socket.bind(sock, entry.address)

    def listen(self, sock: Any, backlog: int) -> bool:
        """Put the master's socket under a descriptor that was bound; False when it is none of ours."""
        fd = _socket.socket.fileno(sock)
        if self.leased(fd) is not None:
            return True  # a second listen() would only change the queue that the siblings share
        entry = self.bound(fd)
        if entry is None:
            return False
        try:
            server, source, name = self._take(sock, entry, backlog)
        except errors.PassengerError as error:
            self.application.refusal = error
            raise
        options = _changed_options(sock)
        bound = _inode(fd)
        try:
            for copy in _descriptors_of(bound):  # dup() had made them one socket, and they stay one
                os.dup2(source.fileno(), copy, inheritable=os.get_inheritable(copy))
        finally:
            source.close()
        del self._bound[bound]
        entry_of = self._leased[fd] = LeasedFd(_inode(fd), server, name, options)
        _set_options(sock, options)
        _keep_nonblocking(sock)
        self.application.on_third_party_listen(server)
        if server.lease is not None:
            server.lease.watch(lambda grant: self._granted(entry_of, grant), lambda: self._pause(entry_of))
        return True

    def _granted(self, entry: LeasedFd, grant: AcceptGrant) -> None:
        """The master lets this worker accept: put its socket where one is that nobody reaches."""
        source = _socket.socket(fileno=grant.fd)
        try:
            if entry.server.state == CLOSED or entry not in self._leased.values():
                self.application.on_third_party_closed(entry.server)
                return
            self._describe(entry.server, grant)
            self._swap(entry, source, LISTENING)
        finally:
            source.close()

    def _pause(self, entry: LeasedFd) -> None:
        """The master stops it, for good or for a moment."""
        if entry in self._leased.values():
            inert = _nowhere()
            try:
                self._swap(entry, inert, STOPPED)
            finally:
                inert.close()
        assert self.application.link is not None
        self.application.link.paused(entry.server.key)

    def _swap(self, entry: LeasedFd, source: Any, state: str) -> None:
        """Another socket under the descriptors of a server, which does not notice."""
        before = entry.inode
        for fd in _descriptors_of(before):
            _replace_under(fd, source)
        entry.inode = _inode(source.fileno())
        entry.server.state = state
        if state == LISTENING:
            copy = _socket.socket(fileno=os.dup(source.fileno()))
            try:
                _set_options(copy, entry.options)
                copy.setblocking(False)
            finally:
                copy.close()

    @staticmethod
    def _describe(server: ThirdPartyServer, grant: AcceptGrant) -> None:
        server.key, server.position, server.slot = grant.key, grant.position, grant.slot
        server.address = ListenAddress(None, grant.sockname).address

    def _take(self, sock: Any, entry: DeferredBind, backlog: int) -> tuple[ThirdPartyServer, Any, SockAddr]:
        """The socket for an unmodified server: the primary's, or one of the master's."""
        application = self.application
        label = format_tcp(entry.host, entry.port)
        if settings.auto_install(application.script):
            known = self._primary_name
            first = application.primary
            if (
                isinstance(first, ThirdPartyServer)
                and known
                and known[1] == entry.port
                and known[0] != entry.host
            ):
                # one server that listens on both families, as asyncio does without a host
                return first, application.worker.dup_primary_socket(), entry.name
            name = application.worker.primary_name()
            server = ThirdPartyServer(label, f"unix:{name}" if isinstance(name, str) else name[:2], "")
            server.slot = PRIMARY_SLOT
            application.install(server, label)
            source = application.worker.dup_primary_socket()
            self._primary_name = entry.name
            inet_facade.enable()
            return server, source, entry.name
        application.check_program_allocation(entry.port)
        placement = settings.placement(entry.port, "shared")
        assert application.link is not None
        want = Tcp(entry.host, entry.port)
        v6only = sock.family == socket.AF_INET6 and bool(
            sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        )
        try:
            lease = application.link.open(
                want,
                label,
                placement,
                min(max(0, backlog), 65535),
                v6only,
                counts=False,
                again=_shares_port(sock),
            )
        except errors.BrokerUnavailable as error:
            application.log.error("%s", error)
            inet_facade.enable()
            return ThirdPartyServer(label, (entry.host, entry.port), "", LOST), _nowhere(), entry.name
        grant = lease.first()
        source = _socket.socket(fileno=grant.fd) if grant is not None else _nowhere()
        if grant is None:
            inet_facade.enable()  # until its turn it has a socket that is none of TCP
        if lease.key and application.holds(lease.key) and not _shares_port(sock):
            source.close()
            application.link.forget(lease)
            raise listen_errors.duplicate_listen(lease.key)
        address = ListenAddress(None, lease.sockname).address
        server = ThirdPartyServer(label, address, lease.key, LISTENING if lease.key else WAITING, placement)
        server.lease = lease
        if grant is not None:
            self._describe(server, grant)
        return server, source, entry.name

    def closing(self, fd: int) -> None:
        """A socket object is about to close its descriptor."""
        if self._bound and (inode := _inode(fd)) in self._bound and _descriptors_of(inode) == [fd]:
            del self._bound[inode]
        if fd in self._leased:
            self._end_lease(fd)

    def on_deferred_close(self, fd: int) -> None:
        """For the program the socket is closed now; the port is given back when it really is."""
        entry = self._leased.get(fd)
        if entry is not None and not self._copies(fd, entry.inode):
            entry.server.state = CLOSED
            self.application.on_third_party_closing(entry.server)

    def _copies(self, fd: int, inode: int) -> list[int]:
        """Other descriptors of the program's that have the same socket (dup)."""
        workers = self.application.worker.primary_descriptors()
        return [other for other in _descriptors_of(inode) if other != fd and other not in workers]

    def _end_lease(self, fd: int) -> None:
        """Give the port back, unless another descriptor of this process still has the socket (dup)."""
        entry = self._leased.pop(fd)
        self._past[entry.server.slot] += entry.server.accepted
        entry.server.accepted = 0
        for other in self._copies(fd, entry.inode):
            self._leased[other] = entry
            return
        entry.server.state = CLOSED
        self.application.on_third_party_closed(entry.server)

    def sockname(self, sock: Any, real: Any) -> Any:
        """What ``getsockname()`` answers."""
        entry = self.bound(_socket.socket.fileno(sock)) if self._bound else None
        if entry is not None:
            return entry.name
        if not isinstance(real, tuple) and sock.family in inet_facade.INET:
            if (leased := self.leased(_socket.socket.fileno(sock))) is not None and leased.server.lease:
                return leased.name
            return self._primary_name or inet_facade.PEER[sock.family]
        return real

    def is_leased(self, fd: int) -> bool:
        """Whether a descriptor is the master's socket: the one that was put there, or a copy of it."""
        if not self._leased:
            return False
        if fd in self._leased:
            return True
        inode = _inode(fd)
        return any(entry.inode == inode for entry in self._leased.values())

    def sweep(self) -> None:
        """Notice descriptors that were closed behind our back; called once a second."""
        for fd in list(self._leased):
            self.leased(fd)
        for inode in list(self._bound):
            if not _descriptors_of(inode):
                del self._bound[inode]

    def accepted(self, listener: int, fd: int) -> None:
        """A connection was accepted; remembered when it came from one of the master's sockets."""
        if not self._leased:
            return
        entry = self._leased.get(listener)
        if entry is None:
            inode = _inode(listener)
            entry = next((e for e in self._leased.values() if e.inode == inode), None)
        if entry is not None:
            entry.server.accepted += 1
            self._accepted[fd] = _inode(fd), entry.server

    def write_counts(self, board: Scoreboard) -> None:
        """Bring the worker's board up to date; of a server that is not ours its connections are known."""
        self.idle()
        accepted = Counter(self._past)
        for server in {id(e.server): e.server for e in self._leased.values()}.values():
            accepted[server.slot] += server.accepted
        now = Counter(server.slot for _, server in self._accepted.values())
        for slot in accepted:
            board.write(slot, Counters(now[slot], accepted[slot]))

    def idle(self) -> bool:
        """Whether no connection is open that an unmodified server has accepted."""
        self._accepted = {fd: item for fd, item in self._accepted.items() if _inode(fd) == item[0]}
        return not self._accepted

    def stop_accepting(self) -> None:
        """A leaving worker: no unmodified server of it accepts any more; what it accepted goes on.

        Its listening descriptors get a socket that nobody can reach, since closing them would pull
        them from under servers that poll them.
        """
        self.sweep()
        entries = list(self._leased.values())
        self._leased.clear()
        for entry in entries:
            self._past[entry.server.slot] += entry.server.accepted
            entry.server.accepted = 0
            inert = _nowhere()
            try:
                for fd in _descriptors_of(entry.inode):
                    _replace_under(fd, inert)
            finally:
                inert.close()
            lease = entry.server.lease
            if lease is not None and entry.server.placement != "shared":
                # the next worker need not wait for the connections of this one
                assert self.application.link is not None
                self.application.link.close(lease.key, lease.number)


def _is_tcp(sock: Any) -> bool:
    return (
        sock.family in inet_facade.INET
        and (sock.type & 0xF) == socket.SOCK_STREAM
        and sock.proto in (0, socket.IPPROTO_TCP)
    )


def _shares_port(sock: Any) -> bool:
    """Whether the program has said that several of its sockets are to have the port (``SO_REUSEPORT``)."""
    return bool(_socket.socket.getsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEPORT))


def _is_port(address: Any) -> bool:
    return (
        isinstance(address, tuple)
        and len(address) >= 2
        and isinstance(address[0], str | bytes | bytearray)
        and isinstance(address[1], int)
        and 1 <= address[1] <= 65535
    )


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1


def _descriptors_of(inode: int) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        if _inode(int(name)) == inode:
            found.append(int(name))
    return found


def _changed_options(sock: Any) -> list[tuple[int, int, bytes]]:
    """The options of a socket that differ from those of a new one."""
    fresh = _socket.socket(sock.family, socket.SOCK_STREAM)
    changed = []
    try:
        for level, option, size in _OPTIONS:
            with suppress(OSError):
                value = _socket.socket.getsockopt(sock, level, option, size)
                if value != fresh.getsockopt(level, option, size):
                    changed.append((level, option, value))
    finally:
        fresh.close()
    return changed


def _set_options(sock: Any, options: list[tuple[int, int, bytes]]) -> None:
    for level, option, value in options:
        buffer = level == socket.SOL_SOCKET and option in (socket.SO_RCVBUF, socket.SO_SNDBUF)
        with suppress(OSError):
            # the kernel doubles a buffer's size when it is set (socket(7)): half of what was read was set
            wanted = struct.pack("i", struct.unpack("i", value)[0] // 2) if buffer else value
            _socket.socket.setsockopt(sock, level, option, wanted)


def _nowhere() -> Any:
    """A listening socket that nobody can find: an abstract UNIX socket with a name of the kernel's."""
    sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("")
    sock.listen(1)
    sock.setblocking(False)
    return sock


def _keep_nonblocking(sock: Any) -> None:
    """A socket of the standard library that blocks: wait by polling, the description is shared."""
    os.set_blocking(_socket.socket.fileno(sock), False)
    if isinstance(sock, inet_facade.NATIVE) and _socket.socket.gettimeout(sock) is None:
        _socket.socket.settimeout(sock, _FOR_EVER)


# --- the replaced methods -------------------------------------------------------------------------

_state: list[SocketPatch] = []


def install(application: ServerRegistry) -> SocketPatch:
    """Replace the calls in this process."""
    interposition = SocketPatch(application)
    if not _state:
        _state.append(interposition)
        for cls in inet_facade.CLASSES:
            _replace(cls)
        _notice_deferred_closes()
        _never_wait_after_a_selector()
    _state[:] = [interposition]
    return interposition


def _notice_deferred_closes() -> None:
    """gevent may close the descriptor only when its loop turns; for the program the socket is closed now."""
    close_later = _socket3.socket._drop_events_and_close

    def _drop_events_and_close(self: Any, closefd: bool = True, *args: Any) -> None:
        if closefd:
            _state[0].on_deferred_close(_socket.socket.fileno(self._sock))
        close_later(self, closefd, *args)

    _socket3.socket._drop_events_and_close = _drop_events_and_close


def _never_wait_after_a_selector() -> None:
    """socketserver accepts only after its selector has said so, and takes an OSError for a false alarm.

    Where a sibling was faster it must not wait for the next connection: it could not be shut down.
    """
    accept = socketserver.TCPServer.get_request

    def get_request(self: Any) -> Any:
        if not _state[0].is_leased(self.socket.fileno()):
            return accept(self)
        before = self.socket.gettimeout()
        self.socket.settimeout(0.0)
        try:
            return accept(self)
        finally:
            self.socket.settimeout(before)

    socketserver.TCPServer.get_request = get_request  # type: ignore[method-assign]


def _replace(cls: Any) -> None:
    def bind(self: Any, address: Any) -> None:
        if not _state[0].bind(self, address):
            _socket.socket.bind(self, address)

    def listen(self: Any, *args: int) -> None:
        if not _state[0].listen(self, args[0] if args else 128):
            _socket.socket.listen(self, *args)

    def connect(self: Any, address: Any) -> None:
        _state[0].perform_deferred_bind(self)
        _socket.socket.connect(self, address)

    def connect_ex(self: Any, address: Any) -> int:
        try:
            _state[0].perform_deferred_bind(self)
        except OSError as error:
            return error.errno or errno.EADDRINUSE
        return _socket.socket.connect_ex(self, address)

    def _accept(self: Any) -> tuple[int, Any]:
        while True:
            try:
                fd, peer = _socket.socket._accept(self)  # type: ignore[attr-defined]
                break
            except BlockingIOError:
                # a copy that blocks, made after listen(): it did not know that it has to poll
                if _socket.socket.gettimeout(self) is not None or not _state[0].is_leased(self.fileno()):
                    raise
                _keep_nonblocking(self)
        _state[0].accepted(_socket.socket.fileno(self), fd)
        if not isinstance(peer, tuple) and self.family in inet_facade.INET:
            peer = inet_facade.PEER[self.family]
        return fd, peer

    def getsockname(self: Any) -> Any:
        return _state[0].sockname(self, _socket.socket.getsockname(self))

    def settimeout(self: Any, value: Any) -> None:
        if value is None and _state[0].is_leased(_socket.socket.fileno(self)):
            value = _FOR_EVER  # the siblings must never see it block
        _socket.socket.settimeout(self, value)

    def setblocking(self: Any, flag: bool) -> None:
        settimeout(self, None if flag else 0.0)

    # gevent's inner socket is closed by close(), the standard library's by _real_close()
    if cls is inet_facade.NATIVE:
        real_close = cls._real_close

        def _real_close(self: Any, *args: Any, **kwargs: Any) -> None:
            _state[0].closing(_socket.socket.fileno(self))
            real_close(self, *args, **kwargs)

        cls._real_close = _real_close
        cls.settimeout = settimeout
        cls.setblocking = setblocking
    else:

        def close(self: Any) -> None:
            _state[0].closing(_socket.socket.fileno(self))
            _socket.socket.close(self)

        cls.close = close
    for function in (bind, listen, connect, connect_ex, getsockname, _accept):
        function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
        setattr(cls, function.__name__, function)


def unmanaged_listeners(inherited: set[int]) -> list[str]:
    """Addresses that this process listens on without having asked: opened by code outside Python's socket.

    :param inherited: inodes of sockets that the master had open at the fork.
    """
    known = {entry.inode for interposition in _state for entry in interposition._leased.values()}
    return [
        format_sockname(name)
        for inode, name in listening_sockets.own_listeners().items()
        if inode not in known | inherited
    ]


__all__ = ["SocketPatch", "install", "unmanaged_listeners"]
