"""What a target sends, read strictly: the heads and the chunks of its answers. Functions without I/O.

Runs in: wherever the proxy is mounted. Must never: let through an answer that two readers could cut in
two ways, or hand on what frames it.
"""

from __future__ import annotations

import re
from typing import Any

from gunicorn_passenger.errors import BadResponse
from gunicorn_passenger.proxy.request_headers import (
    ASIDE,
    ORIGIN,
    HeaderList,
    number_of_bytes,
    without_nominated,
)

#: Bytes that the head of an answer may have, and the line of a chunk's size, and all trailers.
HEAD_LIMIT = 65536
_LINE_LIMIT = 4096
#: The longest head of an answer that is remembered.
_MEMO = 2048
_TRAILER_LIMIT = 65536

# RFC 9112 sections 4 and 5: status-line = HTTP-version SP status-code SP [ reason-phrase ], and many
# servers leave out the second SP; field-line = field-name ":" OWS field-value OWS
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n"
    rb"((?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
)
# obs-fold, which a proxy replaces by a space (RFC 9112 section 5.2)
_FOLD = re.compile(rb"\r\n[ \t]+")
_FIELDS = re.compile(rb"((?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*)")
# RFC 9112 section 7.1: chunk = chunk-size [ chunk-ext ] CRLF
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")


class ResponseHead:
    """The head of an answer: its end-to-end fields, and how its body is framed.

    It is not changed once it is made: the next answer may have the same.
    """

    __slots__ = (
        "chunked",
        "close",
        "dated",
        "fields",
        "length",
        "line",
        "lines",
        "reason",
        "status",
        "upgrade",
        "version",
        "wire",
    )

    def __init__(self, data: bytes, keep_case: bool) -> None:  # noqa: PLR0915 - one pass over all fields
        """
        :param data: the head, its empty line included.
        :param keep_case: whether names keep their letter case; else they are lower case.
        :raises BadResponse: says why.
        """
        found = _HEAD.fullmatch(data) or _HEAD.fullmatch(_unfolded(data))
        if found is None:
            raise _malformed(data)
        minor, status, reason, block = found.groups()
        self.status = int(status)
        self.version = "1.0" if minor == b"0" else "1.1"
        self.reason = (reason or b"").decode("latin-1").strip(" \t")
        #: code and reason
        self.line = f"{self.status} {self.reason}"
        self.length: int | None = None
        self.chunked = False
        self.upgrade = ""
        #: the fields as they are sent, once that was made, and all of it
        self.lines: bytes | None = None
        self.wire: bytes | None = None
        self.dated = False
        #: whether the target closes the connection after it (RFC 9112 section 9.3)
        self.close = minor == b"0"
        fields: HeaderList = []
        connection = ""
        codings: str | None = None
        for line in block.decode("latin-1").split("\r\n"):
            name, colon, value = line.partition(":")
            value = value.strip(" \t")
            low = name.lower()
            if low in ASIDE:
                if low == "content-length":
                    before = self.length
                    self._take_length(value)
                    if before is None:
                        fields.append((name if keep_case else low, str(self.length)))
                elif low == "connection":
                    connection = f"{connection},{value}" if connection else value
                elif low == "transfer-encoding":
                    codings = value if codings is None else f"{codings},{value}"
                elif low == "upgrade":
                    self.upgrade = f"{self.upgrade}, {value}" if self.upgrade else value
                    if self.status == 426:
                        # what the client has to upgrade to (RFC 9110 section 15.5.22)
                        fields.append((name if keep_case else low, value))
                elif low == "trailer":
                    fields.append((name if keep_case else low, value))
            elif colon and low[:6] != "proxy-":
                if low == "date":
                    self.dated = True
                fields.append((name if keep_case else low, value))
        if self.status < 200:
            # RFC 9110 section 8.6: an interim answer has no body whose length could be told
            fields = [field for field in fields if field[0].lower() != "content-length"]
            self.length = codings = None
        if codings is not None:
            if codings.lower() != "chunked":
                raise BadResponse(f"its transfer coding is {codings[:40]!r}, not chunked")
            if self.length is not None:
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
            fields = without_nominated(fields, options)
        self.fields = fields

    def _take_length(self, value: str) -> None:
        # one number, which may be repeated (RFC 9110 section 8.6)
        for part in [part.strip(" \t") for part in value.split(",")]:
            length = number_of_bytes(part)
            if length is None:
                raise BadResponse(f"its Content-Length {value[:40]!r} is not a number of bytes below 2**63")
            if self.length is not None and self.length != length:
                raise BadResponse("it has two Content-Lengths that differ")
            self.length = length


def parse_response_head(pool: Any, data: bytes, keep_case: bool) -> ResponseHead:
    """The head of an answer: within a second a target's answers often have the same.

    :param pool: the connections to that target, with which it is remembered.
    :param keep_case: whether names keep their letter case.
    :raises BadResponse: when it is none.
    """
    memo = pool.memo
    if memo is not None and memo[0] == data and memo[1] is keep_case:
        known: ResponseHead = memo[2]
        return known
    head = ResponseHead(data, keep_case)
    if len(data) < _MEMO:
        pool.memo = data, keep_case, head
    return head


def _unfolded(data: bytes) -> bytes:
    first, _, rest = data.partition(b"\r\n")
    if rest[:1] in (b" ", b"\t"):
        return b""  # there is no line to which that could belong (RFC 9112 section 2.2)
    return first + b"\r\n" + _FOLD.sub(b" ", rest)


def _malformed(data: bytes) -> BadResponse:
    first, _, rest = data.partition(b"\r\n")
    if not re.fullmatch(rb"HTTP/1\.[01] [1-9][0-9][0-9](?: [\t\x20-\x7e\x80-\xff]*)?", first):
        return BadResponse(f"it begins with {first[:40]!r}, which is no status line of HTTP/1.x")
    for line in rest.split(b"\r\n"):
        if line and not re.fullmatch(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*", line):
            return BadResponse(f"it has a malformed header line: {line[:40]!r}")
    return BadResponse("its head is malformed")


class ChunkedDecoder:
    """Takes a chunked body apart (RFC 9112 section 7.1)."""

    def __init__(self) -> None:
        self._buf = b""
        #: bytes of the present chunk that are still to come
        self._left = 0
        self._between = False
        self._last = False
        self.finished = False
        #: the trailer section, checked
        self.trailers: HeaderList = []

    def feed(self, data: bytes) -> bytes:
        """
        :returns: what of the body came with this.
        :raises BadResponse: when it is malformed.
        """
        if self._left > len(data) and not self._buf:
            self._left -= len(data)
            return data
        buf = self._buf + data if self._buf else data
        at = 0
        parts = []
        while not self.finished:
            if self._left:
                piece = buf[at : at + self._left]
                if not piece:
                    break
                parts.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._between = True
            if self._between:
                end = buf[at : at + 2]
                if end == b"\r\n":
                    at += 2
                    self._between = False
                elif b"\r\n".startswith(end):
                    break
                else:
                    raise BadResponse("a chunk of its body does not end where it should")
            if self._last:
                at = self._trailer(buf, at)
                break
            end_of_line = buf.find(b"\n", at, at + _LINE_LIMIT)
            if end_of_line < 0:
                if len(buf) - at >= _LINE_LIMIT:
                    raise BadResponse("a chunk's size is endless")
                break
            found = _SIZE.fullmatch(buf[at : end_of_line - 1])
            if found is None or buf[end_of_line - 1 : end_of_line] != b"\r":
                raise BadResponse(f"a chunk's size is {buf[at:end_of_line][:20]!r}")
            at = end_of_line + 1
            self._left = int(found[1], 16)
            if not self._left:
                self._last = True
                at = self._trailer(buf, at)
                break
        self._buf = buf[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _trailer(self, buf: bytes, at: int) -> int:
        if buf[at : at + 2] == b"\r\n":
            self.finished = True
            return at + 2
        end = buf.find(b"\r\n\r\n", at)
        if (end + 4 if end >= 0 else len(buf)) - at > _TRAILER_LIMIT:
            raise BadResponse(f"its trailers have more than {_TRAILER_LIMIT} bytes")
        if end < 0:
            return at
        section = buf[at : end + 2]
        if not _FIELDS.fullmatch(section):
            raise BadResponse("its trailers are malformed")
        for line in section.decode("latin-1").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            if is_trailer(name):
                self.trailers.append((name, value.strip(" \t")))
        self.finished = True
        return end + 4

    @property
    def rest(self) -> bytes:
        """What came behind the body."""
        return self._buf


#: Fields that frame, route or authenticate must not come in trailers (RFC 9110 section 6.5.1).
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
    """Whether a field may be handed on behind a body."""
    low = name.lower()
    return low not in NO_TRAILER and low[:6] != "proxy-" and "_" not in low
