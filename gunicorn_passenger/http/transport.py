"""The bytes of one client connection: buffered input, the waits for it, and the end. It extends the output.

Process: a serving process, in the greenlets of the connection and of the application.
Never: know a request or a response, or wait without a timeout for the client.

:class:`.connection.Connection` extends the class instead of owning an object of it, for the reason that
:mod:`.connection_output` gives.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from fcntl import ioctl
from termios import FIONREAD
from time import monotonic
from typing import Any

import gevent
from gevent import getcurrent
from gevent.exceptions import ConcurrentObjectUseError

from gunicorn_passenger.errors import BodyTimeout, ClientDisconnected, body_incomplete, client_disconnected
from gunicorn_passenger.http.connection_output import ConnectionOutput
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.http.timeouts import TimeoutQueue

#: Bytes that one read of the socket asks for while it waits for a request.
READ_SIZE = 16384
#: Seconds that a closing connection reads what its client still sends.
_LONGEST_LINGER = 10.0
#: Seconds that one connection works, without a wait for its client, before other greenlets run.
_QUANTUM = 0.005

_READABLE = 1


class Transport(ConnectionOutput):
    """A client's non-blocking socket, with a buffer for input and one pending output."""

    __slots__ = (
        "_bounded",
        "_budget",
        "_expired",
        "_readable",
        "_waiting",
        "at",
        "buf",
        "greenlet",
    )

    def __init__(self, listener: ListenerContext, sock: Any) -> None:
        """
        :param listener: gives the timeouts and counts the bytes.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        """
        ConnectionOutput.__init__(self, listener, sock)
        #: the bytes that were received, and how many of them are used up
        self.buf = b""
        self.at = 0
        #: The watcher, made when it is first needed. A connection with one request mostly needs none.
        self._readable: Any = None
        #: the greenlet that serves the connection; ``None`` while the hub waits
        self.greenlet: Any = None
        #: the greenlet that waits for input, and whether its timeout has passed
        self._waiting: Any = None
        self._expired = False
        #: whether one timeout holds for all input; while a body is discarded, how many bytes may still come
        self._bounded = False
        self._budget: int | None = None

    # --- input -----------------------------------------------------------------------------------

    def buffered(self) -> int:
        """How many received bytes are not used up."""
        return len(self.buf) - self.at

    def read_some(self, most: int) -> bytes:
        """The next bytes, at most ``most``; empty when the client sends no more.

        :raises BodyTimeout: when the client sends nothing for the body timeout.
        :raises ClientDisconnected: when the connection is broken.
        """
        at = self.at
        if at == len(self.buf):
            if most >= READ_SIZE:
                return self._await(most)
            self.buf, self.at = self._await(READ_SIZE), 0
            at = 0
        data = self.buf[at : at + most]
        self.at = at + len(data)
        return data

    def fill_buffer(self) -> bytes:
        """Receive bytes and append them to the buffer; empty when the client sends no more."""
        data = self._await(READ_SIZE)
        self.buf = self.buf[self.at :] + data
        self.at = 0
        return data

    def _await(self, most: int) -> bytes:
        while True:
            try:
                data: bytes = self._raw.recv(most)
            except BlockingIOError:
                listener = self.listener
                self._wait(None if self._bounded else listener.bodies)
                if self._expired:
                    self._expired = False
                    queue = listener.heads if self._bounded else listener.bodies
                    raise BodyTimeout(queue.seconds) from None
                continue
            except OSError as error:
                raise client_disconnected(error) from None
            if self._budget is not None:
                self._budget -= len(data)
                if self._budget < 0:
                    raise BodyTimeout(0.0)
            self.share_loop()
            return data

    def share_loop(self) -> None:
        """Let other greenlets run when this connection has worked for too long without a wait.

        A client that always has data ready, or takes all that it is sent, would have the event loop alone.
        """
        now = monotonic()
        if now > self._quantum_ends:
            if self._quantum_ends:
                gevent.sleep(0)
                now = monotonic()
            self._quantum_ends = now + _QUANTUM

    def discard_body(self, body: Any, most: int) -> bool:
        """Read and discard the rest of a body, within the timeout for a header section.

        :param body: a :class:`.body.RequestBody` of this connection.
        :param most: bytes that it may have on the wire, framing included.
        :returns: whether that was all of it.
        """
        self._send_pending()  # the client may send the rest only when it has the response
        self._budget = most - self.buffered()
        self.begin_deadline()
        try:
            while body.read1():
                pass
        except Exception:
            return False
        finally:
            self._budget = None
            self.end_deadline()
        return True

    def begin_deadline(self) -> bool:
        """Until :meth:`end_deadline`, one timeout holds for all input: that of a header section.

        :returns: whether there was no such timeout before.
        """
        if self._bounded:
            return False
        self._bounded = True
        self._expired = False
        self.listener.heads.add(self)
        return True

    def end_deadline(self) -> None:
        self._bounded = self._expired = False
        self.listener.heads.remove(self, None)

    def expire(self) -> None:
        """Called in the hub when a timeout has passed: wake the greenlet that waits for input.

        A deadline can pass while the greenlet lets others run: then its next wait ends at once.
        """
        self._expired = True
        if self._readable is not None and self._readable.active:
            self._waiting.switch()

    def read_until_empty_line(self, data: bytes, check: Callable[[bytearray, int], object]) -> bytes:
        """Read up to an empty line, within one timeout.

        :param data: what was received already.
        :param check: called with all that was received, and with how many of these bytes it knows from the
            call before; it raises an error when they are invalid.
        :raises TimeoutError: when the timeout has passed.
        :raises ClientDisconnected: when the client sends no more.
        """
        self.buf = data
        self.begin_deadline()
        came = bytearray(data)
        seen = 0
        try:
            while came.find(b"\r\n\r\n", max(seen - 3, 0)) < 0:
                check(came, seen)
                seen = len(came)
                self._wait(None)
                more = b"" if self._expired else self._read(READ_SIZE)
                if self._expired:
                    raise TimeoutError
                if not more:
                    raise ClientDisconnected(0, "the client disconnected within the headers of a request")
                came += more
        finally:
            self.end_deadline()
        return bytes(came)

    def has_input(self) -> bool:
        """Whether the client has sent bytes that are not used up."""
        if self.at < len(self.buf):
            return True
        if self.sock.taken:
            return False  # the application may have closed it
        fd = self._raw.fileno()  # negative when the connection was aborted
        with contextlib.suppress(OSError):
            return fd >= 0 and bool(ioctl(fd, FIONREAD, b"\0\0\0\0") != b"\0\0\0\0")
        return False

    def _read(self, most: int) -> bytes:
        """Read a socket that the hub has reported as readable; empty after the timeout."""
        while True:
            try:
                data: bytes = self._raw.recv(most)
                return data
            except BlockingIOError:
                self._wait(None)
                if self._expired:
                    return b""
            except OSError as error:
                raise client_disconnected(error) from None

    def _reader(self) -> Any:
        """The watcher that reports when the socket is readable."""
        if self._readable is None:
            self._readable = self._hub.loop.io(self._raw.fileno(), _READABLE)
        return self._readable

    def _wait(self, queue: TimeoutQueue | None) -> None:
        """Wait until the socket is readable, or until the timeout (``_expired``).

        :param queue: the timeout of this wait; ``None`` within a deadline.
        """
        readable = self._reader()
        if readable.active:
            raise ConcurrentObjectUseError("another greenlet is already reading the request's body")
        if not self._bounded:
            self._expired = False
        elif self._expired:
            return
        self._waiting = getcurrent()
        self._quantum_ends = 0.0
        if queue is not None:
            queue.add(self)
        readable.start(self._waiting.switch)
        try:
            self._hub.switch()
        finally:
            readable.stop()
            if queue is not None:
                queue.remove(self, None)
            self._waiting = self.greenlet

    # --- the end ---------------------------------------------------------------------------------

    def leave_to_parent(self) -> None:
        """In a forked child: the client is the parent's. No greenlet of the child may wake up for it.

        A greenlet that wakes up for another reason finds the socket closed. It stays open in the parent.
        """
        self.drop_pending()
        self.buf, self.at = b"", 0  # a request that was received ahead is the parent's, too
        for watcher in self._readable, self._writable:
            if watcher is not None:
                watcher.stop()
        self.sock.leave_to_parent()

    def lingering_close(self) -> None:
        """Let the client read its response although it may still be sending (RFC 9112 section 9.6).

        After a close, the kernel replies to further bytes with a reset, which can overtake the response.
        """
        try:
            self._send_pending()
            self._raw.shutdown(socket.SHUT_WR)
            end = monotonic() + _LONGEST_LINGER
            while monotonic() < end:
                self._wait(self.listener.lingering)
                if self._expired or not self._raw.recv(1 << 20):
                    return
        except OSError:
            return

    def _release(self) -> None:
        """Stop all waits. The socket stays open."""
        if self.pending:  # the greenlet was killed before it could send
            with contextlib.suppress(OSError):
                self._raw.send(self.pending)
            self.drop_pending()
        if self._readable is not None:
            if self._waiting is not self.greenlet:
                self._interrupt(self._readable, self._waiting)
            self._readable.close()
            self._readable = None
        if self._writable is not None:
            if self._writable.active:
                self.listener.writes.remove(self, None)
                self._interrupt(self._writable, self._sending)
            self._writable.close()
        self.sock.connection = None
        if self.sock.error is not None:
            self.sock.error = None
        self.greenlet = self._waiting = self._sending = None

    def _interrupt(self, watcher: Any, greenlet: Any) -> None:
        """A greenlet of the application still uses the body or the response."""
        watcher.stop()
        self._hub.loop.run_callback(greenlet.throw, body_incomplete())
