"""The master's sockets under the descriptors of unmodified servers.

Process: a worker.
Never: close a descriptor that a server polls; an unreachable socket takes the place of the master's.

A descriptor may be closed without its socket object (``os.close``) and its number reused. So each entry
carries the inode of its socket, and counts only while the descriptor still has that socket.
"""

from __future__ import annotations

import _socket
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from threading import get_ident
from time import monotonic
from typing import Any, NamedTuple

from gunicorn_passenger.config.address import SockAddr, format_sockname
from gunicorn_passenger.interposition.accepted_connections import AcceptedConnections
from gunicorn_passenger.interposition.fd_swap import epoll_registrations, swap_fds
from gunicorn_passenger.interposition.own_fds import fds_by_inode, fds_of, inode_of
from gunicorn_passenger.interposition.pending_bind import PendingBind
from gunicorn_passenger.interposition.socket_options import Option, set_options, unreachable_listener
from gunicorn_passenger.ipc.scoreboard import Counters, Scoreboard
from gunicorn_passenger.serving.port_lease import AcceptGrant
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.serving.server import CLOSED, LISTENING, LOST, STOPPED, ListenAddress
from gunicorn_passenger.serving.third_party import ThirdPartyServer
from gunicorn_passenger.system import unpatched

#: Seconds in which a program that listens is expected to accept.
_ACCEPT_WITHIN = 5.0
#: Seconds in which a server accepts the connections of its own worker.
_PRIVATE_SECONDS = 5.0
#: Seconds between two attempts to stop the accepting of a server, where the system does not allow it.
_RETRY_INTERVAL = 1.0


class PrivateListener(NamedTuple):
    """A listener that only this worker finds, and the socket that it replaces for a while."""

    listener: _socket.socket
    replaced: _socket.socket


@dataclass
class LeasedFd:
    """A descriptor of this process under which the master's socket lies."""

    inode: int
    server: ThirdPartyServer
    #: the address that the program asked for
    name: SockAddr
    #: what the program has set on its own socket
    options: list[Option]
    #: when the program listened, in monotonic seconds
    since: float = field(default_factory=monotonic)
    #: whether the program has called accept(), or waits in socketserver's selector, or the log says that it
    #: has not
    accepts: bool = False
    #: the thread that listened, or has accepted last
    thread: int = field(default_factory=get_ident)
    #: while the worker connects to its own server
    private: PrivateListener | None = None


class LeasedSockets:
    """Keeps the master's sockets under the descriptors of their servers, as the master grants and pauses."""

    def __init__(self, registry: ServerRegistry) -> None:
        self._registry = registry
        assert registry.broker is not None
        self._broker = registry.broker
        #: its iterations are over a copy: servers may listen, and sockets close, in any thread
        self._by_fd: dict[int, LeasedFd] = {}
        #: held while a descriptor and its entry name different sockets, and to close a socket that another
        #: thread may be about to replace; its owner may come here again, in a signal handler
        self._swapping = unpatched.rlock()
        #: the thread in the midst of a swap; 0 for none
        self._swapper = 0
        self.connections = AcceptedConnections(registry.log)
        #: whether the primary has been captured
        self.captured = False
        #: when a server has last listened
        self._last = float("-inf")
        #: identities (``Thread.ident``) of the threads in which servers accepted until the drain began
        self.server_threads: set[int] = set()
        #: whether there has been such a server
        self.used = False
        #: how many connections the servers that have closed had accepted, by slot
        self._accepted_before: Counter[int] = Counter()

    # --- the table --------------------------------------------------------------------------------

    def add(
        self, bind: PendingBind, source: _socket.socket, server: ThirdPartyServer, options: list[Option]
    ) -> None:
        """Put the master's socket under the descriptors of a server: ``dup()`` had made them one socket, and
        they stay one.

        :param source: a socket of the master's, which is closed.
        :raises OSError: when the system does not allow it; then nothing else has changed.
        """
        with self._swapping, closing(source):
            swap_fds(fds_of(bind.inode), source)
            entry = self._by_fd[bind.fd] = LeasedFd(inode_of(bind.fd), server, bind.name, options)
        self._last = entry.since
        self.used = True
        if server.lease is None:
            self.captured = True
        else:
            server.lease.subscribe(lambda grant: self._on_grant(entry, grant), lambda: self._on_pause(entry))

    def find(self, fd: int) -> LeasedFd | None:
        """The entry of a descriptor. One that was closed and reused ends its lease here."""
        entry = self._by_fd.get(fd)
        if entry is None or entry.inode == inode_of(fd) or self._swapper == get_ident():
            return entry
        with self._swapping:
            closed = entry.inode != inode_of(fd)
        if closed:
            self._end(fd, entry)
        return None if closed else entry

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
        with self._swapping:
            return inode_of(fd) in self.inodes()

    def inodes(self) -> set[int]:
        """Those of the master's sockets that servers have."""
        with self._swapping:
            return {entry.inode for entry in list(self._by_fd.values())}

    def on_close(self, fd: int) -> None:
        """A socket object is about to close its descriptor."""
        if (entry := self._by_fd.get(fd)) is not None:
            self._end(fd, entry)

    def on_shutdown(self, fd: int) -> None:
        """The program ends its accepting on a socket of the master's with ``shutdown``.

        :raises OSError: when the system does not allow it; then nothing has changed.
        """
        unreachable = unreachable_listener()
        with self._swapping, closing(unreachable):
            inode = inode_of(fd)
            ended = {known: entry for known, entry in list(self._by_fd.items()) if entry.inode == inode}
            self._swap_all(list(ended.values()), unreachable)
            for known in ended:
                del self._by_fd[known]
            unreachable.shutdown(socket.SHUT_RDWR)  # accept() fails from now on
        for entry in ended.values():
            entry.server.state = CLOSED
            self._keep_count(entry.server)
            self._registry.on_third_party_closed(entry.server)

    def on_deferred_close(self, fd: int) -> None:
        """The socket is closed for the program; the port is released when the descriptor closes."""
        entry = self._by_fd.get(fd)
        if entry is not None and not self._copies(fd, entry.inode):
            entry.server.state = CLOSED
            self._registry.forget(entry.server)

    def reap(self) -> None:
        """End the leases of descriptors that were closed without their socket object (``os.close``)."""
        for fd in list(self._by_fd):
            entry = self.find(fd)
            if entry is not None and not entry.accepts and monotonic() - entry.since > _ACCEPT_WITHIN:
                entry.accepts = True
                _explain_lock(self._registry, fd, entry)

    def _end(self, fd: int, entry: LeasedFd) -> None:
        """Release the port, unless another descriptor of this process has the socket (``dup``)."""
        with self._swapping:
            if self._by_fd.get(fd) is not entry:
                return  # another thread was faster
            del self._by_fd[fd]
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

    def after_fork_in_child(self) -> None:
        """In a child of the worker, which uses the sockets, the thread that held a lock does not run."""
        self._swapping = unpatched.rlock()
        self.connections.after_fork_in_child()

    # --- grants and pauses ------------------------------------------------------------------------

    def _on_grant(self, entry: LeasedFd, grant: AcceptGrant) -> None:
        """The master lets this worker accept: its socket replaces the unreachable one."""
        with _closing(_socket.socket(fileno=grant.fd), self._swapping) as source:
            try:
                if entry.server.state == CLOSED or entry not in list(self._by_fd.values()):
                    self._registry.on_third_party_closed(entry.server)
                    return
                describe(entry.server, grant)
                set_options(source, entry.options)
                source.setblocking(False)
                self._swap(entry, source, LISTENING)
            except OSError as error:
                entry.server.state = LOST
                self._log_failure(entry, "is lost, and its port released", error)
                self._registry.on_third_party_closed(entry.server)

    def _on_pause(self, entry: LeasedFd) -> None:
        """The master stops this worker's accepting, for good or for a moment."""
        self._repeat(
            entry,
            "accepts for longer than it should",
            lambda: self._make_unreachable(entry, STOPPED),
            lambda: entry in list(self._by_fd.values()),
        )
        self._broker.confirm_pause(entry.server.key)

    def _make_unreachable(self, entry: LeasedFd, state: str) -> None:
        with _closing(unreachable_listener(), self._swapping) as unreachable:
            self._swap(entry, unreachable, state)

    def _repeat(
        self, entry: LeasedFd, trouble: str, action: Callable[[], object], is_due: Callable[[], bool]
    ) -> None:
        """Do what the system may not allow at once (EMFILE), for as long as it is due."""
        logged = False
        while is_due():
            try:
                action()
                return
            except OSError as error:
                if not logged:
                    logged = True
                    self._log_failure(entry, trouble, error)
            self._broker.scheduler.sleep(_RETRY_INTERVAL)

    def _log_failure(self, entry: LeasedFd, trouble: str, error: OSError) -> None:
        self._registry.log.error(
            "The server on %s %s: the worker cannot replace its socket: %s (pid:%s). Raise the limit on open "
            "files (ulimit -n), then reload gunicorn",
            format_sockname(entry.name),
            trouble,
            error.strerror,
            os.getpid(),
        )

    def _swap(
        self, entry: LeasedFd, source: _socket.socket, state: str, private: PrivateListener | None = None
    ) -> None:
        """Put another socket under the descriptors of a server, which does not notice.

        :param private: of the entry from now on.
        :raises OSError: when the system does not allow it; then nothing has changed.
        """
        self._swap_all([entry], source, private)
        entry.server.state = state

    def _swap_all(
        self, entries: list[LeasedFd], source: _socket.socket, private: PrivateListener | None = None
    ) -> None:
        """As :meth:`_swap`, for several servers: the system is asked for all descriptors only once."""
        with self._swapping:
            own = set(self._registry.worker.primary_descriptors())
            for pair in (private, *(entry.private for entry in entries)):
                own.update(sock.fileno() for sock in pair or ())
            known = fds_by_inode()
            fds = [fd for entry in entries for fd in known.get(entry.inode, ()) if fd not in own]
            self._swapper = get_ident()
            try:
                swap_fds(fds, source)
                inode = inode_of(source.fileno())
                for entry in entries:
                    entry.inode = inode
            finally:
                self._swapper = 0
            for entry in entries:
                previous, entry.private = entry.private or (), private
                for sock in previous:
                    sock.close()

    def stop_accepting(self) -> None:
        """Stop the accepting of all unmodified servers; their open connections continue."""
        self.reap()
        entries = list(self._by_fd.values())
        self.server_threads = {entry.thread for entry in entries}
        self.connections.begin_drain(list(self._by_fd))
        unreachable, stopped = None, []
        for entry in entries:
            try:
                # one for all: the process may have no further descriptor
                unreachable = unreachable or unreachable_listener()
                stopped.append(entry)
            except OSError as error:
                self._log_failure(entry, "accepts while the worker drains", error)
        if unreachable is not None:
            with _closing(unreachable, self._swapping):
                self._stop_all(stopped, unreachable)
        # not before: until now a server in another thread may have accepted
        self._by_fd.clear()
        for entry in entries:
            self._keep_count(entry.server)
            lease = entry.server.lease
            if lease is not None and entry.server.placement != "shared":
                # the next worker need not wait for the connections of this one
                self._broker.release_port(lease.key, lease.number)

    def _stop_all(self, entries: list[LeasedFd], unreachable: _socket.socket) -> None:
        try:
            self._swap_all(entries, unreachable)
        except OSError as error:
            for entry in entries:
                self._log_failure(entry, "accepts while the worker drains", error)

    # --- accepting ------------------------------------------------------------------------------

    def on_accept_call(self, listener: int) -> LeasedFd | None:
        """The program calls ``accept``; the entry, if the socket is one of the master's.

        The caller tells :meth:`.AcceptedConnections.on_accept_end` when the call has ended.
        """
        if not self._by_fd:
            return None
        entry = self._by_fd.get(listener)
        if entry is None:
            inode = inode_of(listener)
            entry = next((e for e in list(self._by_fd.values()) if e.inode == inode), None)
        if entry is not None:
            entry.accepts = True
            entry.thread = get_ident()
            self.connections.on_accept_begin()
        return entry

    def on_accept(self, entry: LeasedFd | None, fd: int) -> None:
        """A connection was accepted: remember it if it came from one of the master's sockets."""
        if entry is not None:
            entry.server.accepted += 1
            self.connections.add(fd, entry.server, entry.name)
            if entry.private is not None and not unpatched.is_readable(entry.private.listener.fileno()):
                with suppress(OSError):  # it expires soon
                    self._close_private(entry)

    # --- connections of the worker to its own servers ----------------------------------------------------

    def recent(self, seconds: float) -> bool:
        """Whether a server of this worker has listened in the last seconds."""
        return monotonic() - self._last < seconds

    def open_private(self, entry: LeasedFd) -> bytes:
        """Have a server accept from a listener that only this worker finds, until it has accepted all there.

        :returns: the name of the listener, an abstract UNIX socket.
        """
        with self._swapping:
            if entry.private is not None:
                return _name_of(entry.private)
            with ExitStack() as unused:
                listener = unused.enter_context(closing(unreachable_listener(socket.SOMAXCONN)))
                replaced = _socket.socket(fileno=os.dup(fds_of(entry.inode)[0]))
                unused.enter_context(closing(replaced))
                private = PrivateListener(listener, replaced)
                name = _name_of(private)
                self._swap(entry, listener, entry.server.state, private)
                unused.pop_all()
        self._broker.scheduler.spawn_later(
            _PRIVATE_SECONDS,
            self._repeat,
            entry,
            "accepts connections of its own worker only",
            lambda: self._close_private(entry),
            lambda: entry.private is private,
        )
        return name

    def _close_private(self, entry: LeasedFd) -> None:
        with self._swapping:
            if entry.private is not None:
                self._swap(entry, entry.private.replaced, entry.server.state)

    def write_counts(self, scoreboard: Scoreboard) -> None:
        """Bring the worker's page of the scoreboard up to date; only connections are known here."""
        accepted = Counter(self._accepted_before)
        for server in {id(entry.server): entry.server for entry in list(self._by_fd.values())}.values():
            accepted[server.slot] += server.accepted
        open_now = self.connections.open_by_slot()
        for slot in accepted:
            scoreboard.write(slot, Counters(open_now[slot], accepted[slot]))

    def _keep_count(self, server: ThirdPartyServer) -> None:
        self._accepted_before[server.slot] += server.accepted
        server.accepted = 0


def _explain_lock(registry: ServerRegistry, fd: int, entry: LeasedFd) -> None:
    """A program that listens and does not accept may use the port as a lock, which is not one here."""
    worker, server = registry.worker, entry.server
    if worker.cfg.workers > 1 and server.placement == "shared" and not epoll_registrations([fd]):
        label = format_sockname(entry.name)
        registry.log.warning(
            "The program listens on %s, but has not accepted a connection for %g s (pid:%s). If it uses the "
            "port as a lock, each worker believes that it holds the lock, because all workers share the "
            "port. Use passenger.once(), or set PASSENGER_PLACEMENT=%s=off to leave the port to one worker",
            label,
            _ACCEPT_WITHIN,
            worker.pid,
            entry.name[1],
        )


@contextmanager
def _closing(sock: _socket.socket, swapping: Any) -> Iterator[_socket.socket]:
    """Close a socket, but not while a swap has found its descriptor and not yet replaced it.

    :param swapping: the lock that a swap holds.
    """
    try:
        yield sock
    finally:
        with swapping:
            sock.close()


def _name_of(private: PrivateListener) -> bytes:
    name: bytes = private.listener.getsockname()
    return name


def describe(server: ThirdPartyServer, grant: AcceptGrant) -> None:
    """Note what a grant says of a server."""
    server.key, server.position, server.slot = grant.key, grant.position, grant.slot
    server.address = ListenAddress(None, grant.sockname).address
