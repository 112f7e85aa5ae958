"""New connections are spread over the workers. The workers here are acceptors of one process, on one socket."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import http_model
import pytest
from gevent import socket as gsocket
from gunicorn.config import Config

from gunicorn_passenger.http import acceptor as acceptor_module
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.ipc import accept_balance
from gunicorn_passenger.ipc.accept_balance import AcceptBalance
from gunicorn_passenger.ipc.connection_table import SEATS, ConnectionTable, Seat
from gunicorn_passenger.master import worker_channels

FOREVER = 3600.0


def seats(table: ConnectionTable, count: int) -> list[Seat]:
    taken = [table.take_seat() for _ in range(count)]
    assert all(taken)
    return taken  # type: ignore[return-value]


class Workers:
    """Acceptors that share a listening socket; each has the table's next seat."""

    def __init__(self, path: str, count: int) -> None:
        self.path = path
        self.table = ConnectionTable(2)
        self.clients: list[socket.socket] = []
        first = gsocket.socket(socket.AF_UNIX)
        first.bind(path)
        first.listen(64)
        self.acceptors = []
        for seat in seats(self.table, count):
            sock = first.dup()
            sock.setblocking(False)
            context = http_model.gateway(Config(), None, path)
            self.acceptors.append(Acceptor(sock, context, 1000, AcceptBalance(seat, 1)))
        first.close()

    def connect(self) -> None:
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.path)
        self.clients.append(client)
        self.wait(len(self.clients))
        with gevent.Timeout(60):
            while any(acceptor._pause for acceptor in self.acceptors):
                gevent.sleep(0.001)

    def disconnect(self, number: int) -> None:
        self.clients.pop(number).close()
        self.wait(len(self.clients))

    def wait(self, count: int) -> None:
        with gevent.Timeout(60):
            while sum(self.counts()) != count:
                gevent.sleep(0.001)

    def counts(self) -> list[int]:
        return [acceptor.counts().connections for acceptor in self.acceptors]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for acceptor in self.acceptors:
            acceptor.stop_accepting()
            acceptor.kill(5)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(str(tmp_path / "s"), 4)
    yield workers
    workers.close()


def test_connections_are_spread_evenly(workers: Workers) -> None:
    for acceptor in workers.acceptors:
        acceptor.start()
    for _ in range(64):
        workers.connect()
    assert max(workers.counts()) <= 1.25 * min(workers.counts())


def test_a_worker_that_starts_late_gets_what_it_lacks(workers: Workers) -> None:
    for acceptor in workers.acceptors[:3]:
        acceptor.start()
    for _ in range(12):
        workers.connect()
    workers.acceptors[3].start()
    for _ in range(4):
        workers.connect()
    assert min(workers.counts()) >= 3


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker waits for its siblings as long as it takes."""
    monkeypatch.setattr(acceptor_module, "_PATIENCE", FOREVER)


@pytest.mark.usefixtures("patient")
def test_a_worker_that_has_stopped_accepting_is_not_waited_for(workers: Workers) -> None:
    for acceptor in workers.acceptors[:2]:
        acceptor.start()
    workers.connect()
    workers.acceptors[1].stop_accepting()
    for _ in range(4):
        workers.connect()
    assert workers.acceptors[0].counts().connections >= 4


@pytest.mark.usefixtures("patient")
def test_a_worker_that_dies_is_not_waited_for(workers: Workers) -> None:
    workers.acceptors[0].start()
    dead = workers.table.take_seat()
    assert dead is not None
    AcceptBalance(dead, 1).begin()
    for _ in range(2):
        workers.connect()
    dead.leave()
    workers.connect()
    assert workers.counts()[0] == 3
    assert workers.table.take_seat().number == dead.number  # type: ignore[union-attr]


@pytest.mark.usefixtures("patient")
def test_a_worker_accepts_again_when_its_connections_have_ended(workers: Workers) -> None:
    (first, second, *_) = workers.acceptors
    first.start()
    second._balance.begin()  # it has no connection, and does not come
    for _ in range(2):
        workers.connect()
    client = socket.socket(socket.AF_UNIX)
    client.connect(workers.path)
    with gevent.Timeout(60):
        while not first._deferrals:
            gevent.sleep(0.001)
    assert workers.counts()[0] == 2
    workers.clients.append(client)
    workers.disconnect(0)
    assert workers.counts()[0] == 2
    second._balance.end()


def waits(workers: Workers, connections: int, before_each: Callable[[int], object]) -> list[int]:
    """The numbers of the new connections for which the first worker waits in vain for its siblings."""
    balance, waited = workers.acceptors[0]._balance, []
    for number in range(connections):
        before_each(number)
        before = balance._next_credit
        workers.connect()
        if balance._next_credit > before:
            waited.append(number)
    return waited


@pytest.fixture
def absent(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> AcceptBalance:
    """A sibling of the first worker that takes part and accepts nothing. The first has two connections."""
    monkeypatch.setattr(accept_balance, "_BLOCKED_FOR", FOREVER)
    workers.acceptors[0].start()
    absent = workers.acceptors[1]._balance
    absent.begin()
    for _ in range(2):
        workers.connect()
    return absent


def test_busy_siblings_are_waited_for_less_and_less(workers: Workers, absent: AcceptBalance) -> None:
    """Their numbers of connections change all the time."""
    workers.acceptors[0]._balance.add(50)  # the sibling's number always stays below that
    assert waits(workers, 20, lambda _number: absent.add(1)) == [0, 1, 3, 7, 15]
    workers.acceptors[0]._balance.add(-50)
    absent.add(-20)
    # a sibling comes: from now on it is waited for as at first
    workers.acceptors[1].start()
    while workers.acceptors[0]._balance._next_credit > 1:
        workers.connect()


def test_a_blocked_sibling_is_waited_for_once(
    workers: Workers, absent: AcceptBalance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waits(workers, 10, lambda _number: None) == [0]
    # it continues, and is blocked again
    assert waits(workers, 10, lambda number: number or absent.add(1)) == [0]
    monkeypatch.setattr(workers.acceptors[0]._balance, "_blocked_until", 0.0)  # some time later
    assert len(waits(workers, 10, lambda _number: None)) == 1


def test_a_fault_while_a_worker_leaves_a_connection_to_a_sibling(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is accepted, and the listener stays alive."""
    calls = []

    def boom(*_: object) -> bool:
        calls.append(1)
        raise ZeroDivisionError("a fault")

    first, second, *_ = workers.acceptors
    first.start()
    second._balance.begin()  # it does not come
    for _ in range(2):
        workers.connect()
    real = acceptor_module.unpatched.is_readable
    with monkeypatch.context() as patch:
        patch.setattr(acceptor_module.unpatched, "is_readable", boom)
        for _ in range(3):
            workers.connect()
    assert len(calls) == 3
    monkeypatch.setattr(
        acceptor_module.unpatched, "is_readable", lambda fd: boom() if first._deferrals else real(fd)
    )
    workers.connect()
    assert len(calls) > 3
    assert workers.counts()[0] == 6


@pytest.mark.parametrize("count", [64, 2000])
def test_the_spread_in_the_worst_order(count: int) -> None:
    """However the workers race, the connections of one do not exceed those of another by a quarter."""
    balances = [AcceptBalance(seat, 0) for seat in seats(ConnectionTable(1), 4)]
    for balance in balances:
        balance.begin()
    order = random.Random(count)
    for _ in range(count):
        free = [b for b in balances if not b.sibling_has_fewer()]
        assert free
        most = max(free, key=lambda b: b._connections)
        (most if order.random() < 0.9 else order.choice(free)).add(1)
    counts = [b._connections for b in balances]
    assert max(counts) <= 1.25 * min(counts)


def test_more_workers_than_seats(tmp_path: Path) -> None:
    table = ConnectionTable(1)
    taken = seats(table, SEATS)
    assert table.take_seat() is None
    taken[7].leave()
    assert table.take_seat().number == 7  # type: ignore[union-attr]
    balance = AcceptBalance(None, 0)
    balance.begin()
    balance.add(100)
    assert not balance.sibling_has_fewer()


def test_a_forked_child_does_not_change_the_workers_number(workers: Workers) -> None:
    acceptor = workers.acceptors[0]
    acceptor.start()
    workers.connect()
    cells = list(workers.table.words)
    acceptor.leave_to_parent()
    workers.clients.pop().close()
    acceptor.kill(5)
    assert list(workers.table.words) == cells


def test_a_worker_whose_scoreboard_cannot_be_made_takes_no_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_seat: object) -> None:
        raise OSError("no memory")

    channels = worker_channels.WorkerChannels()
    with monkeypatch.context() as patch:
        patch.setattr(worker_channels, "Scoreboard", fail)
        for age in range(SEATS):
            assert channels.prepare(age).scoreboard is None
    scoreboard = channels.prepare(SEATS).scoreboard
    assert scoreboard is not None
    assert scoreboard.seat is not None
    channels._discard_pending()
