"""Opens the listening socket of a server or a daemon, within the port allocation.

Process: the master, and a program without gunicorn. Never: resolve a name, wait, or open a port that the
allocation does not name.
"""

from __future__ import annotations

import _socket
import resource
import socket
from collections.abc import Set
from contextlib import suppress

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.port_allocation import PortAllocation, format_ports, parse_ports
from gunicorn_passenger.config.record import Record
from gunicorn_passenger.system import listening_sockets

#: How many ports one application may hold, so that a program that never stops opening ports cannot use up the
#: master.
MAX_PORTS = 1024
#: The backlog of a socket for which neither gunicorn nor the program has set one.
DEFAULT_BACKLOG = 2048


class ListenRequest(Record):
    """What to listen on."""

    #: ``"tcp"`` (``host``, ``port``), ``"auto"`` (``host``, any port from ``port`` on), ``"unix"`` (``path``)
    kind: str
    #: numeric
    host: str = ""
    port: int = 0
    #: absolute
    path: str = ""
    backlog: int = DEFAULT_BACKLOG
    v6only: bool = False
    #: of a UNIX socket's file
    mode: int = 0o600
    #: the ports that the program allows itself; empty for all that are allocated
    within: str = ""


def open_listener(
    request: ListenRequest,
    allocation: PortAllocation | None,
    in_use: Set[int] = frozenset(),
    *,
    needed: int = 0,
    preferred: int = 0,
) -> _socket.socket:
    """Open a listening socket.

    :param allocation: the ports that may be opened; ``None`` where the operator has opened the port.
    :param in_use: ports that this application holds; ``"auto"`` skips them.
    :param needed: how many free ports there must be, for several servers of a kind.
    :param preferred: the port that ``"auto"`` tries first; 0 for none.
    :raises errors.PortInUse: when the port, or each of the ports, is in use.
    :raises errors.ListenError: when the port is not allocated, or the kernel refuses to open it.
    """
    if request.kind == "unix":
        return listening_sockets.open_unix(request.path, request.mode, request.backlog)
    address = address_family(request.host), request.host
    options = request.backlog, request.v6only
    if request.kind == "tcp":
        if allocation is not None:
            allocation.check(request.port)
        return listening_sockets.open_tcp(*address, request.port, *options)
    assert allocation is not None
    ports = _candidates(request, allocation)
    if ports is None:
        if preferred and preferred not in in_use:
            with suppress(errors.ListenError):
                return listening_sockets.open_tcp(*address, preferred, *options)
        return listening_sockets.open_tcp(*address, 0, *options)
    # "auto" begins at the top: programs name the first ports, perhaps a line later
    free = sorted(ports - in_use, reverse=not request.port)
    if len(free) < needed:
        raise listen_errors.too_few_ports(format_ports(ports), needed, len(free), allocation.sources)
    if preferred in free:
        free.insert(0, preferred)
    for number in free:
        allocation.check(number)
        sock = listening_sockets.open_tcp_if_free(*address, number, *options)
        if sock is not None:
            return sock
    raise listen_errors.no_port_free(format_ports(ports), allocation.sources)


def _candidates(request: ListenRequest, allocation: PortAllocation) -> Set[int] | None:
    """The ports that ``"auto"`` may open; ``None`` when the kernel may choose any port."""
    ports = parse_ports(request.within, "the program") if request.within else None
    if allocation.limited:
        ports = allocation.ports if ports is None else allocation.ports & ports
    if ports is None and not request.port:
        return None
    if ports is None:
        return frozenset(range(request.port, 65536))
    return frozenset(port for port in ports if port >= request.port) if request.port else ports


def address_family(host: str) -> int:
    """The address family of a numeric host.

    :raises errors.ListenError: when the host is not numeric.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return family
    raise listen_errors.bad_address(host[:100], "the host is not a numeric address")


def unix_mode(umask: int) -> int:
    """The mode of a UNIX socket's file: 0600, unless gunicorn's ``umask`` opens it to others."""
    return 0o666 & ~umask if umask else 0o600


def port_limit(divisor: int) -> int:
    """How many ports this process may hold, since a master without a free descriptor cannot start workers.

    :param divisor: the share of the limit on open files: 2 for half of them.
    """
    return min(MAX_PORTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // divisor)
