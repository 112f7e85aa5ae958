"""What reviews of the proxy have found: each defect with the input that showed it."""

import contextlib
import io
import itertools
import re
import select
import socket
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from conftest import descriptors, fetch, free_port, wait_for
from proxy_harness import background, buffers, came, cut_off, fill, wait_read
from proxy_laboratory import (
    OK,
    Origin,
    accept,
    answer,
    ask,
    get,
    laboratory,
    read_request,
    read_response,
    request,
)
from upstream_sockets import Upstream, connect

MB = 1 << 20
MODES = pytest.mark.parametrize("mode", ["direct", "routed"])
WAYS = pytest.mark.parametrize("way", ["unix", "tcp"])


@pytest.fixture(scope="module")
def gunicorn():
    with laboratory("--keep-alive", 30) as lab:
        yield lab


@pytest.fixture
def lab(gunicorn):
    return gunicorn.scene()


@pytest.fixture
def upstream(port):
    with Upstream(port) as upstream:
        yield upstream


@pytest.fixture
def origins():
    """Makes targets that answer by themselves, and ends them."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Origin(*arguments, **options))


@pytest.fixture(scope="module")
def tls():
    """A server's TLS context, of an authority that nobody knows."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


def place(way):
    """Where a proxy listens: ``None`` is a UNIX socket of the scene's own."""
    return free_port() if way == "tcp" else None


def routed(lab, create, code):
    """An app that does something with ``environ`` and hands on to ``proxy``; where it listens."""
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({create})
def app(environ, start_response):
    {code}
passenger.create_server(app).listen("unix:{where}")
""")
    return where


def note_errors(lab):
    lab.run(
        "proxy.on('error', lambda error, request, target: seen.append((type(error).__name__, str(target))))"
    )


def sockets(lab):
    (pid,) = lab.process.workers()
    return sum(name.startswith("socket:") for name in descriptors(pid))


def settled(lab):
    """The number of the worker's sockets, when those of before are gone."""

    def same():
        before = sockets(lab)
        time.sleep(0.1)
        return before if sockets(lab) == before else 0

    return wait_for(same, "the descriptors to settle")


def lines(lab, part):
    """The proxy's lines in the log that have ``part``."""
    return [line for line in lab.log().splitlines() if "proxy: " in line and part in line]


def one_line(lab, part, pattern):
    """Wait for the line about a request; it is the only one, and nothing is said beside it."""
    wait_for(lambda: lines(lab, part), lambda: f"a line with {part} in\n{lab.log()}")
    fetch(lab.process.socket)  # the worker has had another turn
    (line,) = lines(lab, part)
    assert re.search(pattern, line), line
    calm(lab)


def calm(lab):
    for word in ("Traceback", "RecursionError", "Error handling request"):
        assert word not in lab.log(), lab.log()


def labels(where, count, sent=None):
    """The bodies of so many answers, each of a connection of its own."""
    came = []
    for _ in range(count):
        message = get(where, sent)
        assert message.status == 200, message
        came.append(message.text)
    return came


def silent(wire, seconds=0.3):
    """Nothing comes, not even the end."""
    return not select.select([wire.sock], [], [], seconds)[0]


# --- 1: h2c --------------------------------------------------------------------------------------


LISTS = ["h2c", "H2C", "h2c, websocket", "websocket, h2c", "h2c, h2c", "h2c,", ",h2c"]


@MODES
@pytest.mark.parametrize("value", LISTS)
def test_h2c_is_not_handed_on_in_any_list(lab, upstream, port, mode, value):
    if mode == "direct":
        where = lab.serve(f"{port}")
    else:
        where = routed(lab, port, "return proxy.web(environ, start_response)")
    fields = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {value}", "HTTP2-Settings: AAMAAABkAAQCAAAA"]
    with connect(where) as client:
        client.send(request("/x", *fields))
        wire = accept(upstream, client)
        got = read_request(wire)
        assert not got.get("upgrade"), got
        assert not got.get("http2-settings"), got
        assert "upgrade" not in ",".join(got.get("connection")).lower(), got
        wire.send(OK)
        assert read_response(client).text == b"ok"


@pytest.mark.parametrize("values", [("websocket", "h2c"), ("h2c", "websocket")], ids=" + ".join)
def test_h2c_in_a_field_of_its_own_is_not_handed_on(lab, upstream, port, values):
    fields = ["Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQCAAAA"]
    sent = request("/x", *fields, *(f"Upgrade: {value}" for value in values))
    got, came_back = ask(lab.serve(f"{port}"), upstream, sent)
    assert "h2c" not in ",".join(got.get("upgrade")), got
    assert not got.get("http2-settings"), got
    assert came_back.text == b"ok"


@pytest.mark.parametrize("value", LISTS)
def test_h2c_is_no_upgrade(lab, upstream, port, value):
    where = routed(lab, port, "return proxy.ws(environ, start_response)")
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", f"Upgrade: {value}"))
        assert read_response(client).status == 400
    assert not upstream.connects_within(0.05)


@MODES
@pytest.mark.parametrize("value", ["h2c", "H2C", "h2c, websocket", "websocket, h2c", "h2c,"])
@pytest.mark.parametrize("asked", ["websocket", "h2c, websocket"])
@pytest.mark.leave_out(lambda mode, asked: mode == "routed" and asked != "websocket")
def test_a_target_that_switches_to_h2c_is_502(lab, upstream, port, mode, value, asked):
    where = lab.serve(f"{port}", mode)
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", f"Upgrade: {asked}"))
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(f"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: {value}\r\n\r\nframes".encode())
        assert read_response(client).status == 502
        assert wire.ended()
    one_line(lab, "(GET /x)", r"\): 502")


# --- 2: proxy_timeout and uploads ----------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("target", ["reads all", "reads nothing"])
def test_an_upload_to_a_target_that_does_not_answer_is_504(lab, upstream, port, way, target):
    where = lab.serve(f"{port}, proxy_timeout=1", where=place(way))
    size = 20 * MB

    def upload():
        with contextlib.suppress(OSError):
            client.send(request("/x", f"Content-Length: {size}", method="POST")).send(bytes(size))

    with connect(where) as client, background(upload):
        wire = accept(upstream, client)
        with background(cut_off, wire) if target == "reads all" else contextlib.nullcontext():
            assert read_response(client).status == 504
            client.sock.shutdown(socket.SHUT_RDWR)
    one_line(lab, "(POST /x)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(POST /x\): 504")


@pytest.mark.parametrize("slow", ["target on tcp", "target on unix", "client"])
def test_an_upload_that_is_slower_than_proxy_timeout_is_not_cut_off(lab, port, slow):
    """There is progress all the time."""
    unix = lab.place()
    with Upstream(unix if slow == "target on unix" else port) as upstream:
        where = lab.serve(
            f"{f'unix:{unix}'!r}, proxy_timeout=2" if "unix" in slow else f"{port}, proxy_timeout=2"
        )
        size, step = {"target on tcp": (20 * MB, MB), "target on unix": (5 * MB, MB // 4), "client": (20, 1)}[
            slow
        ]

        def upload():
            client.send(request("/x", f"Content-Length: {size}", method="POST"))
            for _ in range(0, size, step):
                client.send(bytes(min(step, size)))
                if slow == "client":
                    time.sleep(0.2)

        with connect(where) as client, background(upload):
            wire = accept(upstream, client)
            begin = time.monotonic()
            wire.head()
            left = size - len(wire.data)
            while left:
                for _ in range(max(1, step // 65536)):
                    piece = wire.sock.recv(min(left, 65536))
                    assert piece or not left, f"cut off, {left} bytes are missing"
                    left -= len(piece)
                if slow != "client":
                    time.sleep(0.2)
            assert time.monotonic() - begin > 2.5, "the test was too quick to show anything"
            wire.send(OK)
            assert read_response(client).text == b"ok"
    assert not lines(lab, "(POST /x)")


# --- 3: what an app puts into environ ------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "bob\r\nX-Admin: yes\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: b",
        "a\r\n b",
        "a\nb",
        "a\rb",
        "a\0b",
        "\u20ac",
    ],
)
def test_a_field_that_an_app_has_broken_is_400(lab, upstream, port, value):
    where = routed(
        lab, port, f"environ['HTTP_X_USER'] = {value!a}; return proxy.web(environ, start_response)"
    )
    with connect(where) as client:
        client.send(request())
        assert read_response(client).status == 400
        if upstream.connects_within(0.1):
            assert not came(upstream.wires[0])
    calm(lab)


# --- 4, 5: threads -------------------------------------------------------------------------------

THREADS = """
import io, os, threading, time
from gunicorn_passenger import http_proxy

def environ(body, **more):
    return {{
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "a", "SERVER_PORT": "80", "HTTP_HOST": "a",
        "REMOTE_ADDR": "127.0.0.1", "CONTENT_LENGTH": str(len(body)), "wsgi.url_scheme": "http",
        "wsgi.version": (1, 0), "wsgi.input": io.BytesIO(body), "wsgi.errors": None,
        "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False, **more,
    }}

def call(environ):
    said = []
    answer = proxy.web(environ, lambda status, headers, exc_info=None: said.append(status))
    try:
        body = b"".join(answer)
    finally:
        getattr(answer, "close", lambda: None)()
    return said[0][:3], body

def thread(function):
    one = threading.Thread(target=function)
    one.start()
    one.join()

proxy = http_proxy.create_server({create})
"""


def test_threads_leave_no_descriptors(start, origins, port):
    origins(port)
    script = start.write(
        "threads.py",
        THREADS.format(create=f"{port}, '127.0.0.1', timeout=5")
        + """
def run():
    for _ in range(2):
        assert call(environ(b"hello")) == ("200", b"ok")
    done.append(1)

done, counts = [], []
for number in range(35):
    thread(run)
    if number in (4, 34):
        counts.append(len(os.listdir("/proc/self/fd")))
print("done", len(done), "descriptors", *counts)
""",
    )
    process = start.python(script)
    assert process.wait_end() == 0, process.log()
    match = re.search(r"done 35 descriptors (\d+) (\d+)", process.log())
    assert match, process.log()
    assert int(match[2]) <= int(match[1])


def test_an_early_answer_over_tls_in_a_thread(start, upstream, port, tls):
    script = start.write(
        "threads.py",
        THREADS.format(create=f"'https://localhost:{port}', secure=False")
        + """
class Slow(io.BytesIO):
    def read(self, size=-1):
        time.sleep(0.02)
        return super().read(min(size, 1000) if size > 0 else size)
    read1 = read

thread(lambda: print("got", *call(environ(bytes(40000), **{"wsgi.input": Slow(bytes(40000))}))))
""",
    )
    process = start.python(script)
    wire = upstream.accept()
    wire.sock = tls.wrap_socket(wire.sock, server_side=True)
    wire.head()
    wire.send(answer("413 Too much", body=b"no"))
    assert process.wait_end() == 0, process.log()
    assert "got 413 b'no'" in process.log()


# --- 6, 7, 19: copies ----------------------------------------------------------------------------

LEAKS = {
    "no target": ("lambda request: None", "", 404),
    "an unknown server": ("'no-such-server'", "", 502),
    "a body by a handler": ("{port}", "upstream_request.body = b'other body'", 200),
    "a handler that raises": ("{port}", "1 / 0", 500),
}


@pytest.mark.parametrize("case", LEAKS)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_copy_of_a_request_that_is_not_carried_ends(lab, origins, port, case, framing):
    target, handler, status = LEAKS[case]
    second = free_port()
    origins(port), origins(second)
    where = lab.serve(f"{target.format(port=port)}, forward={second}, agent=False")
    if handler:
        lab.run(f"""
def change(upstream_request, request, options):
    {handler}
proxy.on("proxy_req", change)
""")
    before = settled(lab)
    for _ in range(5):
        if framing == "length":
            sent = request("/x", "Connection: close", method="POST", body=b"hello")
        else:
            sent = request("/x", "Connection: close", "Transfer-Encoding: chunked", method="POST")
            sent += b"5\r\nhello\r\n0\r\n\r\n"
        assert get(where, sent).status == status
    wait_for(lambda: sockets(lab) <= before, lambda: f"{before} sockets, now {sockets(lab)}", 15)


def test_a_copy_of_a_request_whose_body_nobody_wanted_ends(lab, origins, upstream, port):
    second = free_port()
    origins(second)
    where = lab.serve(f"{port}, forward={second}, agent=False")
    before = settled(lab)
    for _ in range(5):
        with connect(where) as client:
            client.send(request("/x", "Content-Length: 5", "Expect: 100-continue", method="POST"))
            wire = accept(upstream, client)
            wire.head()
            wire.send(answer("417 No", body=b""))
            assert read_response(client).status == 417
        cut_off(wire)
        wire.close()
    wait_for(lambda: sockets(lab) <= before, lambda: f"{before} sockets, now {sockets(lab)}", 15)


def test_a_buffer_is_sent_with_every_request_and_copied(lab, origins, port):
    second = free_port()
    main, copies = origins(port), origins(second)
    body = b"0123456789" * 4
    where = lab.serve(f"{port}, forward={second}, buffer=io.BytesIO({body!r}), agent=False")
    before = settled(lab)
    for _ in range(3):
        assert get(where, request(method="POST", body=b"hello")).text == b"ok"
    wait_for(lambda: len(copies.requests) == 3, lambda: f"three copies; there are {copies.requests}", 15)
    for origin in (main, copies):
        assert [(m.get("content-length"), m.text) for _, m in origin.requests] == [(["40"], body)] * 3
    wait_for(lambda: sockets(lab) <= before, lambda: f"{before} sockets, now {sockets(lab)}", 15)


@pytest.mark.parametrize("size", [40, 3 * MB])
def test_a_buffer_for_one_request_is_copied(lab, origins, port, size):
    second = free_port()
    main, copies = origins(port), origins(second)
    where = routed(
        lab,
        f"{port}, forward={second}",
        f"return proxy.web(environ, start_response, buffer=io.BytesIO(b'B' * {size}))",
    )
    for _ in range(2):
        assert get(where, request(method="POST", body=b"hello")).text == b"ok"
    if size == 40:  # a copy of much is given up when its target is the slower one
        wait_for(lambda: len(copies.requests) == 2, lambda: f"two copies; there are {copies.requests}", 15)
    for _, message in main.requests + copies.requests:
        assert (message.get("content-length"), message.text) == ([str(size)], b"B" * size)
    assert len(main.requests) == 2


class Drain(Origin):
    """A target that reads bodies without keeping them."""

    def _serve(self, number, wire):
        with contextlib.suppress(OSError, AssertionError):
            head = wire.head()
            left = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1]) - len(wire.data)
            room = bytearray(256 * 1024)
            while left > 0:
                left -= wire.sock.recv_into(room)
            wire.send(answer("200 OK", "Connection: close"))
        wire.close()


def test_copies_for_a_target_that_does_not_read_take_no_memory(lab, port):
    second, size = free_port(), 14 * MB
    where = lab.serve(f"{port}, forward={second}")
    (pid,) = lab.process.workers()

    def rss():
        return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) * 1024

    body = bytes(size)
    done = []

    def upload(client):
        client.send(request("/x", f"Content-Length: {size}", method="POST")).send(body)
        assert read_response(client).text == b"ok"
        done.append(client)

    with Drain(port), Upstream(second), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where)) for _ in range(10)]
        before = rss()
        with contextlib.ExitStack() as uploads:
            for client in clients:
                uploads.enter_context(background(upload, client))
        assert len(done) == 10
        assert rss() < before + 30 * MB, f"it grew by {(rss() - before) / MB:.0f} MB"


# --- 8, 15: targets that break off ---------------------------------------------------------------


@WAYS
@MODES
def test_a_target_that_resets_inside_a_long_body(lab, upstream, port, way, mode):
    where = lab.serve(f"{port}", mode, place(way))
    note_errors(lab)
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n")
        client.head()
        with background(wire.send, b"x" * 400_000):
            client.exactly(400_000)
        wait_read(wire)
        wire.reset()
        assert len(cut_off(client)) < 4_600_000
    one_line(lab, "(GET /x)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(GET /x\)")
    assert lab.wait_seen() == [("UpstreamClosed", f"http://localhost:{port}")]


HANDLES = """
def handle(upstream_response, request):
    if request.path == "/read":
        return Response(upstream_response.stream.read())
    return Response(iter(lambda: upstream_response.stream.read1(100), b""))
proxy.on("proxy_res", handle)
"""


@WAYS
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_streaming_answer_of_a_handler_whose_target_breaks_off(lab, upstream, port, way, end):
    where = lab.serve(f"{port}, self_handle_response=True", where=place(way))
    lab.run("\n" + HANDLES)
    with connect(where) as client:
        client.send(request("/stream"))
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
        assert b" 200 " in client.head()
        client.until(b"abc\r\n")
        getattr(wire, end)()
        assert cut_off(client) == b""
    one_line(lab, "(GET /stream)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(GET /stream\)")


@WAYS
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_handler_that_reads_what_its_target_breaks_off(lab, upstream, port, way, end):
    where = lab.serve(f"{port}, self_handle_response=True", where=place(way))
    lab.run("\n" + HANDLES)
    note_errors(lab)
    with connect(where) as client:
        client.send(request("/read"))
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
        wait_read(wire)
        getattr(wire, end)()
        assert read_response(client).status == 502
    one_line(lab, "(GET /read)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(GET /read\): 502")
    assert lab.wait_seen() == [("UpstreamClosed", f"http://localhost:{port}")]


# --- 9, 10, 18, 22: several targets --------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_target_that_is_back_takes_over_from_one_that_has_gone(lab, method):
    a, b = free_port(), free_port()
    sent = request(method=method, body=b"hello" if method == "POST" else b"")
    where = lab.serve(f"[{a}, {b}], fail_timeout=1000")
    with Origin(b, b"b"):
        assert labels(where, 4, sent) == [b"b"] * 4
    with Origin(a, b"a"):
        assert labels(where, 8, sent) == [b"a"] * 8
    with Origin(b, b"b"):
        assert labels(where, 8, sent) == [b"b"] * 8


@pytest.mark.parametrize(
    "cookie", ['prefs={"a": 1}; %s', '%s; prefs={"a": 1}', "a b; %s", 'x="; %s', "p=[1,2]; =; %s"]
)
def test_a_client_stays_with_its_target_whatever_other_cookies_it_has(lab, origins, cookie):
    a, b = free_port(), free_port()
    origins(a, b"a"), origins(b, b"b")
    where = lab.serve(f"[{a}, {b}], sticky='cookie'")
    first = get(where)
    (made,) = first.get("set-cookie")
    own = made.partition(";")[0]
    for _ in range(6):
        message = get(where, request("/x", f"Cookie: {cookie % own}"))
        assert message.text == first.text
        assert not message.get("set-cookie")


def test_several_targets_for_one_request_take_turns(lab, origins):
    a, b = free_port(), free_port()
    origins(a, b"a"), origins(b, b"b")
    where = routed(lab, a, f"return proxy.web(environ, start_response, target=[{a}, {b}])")
    came_back = labels(where, 8)
    assert sorted(came_back) == [b"a"] * 4 + [b"b"] * 4
    assert all(one != other for one, other in itertools.pairwise(came_back))


def test_a_dead_one_of_several_targets_for_one_request_is_skipped(lab, origins):
    dead, live = free_port(), free_port()
    origins(live, b"live")
    where = routed(
        lab,
        f"{live}, fail_timeout=1000",
        f"return proxy.web(environ, start_response, target=[{dead}, {live}])",
    )
    assert labels(where, 4) == [b"live"] * 4
    back = origins(dead, b"back")
    assert labels(where, 6) == [b"live"] * 6
    assert back.peers == []


class Busy(Origin):
    """A target that keeps ``/hold`` waiting."""

    def __init__(self, *arguments):
        self.go_on = threading.Event()
        super().__init__(*arguments)

    def reply(self, message):
        if message.path == "/hold":
            self.go_on.wait(60)
        return super().reply(message)

    def __exit__(self, *_):
        self.go_on.set()
        super().__exit__()


@pytest.mark.parametrize("balance", ["round_robin", "least_connections"])
def test_a_target_whose_connections_are_in_use_is_passed_over(lab, balance):
    a, b = free_port(), free_port()
    agent = "http_proxy.Agent(max_connections=1, connect_timeout=1000)"
    where = lab.serve(f"[{a}, {b}], balance={balance!r}, agent={agent}")
    with Busy(a, b"a") as one, Busy(b, b"b") as other, connect(where) as client:
        client.send(request("/hold"))
        wait_for(lambda: one.requests or other.requests, "the one that is kept waiting")
        busy, free = (one, other) if one.requests else (other, one)
        for _ in range(6):
            with connect(where) as quick:
                quick.sock.settimeout(10)
                quick.send(request())
                assert read_response(quick).text == free.label
        busy.go_on.set()
        assert read_response(client).text == busy.label
    calm(lab)


# --- 11: redirects -------------------------------------------------------------------------------


class Redirecting(Origin):
    """``/here`` leads to the target itself, ``/there`` to ``away``."""

    away = ""

    def reply(self, message):
        if message.path in ("/here", "/there"):
            return answer(
                "302 Found", f"Location: {'/end' if message.path == '/here' else self.away}", body=b""
            )
        return super().reply(message)


FIELDS = ["X-Secret: client", "Cookie: passenger_target=zz; s=1"]
GIVEN = "follow_redirects=True, headers={'X-Api-Key': 'k3y'}, auth='u:p', sticky='cookie'"
SIGN = """
def sign(upstream_request, request, options):
    seen.append(upstream_request.path)
    upstream_request.headers.remove("X-Secret")
    upstream_request.headers["X-Signed"] = "yes"
proxy.on("proxy_req", sign)
"""


@pytest.mark.parametrize("path", ["/here", "/there"])
def test_handlers_change_each_request_of_a_redirect(lab, origins, port, path):
    second = free_port()
    with Redirecting(port) as main:
        main.away = f"http://127.0.0.1:{second}/end"
        away = origins(second, b"away")
        where = lab.serve(f"[{port}], {GIVEN}")
        lab.run("\n" + SIGN)
        assert get(where, request(path, *FIELDS)).text == (b"ok" if path == "/here" else b"away")
    sent = [message for _, message in main.requests + away.requests]
    assert [message.path for message in sent] == [path, "/end"]
    assert lab.seen() == [path, "/end"]
    for message in sent:
        assert not message.get("x-secret"), message
        assert message.get("x-signed") == ["yes"], message
        assert "passenger_target" not in str(message.get("cookie")), message


def test_what_the_options_add_stays_with_its_origin(lab, origins, port):
    second = free_port()
    with Redirecting(port) as main:
        main.away = f"http://127.0.0.1:{second}/end"
        away = origins(second, b"away")
        where = lab.serve(f"[{port}], {GIVEN}")
        assert get(where, request("/there", *FIELDS)).text == b"away"
        assert get(where, request("/here", *FIELDS)).text == b"ok"
    for _, message in main.requests:
        assert message.get("x-api-key") == ["k3y"], message
        assert len(message.get("authorization")) == 1, message
        assert message.get("cookie") == ["s=1"], message
    ((_, message),) = away.requests
    assert not message.get("x-api-key"), message
    assert not message.get("authorization"), message
    assert not message.get("cookie"), message


# --- 12: half-closed tunnels ---------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("protocol", ["websocket", "x"])
@pytest.mark.parametrize("secure", [False, True])
def test_what_a_target_says_after_a_half_close_arrives(lab, upstream, port, tls, way, protocol, secure):
    scheme = "https" if secure else "http"
    where = lab.serve(f"'{scheme}://localhost:{port}', secure=False", where=place(way))
    last = b"last words" * 20_000
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", f"Upgrade: {protocol}"))
        wire = accept(upstream, client)
        if secure:
            wire.sock = tls.wrap_socket(wire.sock, server_side=True)
        wire.head()
        wire.send(f"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode())
        client.head()
        client.send(b"bye").finish()
        assert wire.exactly(3) == b"bye"
        assert not came(wire, 1.0)  # the end, or nothing
        with background(wire.send, last):
            assert client.exactly(len(last)) == last
        wire.sock.close()
        assert client.rest() == b""


# --- 13, 14: clients that go ---------------------------------------------------------------------


@pytest.mark.parametrize("leaves", ["closes", "resets"])
def test_a_client_goes_whose_upload_is_blocked(lab, upstream, port, leaves):
    where = lab.serve(f"{port}", where=free_port())
    before = settled(lab)
    client = connect(where).send(request("/x", "Content-Length: 1000000000000", method="POST"))
    wire = accept(upstream, client)
    fill(client.sock, bytes(MB), 4 * buffers() + 16 * MB)
    if leaves == "resets":
        client.reset()
        # nobody has read a byte: the worker lets go all the same
        wait_for(lambda: sockets(lab) <= before, lambda: f"{before} sockets, now {sockets(lab)}", 15)
    else:
        client.sock.close()
    cut_off(wire)
    wait_for(lambda: sockets(lab) <= before, lambda: f"{before} sockets, now {sockets(lab)}", 15)


def test_a_unix_client_that_half_closes_and_then_goes(lab, upstream, port):
    where = lab.serve(f"{port}")
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        client.finish()
        assert silent(wire), "a half-close is no end"
    wire.sock.settimeout(15)
    assert wire.ended()


def test_a_unix_client_that_half_closes_gets_its_answer(lab, upstream, port):
    where = lab.serve(f"{port}")
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        client.finish()
        assert silent(wire)
        wire.send(OK)
        assert read_response(client).text == b"ok"


@WAYS
@pytest.mark.parametrize("first", ["nothing", "half-closes"])
@pytest.mark.leave_out(lambda way, first: way == "tcp" and first == "half-closes")
def test_a_client_that_has_pipelined_and_goes(lab, upstream, port, way, first):
    where = lab.serve(f"{port}", where=place(way))
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        client.send(request("/second"))
        if first == "half-closes":
            client.finish()
        assert silent(wire)
    wire.sock.settimeout(15)
    assert wire.ended()


# --- 16: a short proxy_timeout -------------------------------------------------------------------


def test_a_short_proxy_timeout_and_a_client_that_pauses(lab, upstream, port):
    where = lab.serve(f"{port}, proxy_timeout=0.003")
    with connect(where) as client:
        client.send(request("/x", "Transfer-Encoding: chunked", method="POST"))
        wire = accept(upstream, client)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nfirst")
        client.send(b"3\r\nabc\r\n")
        begin = time.monotonic()
        client.sock.settimeout(0.5)
        while time.monotonic() < begin + 4:
            try:
                if not client.sock.recv(65536):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        with contextlib.suppress(OSError):
            client.send(b"0\r\n\r\n")
            wire.send(bytes(4995))
        fetch(lab.process.socket)
    calm(lab)


# --- 17: methods that a handler changes ----------------------------------------------------------


class Long(Origin):
    """A target that tells a length of 50, and sends that many bytes but to HEAD."""

    def reply(self, message):
        whole = answer(body=b"B" * 50)
        return whole[:-50] if message.start.startswith("HEAD ") else whole


@WAYS
@MODES
@pytest.mark.parametrize(("method", "becomes"), [("GET", "HEAD"), ("HEAD", "GET")])
def test_a_handler_that_changes_the_method(lab, port, way, mode, method, becomes):
    where = lab.serve(f"{port}", mode, place(way))
    lab.run(f"""
def change(upstream_request, request, options):
    if request.path == "/changed":
        upstream_request.method = {becomes!r}
proxy.on("proxy_req", change)
""")
    with Long(port) as target, connect(where) as client:
        for _ in range(2):
            client.send(request("/changed", method=method))
            changed = read_response(client, method)
            assert (changed.status, changed.body) == (200, b"")
            if method == "GET":
                assert changed.get("content-length") == ["0"]
            client.send(request("/next"))
            assert read_response(client).text == b"B" * 50
    assert [message.start.split(" ")[0] for _, message in target.requests] == [becomes, "GET"] * 2
    calm(lab)


# --- 20: a kept connection that takes nothing any more -------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_streaming_body_whose_connection_takes_nothing(lab, method, framing):
    """The target reads no more: no look at the connection tells, but the first send does."""
    path = lab.place()
    where = lab.serve(f"'unix:{path}'")
    with Upstream(path) as upstream, connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(OK)
        assert read_response(client).text == b"ok"
        wire.sock.shutdown(socket.SHUT_RD)
        if framing == "length":
            client.send(request("/x", "Content-Length: 8", method=method) + b"half")
        else:
            client.send(request("/x", "Transfer-Encoding: chunked", method=method) + b"4\r\nhalf\r\n")
        again = accept(upstream, client)
        client.send(b"more" if framing == "length" else b"4\r\nmore\r\n0\r\n\r\n")
        got = read_request(again)
        assert got.text == b"halfmore"
        again.send(OK)
        assert read_response(client).text == b"ok"
    assert not lines(lab, f"({method} /x)")


# --- 23, 24 --------------------------------------------------------------------------------------


@MODES
def test_trailers_that_tell_what_a_proxy_has_to_tell_are_not_handed_on(lab, upstream, port, mode):
    names = [
        "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "Via", "Proxy-X", "Proxy",
        "X_Forwarded_For", "Under_Score", "X-Real", "X-Checksum",
    ]  # fmt: skip
    sent = (
        request("/x", "Transfer-Encoding: chunked", "Trailer: X-Checksum", method="POST")
        + b"3\r\nabc\r\n0\r\n"
    )
    sent += "".join(f"{name}: 6.6.6.6\r\n" for name in names).encode() + b"\r\n"
    got, came_back = ask(lab.serve(f"{port}", mode), upstream, sent)
    assert came_back.status == 200
    trailers = [line.partition(b":")[0].lower() for line in io.BytesIO(got.body.partition(b"\r\n0\r\n")[2])]
    assert set(trailers) - {b"\r\n"} == {b"x-real", b"x-checksum"}


@MODES
@pytest.mark.parametrize("asked", ["/asked?q", "http://example.org/asked?q"])
def test_the_path_of_the_target_alone_for_a_proxy(lab, upstream, port, mode, asked):
    where = lab.serve(f"'http://127.0.0.1:{port}/base?x=1', to_proxy=True, ignore_path=True", mode)
    got, _ = ask(where, upstream, request(asked))
    url = urlsplit(got.path)
    assert (url.path, url.query) == ("/base", "x=1"), got
