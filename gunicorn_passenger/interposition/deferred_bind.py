"""Binds that are noted and not done until the program listens or connects.

Process: a worker.
Never: notes a bind that is not to a TCP port other than 0.

``bind`` cannot know whether ``listen`` or ``connect`` follows. So a bind to a TCP port is noted: ``listen``
then takes the master's socket, ``connect`` first does the real bind. In between ``getsockname`` returns the
noted address, as it would for a bound socket.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
from dataclasses import dataclass
from typing import Any

from gunicorn_passenger.config.address import SockAddr, resolve
from gunicorn_passenger.interposition.own_fds import fds_of, inode_of


@dataclass
class DeferredBind:
    """A bind that the program has asked for, and that is not done yet."""

    host: str
    port: int
    #: what ``getsockname()`` returns
    name: SockAddr
    #: the argument of ``bind()``
    address: Any


class DeferredBinds:
    """The noted binds by the inode of their socket: a copy (``dup``) of the socket is bound, too."""

    def __init__(self) -> None:
        self._by_inode: dict[int, DeferredBind] = {}

    def find(self, fd: int) -> DeferredBind | None:
        return self._by_inode.get(inode_of(fd)) if self._by_inode else None

    def add(self, fd: int, bind: DeferredBind) -> None:
        self._by_inode[inode_of(fd)] = bind

    def remove(self, inode: int) -> None:
        del self._by_inode[inode]

    def perform(self, sock: _socket.socket) -> None:
        """The socket connects after all: do the bind that was noted for it."""
        if self._by_inode:
            bind = self._by_inode.pop(inode_of(_socket.socket.fileno(sock)), None)
            if bind is not None:
                _socket.socket.bind(sock, bind.address)

    def on_close(self, fd: int) -> None:
        """A descriptor is about to close; the last one of a socket takes the bind with it."""
        if self._by_inode and (inode := inode_of(fd)) in self._by_inode and fds_of(inode) == [fd]:
            del self._by_inode[inode]

    def reap(self) -> None:
        """Forget the binds of sockets that were closed without their socket object (``os.close``)."""
        for inode in list(self._by_inode):
            if not fds_of(inode):
                del self._by_inode[inode]


def is_port(address: Any) -> bool:
    """Whether the argument of ``bind()`` names a TCP port other than 0."""
    return (
        isinstance(address, tuple)
        and len(address) >= 2
        and isinstance(address[0], str | bytes | bytearray)
        and isinstance(address[1], int)
        and 1 <= address[1] <= 65535
    )


def deferred(sock: _socket.socket, address: Any) -> DeferredBind | None:
    """The bind to note for a TCP socket; ``None`` when the kernel has bound the socket already.

    :raises OSError: when the host cannot be resolved.
    """
    if _socket.socket.getsockname(sock)[1] != 0:
        return None
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
    return DeferredBind(numeric, port, name, address)


def already_bound() -> OSError:
    """The error of the kernel for a second bind."""
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL))
