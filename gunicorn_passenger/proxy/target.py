"""Where a proxy sends requests: the forms that a target may have.

Process: any process in which the proxy is mounted. Its only I/O asks the master for a server.
Never: guess what a bad target may have meant.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from gunicorn_passenger.errors import SettingError

_SCHEMES = {"http": ("http", 80), "ws": ("http", 80), "https": ("https", 443), "wss": ("https", 443)}

#: what a path and a query may hold when they are put into a request line (RFC 9112 section 3)
_VISIBLE = re.compile(r"[\x21-\x7e]*")

_FORMS = (
    "a port, an 'http://host:port/base' or 'https://…' URL, 'unix:/path', the name of a server, a list of "
    "these, a table of path prefixes, or a function"
)


@dataclass(frozen=True)
class Target:
    """One place: a TCP address, a UNIX socket, or a server of this application by its name."""

    host: str = "localhost"
    port: int = 80
    #: a UNIX socket's path
    path: str = ""
    #: a server's name, which stands for its address
    server: str = ""
    scheme: str = "http"
    #: what is put before the request's path, without a slash at its end, and the query behind it
    base: str = ""
    #: the same as it was written
    whole: str = field(default="", compare=False)
    query: str = ""
    #: the Host field for it, and what the log calls it
    authority: str = field(init=False, compare=False)
    text: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        local = self.path or self.server
        object.__setattr__(
            self, "authority", "localhost" if local else host if usual else f"{host}:{self.port}"
        )
        if self.path:
            text = f"unix:{self.path}"
        elif self.server:
            text = self.server
        else:
            text = f"{self.scheme}://{host}:{self.port}{self.base}"
        object.__setattr__(self, "text", text)

    def __str__(self) -> str:
        return self.text

    @property
    def tls(self) -> bool:
        return self.scheme == "https"

    @property
    def origin(self) -> str:
        """What a URL on it begins with."""
        return f"{self.scheme}://{self.authority}"


class ServerDirectory(Protocol):
    """Where the servers of the application are."""

    def resolve_server(self, name: str) -> tuple[str, int] | str:
        """The address of a server: host and port, or ``unix:/path``.

        :raises LookupError: when no server has the name, or it does not listen yet.
        """

    def member_names(self, name: str) -> list[str]:
        """The servers that a name stands for: none, one, or those of all workers."""


def server_target(target: Target, servers: ServerDirectory | None) -> Target:
    """The target itself, or the address of the server of the application that it names.

    :raises LookupError: when no server has the name.
    """
    if not target.server:
        return target
    if servers is None:
        raise LookupError(target.server)
    address = servers.resolve_server(target.server)
    if isinstance(address, tuple):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        return Target(host, address[1])
    return Target(path=address.removeprefix("unix:"))


def parse_target(target: object, host: str | None = None, what: str = "target") -> Target:
    """
    :param target: a port, a URL, ``unix:/path`` or a server's name.
    :param host: the host of a bare port.
    :param what: the option that it comes from, for the error.
    :raises SettingError: says what a target may be.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, int) and not isinstance(target, bool):
        if not 1 <= target <= 65535:
            raise SettingError(f"{what}={target!r} is not a port from 1 to 65535")
        if host is not None and (not isinstance(host, str) or not re.fullmatch(r"[^\s/@\[\]]+", host)):
            raise SettingError(f"host={host!r} is not a host name or an address")
        return Target(host or "localhost", target)
    if isinstance(target, str):
        return _parse_text(target, what)
    raise SettingError(f"{what}={target!r} is not a target: use {_FORMS}")


@functools.lru_cache(maxsize=1024)
def _parse_text(target: str, what: str) -> Target:
    if target.startswith("unix:"):
        path = target[len("unix:") :]
        if not path or "\0" in path:
            raise SettingError(f"{what}={target!r} has no path: write 'unix:/path'")
        return Target(path=path)
    scheme, colon, _ = target.partition("://")
    if colon:
        return _parse_url(target, scheme.lower(), what)
    if not target.strip() or len(target) > 200 or re.search(r"[\s/:?#]", target) or target.isdigit():
        raise SettingError(f"{what}={target!r} is not a target: use {_FORMS}")
    return Target(server=target)


def _parse_url(target: str, scheme: str, what: str) -> Target:
    if not _VISIBLE.fullmatch(target):
        raise SettingError(f"{what}={target!r}: percent-encode what is not printable ASCII")
    if scheme not in _SCHEMES:
        raise SettingError(f"{what}={target!r}: a URL for a target begins with http:// or https://")
    scheme, usual = _SCHEMES[scheme]
    try:
        parts = urlsplit(target)
        port = parts.port if parts.port is not None else usual
    except ValueError:
        raise SettingError(f"{what}={target!r} has no port from 1 to 65535, or a bad host") from None
    if not parts.hostname or not port or parts.fragment or parts.username is not None:
        hint = "; credentials go into the option 'auth'" if parts.username is not None else ""
        raise SettingError(f"{what}={target!r} is not a URL with only a host and a path{hint}")
    return Target(
        parts.hostname,
        port,
        scheme=scheme,
        base=parts.path.rstrip("/"),
        whole=parts.path,
        query=parts.query,
    )


def matches(prefix: str, path: str) -> bool:
    """Whether a path is below a prefix of a table: ``/api/`` means all below it, ``/api`` itself, too."""
    if prefix.endswith("/"):
        return path.startswith(prefix)
    return path == prefix or path.startswith(prefix + "/")


def check_prefix(prefix: Any) -> str:
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        raise SettingError(f"target: the prefix {prefix!r} of the table does not begin with '/'")
    return prefix
