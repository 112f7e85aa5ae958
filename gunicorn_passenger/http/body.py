"""A request's body, as ``wsgi.input``.

Process: a serving process, in the connection's greenlet or another one of the application.
Never: read a body that the application does not ask for, read past its end, or return an incomplete body
as if it were complete.
"""

from __future__ import annotations

from typing import Any

from gunicorn_passenger.errors import body_incomplete
from gunicorn_passenger.http.chunked import CHUNKED, ChunkedDecoder

#: The most bytes that one read of the socket asks for.
READ_SIZE = 262144
#: The most bytes of an unread body that are discarded to keep the connection. To discard more would cost more
#: than a new connection.
MAX_DISCARD = 65536


class RequestBody:
    """What all bodies share: the file-like object of PEP 3333."""

    __slots__ = ("_at", "_chunk")

    #: whether the end of the body, and so the next request, cannot be found any more
    failed = False
    #: whether the application has read a part of it
    was_read = False

    def __init__(self) -> None:
        #: bytes that were taken from the connection and not read yet
        self._chunk = b""
        self._at = 0

    def _fill(self, most: int) -> bytes:
        """The next bytes of the body, as they arrive; empty at its end."""
        return b""

    def read(self, size: int | None = None) -> bytes:
        """Read ``size`` bytes and wait for them; fewer only at the end of the body.

        :raises gunicorn_passenger.errors.ClientDisconnected: (an ``OSError``) when the client disconnects
            first.
        :raises TimeoutError: when the client sends nothing for the body timeout.
        """
        want = _size(size)
        parts = []
        while want > 0:
            data = self.read1(want)
            if not data:
                break
            parts.append(data)
            want -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read1(self, size: int | None = None) -> bytes:
        """Read what has arrived, at most ``size`` bytes; wait only if nothing has."""
        want = _size(size)
        if want == 0:
            return b""
        have = len(self._chunk) - self._at
        if not have:
            return self._fill(min(want, READ_SIZE))
        if self._at == 0 and have <= want:
            data, self._chunk = self._chunk, b""
            return data
        data = self._chunk[self._at : self._at + want]
        self._at += len(data)
        if self._at == len(self._chunk):
            self._chunk, self._at = b"", 0
        return data

    def readline(self, size: int | None = None) -> bytes:
        want = _size(size)
        parts = []
        while want > 0:
            if self._at == len(self._chunk):
                self._chunk, self._at = self._fill(READ_SIZE), 0
                if not self._chunk:
                    break
            end = self._chunk.find(b"\n", self._at, self._at + want)
            data = self.read1(want if end < 0 else end + 1 - self._at)
            parts.append(data)
            want -= len(data)
            if end >= 0:
                break
        return b"".join(parts)

    def readlines(self, hint: int | None = None) -> list[bytes]:
        """
        :param hint: after so many bytes no further line is read, as with other files.
        """
        lines = []
        total = 0
        for line in self:
            lines.append(line)
            total += len(line)
            if hint is not None and 0 < hint <= total:
                break
        return lines

    def __iter__(self) -> RequestBody:
        return self

    def __next__(self) -> bytes:
        line = self.readline()
        if not line:
            raise StopIteration
        return line

    @property
    def too_much_unread(self) -> bool:
        """Whether the connection should close: too much of the body is unread, or its end is unknown."""
        return False

    def drain(self) -> bool:
        """Discard what the application has not read.

        :returns: whether the next request can follow.
        """
        return not self.failed

    def detach(self) -> None:
        """The request is over: code that still has the body cannot read the next request with it."""


class EmptyBody(RequestBody):
    """The body of a request without one. All such requests share one object."""

    __slots__ = ()

    too_much_unread = False


EMPTY_BODY = EmptyBody()


class _IncomingBody(RequestBody):
    """A body that arrives over a connection."""

    __slots__ = ("_connection", "expect", "failed", "was_read")

    def __init__(self, connection: Any, expect: bool) -> None:
        """
        :param connection: the :class:`.connection.Connection`.
        :param expect: whether the client waits for "100 Continue" (RFC 9110 section 10.1.1).
        """
        self._chunk = b""
        self._at = 0
        self._connection = connection
        self.expect = expect
        self.failed = self.was_read = False

    def _receive(self, most: int) -> bytes:
        """The next bytes of the body from the connection.

        :param most: how many bytes at most; 0 appends what arrives to the connection's buffer instead.
        """
        connection = self._connection
        if connection is None:
            raise ValueError("the request is over: its body can no longer be read")
        try:
            if self.expect:
                # a client that has not waited needs no "100 Continue"
                self.expect = False
                if not connection.buffered():
                    connection.send_continue()
            data: bytes = connection.read_some(most) if most else connection.fill_buffer()
        except BaseException:
            self.failed = True
            raise
        if not data:
            self.failed = True
            raise body_incomplete()
        return data

    @property
    def too_much_unread(self) -> bool:
        return self.failed or self.expect

    def detach(self) -> None:
        self._connection = None

    def _discard(self) -> bool:
        """Read and discard the rest, within bounds."""
        if self.failed or self.expect or self._connection is None:
            return False
        discarded: bool = self._connection.discard_body(self, MAX_DISCARD)
        return discarded


class LengthBody(_IncomingBody):
    """A body whose length was announced (RFC 9112 section 6.2)."""

    __slots__ = ("left", "length")

    def __init__(self, connection: Any, length: int, expect: bool) -> None:
        _IncomingBody.__init__(self, connection, expect)
        self.length = length
        self.left = length

    def _fill(self, most: int) -> bytes:
        left = self.left
        self.was_read = True
        if not left:
            return b""
        data = self._receive(min(left, most))
        self.left = left - len(data)
        return data

    @property
    def too_much_unread(self) -> bool:
        return super().too_much_unread or (self.left > MAX_DISCARD and self.left == self.length)

    def drain(self) -> bool:
        if not self.left:
            return True
        return self.left <= MAX_DISCARD and self._discard()


class ChunkedBody(_IncomingBody):
    """A body sent in chunks (RFC 9112 section 7.1)."""

    __slots__ = ("_decoder", "_request", "trailers")

    def __init__(self, connection: Any, expect: bool, line_limit: int, request: Any) -> None:
        """
        :param line_limit: the most bytes that a line with a chunk's size may have.
        :param request: returns gunicorn's request object, which checks and keeps the trailers.
        """
        _IncomingBody.__init__(self, connection, expect)
        self._decoder = ChunkedDecoder(line_limit)
        self._request = request
        #: the trailers, once the body was read
        self.trailers: list[tuple[str, str]] = []

    @property
    def finished(self) -> bool:
        """Whether the whole body was read."""
        return self._decoder.finished and not self.failed

    def _fill(self, most: int) -> bytes:
        decoder = self._decoder
        self.was_read = True
        if self.failed:
            raise body_incomplete()
        if decoder.finished:
            return b""
        if not decoder.left:
            try:
                ended = self._read_framing()
            except BaseException:
                self.failed = True
                raise
            if ended:
                return b""
        data = self._receive(min(decoder.left, most))
        decoder.consume(len(data))
        return data

    def _read_framing(self) -> bool:
        """Read up to the content of the next chunk, or to the end of the body.

        :returns: whether that is the end.
        """
        decoder = self._decoder
        bounded = False
        try:
            while True:
                connection = self._connection
                if connection is not None:
                    connection.at = decoder.advance(connection.buf, connection.at)
                    if decoder.left:
                        return False
                    if decoder.finished:
                        break
                    if decoder.in_trailers and not bounded:
                        bounded = connection.begin_deadline()
                self._receive(0)
        finally:
            if bounded:
                connection.end_deadline()
        if decoder.trailer_section:
            request = self._request()
            request.trailers = self.trailers = request.parse_headers(
                decoder.trailer_section[:-2], from_trailer=True
            )
        return True

    def drain(self) -> bool:
        return self.finished or self._discard()


def incoming_body(connection: Any, environ: dict[str, Any], length: int, request: Any) -> RequestBody:
    """The body of a request that has one.

    :param connection: the :class:`.connection.Connection`.
    :param length: its length in bytes, or ``CHUNKED``.
    :param request: returns gunicorn's request object.
    """
    expect = (
        "HTTP_EXPECT" in environ
        and environ["SERVER_PROTOCOL"] != "HTTP/1.0"
        and environ["HTTP_EXPECT"].lower() == "100-continue"
    )
    if length == CHUNKED:
        return ChunkedBody(connection, expect, connection.listener.reader.field_limit, request)
    return LengthBody(connection, length, expect)


def _size(size: Any) -> int:
    if size is None:
        return _EVERYTHING
    if not isinstance(size, int):
        raise TypeError("size must be an integer")
    return size if size >= 0 else _EVERYTHING


_EVERYTHING = 1 << 62
