"""The chunked transfer coding (RFC 9112 section 7.1), in both directions and without I/O.

Process: any.
Never: accept framing that another recipient could read differently, or grow with bad input.

:class:`ChunkedDecoder` reads only the framing. The caller owns the buffer: a request body takes the content
from the connection's buffer when the application reads (:meth:`ChunkedDecoder.advance`), and the proxy takes
everything that has arrived (:meth:`ChunkedDecoder.feed`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gunicorn.http import errors as http_errors
from gunicorn.http.errors import (
    ChunkMissingTerminator,
    InvalidChunkSize,
    InvalidHeader,
    LimitRequestHeaders,
)

from gunicorn_passenger.http.grammar import CHUNK_LINE_BYTES, CHUNK_SIZE_BYTES, MAX_LENGTH

InvalidChunkExtension = getattr(http_errors, "InvalidChunkExtension", InvalidChunkSize)

#: The length of a body that is sent in chunks.
CHUNKED = -1
#: The most bytes that a trailer section may have.
TRAILER_LIMIT = 65536
#: The end of a chunked body without trailers.
LAST_CHUNK = b"0\r\n\r\n"

#: The most bytes of an invalid chunk line that an error shows.
_SHOWN = 100


def encode_chunk(data: bytes) -> bytes:
    """One chunk. The content must not be empty, because an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: bytes) -> bytes:
    """The end of a chunked body.

    :param trailers: the lines of its trailer section, each with its CRLF.
    """
    return b"0\r\n%b\r\n" % trailers


def chunk_line(size: int) -> bytes:
    """The size line of a chunk. The caller sends the content and the CRLF behind it."""
    return b"%x\r\n" % size


class ChunkedDecoder:
    """Follows the framing of one chunked body."""

    __slots__ = ("_ahead", "_buf", "_line", "_line_limit", "_part", "finished", "left", "trailer_section")

    def __init__(self, line_limit: int, line: re.Pattern[bytes] = CHUNK_LINE_BYTES) -> None:
        """
        :param line_limit: bytes that a chunk line (size and extensions, without its CRLF) may have.
        :param line: the grammar of a chunk line.
        """
        self._line_limit = line_limit
        self._line = line
        #: reads the next part of the framing
        self._part: Callable[[ChunkedDecoder, bytes, int], int] = ChunkedDecoder._chunk_line
        #: how many bytes of that part were checked before
        self._ahead = 0
        self._buf = b""
        #: how many bytes of the current chunk's content the caller has not consumed yet
        self.left = 0
        #: whether the body has ended
        self.finished = False
        #: the lines after the last chunk, each with its CRLF; not checked against the grammar
        self.trailer_section = b""

    @property
    def in_trailers(self) -> bool:
        """Whether the last chunk has arrived, but not the end of the trailer section."""
        return self._part is ChunkedDecoder._trailers and not self.finished

    def advance(self, buf: bytes, at: int) -> int:
        """Read the framing from ``buf[at:]``, up to the next content.

        Afterwards ``left`` is the size of the content that follows, or ``finished`` is true, or the framing
        is incomplete in ``buf``.

        :returns: where the content, the rest of the framing, or the next message begins.
        :raises gunicorn.http.errors.ParseException: when the framing is malformed.
        """
        while not self.left and not self.finished:
            then = self._part(self, buf, at)
            if then == at:
                break
            at = then
        return at

    def consume(self, count: int) -> None:
        """The caller has taken ``count`` bytes of the content."""
        self.left -= count
        if not self.left:
            self._part = ChunkedDecoder._end_of_chunk

    def feed(self, data: bytes) -> bytes:
        """The content in these bytes.

        :raises gunicorn.http.errors.ParseException: when the framing is malformed.
        """
        if self.left > len(data) and not self._buf:
            self.left -= len(data)
            return data
        buf = self._buf + data if self._buf else data
        at = 0
        parts = []
        while True:
            at = self.advance(buf, at)
            content = buf[at : at + self.left]
            if not content:
                break
            parts.append(content)
            at += len(content)
            self.consume(len(content))
        self._buf = buf[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def rest(self) -> bytes:
        """The bytes that were fed behind the body."""
        return self._buf

    # --- the parts of the framing; each returns ``at`` while it is incomplete ------------------------

    def _end_of_chunk(self, buf: bytes, at: int) -> int:
        end = buf[at : at + 2]
        if end == b"\r\n":
            self._part = ChunkedDecoder._chunk_line
            return at + 2
        if not b"\r\n".startswith(end):
            raise ChunkMissingTerminator(end)
        return at

    def _chunk_line(self, buf: bytes, at: int) -> int:
        end = buf.find(b"\n", at + self._ahead, at + self._line_limit + 2)
        if end < 0:
            self._ahead = len(buf) - at
            if self._ahead > self._line_limit + 1:
                raise InvalidChunkSize(buf[at : at + _SHOWN])
            return at
        if end == at or buf[end - 1] != 13:
            raise InvalidChunkSize(buf[at : min(end, at + _SHOWN)])  # RFC 9112 section 2.2: a bare LF
        self._ahead = 0
        self.left = self._size(buf[at : end - 1])
        if not self.left:
            self._part = ChunkedDecoder._trailers
        return end + 1

    def _size(self, line: bytes) -> int:
        found = self._line.fullmatch(line)
        if found is None:
            # an invalid size is reported as such, even if the extension is invalid, too
            size = line.partition(b";")[0]
            if CHUNK_SIZE_BYTES.fullmatch(size.rstrip(b" \t") if b";" in line else size):
                raise InvalidChunkExtension("invalid chunk extension")
            raise InvalidChunkSize(size[:_SHOWN])
        length = int(found[1], 16)
        if length > MAX_LENGTH:
            raise InvalidChunkSize(found[1][:_SHOWN])
        return length

    def _trailers(self, buf: bytes, at: int) -> int:
        if buf.startswith(b"\r\n", at):
            self.finished = True
            return at + 2
        end = buf.find(b"\r\n\r\n", at + max(self._ahead - 3, 0))
        until = len(buf) if end < 0 else end
        check_lines(buf, at + self._ahead, until, at)
        if (until if end < 0 else end + 4) - at > TRAILER_LIMIT:
            raise LimitRequestHeaders("limit request trailer section size")
        if end < 0:
            self._ahead = len(buf) - at
            return at
        self.trailer_section = buf[at : end + 2]
        self.finished = True
        return end + 4


def check_lines(data: bytes | bytearray, start: int, end: int, begin: int = 0) -> None:
    """RFC 9112 section 2.2: lines end with CRLF.

    :param start: where the check begins; the bytes before were checked.
    :param end: where it ends.
    :param begin: where the first line begins.
    :raises InvalidHeader: for an LF alone.
    """
    at = data.find(b"\n", start, end)
    while at >= 0:
        if at == begin or data[at - 1] != 13:
            raise InvalidHeader("bare LF as line terminator")
        at = data.find(b"\n", at + 1, end)
