"""The bytes of one client connection: buffered input, output, and the waits for both.

Process: a worker, in the greenlets of the connection and of the application.
Never: know a request or a response, or wait without a deadline for a client that owes something.

:class:`.connection.Connection` extends the class instead of owning an object of it: each response goes
    through
:meth:`Transport.send`, and a delegation would cost a Python call there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from fcntl import ioctl
from termios import FIONREAD
from time import monotonic
from typing import Any

import gevent
from gevent import get_hub, getcurrent
from gevent.exceptions import ConcurrentObjectUseError

from gunicorn_passenger.errors import BodyTimeout, ClientDisconnected, body_incomplete, client_disconnected
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.http.timeouts import TimeoutQueue

#: Bytes that one read of the socket asks for while a request's head is awaited.
READ_SIZE = 16384
#: Bytes that ``sendfile`` sends before other greenlets get their turn.
_SENDFILE = 1 << 20
#: Seconds that a closing connection reads what its client still sends.
_LINGER = 10.0

_READABLE, _WRITABLE = 1, 2
_DISCONNECTED = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNABORTED}


class Transport:
    """A client's non-blocking socket, with a buffer for input and one pending output."""

    __slots__ = (
        "_blocked",
        "_bounded",
        "_budget",
        "_expired",
        "_hub",
        "_raw",
        "_readable",
        "_sending",
        "_waiting",
        "_writable",
        "at",
        "buf",
        "greenlet",
        "listener",
        "pending",
        "sock",
    )

    def __init__(self, listener: ListenerContext, sock: Any) -> None:
        """
        :param listener: gives the timeouts and counts the bytes.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        """
        self.listener = listener
        self.sock = sock
        self._raw = sock._sock
        #: bytes that have come in, and how many of them are used up
        self.buf = b""
        self.at = 0
        self._hub = get_hub()
        #: Watchers; each is made when it is first waited for. Most connections with one request need none.
        self._readable: Any = None
        self._writable: Any = None
        #: the greenlet that serves the connection; ``None`` while there is none
        self.greenlet: Any = None
        #: the greenlet that waits for input, and whether its deadline has passed
        self._waiting: Any = None
        self._expired = False
        #: whether one deadline holds for all input, and how many bytes of it may be dropped while a body is
        self._bounded = False
        self._budget: int | None = None
        #: the greenlet that waits until it can send
        self._sending: Any = None
        #: A response that the coalescer has not sent, or what could not be sent of it: then output is
        #: blocked. All other output sends it first.
        self.pending = b""
        self._blocked = False

    # --- input -----------------------------------------------------------------------------------

    def buffered(self) -> int:
        """Bytes that have come in and are not used up."""
        return len(self.buf) - self.at

    def receive(self, most: int) -> bytes:
        """The next bytes, at most so many; empty when the client sends no more.

        :raises BodyTimeout: when nothing comes for too long.
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

    def more(self) -> bytes:
        """Wait for bytes and append them to the buffer; empty when the client sends no more."""
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
            return data

    def drain(self, body: Any, most: int) -> bool:
        """Read and drop the rest of a body, within the time of a request's head.

        :param body: a :class:`.body.RequestBody` of this connection.
        :param most: bytes that it may have on the wire, framing included.
        :returns: whether that was all of it.
        """
        self._send_pending()  # the client may wait for it with the rest
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
        """Until :meth:`end_deadline`, one deadline holds for all that is read: that of a request's head.

        :returns: whether there was none before.
        """
        if self._bounded:
            return False
        self._bounded = True
        self.listener.heads.add(self)
        return True

    def end_deadline(self) -> None:
        self._bounded = False
        self.listener.heads.remove(self, None)

    def expire(self) -> None:
        """Called in the hub when a deadline has passed: the greenlet that waits for input finds out."""
        self._expired = True
        self._waiting.switch()

    def read_until_empty_line(self, data: bytes, check: Callable[[bytearray, int], object]) -> bytes:
        """Read until there is an empty line, until one deadline for all of it.

        :param data: what has come in already.
        :param check: is given what has come in, and how much of that it has been given before; raises an
            error when it is wrong.
        :raises TimeoutError: at the deadline.
        :raises ClientDisconnected: when the client sends no more.
        """
        self.buf = data
        heads = self.listener.heads
        heads.add(self)
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
                    raise ClientDisconnected(0, "Ignored premature client disconnection in a request's head.")
                came += more
        finally:
            heads.remove(self, None)
        return bytes(came)

    def has_input(self) -> bool:
        """Whether the client has sent bytes that are not used up."""
        if self.at < len(self.buf):
            return True
        if self.sock.taken:
            return False  # the application may have closed it
        with contextlib.suppress(OSError):
            return bool(ioctl(self._raw.fileno(), FIONREAD, b"\0\0\0\0") != b"\0\0\0\0")
        return False

    def _read(self, most: int) -> bytes:
        """What there is to read, when the hub has said that there is something; empty after the deadline."""
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
        """The watcher that tells when there is something to read."""
        if self._readable is None:
            self._readable = self._hub.loop.io(self._raw.fileno(), _READABLE)
        return self._readable

    def _wait(self, queue: TimeoutQueue | None) -> None:
        """Wait until there is something to read, or until the deadline (``_expired``)."""
        readable = self._reader()
        if readable.active:
            raise ConcurrentObjectUseError("another greenlet reads the request's body already")
        self._waiting = getcurrent()
        self._expired = False
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

    # --- output ----------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send all of it.

        :raises ClientDisconnected: when the connection is broken.
        """
        try:
            sent = self._raw.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise client_disconnected(error) from None
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:])
        self.listener.sent += len(data)

    def flush_pending(self) -> None:
        """Send the pending response without waiting. Called by the coalescer in any greenlet."""
        if not self.pending:
            return
        # the connection's greenlet waits until it can send the rest, or meets the error again
        with contextlib.suppress(OSError):
            self.pending = self.pending[self._raw.send(self.pending) :]
        if self.pending:
            self._blocked = True
            self._hub.loop.run_callback(self._wake)

    def _wake(self) -> None:
        """Have the connection's greenlet send what is pending, when it waits for a request."""
        raise NotImplementedError

    def drop_pending(self) -> None:
        """In a forked child: the parent process sends the pending response."""
        self.pending = b""

    def _send_pending(self) -> None:
        pending, self.pending, self._blocked = self.pending, b"", False
        if pending:
            self.listener.sent -= len(pending)  # the coalescer has counted it
            self.send(pending)

    def send_vector(self, head: bytes, body: bytes) -> None:
        """Send both without copying the second.

        :raises ClientDisconnected: when the connection is broken.
        """
        try:
            sent = self._raw.sendmsg((head, body))
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise client_disconnected(error) from None
        if sent < len(head):
            self._send_rest(memoryview(head)[sent:])
            sent = len(head)
        self._send_rest(memoryview(body)[sent - len(head) :])
        self.listener.sent += len(head) + len(body)

    def _send_rest(self, data: memoryview) -> None:
        while data:
            try:
                data = data[self._raw.send(data) :]
            except BlockingIOError:
                self.wait_writable()
            except OSError as error:
                raise client_disconnected(error) from None

    def send_file(self, file: int, offset: int, count: int) -> int:
        """Send a part of a file.

        :param file: its descriptor.
        :returns: how many of the ``count`` bytes the file had.
        :raises ClientDisconnected: when the connection is broken.
        """
        done = 0
        while done < count:
            try:
                sent = os.sendfile(self._raw.fileno(), file, offset + done, min(count - done, _SENDFILE))
            except BlockingIOError:
                self.wait_writable()
                continue
            except OSError as error:
                if error.errno in _DISCONNECTED:
                    raise client_disconnected(error) from None
                raise  # reading the file failed
            if not sent:
                break
            done += sent
            self.listener.sent += sent
            if done < count:
                gevent.sleep(0)
        return done

    def count_sent(self, count: int) -> None:
        """Other code has sent so many bytes to the client."""
        self.listener.sent += count

    def raw_fileno(self) -> int:
        """The descriptor, for the kernel to send to."""
        return int(self._raw.fileno())

    def wait_writable(self) -> None:
        """Wait until the client takes more."""
        if self._writable is None:
            self._writable = self._hub.loop.io(self._raw.fileno(), _WRITABLE)
        if self._writable.active:
            raise ConcurrentObjectUseError("another greenlet sends the response's body already")
        self._sending = getcurrent()
        self._writable.start(self._sending.switch)
        try:
            self._hub.switch()
        finally:
            self._writable.stop()

    # --- the end ---------------------------------------------------------------------------------

    def lingering_close(self) -> None:
        """Let the client read its response although it may still be sending (RFC 9112 section 9.6).

        After a close the kernel replies to what comes with a reset, which can overtake the response.
        """
        try:
            self._send_pending()
            self._raw.shutdown(socket.SHUT_WR)
            end = monotonic() + _LINGER
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
                self._interrupt(self._writable, self._sending)
            self._writable.close()
        self.sock.error = self.sock.connection = None
        self.greenlet = self._waiting = self._sending = None

    def _interrupt(self, watcher: Any, greenlet: Any) -> None:
        """A greenlet of the application still uses the body or the response."""
        watcher.stop()
        self._hub.loop.run_callback(greenlet.throw, body_incomplete())
