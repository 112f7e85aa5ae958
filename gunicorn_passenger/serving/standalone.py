"""Plain Python, without gunicorn: there is no master, the process opens its ports itself.

Runs in: plain Python. Must never: run in a worker.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from gevent import socket as gsocket

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import Address, Auto, Tcp, Unix, format_sockname, resolve
from gunicorn_passenger.config.port_allocation import PortAllocation, format_ports
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.serving.server import ListenAddress
from gunicorn_passenger.system import listening_sockets

#: Where ``"passenger"`` is served, unless PORT says otherwise.
DEVELOPMENT_PORT = 8000

_BACKLOG = 2048


def open_socket(want: Address | None, primary: bool) -> ListenAddress:
    """Open the listening socket of a server.

    :raises errors.ListenError: when it cannot be had.
    """
    if isinstance(want, Unix):
        family, sock = int(gsocket.AF_UNIX), listening_sockets.open_unix(want.path, 0o600, _BACKLOG)
    else:
        family, sock = _open_tcp(want)
    name = listening_sockets.sockname(sock)
    if primary:
        print(f"Serving on http://{format_sockname(name)}/ (plain Python, for development)", file=sys.stderr)
    wrapped = gsocket.socket(family, gsocket.SOCK_STREAM, fileno=sock.detach())
    return ListenAddress(wrapped, name, format_sockname(name))


def _open_tcp(want: Address | None) -> tuple[int, Any]:
    if isinstance(want, Tcp):
        _allocation().check(want.port)
        family, host = resolve(want.host, want.port)
        return family, listening_sockets.open_tcp(family, host, want.port, _BACKLOG)
    if isinstance(want, Auto):
        allocation = _allocation()
        family, host = resolve(want.host, 0)
        for port in sorted(allocation.ports) if allocation.limited else [0]:
            try:
                return family, listening_sockets.open_tcp(family, host, port, _BACKLOG)
            except errors.PortInUse:
                continue
        raise listen_errors.no_port_free(format_ports(allocation.ports), allocation.sources)
    return gsocket.AF_INET, listening_sockets.open_tcp(
        gsocket.AF_INET, "127.0.0.1", development_port(), _BACKLOG
    )


def _allocation() -> PortAllocation:
    return settings.operator_allocation(os.geteuid()).narrowed(settings.program_layer())


def development_port() -> int:
    """:raises errors.SettingError: when PORT is no port."""
    text = os.environ.get("PORT", "").strip()
    if not text:
        return DEVELOPMENT_PORT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise errors.SettingError(f"PORT={text!r} is not a number from 1 to 65535")
    return int(text)


def unlink(address: object) -> None:
    """Remove the file of a UNIX socket of ours."""
    if isinstance(address, str) and address.startswith("unix:"):
        path = address[len("unix:") :]
        if os.path.exists(path):
            os.unlink(path)
