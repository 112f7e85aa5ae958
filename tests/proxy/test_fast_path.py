"""Requests with a remembered plan: the same responses, errors and bounds as with a fresh one."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time

import pytest
import trustme
from conditions import stopped, wait_for
from proxy_laboratory import OK, Origin, answer, laboratory, read_request, read_response, request
from upstream_sockets import Upstream, Wire, connect

DATE = "Date: Mon, 23 Nov 2026 10:00:00 GMT"
PLAIN = answer("200 OK", DATE)

#: After so many requests, the next is executed with a remembered plan.
WARM = 1

#: Counts the requests that are executed with a remembered plan, and lets a test switch remembering off. A client
#: that a busy machine keeps waiting must not count as idle: its plan would be forgotten.
COUNT = """
import gunicorn_passenger.http.listener_context as listener_context
listener_context._TICK = 3600
import gunicorn_passenger.proxy.plan as planning
real, planning.taken, planning.remember = planning.remembered_plan, 0, True
def remembered_plan(*arguments):
    plan = real(*arguments) if planning.remember else None
    planning.taken += plan is not None
    return plan
planning.remembered_plan = remembered_plan
"""
PLANNING = "__import__('gunicorn_passenger.proxy.plan', fromlist=['taken'])"
TAKEN = f"{PLANNING}.taken"
REMEMBER = f"setattr({PLANNING}, 'remember', %s)"
#: of a scene's proxy: its kept connections to targets, and how many are in use
IDLE = "[1 for pool in proxy.options.agent._pools.values() for _ in pool._idle]"
USED = "sum(pool.used for pool in proxy.options.agent._pools.values())"


@pytest.fixture(scope="module")
def gunicorn():
    with laboratory(
        "--keep-alive", 30, "--access-logfile", "-", "--access-logformat", "%(r)s|%(s)s|%(B)s|"
    ) as lab:
        lab.scene().run(COUNT)
        yield lab


@pytest.fixture
def proxy(lab, port):
    return lab.serve(f"'http://127.0.0.1:{port}'")


def turn(client: Wire, target: Wire, sent: bytes, reply: bytes = PLAIN) -> tuple[bytes, bytes]:
    """One request over both: what the target got, and what the client got of its answer."""
    client.send(sent)
    got = read_request(target).head
    target.send(reply)
    return got, b"".join(client.response())


def warm(where, upstream: Upstream, sent: bytes, target: Wire | None = None) -> tuple[Wire, Wire]:
    """A client and its connection to the target, for which everything is settled.

    :param target: a connection that the proxy has kept.
    """
    client = connect(where)
    client.send(sent)
    target = target or upstream.accept()
    read_request(target)
    target.send(PLAIN)
    client.response()
    for _ in range(WARM - 1):
        turn(client, target, sent)
    return client, target


def test_from_the_second_on(lab, proxy, upstream):
    with connect(proxy) as client:
        client.send(request("/first"))
        target = upstream.accept()
        got = [read_request(target).head]
        target.send(PLAIN)
        came = [b"".join(client.response())]
        before = lab.run(TAKEN)
        for number in range(2, 9):
            head, message = turn(client, target, request("/first"))
            got.append(head)
            came.append(message)
            assert lab.run(TAKEN) - before == max(0, number - WARM), number
        assert len(set(got)) == len(set(came)) == 1
        before = lab.run(TAKEN)
        for path in ("/other?x=1&y=%20", '/"', "/a//b/../c", "/%2e%2e/%00", "/" + "x" * 3000):
            head, message = turn(client, target, request(path))
            assert head == got[0].replace(b"/first", path.encode())
            assert message == came[0]
        assert lab.run(TAKEN) - before == 5


def worker_of(lab):
    return int(lab.run("__import__('os').getpid()"))


def pieces(*parts: bytes, close: bool = False, reset: bool = False):
    return parts, close, reset


ANSWERS = {
    "plain": pieces(PLAIN),
    "no Date": pieces(OK),
    "empty": pieces(answer("200 OK", DATE, body=b"")),
    "an error": pieces(answer("503 Service Unavailable", DATE, "Retry-After: 3")),
    "not found": pieces(answer("404 Not Found", DATE)),
    "no reason": pieces(answer("200", DATE)),
    "reset content": pieces(answer("205 Reset Content", DATE, body=b"")),
    "no content": pieces(b"HTTP/1.1 204 No Content\r\n" + DATE.encode() + b"\r\n\r\n"),
    "not modified": pieces(b"HTTP/1.1 304 Not Modified\r\nEtag: x\r\nContent-Length: 5\r\n\r\n"),
    "in the middle of the head": pieces(PLAIN[:20], PLAIN[20:]),
    "at the end of the head": pieces(PLAIN[:-2], PLAIN[-2:]),
    "in the middle of the body": pieces(PLAIN[:-1], PLAIN[-1:]),
    "byte by byte": pieces(*(PLAIN[at : at + 1] for at in range(len(PLAIN)))),
    "chunked": pieces(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    "trailers": pieces(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n"
    ),
    "up to the end": pieces(b"HTTP/1.1 200 OK\r\n\r\nok", close=True),
    "HTTP/1.0": pieces(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", close=True),
    "Connection: close": pieces(answer("200 OK", DATE, "Connection: close"), close=True),
    "nominated": pieces(answer("200 OK", DATE, "Connection: x-a, keep-alive", "X-A: 1", "Keep-Alive: 5")),
    "two cookies": pieces(answer("200 OK", DATE, "Set-Cookie: a=1", "Set-Cookie: b=2", "sEt-CooKie: c=3")),
    "hints first": pieces(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + PLAIN),
    "continue first": pieces(b"HTTP/1.1 100 Continue\r\n\r\n", PLAIN),
    "long": pieces(answer("200 OK", DATE, body=b"x" * 300_000)),
    "long for a held answer": pieces(answer("200 OK", DATE, body=b"x" * 40_000)),
    "two lengths": pieces(answer("200 OK", DATE, "Content-Length: 3")),
    "one length twice": pieces(answer("200 OK", DATE, "Content-Length: 2")),
    "both framings": pieces(answer("200 OK", DATE, "Transfer-Encoding: chunked")),
    "switching without an Upgrade header": pieces(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    "garbage": pieces(b"SSH-2.0-x\r\n\r\n"),
    "a bad line": pieces(answer("200 OK", DATE, "X Y: 1")),
    "a bare LF": pieces(PLAIN.replace(b"\r\n", b"\n", 1)),
    "an endless head": pieces(b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 9000),
    "cut off in the head": pieces(PLAIN[:30], close=True),
    "cut off in the body": pieces(PLAIN[:-1], close=True),
    "reset in the body": pieces(PLAIN[:-1], reset=True),
}


def settled(lab) -> str:
    """The errors in the log, without what differs from request to request."""
    lines = [line for line in lab.log().splitlines() if "proxy: " in line]
    return re.sub(r"after \d+\.\d{3} s|^\[.*?\] \[\d+\] |:\d+", "", "\n".join(lines), flags=re.MULTILINE)


SAME = ("another client's connection", "a fresh plan", "a remembered plan")
NEW = ("a fresh plan", "a remembered plan")


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    ("ways", "extra"),
    [(SAME, ()), (NEW, ("X-New: 1", "cookie: a=b"))],
    ids=["the same headers", "new headers"],
)
def test_the_answer_is_the_same_as_for_a_first_request(gunicorn, port, upstream, name, ways, extra):
    parts, close, reset = ANSWERS[name]
    came, got, logged = [], [], []
    for how in ways:
        lab = gunicorn.scene()
        where = lab.serve(f"'http://127.0.0.1:{port}'")
        if how != "another client's connection":
            client, target = warm(where, upstream, request())
        else:
            # a connection that has carried a request, for another client
            with connect(where) as other:
                other.send(request("/other", "X-Other: 1"))
                target = upstream.accept()
                read_request(target)
                target.send(PLAIN)
                other.response()
            client = connect(where)
        lab.run(REMEMBER % (how == "a remembered plan"))
        before = lab.run(TAKEN)
        client.send(request("/", *extra))
        got.append(read_request(target).head)
        for part in parts:
            target.send(part)
            if len(parts) > 1:
                time.sleep(0.001)  # lets the proxy see it in parts; the outcome is the same in one
        if reset:
            client.more()
            target.reset()
        elif close:
            target.close()
        came.append(read_all(client))
        logged.append(settled(lab))
        assert lab.run(TAKEN) - before == (how == "a remembered plan")
        lab.run(REMEMBER % True)
        client.close()
        target.close()
    assert len(set(got)) == len(set(came)) == len(set(logged)) == 1
    assert all(line.lower().encode() in got[0] for line in extra)


def test_ordinary_headers_that_are_new_each_time(lab, proxy, upstream):
    """Also on another connection, and for another host."""
    client, target = warm(proxy, upstream, request())
    other = connect(proxy)
    before = lab.run(TAKEN)
    for number in range(6):
        host = f"site-{number % 2}.example:8000"
        sent = (
            f"GET /{number} HTTP/1.1\r\nHost: {host}\r\nCookie: id={number}\r\nConnection: keep-alive\r\n\r\n"
        )
        got, came = turn(other if number % 3 else client, target, sent.encode())
        assert got == f"GET /{number} HTTP/1.1\r\nhost: {host}\r\ncookie: id={number}\r\n\r\n".encode()
        assert came.endswith(b"\r\n\r\nok")
    assert lab.run(TAKEN) == before + 6
    # and from then on each connection has a plan for its headers
    turn(other, target, sent.encode())
    assert lab.run(TAKEN) == before + 7
    client.close()
    other.close()


@pytest.mark.parametrize(
    "sent",
    [
        request("/", "X-New: 1", method="DELETE"),
        request("/", "X-New: 1", "Content-Length: 0"),
        request("/", "X-New: 1", "Connection: x-new"),
        request("/", "X-New: 1", "TE: trailers", "Connection: te"),
        request("/", "X-New:  1"),
        request("/", "X_New: 1"),
        request("/", "X-New: 1").replace(b"HTTP/1.1", b"HTTP/1.0"),
        request("http://other.example/", "X-New: 1"),
    ],
    ids=[
        "a method",
        "a length",
        "a nominated header",
        "trailers",
        "spaces",
        "an underscore",
        "HTTP/1.0",
        "absolute",
    ],
)
def test_new_headers_that_are_not_ordinary_are_planned_for(lab, proxy, upstream, sent):
    client, target = warm(proxy, upstream, request())
    before = lab.run(TAKEN)
    client.send(sent)
    read_request(target)
    target.send(PLAIN)
    assert client.response()[1] == b"ok"
    assert lab.run(TAKEN) == before
    client.close()


def read_all(client: Wire) -> tuple[bytes, bytes]:
    """The answer as the client can tell: its bytes without the proxy's own Date, and how it ended."""
    head = b""
    try:
        while True:
            head += client.head()
            if b" 103 " not in head.rpartition(b"HTTP/1.1")[2][:8]:
                break
        client.data = head + client.data
        message = b"".join(client.response())
        if b" 103 " in message[:16]:
            message += b"".join(client.response())
        end = b"whole"
    except (AssertionError, ConnectionError):
        message, client.data = head + client.data, b""
        end = b"truncated"
    return re.sub(rb"(?i)date: [^\r]*", b"date", message), end


def test_a_connection_that_was_closed_meanwhile_is_not_noticed_by_the_client(lab, proxy, upstream):
    client, target = warm(proxy, upstream, request())
    with stopped(worker_of(lab)):
        target.close()
        client.send(request())
    second = upstream.accept()
    read_request(second)
    second.send(PLAIN)
    assert client.response()[1] == b"ok"
    # and now it is closed with the request read, which may be sent once more
    turn(client, second, request())
    client.send(request())
    read_request(second)
    second.close()
    third = upstream.accept()
    read_request(third)
    third.send(PLAIN)
    assert client.response()[1] == b"ok"
    client.close()


def test_unrequested_bytes_are_not_a_response(lab, proxy, upstream):
    """It comes in the same turn of the loop as the request for which it could be taken."""
    client, target = warm(proxy, upstream, request())
    for number in range(4):
        before = lab.run(TAKEN)
        turn(client, target, request())
        assert lab.run(TAKEN) == before + 1
        with stopped(worker_of(lab)):
            # at once, although what was sent before is not acknowledged yet
            target.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # either may be first among the events of that turn
            if number % 2:
                client.send(request())
            target.send(answer("200 OK", DATE, body=b"not asked for"))
            if not number % 2:
                client.send(request())
        target = upstream.accept()
        read_request(target)
        target.send(PLAIN)
        assert client.response()[1] == b"ok"
    client.close()


@pytest.mark.parametrize("asked_first", [False, True])
def test_surplus_bytes_are_not_the_response_to_the_next_request_of_the_same_turn(
    lab, proxy, upstream, asked_first
):
    """The answer ends just where the proxy stops reading, and more is there behind it."""
    client, target = warm(proxy, upstream, request())
    # a second client, with a connection to the target of its own, which is then closed
    client.send(request())
    read_request(target)
    other, spare = warm(proxy, upstream, request("/x", "X-Other: 1"))
    target.send(PLAIN)
    client.response()
    spare.close()
    wait_for(lambda: len(lab.run(IDLE)) == 1, "one kept connection")
    client.send(request())
    read_request(target)
    head = answer("200 OK", DATE, body=b"x" * 10_000)
    reply = answer("200 OK", DATE, body=b"x" * (16_384 - len(head) + 10_000))
    assert len(reply) == 16_384
    before = lab.run(TAKEN)
    with stopped(worker_of(lab)):
        if asked_first:
            other.send(request("/x", "X-Other: 1"))
        target.send(reply + answer("200 OK", DATE, body=b"not asked for"))
        if not asked_first:
            other.send(request("/x", "X-Other: 1"))
    second = upstream.accept()
    read_request(second)
    second.send(PLAIN)
    assert other.response()[1] == b"ok"
    assert client.response()[1].strip(b"x") == b""
    assert lab.run(TAKEN) > before
    other.close()
    client.close()


def test_more_than_its_length_retires_the_connection(lab, proxy, upstream):
    client, target = warm(proxy, upstream, request())
    client.send(request())
    read_request(target)
    target.send(PLAIN + b"more")
    assert client.response()[1] == b"ok"
    assert target.ended()
    client.send(request())
    second = upstream.accept()
    read_request(second)
    second.send(PLAIN)
    assert client.response()[1] == b"ok"
    client.close()


@pytest.mark.parametrize("last", ["HTTP/1.1 200 OK\r\nConnection: close", "HTTP/1.0 200 OK"])
def test_a_connection_that_the_target_will_close_is_not_used_again(proxy, upstream, last):
    client, target = warm(proxy, upstream, request())
    _, came = turn(client, target, request(), f"{last}\r\n{DATE}\r\nContent-Length: 2\r\n\r\nok".encode())
    assert came.endswith(b"\r\nConnection: keep-alive\r\n\r\nok")
    client.send(request())
    second = upstream.accept()
    read_request(second)
    second.send(PLAIN)
    assert client.response()[1] == b"ok"
    client.close()


def test_a_target_with_tls(lab, port):
    """Its connections cannot be sent on at the end of the turn: it is asked the ordinary way, each time."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost", "127.0.0.1").configure_cert(context)
    with Origin(port, tls=context) as origin:
        where = lab.serve(f"'https://127.0.0.1:{port}', secure=False")
        with connect(where) as client:
            for _ in range(WARM + 4):
                client.send(request())
                assert client.response()[1] == b"ok"
        assert len(origin.requests) == WARM + 4
        assert len(origin.wires) == 1


def test_a_request_of_http_1_0_with_the_same_fields(lab, proxy, upstream):
    client, target = warm(proxy, upstream, request())
    _, came = turn(client, target, request().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert came.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in came
    client.close()


def test_a_client_that_has_gone_when_its_answer_says_close(lab, port, upstream):
    """The answer cannot be sent; the connection to the target is kept, once."""
    where = lab.serve(f"'http://127.0.0.1:{port}'")
    client, target = warm(where, upstream, request())
    before = lab.run(TAKEN)
    client.send(request())
    read_request(target)
    lab.run("proxy.close()")
    with stopped(worker_of(lab)):
        target.send(PLAIN)
        client.close()
    wait_for(lambda: lab.run(TAKEN) == before + 1, "the end of the request")
    wait_for(lambda: lab.run(USED) == 0, lambda: f"connections in use: {lab.run(USED)}")
    assert len(lab.run(IDLE)) <= 1


def test_a_client_that_goes_takes_its_request_with_it(lab, proxy, upstream):
    client, target = warm(proxy, upstream, request())
    before = lab.run(TAKEN)
    client.send(request())
    read_request(target)
    client.close()
    assert target.ended()
    assert lab.run(TAKEN) == before + 1


def test_a_target_that_does_not_answer(lab, port, upstream):
    where = lab.serve(f"'http://127.0.0.1:{port}', proxy_timeout=0.5")
    client, target = warm(where, upstream, request())
    client.send(request())
    read_request(target)
    assert read_response(client).status == 504
    assert re.search(r"has not responded for 0\.5 s, after (0\.(499|[5-9])|[1-9])", lab.wait_log("504"))
    assert target.ended()
    client.close()


def test_what_changes_meanwhile_counts(lab, proxy, upstream):
    """A handler, other fields, another method: each is seen at once."""
    client, target = warm(proxy, upstream, request("/x", "Cookie: a=1"))
    got, _ = turn(client, target, request("/x", "Cookie: a=2"))
    assert b"\r\ncookie: a=2\r\n" in got
    got, _ = turn(client, target, request("/x", "Cookie: a=1"))
    assert b"\r\ncookie: a=1\r\n" in got
    for _ in range(WARM):
        turn(client, target, request("/x", "Cookie: a=1"))
    got, _ = turn(client, target, request("/x", "Cookie: a=1", method="DELETE"))
    assert got.startswith(b"DELETE /x HTTP/1.1\r\n")
    client.send(request("/x", "Cookie: a=1", method="HEAD"))
    assert read_request(target).head.startswith(b"HEAD /x ")
    target.send(PLAIN.removesuffix(b"ok"))
    assert client.response("HEAD")[1] == b""
    got, _ = turn(client, target, request("http://other.example/y", "Cookie: a=1"))
    assert got.startswith(b"GET /y HTTP/1.1\r\n")
    # the server decides which of the two is HTTP_HOST
    assert b"host: other.example\r\n" in got or b"host: example.org\r\n" in got
    client.send(request("/x", "Cookie: a=1", method="CONNECT"))
    assert read_response(client).status in (400, 501)
    client.close()

    client, target = warm(proxy, upstream, request(), target)
    before = lab.run(TAKEN)
    turn(client, target, request())
    assert lab.run(TAKEN) == before + 1
    lab.run("handler = lambda asked, request, options: asked.headers.set('X-Late', 'yes')")
    lab.run("proxy.on('proxy_req', handler)")
    got, _ = turn(client, target, request())
    assert b"x-late: yes" in got.lower()
    client.close()


def test_pipelined_requests_are_answered_in_order(lab, proxy, upstream):
    client, target = warm(proxy, upstream, request())
    before = lab.run(TAKEN)
    client.send(b"".join(request(f"/{number}") for number in range(40)))
    for number in range(40):
        assert read_request(target).path == f"/{number}"
        target.send(answer("200 OK", DATE, body=b"%d" % number))
    assert [client.response()[1] for _ in range(40)] == [b"%d" % number for number in range(40)]
    assert lab.run(TAKEN) == before + 40
    client.close()


def test_many_clients_at_once(lab, proxy, upstream):
    """Each gets its own answer, whatever else is sent in the same turn."""
    pairs = [warm(proxy, upstream, request("/w", f"X-Client: {number}")) for number in range(1)]
    clients = [pairs[0][0], *(connect(proxy) for _ in range(15))]
    done = threading.Event()

    def serve(wire: Wire) -> None:
        try:
            while True:
                message = read_request(wire)
                wire.send(answer("200 OK", DATE, body=message.path.encode()))
        except (AssertionError, OSError):
            pass

    def accept() -> None:
        while not done.is_set():
            try:
                wire = upstream.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=[wire], daemon=True).start()

    threads = [
        threading.Thread(target=serve, args=[pairs[0][1]], daemon=True),
        threading.Thread(target=accept, daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        before = lab.run(TAKEN)
        for lap in range(30):
            for number, client in enumerate(clients):
                client.send(request(f"/{number}/{lap}", f"X-Client: {number}"))
            for number, client in enumerate(clients):
                assert client.response()[1] == b"/%d/%d" % (number, lap)
        assert lab.run(TAKEN) - before > 200
    finally:
        done.set()
        for client in clients:
            client.close()
        upstream.listener.shutdown(2)


def test_the_access_log_has_them(lab, proxy, upstream):
    client, target = warm(proxy, upstream, request())
    before = lab.run(TAKEN)
    turn(client, target, request("/logged"), answer("418 I'm a teapot", DATE, body=b"short"))
    assert lab.run(TAKEN) == before + 1
    lab.wait_log("GET /logged HTTP/1.1|418|5|")
    client.close()


def test_a_server_that_is_closed_says_so_with_the_answer(lab, port, upstream):
    where = lab.serve(f"'http://127.0.0.1:{port}'")
    client, target = warm(where, upstream, request())
    before = lab.run(TAKEN)
    client.send(request())
    read_request(target)
    lab.run("proxy.close()")
    target.send(PLAIN)
    message = read_response(client)
    assert message.get("connection") == ["close"]
    assert message.body == b"ok"
    assert client.ended()
    assert lab.run(TAKEN) == before + 1
