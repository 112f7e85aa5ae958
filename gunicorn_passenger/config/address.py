"""Addresses of servers and daemons: parsing, formatting, resolving.

Process: every process. Never: open a socket.
"""

from __future__ import annotations

import ipaddress
import os
import socket

from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.record import Record

#: Bytes that a UNIX socket path may have: sun_path without the closing NUL (unix(7)).
UNIX_PATH_MAX = 107

#: What ``getsockname()`` returns: (host, port), or (host, port, flow, scope) for IPv6.
SockAddr = tuple[str, int] | tuple[str, int, int, int]


class Primary(Record):
    """The socket that the web server reaches."""

    def __str__(self) -> str:
        return "passenger"


class Tcp(Record):
    """A TCP port; ``host`` may still be a name."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_tcp(self.host, self.port)


class Auto(Record):
    """Any free port of the allocation."""

    host: str

    def __str__(self) -> str:
        return "auto"


class Unix(Record):
    """A UNIX socket at an absolute path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class Once(Record):
    """The right to run a function of this name."""

    name: str

    def __str__(self) -> str:
        return f"once({self.name!r})"


Address = Primary | Tcp | Auto | Unix


def format_tcp(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(text: object) -> bool:
    """Whether a value is the text of an IP address."""
    try:
        return isinstance(text, str) and bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def is_unix(name: object) -> bool:
    """Whether ``getsockname()`` returned a UNIX socket's name: a path, or bytes in the abstract namespace."""
    return isinstance(name, str | bytes)


def format_sockname(name: SockAddr | str | bytes) -> str:
    """The printed form of a listening socket's name; abstract names begin with ``@`` (unix(7))."""
    if isinstance(name, bytes):
        return "unix:" + name.decode("utf-8", "backslashreplace").replace("\0", "@")
    return f"unix:{name}" if isinstance(name, str) else format_tcp(name[0], name[1])


def tcp_ports(addresses: str) -> set[int]:
    """The TCP ports in the addresses of a server or a daemon, as the report has them: divided by ``", "``."""
    numbers = {one.rpartition(":")[2] for one in addresses.split(", ") if not one.startswith("unix:")}
    return {int(number) for number in numbers if number.isdecimal()}


def parse(address: object, host: str = "127.0.0.1") -> Address:
    """Parse the address that ``listen()`` was given.

    :param address: ``"passenger"``, ``"/passenger"``, a port number, ``"host:port"``,
        ``"[::1]:port"``, ``(host, port)``, ``"unix:/path"`` or ``"auto"``.
    :param host: the host for a bare port and for ``"auto"``.
    :raises errors.ListenError: (``EINVAL``, ``ENAMETOOLONG``) when the address is invalid.
    """
    if isinstance(address, bool) or not isinstance(address, int | str | tuple):
        raise listen_errors.bad_address(address, "it is neither a number nor a string")
    if isinstance(address, int):
        return Tcp(_host(host), _port(address))
    if isinstance(address, tuple):
        if len(address) < 2 or not isinstance(address[0], str):
            raise listen_errors.bad_address(address, "a tuple must be (host, port)")
        return Tcp(_host(address[0]), _port(address[1], str(address)))
    text = address.strip()
    if text in ("passenger", "/passenger"):
        return Primary()
    if text == "auto":
        return Auto(_host(host))
    if text.startswith("unix:"):
        return Unix(_unix_path(text[len("unix:") :], address))
    if "://" in text:
        raise listen_errors.bad_address(address, "a server listens on an address, not on a URL")
    return _parse_tcp(text, address, host)


def _parse_tcp(text: str, address: object, host: str) -> Tcp:
    if text.lstrip("+-").isdigit() or not text.strip("0123456789"):
        return Tcp(_host(host), _port(text))
    if text.startswith("["):
        inner, bracket, rest = text[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise listen_errors.bad_address(address, "an IPv6 address with a port is written [::1]:9000")
        return Tcp(_host(inner), _port(rest[1:], text))
    name, colon, port = text.rpartition(":")
    if not colon:
        raise listen_errors.bad_address(address, "it has no port")
    if ":" in name:
        raise listen_errors.bad_address(address, "an IPv6 address with a port is written [::1]:9000")
    return Tcp(_host(name or host), _port(port, text))


def _host(host: object) -> str:
    if not isinstance(host, str):
        raise listen_errors.bad_address(host, "a host is a string")
    host = host.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or "\0" in host or any(c.isspace() for c in host):
        raise listen_errors.bad_address(host, "the host is empty or contains white space")
    try:
        long = len(host) > 253 or any(len(label) > 63 for label in host.split("."))
        host.encode("ascii" if host.isascii() else "idna")
    except UnicodeError as error:
        raise listen_errors.unresolved(host, error) from None
    if long:
        raise listen_errors.unresolved(
            host[:80], "a label has more than 63 characters, or the name more than 253"
        )
    return host


def _port(port: object, where: str = "") -> int:
    if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) <= 5:
        port = int(port)
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise listen_errors.bad_port(port, where)
    return port


def _unix_path(path: str, address: object) -> str:
    if not path or "\0" in path:
        raise listen_errors.bad_address(address, "the path of the UNIX socket is empty or contains a NUL")
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise listen_errors.unix_path_too_long(path, UNIX_PATH_MAX)
    return path


def resolve(host: str, port: int, family: int = socket.AF_UNSPEC) -> tuple[int, str]:
    """Turn a host name into a numeric address to bind.

    The worker does this, so that the master never waits for a name server.

    :param family: restrict the result to this address family.
    :returns: the address family and the numeric host.
    :raises errors.ListenError: (``EADDRNOTAVAIL``) when the name does not resolve.
    """
    for numeric in (socket.AF_INET, socket.AF_INET6):
        if family in (socket.AF_UNSPEC, numeric):
            try:
                return numeric, socket.inet_ntop(numeric, socket.inet_pton(numeric, host))
            except OSError:
                continue
    try:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise listen_errors.unresolved(host, getattr(error, "strerror", None) or error) from None
    # "localhost" may resolve to ::1 first, but clients expect such a port on IPv4
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return int(found[0][0]), str(found[0][4][0])
