"""The sockets of unmodified servers in a worker that has no descriptor free."""

import errno
import os
import resource
import select
import socket
import threading
from contextlib import closing

import gevent
import pytest
from leased_registry import Registry, lease

from gunicorn_passenger import errors
from gunicorn_passenger.interposition import leased_sockets, self_connection, socket_patch
from gunicorn_passenger.interposition.fd_swap import epoll_registrations
from gunicorn_passenger.interposition.own_fds import inode_of, keep_spare
from gunicorn_passenger.interposition.pending_bind import pending_bind
from gunicorn_passenger.interposition.socket_options import unreachable_listener
from gunicorn_passenger.interposition.socket_patch import SocketPatch
from gunicorn_passenger.serving.port_lease import AcceptGrant
from gunicorn_passenger.system.listening_sockets import borrowed_socket


@pytest.fixture
def exhaust():
    """Takes all descriptors of the process but the spare ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []

    def take():
        taken.append(os.open(os.devnull, os.O_RDONLY))
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(taken[0]))

    keep_spare()
    yield take
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in taken:
        os.close(fd)


@pytest.fixture
def listeners():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        yield one, two


@pytest.fixture
def registry():
    return Registry()


def reachable(*socks):
    found = []
    for sock in socks:
        with borrowed_socket(sock.fileno()) as real:
            found.append(real.family == socket.AF_INET)
    return found


def refuse(times):
    """An ``unreachable_listener`` that fails a few times."""
    left = [OSError(errno.ENFILE, os.strerror(errno.ENFILE))] * times

    def make(*arguments):
        if left:
            raise left.pop()
        return unreachable_listener(*arguments)

    return make


def test_a_drain_stops_all_servers_and_their_epoll_sets_follow(exhaust, listeners, registry):
    leased, fds = lease(registry, *listeners), [sock.fileno() for sock in listeners]
    with select.epoll() as polled:
        for fd in fds:
            polled.register(fd, select.EPOLLIN)
        before = epoll_registrations(fds)
        exhaust()
        leased.stop_accepting()
        assert sorted(epoll_registrations(fds)) == sorted(before)
    assert len(before) == 2
    assert reachable(*listeners) == [False, False]
    assert registry.log.lines == []


def test_a_server_that_cannot_be_stopped_does_not_keep_the_others(listeners, registry, monkeypatch):
    leased = lease(registry, *listeners)
    monkeypatch.setattr(leased_sockets, "unreachable_listener", refuse(1))
    leased.stop_accepting()
    assert reachable(*listeners) == [True, False]
    (line,) = registry.log.lines
    assert (
        "accepts while the worker drains: the worker cannot replace its socket: Too many open files" in line
    )


def test_a_pause_is_confirmed_when_the_server_has_stopped(listeners, registry, monkeypatch):
    (sock, _) = listeners
    leased = lease(registry, sock)
    monkeypatch.setattr(leased_sockets, "unreachable_listener", refuse(2))
    monkeypatch.setattr(leased_sockets, "_RETRY_INTERVAL", 0)
    registry.broker.confirm_pause = lambda key: registry.confirmed.append((key, *reachable(sock)))
    leased.find(sock.fileno()).server.lease.pause()
    while not registry.confirmed:
        gevent.sleep(0)
    assert registry.confirmed == [("key", False)]
    assert len(registry.log.lines) == 1


def test_a_grant_that_cannot_be_used_gives_the_port_back(listeners, registry, monkeypatch):
    sock, other = listeners
    leased = lease(registry, sock)
    server = leased.find(sock.fileno()).server
    monkeypatch.setattr(leased_sockets, "swap_fds", refuse(1))
    fd = os.dup(other.fileno())
    server.lease.grant(AcceptGrant(fd, "key", other.getsockname(), 1, 0))
    while not registry.closed:
        gevent.sleep(0)
    assert (registry.closed, server.state) == ([server], "lost")
    assert "is lost, and its port released" in registry.log.lines[0]
    assert inode_of(fd) != inode_of(other.fileno())


def test_a_private_listener_makes_way_for_the_masters_socket(exhaust, listeners, registry):
    (sock, _) = listeners
    leased = lease(registry, sock)
    entry = leased.find(sock.fileno())
    inode = entry.inode
    leased.open_private(entry)
    exhaust()
    assert reachable(sock) == [False]
    private = entry.private
    leased._close_private(entry)
    assert entry.inode == inode_of(sock.fileno()) == inode
    assert [part.fileno() for part in private] == [-1, -1]


def test_a_private_listener_that_cannot_be_made_leaves_the_server_as_it_was(exhaust, listeners, registry):
    (sock, _) = listeners
    leased = lease(registry, sock)
    entry = leased.find(sock.fileno())
    exhaust()
    with pytest.raises(OSError, match="Too many open files"):
        leased.open_private(entry)
    assert (entry.private, reachable(sock)) == (None, [True])
    leased.stop_accepting()
    assert reachable(sock) == [False]


@pytest.fixture
def bound(registry):
    """The replaced calls, and a socket that is bound."""
    patch = SocketPatch(registry, set())
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        patch.binds.add(pending_bind(sock, sock.getsockname()))
        yield patch, sock


def test_a_listen_without_descriptors_asks_for_nothing(bound, registry, monkeypatch):
    patch, sock = bound
    monkeypatch.setattr(socket_patch, "changed_options", refuse(1))
    with pytest.raises(errors.ListenError, match="no file descriptor left; raise the limit"):
        patch.listen(sock, 1)
    assert patch.binds.find(sock.fileno()) is not None
    assert isinstance(registry.last_error, errors.ListenError)


def test_a_listen_that_waits_for_the_master_is_not_taken_for_a_lock(bound, monkeypatch):
    patch, sock = bound
    became_locks = []

    def share(_sock, bind, *_):
        bind.since = float("-inf")
        assert patch.binds.check()
        became_locks.append(bind.is_lock)
        raise errors.PortInUse(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(patch, "_share", share)
    with pytest.raises(errors.PortInUse):
        patch.listen(sock, 1)
    assert became_locks == [False]
    assert patch.binds.check()  # the time in which it may listen begins anew


def test_a_native_listener_that_cannot_be_shared_is_logged_once(bound, registry, monkeypatch):
    patch, sock = bound
    monkeypatch.setattr(socket_patch.os, "dup", refuse(1))
    sock.listen()
    assert not patch.binds.check()
    assert not patch.binds.check()
    (line,) = registry.log.lines
    assert "Too many open files in system; only this worker listens there" in line


def test_a_connection_to_a_full_queue_waits_as_long_as_the_socket_may():
    with closing(unreachable_listener(0)) as listener, socket.socket(socket.AF_UNIX) as first:
        name = listener.getsockname()
        first.connect(name)
        for timeout, error in ((0, BlockingIOError), (0.01, TimeoutError)):
            with socket.socket(socket.AF_UNIX) as sock, pytest.raises(error):
                self_connection._connect(sock, name, timeout)
        with socket.socket(socket.AF_UNIX) as sock:
            waiting = threading.Thread(target=self_connection._connect, args=(sock, name, None))
            waiting.start()
            listener.setblocking(True)
            fds = [listener._accept()[0] for _ in range(2)]
            waiting.join()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == bytes(16)
        for fd in fds:
            os.close(fd)
