"""The TCP face of a captured primary.

Runs in: a worker. Must never: change what a real TCP socket answers.

A captured primary is an AF_UNIX socket under an object that says AF_INET. Whatever object says one and
is the other gets a TCP face: its peer is ('127.0.0.1', 0), as for Passenger's Node programs, and TCP
options have no effect.
"""

from __future__ import annotations

import _socket
import socket
from typing import Any

from gevent import _socket3, monkey

INET = (socket.AF_INET, socket.AF_INET6)

#: What a captured server's client looks like.
PEER: dict[int, Any] = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0, 0, 0)}

NATIVE: Any = monkey.get_original("socket", "socket")

#: The two classes that all Python sockets derive their system calls from.
CLASSES = (NATIVE, _socket3._wrefsocket)

_TCP_LEVELS = (socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6)

_faced: list[bool] = []


def enable() -> None:
    """Give such sockets their face; from the first captured server on."""
    if _faced:
        return
    _faced.append(True)
    for cls in CLASSES:
        _put_face_on(cls)


def _put_face_on(cls: Any) -> None:
    def getpeername(self: Any) -> Any:
        peer = _socket.socket.getpeername(self)
        if not isinstance(peer, tuple) and self.family in INET:
            return PEER[self.family]
        return peer

    def setsockopt(self: Any, *args: Any) -> None:
        try:
            _socket.socket.setsockopt(self, *args)
        except OSError:
            if not _is_disguised(self, args[0]):
                raise

    def getsockopt(self: Any, *args: Any) -> Any:
        try:
            return _socket.socket.getsockopt(self, *args)
        except OSError:
            if not _is_disguised(self, args[0]):
                raise
            return b"\0" * args[2] if len(args) > 2 else 0

    for function in (getpeername, setsockopt, getsockopt):
        function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
        setattr(cls, function.__name__, function)


def _is_disguised(sock: Any, level: int) -> bool:
    return (
        level in _TCP_LEVELS
        and sock.family in INET
        and _socket.socket.getsockopt(sock, socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_UNIX
    )
