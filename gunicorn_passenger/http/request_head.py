"""Reading a request's head: bytes in, a WSGI environ out, or one of gunicorn's errors.

Process: a worker, or plain Python.
Never: touch a socket, or let through what gunicorn's own parser would refuse.

Two parsers agree here. gunicorn's Python parser has the rules, for every setting. A C parser
(``gunicorn_h1c``) is several times faster and accepts less or more in places. So a head goes to the
C parser first, and what comes out is used only where both are known to agree; for all else, errors
included, gunicorn's parser has the last word. There is no third set of rules:

- what the C parser refuses is read again by gunicorn's;
- what it accepts although gunicorn would not (a second space in the request line, a target outside
  ASCII) is caught by comparing lengths;
- what needs a policy (names with an underscore, expectations, transfer codings other than chunked,
  repeated or contradicting scheme fields) is left to gunicorn's parser.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

from gunicorn.http import message, wsgi
from gunicorn.http.errors import (
    InvalidHeader,
    InvalidRequestLine,
    LimitRequestHeaders,
    LimitRequestLine,
    NoMoreData,
)
from gunicorn.http.unreader import IterUnreader

from gunicorn_passenger.http.chunked import CHUNKED, check_lines
from gunicorn_passenger.http.grammar import AUTHORITY, CONTROL_IN_TARGET, CONTROL_IN_VALUE, MAX_LENGTH

try:
    import gunicorn_h1c
except ImportError:
    gunicorn_h1c = None

#: How many fields the C parser takes; what has more, or a line longer than it takes, is gunicorn's.
_C_FIELDS = 100

#: How many first lines are remembered, and how long they may be.
_REMEMBER = 1000
_SHORT = 100

#: so many decimal digits always are at most :data:`.grammar.MAX_LENGTH`
_SAFE_DIGITS = 18

#: a field name with an underscore
_UNDERSCORE = re.compile(rb"\n[^:\n]*_")

#: gunicorn's compatibility settings, of which the C parser knows nothing; off unless set.
_COMPATIBILITY = (
    "permit_obsolete_folding",
    "strip_header_spaces",
    "permit_unconventional_http_method",
    "permit_unconventional_http_version",
    "casefold_http_method",
)

#: Heads that must be refused (RFC 9112 sections 2.2, 5.1, 5.2 and 6.3); older versions of the C
#: parser accept some of them, and are not used then.
_MUST_BE_REFUSED = (
    b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (_C_FIELDS + 1) + b"\r\n",
)


def c_parser() -> Any:
    """The C parser, where it is there and refuses what it must; else ``None``."""
    parse = getattr(gunicorn_h1c, "parse_to_wsgi_environ", None)
    for head in _MUST_BE_REFUSED:
        try:
            if parse is None or parse(head):
                return None
        except gunicorn_h1c.ParseError:
            continue
    return parse


class _GunicornRequest(message.Request):
    """gunicorn's request, always read by its Python parser."""

    @property
    def _use_fast(self) -> bool:
        return False

    @_use_fast.setter
    def _use_fast(self, value: bool) -> None:
        pass


class _NoSocket:
    """Stands for the client's socket while gunicorn makes the environ: it may not write to it."""

    def send(self, data: bytes) -> int:
        return len(data)


class ConnectionContext:
    """What a head is read against: who sent it, and what every environ of its connection holds."""

    __slots__ = (
        "addr",
        "base",
        "fields",
        "host",
        "known",
        "length",
        "name",
        "persist",
        "port",
        "scheme",
        "trusted",
    )

    def __init__(self, addr: Any, base: dict[str, Any], trusted: bool) -> None:
        """
        :param addr: a tuple as ``accept()`` gives it, or an empty string for a UNIX socket.
        :param base: what goes into every environ. A key whose value belongs to each request is there with
            ``None``: a dictionary that has its keys is not made larger by setting them.
        :param trusted: whether gunicorn believes its forwarding headers.
        """
        self.addr = addr
        self.base = base
        self.trusted = trusted
        #: the last request's Host and scheme, and what they make of the server's name and port
        self.host = self.scheme = self.name = self.port = ""
        self.forget()

    def forget(self) -> None:
        """It pauses: what is remembered of its last request is not worth the memory."""
        #: The fields of the last request as they came, from the end of its first line on. When they came
        #: twice: the environ that was made of them, the length of the body and whether the connection is
        #: kept.
        self.fields = b""
        self.known: dict[str, Any] | None = None
        self.length = 0
        self.persist = False

    def set_host(self, host: str, scheme: str) -> None:
        """Split a Host field: most connections send the same with every request."""
        self.host, self.scheme = host, scheme
        self.name, colon, port = host.partition(":")
        self.port = port.partition(":")[0] if colon else ("443" if scheme == "https" else "80")


class HeadReader:
    """Reads the heads that come in on one listener."""

    def __init__(
        self,
        cfg: Any,
        sockname: Any,
        always_request: bool = False,
        before: Callable[[Any], object] = lambda request: None,
    ) -> None:
        """
        :param cfg: gunicorn's configuration.
        :param sockname: the listener's name; a string for a UNIX socket.
        :param always_request: whether a hook or a log wants gunicorn's request object each time.
        :param before: called with that object before the environ is made of it.
        """
        self._before = before
        self.cfg = cfg
        self.sockname = sockname
        self.unix = isinstance(sockname, str)
        self.script_name = os.environ.get("SCRIPT_NAME", "")
        self.line_limit, self.fields_limit, self.field_limit = _limits(cfg)
        self.total_limit = self.fields_limit * (self.field_limit + 2) + 4 + (self.line_limit or 1 << 20)
        self._scheme_fields = {
            "HTTP_" + name.replace("-", "_"): value for name, value in cfg.secure_scheme_headers.items()
        }
        self._drops_underscores = getattr(cfg, "header_map", "drop") == "drop"
        self._forwarders = bool(getattr(cfg, "forwarder_headers", ()))
        #: why the C parser is not used here, for the log
        self.slow_parser_reason = ""
        flags = [name for name in _COMPATIBILITY if getattr(cfg, name, False)]
        self._parse = c_parser()
        if self._parse is None:
            self.slow_parser_reason = "gunicorn_h1c is missing or older than 0.6.10"
        elif getattr(cfg, "http_parser", "auto") == "python":
            self.slow_parser_reason = "http_parser is python"
        elif flags:
            self.slow_parser_reason = f"{flags[0]} is set"
        elif always_request:
            self.slow_parser_reason = "pre_request or post_request is set"
        elif self.fields_limit < _C_FIELDS:
            self.slow_parser_reason = f"limit_request_fields is below {_C_FIELDS}"
        elif not isinstance(sockname, tuple) and (not self.unix or ":" in sockname):
            self.slow_parser_reason = "the socket's name is not a plain path"
        if self.slow_parser_reason:
            self._parse = None
        #: first lines that were accepted: what they set in an environ
        self._lines: dict[bytes, tuple[str, str, str, str]] = {}

    # --- a whole head ----------------------------------------------------------------------------

    def read(  # noqa: PLR0915 - the rules of what is read fast, one after the other
        self, head: bytes, peer: ConnectionContext
    ) -> tuple[dict[str, Any], int, bool, Any]:
        """A head that ends with the first empty line in it.

        :returns: the environ (all but what belongs to the body and the response), the length of
            the body or ``CHUNKED``, whether the client wants the connection kept, and gunicorn's
            request object where its parser was used, else ``None``.
        :raises gunicorn.http.errors.ParseException: when it is refused.
        """
        parse = self._parse
        # One line longer than the limit is not in a head that is shorter than the limit.
        if parse is None or len(head) > self.field_limit:
            return self.parse_with_gunicorn(head, peer)
        line = head.find(b"\r\n")
        fields = head[line:]
        again = fields == peer.fields
        if again and peer.known is not None:
            # Most clients send the same fields with every request of a connection, and what was found to be
            # right about them still is: nothing in them depends on a first line of HTTP/1.1.
            asked = self._lines.get(head[:line]) or self._asked(head[:line])
            if asked is not None:
                environ = peer.known.copy()
                (
                    environ["REQUEST_METHOD"],
                    environ["PATH_INFO"],
                    environ["QUERY_STRING"],
                    environ["RAW_URI"],
                ) = asked
                return environ, peer.length, peer.persist, None
        try:
            environ = parse(head)
        except Exception:
            # whatever it is, gunicorn's parser says what is wrong, or that nothing is
            return self.parse_with_gunicorn(head, peer)
        asked = self._of_line(environ, line)
        if (
            asked is None
            or environ.pop("_consumed") != len(head)
            or "HTTP_EXPECT" in environ
            # find() and not "in", which first tries to take the bytes for a number
            or (head.find(b"_") >= 0 and self._minds_underscores(peer) and _UNDERSCORE.search(head))
        ):
            return self.parse_with_gunicorn(head, peer)

        length = 0
        if "HTTP_TRANSFER_ENCODING" in environ:
            if environ["HTTP_TRANSFER_ENCODING"].lower() != "chunked":
                return self.parse_with_gunicorn(head, peer)
            length = CHUNKED
        elif "CONTENT_LENGTH" in environ:
            digits = environ["CONTENT_LENGTH"]
            if not 0 < len(digits) <= _SAFE_DIGITS or (digits[0] == "0" and len(digits) > 1):
                return self.parse_with_gunicorn(head, peer)
            length = int(digits)

        if (
            peer.trusted
            and not environ.keys().isdisjoint(self._scheme_fields)
            and not self._set_scheme(environ)
        ):
            return self.parse_with_gunicorn(head, peer)

        parsed, environ = environ, peer.base.copy()
        environ.update(parsed)
        method, environ["PATH_INFO"], _, environ["RAW_URI"] = asked
        environ["SCRIPT_NAME"] = self.script_name
        if self.unix:
            # gunicorn's way: the Host field names the server where no address does
            host = environ.get("HTTP_HOST")
            if host:
                scheme = environ["wsgi.url_scheme"]
                if host != peer.host or scheme != peer.scheme:
                    peer.set_host(host, scheme)
                environ["SERVER_NAME"] = peer.name
                environ["SERVER_PORT"] = peer.port
            else:
                environ["SERVER_NAME"] = self.sockname
                environ["SERVER_PORT"] = ""

        persist = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        if "HTTP_CONNECTION" in environ:
            connection = environ["HTTP_CONNECTION"].lower()
            if persist:
                persist = not _closes(connection)
            elif "," in connection:
                return self.parse_with_gunicorn(head, peer)
            else:
                persist = connection == "keep-alive"
        if method == "CONNECT":
            persist = False  # what follows is tunnel data (RFC 9931 section 8)
        if not again:
            peer.fields = fields
            peer.known = None
        elif environ["SERVER_PROTOCOL"] == "HTTP/1.1":
            peer.known = environ.copy()
            peer.length = length
            peer.persist = persist
        return environ, length, persist, None

    def _of_line(self, parsed: dict[str, Any], line: int) -> tuple[str, str, str, str] | None:
        """What a first line says, where both parsers are known to agree about it.

        :param parsed: by the C parser.
        :param line: the length of the line.
        :returns: method, path without the name of the script, query, and both as they came.
        """
        path: str = parsed["PATH_INFO"]
        query: str = parsed["QUERY_STRING"]
        uri = f"{path}?{query}" if query else path
        method: str = parsed["REQUEST_METHOD"]
        # method SP uri SP "HTTP/1.1": with one space more, an empty line before it or a lone "?",
        # the line would be longer than that
        if (
            len(method) + len(uri) + 10 != line
            or line > self.line_limit > 0
            or path[0] != "/"
            or path[1:2] == "/"
            or not uri.isascii()
            or "#" in uri
        ):
            return None
        if self.script_name:
            if not path.startswith(self.script_name):
                return None
            path = path[len(self.script_name) :]
        if "%" in path:
            path = unquote_to_bytes(path).decode("latin-1")
        return method, path, query, uri

    def _asked(self, line: bytes) -> tuple[str, str, str, str] | None:
        """What the first line of a head says whose fields are known; remembered where it is likely to return.

        :returns: nothing for one that has to be read with its fields.
        """
        if not line.endswith(b" HTTP/1.1") or line.startswith(b"CONNECT "):
            return None
        try:
            parsed = self._parse(line + b"\r\n\r\n")
        except Exception:
            return None
        asked = self._of_line(parsed, len(line))
        # a query is mostly new each time, and may hold what must not be kept
        if asked is not None and len(line) <= _SHORT and b"?" not in line:
            if len(self._lines) >= _REMEMBER:
                self._lines.clear()
            self._lines[line] = asked
        return asked

    def _minds_underscores(self, peer: ConnectionContext) -> bool:
        """The C parser drops names with an underscore. So does gunicorn, unless told otherwise."""
        return not self._drops_underscores or (peer.trusted and self._forwarders)

    def _set_scheme(self, environ: dict[str, Any]) -> bool:
        """``secure_scheme_headers`` of a trusted peer.

        :returns: whether they say one thing.
        """
        schemes = set()
        for name, secure in self._scheme_fields.items():
            value = environ.get(name)
            if value is None:
                continue
            if "," in value:
                return False  # the field may have been there twice
            schemes.add("https" if value == secure else "http")
        if len(schemes) != 1:
            return False
        environ["wsgi.url_scheme"] = schemes.pop()
        return True

    # --- by gunicorn's own parser ----------------------------------------------------------------

    def request(self, head: bytes, peer: ConnectionContext) -> Any:
        """gunicorn's request object for a head, which need not be a whole one.

        :raises gunicorn.http.errors.ParseException: when it is refused.
        :raises gunicorn.http.errors.NoMoreData: when it is not refused so far, and not whole.
        """
        return _GunicornRequest(self.cfg, IterUnreader([head]), peer.addr)

    def parse_with_gunicorn(
        self, head: bytes, peer: ConnectionContext
    ) -> tuple[dict[str, Any], int, bool, Any]:
        """As :meth:`read`, all of it by gunicorn's own code."""
        try:
            request = self.request(head, peer)
        except NoMoreData:
            # an end that we see and it does not: nothing can be trusted to follow
            raise InvalidRequestLine(head[:200].decode("latin-1")) from None
        reader = request.body.reader
        length = CHUNKED if isinstance(reader, message.ChunkedReader) else getattr(reader, "length", 0)
        _check_request(request, length)
        self._before(request)
        request._expected_100_continue = False  # the body asks for it, when it is read
        _, environ = wsgi.create(request, _NoSocket(), peer.addr, self.sockname, self.cfg)
        environ.update((name, value) for name, value in peer.base.items() if value is not None)
        persist = not request.should_close() and not _closes(environ.get("HTTP_CONNECTION", "").lower())
        return environ, length, persist, request

    # --- less than a head ------------------------------------------------------------------------

    def check_partial(self, data: bytearray, seen: int, peer: ConnectionContext) -> None:
        """Refuse as early as possible what can only become a refused head.

        :param data: what has come in so far; there is no empty line in it.
        :param seen: how much of it has been checked before.
        :raises gunicorn.http.errors.ParseException: when it is refused.
        """
        # RFC 9112 section 2.2: lines end with CRLF
        start = 2 if data.startswith(b"\r\n") else 0
        line = data.find(b"\r\n", start)
        if line < 0:
            if data.find(b"\n", start) >= 0:
                raise InvalidRequestLine("bare LF as line terminator")
            if len(data) - start - 2 > (self.line_limit or self.total_limit):
                raise LimitRequestLine(len(data), self.line_limit or self.total_limit)
            return
        if line + 2 > seen:
            # the request line has just been completed: gunicorn does not wait to judge it, either
            with contextlib.suppress(NoMoreData):
                self.request(bytes(data), peer)
        check_lines(data, max(seen, line + 2), len(data))
        if len(data) - data.rfind(b"\r\n") > self.field_limit + 4:
            raise LimitRequestHeaders("limit request headers fields size")
        if len(data) > self.total_limit:
            raise LimitRequestHeaders("max buffer headers")


def _check_request(request: Any, length: int) -> None:
    """Refuse what gunicorn's parser lets through, and make the request say one thing.

    :param request: gunicorn's request object; its headers are changed where the RFC says so.
    :param length: of its body, or ``CHUNKED``.
    :raises gunicorn.http.errors.ParseException: when the request is refused.
    """
    uri = request.uri
    if CONTROL_IN_TARGET.search(uri):
        raise InvalidRequestLine(uri)
    for name, value in request.headers:
        if CONTROL_IN_VALUE.search(value):
            raise InvalidHeader(name, req=request)
    if length > MAX_LENGTH:
        raise InvalidHeader("CONTENT-LENGTH", req=request)
    if length != CHUNKED:
        # written anew, so that everyone behind this parser reads the same number
        request.headers = [
            (name, str(length) if name == "CONTENT-LENGTH" else value) for name, value in request.headers
        ]
    if uri[:1] != "/" and "://" in uri:
        scheme, _, rest = uri.partition("://")
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if (
            scheme.lower() not in ("http", "https")
            or request.method == "CONNECT"
            or not AUTHORITY.fullmatch(authority)
        ):
            raise InvalidRequestLine(uri)
        # RFC 9112 section 3.2.2: the host of the target counts, and a Host header is ignored
        others = [(name, value) for name, value in request.headers if name != "HOST"]
        request.headers = [("HOST", authority), *others]


def _closes(connection: str) -> bool:
    """Whether one of the options of a Connection field is "close" (RFC 9112 section 9.3)."""
    return "close" in connection and "close" in (option.strip(" \t") for option in connection.split(","))


def _limits(cfg: Any) -> tuple[int, int, int]:
    """gunicorn's limits of request line (0: none), number of fields, and field."""
    line = cfg.limit_request_line
    if line < 0 or line >= message.MAX_REQUEST_LINE:
        line = message.MAX_REQUEST_LINE
    fields = cfg.limit_request_fields
    if fields <= 0 or fields > message.MAX_HEADERS:
        fields = message.MAX_HEADERS
    field = cfg.limit_request_field_size
    if field <= 0:
        field = message.DEFAULT_MAX_HEADERFIELD_SIZE
    return line, fields, field
