"""Exceptions that no code expects, raised where the event loop calls the HTTP core: they cost one connection."""

from __future__ import annotations

import ast
import contextlib
import logging
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.lock
import http_model
import pytest
from gevent import socket as gsocket
from gunicorn.config import Config
from open_descriptors import open_descriptors

from gunicorn_passenger.http import acceptor as acceptor_module
from gunicorn_passenger.http import faults
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.client_socket import ClientSocket, adopt
from gunicorn_passenger.http.connection import Connection
from gunicorn_passenger.http.connection_state import TRANSITIONS, ConnectionState, set_checked
from gunicorn_passenger.http.greenlet_pool import GreenletPool
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
        self.acceptor = Acceptor(sock, http_model.gateway(Config(), app, path), 100)
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
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # as in Python's development mode
    monkeypatch.setattr(Connection, "__setattr__", set_checked, raising=False)
    server = Server(str(tmp_path / "s"))
    yield server
    server.acceptor.stop_accepting()
    server.acceptor.kill(5)


def boom(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a fault")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ListenerContext, "new_context"),
        (Connection, "__init__"),
        (acceptor_module, "ClientSocket"),
    ],
)
def test_a_fault_while_accepting_costs_one_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], owner: Any, name: str
) -> None:
    assert server.ask().startswith(b"HTTP/1.1 200")
    server.settle()
    before = open_descriptors()
    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, boom)
            assert server.ask() == b""
        assert server.ask().startswith(b"HTTP/1.1 200")
    server.settle()
    assert open_descriptors() <= before
    logged(log)
    assert log[0].getMessage().startswith("Unexpected error: a connection was closed before it was served")
    assert log[0].exc_info is not None


def test_development_mode_checks_the_state_of_a_connection(server: Server) -> None:
    assert set(TRANSITIONS) == set(ConnectionState)
    with gsocket.socket(socket.AF_UNIX) as client:
        client.connect(server.path)
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        (connection,) = server.acceptor._connections
        with gevent.Timeout(30):
            while not connection.is_idle():
                gevent.sleep(0.01)
        with pytest.raises(AssertionError, match="from parked to idle"):
            connection.state = ConnectionState.IDLE
        assert connection.is_idle()
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_fault_at_the_end_of_a_connection_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_end", boom)
        assert server.ask().startswith(b"HTTP/1.1 200")
        server.settle()
    assert open_descriptors() <= before
    logged(log)
    assert server.ask().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("owner", "name"), [(GreenletPool, "_take"), (Connection, "serve")])
def test_a_fault_when_an_idle_client_comes_back_closes_its_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], owner: Any, name: str
) -> None:
    pool = server.acceptor.listener.greenlets
    with gsocket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(server.path)
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        (connection,) = server.acceptor._connections
        with gevent.Timeout(30):
            while not connection.is_idle():
                gevent.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, boom)
            client.sendall(GET)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(65536) == b""
    logged(log)
    assert server.acceptor.idle()
    waiting = len(pool)
    assert server.ask().startswith(b"HTTP/1.1 200")
    server.settle()
    assert len(pool) == max(waiting, 1)


def test_a_fault_when_a_sibling_hands_over_a_connection_closes_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord]
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        monkeypatch.setattr(GreenletPool, "_take", boom)
        server.acceptor.attach(ClientSocket(socket.AF_UNIX, socket.SOCK_STREAM, 0, ours.detach()), "")
        assert gsocket.socket(fileno=theirs.detach()).recv(1) == b""
    logged(log)
    assert server.acceptor.idle()


def logged(log: list[logging.LogRecord]) -> None:
    """Wait for the one line: the hub leaves it to a greenlet to write."""
    with gevent.Timeout(30):
        while not log:
            gevent.sleep(0.01)
    assert len(log) == 1


class Waiting:
    """Something that waits, and raises when its time is over."""

    def __init__(self, expired: list[Any]) -> None:
        self.expired = expired
        self.idle_since, self.tracked, self.state = 1, False, ConnectionState.IDLE

    def expire(self) -> None:
        self.expired.append(self)
        boom()


def test_timeouts_still_run_after_a_fault(log: list[logging.LogRecord]) -> None:
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
    logged(log)


def test_idle_ticks_still_run_after_a_fault(log: list[logging.LogRecord]) -> None:
    faults.log.setLevel(logging.DEBUG)
    silence, expired = IdleTicker(0.01), []  # type: ignore[var-annotated]
    for count in (3, 6):
        for _ in range(3):
            one = Waiting(expired)
            one.idle_since = silence.tick
            silence.track(one)
        with gevent.Timeout(30):
            while len(expired) < count:
                gevent.sleep(0.01)
    logged(log)


def test_responses_that_are_held_are_sent_after_a_fault(log: list[logging.LogRecord]) -> None:
    faults.log.setLevel(logging.DEBUG)
    sent, closed = [], []

    class Held:
        def __init__(self, number: int) -> None:
            self.number = number
            self.pending = b""
            self.listener = type("Gateway", (), {"sent": 0})

        def flush_pending(self) -> None:
            if self.number == 1:
                boom()
            sent.append(self.number)

        def close(self) -> None:
            closed.append(self.number)

    turn = WriteCoalescer(gevent.get_hub().loop)
    for number in range(3):
        turn.enqueue(Held(number), b"response")
    gevent.sleep(0)
    assert (sent, closed) == ([0, 2], [1])
    logged(log)


def test_a_fault_when_waiting_messages_are_sent_ends_the_connection(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = gsocket.socketpair()
    sock, _ = adopt(theirs.detach())
    monkeypatch.setattr(sock, "_first", lambda: 1 / 0)
    with ours:
        sock.send_soon(b"x")
        assert ours.recv(9) == b""
        assert sock.recv(9) == b""
    assert [record.exc_info[0] for record in log if record.exc_info] == [ZeroDivisionError]
    with pytest.raises(BrokenPipeError):
        sock.send_soon(b"y")
    sock.close()


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


class WaitingHandler(logging.Handler):
    """A handler that waits for its log server, as one for syslog over TCP does, and keeps its lock meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = gevent.lock.RLock()
        self.inside = gevent.event.Event()
        self.go_on = gevent.event.Event()
        self.lines: list[str] = []

    def createLock(self) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.inside.set()
        self.go_on.wait()


@pytest.fixture
def waiting_handler() -> Iterator[WaitingHandler]:
    handler = WaitingHandler()
    level = faults.log.level
    faults.log.setLevel(logging.DEBUG)
    faults.log.addHandler(handler)
    yield handler
    handler.go_on.set()
    faults.log.removeHandler(handler)
    faults.log.setLevel(level)


def test_a_log_handler_that_waits_does_not_end_a_listener(
    server: Server, monkeypatch: pytest.MonkeyPatch, waiting_handler: WaitingHandler
) -> None:
    with gevent.Timeout(60):
        gevent.spawn(faults.log.error, "a line of a program")
        waiting_handler.inside.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "__init__", boom)
            assert server.ask() == b""
        assert server.ask().startswith(b"HTTP/1.1 200")
        waiting_handler.go_on.set()
        while len(waiting_handler.lines) < 2:
            gevent.sleep(0.01)
    assert waiting_handler.lines[1].startswith("Unexpected error: a connection was closed")


def test_no_descriptor_and_a_log_handler_that_waits_do_not_end_a_listener(
    server: Server, waiting_handler: WaitingHandler
) -> None:
    with gevent.Timeout(60):
        gevent.spawn(faults.log.error, "a line of a program")
        waiting_handler.inside.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        client = gsocket.socket(socket.AF_UNIX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
        try:
            client.connect(server.path)
            while server.acceptor._pause is None:
                gevent.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.close()
        waiting_handler.go_on.set()
        while len(waiting_handler.lines) < 2:
            gevent.sleep(0.01)
    assert waiting_handler.lines[1].startswith("Cannot accept connections: Too many open files")


def test_a_report_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.log, "error", boom)
    faults.report_fault("something was given up", ValueError("a fault"))
    faults.log_from_hub("a line")


def test_every_callback_of_the_loop_is_known() -> None:
    """A new one needs a test here that raises in it."""
    known = {
        ("acceptor.py", "self._accept"),
        ("acceptor.py", "then"),
        ("client_socket.py", "connection.begin_shutdown"),  # as at the beginning of a drain
        ("client_socket.py", "self._flush"),
        ("connection_output.py", "self._sending.switch"),
        ("connection_life.py", "gone"),
        ("connection_life.py", "self._end_waits"),  # as at the end of a connection
        ("connection_life.py", "self._ready"),
        ("connection_life.py", "self._waiting.switch"),
        ("connection_life.py", "self._wake"),
        ("connection.py", "self._arrive"),
        ("connection.py", "switch"),
        ("disconnect.py", "self._check"),
        ("greenlet_pool.py", "self.serve"),
        # these lose at most waiting greenlets
        ("greenlet_pool.py", "self._end"),
        ("greenlet_pool.py", "self._put_after_links"),
        ("greenlet_pool.py", "self.trim"),
        ("disconnect.py", "self._on_readable"),
        ("timeouts.py", "self._fire"),
        ("timeouts.py", "self._next"),
        ("transport.py", "greenlet.throw"),
        ("transport.py", "self._waiting.switch"),
        ("write_coalescing.py", "self.flush"),
    }
    found = set()
    for file in Path(acceptor_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("start", "run_callback")
                and node.args
            ):
                choices = [node.args[0]]
                if isinstance(node.args[0], ast.IfExp):
                    choices = [node.args[0].body, node.args[0].orelse]
                names = (choice for choice in choices if isinstance(choice, ast.Name | ast.Attribute))
                found.update((file.name, ast.unparse(name)) for name in names)
    assert found == known
