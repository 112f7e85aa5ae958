"""The master's sockets under the descriptors of unmodified servers, and the connections accepted from them.

Process: a worker.
Never: closes a descriptor that a server polls; an unreachable socket takes the place of the master's.

A descriptor may be closed without its socket object (``os.close``) and its number reused. So each entry
carries the inode of its socket, and counts only while the descriptor still has that socket.
"""

from __future__ import annotations

import _socket
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gunicorn_passenger.config.address import SockAddr
from gunicorn_passenger.interposition.fd_swap import swap_fd
from gunicorn_passenger.interposition.own_fds import fds_of, inode_of
from gunicorn_passenger.interposition.socket_options import Option, set_options, unreachable_listener
from gunicorn_passenger.ipc.scoreboard import Counters, Scoreboard
from gunicorn_passenger.serving.port_lease import AcceptGrant
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.serving.server import CLOSED, LISTENING, STOPPED, ListenAddress
from gunicorn_passenger.serving.third_party import ThirdPartyServer


@dataclass
class LeasedFd:
    """A descriptor of this process under which the master's socket lies."""

    inode: int
    server: ThirdPartyServer
    #: the address that the program asked for
    name: SockAddr
    #: what the program has set on its own socket
    options: list[Option]


class LeasedSockets:
    """Keeps the master's sockets under the descriptors of their servers, as the master grants and pauses."""

    def __init__(self, registry: ServerRegistry) -> None:
        self._registry = registry
        self._by_fd: dict[int, LeasedFd] = {}
        #: connections accepted from leased descriptors: descriptor -> inode, and the server
        self._connections: dict[int, tuple[int, ThirdPartyServer]] = {}
        #: how many connections the servers that have closed had accepted, by slot
        self._accepted_before: Counter[int] = Counter()

    # --- the table --------------------------------------------------------------------------------

    def add(self, fd: int, server: ThirdPartyServer, name: SockAddr, options: list[Option]) -> None:
        """The master's socket lies under a descriptor of a server from now on."""
        entry = self._by_fd[fd] = LeasedFd(inode_of(fd), server, name, options)
        if server.lease is not None:
            server.lease.subscribe(lambda grant: self._on_grant(entry, grant), lambda: self._on_pause(entry))

    def find(self, fd: int) -> LeasedFd | None:
        """The entry of a descriptor. One that was closed and reused ends its lease here."""
        entry = self._by_fd.get(fd)
        if entry is not None and entry.inode != inode_of(fd):
            self._end(fd)
            return None
        return entry

    def open_entries(self) -> Iterator[LeasedFd]:
        """The entries whose server has not closed."""
        for fd in list(self._by_fd):
            entry = self.find(fd)
            if entry is not None and entry.server.state != CLOSED:
                yield entry

    def has(self, fd: int) -> bool:
        """Whether a descriptor is a socket of the master's: a leased one, or a copy of it."""
        if not self._by_fd:
            return False
        return fd in self._by_fd or inode_of(fd) in self.inodes()

    def inodes(self) -> set[int]:
        return {entry.inode for entry in self._by_fd.values()}

    def on_close(self, fd: int) -> None:
        """A socket object is about to close its descriptor."""
        if fd in self._by_fd:
            self._end(fd)

    def on_deferred_close(self, fd: int) -> None:
        """The socket is closed for the program; the port is released when the descriptor closes."""
        entry = self._by_fd.get(fd)
        if entry is not None and not self._copies(fd, entry.inode):
            entry.server.state = CLOSED
            self._registry.on_third_party_closing(entry.server)

    def reap(self) -> None:
        """End the leases of descriptors that were closed without their socket object (``os.close``)."""
        for fd in list(self._by_fd):
            self.find(fd)

    def _end(self, fd: int) -> None:
        """Release the port, unless another descriptor of this process has the socket (``dup``)."""
        entry = self._by_fd.pop(fd)
        self._keep_count(entry.server)
        for other in self._copies(fd, entry.inode):
            self._by_fd[other] = entry
            return
        entry.server.state = CLOSED
        self._registry.on_third_party_closed(entry.server)

    def _copies(self, fd: int, inode: int) -> list[int]:
        """Other descriptors of the program that have the same socket (``dup``)."""
        workers = self._registry.worker.primary_descriptors()
        return [other for other in fds_of(inode) if other != fd and other not in workers]

    # --- grants and pauses ------------------------------------------------------------------------

    def _on_grant(self, entry: LeasedFd, grant: AcceptGrant) -> None:
        """The master lets this worker accept: its socket replaces the unreachable one."""
        source = _socket.socket(fileno=grant.fd)
        try:
            if entry.server.state == CLOSED or entry not in self._by_fd.values():
                self._registry.on_third_party_closed(entry.server)
                return
            describe(entry.server, grant)
            self._swap(entry, source, LISTENING)
            copy = _socket.socket(fileno=os.dup(source.fileno()))
            try:
                set_options(copy, entry.options)
                copy.setblocking(False)
            finally:
                copy.close()
        finally:
            source.close()

    def _on_pause(self, entry: LeasedFd) -> None:
        """The master stops this worker's accepting, for good or for a moment."""
        if entry in self._by_fd.values():
            unreachable = unreachable_listener()
            try:
                self._swap(entry, unreachable, STOPPED)
            finally:
                unreachable.close()
        assert self._registry.broker is not None
        self._registry.broker.confirm_pause(entry.server.key)

    @staticmethod
    def _swap(entry: LeasedFd, source: _socket.socket, state: str) -> None:
        """Put another socket under the descriptors of a server, which does not notice."""
        for fd in fds_of(entry.inode):
            swap_fd(fd, source)
        entry.inode = inode_of(source.fileno())
        entry.server.state = state

    def stop_accepting(self) -> None:
        """Stop the accepting of all unmodified servers; their open connections continue."""
        self.reap()
        entries = list(self._by_fd.values())
        self._by_fd.clear()
        for entry in entries:
            self._keep_count(entry.server)
            unreachable = unreachable_listener()
            try:
                for fd in fds_of(entry.inode):
                    swap_fd(fd, unreachable)
            finally:
                unreachable.close()
            lease = entry.server.lease
            if lease is not None and entry.server.placement != "shared":
                # the next worker need not wait for the connections of this one
                assert self._registry.broker is not None
                self._registry.broker.release_port(lease.key, lease.number)

    # --- connections ------------------------------------------------------------------------------

    def on_accept(self, listener: int, fd: int) -> None:
        """A connection was accepted: remember it if it came from one of the master's sockets."""
        if not self._by_fd:
            return
        entry = self._by_fd.get(listener)
        if entry is None:
            inode = inode_of(listener)
            entry = next((e for e in self._by_fd.values() if e.inode == inode), None)
        if entry is not None:
            entry.server.accepted += 1
            self._connections[fd] = inode_of(fd), entry.server

    def idle(self) -> bool:
        """Whether no connection is open that an unmodified server has accepted."""
        self._connections = {fd: item for fd, item in self._connections.items() if inode_of(fd) == item[0]}
        return not self._connections

    def write_counts(self, scoreboard: Scoreboard) -> None:
        """Bring the worker's page of the scoreboard up to date; only connections are known here."""
        self.idle()
        accepted = Counter(self._accepted_before)
        for server in {id(entry.server): entry.server for entry in self._by_fd.values()}.values():
            accepted[server.slot] += server.accepted
        open_now = Counter(server.slot for _, server in self._connections.values())
        for slot in accepted:
            scoreboard.write(slot, Counters(open_now[slot], accepted[slot]))

    def _keep_count(self, server: ThirdPartyServer) -> None:
        self._accepted_before[server.slot] += server.accepted
        server.accepted = 0


def describe(server: ThirdPartyServer, grant: AcceptGrant) -> None:
    """Note what a grant says of a server."""
    server.key, server.position, server.slot = grant.key, grant.position, grant.slot
    server.address = ListenAddress(None, grant.sockname).address
