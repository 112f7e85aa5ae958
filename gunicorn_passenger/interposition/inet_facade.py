"""Makes a UNIX socket look like the TCP socket that the program opened.

Process: a worker.
Never: change what a real TCP socket returns.

A captured primary is an AF_UNIX socket under an object that says AF_INET. So is a listener that waits for its
grant, and a connection to the worker's own server while it boots. For such an object each client has
the address 127.0.0.1 and a port of its own, since programs tell clients apart by their address. TCP options
have no effect.
"""

from __future__ import annotations

import _socket
import socket
from collections.abc import Callable
from typing import Any

from gunicorn_passenger.config.address import SockAddr
from gunicorn_passenger.system.import_watch import imported
from gunicorn_passenger.system.unpatched import unpatched

INET = (socket.AF_INET, socket.AF_INET6)

#: The address of a peer of which nothing is known.
PEER: dict[int, Any] = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0, 0, 0)}

NATIVE: Any = unpatched("socket", "socket")

_TCP_LEVELS = (socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6)

_enabled: list[bool] = []


def socket_classes() -> list[Any]:
    """The classes that all Python sockets derive their system calls from: the standard library's, and
    gevent's inner one where gevent is imported."""
    gevents = imported("gevent._socket3")
    return [NATIVE] if gevents is None else [NATIVE, gevents._wrefsocket]


def enable(peer: Callable[[int], SockAddr | None]) -> None:
    """Emulate TCP from now on; called for the first server that has a UNIX socket.

    :param peer: finds the address that the peer of a descriptor was given.
    """
    if _enabled:
        return
    _enabled.append(True)
    for cls in socket_classes():
        _emulate_tcp(cls, peer)


def _emulate_tcp(cls: Any, find_peer: Callable[[int], SockAddr | None]) -> None:
    def getpeername(self: Any) -> Any:
        peer = _socket.socket.getpeername(self)
        if not isinstance(peer, tuple) and self.family in INET:
            return find_peer(_socket.socket.fileno(self)) or PEER[self.family]
        return peer

    def setsockopt(self: Any, *args: Any) -> None:
        try:
            _socket.socket.setsockopt(self, *args)
        except OSError:
            if not _is_unix_under_inet(self, args[0]):
                raise

    def getsockopt(self: Any, *args: Any) -> Any:
        try:
            return _socket.socket.getsockopt(self, *args)
        except OSError:
            if not _is_unix_under_inet(self, args[0]):
                raise
            return b"\0" * args[2] if len(args) > 2 else 0

    for function in (getpeername, setsockopt, getsockopt):
        function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
        setattr(cls, function.__name__, function)


def _is_unix_under_inet(sock: Any, level: int) -> bool:
    return (
        level in _TCP_LEVELS
        and sock.family in INET
        and _socket.socket.getsockopt(sock, socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_UNIX
    )
