"""The connections that unmodified servers have accepted from the master's sockets.

Process: a worker, in the threads and greenlets of its servers.
Never: read, write or end a connection; it belongs to its server.

A descriptor may be closed without its socket object and its number reused. So each entry carries the inode
of its socket, and counts only while the descriptor still has that socket.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from threading import get_ident
from typing import NamedTuple

from gunicorn_passenger.config.address import SockAddr, format_sockname
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.interposition.own_fds import fds_by_inode, inode_of
from gunicorn_passenger.serving.third_party import ThirdPartyServer
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.import_watch import imported
from gunicorn_passenger.system.listening_sockets import borrowed_socket


class AcceptedConnection(NamedTuple):
    """A connection that a server has accepted from one of the master's sockets."""

    #: of its socket
    inode: int
    server: ThirdPartyServer
    #: the address of the server, as the program knows it
    name: SockAddr
    #: the thread that has accepted it; 0 if a greenlet of that thread has, or its hub
    thread: int


class AcceptedConnections:
    """Knows which connections are open, and which addresses their clients were given."""

    def __init__(self, log: Log) -> None:
        """:param log: gunicorn's logger."""
        self._log = log
        #: held for a moment to change a table: servers may accept in threads of their own
        self._lock = unpatched.lock()
        #: by descriptor
        self._connections: dict[int, AcceptedConnection] = {}
        #: threads (``Thread.ident``) in ``accept()``: they may have a connection that is not noted yet
        self._in_accept: set[int] = set()
        #: the local ports of the servers that have stopped for the drain; the path of one on a UNIX socket
        self._drained: set[int | str | bytes] = set()
        #: inodes of connections that cannot finish
        self._given_up: set[int] = set()
        #: the addresses of peers that have no TCP address: descriptor -> inode, address
        self._peers: dict[int, tuple[int, SockAddr]] = {}
        #: the ports of such clients count up
        self._client_ports = itertools.cycle(range(1024, 65536))
        self._fd_by_client_port: dict[int, int] = {}
        self._explained_half_closed = False

    def on_accept_begin(self) -> None:
        """This thread calls ``accept`` on one of the master's sockets."""
        self._in_accept.add(get_ident())

    def on_accept_end(self) -> None:
        """The program's call of ``accept`` has ended, with a connection or without."""
        self._in_accept.discard(get_ident())

    def add(self, fd: int, server: ThirdPartyServer, name: SockAddr) -> None:
        """This thread has accepted a connection.

        :param name: the address of the server, as the program knows it.
        """
        with self._lock:
            self._connections[fd] = AcceptedConnection(inode_of(fd), server, name, _thread())

    def idle(self) -> bool:
        """Whether no connection is open that an unmodified server has accepted."""
        with self._lock:
            self._connections = {fd: it for fd, it in self._connections.items() if inode_of(fd) == it.inode}
            self._peers = {fd: peer for fd, peer in self._peers.items() if inode_of(fd) == peer[0]}
            return not self._connections

    def open_by_slot(self) -> Counter[int]:
        """How many connections are open, by the slot of their server."""
        self.idle()
        return Counter(connection.server.slot for connection in list(self._connections.values()))

    def local_address(self, fd: int) -> SockAddr | None:
        """The address of the server that has accepted a connection."""
        connection = self._connections.get(fd)
        return connection.name if connection is not None and connection.inode == inode_of(fd) else None

    def after_fork_in_child(self) -> None:
        """In a child of the worker the thread that held the lock does not run."""
        self._lock = unpatched.lock()

    # --- the drain --------------------------------------------------------------------------------

    def begin_drain(self, listeners: Iterable[int]) -> None:
        """The servers with these listening descriptors stop their accepting now."""
        self._drained = {port for fd in listeners for port in _local_ports(fd)}

    def drained(self) -> bool:
        """Whether no connection is open, in a worker that has stopped accepting."""
        return self.idle() and not (self._in_accept and self._has_connection_on_its_way())

    def _has_connection_on_its_way(self) -> bool:
        """Whether a thread has a connection from the system that it has not noted.

        A thread in ``accept()`` mostly waits there. But it may have got its connection, and wait for its
        turn to run, when this worker stops accepting; the connection's descriptor shows that.
        """
        return any(
            port in self._drained
            for inode, (fd, *_) in fds_by_inode().items()
            if inode not in self._given_up
            for port in _local_ports(fd, connected=True)
        )

    def forget_those_of_this_thread(self) -> None:
        """The loop that served them has ended, so they cannot finish."""
        with self._lock:
            mine = {fd: it for fd, it in self._connections.items() if it.thread == get_ident()}
            self._given_up |= {it.inode for it in mine.values()}
            self._connections = {fd: it for fd, it in self._connections.items() if fd not in mine}

    def explain_half_closed(self) -> None:
        """Log once which servers have not closed connections that their clients have closed.

        Whether the client still waits for a response cannot be seen, so none of them is ended.
        """
        if self._explained_half_closed:
            return
        self._explained_half_closed = True
        waiting = unpatched.poll()
        connections = dict(self._connections)
        for fd in connections:
            waiting.register(fd, select.POLLRDHUP)
        closed = (connections[fd].name for fd, events in waiting.poll(0) if events & select.POLLRDHUP)
        for name, count in Counter(closed).items():
            self._log.warning(
                "The worker waits for connections that their clients have closed and the third-party server "
                "on %s has not: %d (pid:%s). A client that has only finished sending, and waits for its "
                "response, looks the same; so the worker waits until --graceful-timeout. Otherwise correct "
                "the server: it must close a connection when it reads the end",
                format_sockname(name),
                count,
                os.getpid(),
            )

    # --- clients without a TCP address ------------------------------------------------------------

    def client_address(self, fd: int, family: int) -> SockAddr:
        """The address of a client on a UNIX socket: each has a port of its own, as over TCP."""
        port = next(port for port in self._client_ports if not self._has_client(port))
        address: SockAddr = ("127.0.0.1", port) if family == socket.AF_INET else ("::1", port, 0, 0)
        self.remember_peer(fd, address)
        self._fd_by_client_port[port] = fd
        return address

    def _has_client(self, port: int) -> bool:
        inode, address = self._peers.get(self._fd_by_client_port.get(port, -1), (-1, None))
        return address is not None and address[1] == port and inode_of(self._fd_by_client_port[port]) == inode

    def remember_peer(self, fd: int, address: SockAddr) -> None:
        """The program sees this address as the other end of a connection."""
        with self._lock:
            self._peers[fd] = inode_of(fd), address

    def peer(self, fd: int) -> SockAddr | None:
        """The address that the peer of a connection was given."""
        inode = inode_of(fd)
        known = self._peers.get(fd)
        if known is None or known[0] != inode:  # a copy of the socket (dup)
            known = next((peer for peer in list(self._peers.values()) if peer[0] == inode), None)
        return known[1] if known is not None else None


def _thread() -> int:
    """This thread, unless it runs another greenlet than the first one, whose code its end does not end."""
    greenlet = imported("greenlet")
    return get_ident() if greenlet is None or greenlet.getcurrent().parent is None else 0


def _local_ports(fd: int, connected: bool = False) -> Iterator[int | str | bytes]:
    """The local port of a TCP socket, or the path of a UNIX socket; nothing for any other file.

    :param connected: whether only a connection counts.
    """
    with suppress(OSError), borrowed_socket(fd) as sock:
        if connected:
            sock.getpeername()
        name = sock.getsockname()
        yield name[1] if isinstance(name, tuple) else name
