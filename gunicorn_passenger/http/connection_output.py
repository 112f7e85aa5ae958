"""What goes out over one client connection: responses, the pending one, and the waits for a slow client.

Process: a serving process, in the greenlets of the connection and of the application.
Never: read from the client, or wait for it without a timeout.

:class:`.connection.Connection` extends the class instead of owning an object of it: each response goes
through :meth:`ConnectionOutput.send`, and a delegation would cost a Python call there.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any

import gevent
from gevent import get_hub, getcurrent
from gevent.exceptions import ConcurrentObjectUseError

from gunicorn_passenger.errors import ClientDisconnected, client_disconnected
from gunicorn_passenger.http.listener_context import ListenerContext

#: Bytes that ``sendfile`` sends before other greenlets run.
_SENDFILE = 1 << 20
#: Bytes of the send buffer of a UNIX socket whose client has not taken all at once, if the system allows it
#: (net.core.wmem_max). That of TCP grows by itself, unless a program sets it (tcp(7)).
_UNIX_SEND_BUFFER = 1 << 18

_WRITABLE = 2
_DISCONNECTED = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNABORTED}


class ConnectionOutput:
    """A client's non-blocking socket, and one pending output."""

    __slots__ = (
        "_blocked",
        "_hub",
        "_quantum_ends",
        "_raw",
        "_sending",
        "_unsent",
        "_writable",
        "listener",
        "pending",
        "sock",
    )

    def __init__(self, listener: ListenerContext, sock: Any) -> None:
        """
        :param listener: gives the timeout and counts the bytes.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        """
        self.listener = listener
        self.sock = sock
        self._raw = sock._sock
        self._hub = get_hub()
        #: The watcher, made when it is first needed.
        self._writable: Any = None
        #: the greenlet that waits until it can send, and the bytes in the kernel's buffer when the wait began
        self._sending: Any = None
        self._unsent = 0
        #: when other greenlets get their turn (by ``monotonic``); 0.0 before the present work is measured
        self._quantum_ends = 0.0
        #: A response that the coalescer has not sent, or the rest of one: then output is blocked. All other
        #: output sends it first.
        self.pending = b""
        self._blocked = False

    def send(self, data: bytes) -> None:
        """Send all of it.

        :raises ClientDisconnected: when the connection is broken, or as :meth:`wait_writable`.
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

    def drop_pending(self) -> None:
        """In a forked child: the parent process sends the pending response."""
        self.pending = b""

    def _send_pending(self) -> None:
        pending, self.pending, self._blocked = self.pending, b"", False
        if pending:
            self.listener.sent -= len(pending)  # the coalescer has counted it
            self.send(pending)

    def send_vector(self, head: bytes, body: bytes) -> None:
        """Send both without copying the body.

        :raises ClientDisconnected: as :meth:`send`.
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
        :raises ClientDisconnected: as :meth:`send`.
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
        """Count bytes that other code has sent to the client."""
        self.listener.sent += count

    def raw_fileno(self) -> int:
        """The descriptor, for the kernel to send to."""
        return int(self._raw.fileno())

    def wait_writable(self) -> None:
        """Wait until the client takes more.

        When the wait is interrupted, the connection is closed: the rest of the data will not be sent, so
        whatever came next would be read in its place. An application interrupts it with ``gevent.Timeout``.

        :raises ClientDisconnected: when the client reads nothing for the write timeout.
        """
        if self._writable is None:
            self._writable = self._hub.loop.io(self._raw.fileno(), _WRITABLE)
            self._enlarge_send_buffer()
        if self._writable.active:
            raise ConcurrentObjectUseError("another greenlet is already sending the response's body")
        writes = self.listener.writes
        self._sending = getcurrent()
        self._unsent = self._count_unsent()
        self._quantum_ends = 0.0
        writes.add(self)
        self._writable.start(self._sending.switch)
        timed_out: Any = True
        try:
            timed_out = self._hub.switch()
        finally:
            self._writable.stop()
            writes.remove(self, None)
            if timed_out:
                self.abort()
        if timed_out:
            raise ClientDisconnected(
                errno.ETIMEDOUT, f"the client has read nothing of a response for {writes.seconds:g} s"
            )

    def _enlarge_send_buffer(self) -> None:
        """Have the kernel take more of a response at a time, and wake this process less often."""
        sock = self._raw
        # the kernel counts its own overhead, too: it reports twice what was set (socket(7))
        is_small = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 * _UNIX_SEND_BUFFER
        if is_small and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)

    def on_write_timeout(self) -> None:
        """Called in the hub: the socket was not writable for the write timeout.

        A slow client may need longer than that to empty enough of a large send buffer. It is not at fault
        while the buffer shrinks.
        """
        unsent, self._unsent = self._unsent, self._count_unsent()
        if self._unsent < unsent:
            self.listener.writes.add(self)
        else:
            self._sending.switch(True)

    def _count_unsent(self) -> int:
        """Bytes in the kernel's buffer that the client has not acknowledged, or on a UNIX socket not read."""
        return int.from_bytes(ioctl(self._raw.fileno(), TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)

    def abort(self) -> None:
        """Close the connection in the middle of a response, with a reset where the protocol has one."""
        raise NotImplementedError
