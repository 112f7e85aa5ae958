"""An upgraded connection: bytes pass both ways until both sides have had enough.

Runs in: a gevent worker; its callbacks run in the hub. Must never: block, or keep more of what one side
has not taken than a read of the other.

There is no greenlet for a direction: the hub calls when there is something to read, and mostly the
other side takes it at once. Where it does not, the rest is kept, reading stops, and the hub calls when
there is room.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import gevent
from gevent import get_hub, getcurrent

from gunicorn_passenger.proxy.log import failed_callback
from gunicorn_passenger.proxy.upstream_io import GeventStream, runtime

#: Bytes that one read asks for.
_PIECE = 65536
#: Seconds that a WebSocket's ends get to close it themselves after they were sent a Close.
_CLOSING = 2.0

#: RFC 6455 section 7.4.1: 1001 indicates that an endpoint is "going away", such as a server going down
_GOING_AWAY = struct.pack("!H", 1001)


class FrameTracker:
    """Knows where a WebSocket's frames end (RFC 6455 section 5.2)."""

    __slots__ = ("_head", "_left")

    def __init__(self) -> None:
        #: bytes of the present frame that are still to come, and the beginning of its head
        self._left = 0
        self._head = b""

    @property
    def between(self) -> bool:
        """Whether a frame has just ended."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> int:
        """
        :returns: how many of these bytes belong to the frame that had begun before.
        """
        size = len(data)
        if not self._left and not self._head and size > 1:
            # mostly one small frame comes in one piece
            second = data[1]
            if second < 126:
                if second + 2 == size:
                    return 0
            elif 128 <= second < 254 and second - 122 == size:
                return 0
        first = -1
        at = 0
        if self._left:
            taken = min(self._left, size)
            self._left -= taken
            at = taken
            if self._left:
                return size
            first = at
        elif not self._head:
            first = 0
        while at < size:
            begun = len(self._head)
            head = self._head + data[at : at + 14 - begun]
            need = _head_size(head)
            if need is None or len(head) < need[0]:
                self._head = head
                return size if first < 0 else first
            at += need[0] - begun
            self._head = b""
            taken = min(need[1], size - at)
            at += taken
            self._left = need[1] - taken
            if self._left:
                return size if first < 0 else first
            if first < 0:
                first = at
        return size if first < 0 else first


def _head_size(head: bytes) -> tuple[int, int] | None:
    """Of a frame's head that has begun: its size, and the payload's."""
    if len(head) < 2:
        return None
    length = head[1] & 127
    size = 2 + (4 if head[1] & 128 else 0)
    if length == 126:
        if len(head) < 4:
            return None
        return size + 2, int.from_bytes(head[2:4], "big")
    if length == 127:
        if len(head) < 10:
            return None
        return size + 8, int.from_bytes(head[2:10], "big")
    return size, length


def close_frame(masked: bool) -> bytes:
    """A Close with 1001."""
    if not masked:
        return b"\x88\x02" + _GOING_AWAY
    mask = os.urandom(4)
    payload = bytes(byte ^ mask[i] for i, byte in enumerate(_GOING_AWAY))
    return b"\x88\x82" + mask + payload


class _TunnelDirection:
    """One direction: from one socket to the other."""

    __slots__ = (
        "_dropping",
        "_farewell",
        "_frames",
        "_pending",
        "_readable",
        "_recv",
        "_room",
        "_send",
        "_sink",
        "_tunnel",
        "count",
        "ended",
        "finished",
    )

    def __init__(self, tunnel: Tunnel, source: Any, sink: Any, readable: Any, websocket: bool) -> None:
        """
        :param readable: a watcher of the source, for reading.
        """
        self._tunnel = tunnel
        self._sink = sink
        self._recv = source.recv
        self._send = sink.send
        self._readable = readable
        self._room: Any = None
        self._frames = FrameTracker() if websocket else None
        #: what the sink has not taken yet; nothing is read meanwhile
        self._pending: Any = b""
        #: a Close that is to be the last frame
        self._farewell = b""
        #: whether it was sent, so that what the source still says is dropped
        self._dropping = False
        #: bytes that have passed
        self.count = 0
        #: whether the source sends no more, and whether the sink knows
        self.ended = self.finished = False

    def start(self, early: bytes) -> None:
        """
        :param early: what the source has sent already.
        """
        self._readable.start(self._on_readable)
        if early:
            self._pass(early)

    def _on_readable(self) -> None:
        try:
            data = self._recv(_PIECE)
            if not data:
                self.ended = True
                self._readable.stop()
                if not self._pending:
                    self._pass_end()
            elif not self._dropping:
                self._tunnel.stirred = True
                self._pass(data)
        except BlockingIOError:
            return
        except OSError:
            self._tunnel.close()
        except Exception as error:
            self._tunnel.failed(error)

    def _pass(self, data: bytes) -> None:
        if self._frames is not None:
            inside = self._frames.feed(data)
            if self._farewell:
                reached = inside < len(data) or self._frames.between
                data = data[:inside]
                if reached:
                    data += self._farewell
                    self._dropping = True
        self._write(data)

    def _write(self, data: bytes) -> None:
        self.count += len(data)
        if self._pending:
            self._pending = bytes(self._pending) + data
            return
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._tunnel.close()
            return
        if sent < len(data):
            self._pending = memoryview(data)[sent:]
            self._readable.stop()
            if self._room is None:
                self._room = get_hub().loop.io(self._sink.fileno(), 2)
            self._room.start(self._on_room)

    def _on_room(self) -> None:
        try:
            self._pending = self._pending[self._send(self._pending) :]
            self._tunnel.stirred = True
            if not self._pending:
                self._room.stop()
                if self.ended:
                    self._pass_end()
                else:
                    self._readable.start(self._on_readable)
        except BlockingIOError:
            return
        except OSError:
            self._tunnel.close()
        except Exception as error:
            self._tunnel.failed(error)

    def _pass_end(self) -> None:
        """The source sends no more (a half-close), and the sink hears of it."""
        self.finished = True
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._tunnel.close()
            return
        self._tunnel.way_ended()

    def say_farewell(self, masked: bool) -> None:
        """Send a Close as soon as the frame that has begun is over, and nothing after it."""
        if self.ended or self._frames is None or self._farewell:
            return
        self._farewell = close_frame(masked)
        if self._frames.between:
            self._dropping = True
            self._write(self._farewell)

    def close(self) -> None:
        try:
            self._readable.stop()
        finally:
            if self._room is not None:
                self._room.close()


class Tunnel:
    """An upgraded connection, as the handlers of ``open`` and ``close`` get it."""

    __slots__ = (
        "_down",
        "_greenlet",
        "_make_request",
        "_timer",
        "_up",
        "_websocket",
        "_ws_stop",
        "_ws_timeout",
        "closed",
        "stirred",
        "target",
    )

    def __init__(
        self,
        target: Any,
        make_request: Callable[[], Any],
        ws_timeout: float | None,
        ws_stop: str,
        websocket: bool,
    ) -> None:
        """
        :param make_request: gives the request that asked for it.
        :param websocket: whether it carries RFC 6455's frames, among which a Close can be sent.
        """
        #: where it leads
        self.target = target
        self._make_request = make_request
        self._ws_timeout = ws_timeout
        self._ws_stop = ws_stop
        self._websocket = websocket
        self.closed = False
        #: whether bytes have passed since the timeout looked last
        self.stirred = False
        self._up: Any = None
        self._down: Any = None
        self._timer: Any = None
        self._greenlet: Any = None

    @property
    def request(self) -> Any:
        """The request that asked for it (a Werkzeug ``Request``)."""
        return self._make_request()

    @property
    def bytes_in(self) -> int:
        """Bytes that have gone from the client to the target."""
        return int(self._up.count) if self._up is not None else 0

    @property
    def bytes_out(self) -> int:
        """Bytes that have gone from the target to the client."""
        return int(self._down.count) if self._down is not None else 0

    def run(self, client: Any, client_early: bytes, upstream: Any, upstream_early: bytes) -> None:
        """Pass bytes until both sides have ended, or one has failed.

        :param client, upstream: non-blocking sockets; they are shut down, not closed.
        """
        loop = get_hub().loop
        watchers = loop.io(client.fileno(), 1), loop.io(upstream.fileno(), 1)
        self._up = _TunnelDirection(self, client, upstream, watchers[0], self._websocket)
        self._down = _TunnelDirection(self, upstream, client, watchers[1], self._websocket)
        self._greenlet = getcurrent()
        try:
            if self._ws_timeout is not None:
                self._watch_silence(self._ws_timeout)
            self._down.start(upstream_early)
            if not self.closed:
                self._up.start(client_early)
            while not self.closed:
                get_hub().switch()
        finally:
            self._greenlet = None
            self.close()
            with contextlib.ExitStack() as stack:
                # all of them, also when one fails
                for sock in client, upstream:
                    stack.callback(_shut, sock)
                for watcher in watchers:
                    stack.callback(watcher.close)

    def way_ended(self) -> None:
        """One direction is over."""
        if self._up.finished and self._down.finished:
            self.close()

    def _watch_silence(self, seconds: float) -> None:
        self._timer = get_hub().loop.timer(seconds / 4, seconds / 4)
        quiet = 0

        def look() -> None:
            nonlocal quiet
            quiet = 0 if self.stirred else quiet + 1
            self.stirred = False
            if quiet >= 4:
                self.close()  # it raises nothing

        self._timer.start(look)

    def leave(self) -> None:
        """Called in the hub: the worker leaves, and so do its other tunnels."""
        if self.closed or not self._websocket or self._ws_stop != "close":
            return
        try:
            self._down.say_farewell(masked=False)
            if not self.closed:
                self._up.say_farewell(masked=True)
            if not self.closed:
                if self._timer is not None:
                    self._timer.close()
                self._timer = get_hub().loop.timer(_CLOSING)
                self._timer.start(self.close)
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Called in the hub: what nothing here expects has happened in a callback."""
        failed_callback(f"the tunnel to {self.target}", error)
        self.close()

    def close(self) -> None:
        """End it, in both directions; harmless when repeated. It raises nothing."""
        if self.closed:
            return
        self.closed = True
        timer, self._timer = self._timer, None
        for part in timer, self._up, self._down:
            try:
                if part is not None:
                    part.close()
            except Exception as error:
                failed_callback(f"the tunnel to {self.target}", error)
        if self._greenlet is not None:
            get_hub().loop.run_callback(self._wake, self._greenlet)

    def _wake(self, greenlet: Any) -> None:
        if self._greenlet is greenlet:
            greenlet.switch()


def _shut(sock: Any) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def bridge(recv: Any, send: Any, close: Any) -> tuple[Any, Any]:
    """A plain socket that stands for a connection with TLS, carried by two greenlets.

    :param recv, send: of the connection; they wait.
    :param close: ends both.
    :returns: the socket, and what ends the greenlets.
    """
    near, far = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    inner = GeventStream(far, runtime())

    def inward() -> None:
        try:
            while data := recv(_PIECE):
                inner.send(data)
        except OSError:
            inner.shutdown()
        except Exception as error:
            failed_callback("one side of a tunnel with TLS", error)
            inner.shutdown()
        else:
            inner.shutdown(socket.SHUT_WR)

    def outward() -> None:
        try:
            while data := inner.recv(_PIECE):
                send(data)
        except OSError:
            inner.shutdown()
        except Exception as error:
            failed_callback("one side of a tunnel with TLS", error)
            inner.shutdown()
        else:
            close()

    tasks = [gevent.spawn(inward), gevent.spawn(outward)]

    def end() -> None:
        try:
            gevent.joinall(tasks[1:], timeout=_CLOSING)
            gevent.killall(tasks)
        finally:
            try:
                inner.close()
            finally:
                near.close()

    return near, end
