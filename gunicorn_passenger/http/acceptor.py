"""Accepts connections on one listening socket.

Process: a serving process, in its hub.
Never: block.

The acceptor serves a limited number of connections. At the limit, a new client takes the place of the
connection that has been idle longest: a client of a kept connection has to expect that it is closed at any
time (RFC 9112 section 9.5). When all connections are busy, new clients wait in the backlog.

A worker that has clearly more connections than a sibling leaves the next one to it for a few milliseconds
(:mod:`~gunicorn_passenger.ipc.accept_balance`).
"""

from __future__ import annotations

import _socket
import errno
import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from socket import SOCK_STREAM
from typing import Any

import gevent
from gevent import get_hub, getcurrent

from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.connection import Connection
from gunicorn_passenger.http.faults import log_from_hub, report_fault
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.ipc.accept_balance import AcceptBalance
from gunicorn_passenger.ipc.scoreboard import Counters
from gunicorn_passenger.system import unpatched

#: How many connections are accepted, and served until they wait, in one event-loop iteration: then the other
#: listeners and connections get their turn.
_BURST = 16
#: Seconds for which a connection is left to the siblings that have fewer, and how often in a row.
_PATIENCE = 0.001
_DEFERRALS = 3
#: Seconds until the next attempt when the system lacks a descriptor or memory for a connection.
_PAUSE = 0.25

#: Without what the package adds to the sockets of programs, which costs a new connection more than the call.
_accept: Any = _socket.socket._accept  # type: ignore[attr-defined]

#: The client has disconnected before it was accepted. Any other error would come again at once.
_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR, errno.EPERM}


class Acceptor:
    """Accepts on one listening socket; every connection gets a greenlet."""

    def __init__(
        self, sock: Any, listener: ListenerContext, limit: int, balance: AcceptBalance | None = None
    ) -> None:
        """
        :param sock: a listening gevent socket; the acceptor owns it.
        :param limit: how many connections it serves at a time.
        :param balance: shares the connections with the siblings that accept from the same socket.
        """
        self.listener = listener
        self._sock = sock
        self._raw = sock._sock
        self._family, self._proto = self._raw.family, self._raw.proto
        self._limit = limit
        self._balance = balance or AcceptBalance()
        self._connections: set[Connection] = set()
        self._watcher: Any = None
        #: a timer while it accepts nothing: it lacks descriptors, or leaves a connection to a sibling
        self._pause: Any = None
        #: how often in a row it has left a connection to the siblings
        self._deferrals = 0
        self._complained = False
        self._accepted = 0
        #: how many connections may still be accepted in this iteration
        self._burst = 0

    def start(self) -> None:
        self._watcher = get_hub().loop.io(self._sock.fileno(), 1)
        self._watcher.start(self._accept)
        self._balance.begin()

    def set_app(self, app: Any) -> None:
        """From now on, serve this application."""
        self.listener.app = app
        self.listener.is_proxy = False

    def _accept(self) -> None:
        """Called in the hub when a client waits."""
        self._burst = _BURST
        listener = self.listener
        if listener.coalescer.active and listener.receives_ahead():
            # The requests before were quick, so that none of these should wait long for the others. Otherwise
            # the siblings can serve them meanwhile.
            arrived: list[Connection] = []
            try:
                for connection in iter(self._next_connection, None):
                    arrived.append(connection)
                    connection.receive_ahead()
            finally:
                next_arrived = partial(next, iter(arrived), None)
                listener.greenlets.serve_each(next_arrived, next_arrived)
        else:
            listener.greenlets.serve_each(self._next_connection, self._next_in_greenlet)

    def _next_in_greenlet(self) -> Connection | None:
        """Accept a connection in the greenlet that serves it; ``None`` to leave that to the hub."""
        if len(self._connections) >= self._limit:
            return None  # the connection that makes room may run code of others
        return self._next_connection()

    def _next_connection(self) -> Connection | None:
        """Accept a connection; ``None`` when no client waits, or when others get their turn."""
        # the application may have closed the server
        while self._burst and self._watcher is not None:
            if self._balance.sibling_has_fewer() and (self._burst < _BURST or self._defer()):
                self._burst = 0
                return None
            self._deferrals = 0
            connection = self._accept_one()
            if connection is not None:
                return connection
        return None

    def _defer(self) -> bool:
        """Leave the next connection to the siblings.

        :returns: whether this worker must not accept now.
        """
        try:
            if not unpatched.is_readable(self._raw.fileno()):
                self._balance.sibling_has_accepted()
                return True
            if self._balance.use_credit():
                return False
            if self._deferrals == _DEFERRALS:
                self._balance.sibling_was_busy()
                return False
            self._stop_for(_PATIENCE, self._end_deferral)
        except Exception as error:
            report_fault("a connection was not left to a worker that has fewer", error)
            return False
        self._deferrals += 1
        return True

    def _accept_one(self) -> Connection | None:
        """Accept a connection. If no client was waiting, or none can be served, this burst ends."""
        left, self._burst = self._burst - 1, 0
        idle = None
        if len(self._connections) >= self._limit:
            idle = self._longest_idle()
            if idle is None:
                self._watcher.stop()
                return None
            if idle.has_input():
                return None  # it has a request, and stops being idle in this iteration
        try:
            fd, addr = _accept(self._raw)
        except BlockingIOError:
            return None  # a sibling was faster
        except OSError as error:
            if error.errno not in _GONE:
                self._wait_for_room(error)
            return None
        connection = None
        try:
            try:
                sock = ClientSocket(self._family, SOCK_STREAM, self._proto, fd)
            except BaseException:
                os.close(fd)
                raise
            connection = self._add(sock, addr)
            self._accepted += 1
            if idle is not None:
                idle.expire()
        except Exception as error:
            # gevent would stop this watcher, and the listener would be dead for all clients
            report_fault("a connection was closed before it was served", error)
        self._burst = left
        return connection

    def _add(self, sock: Any, addr: Any) -> Connection:
        try:
            connection = Connection(self, self.listener, sock, addr)
        except BaseException:
            sock.release()
            raise
        self._connections.add(connection)
        self._balance.add(1)
        return connection

    def attach(self, sock: Any, addr: Any, begun: bool = False, data: bytes = b"") -> Connection:
        """Serve a connection that was accepted here or by a sibling.

        :param sock: a connected :class:`~.client_socket.ClientSocket`; the acceptor owns it, and closes it
            when this raises.
        :param addr: what ``accept()`` gave.
        :param begun: whether it has had requests, and was counted, somewhere else.
        :param data: what a sibling has read of it. The first request in it is served here, whichever worker
            it belongs to.
        """
        connection = self._add(sock, addr)
        if begun:
            connection.is_new = False
            connection.buf = data
            connection.was_passed = bool(data)
        else:
            self._accepted += 1
        try:
            self.listener.greenlets.serve(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def on_connection_closed(self, connection: Connection) -> None:
        """Called by a connection at its end."""
        if connection in self._connections:
            self._connections.remove(connection)
            self._balance.add(-1)
            if self._deferrals and self._pause is not None and not self._balance.sibling_has_fewer():
                self._clear_pause()
            self._resume()

    def on_connection_idle(self) -> None:
        """Called by a connection that may be closed from now on to make room."""
        self._resume()

    def _resume(self) -> None:
        watcher = self._watcher
        if watcher is not None and not watcher.active and self._pause is None:
            watcher.start(self._accept)

    def _stop_for(self, seconds: float, then: Callable[[], None]) -> None:
        # after the watchers of sockets in each iteration: what they accept counts
        self._pause = get_hub().loop.timer(seconds, priority=-1)
        self._pause.start(then)
        self._watcher.stop()

    def _wait_for_room(self, error: OSError) -> None:
        self._deferrals = 0
        self._stop_for(_PAUSE, self._end_pause)
        if not self._complained:
            self._complained = True
            log_from_hub(
                "Cannot accept connections: %s; they wait. Raise the limit on open files (ulimit -n) "
                "or lower --worker-connections",
                error.strerror,
            )

    def _end_pause(self) -> None:
        self._clear_pause()
        self._resume()

    def _end_deferral(self) -> None:
        """The siblings had the time to accept the connection."""
        self._end_pause()
        if not unpatched.is_readable(self._raw.fileno()):
            self._deferrals = 0
            self._balance.sibling_has_accepted()

    def _clear_pause(self) -> None:
        if self._pause is not None:
            self._pause.close()
            self._pause = None

    def _close_watcher(self) -> None:
        self._clear_pause()
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def stop_accepting(self) -> None:
        """Close the listening socket; open connections continue."""
        if self._watcher is not None:
            self._balance.end()
        self._close_watcher()
        self._sock.close()
        self.listener.closing = True
        for connection in list(self._connections):
            connection.begin_shutdown()

    def room(self) -> int:
        """How many more connections of siblings that drain it may serve."""
        return 0 if self.listener.closing else max(self._limit - len(self._connections), 0)

    def make_room(self) -> bool:
        """Have room for one more connection, even while it drains: one that is idle may have to leave.

        :returns: whether there is room.
        """
        if len(self._connections) < self._limit:
            return True
        idle = self._longest_idle()
        if idle is None or idle.has_input():
            return False
        idle.expire()
        return True

    def _longest_idle(self) -> Any:
        return self.listener.silent.longest() or self.listener.idle.longest()

    def pop_idle_connections(self, most: int) -> list[tuple[Any, Any]]:
        """Stop serving connections that wait for a request.

        :returns: the socket of each, which the caller owns, and its client's address.
        """
        idle = islice((c for c in self._connections if c.is_idle()), most)
        return [connection.detach() for connection in list(idle)]

    @property
    def sockname(self) -> Any:
        """What it listens on."""
        return self.listener.sockname

    def leave_to_parent(self) -> None:
        """In a forked child: the listening socket and the connections are the parent's.

        The connection whose application has forked stays open, as in every other server.
        """
        self._close_watcher()
        self._balance = AcceptBalance()
        self.listener.leave_to_parent()
        current = getcurrent()
        for connection in self._connections:
            if connection.greenlet is not current:
                connection.leave_to_parent()

    def idle(self) -> bool:
        """Whether all connections have ended."""
        return not self._connections

    def is_drained(self) -> bool:
        """Whether it has stopped accepting, and no connection is open."""
        return self.listener.closing and not self._connections

    def counts(self) -> Counters:
        """The counters since the start."""
        listener = self.listener
        return Counters(
            len(self._connections), self._accepted, listener.requests, listener.sent, listener.errors
        )

    def kill(self, timeout: float) -> None:
        """Close the connections that are left.

        :param timeout: seconds that their greenlets may take to end.
        """
        for connection in list(self._connections):
            if connection.greenlet is None:
                connection.close()
            else:
                gevent.kill(connection.greenlet)
        with gevent.Timeout(timeout, False):
            while self._connections:
                gevent.sleep(0.01)
