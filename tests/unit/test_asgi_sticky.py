"""Sticky ASGI servers: two acceptors on the loop of the test, which pass each other connections."""

import asyncio
import logging
import os
import socket
from contextlib import asynccontextmanager
from types import SimpleNamespace
from zlib import crc32

import pytest
import uvicorn

from gunicorn_passenger.http.chunked import CHUNKED
from gunicorn_passenger.http.client_socket import adopt
from gunicorn_passenger.serving import asgi_sticky
from gunicorn_passenger.serving.asgi_acceptor import AsgiAcceptor
from gunicorn_passenger.serving.asgi_sticky import UnclearRequest, body_length

CFG = SimpleNamespace(
    worker_connections=3, keepalive=2, workers=1, accesslog=None, forwarded_allow_ips="127.0.0.1"
)


@pytest.fixture(autouse=True, params=["h11_impl:H11Protocol", "httptools_impl:HttpToolsProtocol"])
def parser(monkeypatch, request):
    """uvicorn has one or the other, and they differ in what they accept."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", f"uvicorn.protocols.http.{request.param}")


class Worker:
    """An acceptor, and how it finds the other one: by the ``sid`` of a request, the name of its worker."""

    def __init__(self, name):
        self.name = name
        self.others = {}
        self.passed = self.refused = 0
        #: what a test has happen before the sibling decides
        self.before_giving = asyncio.Event()
        self.before_giving.set()
        self.tasks = []
        loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        log = logging.getLogger("test")
        self.acceptor = AsgiAcceptor(listener, self.app, {}, loop, CFG, log, self, closes_websockets=True)
        self.acceptor.use_sticky(self)
        self.acceptor.start()

    async def app(self, scope, receive, send):
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            text = (await receive())["text"]
            await send({"type": "websocket.send", "text": f"{self.name} {text}"})
            return
        body, more = b"", True
        while more and scope["path"] != "/early":
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        text = f"{self.name} {scope['method']} {scope['path']} {len(body)} {crc32(body)}\n".encode()
        headers = [(b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    # --- the scheduler and the stickiness of the acceptor ---

    def spawn(self, function, *arguments):
        async def call():
            await self.before_giving.wait()
            function(*arguments)

        self.tasks.append(asyncio.get_running_loop().create_task(call()))

    def owner(self, head):
        line = head.partition(b"\r\n")[0]
        found = line.partition(b"sid=")[2][:1].decode()
        return "" if found == self.name else found

    def give_to(self, tag):
        return self.others[tag].take if tag in self.others else None

    def take(self, fd, data):
        if not self.acceptor.make_room():
            self.refused += 1
            return False
        sock, addr = adopt(os.dup(fd))
        self.acceptor.attach(sock, addr, begun=True, data=data)
        self.passed += 1
        return True


@asynccontextmanager
async def two_workers():
    workers = [Worker("a"), Worker("b")]
    for one, other in (workers, workers[::-1]):
        one.others[other.name] = other
    try:
        yield workers
    finally:
        for worker in workers:
            worker.acceptor.abort()
        await until(lambda: all(worker.acceptor.idle() for worker in workers))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def run(test):
    async def limited():
        async with two_workers() as (a, b):
            await test(a, b)

    asyncio.run(asyncio.wait_for(limited(), 60))


def request(method, path, body=b"", headers=""):
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}{headers}\r\n".encode() + body


async def exchange(worker, data, count, size=0, closes=False):
    """What a client gets that sends all of ``data``, ``size`` bytes at a time, and reads ``count`` responses.

    :param closes: whether the worker is to close the connection then.
    :returns: the bodies of the responses.
    """
    reader, writer = await asyncio.open_connection(*worker.acceptor.sockname)
    got = []
    try:
        for at in range(0, len(data), size or len(data)):
            writer.write(data[at : at + (size or len(data))])
            await writer.drain()
            await asyncio.sleep(0)
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            got.append((await reader.readexactly(length)).decode().strip())
        if closes:
            assert await reader.read() == b""
        return got
    finally:
        writer.close()


BODY = bytes(range(256)) * 40
#: a body that looks like a request
INNER = b"GET /?sid=b1 HTTP/1.1\r\n\r\n"
#: requests for both workers, and what each is to get
MIXED = [
    (request("GET", "/1?sid=a1"), "a GET /1 0 0"),
    (request("GET", "/2?sid=b1"), "b GET /2 0 0"),
    (request("POST", "/3?EIO=4&sid=b1", BODY), f"b POST /3 {len(BODY)} {crc32(BODY)}"),
    (request("POST", "/4?sid=a1", INNER), f"a POST /4 {len(INNER)} {crc32(INNER)}"),
    (request("GET", "/5?x=1", headers="Cookie: sid=b1\r\n"), "a GET /5 0 0"),
    (request("POST", "/6?sid=b1", b"x" * 7), f"b POST /6 7 {crc32(b'x' * 7)}"),
    (request("GET", "/7?sid=b1"), "b GET /7 0 0"),
]


@pytest.mark.parametrize("size", [1, 3, 50, 1000, 0])
def test_each_request_of_a_connection_reaches_its_worker_wherever_the_bytes_are_cut(size):
    async def test(a, b):
        data = b"".join(one for one, _ in MIXED)
        got = await exchange(a, data, len(MIXED), size)
        assert got == [wanted for _, wanted in MIXED]
        assert (a.passed, b.passed) == (1, 2)

    run(test)


def test_one_request_after_the_other_on_one_connection():
    async def test(a, b):
        reader, writer = await asyncio.open_connection(*a.acceptor.sockname)
        for data, wanted in MIXED * 3:
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert (await reader.readline()).decode().strip() == wanted
        writer.close()
        assert a.acceptor.counts().requests == 9
        assert b.acceptor.counts().requests == 12

    run(test)


def test_a_response_before_the_end_of_the_body_is_followed_by_the_next_request():
    async def test(a, b):
        data = request("POST", "/early?sid=a1", BODY) + request("GET", "/2?sid=b1")
        for size in (0, 100):
            got = await exchange(a, data, 2, size)
            assert got == ["a POST /early 0 0", "b GET /2 0 0"]

    run(test)


def test_a_request_that_no_sibling_takes_is_served_here():
    async def test(a, b):
        del a.others["b"]
        got = await exchange(a, request("GET", "/1?sid=b1") * 2, 2)
        assert got == ["a GET /1 0 0"] * 2

    run(test)


def test_a_sibling_at_its_limit_refuses():
    async def test(a, b):
        clients = [await asyncio.open_connection(*b.acceptor.sockname) for _ in range(3)]
        await until(lambda: b.acceptor.counts().connections == 3)
        got = await exchange(a, request("GET", "/1?sid=b1"), 1)
        assert got == ["a GET /1 0 0"]
        assert b.refused == 1
        for _, writer in clients:
            writer.close()

    run(test)


def test_a_sibling_at_its_limit_closes_the_connection_that_is_idle_longest():
    async def test(a, b):
        clients = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*b.acceptor.sockname)
            writer.write(request("GET", "/1?sid=b1"))
            assert (await reader.readuntil(b"\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await reader.readline() == b"b GET /1 0 0\n"
            clients.append((reader, writer))
        got = await exchange(a, request("GET", "/1?sid=b1"), 1)
        assert got == ["b GET /1 0 0"]
        assert await clients[0][0].read() == b""
        for reader, writer in clients[1:]:
            writer.write(request("GET", "/2?sid=b1"))
            assert (await reader.readuntil(b"\n\r\n")).startswith(b"HTTP/1.1 200")
        for _, writer in clients:
            writer.close()

    run(test)


def chunked(*chunks, trailers=""):
    parts = [f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks]
    return b"".join(parts) + f"0\r\n{trailers}\r\n".encode()


@pytest.mark.parametrize("size", [1, 7, 100, 0])
def test_chunked_bodies_end_where_their_last_chunk_does(size):
    async def test(a, b):
        coding = "Transfer-Encoding: chunked\r\n"
        data = request("POST", "/1?sid=a1", headers=coding) + chunked(BODY[:100], INNER, trailers="A: 1\r\n")
        data += request("GET", "/2?sid=b1")
        data += request("POST", "/3?sid=b1", headers=coding.upper()) + chunked(INNER)
        data += request("GET", "/4?sid=a1")
        content = BODY[:100] + INNER
        assert await exchange(a, data, 4, size) == [
            f"a POST /1 {len(content)} {crc32(content)}",
            "b GET /2 0 0",
            f"b POST /3 {len(INNER)} {crc32(INNER)}",
            "a GET /4 0 0",
        ]

    run(test)


def test_empty_lines_before_a_request_are_dropped():
    async def test(a, b):
        data = b"\r\n" + request("GET", "/1?sid=a1") + b"\r\n\r\n" + request("GET", "/2?sid=b1")
        for size in (0, 1):
            assert await exchange(a, data, 2, size) == ["a GET /1 0 0", "b GET /2 0 0"]

    run(test)


def test_a_websocket_whose_client_sends_a_frame_at_once():
    async def test(a, b):
        upgrade = (
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        )
        frame = b"\x81\x85" + bytes(4) + b"hello"
        before = request("POST", "/1?sid=a1", b"abc")
        for size in (0, 1):
            reader, writer = await asyncio.open_connection(*a.acceptor.sockname)
            data = before + request("GET", "/ws?sid=b1", headers=upgrade) + frame
            for at in range(0, len(data), size or len(data)):
                writer.write(data[at : at + (size or len(data))])
                await writer.drain()
                await asyncio.sleep(0)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert (await reader.readline()).startswith(b"a POST /1 3 ")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            assert await reader.readexactly(9) == b"\x81\x07b hello"
            writer.close()

    run(test)


async def refusal(worker, data, size=0):
    """:returns: the response, after which the worker has closed its side."""
    reader, writer = await asyncio.open_connection(*worker.acceptor.sockname)
    try:
        for at in range(0, len(data), size or len(data)):
            writer.write(data[at : at + (size or len(data))])
            await writer.drain()
            await asyncio.sleep(0)
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nab", "comes twice"),
        (b"POST / HTTP/1.1\nHost: x\nContent-Length: 2\n\nab", "does not end with CRLF"),
        (b"GET / HTTP/1.1\r\nHost: x\n", "does not end with CRLF"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000, "larger than 65536 bytes"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", "larger than 65536 bytes"),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nab", "upgrade"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "not with HTTP/1.1"),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
            "chunk is malformed",
        ),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\nab\r\n", "chunk is malformed"),
    ],
)
def test_a_request_whose_end_is_unclear_is_refused(data, reason, caplog):
    async def test(a, b):
        good = request("GET", "/1?sid=a1")
        for size in (0, 1000 if len(data) > 1000 else 1):
            for before in (b"", good):
                got = await refusal(a, before + data + good, size)
                assert got.count(b"HTTP/1.1 200 OK") == (1 if before else 0)
                refused = got.rpartition(b"HTTP/1.1 ")[2]
                assert refused.startswith(b"400 Bad Request\r\n")
                assert reason in refused.decode()
        assert len(caplog.messages) == 4
        assert reason in caplog.messages[0]
        assert "Invalid HTTP request received" in caplog.messages[0]

    caplog.set_level(logging.WARNING, "uvicorn.error")
    run(test)


def test_a_malformed_chunk_after_the_response_ends_the_connection():
    async def test(a, b):
        head = request("POST", "/early?sid=a1", headers="Transfer-Encoding: chunked\r\n")
        reader, writer = await asyncio.open_connection(*a.acceptor.sockname)
        writer.write(head + b"2\r\nab\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await reader.readline() == b"a POST /early 0 0\n"
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""
        writer.close()

    run(test)


def test_a_refused_client_that_stays_is_let_go(monkeypatch):
    async def test(a, b):
        monkeypatch.setattr(asgi_sticky, "_LINGER", 0.01)
        reader, writer = await asyncio.open_connection(*a.acceptor.sockname)
        writer.write(b"GET / HTTP/1.1\n\n")
        assert (await reader.read(12)) == b"HTTP/1.1 400"
        await until(a.acceptor.idle)
        writer.close()

    run(test)


def test_what_comes_before_the_response_does_not_fill_the_memory():
    """A client that sends and does not read: the kernel holds it up."""

    async def test(a, b):
        b.before_giving.clear()
        a.before_giving.clear()
        reader, writer = await asyncio.open_connection(*a.acceptor.sockname)
        writer.write(request("POST", "/1?sid=b1", b"x" * 20_000_000))
        await until(lambda: a.tasks)
        [protocol] = a.acceptor._connections
        came = len(protocol._waiting)
        assert came < 2_000_000
        await asyncio.sleep(0.05)
        assert len(protocol._waiting) == came
        a.before_giving.set()
        assert await reader.readuntil(b"\r\n\r\n")
        assert (await reader.readline()).startswith(b"b POST /1 20000000 ")
        writer.close()

    run(test)


def test_a_worker_that_drains_keeps_a_connection_that_it_passes_and_takes_those_of_siblings():
    async def test(a, b):
        a.before_giving.clear()
        reader, writer = await asyncio.open_connection(*a.acceptor.sockname)
        writer.write(request("GET", "/1?sid=b1"))
        await until(lambda: a.tasks)
        for worker in (a, b):
            worker.acceptor.stop_accepting()
        a.acceptor._end_idle()
        assert not a.acceptor.shut()
        a.before_giving.set()
        assert await reader.readuntil(b"\r\n\r\n")
        assert await reader.readline() == b"b GET /1 0 0\n"
        writer.close()
        for worker in (a, b):
            await until(worker.acceptor.is_drained)
            assert worker.acceptor.shut()
            assert not worker.acceptor.make_room()

    run(test)


@pytest.mark.parametrize(
    ("lines", "length"),
    [
        ("", 0),
        ("Content-Length: 12", 12),
        ("content-length:12 \t", 12),
        ("X-Content-Length: 12", 0),
        ("Content-Length: 12\r\nContent-Length: 12", None),
        ("Content-Length : 12", None),
        ("Content-Length: +12", None),
        ("Content-Length: 1_2", None),
        ("Content-Length: 12, 12", None),
        ("Content-Length:", None),
        ("Content-Length: 1\r\n 2", None),
        ("Content-Length: 12\nX: y", None),
        ("X: y\rContent-Length: 12", None),
        ("Content-Length: 9999999999999999999", None),
        ("Transfer-Encoding: chunked", CHUNKED),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked", None),
        ("transfer-encoding: identity", None),
        ("Upgrade: websocket", 0),
        ("Upgrade: websocket\r\nContent-Length: 1", None),
        ("Upgrade: websocket\r\nContent-Length: 0", 0),
        ("Upgrade: websocket\r\nTransfer-Encoding: chunked", None),
        ("X: Upgrade: websocket", 0),
        ("Content-Length: a" + " " * 60_000 + "a", None),
    ],
)
def test_the_length_of_a_body_is_known_or_the_request_refused(lines, length):
    lines = lines and f"{lines}\r\n"
    head = f"POST / HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()
    if length is None:
        with pytest.raises(UnclearRequest):
            body_length(head)
    else:
        assert body_length(head) == length
