"""An upgraded connection: passes bytes both ways until both sides have ended.

Process: a gevent worker; the callbacks run in the hub.
Never: block, or buffer more than one read of either side.

A direction has no greenlet: the hub calls when there is data to read, and mostly the other side takes all of
it at once. When it does not, the rest is kept, reading stops, and the hub calls when there is room.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import gevent
from gevent import get_hub, getcurrent

from gunicorn_passenger.http.engineio import sends_before_close
from gunicorn_passenger.http.websocket_frames import CLOSE, GOING_AWAY, FrameTracker, close_frame
from gunicorn_passenger.proxy.log import failed_callback
from gunicorn_passenger.proxy.upstream_io import runtime

#: The size of one read, in bytes.
_READ = 65536
#: How long the two ends of a WebSocket may take to close it, in seconds, after they were sent a Close or one
#: of them has ended its side, and how long a Close waits for the target's first frames.
_CLOSING = 2.0


class _TunnelDirection:
    """One direction: from one socket to the other."""

    __slots__ = (
        "_close_frame",
        "_dropping",
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
        "pieces",
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
        #: the bytes that the sink has not taken yet; nothing is read meanwhile
        self._pending: Any = b""
        #: a Close frame, which is to be the last frame
        self._close_frame = b""
        #: whether it was sent: further data of the source is dropped
        self._dropping = False
        #: how many bytes have passed, and in how many pieces
        self.count = self.pieces = 0
        #: whether the source sends no more, and whether the sink knows
        self.ended = self.finished = False

    def start(self, early: bytes) -> None:
        """
        :param early: the bytes that the source has sent already.
        """
        self._readable.start(self._on_readable)
        if early:
            self._pass(early)

    def _on_readable(self) -> None:
        try:
            data = self._recv(_READ)
            if not data:
                self.ended = True
                self._readable.stop()
                if not self._pending:
                    self._pass_end()
            elif not self._dropping:
                self._tunnel.active = True
                self._pass(data)
        except BlockingIOError:
            return
        except OSError:
            self._tunnel.close()
        except Exception as error:
            self._tunnel.failed(error)

    def _pass(self, data: bytes) -> None:
        closes = False
        if self._frames is not None:
            closes = self._frames.between and data[0] & 0xF == CLOSE
            inside = self._frames.feed(data)
            if self._close_frame:
                reached = inside < len(data) or self._frames.between
                data = data[:inside]
                if reached:
                    data += self._close_frame
                    self._dropping = True
        self._write(data)
        if self._tunnel.shutdown_due:
            self._tunnel.on_passed(self, closes)

    def _write(self, data: bytes) -> None:
        self.count += len(data)
        self.pieces += 1
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
            self._tunnel.active = True
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
        """The source has shut down its side: shut down the sink for writing (a half-close)."""
        self.finished = True
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._tunnel.close()
            return
        self._tunnel.on_direction_closed()

    def send_close_frame(self, masked: bool) -> None:
        """Send a Close frame after the current frame, and nothing after it."""
        if self.ended or self._frames is None or self._close_frame:
            return
        self._close_frame = close_frame(GOING_AWAY, masked)
        if self._frames.between:
            self._dropping = True
            self._write(self._close_frame)

    def close(self) -> None:
        try:
            self._readable.stop()
        finally:
            if self._room is not None:
                self._room.close()


class Tunnel:
    """An upgraded connection, as the handlers of ``open`` and ``close`` get it."""

    __slots__ = (
        "__weakref__",
        "_down",
        "_greenlet",
        "_make_request",
        "_timer",
        "_up",
        "_websocket",
        "_ws_stop",
        "_ws_timeout",
        "active",
        "closed",
        "shutdown_due",
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
        :param websocket: whether it carries RFC 6455's frames, between which a Close can be sent.
        """
        #: where it leads
        self.target = target
        self._make_request = make_request
        self._ws_timeout = ws_timeout
        self._ws_stop = ws_stop
        self._websocket = websocket
        self.closed = False
        #: whether bytes have passed since the timeout was last checked
        self.active = False
        #: whether the worker drains, and a Close frame waits for the target's first frames
        self.shutdown_due = False
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
        _tunnels.add(self)
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
                # all of them, even when one fails
                for sock in client, upstream:
                    stack.callback(_shut, sock)
                for watcher in watchers:
                    stack.callback(watcher.close)

    def on_direction_closed(self) -> None:
        """Close the tunnel when both directions have ended; a WebSocket soon after the first of them.

        A WebSocket has no half-close: a side that ends expects nothing more (RFC 6455 section 7.1.1).
        """
        if self._up.finished and self._down.finished:
            self.close()
        elif self._websocket:
            self.shutdown_due = False
            self._close_soon()

    def _close_soon(self) -> None:
        if self._timer is not None:
            self._timer.close()
        self._timer = get_hub().loop.timer(_CLOSING)
        self._timer.start(self._end_wait)

    def _end_wait(self) -> None:
        """Called in the hub: a side had the time to end, or the target to send all its first frames.

        If it has sent only one, that is enough now.
        """
        if self.shutdown_due and self._down.pieces:
            self.shutdown_due = False
            self.begin_shutdown(waited=True)
        else:
            self.close()

    def _watch_silence(self, seconds: float) -> None:
        self._timer = get_hub().loop.timer(seconds / 4, seconds / 4)
        quiet = 0

        def look() -> None:
            nonlocal quiet
            quiet = 0 if self.active else quiet + 1
            self.active = False
            if quiet >= 4:
                self.close()  # it raises nothing

        self._timer.start(look)

    def begin_shutdown(self, waited: bool = False) -> None:
        """Called in the hub when the worker drains: close a WebSocket with 1001, "going away".

        :param waited: whether the target had the time to send its first frames.
        """
        if self.closed or not self._websocket or self._ws_stop != "close":
            return
        try:
            if not waited and self._down.pieces < sends_before_close(self.request.query_string):
                self.shutdown_due = True
                self._close_soon()
                return
            self._down.send_close_frame(masked=False)
            if not self.closed:
                self._up.send_close_frame(masked=True)
            if not self.closed:
                self._close_soon()
        except Exception as error:
            self.failed(error)

    def on_passed(self, direction: _TunnelDirection, closes: bool) -> None:
        """Called in the hub while a Close frame waits for the target's first frames.

        :param closes: whether what has passed begins with a Close frame: the target has been quicker.
        """
        if direction is self._down:
            self.shutdown_due = False
            if not closes:
                self.begin_shutdown()

    def failed(self, error: Exception) -> None:
        """Called in the hub after an unexpected error in a callback: log it, and close the tunnel."""
        failed_callback(f"the tunnel to {self.target}", error)
        self.close()

    def leave_to_parent(self) -> None:
        """In a forked child: the tunnel is the parent's, so no callback of it may run."""
        for part in self._timer, self._up, self._down:
            if part is not None:
                part.close()

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


#: all tunnels of this process
_tunnels: WeakSet[Tunnel] = WeakSet()


def _leave_to_parent() -> None:
    for tunnel in list(_tunnels):
        tunnel.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


def _shut(sock: Any) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def tls_bridge(recv: Any, send: Any, close: Any) -> tuple[Any, Any]:
    """A plain socket in place of a TLS connection; two greenlets move the bytes.

    :param recv, send: of the connection; they wait.
    :param close: ends both.
    :returns: the socket, and a function that ends the greenlets.
    """
    near, far = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    inner = runtime().open(far)

    def pump(read: Any, write: Any, end: Callable[[], object]) -> None:
        try:
            while data := read(_READ):
                write(data)
        except OSError:
            inner.shutdown()
        except Exception as error:
            failed_callback("one side of a tunnel with TLS", error)
            inner.shutdown()
        else:
            end()

    tasks = [
        gevent.spawn(pump, recv, inner.send, inner.shutdown_write),
        gevent.spawn(pump, inner.recv, send, close),
    ]

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
