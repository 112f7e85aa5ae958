"""Decides which request headers the target gets, and writes the proxy's own. Functions without I/O.

Process: any process in which the proxy is mounted.
Never: forward a header of one connection to another, or believe an untrusted client about its origin.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import quote

from werkzeug.http import quote_header_value

from gunicorn_passenger.errors import BadRequestBody
from gunicorn_passenger.http.grammar import FIELD_VALUE, TOKEN
from gunicorn_passenger.proxy.options import APPEND, Options
from gunicorn_passenger.proxy.target import Target

HeaderList = list[tuple[str, str]]

#: Headers that are not simply forwarded: they speak of one connection (RFC 9110 section 7.6.1), or frame
#: the message and are written again from what was parsed (RFC 9112 section 6). "Proxy" is not a header at
#: all: CGI programs take it for the setting of a proxy. "HTTP2-Settings" belongs to an upgrade to h2c, which
#: is never forwarded.
ASIDE = frozenset(
    {
        "connection",
        "content-length",
        "http2-settings",
        "keep-alive",
        "proxy",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

#: Headers that say where a request comes from. A server may believe them only from its own proxy.
ORIGIN = {
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-proto",
    "x-real-ip",
}

#: A client cannot remove these by naming them in Connection: they are meant for all recipients (RFC 9110
#: section 7.6.1), or tell where a request comes from.
_NOT_TO_NOMINATE = ORIGIN | {
    "host",
    "content-length",
    "content-type",
    "authorization",
    "cookie",
    "cache-control",
    "set-cookie",
}

#: options of Connection that do not name a header
_OPTIONS = {"close", "keep-alive", "upgrade", "te", ""}

#: what stands for an address that is not known (RFC 7239 section 6.3)
UNKNOWN = "unknown"

#: headers that tell the proxy something, in addition to those that begin with "proxy-"
_SPECIAL = ASIDE | {"expect", "host"}
#: how many names are cached, and how long one may be
_REMEMBER = 1000
_SHORT = 64

#: headers whose keys in an environ have no prefix
_CONTENT = ("CONTENT_TYPE", "CONTENT_LENGTH")

# a host, or host and port (RFC 9110 section 7.2)
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]\\,]*)(?::[0-9]*)?")
PORT = re.compile(r":([0-9]+)$")
#: RFC 9110 section 8.6 sets no bound; a length from here on fits no signed 64-bit number, and servers that
#: compute with such numbers would read another one
_LENGTHS = 1 << 63
_DIGITS = len(str(_LENGTHS))


def protocols(upgrade: str) -> set[str]:
    """What an Upgrade header names (RFC 9110 section 7.8)."""
    return {protocol.strip().lower() for protocol in upgrade.split(",")}


def number_of_bytes(text: str) -> int | None:
    """What a ``Content-Length`` says (RFC 9110 section 8.6).

    :returns: a number of bytes below 2**63; ``None`` when the text is not one.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    # int() itself refuses thousands of digits with another error
    number = int(digits) if len(digits) <= _DIGITS else _LENGTHS
    return number if number < _LENGTHS else None


def without_nominated(headers: HeaderList, options: set[str], own: Collection[str] = ()) -> HeaderList:
    """Take away the headers that Connection names (RFC 9110 section 7.6.1).

    :param own: names of headers, in lower case, that the sender of Connection has not written: they stay.
    """
    nominated = options - _OPTIONS - _NOT_TO_NOMINATE - set(own)
    if not nominated:
        return headers
    return [header for header in headers if header[0].lower() not in nominated]


class _NameCache(dict[str, tuple[str, bool]]):
    """Header names in lower case, and whether they are forwarded without a look. Most names repeat."""

    def __missing__(self, name: str) -> tuple[str, bool]:
        low = name.lower()
        found = low, low not in _SPECIAL and low[:6] != "proxy-"
        if len(name) <= _SHORT:
            if len(self) >= _REMEMBER:
                self.clear()
            self[name] = found
        return found


_names = _NameCache()


def is_forwarded(name: str) -> bool:
    """Whether a header with this name is forwarded without a look."""
    return _names[name][1]


class RequestHeaders:
    """The headers of a client's request that are meant for the target.

    They are not changed once they are made: a client mostly sends the same headers again, and a plan keeps
    them.
    """

    __slots__ = (
        "expect",
        "host",
        "lines",
        "measured",
        "te_trailers",
        "upgrade",
        "valid",
        "version",
    )

    def __init__(
        self,
        pairs: Iterable[tuple[str, str]],
        keep_case: bool,
        protocol: str = "HTTP/1.1",
        own: Collection[str] = (),
    ) -> None:
        """
        :param pairs: the headers of the request, in their order.
        :param keep_case: whether names keep their letter case; else they are lower case.
        :param protocol: of the request.
        :param own: names, in lower case, of the headers that the program has written, not the client: the
            client's ``Connection`` cannot take them away.
        """
        self.version = "1.0" if protocol == "HTTP/1.0" else "1.1"
        headers: HeaderList = []
        connection = ""
        twice = False
        self.upgrade = ""
        self.expect = False
        #: whether the client takes trailers, which its TE says
        self.te_trailers = False
        self.host: str | None = None
        #: whether a Content-Length is among them
        self.measured = False
        for name, value in pairs:
            low, plain = _names[name]
            if plain:
                headers.append((name if keep_case else low, value))
            elif low in ASIDE:
                if low == "connection":
                    connection = f"{connection},{value}" if connection else value
                elif low == "upgrade":
                    self.upgrade = f"{self.upgrade}, {value}" if self.upgrade else value
                elif low == "trailer":
                    headers.append((name if keep_case else low, value))
                elif low == "content-length":
                    if not self.measured:
                        self.measured = True
                        # a malformed one is refused when the body's length is asked for
                        length = number_of_bytes(value)
                        headers.append((name if keep_case else low, value if length is None else str(length)))
                elif low == "te":
                    self.te_trailers = "trailers" in value.lower()
            elif low == "expect":
                self.expect = value.lower() == "100-continue"
            elif low[:6] != "proxy-":
                if low == "host":
                    twice = self.host is not None
                    self.host = value
                headers.append((name if keep_case else low, value))
        options: set[str] = set()
        if connection:
            options = {token.strip().lower() for token in connection.split(",")}
            if not options <= _OPTIONS:
                headers = without_nominated(headers, options, own)
        if "upgrade" not in options or self.version == "1.0" or "h2c" in protocols(self.upgrade):
            # what is said in HTTP/2 behind the proxy's back would not be under its rules, and HTTP/1.0 knows
            # no upgrades (RFC 9110 section 7.8)
            self.upgrade = ""
        #: whether it says, as it must, for which host it is (RFC 9112 section 3.2)
        self.valid = (
            self.version == "1.0" if self.host is None else bool(HOST.fullmatch(self.host)) and not twice
        )
        if "te" not in options:
            self.te_trailers = False  # RFC 9110 section 10.1.4: a sender of TE names it there
        self.lines = headers

    def changed(self, headers: HeaderList) -> RequestHeaders:
        """The same request with other headers."""
        other = RequestHeaders((), False)
        other.version, other.host, other.valid = self.version, self.host, self.valid
        other.upgrade, other.expect, other.te_trailers = self.upgrade, self.expect, self.te_trailers
        other.measured = self.measured
        other.lines = headers
        return other

    def with_host(self, host: str, keep_case: bool) -> RequestHeaders:
        """The same request for another host."""
        other = self.changed(with_host(self.lines, host, keep_case))
        other.host = host
        other.valid = self.valid and HOST.fullmatch(host) is not None
        return other

    @property
    def max_forwards(self) -> int | None:
        """How often it may still be forwarded: its ``Max-Forwards``, where it has one."""
        found = [value for name, value in self.lines if name.lower() == "max-forwards"]
        if len(found) != 1 or not (found[0].isascii() and found[0].isdigit() and len(found[0]) < 10):
            return None
        return int(found[0])

    def decremented(self) -> RequestHeaders:
        """The same request for the next server (RFC 9110 section 7.6.2)."""
        hops = self.max_forwards
        if hops is None:
            return self
        return self.changed([(n, str(hops - 1) if n.lower() == "max-forwards" else v) for n, v in self.lines])

    def without_length(self) -> RequestHeaders:
        """The same request without the announcement of a body."""
        other = self.changed([header for header in self.lines if header[0].lower() != "content-length"])
        other.measured = False
        return other


class ForwardedInfo:
    """Where a request comes from, as far as the proxy knows it."""

    __slots__ = ("address", "host", "own_scheme", "prefix", "scheme", "trusted")

    def __init__(
        self, address: str, scheme: str, own_scheme: str, host: str | None, trusted: bool, prefix: str = ""
    ) -> None:
        """
        :param address: the peer's, as :func:`normal_address` has it; empty on a UNIX socket, whose peers are
            on this machine.
        :param scheme: ``http`` or ``https``, as a trusted peer says.
        :param own_scheme: that of the connection itself.
        :param host: the host and port that it asked for.
        :param trusted: whether what it says of other origins is believed.
        :param prefix: the beginning of the path that the target is not sent, because the program or a table
            of prefixes has removed it.
        """
        self.prefix = prefix.rstrip("/")
        self.address = address or "127.0.0.1"
        self.scheme = scheme if trusted else own_scheme
        self.own_scheme = own_scheme
        self.host = host
        self.trusted = trusted


def upstream_headers(
    request: RequestHeaders, options: Options, target: Target, origin: ForwardedInfo, foreign: bool = False
) -> HeaderList:
    """The headers of the request to the target, except those that frame it.

    :param request: the client's.
    :param foreign: whether a redirect has led to a target other than the one that the options are for.
    """
    headers = request.lines
    if options.change_origin or not origin.host:
        headers = with_host(headers, target.authority, options.preserve_header_key_case)
        if request.upgrade and origin.host:
            headers = _with_own_origin(headers, origin.host, target)
    if options.xfwd:
        headers = _x_forwarded(headers, options, origin)
    if options.forwarded:
        headers = _forwarded(headers, options, origin)
    if options.via:
        headers = with_via(headers, options, request.version)
    if options.set_headers and not foreign:
        headers = [header for header in headers if header[0].lower() not in options.set_headers]
        headers += options.set_headers.values()
    return headers


def _with_own_origin(headers: HeaderList, host: str, target: Target) -> HeaderList:
    """The headers of an upgrade whose Host was changed: an ``Origin`` of the same host is changed with it.

    Many servers accept a WebSocket only from their own pages (RFC 6455 section 10.2), and compare the two
    headers for that. The origin of another host stays, so that they can refuse it.
    """
    return [
        (name, target.origin)
        if name.lower() == "origin" and value.lower().partition("://")[2] == host.lower()
        else (name, value)
        for name, value in headers
    ]


def with_host(headers: HeaderList, host: str, keep_case: bool) -> HeaderList:
    """The headers with another Host."""
    headers = [header for header in headers if header[0].lower() != "host"]
    headers.insert(0, ("Host" if keep_case else "host", host))
    return headers


def _take(headers: HeaderList, *names: str) -> tuple[HeaderList, dict[str, str]]:
    """The headers without those, and what they said."""
    rest = []
    taken: dict[str, str] = {}
    for name, value in headers:
        low = name.lower()
        if low in names:
            taken[low] = f"{taken[low]}, {value}" if low in taken else value
        else:
            rest.append((name, value))
    return rest, taken


def _x_forwarded(headers: HeaderList, options: Options, origin: ForwardedInfo) -> HeaderList:
    """``X-Forwarded-*``, behind what a trusted client, such as a web server in front, has written."""
    appends = origin.trusted and options.xfwd == APPEND
    scheme = origin.scheme if appends else origin.own_scheme
    port = PORT.search(origin.host or "")
    said = {
        "X-Forwarded-For": origin.address,
        "X-Forwarded-Port": port[1] if port else "443" if scheme == "https" else "80",
        "X-Forwarded-Proto": scheme,
        "X-Forwarded-Host": origin.host or "",
        "X-Forwarded-Prefix": quote(origin.prefix, safe="/:@!$&'()*+,;=~-._", encoding="latin-1"),
    }
    headers, before = _take(headers, *(name.lower() for name in said))
    if not appends:
        before = {}
    for name, own in said.items():
        low = name.lower()
        value = own
        if low == "x-forwarded-prefix":
            value = before.get(low, "").rstrip("/") + own
        elif low in before:
            value = before[low] if low == "x-forwarded-host" else f"{before[low]}, {own}"
        if value:
            headers.append((name if options.preserve_header_key_case else low, value))
    return headers


def _forwarded(headers: HeaderList, options: Options, origin: ForwardedInfo) -> HeaderList:
    """RFC 7239's ``Forwarded``."""
    address = f'"[{origin.address}]"' if ":" in origin.address else origin.address
    value = f"for={address}"
    if origin.host:
        value += f";host={quote_header_value(origin.host)}"
    appends = origin.trusted and options.forwarded == APPEND
    value += f";proto={origin.scheme if appends else origin.own_scheme}"
    headers, before = _take(headers, "forwarded")
    if before and appends:
        value = f"{before['forwarded']}, {value}"
    return [*headers, ("Forwarded" if options.preserve_header_key_case else "forwarded", value)]


def with_via(headers: HeaderList, options: Options, version: str) -> HeaderList:
    """``Via``, behind what is there (RFC 9110 section 7.6.3).

    :param version: in which the message was received.
    """
    headers, before = _take(headers, "via")
    value = f"{version} {options.via}"
    if before:
        value = f"{before['via']}, {value}"
    return [*headers, ("Via" if options.preserve_header_key_case else "via", value)]


def normal_address(text: str) -> str:
    """An IP address in its usual form, or ``unknown`` (RFC 7239 section 6.3) for what is not one.

    :param text: ``REMOTE_ADDR``, which a server or a program may have taken from anywhere.
    """
    try:
        # an IPv6 zone means something on this machine only, and may be any text
        return str(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        return UNKNOWN


def environ_headers(environ: dict[Any, Any], known: Collection[str] = ()) -> HeaderList:
    """The headers of a WSGI request; their order, letter case and repetition are lost.

    :param known: keys of the environ that are left out.
    :raises BadRequestBody: when one of them cannot be sent.
    """
    headers = []
    for key, value in environ.items():
        if key[:5] == "HTTP_" and isinstance(value, str) and key not in known:
            headers.append((key[5:].replace("_", "-").title(), value))
    for key, name in ("CONTENT_TYPE", "Content-Type"), ("CONTENT_LENGTH", "Content-Length"):
        if environ.get(key) and key not in known:
            headers.append((name, environ[key]))
    for name, value in headers:
        # an application, or a server that is not ours, has had them
        if not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise BadRequestBody(
                f"the request's header {name[:40]!r} holds a character that a header must not have"
            )
    return headers


def present_headers(environ: dict[Any, Any], came: HeaderList | None) -> HeaderList:
    """The headers of a WSGI request as the program has left them, in the client's order where that is known.

    :param came: the headers as the client has sent them; ``None`` when the server does not tell.
    :raises BadRequestBody: when one of them cannot be sent.
    """
    if came is None:
        return environ_headers(environ)
    joined: dict[str, str] = {}
    for name, value in came:
        key = _key(name)
        joined[key] = f"{joined[key]},{value}" if key in joined else value
    has = {key: value for key, value in environ.items() if key[:5] == "HTTP_" or key in joined}
    for key in _CONTENT:
        if key not in joined and environ.get(key):
            has[key] = environ[key]
    if has == joined:
        return came
    same = {key for key, value in joined.items() if has.get(key) == value}
    written = {_key(name): (name, value) for name, value in environ_headers(environ, same)}
    headers = []
    for name, value in came:
        key = _key(name)
        if key in same:
            headers.append((name, value))
        elif key in written:
            headers.append((name, written.pop(key)[1]))
    return headers + list(written.values())


def _key(name: str) -> str:
    """Where a header is in an environ."""
    key = name.upper().replace("-", "_")
    return key if key in _CONTENT else "HTTP_" + key
