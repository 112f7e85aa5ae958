"""Accepts connections on one listening socket.

Process: a worker, in its hub.
Never: blocks.

The acceptor serves a limited number of connections. At the limit, a new client takes the place of the
connection that has been idle longest: a client of a kept connection has to expect that it is closed at any
time (RFC 9112 section 9.5). When all connections are busy, new clients wait in the backlog.
"""

from __future__ import annotations

import errno
import os
from itertools import islice
from socket import SOCK_STREAM
from typing import Any

import gevent
from gevent import get_hub, getcurrent

from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.connection import Connection
from gunicorn_passenger.http.faults import log_from_hub, report_fault
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.ipc.scoreboard import Counters

#: How many connections a worker without siblings accepts in one event-loop iteration.
_BURST = 64
#: Seconds until the next attempt when the system lacks a descriptor or memory for a connection.
_PAUSE = 0.25

#: The client has disconnected before it was accepted. Any other error would come again at once.
_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR, errno.EPERM}


class Acceptor:
    """Accepts on one listening socket; every connection gets a greenlet."""

    def __init__(self, sock: Any, listener: ListenerContext, limit: int, share: bool) -> None:
        """
        :param sock: a listening gevent socket; the acceptor owns it.
        :param limit: how many connections it serves at a time.
        :param share: whether siblings accept from the same socket. The acceptor then accepts one connection
            at a time, so that they get their share.
        """
        self.listener = listener
        self._sock = sock
        self._raw = sock._sock
        self._family, self._proto = self._raw.family, self._raw.proto
        self._limit = limit
        self._burst = 1 if share else _BURST
        self._connections: set[Connection] = set()
        self._watcher: Any = None
        self._pause: Any = None
        self._complained = False
        self._accepted = 0

    def start(self) -> None:
        self._watcher = get_hub().loop.io(self._sock.fileno(), 1)
        self._watcher.start(self._accept)

    def set_app(self, app: Any) -> None:
        """From now on, serve this application."""
        self.listener.app = app
        self.listener.is_proxy = False

    def _accept(self) -> None:
        raw = self._raw
        for _ in range(self._burst):
            idle = None
            if len(self._connections) >= self._limit:
                idle = self.listener.silent.longest() or self.listener.idle.longest()
                if idle is None:
                    self._watcher.stop()
                    return
                if idle.has_input():
                    return  # it has a request, and stops being idle in this iteration
            try:
                fd, addr = raw._accept()
            except BlockingIOError:
                return  # a sibling was faster
            except OSError as error:
                if error.errno not in _GONE:
                    self._wait_for_room(error)
                return
            try:
                self.attach(self._client_socket(fd), addr)
                if idle is not None:
                    idle.expire()
            except Exception as error:
                # gevent would stop this watcher, and the listener would be dead for all clients
                report_fault("a connection was closed before it was served", error)

    def _client_socket(self, fd: int) -> ClientSocket:
        try:
            return ClientSocket(self._family, SOCK_STREAM, self._proto, fd)
        except BaseException:
            os.close(fd)
            raise

    def attach(self, sock: Any, addr: Any, begun: bool = False) -> Connection:
        """Serve a connection that was accepted here or by a sibling.

        :param sock: a connected :class:`~.client_socket.ClientSocket`; the acceptor owns it, and closes it
            when this raises.
        :param addr: what ``accept()`` gave.
        :param begun: whether it has had requests, and was counted, somewhere else.
        """
        try:
            connection = Connection(self, self.listener, sock, addr)
        except BaseException:
            sock.release()
            raise
        self._connections.add(connection)
        if begun:
            connection.is_new = False
        else:
            self._accepted += 1
        try:
            connection.start()
        except BaseException:
            connection.close()
            raise
        return connection

    def on_connection_closed(self, connection: Connection) -> None:
        """Called by a connection at its end."""
        self._connections.discard(connection)
        self._resume()

    def on_connection_idle(self) -> None:
        """Called by a connection that may be closed from now on to make room."""
        self._resume()

    def _resume(self) -> None:
        watcher = self._watcher
        if watcher is not None and not watcher.active and self._pause is None:
            watcher.start(self._accept)

    def _wait_for_room(self, error: OSError) -> None:
        self._watcher.stop()
        self._pause = get_hub().loop.timer(_PAUSE)
        self._pause.start(self._end_pause)
        if not self._complained:
            self._complained = True
            log_from_hub(
                "Cannot accept connections: %s; they wait. Raise the limit of open files (ulimit -n) "
                "or lower --worker-connections",
                error.strerror,
            )

    def _end_pause(self) -> None:
        self._pause.close()
        self._pause = None
        self._resume()

    def _close_watcher(self) -> None:
        if self._pause is not None:
            self._pause.close()
            self._pause = None
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def stop_accepting(self) -> None:
        """Close the listening socket; open connections continue."""
        self._close_watcher()
        self._sock.close()
        self.listener.closing = True
        for connection in list(self._connections):
            connection.begin_shutdown()

    def room(self) -> int:
        """How many more connections it may serve."""
        return 0 if self.listener.closing else max(self._limit - len(self._connections), 0)

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
        self.listener.leave_to_parent()
        current = getcurrent()
        for connection in self._connections:
            if connection.greenlet is not current:
                connection.leave_to_parent()

    def idle(self) -> bool:
        """Whether there is no connection."""
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
