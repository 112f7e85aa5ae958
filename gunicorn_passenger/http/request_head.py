"""Reads a request's header section: bytes in, a WSGI environ out, or one of gunicorn's errors.

Process: a serving process.
Never: touch a socket, or accept what gunicorn's own parser refuses.

Two parsers work together. gunicorn's Python parser has the rules, for every setting. A C parser
(``gunicorn_h1c``) is several times faster, and accepts less or more in places. So a header section goes to
the C parser first, and its result is used only where the two are known to agree. In all other cases, errors
included, gunicorn's parser decides. A third set of rules does not exist:

- what the C parser refuses is read again by gunicorn's;
- what it accepts although gunicorn would not (a second space in the request line, a target outside
  ASCII) is caught by comparing lengths;
- what needs a policy (names with an underscore, expectations, transfer codings other than chunked,
  repeated or contradicting scheme headers) is left to gunicorn's parser.

Most clients send the same headers with every request of a connection. What was found in them is a
:class:`ParsedHead`, which the connection keeps while its client repeats them.
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

from gunicorn_passenger.http.c_parser import c_parser_for
from gunicorn_passenger.http.chunked import CHUNKED, check_lines
from gunicorn_passenger.http.grammar import AUTHORITY, CONTROL_IN_TARGET, CONTROL_IN_VALUE, MAX_LENGTH
from gunicorn_passenger.http.gunicorn_request import GunicornRequest

#: How many request lines are cached, and how many bytes a cached one has at most.
_REMEMBER = 1000
_SHORT = 100

#: A number of so many decimal digits is always below :data:`.grammar.MAX_LENGTH`.
_SAFE_DIGITS = 18
#: a header name with an underscore
_UNDERSCORE = re.compile(rb"\n[^:\n]*_")
#: the smallest header section
_SMALLEST = b"GET / HTTP/1.1\r\n\r\n"
#: The length of ``HTTP/1.1``, at the end of a request line.
_VERSION = 8


class RequestFailed(Exception):
    """A request was read, but no environ can be made of it: a hook raised, or ``SCRIPT_NAME`` is wrong."""

    def __init__(self, request: Any, cause: Exception) -> None:
        """
        :param request: gunicorn's request object.
        """
        super().__init__("the request cannot be passed to the application")
        self.request = request
        self.cause = cause


class _NoSocket:
    """Stands in for the client's socket while gunicorn makes the environ: gunicorn must not write to it."""

    def send(self, data: bytes) -> int:
        return len(data)


class ConnectionContext:
    """What all requests of a connection share."""

    __slots__ = ("addr", "base", "trusted")

    def __init__(self, addr: Any, base: dict[str, Any], trusted: bool) -> None:
        """
        :param addr: a tuple as ``accept()`` gives it, or an empty string for a UNIX socket.
        :param base: what goes into every environ. A key whose value differs from request to request is there
            with ``None``: a dictionary that has its keys already does not grow when they are set.
        :param trusted: whether gunicorn believes the client's forwarding headers.
        """
        self.addr = addr
        self.base = base
        self.trusted = trusted


class ParsedHead:
    """The bytes behind a request's target, and what was found in them.

    A connection keeps it while its client repeats the same bytes. A client that has repeated them once will
    most likely repeat them again, so only then the environ is kept.
    """

    # class attributes: an object for each request has to be made quickly
    #: the HTTP version and all headers, to the empty line
    block = b""
    #: the environ, without what the method and the target set; ``None`` until the bytes have repeated
    template: dict[str, Any] | None = None
    #: the length of the body in bytes, or ``CHUNKED``
    length = 0
    #: whether the client wants to keep the connection
    persist = False
    #: what the application that handles the connection has decided about these headers: the proxy's plan
    plan: Any = None


#: What a connection has before its first request, and after an idle period.
NO_HEAD = ParsedHead()


class HeadReader:
    """Reads the header sections of one listener's requests."""

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
        :param always_request: whether a hook needs gunicorn's request object for each request.
        :param before: called with that object before the environ is made.
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
        self._scheme_names = frozenset(self._scheme_fields)
        self._drops_underscores = getattr(cfg, "header_map", "drop") == "drop"
        self._forwarders = bool(getattr(cfg, "forwarder_headers", ()))
        #: the C parser, and why it is not used, for the log
        self._parse, self.slow_parser_reason = c_parser_for(cfg, sockname, always_request, self.fields_limit)
        #: how many keys the C parser sets for each request, in addition to those of its headers
        self._own_keys = len(self._parse(_SMALLEST)) if self._parse is not None else 0
        #: request lines that were accepted, and what they set in an environ
        self._lines: dict[bytes, tuple[str, str, str, str]] = {}

    # --- a whole header section ------------------------------------------------------------------

    def read(
        self, head: bytes, context: ConnectionContext, last: ParsedHead
    ) -> tuple[dict[str, Any], ParsedHead, Any]:
        """Read a request up to the first empty line.

        :param head: the bytes, the empty line included.
        :param last: what the method returned for the last request of the connection.
        :returns: the environ (without what belongs to the body and the response); what was found in the
            headers, which is ``last`` when they repeat; and gunicorn's request object where its parser was
            used, otherwise ``None``.
        :raises gunicorn.http.errors.ParseException: when the request is refused.
        :raises RequestFailed: when no environ can be made of it.
        """
        end = head.find(b"\r\n")
        line = head[:end]
        block = head[end - _VERSION if end > _VERSION else 0 :]
        if block != last.block:
            parsed = ParsedHead()
            parsed.block = block
        else:
            parsed = last
            if parsed.template is not None:
                # what was found to be right about these headers still is: it does not depend on the target
                asked = self._lines.get(line) or self._read_request_line(line)
                if asked is not None:
                    environ = parsed.template.copy()
                    (
                        environ["REQUEST_METHOD"],
                        environ["PATH_INFO"],
                        environ["QUERY_STRING"],
                        environ["RAW_URI"],
                    ) = asked
                    return environ, parsed, None
        # If a section is shorter than the limit for one line, none of its lines is longer.
        if self._parse is not None and len(head) <= self.field_limit:
            found = self._parse_with_c(head, line, context, parsed)
            if found is not None:
                if parsed is last:
                    parsed.template = found.copy()
                return found, parsed, None
        return self._parse_with_gunicorn(head, context, parsed)

    def _parse_with_c(
        self, head: bytes, line: bytes, context: ConnectionContext, result: ParsedHead
    ) -> dict[str, Any] | None:
        """The environ by the C parser, where both parsers are known to agree.

        :param line: the request line.
        :param result: gets the length of the body, and whether the connection persists.
        :returns: ``None`` when gunicorn's own parser has to decide.
        """
        try:
            parsed = self._parse(head)
        except Exception:
            # whatever it is, gunicorn's parser says what is wrong, or that nothing is
            return None
        asked = self._lines.get(line) or self._check_request_line(parsed, line)
        if (
            asked is None
            or "HTTP_EXPECT" in parsed
            # If each line has a key, the parser has dropped no name; that is quicker to see. (Python counts
            # two bytes in less time than one.)
            or (
                b"_" in head
                and len(parsed) - self._own_keys != head.count(b"\r\n") - 2
                and self._minds_underscores(context)
                and _UNDERSCORE.search(head)
            )
            or parsed.pop("_consumed") != len(head)
        ):
            return None

        length = 0
        if "HTTP_TRANSFER_ENCODING" in parsed:
            if parsed["HTTP_TRANSFER_ENCODING"].lower() != "chunked":
                return None
            length = CHUNKED
        elif "CONTENT_LENGTH" in parsed:
            digits = parsed["CONTENT_LENGTH"]
            if not 0 < len(digits) <= _SAFE_DIGITS or (digits[0] == "0" and len(digits) > 1):
                return None
            length = int(digits)

        if context.trusted:
            named = parsed.keys() & self._scheme_names
            if named and not self._set_scheme(parsed, named):
                return None

        environ = context.base.copy()
        environ.update(parsed)
        method, environ["PATH_INFO"], _, environ["RAW_URI"] = asked
        environ["SCRIPT_NAME"] = self.script_name
        if self.unix:
            # as gunicorn does it: the Host header names the server where no address does
            host = parsed.get("HTTP_HOST")
            if host:
                environ["SERVER_NAME"], colon, port = host.partition(":")
                if colon:
                    environ["SERVER_PORT"] = port.partition(":")[0]
                else:
                    environ["SERVER_PORT"] = "443" if environ["wsgi.url_scheme"] == "https" else "80"
            else:
                environ["SERVER_NAME"] = self.sockname
                environ["SERVER_PORT"] = ""

        persist: bool = parsed["SERVER_PROTOCOL"] == "HTTP/1.1"
        if "HTTP_CONNECTION" in parsed:
            connection = parsed["HTTP_CONNECTION"].lower()
            if persist:
                persist = not _closes(connection)
            elif "," in connection:
                return None
            else:
                persist = connection == "keep-alive"
        result.length = length
        # what follows CONNECT is tunnel data (RFC 9931 section 8)
        result.persist = persist and method != "CONNECT"
        return environ

    def _check_request_line(self, parsed: dict[str, Any], line: bytes) -> tuple[str, str, str, str] | None:
        """What a request line says, where both parsers are known to agree about it.

        It is cached where it is likely to come again.

        :param parsed: by the C parser.
        :returns: method, path without ``SCRIPT_NAME``, query, and the target as it came.
        """
        path: str = parsed["PATH_INFO"]
        query: str = parsed["QUERY_STRING"]
        uri = f"{path}?{query}" if query else path
        method: str = parsed["REQUEST_METHOD"]
        # method SP uri SP "HTTP/1.1": with one more space, an empty line before it or a lone "?", the line
        # would be longer than that
        if (
            len(method) + len(uri) + 2 + _VERSION != len(line)
            or len(line) > self.line_limit > 0
            or path[:1] != "/"
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
        asked = method, path, query, uri
        # A query is mostly new each time, and may hold what must not be kept. CONNECT is never the same.
        if len(line) <= _SHORT and not query and method != "CONNECT":
            if len(self._lines) >= _REMEMBER:
                self._lines.clear()
            self._lines[line] = asked
        return asked

    def _read_request_line(self, line: bytes) -> tuple[str, str, str, str] | None:
        """What a request line says whose headers are known.

        :returns: ``None`` for a line that has to be read together with its headers.
        """
        if line.startswith(b"CONNECT "):
            return None
        try:
            parsed = self._parse(line + b"\r\n\r\n")
        except Exception:
            return None
        return self._check_request_line(parsed, line)

    def _minds_underscores(self, context: ConnectionContext) -> bool:
        """Whether a setting keeps names with an underscore. The C parser drops them, as gunicorn does."""
        return not self._drops_underscores or (context.trusted and self._forwarders)

    def _set_scheme(self, environ: dict[str, Any], named: set[str]) -> bool:
        """Set the scheme that a trusted client's ``secure_scheme_headers`` give.

        :param named: those of them that the request has, one at least.
        :returns: whether the headers agree.
        """
        scheme = ""
        for name in named:
            value = environ[name]
            if "," in value:
                return False  # the header may have come twice
            before, scheme = scheme, "https" if value == self._scheme_fields[name] else "http"
            if before and before != scheme:
                return False
        environ["wsgi.url_scheme"] = scheme
        return True

    # --- gunicorn's own parser -------------------------------------------------------------------

    def request(self, head: bytes, context: ConnectionContext) -> Any:
        """gunicorn's request object for a header section, which may be incomplete.

        :raises gunicorn.http.errors.ParseException: when it is refused.
        :raises gunicorn.http.errors.NoMoreData: when it is not refused so far, and incomplete.
        """
        return GunicornRequest(self.cfg, IterUnreader([head]), context.addr)

    def _parse_with_gunicorn(
        self, head: bytes, context: ConnectionContext, parsed: ParsedHead
    ) -> tuple[dict[str, Any], ParsedHead, Any]:
        """As :meth:`read`, with gunicorn's own code alone."""
        try:
            request = self.request(head, context)
        except NoMoreData:
            # we see an end where gunicorn sees none: no byte behind it can be trusted
            raise InvalidRequestLine(head[:200].decode("latin-1")) from None
        reader = request.body.reader
        length = CHUNKED if isinstance(reader, message.ChunkedReader) else getattr(reader, "length", 0)
        _check_request(request, length)
        try:
            self._before(request)
            request._expected_100_continue = False  # the body sends it, when the application reads
            _, environ = wsgi.create(request, _NoSocket(), context.addr, self.sockname, self.cfg)
        except Exception as error:
            raise RequestFailed(request, error) from error
        environ.update((name, value) for name, value in context.base.items() if value is not None)
        parsed.length = length
        parsed.persist = not request.should_close() and not _closes(
            environ.get("HTTP_CONNECTION", "").lower()
        )
        return environ, parsed, request

    # --- an incomplete header section ------------------------------------------------------------

    def check_partial(self, data: bytearray, seen: int, context: ConnectionContext) -> None:
        """Refuse as early as possible what can only become a request that is refused.

        :param data: what has come so far; it has no empty line yet.
        :param seen: how many of its bytes were checked before.
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
            # the request line has just become complete: gunicorn, too, checks it at once
            with contextlib.suppress(NoMoreData):
                self.request(bytes(data), context)
        check_lines(data, max(seen, line + 2), len(data))
        if len(data) - data.rfind(b"\r\n") > self.field_limit + 4:
            raise LimitRequestHeaders("limit request headers fields size")
        if len(data) > self.total_limit:
            raise LimitRequestHeaders("max buffer headers")


def _check_request(request: Any, length: int) -> None:
    """Refuse what gunicorn's parser accepts against the RFC, and make the request unambiguous.

    :param request: gunicorn's request object; its headers are changed where the RFC says so.
    :param length: the length of its body, or ``CHUNKED``.
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
        # rewritten, so that every later reader sees the same number
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
    """Whether one of the options of a Connection header is "close" (RFC 9112 section 9.3)."""
    return connection == "close" or (
        "close" in connection and "close" in (option.strip(" \t") for option in connection.split(","))
    )


def _limits(cfg: Any) -> tuple[int, int, int]:
    """gunicorn's limits for the request line (0: none), the number of headers, and the size of one."""
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
