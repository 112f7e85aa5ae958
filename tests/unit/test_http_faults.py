"""Exceptions that no code expects, raised where the event loop calls the HTTP core: they cost one connection."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import http_model
import pytest
from gevent import socket as gsocket
from gunicorn.config import Config

from gunicorn_passenger.http import acceptor as acceptor_module
from gunicorn_passenger.http import faults
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.connection import Connection
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.http.timeouts import IdleTicker, TimeoutQueue
from gunicorn_passenger.http.write_coalescing import WriteCoalescer

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def app(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    faults._seen.clear()
    yield
    faults._seen.clear()


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep()
    faults.log.addHandler(handler)
    level = faults.log.level
    yield records
    faults.log.removeHandler(handler)
    faults.log.setLevel(level)


class Server:
    """An acceptor on a UNIX socket, in this process."""

    def __init__(self, path: str) -> None:
        self.path = path
        sock = gsocket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(64)
        sock.setblocking(False)
        self.acceptor = Acceptor(sock, http_model.gateway(Config(), app, path), 100, False)
        faults.log.setLevel(logging.DEBUG)
        self.acceptor.start()

    def ask(self) -> bytes:
        with gsocket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(self.path)
            client.sendall(GET)
            try:
                return bytes(client.recv(65536))
            except ConnectionError:
                return b""

    def settle(self) -> None:
        with gevent.Timeout(30):
            while not self.acceptor.idle():
                gevent.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(str(tmp_path / "s"))
    yield server
    server.acceptor.stop_accepting()
    server.acceptor.kill(5)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def boom(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a fault")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ListenerContext, "peer"),
        (Connection, "__init__"),
        (Connection, "begin"),
        (acceptor_module, "ClientSocket"),
    ],
)
def test_a_fault_while_accepting_costs_one_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], owner: Any, name: str
) -> None:
    assert server.ask().startswith(b"HTTP/1.1 200")
    server.settle()
    before = descriptors()
    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, boom)
            assert server.ask() == b""
        assert server.ask().startswith(b"HTTP/1.1 200")
    server.settle()
    assert descriptors() == before
    assert len(log) == 1, "the same fault is logged once"
    assert log[0].getMessage().startswith("Unexpected error: a connection was closed before it was served")
    assert log[0].exc_info is not None


def test_a_fault_at_the_end_of_a_connection_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_end", boom)
        assert server.ask().startswith(b"HTTP/1.1 200")
        server.settle()
    assert descriptors() == before
    assert len(log) == 1
    assert server.ask().startswith(b"HTTP/1.1 200")


def test_a_fault_when_an_idle_client_comes_back_closes_its_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    with gsocket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(server.path)
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        (connection,) = server.acceptor._connections
        with gevent.Timeout(30):
            while not connection._parked():
                gevent.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr("gunicorn_passenger.http.connection._ConnectionGreenlet", boom)
            client.sendall(GET)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(65536) == b""
    assert len(log) == 1
    assert server.acceptor.idle()
    assert server.ask().startswith(b"HTTP/1.1 200")


class Waiting:
    """Something that waits, and raises when its time is over."""

    def __init__(self, expired: list[Any]) -> None:
        self.expired = expired
        self.silent, self.watched = 1, False

    def expire(self) -> None:
        self.expired.append(self)
        boom()


def test_deadlines_go_on_after_a_fault(log: list[logging.LogRecord]) -> None:
    faults.log.setLevel(logging.DEBUG)
    deadlines, expired = TimeoutQueue(0.01), []  # type: ignore[var-annotated]
    for _ in range(2):
        waiting = [Waiting(expired) for _ in range(3)]
        for one in waiting:
            deadlines.add(one)
        with gevent.Timeout(30):
            while expired != waiting:
                gevent.sleep(0.01)
        expired.clear()
    assert len(log) == 1


def test_idle_ticks_go_on_after_a_fault(log: list[logging.LogRecord]) -> None:
    faults.log.setLevel(logging.DEBUG)
    silence, expired = IdleTicker(0.01), []  # type: ignore[var-annotated]
    for count in (3, 6):
        for _ in range(3):
            one = Waiting(expired)
            one.silent = silence.tick
            silence.watch(one)
        with gevent.Timeout(30):
            while len(expired) < count:
                gevent.sleep(0.01)
    assert len(log) == 1


def test_responses_that_are_held_are_sent_after_a_fault(log: list[logging.LogRecord]) -> None:
    faults.log.setLevel(logging.DEBUG)
    sent, closed = [], []

    class Held:
        def __init__(self, number: int) -> None:
            self.number = number
            self.held = b""
            self.gateway = type("Gateway", (), {"sent": 0})

        def let_go(self) -> None:
            if self.number == 1:
                boom()
            sent.append(self.number)

        def close(self) -> None:
            closed.append(self.number)

    turn = WriteCoalescer(gevent.get_hub().loop)
    for number in range(3):
        turn.hold(Held(number), b"response")
    gevent.sleep(0)
    assert (sent, closed) == ([0, 2], [1])
    assert len(log) == 1


def test_faults_are_counted_while_they_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    faults.log.setLevel(logging.DEBUG)
    now = [1000.0]
    monkeypatch.setattr(faults, "monotonic", lambda: now[0])
    for _ in range(3):
        try:
            boom()
        except ZeroDivisionError as error:
            faults.report_fault("something was given up", error)
    now[0] += faults._QUIET
    for _ in range(2):
        try:
            boom()
        except ZeroDivisionError as error:
            faults.report_fault("something was given up", error)
    assert [record.getMessage() for record in log] == [
        "Unexpected error: something was given up",
        "Unexpected error: something was given up (2 more like it were not logged)",
    ]


def test_what_is_remembered_of_faults_is_bounded(log: list[logging.LogRecord]) -> None:
    for number in range(3 * faults._MAX_FAULTS):
        faults.report_fault("something was given up", type(f"Error{number}", (Exception,), {})())
    assert len(faults._seen) <= faults._MAX_FAULTS
