"""Ports that the program has bound, and on which it does not listen yet.

Process: a worker; the master creates the locks.
Never: decide which process may bind a port; the kernel does.

``bind`` cannot know what follows: ``listen`` (a server, which gets the master's socket), ``connect`` (a
client with a local port), or nothing (a port that serves as a lock). So the kernel binds the socket at once,
and refuses the port to the siblings until the server listens. So a worker holds a lock between ``bind`` and
``listen``, and its siblings wait for it. A port that is bound for longer than :data:`GRACE`, and on which the
program has not called ``listen``, is a lock: the ``bind`` of the siblings fails, as the program wants.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from gunicorn_passenger.config.address import SockAddr, resolve
from gunicorn_passenger.interposition.own_fds import fds_of, inode_of
from gunicorn_passenger.serving.broker_client import RESPONSE_TIMEOUT
from gunicorn_passenger.system.listening_sockets import borrowed_socket

#: Seconds from ``bind`` to ``listen``.
GRACE = 1.0
#: Seconds for which a sibling waits at most: the master may be slow to respond to a ``listen``, and a worker
#: that is busy cannot say that its port is a lock.
_LONGEST_WAIT = GRACE + RESPONSE_TIMEOUT
#: Seconds between two checks of the lock of a sibling.
_RETRY_INTERVAL = 0.01

#: states of a TCP socket (enum in the kernel's tcp_states.h), as TCP_INFO says them
_CLOSE, _LISTEN = 7, 10

#: struct flock (fcntl(2))
_FLOCK = struct.Struct("hhqqi4x")
#: the byte of a port that serves as a lock, after the 65536 bytes of the ports that are about to listen
_AS_LOCK = 1 << 16


class BindLocks:
    """A lock for each port between the workers of one master: a byte of a file in memory (fcntl_locking(2)).

    The locks belong to the process, and the kernel releases them when it ends.
    """

    def __init__(self) -> None:
        self._fd = -1

    def create(self) -> None:
        """In the master: make the file, which the workers inherit. Without it they do not wait."""
        if self._fd < 0:
            with suppress(OSError):
                self._fd = os.memfd_create("gunicorn-passenger-binds")

    def acquire(self, port: int) -> bool:
        """Whether no other worker is about to listen on the port."""
        return self._fd < 0 or self._lock(port, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def mark_as_lock(self, port: int) -> None:
        """This worker uses the port as a lock; :meth:`owner` tells the siblings."""
        self._lock(_AS_LOCK + port, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock(port, fcntl.LOCK_UN)

    def release(self, port: int) -> None:
        self._lock(port, fcntl.LOCK_UN)
        self._lock(_AS_LOCK + port, fcntl.LOCK_UN)

    def owner(self, port: int) -> int:
        """The pid of the worker that has bound the port and does not listen; 0 for none."""
        for byte in (_AS_LOCK + port, port) if self._fd >= 0 else ():
            with suppress(OSError):
                request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
                kind, *_, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, request))
                if kind != fcntl.F_UNLCK:
                    return int(pid)
        return 0

    def _lock(self, byte: int, kind: int) -> bool:
        try:
            fcntl.lockf(self._fd, kind, 1, byte)
        except (OSError, ValueError):
            return False
        return True


#: made by the master, shared by its workers
bind_locks = BindLocks()


@dataclass
class PendingBind:
    """A bind after which the program has neither listened nor connected."""

    host: str
    port: int
    #: what the socket is bound to
    name: SockAddr
    #: a descriptor of the socket, and its inode
    fd: int
    inode: int
    #: whether the program has set SO_REUSEADDR
    reuse: bool
    #: monotonic seconds
    since: float
    #: whether it has been bound for so long that it serves as a lock
    is_lock: bool = False
    #: whether the program listens, and waits for the master's response
    listens: bool = False


class PendingBinds:
    """The pending binds by the inode of their socket: a copy (``dup``) of the socket is bound, too."""

    def __init__(
        self, on_listening: Callable[[PendingBind], object], on_lock: Callable[[PendingBind], object]
    ):
        """
        :param on_listening: called when something else than Python listens on such a socket.
        :param on_lock: called when a port turns out to be a lock.
        """
        self._by_inode: dict[int, PendingBind] = {}
        self._on_listening = on_listening
        self._on_lock = on_lock

    def find(self, fd: int) -> PendingBind | None:
        return self._by_inode.get(inode_of(fd)) if self._by_inode else None

    def inodes(self) -> set[int]:
        return set(self._by_inode)

    def of_port(self, port: int) -> list[PendingBind]:
        return [bind for bind in list(self._by_inode.values()) if bind.port == port]

    def wait_for_siblings(self, port: int, sleep: Callable[[float], object]) -> None:
        """Wait while a sibling is about to listen on the port."""
        deadline = monotonic() + _LONGEST_WAIT
        while not bind_locks.acquire(port) and monotonic() < deadline:
            sleep(_RETRY_INTERVAL)

    def release(self, port: int) -> None:
        """Let siblings bind the port, unless this worker has another bind of it."""
        if not self.of_port(port):
            bind_locks.release(port)

    def add(self, bind: PendingBind) -> None:
        self._by_inode[bind.inode] = bind

    def take(self, bind: PendingBind) -> None:
        """The caller decides what becomes of the socket, and then calls :meth:`release`."""
        self._by_inode.pop(bind.inode, None)

    def remove(self, bind: PendingBind) -> None:
        """The program listens or connects, or has closed the socket."""
        self.take(bind)
        self.release(bind.port)

    def on_connect(self, fd: int) -> None:
        if (bind := self.find(fd)) is not None:
            self.remove(bind)

    def on_close(self, fd: int) -> None:
        """A descriptor is about to close; the last one of a socket takes the bind with it."""
        if (bind := self.find(fd)) is not None and fds_of(bind.inode) == [fd]:
            self.remove(bind)

    def check(self) -> bool:
        """Look at what has become of the binds.

        :returns: whether some of them are so young that siblings wait.
        """
        for bind in list(self._by_inode.values()):
            if bind.inode not in self._by_inode:
                continue  # taken by another greenlet, while the master was asked for a port
            fds = [bind.fd] if inode_of(bind.fd) == bind.inode else fds_of(bind.inode)
            if not fds:
                self.remove(bind)  # closed without its socket object (``os.close``)
                continue
            bind.fd = fds[0]
            state = _tcp_state(bind)
            if state is None:
                continue  # the program's thread has just listened, or closed the socket
            if state == _LISTEN:
                self._on_listening(bind)
            elif state != _CLOSE:
                self.remove(bind)  # it connects, and not through Python
            elif not (bind.is_lock or bind.listens) and monotonic() - bind.since >= GRACE:
                bind.is_lock = True
                bind_locks.mark_as_lock(bind.port)
                if bind.inode not in self._by_inode:
                    self.release(bind.port)  # the program's thread has listened meanwhile
                    continue
                self._on_lock(bind)
        return any(not bind.is_lock for bind in list(self._by_inode.values()))


def _tcp_state(bind: PendingBind) -> int | None:
    """The state of the socket; ``None`` when another one lies under its descriptor now."""
    try:
        with borrowed_socket(bind.fd) as sock:
            state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return None
    return state if inode_of(bind.fd) == bind.inode else None


def is_port(address: Any) -> bool:
    """Whether the argument of ``bind()`` names a TCP port other than 0."""
    return (
        isinstance(address, tuple)
        and len(address) >= 2
        and isinstance(address[0], str | bytes | bytearray)
        and isinstance(address[1], int)
        and 1 <= address[1] <= 65535
    )


def pending_bind(sock: _socket.socket, address: Any) -> PendingBind:
    """The bind that a program asks for.

    :raises OSError: when the host cannot be resolved.
    """
    host, port = address[0], address[1]
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("idna")
    if host == "":
        host = ("0.0.0.0", "::")[sock.family == socket.AF_INET6]
    _, numeric = resolve(host, port, sock.family)
    name: SockAddr = (numeric, port)
    if sock.family == socket.AF_INET6:
        flow, scope = (*address[2:4], 0, 0)[:2]
        name = (numeric, port, flow, scope)
    fd = _socket.socket.fileno(sock)
    reuse = bool(_socket.socket.getsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEADDR))
    return PendingBind(numeric, port, name, fd, inode_of(fd), reuse, monotonic())


def set_reuse(bind: PendingBind, reuse: bool) -> None:
    """Set ``SO_REUSEADDR`` of a bound socket: with it, the master can listen beside it."""
    with borrowed_socket(bind.fd) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
