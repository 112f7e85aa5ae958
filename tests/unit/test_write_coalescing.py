"""Responses that wait for the end of an event-loop iteration: when each client gets them, in order and complete.

A server, its loop and its clients are in this process, so that a test sees what has been sent while an
application runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gunicorn.config import Config

from gunicorn_passenger.config.settings import Timeouts
from gunicorn_passenger.errors import ClientDisconnected
from gunicorn_passenger.http import connection_output
from gunicorn_passenger.http import write_coalescing as coalescing
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.connection_state import ConnectionState
from gunicorn_passenger.http.listener_context import ListenerContext, StandaloneWorker
from gunicorn_passenger.http.write_coalescing import WriteCoalescer, coalescer_for_hub

PATIENCE = 60.0
#: more than a small buffer takes
BIG = b"x" * 30000 + b"ok"
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
#: after its response, the client wants the connection to end
CLOSE = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab"
OLD = b"GET / HTTP/1.0\r\n\r\n"


def wait_for(condition: Callable[[], Any]) -> Any:
    """Let the loop run until it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline
        gevent.sleep(0.001)
    return result


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """The send buffers stay as small as the test makes them."""
    monkeypatch.setattr(connection_output, "_UNIX_SEND_BUFFER", 0)


class Client:
    def __init__(self, sock: socket.socket, connection: Any) -> None:
        self.sock, self.connection = sock, connection
        self.came = b""
        self.ended = False

    def send(self, data: bytes = GET) -> None:
        self.sock.sendall(data)

    def answered(self) -> bool:
        """Whether there is something for it that it has not taken, without the loop's help."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def read(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            while not self.ended:
                piece = self.sock.recv(65536)
                self.came += piece
                self.ended = not piece
        return self.came

    def until(self, count: int, end: bytes = b"ok") -> list[bytes]:
        """The bodies of so many answers."""
        wait_for(lambda: self.read().count(b"HTTP/1.1 200 OK") >= count and self.came.endswith(end))
        parts, self.came = self.came.split(b"HTTP/1.1 200 OK")[1:], b""
        assert len(parts) == count
        return [part.partition(b"\r\n\r\n")[2] for part in parts]


class Server:
    """A gateway whose application is what the test says."""

    def __init__(self) -> None:
        cfg = Config()
        self.log = cfg.logger_class(cfg)
        self.listener = ListenerContext(self._app, cfg, self.log, StandaloneWorker(), "/s", Timeouts())
        listener = gevent.socket.socket(socket.AF_UNIX)
        self.acceptor = Acceptor(listener, self.listener, 100)
        self.coalescer = self.listener.coalescer
        self.listener.idle_ticker.seconds = 600.0  # or what is forgotten would be sent at its end
        self.calls = 0
        self.clients: list[Client] = []
        #: what the application of a request does, and what it returns instead of b"ok"
        self.act: Callable[[int, dict[str, Any]], Any] = lambda call, environ: None

    def _app(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.calls += 1
        result = self.act(self.calls, environ)
        if result is None:
            result = [b"ok"]
        length = sum(map(len, result.pieces if isinstance(result, Result) else result))
        start_response("200 OK", [("Content-Length", str(length))])
        return result

    def connect(self, **options: int) -> Client:
        """A connection that has had a request, and waits for the next."""
        ours, theirs = socket.socketpair()
        for name, value in options.items():
            ours.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        theirs.setblocking(False)
        sock = ClientSocket(ours.family, ours.type, ours.proto, ours.detach())
        client = Client(theirs, self.acceptor.attach(sock, ""))
        self.clients.append(client)
        act, self.act = self.act, lambda call, environ: None
        client.send()
        client.until(1)
        self.act, self.calls = act, 0
        return client

    def held(self) -> Client:
        """Whose answer is held: the loop does not serve clients in the order in which they have sent."""
        (client,) = [client for client in self.clients if client.connection.pending]
        return client

    def answered(self) -> list[bool]:
        return [client.answered() for client in self.clients]


class Result:
    """An answer's pieces, with a ``close()``."""

    def __init__(self, *pieces: bytes, close: Callable[[], None] = lambda: None) -> None:
        self.pieces, self.close = pieces, close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pieces)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has been quick for so long that it holds answers."""
    monkeypatch.setattr(coalescing, "_QUICKEST", 0.0)
    monkeypatch.setattr(coalescing, "_SLOWEST", 600.0)
    monkeypatch.setattr(coalescing, "_MAX_DELAY", 600.0)
    monkeypatch.setattr(coalescing, "_coalescers", {})
    server = Server()
    server.coalescer.quick = coalescing._REQUIRED
    server.coalescer.active = True
    yield server
    for client in server.clients:
        client.sock.close()
    wait_for(server.acceptor.idle)
    assert server.coalescer.pending == []


def test_responses_of_an_iteration_leave_together_at_its_end(server: Server) -> None:
    seen = []
    server.act = lambda call, environ: seen.append(server.answered())
    for _ in range(3):
        server.connect()
    for iterations in range(1, 4):
        for client in server.clients:
            client.send()
        for client in server.clients:
            assert client.until(1) == [b"ok"]
        assert seen == [[False] * 3] * 3 * iterations


def test_nothing_is_held_for_longer_than_until_a_request_begins_too_late(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "_MAX_DELAY", 0.0)
    seen = []
    server.act = lambda call, environ: seen.append(sum(server.answered()))
    for _ in range(3):
        server.connect()
    for client in server.clients:
        client.send()
    for client in server.clients:
        client.until(1)
    assert seen == [0, 1, 2]


def test_no_more_answers_are_held_than_so_many(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescing, "_MAX_PENDING", 2)
    seen = []
    server.act = lambda call, environ: seen.append(sum(server.answered()))
    for _ in range(5):
        server.connect()
    for client in server.clients:
        client.send()
    for client in server.clients:
        client.until(1)
    assert seen == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("limit", ["slow", "quick"])
def test_a_request_that_is_not_of_the_kind_ends_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    seen = []

    def act(call: int, environ: Any) -> None:
        seen.append(sum(server.answered()))
        if call == 2:
            monkeypatch.setattr(coalescing, *(("_SLOWEST", 0.0) if limit == "slow" else ("_QUICKEST", 600.0)))

    server.act = act
    for _ in range(4):
        server.connect()
    for client in server.clients:
        client.send()
    for client in server.clients:
        client.until(1)
    assert seen == [0, 0, 2, 3]
    assert not server.coalescer.active


def test_a_slow_request_holds_back_only_what_was_finished_before_it(server: Server) -> None:
    """While it waits for something itself, the iteration ends."""
    for _ in range(3):
        server.connect()
    done = Event()
    server.act = lambda call, environ: done.wait() and None if call == 2 else None
    for client in server.clients:
        client.send()
    wait_for(lambda: sum(server.answered()) == 2)
    done.set()
    wait_for(lambda: sum(server.answered()) == 3)


def responses_until_active(coalescer: WriteCoalescer) -> int:
    """How many responses are sent at once before the next one is coalesced."""
    count = 0
    while not coalescer.active:
        count += 1
        coalescer.record_duration(0.0009, True)
    return count


def test_responses_are_coalesced_after_many_quick_requests() -> None:
    coalescer = WriteCoalescer(None)
    assert responses_until_active(coalescer) == 200
    for _ in range(1000):
        coalescer.record_duration(0.0001, True)
        assert coalescer.active


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize(("seconds", "lost"), [(0.001, 5), (0.0011, 6), (0.01, 50), (0.04, 200), (5.0, 200)])
def test_a_slow_request_takes_back_what_it_has_cost(seconds: float, lost: int, repeated: bool) -> None:
    coalescer = WriteCoalescer(None)
    responses_until_active(coalescer)
    coalescer.record_duration(seconds, repeated)
    assert not coalescer.active
    assert responses_until_active(coalescer) == lost


def test_slow_requests_add_up() -> None:
    coalescer = WriteCoalescer(None)
    responses_until_active(coalescer)
    for _ in range(3):
        coalescer.record_duration(0.01, True)
    assert responses_until_active(coalescer) == 150
    # one of 20 takes 5 ms, which is more than the other 19 earn
    for number in range(1000):
        coalescer.record_duration(0.0001 if number % 20 else 0.005, True)
        assert not coalescer.active
    assert responses_until_active(coalescer) >= 180


def test_a_request_that_is_too_quick_begins_anew() -> None:
    coalescer = WriteCoalescer(None)
    responses_until_active(coalescer)
    coalescer.record_duration(0.00002, True)
    assert not coalescer.active
    assert responses_until_active(coalescer) == 200


def test_a_request_with_new_headers_is_never_too_quick() -> None:
    coalescer = WriteCoalescer(None)
    for _ in range(200):
        assert not coalescer.active
        coalescer.record_duration(0.000001, False)
    assert coalescer.active


def test_all_servers_of_a_loop_share_its_turn(server: Server) -> None:
    assert Server().coalescer is server.coalescer is coalescer_for_hub()


def test_a_new_server_begins_to_coalesce_by_itself(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescing, "_REQUIRED", 10)
    server.coalescer.record_duration(601.0, True)
    assert not server.coalescer.active
    client = server.connect()

    def held() -> bool:
        client.send()
        client.until(1)
        return server.coalescer.active

    # only some requests are timed while none has been quick
    worker: Any = server.listener.worker
    worker.nr = 0
    assert sum(not held() for _ in range(100)) == coalescing._SAMPLE + 8


# --- order -------------------------------------------------------------------------------------------


def test_the_next_request_on_a_connection_finds_its_answer_sent(server: Server) -> None:
    seen = []
    server.act = lambda call, environ: seen.append(server.answered()) or [b"%dok" % call]
    client = server.connect()
    client.send(GET * 3)
    assert client.until(3) == [b"1ok", b"2ok", b"3ok"]
    assert seen == [[False], [True], [True]]


@pytest.mark.parametrize("sent", [CLOSE, OLD], ids=["Connection: close", "HTTP/1.0"])
def test_an_answer_that_ends_its_connection_is_held_and_the_connection_ends_with_it(
    server: Server, sent: bytes
) -> None:
    seen = []
    server.act = lambda call, environ: seen.append(sum(server.answered()))
    clients = [server.connect() for _ in range(3)]
    for client in clients:
        client.send(sent)
    for client in clients:
        wait_for(lambda client=client: client.read() and client.ended)
        assert client.came.partition(b"\r\n\r\n")[2] == b"ok"
        assert client.connection.state is ConnectionState.CLOSED
        assert client.connection.greenlet is None
    assert seen == [0, 0, 0]
    assert server.acceptor.idle()


def test_an_answer_that_ends_a_connection_against_its_clients_wish_is_not_held(server: Server) -> None:
    """Such a client may be sending already: what it has sent is looked at when it has its response."""
    seen = []

    def act(call: int, environ: Any) -> None:
        seen.append(sum(server.answered()))
        client = server.clients[call - 1]
        client.connection.response.force_close()

    for _ in range(2):
        server.connect()
    server.act = act
    for client in server.clients:
        client.send()
        client.until(1)
        wait_for(lambda client=client: client.read() == b"" and client.ended)
    assert seen == [0, 1]


def test_a_client_that_reads_its_last_answer_slowly(server: Server) -> None:
    server.act = lambda call, environ: [BIG]
    client = server.connect(SO_SNDBUF=4096)
    client.send(CLOSE)
    wait_for(lambda: client.connection._writable and client.connection._writable.active)
    assert client.connection.state is ConnectionState.FLUSHING
    assert client.until(1) == [BIG]
    wait_for(lambda: client.read() == b"" and client.ended)


@pytest.mark.parametrize("ended_by", ["a slow request", "a close() that waits", "a response before it"])
def test_a_last_answer_that_is_flushed_while_its_request_runs_or_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    """The kernel does not take all of it: the connection ends when the client has read the rest."""

    def act(call: int, environ: Any) -> Any:
        if ended_by == "a slow request":
            monkeypatch.setattr(coalescing, "_SLOWEST", 0.0)
        if ended_by == "a response before it" and call == 1:
            return None
        return Result(BIG, close=lambda: gevent.sleep(0.01) if "waits" in ended_by else None)

    server.act = act
    client = server.connect(SO_SNDBUF=4096)
    client.send(GET + CLOSE if ended_by == "a response before it" else CLOSE)
    wait_for(lambda: client.connection._writable and client.connection._writable.active)
    gevent.sleep(0.02)  # whatever else would end the connection does it now
    wait_for(lambda: client.read() and client.ended)
    assert client.came.endswith(b"\r\n\r\n" + BIG)


@pytest.mark.parametrize("sent", [GET, CLOSE], ids=["kept", "closed"])
@pytest.mark.parametrize("use", ["shutdown", "close", "sendall", "send"])
def test_what_an_application_does_with_the_socket_comes_behind_its_answer(
    server: Server, sent: bytes, use: str
) -> None:
    client = server.connect()

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", [("Content-Length", "2")])
        write(b"ok")
        arguments = {"shutdown": [socket.SHUT_WR], "close": []}.get(use, [b"raw"])
        getattr(environ["gunicorn.socket"], use)(*arguments)
        return []

    server.listener.app = app
    client.send(sent)
    end = b"ok" if use in ("shutdown", "close") else b"okraw"
    wait_for(lambda: client.read().endswith(end))
    assert client.came.partition(b"\r\n\r\n")[2] == end


@pytest.mark.parametrize("use", ["close", "detach"])
@pytest.mark.parametrize("state", ["during the request", ConnectionState.IDLE, ConnectionState.PARKED])
def test_a_connection_ends_when_the_application_has_closed_or_detached_its_socket(
    server: Server, monkeypatch: pytest.MonkeyPatch, use: str, state: Any
) -> None:
    """It would wait for the next request, with a descriptor that soon belongs to another connection."""
    during = state == "during the request"
    taken: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        sock = environ["gunicorn.socket"]
        start_response("200 OK", [("Content-Length", "2")])(b"ok")
        taken[:] = [sock, getattr(sock, use)() if during else None]
        return []

    server.listener.idle_ticker.seconds = 0.02 if state is ConnectionState.PARKED else 600.0
    client = server.connect()
    server.listener.app = app
    client.send(GET)
    client.until(1)
    if not during:
        wait_for(lambda: client.connection.state is state)
        taken[1] = getattr(taken[0], use)()
    wait_for(lambda: client.connection.state is ConnectionState.CLOSED)
    assert server.acceptor.idle()
    assert taken[0].fileno() == -1
    if use == "close":
        wait_for(lambda: client.read() == b"" and client.ended)
    else:
        socket.socket(fileno=taken[1]).sendall(b"the application's")
        wait_for(lambda: client.read() == b"the application's" and client.ended)


@pytest.mark.parametrize("use", ["close", "detach"])
@pytest.mark.parametrize("wait", ["response", "coalesced response", "header section", "body"])
def test_a_greenlet_that_waits_for_a_closed_or_detached_socket_ends(
    server: Server, use: str, wait: str
) -> None:
    """It would wait for its timeout, and gevent's watcher for the next connection with this descriptor."""
    errors: list[BaseException] = []
    body = b"x" * (8 << 20)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        try:
            if wait == "body":
                environ["wsgi.input"].read()
            write = start_response("200 OK", [("Content-Length", str(len(body)))])
            if wait == "response":
                write(body)
        except BaseException as error:
            errors.append(error)
            raise
        return [body] if wait == "coalesced response" else []

    client = server.connect(SO_SNDBUF=4096)
    server.listener.app = app
    connection = client.connection
    client.send({"header section": GET[:-2], "body": POST}.get(wait, GET))
    watcher = "_writable" if "response" in wait else "_readable"
    wait_for(lambda: connection.state is not ConnectionState.IDLE and getattr(connection, watcher).active)
    fd = getattr(connection.sock, use)()
    wait_for(lambda: connection.state is ConnectionState.CLOSED)
    assert server.acceptor.idle()
    assert all(isinstance(error, ClientDisconnected) for error in errors)
    assert len(errors) == (wait in ("response", "body"))
    if use == "detach":
        os.close(fd)


def test_what_was_read_ahead_is_not_lost_by_detach(server: Server) -> None:
    texts = []

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        sock = environ["gunicorn.socket"]
        with pytest.raises(OSError, match="5 bytes") as raised:
            sock.detach()
        assert raised.value.errno == errno.EBUSY
        texts.append(sock.recv(100))
        os.close(sock.detach())
        raise StopIteration

    client = server.connect()
    server.listener.app = app
    client.send(GET[:-2] + b"Upgrade: x\r\nConnection: upgrade\r\n\r\nfirst")
    wait_for(lambda: client.read() == b"" and client.ended)
    assert texts == [b"first"]


@pytest.mark.parametrize("use", ["close", "detach"])
def test_a_parked_connection_whose_socket_is_closed_does_not_migrate(server: Server, use: str) -> None:
    server.listener.idle_ticker.seconds = 0.02
    client = server.connect()
    wait_for(lambda: client.connection.state is ConnectionState.PARKED)
    fd = getattr(client.connection.sock, use)()
    assert server.acceptor.pop_idle_connections(10) == []
    assert server.acceptor.idle()
    if use == "detach":
        os.close(fd)


@pytest.mark.parametrize("use", ["recv", "shutdown", "close"])
def test_code_that_a_request_has_left_behind_uses_the_socket_before_the_flush(
    server: Server, use: str
) -> None:
    def act(call: int, environ: Any) -> None:
        arguments = {"recv": [1], "shutdown": [socket.SHUT_WR], "close": []}[use]

        def run() -> None:
            with contextlib.suppress(OSError):  # the connection has ended
                getattr(environ["gunicorn.socket"], use)(*arguments)

        gevent.spawn(run)

    server.act = act
    client = server.connect()
    client.send(CLOSE)
    assert client.until(1) == [b"ok"]
    wait_for(lambda: client.read() == b"" and client.ended)
    wait_for(server.acceptor.idle)


def test_code_that_a_request_has_left_behind_does_not_take_the_answer_along(server: Server) -> None:
    def act(call: int, environ: Any) -> Any:
        if call == 1:
            gevent.spawn(environ["gunicorn.socket"].recv, 1, socket.MSG_PEEK)
        return [BIG]

    server.act = act
    client = server.connect(SO_SNDBUF=4096)
    client.send()
    wait_for(lambda: client.connection._writable and client.connection._writable.active)
    client.send()  # before it has read the first
    assert client.until(2) == [BIG, BIG]


def test_a_client_that_goes_before_its_last_answer(server: Server) -> None:
    def act(call: int, environ: Any) -> None:
        if call == 2:
            gone.append(server.held())
            gone[0].sock.close()

    gone: list[Client] = []
    for client in server.connect(), server.connect():
        client.send(CLOSE)
    server.act = act
    wait_for(lambda: not server.acceptor._connections)
    server.clients.remove(gone[0])
    assert server.clients[0].until(1) == [b"ok"]


def test_the_rest_of_a_body_comes_before_the_last_answer_is_held(server: Server) -> None:
    server.act = lambda call, environ: environ["wsgi.input"].read(1) and None
    client = server.connect()
    client.send(b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 10\r\n\r\nabc")
    client.until(1)
    client.send(b"defghij")
    wait_for(lambda: client.read() == b"" and client.ended)


def test_a_server_at_its_limit_accepts_when_the_last_answers_are_flushed(server: Server) -> None:
    server.acceptor._limit = 1
    client = server.connect()
    client.send(CLOSE)
    client.until(1)
    wait_for(lambda: client.read() == b"" and client.ended)
    assert server.acceptor.room() == 1


def test_a_drain_and_a_kill_send_the_last_answers(server: Server) -> None:
    flushed = []

    def act(call: int, environ: Any) -> None:
        if call == 2:
            held = server.held()
            held.connection.begin_shutdown()
            assert held.connection.state is ConnectionState.FLUSHING
            held.connection.close()  # as Acceptor.kill() does with a connection without a greenlet
            flushed.append(held)

    for client in server.connect(), server.connect():
        client.send(CLOSE)
    server.act = act
    for client in server.clients:
        assert client.until(1) == [b"ok"]
        wait_for(lambda client=client: client.read() == b"" and client.ended)
    assert len(flushed) == 1


def test_a_part_of_an_answer_is_not_held(server: Server) -> None:
    seen = []

    def act(call: int, environ: Any) -> Any:
        def pieces() -> Iterator[bytes]:
            yield b"o"
            seen.append(sum(server.answered()))
            yield b"k"

        result = Result(b"o", b"k")
        result.__class__ = type("Pieces", (Result,), {"__iter__": lambda self: pieces()})
        return result

    server.act = act
    client = server.connect()
    client.send()
    assert client.until(1) == [b"ok"]
    assert seen == [1]


# --- what does not leave at once ---------------------------------------------------------------------


def test_what_does_not_fit_is_sent_by_the_connections_greenlet(server: Server) -> None:
    big = [bytes([65 + n]) * 30000 + b"ok" for n in range(3)]
    server.act = lambda call, environ: [big[call - 1]]
    client = server.connect(SO_SNDBUF=4096)
    other = server.connect()
    for n in range(3):
        client.send()
        wait_for(lambda: client.connection._writable and client.connection._writable.active)
        assert server.calls == n + 1
        # meanwhile others are served
        act, server.act = server.act, lambda call, environ: None
        other.send()
        other.until(1)
        server.act, server.calls = act, n + 1
        assert client.until(1) == [big[n]]


@pytest.mark.parametrize("waits", [True, False])
def test_what_does_not_fit_is_not_forgotten_while_the_application_closes(server: Server, waits: bool) -> None:
    done = Event()
    server.act = lambda call, environ: Result(BIG, close=done.wait if waits else lambda: None)
    client = server.connect(SO_SNDBUF=4096)
    client.send()
    wait_for(lambda: client.connection._blocked or client.connection._sending)
    assert bool(client.connection._blocked) == waits
    done.set()
    assert client.until(1) == [BIG]
    server.act = lambda call, environ: None
    client.send()
    assert client.until(1) == [b"ok"]


def test_a_client_that_goes_leaves_nothing(server: Server) -> None:
    gone = []

    def act(call: int, environ: Any) -> None:
        if call == 2:
            gone.append(server.held())
            gone[0].sock.close()

    for client in server.connect(), server.connect():
        client.send()
    server.act = act
    wait_for(lambda: len(server.acceptor._connections) == 1)
    (client,) = gone
    server.clients.remove(client)
    assert server.clients[0].until(1) == [b"ok"]
    assert client.connection.pending == b""


# --- whatever else happens on the connection ---------------------------------------------------------


def test_a_client_that_waits_for_its_answer_with_the_rest_of_its_body(server: Server) -> None:
    server.act = lambda call, environ: [BIG]
    client = server.connect(SO_SNDBUF=4096)
    client.send(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
    client.until(1)
    client.send(b"defghij" + GET)
    client.until(1)


def test_an_upload_that_is_not_read_to_its_end(server: Server) -> None:
    server.act = lambda call, environ: environ["wsgi.input"].read(1) and None
    client = server.connect()
    client.send(b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\nabc")
    client.until(1)
    wait_for(lambda: client.read() == b"" and client.ended)


def test_a_client_that_half_closes(server: Server) -> None:
    client = server.connect()
    client.send()
    client.sock.shutdown(socket.SHUT_WR)
    client.until(1)
    wait_for(lambda: client.read() == b"" and client.ended)


def test_an_application_that_fails_when_it_closes(server: Server) -> None:
    def fail() -> None:
        raise RuntimeError("in close()")

    server.act = lambda call, environ: Result(BIG, close=fail)
    client = server.connect(SO_SNDBUF=4096)
    client.send()
    assert client.until(1) == [BIG]
    wait_for(lambda: client.read() == b"" and client.ended)


def test_a_connection_that_is_killed_meanwhile(server: Server) -> None:
    client = server.connect()

    def act(call: int, environ: Any) -> None:
        # before the loop comes to the end of the iteration
        gevent.get_hub().loop.run_callback(client.connection.greenlet.throw, gevent.GreenletExit)

    server.act = act
    client.send()
    assert client.until(1) == [b"ok"]
    wait_for(lambda: client.read() == b"" and client.ended)


def test_only_an_idle_connection_is_detached(server: Server) -> None:
    """Not one whose greenlet still waits for the next request, nor one whose response is pending."""
    popped = []

    def act(call: int, environ: Any) -> None:
        popped.extend(server.acceptor.pop_idle_connections(5))

    clients = [server.connect(), server.connect()]
    for client in clients:
        client.send()
    server.act = act
    for client in clients:
        assert client.until(1) == [b"ok"]
    assert popped == []
    wait_for(lambda: all(client.connection.is_idle() for client in clients))
    ((sock, addr),) = server.acceptor.pop_idle_connections(1)
    assert addr == ""
    (detached,) = [client for client in clients if client.connection.state is ConnectionState.CLOSED]
    (kept,) = [client for client in clients if client is not detached]
    detached.send()
    assert not select.select([detached.sock], [], [], 0)[0]
    sock.sendall(b"from its new owner")
    wait_for(lambda: detached.read() == b"from its new owner")
    sock.close()
    kept.send()
    assert kept.until(1) == [b"ok"]


@pytest.mark.parametrize("sent", [GET, CLOSE], ids=["kept", "closed"])
def test_a_forked_child_does_not_send_what_its_parent_sends(server: Server, sent: bytes) -> None:
    statuses = []

    def act(call: int, environ: Any) -> None:
        if call == 2:
            connection = server.held().connection
            pid = os.fork()
            if not pid:
                left = True
                try:
                    left = bool(connection.pending or server.coalescer.pending)
                finally:
                    os._exit(left)
            statuses.append(os.waitpid(pid, 0)[1])

    for client in server.connect(), server.connect():
        client.send(sent)
    server.act = act
    for client in server.clients:
        assert client.until(1) == [b"ok"]
    assert statuses == [0]
