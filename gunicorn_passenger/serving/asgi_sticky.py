"""Finds where each request to a sticky ASGI server begins, before uvicorn sees it.

Process: a worker, in the thread of the asyncio loop.
Never: give uvicorn a part of a request that a sibling is to serve, or lose a byte of it.

uvicorn's protocol gets what comes of a connection at once. To pass a connection on, nothing of the request
may have reached uvicorn, and the one before must be over: its body has come, its response is written. So the
class below gives uvicorn one request at a time. The length of a request is what Content-Length says (RFC 9112
section 6.3). Of any other request uvicorn finds the end, and the connection ends with the response: where the
next request would begin is not known here. A web server that buffers bodies sends no such requests.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from gunicorn_passenger.serving.stickiness import BySessionId

#: Bytes of a head that is not complete, beyond which uvicorn is asked to refuse it; h11 has the same limit.
_MAX_HEAD = 65536
#: Bytes that wait for the response before; then nothing more is read.
_MAX_WAITING = 65536
#: Seconds until the next look whether the response before has left the process.
_PAUSE = 0.02
_END = b"\r\n\r\n"
#: Lines whose end, or whose continuation, parsers take in different ways.
_AMBIGUOUS = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([^\r]*)", re.IGNORECASE)
_OTHER_LENGTH = re.compile(
    rb"\r\n(?:transfer-encoding|upgrade)[ \t]*:|\r\ncontent-length[ \t]+:", re.IGNORECASE
)


def body_length(head: bytes) -> int | None:
    """The length of a request's body.

    :param head: its header section, complete.
    :returns: ``None`` when Content-Length does not say it beyond doubt, and for an upgrade.
    """
    if _AMBIGUOUS.search(head) or _OTHER_LENGTH.search(head):
        return None
    found = _CONTENT_LENGTH.findall(head)
    if not found:
        return 0
    text = found[0].rstrip(b" \t")
    return int(text) if len(found) == 1 and re.fullmatch(rb"[0-9]{1,18}", text) else None


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
            #: bytes of the current request's body that have not come yet
            self._body_left = 0
            self._responding = False
            #: whether uvicorn gets all that comes: it finds the end of the request, the connection's last
            self._is_last = False
            self._stopped_reading = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._advance()

        def data_received(self, data: bytes) -> None:
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
            while self._waiting and not self.passing and not self.transport.is_closing():
                if self._is_last:
                    self._give(len(self._waiting))
                    if self.cycle is not None:
                        self.cycle.keep_alive = False
                elif self._body_left:
                    length = min(self._body_left, len(self._waiting))
                    self._body_left -= length
                    self._give(length)
                elif self._responding:
                    if len(self._waiting) > _MAX_WAITING:
                        self._stopped_reading = True
                        self.transport.pause_reading()
                    return
                elif not self._begin():
                    break
            if self._stopped_reading and not self.passing and not self.transport.is_closing():
                self._stopped_reading = False
                if not self.flow.read_paused:
                    self.transport.resume_reading()

        def _give(self, length: int) -> None:
            data, self._waiting, self._searched = self._waiting[:length], self._waiting[length:], 0
            super().data_received(data)

        def _begin(self) -> bool:
            """Begin the next request.

            :returns: whether uvicorn gets it now.
            """
            data, searched = self._waiting, self._searched
            end = data.find(_END, max(searched - len(_END), 0)) + len(_END)
            if end < len(_END):
                # uvicorn judges what no parser may take for the same as this one
                known = len(data) - data.endswith(b"\r")
                ambiguous = _AMBIGUOUS.search(data, max(searched - 2, 0), known)
                self._is_last = len(data) > _MAX_HEAD or ambiguous is not None
                self._searched = known
                return self._is_last
            head = data[:end]
            tag = "" if self._was_passed else passes.owner(head)
            self._was_passed = False
            if tag:
                self.passing = self._stopped_reading = True
                self.transport.pause_reading()
                self._pass_on(tag)
                return False
            length = body_length(head)
            if length is None or head.startswith(b"\r"):
                self._is_last = True
            else:
                self._responding, self._body_left = True, length
                self._give(end)
            return True

        def _pass_on(self, tag: str) -> None:
            if self.transport.is_closing():
                return
            if self.transport.get_write_buffer_size():
                # a client that does not wait for the response before
                self.loop.call_later(_PAUSE, self._pass_on, tag)
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

    def is_drained(self) -> bool:
        """Whether it has stopped accepting, and no connection is open."""
        raise NotImplementedError

    def _room(self) -> int:
        """How many more connections it may have."""
        raise NotImplementedError

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
        """:returns: whether it has room for one more connection, also while it drains."""
        return self.takes_connections and self._room() > len(self._arriving)

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
