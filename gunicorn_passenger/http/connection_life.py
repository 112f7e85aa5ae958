"""The life of one client connection: where it waits without a greenlet, how it drains, and how it ends.

Process: a serving process, in its hub and in the greenlets of the connection and of the application.
Never: parse a request. :class:`.connection.Connection` does, and extends the class.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import sys
from typing import Any

import gevent
from gevent import getcurrent

from gunicorn_passenger.errors import client_disconnected
from gunicorn_passenger.http.body import EMPTY_BODY, RequestBody
from gunicorn_passenger.http.connection_state import ConnectionState, set_checked
from gunicorn_passenger.http.disconnect import DisconnectWatch
from gunicorn_passenger.http.engineio import sends_before_close
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.http.request_head import NO_HEAD
from gunicorn_passenger.http.response import Response
from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.http.transport import READ_SIZE, Transport

_WEBSOCKET = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

_ACTIVE, _IDLE, _PARKED = ConnectionState.ACTIVE, ConnectionState.IDLE, ConnectionState.PARKED
_FLUSHING = ConnectionState.FLUSHING


class ConnectionLife(Transport):
    """What the acceptor, the drain and the proxy do with a connection.

    A base class and not an object of its own, which each new connection would have to make.
    """

    __slots__ = (
        "_acceptor",
        "_disconnect",
        "_stop_waiting",
        "addr",
        "body",
        "context",
        "extra_headers",
        "head",
        "idle_since",
        "is_new",
        "on_drain",
        "parsed",
        "response",
        "state",
        "tracked",
        "was_passed",
    )

    def __init__(self, acceptor: Any, listener: ListenerContext, sock: Any, addr: Any) -> None:
        """
        :param acceptor: the :class:`~.acceptor.Acceptor`, which is told when the connection ends or is idle.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        :param addr: what ``accept()`` gave.
        """
        Transport.__init__(self, listener, sock)
        self.state = ConnectionState.NEW
        self._acceptor = acceptor
        sock.connection = self
        # A client of a UNIX socket can bind its own end to a name of any bytes, which is not an address.
        self.addr = addr if addr.__class__ is tuple else ""
        self.context = listener.new_context(self.addr)
        self.head = b""
        self.body: RequestBody = EMPTY_BODY
        self.response: Response | None = None
        #: removes the connection from the timeout queue in which it waits for a request
        self._stop_waiting: Any = listener.new.remove
        #: created when it is first needed
        self._disconnect: DisconnectWatch | None = None
        #: whether it has had no request yet
        self.is_new = True
        #: for the :class:`~.timeouts.IdleTicker`: the tick since which it is idle, and whether it is tracked
        self.idle_since = 0
        self.tracked = False
        #: the headers of the last request
        self.parsed = NO_HEAD
        #: called when the worker drains, by the code that has upgraded the connection
        self.on_drain: Any = None
        #: whether a sibling has passed it here with a request, which is not passed on again
        self.was_passed = False
        #: header lines that the listener adds to the response
        self.extra_headers = b""

    def serve(self, greenlet: gevent.Greenlet) -> None:
        """Serve the connection in this greenlet until it is idle or ends."""
        raise NotImplementedError

    # --- between requests ------------------------------------------------------------------------

    def _ready(self) -> None:
        """Called in the hub when a parked connection is readable."""
        self._readable.stop()
        self._stop_waiting(self, None)
        self.state = _ACTIVE
        self.listener.greenlets.serve(self)

    def receive_ahead(self) -> None:
        """Receive what the client has sent, and let the greenlet take it from the buffer.

        Whatever the hub cannot receive, the greenlet tries to receive again, and meets the client's end or
        the error.
        """
        try:  # noqa: SIM105 - contextlib.suppress() would cost each request more than the call
            self.buf = self._raw.recv(READ_SIZE)
        except Exception:  # noqa: S110 - see above
            pass

    def _arrive(self) -> None:
        """Called in the hub when an idle connection is readable, and others may be, too."""
        self._readable.stop()
        self.state = _ACTIVE  # it neither expires nor migrates any more, nor does it make room
        self.listener.idle.remove(self, None)
        self.receive_ahead()
        self._hub.loop.run_callback(self._waiting.switch)

    def _park(self, queue: TimeoutQueue) -> None:
        """Wait for a request without a greenlet.

        :param queue: closes the connection, or calls :meth:`wait_longer`, after its time.
        """
        self.state = _PARKED
        self.greenlet = self._waiting = None
        self._expired = False
        self.head = b""
        self.parsed = NO_HEAD
        self._stop_waiting = queue.remove
        queue.add(self)
        self._reader().start(self._ready)
        if queue is not self.listener.new:
            self._acceptor.on_connection_idle()

    def wait_longer(self) -> None:
        """Called in the hub: a new connection has sent nothing for the keep-alive time."""
        silent = self.listener.silent
        self._stop_waiting = silent.remove
        silent.add(self)
        self._acceptor.on_connection_idle()

    def expire(self) -> None:
        """Called in the hub when a timeout has passed, or when an idle connection has to make room."""
        if self.state is _PARKED:
            self.close()
        else:
            Transport.expire(self)

    def reset(self) -> None:
        """Make the close of the connection a reset: then the client sees that the response is incomplete."""
        if isinstance(self.addr, tuple):
            # the rest of the body is not discarded, because that would close the connection cleanly first
            self.body.detach()
            self.body = EMPTY_BODY
            with contextlib.suppress(OSError):
                self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def abort(self) -> None:
        response = self.response
        self.reset()
        self.close()
        if response is not None:
            # the application continues, and its request ends as others do
            response.must_close = True
            self.response = response

    # --- what the proxy calls --------------------------------------------------------------------

    def hijack(self, head: bytes, status: str, headers: str) -> bytes:
        """Switch to another protocol. The caller then reads and writes the socket.

        :param head: the response that announces the protocol.
        :param status: its status, for the hooks and the log.
        :param headers: its header lines, likewise.
        :returns: the bytes that the client has sent already.
        """
        response = self.response
        assert response is not None
        early: bytes = self.sock.early + self.buf[self.at :]
        self.sock.early = self.buf = b""
        self.at = 0
        self.sock.taken = True
        self.state = ConnectionState.UPGRADED
        self.parsed = NO_HEAD
        response.switch_protocols(status, headers)
        self.send(head)
        return early

    def watch(self, gone: Any, argument: Any, body: bool = False) -> None:
        """Until :meth:`unwatch`, while the response is made: watch whether the client disconnects.

        :param gone: called in the hub, with ``argument``, when it does.
        :param body: whether a greenlet reads the request's body. Then only a reset counts: a client that
            sends no more may have sent all.
        """
        if self._disconnect is None:
            tcp = isinstance(self.addr, tuple)
            self._disconnect = DisconnectWatch(self._hub.loop, self._raw.fileno(), self._reader(), tcp)
        self._disconnect.start(gone, argument, self.at < len(self.buf) or self.sock.taken, body)

    def unwatch(self) -> None:
        """Stop watching: a client that disconnects is noticed when the response is sent."""
        if self._disconnect is not None:
            self._disconnect.cancel()

    def send_continue(self) -> None:
        """Ask the client for the body that the application reads (RFC 9110 section 10.1.1)."""
        if self.response is None or not self.response.headers_sent:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # --- the end ---------------------------------------------------------------------------------

    def begin_shutdown(self) -> None:
        """The worker drains. A client that has sent nothing gets as much time as an idle one."""
        if self.on_drain is not None:
            self.on_drain()
        elif self.sock.switched and self.listener.closes_websockets_on_exit and _WEBSOCKET.search(self.head):
            gevent.spawn(self.sock.close_websocket, sends_before_close(self.head.partition(b" ")[2]))
        elif self.is_new and self.state is _PARKED:
            self._stop_waiting(self, None)
            self._stop_waiting = self.listener.idle.remove
            self.listener.idle.add(self)
        elif self.state is _IDLE and not self.tracked:
            # it has kept its greenlet; only a parked connection can migrate
            self._expired = True
            self._hub.loop.run_callback(self._wake)

    def is_idle(self) -> bool:
        """Whether only the hub waits for the next request. A connection is not idle before its first wait."""
        return self.state is _PARKED

    def detach(self) -> tuple[Any, Any]:
        """Stop serving an idle connection.

        :returns: its socket and its client's address. The caller owns the socket.
        """
        assert self.is_idle()
        self._stop()
        return self.sock, self.addr

    def _wake(self) -> None:
        if self.state is _IDLE:
            self.greenlet.switch()
        elif self.state is _FLUSHING:
            self.listener.greenlets.serve(self)

    def end_with_flush(self) -> None:
        """Leave the connection to the coalescer, which sends its last response: then it ends."""
        self.state = _FLUSHING
        self.greenlet = self._waiting = None

    def flush_pending(self) -> None:
        """Send the pending response without waiting. Called by the coalescer in any greenlet."""
        pending = self.pending
        if not pending or self._blocked:
            return  # a response before this one has taken it along, or the greenlet sends it
        try:
            sent = self._raw.send(pending)
        except OSError:
            sent = 0  # the connection's greenlet waits until it can send, or meets the error again
        if sent < len(pending):
            self.pending = pending[sent:]
            self._blocked = True
            self._hub.loop.run_callback(self._wake)
            return
        self.pending = b""
        if self.state is _FLUSHING:
            self.close()

    def send_pending(self) -> None:
        """Send the pending response, if there is one, before the application uses the socket.

        Only the request that made the response waits for its client. Any other code that uses the socket,
        such as a greenlet that the request has left behind, finds the connection idle or at its end: then the
        connection's own greenlet sends what the kernel does not take at once.

        :raises ClientDisconnected: as :meth:`send`.
        """
        if not self.pending:
            return
        if self.state is _ACTIVE and getcurrent() is self.greenlet:
            self._send_pending()
        else:
            self.flush_pending()

    def close(self) -> None:
        """Close the connection, whatever it is doing."""
        if self.state is ConnectionState.CLOSED:
            return
        self._stop()
        self.sock.release()

    def end_without_socket(self) -> None:
        """The application has closed the socket: end the connection, after the response that has begun."""
        if self.response is not None:
            self.response.must_close = True
        if self._disconnect is not None:
            self._disconnect.cancel()
        if self.state is _PARKED:
            self._stop()  # at once: a parked connection can migrate
            return
        if self.state is _IDLE:
            self._readable.stop()  # gevent wakes those who wait for a descriptor that it closes
        self._hub.loop.run_callback(self._end_waits)

    def _end_waits(self) -> None:
        """Called in the hub: the greenlets that wait for the socket learn that it is closed."""
        writable, readable = self._writable, self._readable
        if writable is not None and writable.active:
            self._sending.throw(client_disconnected(OSError(errno.EBADF, os.strerror(errno.EBADF))))
        if self.state is _IDLE or (readable is not None and readable.active):
            self._waiting.throw(client_disconnected(OSError(errno.EBADF, os.strerror(errno.EBADF))))

    def _linger(self) -> None:
        if self.state is ConnectionState.CLOSED or self.sock.is_closed:
            return  # the response was interrupted, or the application has closed the socket
        self.state = ConnectionState.LINGERING
        self.lingering_close()

    def _stop(self) -> None:
        try:
            self._end()
        except Exception as error:
            report_fault("a connection was closed without its clean-up", error)
        self._acceptor.on_connection_closed(self)

    def leave_to_parent(self) -> None:
        if self._disconnect is not None:
            self._disconnect.cancel()
        Transport.leave_to_parent(self)

    def _end(self) -> None:
        """Stop everything that waits for this connection."""
        self.state = ConnectionState.CLOSED
        self._stop_waiting(self, None)
        if self.tracked:
            self.listener.idle_ticker.untrack(self)
        if self._disconnect is not None:
            self._disconnect.cancel()
        if self.body is not EMPTY_BODY:
            self.body.detach()
        self._release()
        self.on_drain = self.response = None


if sys.flags.dev_mode:
    ConnectionLife.__setattr__ = set_checked  # type: ignore[method-assign]
