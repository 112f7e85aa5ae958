"""The master's part of connection migration, between workers that the test plays."""

import json
import socket
from types import SimpleNamespace

import pytest

from gunicorn_passenger.ipc import channel, messages
from gunicorn_passenger.master.migration_relay import RESPONSE_TIME, MigrationRelay
from gunicorn_passenger.master.port import Port
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels

KEY = "127.0.0.1:9000"


class Site:
    """A relay, and the far ends of its workers' channels by age."""

    def __init__(self):
        self.workers = WorkerChannels()
        self.workers.arbiter = SimpleNamespace(num_workers=2, WORKERS={})
        self.port = Port(KEY, None)
        self.relay = MigrationRelay(self.workers, SimpleNamespace(ports={KEY: self.port}), self.reply)
        self.ends = {}

    def reply(self, worker, message):
        channel.send(worker.sock, message)
        return True

    def add(self, age, **state):
        ours, theirs = channel.pair()
        theirs.settimeout(30)
        worker = WorkerChannel(age, ours, ready=True, **state)
        self.workers.add(worker)
        self.port.accepting.add(age)
        self.ends[age] = theirs
        return worker

    def received(self, age):
        """The next message that a worker has got; its descriptors are closed."""
        message, fds = channel.receive(self.ends[age])
        for fd in fds:
            socket.socket(fileno=fd).close()
        return message, len(fds)

    def offer(self, giver, socks, addrs=None, number=7):
        addrs = [["127.0.0.1", 5]] * len(socks) if addrs is None else addrs
        message = messages.OfferConnections(number, KEY, json.dumps(addrs))
        self.relay.offer(giver, message, [sock.fileno() for sock in socks], False)

    def close(self):
        for worker in self.workers:
            worker.sock.close()
        for end in self.ends.values():
            end.close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def connections():
    pairs = [socket.socketpair() for _ in range(4)]
    yield [ours for ours, _ in pairs]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_successor_serves_only_when_the_master_has_decided(site, connections):
    giver, successor = site.add(1, draining=True), site.add(2)
    site.offer(giver, connections)
    assigned, count = site.received(2)
    assert isinstance(assigned, messages.AssignConnections)
    assert count == 4
    site.relay.on_assign_result(successor, messages.AssignResult(assigned.id, 3))
    assert site.received(2)[0] == messages.AssignSettled(assigned.id, True)
    assert site.received(1)[0] == messages.OfferSettled(7, 0b0111)


def test_a_response_that_comes_too_late_changes_nothing(site, connections):
    giver, successor = site.add(1, draining=True), site.add(2)
    site.offer(giver, connections)
    assigned, _ = site.received(2)
    deadline = site.relay.tick(0.0)
    assert site.relay.tick(deadline - RESPONSE_TIME / 2) == deadline
    assert site.relay.tick(deadline) is None
    assert site.received(1)[0] == messages.OfferSettled(7, 0)
    # a busy worker is offered nothing until it responds
    site.offer(giver, connections)
    assert site.received(1)[0] == messages.OfferSettled(7, 0)
    site.relay.on_assign_result(successor, messages.AssignResult(assigned.id, 4))
    assert site.received(2)[0] == messages.AssignSettled(assigned.id, False)
    site.offer(giver, connections)
    assert isinstance(site.received(2)[0], messages.AssignConnections)


def test_a_connection_that_cannot_be_passed_on_stays_behind_alone(site, connections):
    giver, successor = site.add(1, draining=True), site.add(2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        site.offer(giver, [connections[0], listener, *connections[1:3]], ["", "", "no address", ""])
    assigned, count = site.received(2)
    assert count == 2
    site.relay.on_assign_result(successor, messages.AssignResult(assigned.id, 2))
    assert site.received(1)[0] == messages.OfferSettled(7, 0b1001)


def test_workers_that_gunicorn_is_about_to_stop_are_offered_nothing(site, connections):
    """In a reload of two workers, the old sibling may be too busy to know that it has to leave."""
    giver = site.add(2, draining=True)
    site.add(1)
    site.add(3)
    site.add(4)
    for _ in range(4):
        site.offer(giver, connections)
        ours = {age for age in (3, 4) if readable(site.ends[age])}
        assert len(ours) == 1
        (age,) = ours
        assigned, _ = site.received(age)
        site.relay.on_assign_result(site.workers.by_age(age), messages.AssignResult(assigned.id, 4))
        assert site.received(age)[0] == messages.AssignSettled(assigned.id, True)
        assert site.received(2)[0] == messages.OfferSettled(7, 0b1111)
    assert not readable(site.ends[1])


def test_a_worker_that_gunicorn_has_stopped_is_offered_nothing(site, connections):
    giver = site.add(1, draining=True)
    site.add(2, stopped=True)
    site.offer(giver, connections)
    assert site.received(1)[0] == messages.OfferSettled(7, 0)


def readable(end):
    end.setblocking(False)
    try:
        return bool(end.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        end.settimeout(30)


def test_a_successor_that_dies_has_taken_nothing(site, connections):
    giver, successor = site.add(1, draining=True), site.add(2)
    site.offer(giver, connections)
    site.workers.remove(successor)
    site.relay.on_worker_gone(successor)
    assert site.received(1)[0] == messages.OfferSettled(7, 0)


def test_the_connections_of_a_worker_that_dies_are_served(site, connections):
    giver, successor = site.add(1, draining=True), site.add(2)
    site.offer(giver, connections)
    assigned, _ = site.received(2)
    site.workers.remove(giver)
    giver.sock.close()
    site.relay.on_worker_gone(giver)
    site.relay.on_assign_result(successor, messages.AssignResult(assigned.id, 4))
    assert site.received(2)[0] == messages.AssignSettled(assigned.id, True)
