"""The acceptor of an ASGI server, on a loop of the test."""

import asyncio
import functools
import inspect
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import ContextVar, copy_context
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import uvicorn
from conditions import wait_for

from gunicorn_passenger.serving import asgi_acceptor
from gunicorn_passenger.serving.acceptor_table import AcceptorTable
from gunicorn_passenger.serving.asgi_acceptor import AsgiAcceptor
from gunicorn_passenger.serving.asgi_server import AsgiServer
from gunicorn_passenger.serving.asgi_thread import AsgiThread
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.serving.scheduler import ThreadResult

LOG = logging.getLogger("test")


async def app(_scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def lifespan(_scope, receive, send):
    for _ in range(2):
        await send({"type": (await receive())["type"] + ".complete"})


async def _until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def configuration(keepalive=2):
    return SimpleNamespace(
        worker_connections=10,
        keepalive=keepalive,
        workers=1,
        accesslog=None,
        forwarded_allow_ips="127.0.0.1",
    )


@pytest.mark.parametrize("keepalive", [0, 2])
def test_a_client_that_has_just_connected_is_served_by_a_worker_that_drains(keepalive):
    async def exchange():
        loop = asyncio.get_running_loop()
        listener, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
        cfg = configuration(keepalive)
        scheduler = SimpleNamespace(sleep=None)
        log = logging.getLogger("test")
        acceptor = AsgiAcceptor(listener, app, {}, loop, cfg, log, scheduler, closes_websockets=True)
        acceptor.start()
        client.setblocking(False)
        with client:
            await loop.sock_connect(client, acceptor.sockname)
            await _until(lambda: acceptor.counts().connections == 1)
            acceptor.stop_accepting()
            await asyncio.sleep(0.1)
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            response = await loop.sock_recv(client, 1000)
        await _until(acceptor.is_drained)
        return response

    response = asyncio.run(asyncio.wait_for(exchange(), 10))
    assert response.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in response.lower()


def test_a_websocket_that_its_client_has_begun_to_close_is_left_to_it(caplog):
    async def converse(scope, receive, send):
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async def exchange():
        loop = asyncio.get_running_loop()
        listener, scheduler = socket.create_server(("127.0.0.1", 0)), SimpleNamespace(sleep=None)
        acceptor = AsgiAcceptor(listener, converse, {}, loop, configuration(), LOG, scheduler, True)
        acceptor.start()
        reader, writer = await asyncio.open_connection(*acceptor.sockname)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        [protocol] = acceptor._connections
        protocol.conn.receive_data(b"\x88\x82\0\0\0\0\x03\xe8")  # a Close frame, RFC 6455 section 5.5.1
        acceptor.stop_accepting()
        await _until(lambda: acceptor._sock.fileno() < 0)
        assert not protocol.transport.is_closing()
        writer.close()
        await _until(acceptor.is_drained)

    asyncio.run(asyncio.wait_for(exchange(), 10))
    assert "ended at once" not in caplog.text


HANDSHAKE = (
    b"GET /socket.io/?%b HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


# uvicorn and websockets deprecate the first of them
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("ws", ["websockets", "websockets-sansio", "wsproto"])
@pytest.mark.parametrize(
    ("query", "sent", "expected"),
    [
        (b"", [], b"\x88\x02\x03\xf4"),
        (b"EIO=4&sid=a", ["3probe"], b"\x81\x063probe\x88\x02\x03\xf4"),
        # a Close frame in place of the first frame would leave python-engineio's client without a session
        (b"EIO=4&sid=a", [], b""),
        (b"EIO=4", ["0{}", "40{}"], b"\x81\x030{}\x81\x0440{}\x88\x02\x03\xf4"),
        # one that does not speak Socket.IO
        (b"EIO=4", ["0{}"], b"\x81\x030{}\x88\x02\x03\xf4"),
        (b"EIO=4", [], b""),
    ],
    ids=[
        "another WebSocket",
        "an upgrade",
        "an upgrade without a reply",
        "a session",
        "half a session",
        "no session",
    ],
)
def test_a_websocket_that_opens_during_the_drain_is_closed(monkeypatch, caplog, ws, query, sent, expected):
    monkeypatch.setattr(asgi_acceptor, "_FIRST_FRAME_TIMEOUT", 0.1)
    make_config = asgi_acceptor.make_config

    def with_protocol(*arguments, **options):
        config = make_config(*arguments, **options)
        config.ws = ws
        return config

    monkeypatch.setattr(asgi_acceptor, "make_config", with_protocol)

    async def exchange():
        accepts, asked = asyncio.Event(), asyncio.Event()

        async def converse(scope, receive, send):
            assert (await receive())["type"] == "websocket.connect"
            asked.set()
            await accepts.wait()
            await send({"type": "websocket.accept"})
            for text in sent:
                await send({"type": "websocket.send", "text": text})
            while (await receive())["type"] != "websocket.disconnect":
                pass

        loop = asyncio.get_running_loop()
        listener, scheduler = socket.create_server(("127.0.0.1", 0)), SimpleNamespace(sleep=None)
        acceptor = AsgiAcceptor(listener, converse, {}, loop, configuration(), LOG, scheduler, True)
        acceptor.start()
        reader, writer = await asyncio.open_connection(*acceptor.sockname)
        writer.write(HANDSHAKE % query)
        await asked.wait()
        acceptor.stop_accepting()
        await _until(lambda: acceptor._sock.fileno() < 0)
        accepts.set()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        got = b""
        while (expected != got or got[-4:-2] != b"\x88\x02") and (data := await reader.read(1000)):
            got += data
        writer.close()
        await _until(acceptor.is_drained)
        return got

    assert asyncio.run(asyncio.wait_for(exchange(), 30)) == expected
    assert "ended at once" not in caplog.text


def test_connections_that_are_killed_while_a_handshake_is_in_progress():
    """One is refused by uvicorn's parser, and one waits for the application: the others end as they should."""

    async def exchange():
        asked = asyncio.Event()

        async def converse(scope, receive, send):
            assert (await receive())["type"] == "websocket.connect"
            if scope["query_string"] == b"accepted":
                await send({"type": "websocket.accept"})
            else:
                asked.set()
            while (await receive())["type"] != "websocket.disconnect":
                pass

        loop = asyncio.get_running_loop()
        listener, scheduler = socket.create_server(("127.0.0.1", 0)), SimpleNamespace(sleep=None)
        acceptor = AsgiAcceptor(listener, converse, {}, loop, configuration(), LOG, scheduler, False)
        acceptor.start()
        clients = [await asyncio.open_connection(*acceptor.sockname) for _ in range(3)]
        (accepted, one), (waiting, two), (refused, three) = clients
        one.write(HANDSHAKE % b"accepted")
        assert (await accepted.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        two.write(HANDSHAKE % b"waits")
        await asked.wait()
        three.write((HANDSHAKE % b"refused")[:-2] + b"Cookie: %b\r\n\r\n" % (b"x" * 9000))
        await _until(lambda: len(acceptor._websockets()) == 3)
        loop.call_soon(acceptor._kill)
        assert await accepted.read(4) == b"\x88\x02\x03\xf4"
        assert (await waiting.read(12)) == b"HTTP/1.1 500"
        assert await refused.read(1000) == b""
        for writer in (one, two, three):
            writer.close()
        await _until(acceptor.idle)
        acceptor.stop_accepting()
        await _until(lambda: acceptor._sock.fileno() < 0)

    asyncio.run(asyncio.wait_for(exchange(), 30))


def test_the_context_variables_of_the_caller_do_not_reach_the_application():
    """A program may open a server while it serves a request."""
    variable = ContextVar("variable")
    seen = []

    async def look(scope, receive, send):
        seen.append((scope["type"], variable.get("empty")))
        await (lifespan if scope["type"] == "lifespan" else app)(scope, receive, send)

    def serve_once(thread):
        variable.set("of a request")
        thread.start()
        acceptor = thread.make_acceptor(socket.create_server(("127.0.0.1", 0)))
        acceptor.start()
        with socket.create_connection(acceptor.sockname, timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        acceptor.stop_accepting()
        thread.kill(10.0)
        thread.wait(10.0)
        assert thread.finished

    thread = AsgiThread(look, "test", configuration(), logging.getLogger("test"), Threads())
    copy_context().run(serve_once, thread)
    assert seen == [("lifespan", "empty"), ("http", "empty")]


def test_context_variables_of_a_request_do_not_reach_the_next_one_of_its_connection():
    if "reset_contextvars" not in inspect.signature(uvicorn.Config).parameters:
        pytest.skip("this uvicorn cannot reset them")
    variable = ContextVar("variable")
    seen = []

    async def look(scope, receive, send):
        seen.append(variable.get("empty"))
        variable.set("of the first request")
        await asyncio.sleep(0.05)  # reading is paused meanwhile
        while (await receive()).get("more_body"):
            pass
        await app(scope, receive, send)

    async def exchange():
        loop = asyncio.get_running_loop()
        listener, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
        log = logging.getLogger("test")
        scheduler = SimpleNamespace(sleep=None)
        acceptor = AsgiAcceptor(listener, look, {}, loop, configuration(), log, scheduler, True)
        acceptor.start()
        client.setblocking(False)
        with client:
            await loop.sock_connect(client, acceptor.sockname)
            head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
            await loop.sock_sendall(client, head + bytes(1000000))
            assert (await loop.sock_recv(client, 1000)).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.05)
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await _until(lambda: acceptor.counts().requests == 2)
        acceptor.stop_accepting()
        await _until(acceptor.is_drained)

    asyncio.run(asyncio.wait_for(exchange(), 10))
    assert seen == ["empty", "empty"]


class Threads:
    """A scheduler of threads."""

    sleep = staticmethod(time.sleep)

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)

    def spawn(self, function, *args):
        self._pool.submit(function, *args)

    def result(self):
        return ThreadResult(SimpleNamespace(own_hub=lambda: None))


def cancel_all():
    for task in asyncio.all_tasks():
        task.cancel()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda _: sys.exit(3), "SystemExit(3)"),
        (lambda loop: loop.stop(), "RuntimeError('Event loop stopped before Future completed.')"),
        (lambda _: cancel_all(), "CancelledError()"),
    ],
    ids=["exit", "stop", "cancel"],
)
def test_a_thread_that_ends_by_itself_is_reported_and_leaves_no_connection(caplog, end, said):
    async def die(scope, receive, send):
        if scope["type"] == "lifespan":
            await lifespan(scope, receive, send)
        else:
            loop = asyncio.get_running_loop()
            loop.call_soon(end, loop)
            await asyncio.sleep(60)

    deaths = SimpleQueue()
    thread = AsgiThread(die, "api", configuration(), LOG, Threads(), lambda: deaths.put("reported"))
    thread.start()
    acceptor = thread.make_acceptor(socket.create_server(("127.0.0.1", 0)))
    acceptor.start()
    with ExitStack() as stack:
        connect = functools.partial(socket.create_connection, acceptor.sockname, timeout=10)
        idle, client = stack.enter_context(connect()), stack.enter_context(connect())
        wait_for(lambda: acceptor.counts().connections == 2, "the connections")
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert deaths.get(timeout=10) == "reported"
        for peer in (idle, client):
            with suppress(ConnectionResetError):
                while peer.recv(1000):
                    pass
    thread.wait(10.0)
    assert thread.finished
    assert acceptor.is_drained()
    assert (
        f"the thread of the ASGI server 'api' has ended ({said}): gunicorn replaces this worker"
        in caplog.text
    )


def test_a_connection_that_does_not_end_does_not_keep_the_lifespan_from_its_shutdown():
    ended = []

    async def stubborn(scope, receive, send):
        if scope["type"] == "lifespan":
            await lifespan(scope, receive, send)
            ended.append("lifespan")
            return
        while not ended:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    thread = AsgiThread(stubborn, "api", configuration(), LOG, Threads())
    thread.start()
    # a server that was paused and resumed
    for _ in range(3):
        acceptor = thread.make_acceptor(socket.create_server(("127.0.0.1", 0)))
        acceptor.start()
        acceptor.stop_accepting()
    acceptor = thread.make_acceptor(socket.create_server(("127.0.0.1", 0)))
    assert thread._acceptors == [acceptor]
    acceptor.start()
    with socket.create_connection(acceptor.sockname, timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_for(lambda: acceptor.counts().connections, "the connection")
        acceptor.kill(0.0)
        thread.kill(10.0)
    thread.wait(10.0)
    assert (thread.finished, ended) == (True, ["lifespan"])


def test_an_application_that_starts_while_its_worker_begins_to_drain_is_shut_down():
    starting, go, said = threading.Event(), threading.Event(), []

    async def slow(_scope, receive, send):
        said.append((await receive())["type"])
        starting.set()
        go.wait(10)
        await send({"type": "lifespan.startup.complete"})
        said.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    table = AcceptorTable()
    table.configure(configuration(), LOG, None, False)
    server = SimpleNamespace(asgi_app=slow, name="api", thread=None)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(table.start_application, server, Threads())
        assert starting.wait(10)
        assert list(table.stop_all()) == []
        table.finish()
        assert not table.idle()
        go.set()
        started.result(10)
    wait_for(table.idle, "the end of the application")
    assert said == ["lifespan.startup", "lifespan.shutdown"]


def test_a_worker_that_drains_starts_no_application():
    registry = ServerRegistry()
    registry.stop_accepting()
    server = AsgiServer(lifespan, registry)
    registry._start_application(server)
    assert server.thread is None


def test_a_connection_that_cannot_be_served_is_closed(caplog):
    def fail():
        raise OSError("no protocol")

    thread = AsgiThread(lambda *args: lifespan(*args), "api", configuration(), LOG, Threads())
    thread.start()
    acceptor = thread.make_acceptor(socket.create_server(("127.0.0.1", 0)))
    acceptor._protocol = fail
    acceptor.start()
    with socket.create_connection(acceptor.sockname, timeout=10) as client:
        assert client.recv(1) == b""
    wait_for(acceptor.idle, "the end of the connection")
    assert "A connection to an ASGI server could not be served" in caplog.text
    acceptor.stop_accepting()
    thread.kill(10.0)
    thread.wait(10.0)
    assert thread.finished
