"""gunicorn's listener classes, for the ports that the broker opens.

Process: the master; a worker closes its copies. Never: close a port that the broker has not decided to close.

A port is in the arbiter's own ``LISTENERS``, so that ``USR2`` passes it to the new master and a shutdown
closes it. gunicorn also closes every listener there when a reload changes ``bind``; a
:class:`BrokerOwnedListener` survives that.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gunicorn.sock import TCP6Socket, TCPSocket, UnixSocket


class BrokerOwnedListener:
    """Mixin for gunicorn's socket classes: a listener that the broker opened.

    gunicorn calls ``close()`` in two places: when it stops, and when a reload changes ``bind``. The
    broker must tell them apart, since a port outlives a reload; so ``close()`` only reports the request, and
    the broker closes by :meth:`close_now`.
    """

    on_close_request: Callable[[], None] | None = None
    sock: socket.socket | None

    def close(self) -> None:
        if self.on_close_request is not None and self.sock is not None:
            self.on_close_request()
        else:
            self.close_now()

    def close_now(self, for_all: bool = False) -> None:
        """
        :param for_all: whether the port must be closed for every process that has a copy of the socket, such
            as a child that a hook of gunicorn's has forked.
        """
        sock, self.sock = self.sock, None
        if sock is not None:
            with suppress(OSError):
                if for_all:
                    sock.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                sock.close()


class BrokerOwnedTCP(BrokerOwnedListener, TCPSocket):
    """A run-time port on IPv4."""


class BrokerOwnedTCP6(BrokerOwnedListener, TCP6Socket):
    """A run-time port on IPv6."""


class BrokerOwnedUnix(BrokerOwnedListener, UnixSocket):
    """A run-time UNIX socket."""

    def getsockname(self) -> tuple[str, str]:
        """Without the path: gunicorn would remove the file when it stops. The broker does that."""
        return "unix", self.cfg_addr


#: The class for each address family.
OWNED_LISTENERS: dict[int, Any] = {
    socket.AF_INET: BrokerOwnedTCP,
    socket.AF_INET6: BrokerOwnedTCP6,
    socket.AF_UNIX: BrokerOwnedUnix,
}
