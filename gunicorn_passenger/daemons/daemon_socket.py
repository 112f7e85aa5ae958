"""A listening socket of a daemon.

Process: the master, and plain Python. Never: open a port that is not allocated.
"""

from __future__ import annotations

import _socket
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass

from gunicorn_passenger.config.address import format_tcp
from gunicorn_passenger.config.port_allocation import PortAllocation
from gunicorn_passenger.daemons.spec import DaemonListen
from gunicorn_passenger.system import listening_sockets
from gunicorn_passenger.system.port_opening import ListenRequest, open_listener


@dataclass
class DaemonSocket:
    """A listening socket of a daemon, which the master holds."""

    want: DaemonListen
    sock: _socket.socket
    #: the address that it is bound to
    host: str = ""
    port: int = 0
    path: str = ""
    #: device and inode of a UNIX socket's file, so that only our own is removed
    file: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else format_tcp(self.host, self.port)

    def close(self, unlink: bool) -> None:
        with suppress(OSError):
            self.sock.close()
        if unlink and self.file is not None:
            listening_sockets.remove(self.path, self.file)


def daemon_socket(want: DaemonListen, sock: _socket.socket) -> DaemonSocket:
    """:param sock: a socket that listens."""
    name = sock.getsockname()
    if isinstance(name, tuple):
        return DaemonSocket(want, sock, host=name[0], port=name[1])
    return DaemonSocket(want, sock, path=name, file=listening_sockets.inode_id(name))


def open_daemon_socket(
    want: DaemonListen,
    within: str,
    allocation: PortAllocation,
    backlog: int,
    mode: int,
    in_use: Set[int] = frozenset(),
    before: int = 0,
) -> DaemonSocket:
    """Open a socket for a daemon, by the same rules as one for a server.

    :param within: the ports that the program limits itself to; empty for all allocated ports.
    :param mode: of a UNIX socket's file.
    :param in_use: ports that this application holds.
    :param before: the port that an "auto" had last, which it gets again if possible.
    :raises errors.ListenError: when it is not allowed, or cannot be opened.
    """
    request = ListenRequest(want.kind, want.host, want.port, want.path, backlog, False, mode, within)
    return daemon_socket(want, open_listener(request, allocation, in_use, preferred=before))
