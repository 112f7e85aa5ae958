"""Options of listening sockets: what a program sets on its own socket holds for the master's, too.

Process: a worker.
Never: let a listening socket block, because the siblings share its open file description.
"""

from __future__ import annotations

import _socket
import os
import socket
import struct
from contextlib import suppress

from gunicorn_passenger.interposition import inet_facade
from gunicorn_passenger.interposition.own_fds import room

#: Options that a program sets on a listening socket for the connections accepted from it, with their size.
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
FOREVER = 2_000_000.0

#: level, option, value
Option = tuple[int, int, bytes]


def is_tcp(sock: _socket.socket) -> bool:
    return (
        sock.family in inet_facade.INET
        and (sock.type & 0xF) == socket.SOCK_STREAM
        and sock.proto in (0, socket.IPPROTO_TCP)
    )


def shares_port(sock: _socket.socket) -> bool:
    """Whether the program may bind several sockets to the port (``SO_REUSEPORT``)."""
    return bool(_socket.socket.getsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEPORT))


def changed_options(sock: _socket.socket) -> list[Option]:
    """The options of a socket that differ from those of a new one."""
    with room():
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


def set_options(sock: _socket.socket, options: list[Option]) -> None:
    """Set options that :func:`changed_options` has found; one that the system refuses is left out."""
    for level, option, value in options:
        is_buffer = level == socket.SOL_SOCKET and option in (socket.SO_RCVBUF, socket.SO_SNDBUF)
        with suppress(OSError):
            # the kernel doubles the size of a buffer (socket(7)): the program had set half of what is read
            wanted = struct.pack("i", struct.unpack("i", value)[0] // 2) if is_buffer else value
            _socket.socket.setsockopt(sock, level, option, wanted)


def keep_nonblocking(sock: _socket.socket) -> None:
    """Have a socket object that blocks wait by polling, so that the shared description need not block."""
    os.set_blocking(_socket.socket.fileno(sock), False)
    if isinstance(sock, inet_facade.NATIVE) and _socket.socket.gettimeout(sock) is None:
        _socket.socket.settimeout(sock, FOREVER)


def unreachable_listener(backlog: int = 1) -> _socket.socket:
    """A listening socket that no client can find: an abstract UNIX socket with a name of the kernel's.

    :raises OSError: when the system cannot make one.
    """
    with room():
        sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind("")
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
