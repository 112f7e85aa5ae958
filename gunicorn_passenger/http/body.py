"""A request's body, as ``wsgi.input``.

Process: a worker, in the connection's greenlet or another one of the application.
Never: collect a body that the application does not ask for, read past its end, or hand out a body that
is incomplete as if it were whole.
"""

from __future__ import annotations

from typing import Any

from gunicorn_passenger.errors import body_incomplete
from gunicorn_passenger.http.chunked import CHUNKED, ChunkedDecoder

#: The most that one read of the socket asks for.
PIECE = 262144
#: Bytes of a body that the application left unread, and that are read and dropped to keep the
#: connection. More than that costs more than a new connection.
DRAIN = 65536


class RequestBody:
    """What all bodies share: the file that PEP 3333 asks for."""

    __slots__ = ("_at", "_piece")

    #: whether it is known where the next request starts
    failed = False

    def __init__(self) -> None:
        #: what has been taken from the connection and not been read
        self._piece = b""
        self._at = 0

    def _fill(self, most: int) -> bytes:
        """The next bytes of the body, as they come in; empty at its end."""
        return b""

    def read(self, size: int | None = None) -> bytes:
        """Read ``size`` bytes, waiting for them; fewer at the end of the body only.

        :raises gunicorn_passenger.errors.ClientDisconnected: (an ``OSError``) when it breaks off.
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
        """Read what is there, waiting only while nothing is: at most ``size`` bytes."""
        want = _size(size)
        if want == 0:
            return b""
        have = len(self._piece) - self._at
        if not have:
            return self._fill(min(want, PIECE))
        if self._at == 0 and have <= want:
            data, self._piece = self._piece, b""
            return data
        data = self._piece[self._at : self._at + want]
        self._at += len(data)
        if self._at == len(self._piece):
            self._piece, self._at = b"", 0
        return data

    def readline(self, size: int | None = None) -> bytes:
        want = _size(size)
        parts = []
        while want > 0:
            if self._at == len(self._piece):
                self._piece, self._at = self._fill(PIECE), 0
                if not self._piece:
                    break
            end = self._piece.find(b"\n", self._at, self._at + want)
            data = self.read1(want if end < 0 else end + 1 - self._at)
            parts.append(data)
            want -= len(data)
            if end >= 0:
                break
        return b"".join(parts)

    def readlines(self, hint: int | None = None) -> list[bytes]:
        """
        :param hint: bytes after which no further line is begun, as for other files.
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
    def unread(self) -> bool:
        """Whether so much is left unread that the connection had better not be kept for it."""
        return False

    def finish(self) -> bool:
        """Drop what the application left unread.

        :returns: whether the next request can follow.
        """
        return not self.failed

    def end(self) -> None:
        """The request is over; who still holds the body cannot read the next request with it."""


class EmptyBody(RequestBody):
    """A request without one. There is nothing in it to tell two of them apart."""

    __slots__ = ()

    unread = False


EMPTY_BODY = EmptyBody()


class _IncomingBody(RequestBody):
    """A body that comes in over a connection."""

    __slots__ = ("_connection", "expect", "failed")

    def __init__(self, connection: Any, expect: bool) -> None:
        """
        :param connection: the :class:`.connection.Connection` that it comes in on.
        :param expect: whether the client waits for "100 Continue" (RFC 9110 section 10.1.1).
        """
        self._piece = b""
        self._at = 0
        self._connection = connection
        self.expect = expect
        self.failed = False

    def _receive(self, most: int) -> bytes:
        """The next bytes of the connection, at most so many, which belong to this body."""
        data: bytes = self._from_client(most)
        return data

    def _from_client(self, most: int, more: bool = False) -> Any:
        connection = self._connection
        if connection is None:
            raise ValueError("the request is over: its body can no longer be read")
        try:
            if self.expect:
                # the client may not have waited; then nothing need be sent
                self.expect = False
                if not connection.buffered():
                    connection.send_continue()
            data = connection.more() if more else connection.receive(most)
        except BaseException:
            self.failed = True
            raise
        if not data:
            self.failed = True
            raise body_incomplete()
        return data

    def end(self) -> None:
        self._connection = None

    def _drop(self) -> bool:
        """Read and drop the rest, within bounds."""
        if self.failed or self.expect or self._connection is None:
            return False
        dropped: bool = self._connection.drain(self, DRAIN)
        return dropped


class LengthBody(_IncomingBody):
    """A body whose length was announced (RFC 9112 section 6.2)."""

    __slots__ = ("left", "length")

    def __init__(self, connection: Any, length: int, expect: bool) -> None:
        _IncomingBody.__init__(self, connection, expect)
        self.length = length
        self.left = length

    def _fill(self, most: int) -> bytes:
        left = self.left
        if not left:
            return b""
        data = self._receive(min(left, most))
        self.left = left - len(data)
        return data

    @property
    def unread(self) -> bool:
        return self.expect or (self.left > DRAIN and self.left == self.length)

    def finish(self) -> bool:
        if not self.left:
            return True
        return self.left <= DRAIN and self._drop()


class ChunkedBody(_IncomingBody):
    """A body sent in chunks (RFC 9112 section 7.1)."""

    __slots__ = ("_decoder", "_request", "trailers")

    def __init__(self, connection: Any, expect: bool, line_limit: int, request: Any) -> None:
        """
        :param line_limit: bytes of a line with a chunk's size.
        :param request: gives gunicorn's request object, which checks and keeps the trailers.
        """
        _IncomingBody.__init__(self, connection, expect)
        self._decoder = ChunkedDecoder(line_limit)
        self._request = request
        #: the headers behind the body, when it is read
        self.trailers: list[tuple[str, str]] = []

    @property
    def finished(self) -> bool:
        """Whether the whole body was read."""
        return self._decoder.finished and not self.failed

    def _fill(self, most: int) -> bytes:
        decoder = self._decoder
        if self.failed:
            raise body_incomplete()
        if decoder.finished:
            return b""
        if not decoder.left:
            try:
                self._read_framing()
            except BaseException:
                self.failed = True
                raise
            if decoder.finished:
                return b""
        data = self._receive(min(decoder.left, most))
        decoder.took(len(data))
        return data

    def _read_framing(self) -> None:
        """Read up to the content of the next chunk, or to the end of the body."""
        decoder = self._decoder
        bounded = False
        try:
            while True:
                connection = self._connection
                if connection is not None:
                    connection.at = decoder.advance(connection.buf, connection.at)
                    if decoder.left:
                        return
                    if decoder.finished:
                        break
                    if decoder.in_trailers and not bounded:
                        bounded = connection.begin_deadline()
                self._from_client(0, more=True)
        finally:
            if bounded:
                connection.end_deadline()
        if decoder.trailer_section:
            request = self._request()
            request.trailers = self.trailers = request.parse_headers(
                decoder.trailer_section[:-2], from_trailer=True
            )

    @property
    def unread(self) -> bool:
        return self.expect

    def finish(self) -> bool:
        return self.finished or self._drop()


def incoming_body(connection: Any, environ: dict[str, Any], length: int, request: Any) -> RequestBody:
    """The body of a request that has one.

    :param connection: the :class:`.connection.Connection` that it comes in on.
    :param length: its bytes, or ``CHUNKED``.
    :param request: gives gunicorn's request object.
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
