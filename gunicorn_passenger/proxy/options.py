"""The proxy's options: node-http-proxy's in snake_case and some more, checked when the proxy is made.

Process: any process in which the proxy is mounted. It does no I/O.
Never: accept an option that fails later.
"""

from __future__ import annotations

import base64
import copy
import io
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from gunicorn_passenger.errors import SettingError, unknown_name
from gunicorn_passenger.http.grammar import FIELD_VALUE, REQUEST_TARGET, TOKEN
from gunicorn_passenger.proxy.agent import Agent, positive
from gunicorn_passenger.proxy.dial import DialSettings
from gunicorn_passenger.proxy.target import Target, parse_target

#: Fields that the proxy writes itself: they frame the message or speak of the connection.
_FRAMING = {"content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "te", "trailer"}

#: Redirects that ``follow_redirects=True`` follows for one request.
_REDIRECTS = 21

#: the directions that forwarded fields can be written in
APPEND, REPLACE = "append", "replace"

#: stands in ``trusted`` for the clients of a UNIX socket
UNIX = "unix"


_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SettingError(f"{name}={value!r} is neither True nor False")
    return value


def _host(name: str, value: Any) -> Any:
    if value is None or value is False:
        return None
    if not isinstance(value, str) or not FIELD_VALUE.fullmatch(value) or not _HOST.fullmatch(value):
        raise SettingError(f"{name}={value!r} is neither a host nor host:port")
    port = value.rpartition(":")[2] if not value.endswith("]") and ":" in value else "1"
    if not 1 <= int(port) <= 65535:
        raise SettingError(f"{name}={value!r} has no port from 1 to 65535")
    return value


def _auth(name: str, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, str) or ":" not in value:
        raise SettingError(f"{name} is not written 'user:password'")
    return value


def _protocol(name: str, value: Any) -> Any:
    if value is None or value is False:
        return None
    if value not in ("http", "https"):
        raise SettingError(f"{name}={value!r} is neither 'http' nor 'https'")
    return value


def _seconds(name: str, value: Any) -> Any:
    if value is None:
        return None
    return positive(name, value)


def _written(name: str, value: Any) -> Any:
    """How forwarded fields are written: not at all, or in which way."""
    if value is True:
        return APPEND
    if value in (False, None):
        return False
    if value not in (APPEND, REPLACE):
        raise SettingError(f"{name}={value!r} is not one of True, False, {APPEND!r} and {REPLACE!r}")
    return value


def _trusted(name: str, value: Any) -> Any:
    if value is None or value is True:
        return value
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise SettingError(f"{name}={value!r} is neither '*' nor a list of addresses, networks and 'unix'")
    if "*" in value:
        return True
    networks: list[Any] = []
    for part in value:
        if isinstance(part, (ipaddress.IPv4Network, ipaddress.IPv6Network)) or part == UNIX:
            networks.append(part)
            continue
        try:
            if not isinstance(part, str):
                raise TypeError
            networks.append(ipaddress.ip_network(part))
        except (ValueError, TypeError):
            raise SettingError(f"{name}: {part!r} is not an address, a network or 'unix'") from None
    return tuple(networks)


def _via(name: str, value: Any) -> Any:
    if value is True:
        return "gunicorn-passenger"
    if value in (False, None):
        return False
    if not isinstance(value, str) or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z:\[\]]+", value):
        raise SettingError(
            f"{name}={value!r} is not a pseudonym: letters, digits and -._ (RFC 9110 section 7.6.3)"
        )
    return value


def _address(name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        if not isinstance(value, str):
            raise ValueError
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise SettingError(
            f"{name}={value!r} is not an address of this machine, such as '127.0.0.1'"
        ) from None


def _rewrite(name: str, value: Any) -> Any:
    """A string stands for all cookies."""
    if value in (False, None):
        return False
    if isinstance(value, str):
        value = {"*": value}
    if not isinstance(value, Mapping):
        raise SettingError(f"{name}={value!r} is neither a string nor a dict")
    rules = {}
    for old, given in value.items():
        new = "" if given is None or given is False else given
        for part in old, new:
            if not isinstance(part, str) or not re.fullmatch(r"[\x20-\x3a\x3c-\x7e\x80-\xff]*", part):
                raise SettingError(f"{name}: {part!r} cannot be part of a cookie")
        rules[old.lower() if "domain" in name else old] = new
    return rules


def _headers(name: str, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    try:
        pairs = list(value.items() if isinstance(value, Mapping) else value)
        return dict(check_field(key, text, name) for key, text in pairs)
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{name}={value!r} is not a dict of header names and values") from None


def check_field(key: Any, text: Any, name: str, framing: bool = False) -> tuple[str, str]:
    """A field that may be sent.

    :param name: where it comes from, for the error.
    :param framing: whether it may be one that frames the message, which the caller sorts out.
    :raises SettingError: when it would end its line, or belongs to the connection or the framing.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(key, str) or not isinstance(text, str) or not TOKEN.fullmatch(key):
        raise SettingError(f"{name}: {key!r}: {text!r} is not a valid header")
    if not FIELD_VALUE.fullmatch(text):
        raise SettingError(f"{name}: {key!r}: the value has a character that a header may not have")
    if not framing and key.lower() in _FRAMING:
        raise SettingError(f"{name}: {key!r} is written by the proxy itself")
    return key, text.strip(" \t")


def _redirects(name: str, value: Any) -> int:
    if value is True:
        return _REDIRECTS
    if value in (False, None):
        return 0
    if not isinstance(value, int) or not 0 <= value <= 100:
        raise SettingError(f"{name}={value!r} is neither True, False nor a number up to 100")
    return value


def _buffer(name: str, value: Any) -> Any:
    if value is not None and (not callable(getattr(value, "read", None)) or isinstance(value, io.TextIOBase)):
        raise SettingError(f"{name}={value!r} is not a binary file object")
    return value


def _agent(name: str, value: Any) -> Any:
    if value is None:
        return Agent()
    if value is False:
        return Agent(max_idle=0)
    if not isinstance(value, Agent):
        raise SettingError(f"{name}={value!r} is neither an http_proxy.Agent nor False")
    return value


def _forward(name: str, value: Any) -> Target | None:
    return None if value is None else parse_target(value, what=name)


def _choice(*choices: Any) -> Any:
    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise SettingError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        return value

    return check


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not TOKEN.fullmatch(value):
        raise SettingError(f"{name}={value!r} is not a name for a cookie")
    return value


def _servername(name: str, value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._:-]+", value)):
        raise SettingError(f"{name}={value!r} is not a host name")
    return value


def _path(name: str, value: Any) -> str | None:
    if value is not None and (
        not isinstance(value, str) or not value.startswith("/") or not REQUEST_TARGET.fullmatch(value)
    ):
        raise SettingError(f"{name}={value!r} is not a path that begins with '/'")
    return value


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _bytes(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise SettingError(f"{name}={value!r} is not a number of bytes")
    return value


def _path_rewrite(name: str, value: Any) -> Any:
    """A function, or patterns and what replaces them."""
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    if not isinstance(value, Mapping):
        raise SettingError(f"{name}={value!r} is neither a function nor a dict of patterns and replacements")
    rules = []
    for pattern, replacement in value.items():
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement, "")
        except (re.error, TypeError, IndexError) as error:
            raise SettingError(f"{name}: {pattern!r}: {replacement!r} is not a rule: {error}") from None
        rules.append((compiled, replacement))
    return tuple(rules)


def _statuses(name: str, value: Any) -> frozenset[int]:
    try:
        found = frozenset(value or ())
    except TypeError:
        found = frozenset([None])
    if not all(isinstance(status, int) and 400 <= status <= 599 for status in found):
        raise SettingError(f"{name}={value!r} is not a list of status codes from 400 to 599")
    return found


@dataclass(frozen=True)
class Options:
    """What may be set; see ``docs/reference/proxy.md`` for what each means."""

    forward: Annotated[Any, _forward] = None
    ws: Annotated[bool, _flag] = True
    xfwd: Annotated[Any, _written] = False
    forwarded: Annotated[Any, _written] = False
    trusted: Annotated[Any, _trusted] = None
    via: Annotated[Any, _via] = False
    secure: Annotated[bool, _flag] = True
    servername: Annotated[str | None, _servername] = None
    to_proxy: Annotated[bool, _flag] = False
    prepend_path: Annotated[bool, _flag] = True
    ignore_path: Annotated[bool, _flag] = False
    local_address: Annotated[str | None, _address] = None
    change_origin: Annotated[bool, _flag] = False
    preserve_header_key_case: Annotated[bool, _flag] = False
    auth: Annotated[str | None, _auth] = None
    host_rewrite: Annotated[str | None, _host] = None
    auto_rewrite: Annotated[bool, _flag] = False
    protocol_rewrite: Annotated[str | None, _protocol] = None
    cookie_domain_rewrite: Annotated[Any, _rewrite] = False
    cookie_path_rewrite: Annotated[Any, _rewrite] = False
    cookie_secure: Annotated[bool | None, _optional_flag] = None
    cookie_samesite: Annotated[str | None, _choice(None, "Lax", "Strict", "None")] = None
    headers: Annotated[Any, _headers] = None
    proxy_timeout: Annotated[float | None, _seconds] = 60.0
    timeout: Annotated[float | None, _seconds] = None
    max_body: Annotated[int | None, _bytes] = None
    rewrite: Annotated[Any, _path_rewrite] = None
    follow_redirects: Annotated[Any, _redirects] = False
    self_handle_response: Annotated[bool, _flag] = False
    buffer: Annotated[Any, _buffer] = None
    agent: Annotated[Any, _agent] = None
    ws_timeout: Annotated[float | None, _seconds] = None
    ws_stop: Annotated[str, _choice("close", "wait")] = "close"
    balance: Annotated[str, _choice("round_robin", "least_connections")] = "round_robin"
    fail_timeout: Annotated[float, positive] = 10.0
    retry_statuses: Annotated[Any, _statuses] = ()
    health: Annotated[str | None, _path] = None
    health_interval: Annotated[float, positive] = 10.0
    sticky: Annotated[str | None, _choice(None, False, "cookie")] = None
    sticky_name: Annotated[str, _name] = "passenger_target"

    #: fields that are set on each request: lower-case name → name and value
    set_headers: dict[str, tuple[str, str]] = field(init=False)
    #: seconds that a target may be silent
    upstream_timeout: float | None = field(init=False)
    #: how targets are connected to
    dial: DialSettings = field(init=False)
    #: whether responses go to the client with nothing rewritten
    plain_response: bool = field(init=False)
    #: whether responses go to the client unchanged, and no response leads to another request
    copies_responses: bool = field(init=False)

    def __post_init__(self) -> None:
        for name in NAMES:
            self.apply(name, getattr(self, name))
        self.derive()

    def apply(self, name: str, value: Any) -> None:
        """Set an option of a copy, after it was checked."""
        object.__setattr__(self, name, _CHECKS[name](name, value))

    def derive(self) -> None:
        """Compute what depends on several options."""
        if not self.secure and self.agent.has_context:
            raise SettingError(
                "secure=False has no effect on an agent with an ssl_context of its own: leave secure out "
                "and set check_hostname and verify_mode of that context"
            )
        set_headers = {name.lower(): (name, value) for name, value in self.headers.items()}
        if self.auth is not None:
            credentials = base64.b64encode(self.auth.encode()).decode()
            set_headers["authorization"] = ("Authorization", f"Basic {credentials}")
        rewrites = (
            self.host_rewrite,
            self.auto_rewrite,
            self.protocol_rewrite,
            self.cookie_domain_rewrite,
            self.cookie_path_rewrite,
            self.cookie_secure is not None,
            self.cookie_samesite,
        )
        # as in node-http-proxy, "timeout" is for the whole exchange: it covers the wait for the target, too
        seconds = min(filter(None, (self.proxy_timeout, self.timeout)), default=None)
        object.__setattr__(self, "upstream_timeout", seconds)
        object.__setattr__(self, "set_headers", set_headers)
        dial = DialSettings(self.secure, self.local_address, self.servername, self.fail_timeout)
        object.__setattr__(self, "dial", dial)
        object.__setattr__(self, "plain_response", not any(rewrites))
        changes = self.via or self.self_handle_response or self.follow_redirects or self.sticky
        object.__setattr__(self, "copies_responses", self.plain_response and not changes)

    def merged(self, changes: Mapping[str, Any], where: str) -> Options:
        """These options with some of them changed.

        :param where: the call that was given them, for the error.
        :raises UnknownSetting: (a ``TypeError``) for a name that is not an option.
        :raises SettingError: (a ``ValueError``) for a value that cannot be used.
        """
        merged = copy.copy(self)
        for name, value in changes.items():
            if name not in _CHECKS:
                raise unknown_name(where, "option", name, NAMES)
            try:
                merged.apply(name, value)
            except SettingError as error:
                raise SettingError(f"{where}: {error}") from None
        try:
            merged.derive()
        except SettingError as error:
            raise SettingError(f"{where}: {error}") from None
        return merged

    def trusts(self, address: str) -> bool:
        """Whether the forwarding headers of this peer are believed, as far as ``trusted`` tells.

        :param address: of the peer; empty on a UNIX socket, for which ``"unix"`` stands in ``trusted``.
        """
        if self.trusted is True:
            return True
        if not address:
            return UNIX in self.trusted
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self.trusted if network != UNIX)


_CHECKS = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Options, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
#: the options, as the error for an unknown one lists them
NAMES = tuple(_CHECKS)
