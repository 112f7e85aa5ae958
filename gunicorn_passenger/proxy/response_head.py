"""Parses the response heads and the chunked bodies of upstreams, strictly. Functions without I/O.

Process: any process in which the proxy is mounted.
Never: accept a response that two parsers could frame in two ways, or forward headers that frame it.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from gunicorn.http.errors import (
    ChunkMissingTerminator,
    InvalidChunkSize,
    InvalidHeader,
    LimitRequestHeaders,
)

from gunicorn_passenger.errors import BadResponse
from gunicorn_passenger.http.chunked import TRAILER_LIMIT, ChunkedDecoder, InvalidChunkExtension
from gunicorn_passenger.http.grammar import (
    FIELD_LINE_BYTES,
    FIELD_LINES_BYTES,
    LENIENT_CHUNK_LINE_BYTES,
    RESPONSE_HEAD_BYTES,
    STATUS_LINE_BYTES,
)
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.request_headers import (
    ASIDE,
    ORIGIN,
    HeaderList,
    number_of_bytes,
    without_nominated,
)

#: The most bytes of a response head, and of the line with the size of a chunk.
HEAD_LIMIT = 65536
_LINE_LIMIT = 4096
#: The longest response head that is remembered.
_LONGEST_REMEMBERED = 2048
#: Status codes of responses that have no body (RFC 9110 section 6.4.1), or switch protocols.
_NOT_PLAIN = (101, 204, 304)

#: what servers say about idle connections; RFC 2068 section 19.7.1.1 leaves the parameters open
_KEEP_ALIVE = re.compile(r"(?:^|[,;])[ \t]*timeout=([0-9]{1,6})(?![0-9])", re.IGNORECASE)

# obs-fold, which a proxy replaces by a space (RFC 9112 section 5.2)
_FOLD = re.compile(rb"\r\n[ \t]+")


class ResponseHead:
    """The head of a response: its end-to-end headers, and how its body is framed.

    It does not change after it is made: the next response may have the same.
    """

    __slots__ = (
        "chunked",
        "close",
        "dated",
        "headers",
        "keep_alive",
        "length",
        "line",
        "lines",
        "reason",
        "status",
        "upgrade",
        "version",
        "wire",
    )

    def __init__(self, data: bytes, keep_case: bool) -> None:  # noqa: PLR0915 - one pass over all headers
        """
        :param data: the head, its empty line included.
        :param keep_case: whether names keep their letter case; else they are lower case.
        :raises BadResponse: says why.
        """
        found = RESPONSE_HEAD_BYTES.fullmatch(data) or RESPONSE_HEAD_BYTES.fullmatch(_unfolded(data))
        if found is None:
            raise _malformed(data)
        minor, status, reason, block = found.groups()
        self.status = int(status)
        self.version = "1.0" if minor == b"0" else "1.1"
        self.reason = (reason or b"").decode("latin-1").strip(" \t")
        #: status code and reason
        self.line = f"{self.status} {self.reason}"
        length: int | None = None
        self.chunked = False
        self.upgrade = ""
        #: seconds for which the upstream keeps the connection when it is idle, if it says so
        self.keep_alive: float | None = None
        #: once made: the header lines for the client, if they are sent unchanged, and the whole head
        self.lines: bytes | None = None
        self.wire: bytes | None = None
        #: whether a Date is among the headers
        self.dated = False
        #: whether the upstream closes the connection after it (RFC 9112 section 9.3)
        self.close = minor == b"0"
        headers: HeaderList = []
        connection = ""
        codings: str | None = None
        for line in block.decode("latin-1").split("\r\n"):
            name, colon, value = line.partition(":")
            value = value.strip(" \t")
            low = name.lower()
            if low in ASIDE:
                if low == "content-length":
                    number = _length_in(value)
                    if length is None:
                        length = number
                        headers.append((name if keep_case else low, str(number)))
                    elif length != number:
                        raise BadResponse("it has two Content-Lengths that differ")
                elif low == "connection":
                    connection = f"{connection},{value}" if connection else value
                elif low == "transfer-encoding":
                    codings = value if codings is None else f"{codings},{value}"
                elif low == "upgrade":
                    self.upgrade = f"{self.upgrade}, {value}" if self.upgrade else value
                    if self.status == 426:
                        # what the client has to upgrade to (RFC 9110 section 15.5.22)
                        headers.append((name if keep_case else low, value))
                elif low == "trailer":
                    headers.append((name if keep_case else low, value))
                elif low == "keep-alive" and (seconds := _KEEP_ALIVE.search(value)):
                    self.keep_alive = float(seconds[1])
            elif colon and low[:6] != "proxy-":
                if low == "date":
                    self.dated = True
                headers.append((name if keep_case else low, value))
        if self.status < 200:
            # RFC 9110 section 8.6: an interim response has no body whose length it could give
            headers = [header for header in headers if header[0].lower() != "content-length"]
            length = codings = None
        if codings is not None:
            if codings.lower() != "chunked":
                raise BadResponse(f"its transfer coding is {codings[:40]!r}, not chunked")
            if length is not None:
                raise BadResponse("it has both Transfer-Encoding and Content-Length")
            if self.close:
                raise BadResponse("it has a Transfer-Encoding and is HTTP/1.0")
            self.chunked = True
        if connection:
            options = {token.strip().lower() for token in connection.split(",")}
            if "close" in options:
                self.close = True
            elif "keep-alive" in options:
                self.close = False
            headers = without_nominated(headers, options)
        if self.status == 204 and (length or self.chunked):
            # a server that announces a body here may send it, too, and it would begin the next response
            self.close = True
        self.headers = headers
        self.length = length


def _length_in(value: str) -> int:
    """What a ``Content-Length`` says: one number, which may be repeated (RFC 9110 section 8.6).

    :raises BadResponse: when it is malformed.
    """
    found: int | None = None
    for part in [part.strip(" \t") for part in value.split(",")]:
        number = number_of_bytes(part)
        if number is None:
            raise BadResponse(f"its Content-Length {value[:40]!r} is not a number of bytes below 2**63")
        if found is not None and found != number:
            raise BadResponse("it has two Content-Lengths that differ")
        found = number
    assert found is not None  # what is split has a part
    return found


class RememberedHead(NamedTuple):
    """The last response head of an upstream: its next responses often have the same."""

    data: bytes
    #: whether names keep their letter case in it
    keep_case: bool
    head: ResponseHead


class RemembersHead(Protocol):
    """A :class:`~.pool.Pool`."""

    last_head: RememberedHead | None

    def keep_idle(self, seconds: float | None) -> None:
        """:param seconds: how long the upstream keeps an idle connection, if it says so."""


def parse_response_head(pool: RemembersHead, data: bytes, keep_case: bool) -> ResponseHead:
    """Parse a response head, or return that of the response before, if it has the same bytes.

    :param pool: the pool of that upstream, which keeps the last one.
    :param keep_case: whether names keep their letter case.
    :raises BadResponse: when it is malformed.
    """
    last = pool.last_head
    if last is not None and last.data == data and last.keep_case is keep_case:
        return last.head
    head = ResponseHead(data, keep_case)
    if head.status >= 200:
        pool.keep_idle(head.keep_alive)
    if len(data) < _LONGEST_REMEMBERED:
        pool.last_head = RememberedHead(data, keep_case, head)
    return head


def serialize_headers(headers: HeaderList, status: int) -> bytes:
    """The header lines of a response as the client is sent them.

    :raises gunicorn_passenger.proxy.wire.Unsendable: when one of them holds a line break or the like.
    """
    if status == 204:
        # RFC 9110 section 8.6: no Content-Length with 204
        headers = [header for header in headers if header[0].lower() != "content-length"]
    elif status == 426 and any(name.lower() == "upgrade" for name, _ in headers):
        # RFC 9110 section 7.8: a sender of Upgrade names it in Connection
        headers = [*headers, ("connection", "upgrade")]
    return wire.lines_of(headers)


def wire_head(head: ResponseHead) -> bytes:
    """The head as most clients are sent it, made once.

    :returns: an empty text unless the body is framed by its ``Content-Length`` alone.
    """
    head.wire = b""
    if head.length is not None and head.dated and not head.close and head.status not in _NOT_PLAIN:
        head.lines = head.lines or serialize_headers(head.headers, head.status)
        line = wire.status_line(head.status, head.reason)
        head.wire = line + head.lines + b"Connection: keep-alive\r\n\r\n"
    return head.wire


def _unfolded(data: bytes) -> bytes:
    first, _, rest = data.partition(b"\r\n")
    if rest[:1] in (b" ", b"\t"):
        return b""  # there is no line that it could continue (RFC 9112 section 2.2)
    return first + b"\r\n" + _FOLD.sub(b" ", rest)


def _malformed(data: bytes) -> BadResponse:
    first, _, rest = data.partition(b"\r\n")
    if not STATUS_LINE_BYTES.fullmatch(first):
        return BadResponse(f"it begins with {first[:40]!r}, which is not a status line of HTTP/1.x")
    for line in rest.split(b"\r\n"):
        if line and not FIELD_LINE_BYTES.fullmatch(line):
            return BadResponse(f"it has a malformed header line: {line[:40]!r}")
    return BadResponse("its header section is malformed")


class ResponseChunks(ChunkedDecoder):
    """The chunked body of a response."""

    __slots__ = ("trailers",)

    def __init__(self) -> None:
        super().__init__(_LINE_LIMIT, LENIENT_CHUNK_LINE_BYTES)
        #: the trailers that may be forwarded
        self.trailers: HeaderList = []

    def feed(self, data: bytes) -> bytes:
        """
        :returns: the part of the body in these bytes.
        :raises BadResponse: when it is malformed.
        """
        try:
            content = super().feed(data)
        except ChunkMissingTerminator:
            raise BadResponse("a chunk of its body does not end where it should") from None
        except (InvalidChunkSize, InvalidChunkExtension) as error:
            raise BadResponse(f"a line with a chunk's size is malformed: {error}") from None
        except LimitRequestHeaders:
            raise BadResponse(f"its trailers have more than {TRAILER_LIMIT} bytes") from None
        except InvalidHeader:
            raise BadResponse("its trailers are malformed") from None
        if self.trailer_section:
            self._take_trailers()
        return content

    def _take_trailers(self) -> None:
        section, self.trailer_section = self.trailer_section, b""
        if not FIELD_LINES_BYTES.fullmatch(section):
            raise BadResponse("its trailers are malformed")
        for line in section.decode("latin-1").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            if is_trailer(name):
                self.trailers.append((name, value.strip(" \t")))


#: Headers that frame, route or authenticate must not come in trailers (RFC 9110 section 6.5.1).
NO_TRAILER = (
    ASIDE
    | ORIGIN
    | {
        "host",
        "expect",
        "authorization",
        "cookie",
        "set-cookie",
        "content-encoding",
        "content-type",
        "content-range",
        "cache-control",
        "max-forwards",
        "range",
        "age",
        "date",
        "expires",
        "location",
        "vary",
        "www-authenticate",
    }
)


def is_trailer(name: str) -> bool:
    """Whether a header may be forwarded as a trailer."""
    low = name.lower()
    return low not in NO_TRAILER and low[:6] != "proxy-" and "_" not in low
