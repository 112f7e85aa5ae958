"""Connections of a worker to its own unmodified servers.

Process: a worker.
Never: change where a connection goes, once the worker serves and its servers have started. The captured
primary is the exception: it has no TCP address.

Programs connect to their own port: before they listen, to see that it is free, and afterwards, to see that
their server works. The port is shared, so a sibling would accept such a connection. While a worker boots, and
for :data:`STARTING` after a server listens, its connections see what they would see if it were alone:

- the worker's own server accepts (:meth:`.leased_sockets.LeasedSockets.open_private`);
- a port that only siblings serve refuses the connection.

A connection to the address that the script has named for the captured primary always reaches that server.
"""

from __future__ import annotations

import _socket
import errno
import ipaddress
import math
import os
import socket
import struct
from contextlib import suppress
from time import monotonic
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.interposition import inet_facade
from gunicorn_passenger.interposition.fd_swap import swap_fds
from gunicorn_passenger.interposition.leased_sockets import LeasedFd, LeasedSockets
from gunicorn_passenger.interposition.own_fds import room
from gunicorn_passenger.interposition.socket_options import is_tcp
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.serving.server import LISTENING, WAITING

#: Seconds in which a program checks whether its server works.
STARTING = 5.0


class SelfConnections:
    """Decides where a connection of this worker goes."""

    def __init__(self, registry: ServerRegistry, leased: LeasedSockets) -> None:
        self._registry = registry
        self._leased = leased

    def connect(self, sock: _socket.socket, address: Any) -> bool:
        """Connect to a server of this worker.

        :returns: false when the call must be done as it is.
        :raises ConnectionRefusedError: when only siblings serve the address.
        """
        booting = not self._registry.started
        if not (booting or self._leased.recent(STARTING) or self._leased.captured) or not is_tcp(sock):
            return False
        host = _numeric(address)
        if host is None:
            return False
        entry = next((e for e in self._leased.open_entries() if _matches(e.name, host, address[1])), None)
        if entry is None:
            if booting and self._served_by_siblings(host, address[1]):
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return False
        if entry.server.state not in (LISTENING, WAITING):
            return False
        if booting or monotonic() - entry.since < STARTING:
            return self._replace(sock, entry, self._leased.open_private(entry))
        if entry.server.lease is not None:
            return False
        name = self._registry.worker.primary_name()
        if isinstance(name, tuple):
            _socket.socket.connect(sock, name)
            return True
        return self._replace(sock, entry, name)

    def _replace(self, sock: _socket.socket, entry: LeasedFd, name: str | bytes) -> bool:
        """Put a connection to a UNIX socket under the descriptor of a TCP socket."""
        inet_facade.enable(self._leased.connections.peer)
        with room():
            unix = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(unix, name, _socket.socket.gettimeout(sock))
            fd = _socket.socket.fileno(sock)
            unix.setblocking(os.get_blocking(fd))
            swap_fds([fd], unix)
            self._leased.connections.remember_peer(fd, entry.name)
        finally:
            unix.close()
        return True

    def _served_by_siblings(self, host: str, port: int) -> bool:
        """Whether the master has the port for the workers, and this worker has not asked for it."""
        binds = [name[1] for name in self._registry.worker.cfg.address if isinstance(name, tuple)]
        if port in binds or any(
            isinstance(server.address, tuple) and server.address[1] == port
            for server in self._registry.servers
        ):
            return False
        with suppress(errors.BrokerUnavailable):
            for server in self._registry.report()["servers"]:
                served, _, number = str(server["address"]).rpartition(":")
                if number == str(port) and _matches((served.strip("[]"), port), host, port):
                    return True
        return False


def _connect(unix: _socket.socket, name: str | bytes, timeout: float | None) -> None:
    """Connect, and wait for room in the server's queue as long as TCP would.

    Python's own timeout does not cover this wait: the kernel reports ``EAGAIN`` at once (connect(2)).

    :param timeout: seconds; 0 for a socket that does not block, ``None`` for one that waits forever.
    :raises BlockingIOError: when the queue is full and the socket does not block.
    """
    if timeout == 0:
        unix.setblocking(False)
        unix.connect(name)
        return
    unix.setblocking(True)
    unix.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout or 0.0))
    try:
        unix.connect(name)
    except BlockingIOError:
        raise TimeoutError("timed out") from None
    unix.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0.0))


def _timeval(seconds: float) -> bytes:
    """``struct timeval``; 0 means no timeout."""
    microseconds = math.ceil(seconds * 1e6)
    return struct.pack("@ll", *divmod(microseconds, 1_000_000))


def _numeric(address: Any) -> str | None:
    """The host that a program connects to, if it is an address of this machine's loopback."""
    if not (isinstance(address, tuple) and len(address) >= 2 and isinstance(address[0], str)):
        return None
    host = "127.0.0.1" if address[0] in ("", "localhost") else address[0]
    with suppress(ValueError):
        ip = ipaddress.ip_address(host)
        return host if ip.is_loopback or ip.is_unspecified else None
    return None


def _matches(name: Any, host: str, port: int) -> bool:
    """Whether a server on ``name`` accepts connections to a local host and port."""
    return bool(name[1] == port) and (name[0] in (host, "0.0.0.0", "::") or host in ("0.0.0.0", "::"))
