"""Parts of the HTTP core by themselves, where a real server could only show them by chance."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.event
import gevent.socket
import http_model
import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.http.errors import InvalidChunkSize

from gunicorn_passenger.errors import BodyTimeout, ClientDisconnected
from gunicorn_passenger.http import timeouts as deadlines_module
from gunicorn_passenger.http.access_log import AccessLog
from gunicorn_passenger.http.body import ChunkedBody
from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.error_stream import ErrorStream
from gunicorn_passenger.http.response import Response
from gunicorn_passenger.http.response_cache import InvalidResponseHeader
from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.http.transport import Transport
from gunicorn_passenger.serving import acceptors
from gunicorn_passenger.system.text import escape_error_log


class Loop:
    """A loop whose time is what the test says."""

    def __init__(self) -> None:
        self.time = 100.0
        self.timers: list[Any] = []

    def now(self) -> float:
        return self.time

    def timer(self, seconds: float, priority: int = 0) -> Any:
        timer = Timer(self, self.time + seconds)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        end = self.time + seconds
        while due := sorted((t for t in self.timers if t.when <= end), key=lambda t: t.when):
            self.time = max(self.time, due[0].when)
            self.timers.remove(due[0])
            due[0].callback()
        self.time = end


class Timer:
    def __init__(self, loop: Loop, when: float) -> None:
        self.loop, self.when = loop, when
        self.callback: Any = None

    def start(self, callback: Any) -> None:
        self.callback = callback

    def close(self) -> None:
        if self in self.loop.timers:
            self.loop.timers.remove(self)


class Waiting:
    def __init__(self, loop: Loop, again: TimeoutQueue | None = None) -> None:
        self.loop, self.again = loop, again
        self.expired: list[float] = []

    def expire(self) -> None:
        self.expired.append(self.loop.time)
        if self.again is not None:
            again, self.again = self.again, None
            again.add(self)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(deadlines_module, "get_hub", lambda: type("Hub", (), {"loop": loop}))
    monkeypatch.setattr(deadlines_module, "monotonic", loop.now)
    return loop


def test_each_wait_has_its_own_deadline_also_when_one_begins_another(loop: Loop) -> None:
    deadlines = TimeoutQueue(1.0)
    first, second, third = Waiting(loop, again=deadlines), Waiting(loop), Waiting(loop)
    deadlines.add(first)
    loop.advance(0.25)
    deadlines.add(second)
    loop.advance(0.25)
    deadlines.add(third)
    deadlines.remove(third, None)
    loop.advance(10)
    assert [round(at, 2) for at in first.expired] == [101.0, 102.0]
    assert [round(at, 2) for at in second.expired] == [101.25]
    assert third.expired == []


def test_without_a_waiting_connection_there_is_no_timer(loop: Loop) -> None:
    deadlines = TimeoutQueue(1.0)
    waiting = Waiting(loop)
    for _ in range(100):
        deadlines.add(waiting)
        deadlines.remove(waiting, None)
    loop.advance(10)
    assert loop.timers == []
    assert waiting.expired == []


def test_what_has_arrived_in_time_counts_although_the_loop_was_busy() -> None:
    near, far = socket.socketpair()
    readable = gevent.get_hub().loop.io(near.fileno(), 1)
    late: list[str] = []
    deadlines = TimeoutQueue(0.02, late.append)
    arrived = gevent.event.Event()

    def on_readable() -> None:
        deadlines.remove("wait", None)
        readable.close()
        arrived.set()

    def compute() -> None:
        far.send(b"x")
        time.sleep(0.05)

    with near, far:
        deadlines.add("wait")
        readable.start(on_readable)
        gevent.get_hub().loop.run_callback(compute)
        assert arrived.wait(30)
    assert late == []


def test_a_wait_that_begins_after_a_long_computation_has_its_whole_time() -> None:
    expired = gevent.event.Event()
    deadlines = TimeoutQueue(0.1, lambda waiting: waiting is expired and expired.set())
    began = []

    def compute() -> None:
        time.sleep(0.08)
        began.append(time.monotonic())
        deadlines.add(expired)

    deadlines.add("a wait that has begun before")
    gevent.get_hub().loop.run_callback(compute)
    assert expired.wait(30)
    assert time.monotonic() - began[0] > 0.09


class Wire:
    """A connection that keeps what it is sent."""

    def __init__(self) -> None:
        self.listener = http_model.gateway(Config())
        self.body = type("Body", (), {"too_much_unread": False})
        self.sent = self.extra_headers = b""

    def send(self, data: bytes) -> None:
        self.sent += data

    def share_loop(self) -> None:
        pass


class Transfer(Transport):
    """One end of a pair of sockets, with a test at the other."""

    __slots__ = ("aborted",)

    def __init__(self, sock: Any) -> None:
        queues = {name: TimeoutQueue(600.0) for name in ("writes", "bodies", "heads")}
        listener: Any = SimpleNamespace(sent=0, **queues)
        super().__init__(listener, sock)
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def transfer() -> Iterator[tuple[Transfer, Any]]:
    ours, client = gevent.socket.socketpair()
    with ours, client:
        yield Transfer(ours), client


def test_a_client_that_reads_slowly_is_waited_for_and_one_that_reads_nothing_is_not(
    transfer: tuple[Transfer, Any],
) -> None:
    ours, client = transfer
    sending = gevent.spawn(ours.send, b"x" * 10_000_000)
    gevent.sleep(0)
    for _ in range(3):
        assert len(ours.listener.writes) == 1
        ours.listener.writes.clear()  # the timeout has passed
        assert len(client.recv(50_000)) == 50_000
        ours.on_write_timeout()
        assert not sending.dead
    ours.listener.writes.clear()
    gevent.spawn(ours.on_write_timeout)
    with pytest.raises(ClientDisconnected, match="has read nothing of a response for 600 s"):
        sending.get(timeout=60)
    assert ours.aborted


def test_an_interrupted_write_closes_the_connection(transfer: tuple[Transfer, Any]) -> None:
    ours, _ = transfer
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        ours.send(b"x" * 10_000_000)
    assert ours.aborted
    assert len(ours.listener.writes) == 0


def send_to_a_full_buffer(ours: Transfer, client: Any, size: int = 10_000_000) -> int:
    """Send more than the kernel takes at once; the size of the send buffer then."""
    sending = gevent.spawn(ours.send, b"x" * size)
    gevent.sleep(0)
    assert not sending.dead
    left = size
    while left:
        left -= len(client.recv(1 << 20))
    sending.get(timeout=60)
    return int(ours._raw.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))


@pytest.mark.parametrize(("before", "grows"), [(4096, True), (1 << 20, False)])
def test_the_send_buffer_of_a_unix_socket_grows_when_it_is_full(
    transfer: tuple[Transfer, Any], before: int, grows: bool
) -> None:
    ours, client = transfer
    ours._raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, before)
    before = ours._raw.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    after = send_to_a_full_buffer(ours, client)
    assert (after > before) if grows else (after == before)


def test_the_send_buffer_of_tcp_is_left_to_the_kernel() -> None:
    with gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = gevent.socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            before = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            # with so small a buffer, much more would take seconds
            assert send_to_a_full_buffer(Transfer(accepted), client, 1_000_000) == before


def test_a_client_that_always_has_data_lets_others_run(transfer: tuple[Transfer, Any]) -> None:
    ours, client = transfer
    turns: list[int] = []

    def others() -> None:
        while True:
            turns.append(ours.buffered())
            gevent.sleep(0)

    beside = gevent.spawn(others)
    body = ChunkedBody(ours, False, 8190, None)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.setblocking(False)
    sent = client.send(b"1\r\nx\r\n" * 25_000)
    # all of it is there already: no read waits
    while len(body.read1(1)) and ours._raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
        if turns:
            break
    beside.kill()
    assert sent > 50_000
    assert turns


def test_a_deadline_that_passes_while_others_run_ends_the_next_wait(transfer: tuple[Transfer, Any]) -> None:
    ours, _ = transfer
    others = gevent.event.Event()

    def read() -> bytes:
        ours.greenlet = ours._waiting = gevent.getcurrent()
        ours.begin_deadline()
        others.wait()
        return ours.read_some(1)

    reading = gevent.spawn(read)
    gevent.sleep(0)
    gevent.get_hub().loop.run_callback(ours.expire)
    gevent.sleep(0)
    others.set()
    with pytest.raises(BodyTimeout):
        reading.get(timeout=5)


def test_a_body_whose_end_is_unknown_ends_the_connection(transfer: tuple[Transfer, Any]) -> None:
    ours, client = transfer
    body = ChunkedBody(ours, False, 8190, None)
    client.send(b"x\r\n")
    with pytest.raises(InvalidChunkSize):
        body.read()
    assert body.too_much_unread


def test_a_response_of_many_small_chunks_lets_others_run() -> None:
    answer, wire = response()
    answer.start_response("200 OK", [])
    shared: list[int] = []
    wire.share_loop = lambda: shared.append(len(wire.sent))  # type: ignore[method-assign]
    for _ in range(3):
        answer.write(b"x")
    assert len(shared) == 2


def response(protocol: str = "HTTP/1.1", method: str = "GET") -> tuple[Response, Wire]:
    wire = Wire()
    return Response(wire, {"SERVER_PROTOCOL": protocol, "REQUEST_METHOD": method}, None), wire


def test_a_start_response_that_failed_leaves_nothing() -> None:
    answer, wire = response()
    with pytest.raises(InvalidResponseHeader):
        answer.start_response("101 Switching", [("Connection", "upgrade"), ("X", "a\r\nb")])
    answer.start_response("200 OK", [("Content-Length", "2")])
    answer.write_all([b"ok"])
    assert b"Connection: keep-alive\r\n" in wire.sent
    assert b"X:" not in wire.sent


@pytest.mark.parametrize("value", ["a\r\nb", "a\nb", "a\rb", "a\0", "\x7f", "\u0100"])
def test_a_bad_field_is_refused_each_time(value: str) -> None:
    for _ in range(3):
        answer, _ = response()
        with pytest.raises(InvalidResponseHeader):
            answer.start_response("200 OK", [("X-Good", "a"), ("X-Bad", value)])


def test_a_last_answer_of_1xx_ends_the_connection() -> None:
    answer, _ = response()
    answer.start_response("102 Processing", [])
    answer.write_all([])
    assert answer.should_close()


def test_hooks_see_the_trailers() -> None:
    seen: list[Any] = []
    cfg = Config()
    cfg.set("post_request", lambda worker, req, environ, resp: seen.append((req.trailers, resp.status)))
    got, end, _ = http_model.ours(
        http_model.gateway(cfg),
        [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-T: v\r\n\r\n"],
    )
    assert len(got) == 1
    assert end == http_model.EOF
    assert seen == [([("X-T", "v")], "200 OK")]


def test_post_request_after_a_pre_request_that_failed() -> None:
    seen: list[Any] = []

    def before(worker: Any, req: Any) -> None:
        if req.path == "/bad":
            raise RuntimeError("of the hook")

    cfg = Config()
    cfg.set("pre_request", before)
    cfg.set(
        "post_request",
        lambda worker, req, environ, resp: seen.append((req.path, environ == {}, resp is None)),
    )
    got, _, _ = http_model.ours(
        http_model.gateway(cfg),
        [b"GET /good HTTP/1.1\r\n\r\nGET /bad HTTP/1.1\r\n\r\nGET /after HTTP/1.1\r\n\r\n"],
    )
    assert [environ["PATH_INFO"] for environ, _ in got] == ["/good"]
    assert seen == [("/good", False, False), ("/bad", True, True)]


def test_other_handlers_get_the_access_log_too(tmp_path: Any) -> None:
    answer, _ = response()
    answer.start_response("200 OK", [("Content-Length", "0")])
    cfg = Config()
    cfg.set("accesslog", str(tmp_path / "access.log"))
    log = cfg.logger_class(cfg)
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    access = AccessLog(cfg, log)
    environ = {"REQUEST_METHOD": "GET", "RAW_URI": "/", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "a"}
    handler = Handler()
    logging.getLogger().addHandler(handler)
    try:
        access.write(answer, None, environ, 0.1, b"GET / HTTP/1.1\r\n\r\n")
        assert records == []
        log.access_log.propagate = True
        access.write(answer, None, environ, 0.1, b"GET / HTTP/1.1\r\n\r\n")
    finally:
        log.access_log.propagate = False
        logging.getLogger().removeHandler(handler)
        for own in list(log.access_log.handlers):
            own.close()
            log.access_log.removeHandler(own)
    assert len(records) == 1
    assert (tmp_path / "access.log").read_text().count('"GET / HTTP/1.1" 200 0') == 2


#: what a client could put into an access log: a second line, a terminal's commands, text in another order
HOSTILE = 'a\r\n1.2.3.4 - - "GET" \x1b[2J\x7f\x9b2J \u202e'
ESCAPED = 'a\\x0d\\x0a1.2.3.4 - - \\"GET\\" \\x1b[2J\\x7f\\x9b2J \\u202e'


class OtherLogger(Logger):
    """A program's own logger, whose values for the line may be others."""

    def atoms(self, *arguments: Any) -> Any:
        return super().atoms(*arguments)


@pytest.mark.parametrize("own", [True, False], ids=["our line", "gunicorn's line"])
def test_what_a_client_says_stays_in_its_line_of_the_access_log(tmp_path: Any, own: bool) -> None:
    answer, _ = response()
    answer.start_response("200 OK", [("Content-Length", "0")])
    cfg = Config()
    cfg.set("accesslog", str(tmp_path / "access.log"))
    cfg.set("access_log_format", "%(h)s|%(U)s|%({hostile}e)s")
    log = cfg.logger_class(cfg) if own else OtherLogger(cfg)
    try:
        access = AccessLog(cfg, log)
        assert access._simple is own
        environ = {
            "REQUEST_METHOD": "GET", "RAW_URI": "/", "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "", "PATH_INFO": HOSTILE, "HOSTILE": HOSTILE,
        }  # fmt: skip
        request = type("Request", (), {"headers": [], "method": "GET", "uri": "/"})
        access.write(answer, lambda: request, environ, 0.1, b"GET / HTTP/1.1\r\n\r\n")
    finally:
        for handler in list(log.access_log.handlers):
            handler.close()
            log.access_log.removeHandler(handler)
    assert (tmp_path / "access.log").read_text() == f"|{ESCAPED}|{ESCAPED}\n"


def test_what_is_logged_as_an_argument_stays_in_its_line_of_the_error_log(tmp_path: Any) -> None:
    cfg = Config()
    cfg.set("errorlog", str(tmp_path / "error.log"))
    log = cfg.logger_class(cfg)
    try:
        escape_error_log(log)
        escape_error_log(log)
        log.warning("Invalid request from %s: %d", HOSTILE, 5)
        log.warning("two\nlines \x1b[2J")
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            log.exception("Error handling request %s", "/\n")
        # an application that borrows gunicorn's handlers has its own lines
        other = logging.getLogger("of an application")
        other.propagate = False
        other.addHandler(log.error_log.handlers[-1])
        other.warning("%s", "two\nlines")
    finally:
        other.removeHandler(log.error_log.handlers[-1])
        for handler in list(log.error_log.handlers):
            handler.close()
            log.error_log.removeHandler(handler)
    text = (tmp_path / "error.log").read_text()
    lines = [line.partition("] [WARNING] ")[2] or line for line in text.splitlines()]
    assert lines[0] == f"Invalid request from {ESCAPED}: 5".replace('\\"', '"')
    assert lines[1:3] == ["two", "lines \\x1b[2J"]
    assert "Error handling request /\\x0a" in lines[3]
    assert lines[4] == "Traceback (most recent call last):"
    assert lines[-3:] == ["ValueError: \\x1b[2J", "two", "lines"]


def test_what_an_application_writes_to_wsgi_errors_commands_no_terminal(tmp_path: Any) -> None:
    cfg = Config()
    cfg.set("errorlog", str(tmp_path / "error.log"))
    log = cfg.logger_class(cfg)
    stream = ErrorStream(cfg)
    try:
        stream.write("two\nlines \x1b[2J\n")
        stream.write(b"bytes \x9b\xff\n")
    finally:
        for handler in list(log.error_log.handlers):
            handler.close()
            log.error_log.removeHandler(handler)
    assert (tmp_path / "error.log").read_text() == "two\nlines \\x1b[2J\nbytes \\x9b\\xff\n"


@pytest.mark.parametrize("reason", ["", "TLS"])
def test_the_access_log_is_escaped_under_gunicorns_own_handler_too(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    cfg = Config()
    log = cfg.logger_class(cfg)
    monkeypatch.setattr(acceptors, "unsupported_features", lambda _: reason)
    with gevent.socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        made = acceptors.make_acceptor(sock, None, cfg, log, None)
        made.stop_accepting()
    assert log.atoms_wrapper_class({"U": HOSTILE})["U"] == ESCAPED


# --- gunicorn.socket ---------------------------------------------------------------------------------


def connected() -> tuple[ClientSocket, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    return ClientSocket(ours.family, ours.type, ours.proto, ours.detach()), theirs


def test_a_socket_that_was_not_used_is_gevents_all_the_same() -> None:
    sock, client = connected()
    with client:
        assert sock.gettimeout() is None  # gunicorn asks for it before it sends an error
        assert isinstance(sock, gevent.socket.socket)
        assert (sock.family, sock.type, sock.timeout) == (socket.AF_UNIX, socket.SOCK_STREAM, None)
        reading = gevent.spawn(sock.recv, 5)
        gevent.sleep(0)
        client.sendall(b"hello")
        assert reading.get(timeout=60) == b"hello"
        sock.settimeout(0.01)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.release()
        assert client.recv(1) == b""


def test_what_is_set_before_a_socket_is_used_stays() -> None:
    sock, client = connected()
    with client:
        sock.settimeout(0.01)
        with pytest.raises(TimeoutError):
            sock.recv(1)
    sock.close()
    assert (sock.fileno(), sock.gettimeout()) == (-1, 0.01)
    unused, client = connected()
    unused.close()
    with client, pytest.raises(OSError, match="Bad file descriptor"):
        unused.recv(1)


def test_a_socket_that_is_released_wakes_all_that_wait_for_it() -> None:
    sock, client = connected()
    with client:

        def read() -> Any:
            try:
                return sock.recv(5)
            except OSError as error:
                return error

        reading = gevent.spawn(read)
        other = gevent.spawn(gevent.socket.wait_read, sock.fileno())
        gevent.sleep(0)
        sock.release()
        assert isinstance(reading.get(timeout=60), OSError)
        with gevent.Timeout(60):
            while not other.ready():
                gevent.sleep(0.01)  # gevent wakes it with whatever else turns the loop
        assert client.recv(1) == b""


@pytest.mark.parametrize("first", ["release", "close", "detach"])
def test_a_socket_that_has_ended_stays_so(first: str) -> None:
    sock, client = connected()
    with client:
        fd = getattr(sock, first)()
        if fd is not None:
            socket.close(fd)
        assert client.recv(1) == b""
        with socket.socketpair()[0] as heir:  # which has its descriptor now
            sock.release()
            sock.close()
            with pytest.raises(OSError, match="Bad file descriptor"):
                sock.recv(1)
            assert heir.getsockname() is not None
            assert "closed" in repr(sock)


def test_a_file_made_of_a_socket_outlives_its_connection() -> None:
    sock, client = connected()
    with client:
        file = sock.makefile("rb")
        sock.release()
        client.sendall(b"line\n")
        assert file.readline() == b"line\n"
        file.close()
        assert client.recv(1) == b""


@pytest.mark.parametrize("target", ["?x", "??http://b:81/x?y", "#x"])
def test_a_target_without_a_path_is_refused_by_gunicorns_rules(target: str) -> None:
    """gunicorn's parser decides about it: with its error, or with what it makes of the target."""
    cfg = Config()
    gate = http_model.gateway(cfg)
    sent = f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    assert http_model.disagreement(gate, cfg, sent, []) == ""
