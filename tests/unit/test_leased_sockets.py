"""The sockets of unmodified servers while their worker begins to drain."""

import socket

import pytest
from leased_registry import Registry, lease

from gunicorn_passenger.interposition.leased_sockets import LeasedSockets


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
