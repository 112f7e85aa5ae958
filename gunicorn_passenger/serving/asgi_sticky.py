"""Finds where each request to a sticky ASGI server begins, before uvicorn sees it.

Process: a worker, in the thread of the asyncio loop.
Never: give uvicorn a part of a request that a sibling is to serve, or lose a byte of it.

uvicorn's protocol gets what comes of a connection at once. To pass a connection on, nothing of the request
may have reached uvicorn, and the one before must be over: its body has come, its response is written. So the
class below gives uvicorn one request at a time. It refuses a request whose end uvicorn's parser could see
elsewhere (RFC 9112 sections 2.2 and 6.3): what one of them takes for a body would be a request to the other,
and reach a worker that no check has sent it to.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from gunicorn.http.errors import ParseException

from gunicorn_passenger.http.chunked import CHUNKED, ChunkedDecoder
from gunicorn_passenger.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from gunicorn_passenger.serving.stickiness import BySessionId

#: Bytes that a header section may have; h11 has the same limit.
_MAX_HEAD = 65536
#: Bytes that a chunk line may have.
_MAX_CHUNK_LINE = 4096
#: Bytes that wait for the response before; then nothing more is read.
_MAX_WAITING = 65536
#: Seconds until the next look whether the response before has left the process: the first, and the most.
_PAUSE = 0.02
_MAX_PAUSE = 1.0
#: Seconds that a client has to read why its request was refused. A connection that is closed with unread
#: bytes is reset, and the response may be lost (RFC 9112 section 9.6).
_LINGER = 2.0
_END = b"\r\n\r\n"
#: Lines whose end, or whose continuation, parsers take in different ways.
_AMBIGUOUS = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
_FRAMING = re.compile(rb"\r\n(content-length|transfer-encoding|upgrade)([ \t]*):([^\r]*)", re.IGNORECASE)
_EMPTY_LINES = re.compile(rb"(?:\r\n)+")
_LENGTH = re.compile(rb"[0-9]{1,18}")


class UnclearRequest(Exception):
    """A request whose end, or whose beginning, two parsers could see in different places."""


def check_line_ends(data: bytes, start: int, end: int) -> None:
    """Look at the lines of ``data[start:end]``.

    :raises UnclearRequest: for one that does not end with CRLF, or continues the line before.
    """
    if _AMBIGUOUS.search(data, start, end):
        raise UnclearRequest("a line does not end with CRLF, or continues the line before")


def body_length(head: bytes) -> int:
    """The length of a request's body (RFC 9112 section 6.3).

    :param head: its header section, complete.
    :returns: bytes, or :data:`.CHUNKED`.
    :raises UnclearRequest: when the header section does not say it beyond doubt.
    """
    check_line_ends(head, 0, len(head))
    line = head[: head.find(b"\r\n")]
    if line.startswith(b"CONNECT "):
        raise UnclearRequest("the method is CONNECT")
    if line.startswith(b"PRI "):
        raise UnclearRequest("the client speaks HTTP/2")
    values: dict[bytes, bytes] = {}
    for name, space, value in _FRAMING.findall(head):
        if space:
            raise UnclearRequest(f"white space follows the name {name.decode()}")
        if name.lower() in values:
            raise UnclearRequest(f"{name.decode()} comes twice")
        values[name.lower()] = value.strip(b" \t")
    length, coding = values.get(b"content-length"), values.get(b"transfer-encoding")
    if coding is not None:
        if length is not None:
            raise UnclearRequest("it has both Content-Length and Transfer-Encoding")
        if coding.lower() != b"chunked" or not line.endswith(b" HTTP/1.1"):
            raise UnclearRequest("Transfer-Encoding is not chunked, or not with HTTP/1.1")
    elif length is not None and not _LENGTH.fullmatch(length):
        raise UnclearRequest("Content-Length is not a number of bytes")
    result = CHUNKED if coding is not None else int(length or 0)
    if result and b"upgrade" in values:
        raise UnclearRequest("a request for an upgrade has a body")
    return result


class BodyFraming:
    """Follows the body of a request to its end."""

    def __init__(self, length: int) -> None:
        """:param length: as :func:`body_length` returns it."""
        self._left = length
        self._chunks = ChunkedDecoder(_MAX_CHUNK_LINE) if length == CHUNKED else None

    @property
    def finished(self) -> bool:
        """Whether all of it has come."""
        return not self._left if self._chunks is None else self._chunks.finished

    def advance(self, data: bytes) -> int:
        """
        :param data: what has come after that which was taken before.
        :returns: how many bytes of it belong to the body; the size of a chunk is taken when it is complete.
        :raises UnclearRequest: for a malformed chunk.
        """
        if self._chunks is None:
            length = min(self._left, len(data))
            self._left -= length
            return length
        at = 0
        try:
            while True:
                at = self._chunks.advance(data, at)
                length = min(self._chunks.left, len(data) - at)
                if not length:
                    return at
                self._chunks.consume(length)
                at += length
        except ParseException as error:
            raise UnclearRequest(f"a chunk is malformed: {error}") from error


def sticky_protocol(base: Any, passes: SiblingConnections) -> Any:
    """A protocol class for the connections of a sticky listener.

    :param base: the class of the other connections, one of uvicorn's protocols for HTTP.
    """

    class StickyProtocol(base):
        def __init__(self, early: bytes = b"") -> None:
            """:param early: what a sibling has read; its first request is served here."""
            super().__init__()
            #: what uvicorn has not got yet
            self._waiting = early
            #: how much of that is known to have no end of a head
            self._searched = 0
            self._was_passed = bool(early)
            #: the body of the current request
            self._body = BodyFraming(0)
            self._responding = False
            #: whether what else comes of the connection is thrown away
            self._is_refused = False
            self._stopped_reading = False

        @property
        def is_idle(self) -> bool:
            return super().is_idle and self._body.finished and not (self._waiting or self._is_refused)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._advance()

        def data_received(self, data: bytes) -> None:
            if not self._is_refused:
                self._waiting += data
                self._advance()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._responding = False
            if self._waiting:
                # the caller is a task of the application, whose context is not for the next request
                self.loop.call_soon(self._advance, context=Context())

        def _advance(self) -> None:
            """Give uvicorn what it may have."""
            if self._waiting:
                self._unset_keepalive_if_required()
            try:
                while self._waiting and not self.passing and not self.transport.is_closing():
                    if not self._body.finished:
                        length = self._body.advance(self._waiting)
                        if not length:
                            break
                        self._give(length)
                    elif self._responding:
                        if len(self._waiting) > _MAX_WAITING:
                            self._stopped_reading = True
                            self.transport.pause_reading()
                        return
                    elif not self._begin():
                        break
            except UnclearRequest as error:
                self._refuse(str(error))
            if self._stopped_reading and not self.passing and not self.transport.is_closing():
                self._stopped_reading = False
                if not self.flow.read_paused:
                    self.transport.resume_reading()

        def _give(self, length: int) -> None:
            data, self._waiting, self._searched = self._waiting[:length], self._waiting[length:], 0
            super().data_received(data)
            protocol = self.transport.get_protocol()
            if protocol is not self and self._waiting:
                # the first frames of a WebSocket
                data, self._waiting = self._waiting, b""
                protocol.data_received(data)

        def _begin(self) -> bool:
            """Begin the next request.

            :returns: whether uvicorn has got it, or empty lines before it were dropped.
            :raises UnclearRequest: when it is to be refused.
            """
            data, searched = self._waiting, self._searched
            empty = _EMPTY_LINES.match(data)
            if empty is not None:
                # RFC 9112 section 2.2
                self._waiting = data[empty.end() :]
                return True
            end = data.find(_END, max(searched - len(_END), 0)) + len(_END)
            if end < len(_END):
                self._searched = len(data) - data.endswith(b"\r")
                check_line_ends(data, max(searched - 2, 0), self._searched)
                end = 0
            if (end or len(data)) > _MAX_HEAD:
                raise UnclearRequest(f"its header section is larger than {_MAX_HEAD} bytes")
            if not end:
                return False
            head = data[:end]
            length = body_length(head)
            tag = "" if self._was_passed else passes.owner(head)
            self._was_passed = False
            if tag:
                self.passing = self._stopped_reading = True
                self.transport.pause_reading()
                self._pass_on(tag)
                return False
            self._responding, self._body = True, BodyFraming(length)
            self._give(end)
            return True

        def _refuse(self, reason: str) -> None:
            self._waiting, self._is_refused = b"", True
            self.logger.warning("Invalid HTTP request received: %s; the client gets 400", reason)
            if not self._body.finished:
                # the application learns that there is no more
                started, self.cycle.disconnected = self.cycle.response_started, True
                self.cycle.message_event.set()
                if started:
                    self.transport.close()
                    return
            text = f"{reason}\n".encode()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(text), text)
            )
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(_LINGER, self.transport.abort)

        def _pass_on(self, tag: str, pause: float = _PAUSE) -> None:
            if self.transport.is_closing():
                return
            if self.transport.get_write_buffer_size():
                # a client that does not wait for the response before
                self.loop.call_later(pause, self._pass_on, tag, min(2 * pause, _MAX_PAUSE))
                return
            try:
                # the transport may close its own descriptor meanwhile
                fd = os.dup(self.transport.get_extra_info("socket").fileno())
            except OSError:
                self._on_passed(False)
                return
            passes.pass_on(tag, fd, self._waiting, self._on_passed)

        def _on_passed(self, passed: bool) -> None:
            self.passing = False
            if passed:
                self._waiting = b""
                self.transport.abort()  # closes this process's copy
            else:
                self._was_passed = True
                self._advance()

    return StickyProtocol


class SiblingConnections:
    """The connections that an acceptor of an ASGI server passes to siblings, and those that it takes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._sticky: BySessionId | None = None
        self._protocol: Callable[..., Any]
        #: connections of siblings that the loop has not got yet: family, descriptor, what was read
        self._arriving: deque[tuple[int, int, bytes]] = deque()
        #: whether it takes none any more
        self._shut = False
        #: uvicorn's protocols of the open connections
        self._connections: set[Any]

    def is_drained(self) -> bool:
        """Whether it has stopped accepting, and no connection is open."""
        raise NotImplementedError

    def _room(self) -> int:
        """How many more connections it may have."""
        raise NotImplementedError

    def _idle_connections(self) -> list[Any]:
        """Those that wait for a further request, the longest idle first. Any thread may call."""
        # a copy: the loop may be adding one; those of WebSockets are never idle
        idle = [connection for connection in list(self._connections) if getattr(connection, "is_idle", False)]
        return sorted(idle, key=lambda connection: connection.idle_since)

    def _in_loop(self, function: Callable[[], object]) -> None:
        raise NotImplementedError

    def _open(self, family: int, fd: int, protocol: Callable[[], Any]) -> None:
        """Serve a connection, which it owns from now on."""
        raise NotImplementedError

    # --- called in the hub of the worker -----------------------------------------------------------

    def use_sticky(self, sticky: BySessionId) -> None:
        """Pass on the connections of requests that belong to siblings. Called before :meth:`start`."""
        self._sticky = sticky
        self._protocol = sticky_protocol(self._protocol, self)

    @property
    def takes_connections(self) -> bool:
        """Whether siblings may pass it connections."""
        return self._sticky is not None and not self._shut

    def make_room(self) -> bool:
        """Whether it can serve one more connection, even while it drains.

        At its limit, an idle connection is closed for it: the client of a session has only this worker.
        """
        return self.takes_connections and self._room() + len(self._idle_connections()) > len(self._arriving)

    def attach(self, sock: Any, addr: Any, begun: bool = False, data: bytes = b"") -> None:
        """Serve a connection that a sibling has accepted.

        :param sock: the connection; the acceptor owns it.
        :param data: what the sibling has read of it. The first request in it is served here.
        """
        self._arriving.append((sock.family, sock.detach(), data))
        self._in_loop(self._take_arriving)

    def shut(self) -> bool:
        """Take no further connections of siblings, if it is drained.

        :returns: whether it is.
        """
        self._shut = self._shut or self.is_drained()
        return self._shut

    def _give(self, tag: str, fd: int, data: bytes, done: Callable[[bool], object]) -> None:
        passed = False
        try:
            assert self._sticky is not None
            give = self._sticky.give_to(tag)
            passed = give is not None and give(fd, data)
        finally:
            os.close(fd)
            self._in_loop(partial(done, passed))

    # --- in the loop -------------------------------------------------------------------------------

    def _take_arriving(self) -> None:
        while self._arriving:
            family, fd, data = self._arriving[0]
            if self._room() <= 0:
                for idle in self._idle_connections()[:1]:
                    idle.shutdown()
            self._open(family, fd, partial(self._protocol, early=data))
            self._arriving.popleft()  # afterwards: meanwhile it must not seem to be drained

    def owner(self, head: bytes) -> str:
        """The tag of the worker that a request belongs to; empty for this one."""
        assert self._sticky is not None
        return self._sticky.owner(head)

    def pass_on(self, tag: str, fd: int, data: bytes, done: Callable[[bool], object]) -> None:
        """Have a sibling serve a connection.

        :param fd: a copy of the connection, owned from now on.
        :param data: what was read of it.
        :param done: called in the loop with whether the sibling serves it.
        """
        self._scheduler.spawn(self._give, tag, fd, data, done)
