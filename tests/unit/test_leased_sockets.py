"""The sockets of unmodified servers in a worker that has several threads, or begins to drain."""

import socket
import threading
from types import SimpleNamespace

import pytest
from conditions import PATIENCE
from leased_registry import Registry, lease

from gunicorn_passenger.interposition import leased_sockets, unmanaged_listeners
from gunicorn_passenger.interposition.leased_sockets import LeasedSockets
from gunicorn_passenger.interposition.own_fds import inode_of
from gunicorn_passenger.interposition.pending_bind import PendingBind
from gunicorn_passenger.interposition.unmanaged_listeners import UnmanagedListeners


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def client(listener):
    with socket.create_connection(listener.getsockname()) as client:
        yield client


def test_a_connection_accepted_while_the_drain_begins_is_finished(listener, client, monkeypatch):
    leased = lease(Registry(), listener)
    accepted = []
    stop = LeasedSockets._stop_all

    def accept_first(self, *arguments):
        # the server's thread runs before the socket is replaced
        entry = leased.on_accept_call(listener.fileno())
        accepted.append(listener.accept()[0])
        leased.on_accept(entry, accepted[0].fileno())
        leased.connections.on_accept_end()
        stop(self, *arguments)

    monkeypatch.setattr(LeasedSockets, "_stop_all", accept_first)
    leased.stop_accepting()
    assert not leased.connections.drained()
    accepted[0].close()
    assert leased.connections.drained()


def test_a_connection_whose_accept_has_not_returned_is_finished(listener, client):
    leased = lease(Registry(), listener)
    entry = leased.on_accept_call(listener.fileno())
    # the system has handed the connection over, and the thread waits for its turn
    accepted, _ = listener.accept()
    leased.stop_accepting()
    assert not leased.connections.drained()
    leased.on_accept(entry, accepted.fileno())
    leased.connections.on_accept_end()
    assert not leased.connections.drained()
    accepted.close()
    assert leased.connections.drained()


def test_a_thread_that_waits_in_accept_keeps_no_worker(listener):
    leased = lease(Registry(), listener)
    leased.on_accept_call(listener.fileno())
    leased.stop_accepting()
    assert leased.connections.drained()


def test_a_connection_of_a_loop_that_has_ended_keeps_no_worker(listener, client):
    leased = lease(Registry(), listener)
    entry = leased.on_accept_call(listener.fileno())
    accepted, _ = listener.accept()
    with accepted:
        leased.on_accept(entry, accepted.fileno())
        leased.connections.on_accept_end()
        leased.on_accept_call(listener.fileno())  # as a thread of another server that waits
        leased.stop_accepting()
        assert not leased.connections.drained()
        leased.connections.forget_those_of_this_thread()
        assert leased.connections.drained()


def test_a_socket_that_another_thread_replaces_is_not_taken_for_a_closed_one(listener, monkeypatch):
    registry = Registry()
    leased = lease(registry, listener)
    (entry,) = leased.open_entries()
    swap, found = leased_sockets.swap_fds, {}

    def look(name):
        found[name] = leased.find(listener.fileno()), leased.has(listener.fileno())

    def knows():
        found["has"] = leased.has(listener.fileno())

    looking = [
        threading.Thread(target=look, args=["find"], daemon=True),
        threading.Thread(target=knows, daemon=True),
    ]

    def swap_and_look(*arguments):
        looking[1].start()
        looking[1].join(
            0.2
        )  # it may see the old socket under the descriptor, and must not compare it with the new
        swap(*arguments)
        looking[0].start()
        looking[0].join(0.2)  # without a lock it finds the descriptor with another socket than the entry's

    monkeypatch.setattr(leased_sockets, "swap_fds", swap_and_look)
    leased._on_pause(entry)
    for thread in looking:
        thread.join(PATIENCE)
    assert found == {"find": (entry, True), "has": True}
    assert registry.closed == []


def test_a_signal_handler_in_the_midst_of_a_swap_finds_the_socket(listener, monkeypatch):
    registry = Registry()
    leased = lease(registry, listener)
    (entry,) = leased.open_entries()
    swap, found = leased_sockets.swap_fds, []

    def swap_and_look(*arguments):
        swap(*arguments)
        found.append(leased.find(listener.fileno()))

    monkeypatch.setattr(leased_sockets, "swap_fds", swap_and_look)
    leased._on_pause(entry)
    assert found == [entry]
    assert registry.closed == []


def test_what_has_taken_the_place_of_a_closed_socket_stays(listener):
    """Two threads notice that a descriptor was closed; in between, a server has listened on the number."""
    registry = Registry()
    leased = lease(registry, listener)
    (first,) = leased.open_entries()
    leased._end(listener.fileno(), first)
    assert registry.closed == [first.server]
    source = listener.dup()
    bind = PendingBind(
        "", 0, listener.getsockname(), listener.fileno(), inode_of(listener.fileno()), False, 0.0
    )
    leased.add(bind, source, first.server, [])
    assert source.fileno() == -1
    second = leased.find(listener.fileno())
    leased._end(listener.fileno(), first)
    assert leased.find(listener.fileno()) is second is not None
    assert registry.closed == [first.server]


def test_a_child_does_not_wait_for_a_thread_of_its_parent(listener):
    leased = lease(Registry(), listener)
    held, done = threading.Event(), threading.Event()

    def hold():
        with leased._swapping, leased.connections._lock:
            held.set()
            done.wait(PATIENCE)

    holding = threading.Thread(target=hold, daemon=True)
    holding.start()
    assert held.wait(PATIENCE)
    leased.after_fork_in_child()
    assert leased.has(listener.fileno())
    assert leased.connections.idle()
    done.set()
    holding.join(PATIENCE)


def test_a_server_that_opens_while_unmanaged_ones_are_searched_is_managed(listener, monkeypatch):
    registry = SimpleNamespace(
        servers=[],
        worker=SimpleNamespace(cfg=SimpleNamespace(workers=2), primary_name=lambda: None),
        log=SimpleNamespace(warning=lambda *_: pytest.fail("the server is managed")),
    )
    managed, search = set(), unmanaged_listeners.listening_sockets.own_listeners

    def search_and_open():
        found = search()
        # of the other listeners of this process nothing is said
        managed.update(found)
        assert inode_of(listener.fileno()) in found
        return found

    monkeypatch.setattr(unmanaged_listeners.listening_sockets, "own_listeners", search_and_open)
    UnmanagedListeners(registry, set()).check(lambda: set(managed))


def test_an_unmanaged_server_is_named_when_it_is_found_twice(listener):
    """The first time, its listening socket may be on its way to a server."""
    warnings = []
    registry = SimpleNamespace(
        servers=[],
        worker=SimpleNamespace(cfg=SimpleNamespace(workers=2), primary_name=lambda: None),
        log=SimpleNamespace(warning=lambda line, *arguments: warnings.append(line % arguments)),
    )
    unmanaged = UnmanagedListeners(registry, set())
    name = "{}:{} was opened without".format(*listener.getsockname())
    for expected in (0, 1, 1):
        unmanaged.check(set)
        assert sum(name in warning for warning in warnings) == expected
