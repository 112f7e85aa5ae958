"""The acceptor of an ASGI server, on a loop of the test."""

import asyncio
import inspect
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from types import SimpleNamespace

import pytest
import uvicorn

from gunicorn_passenger.serving.asgi_acceptor import AsgiAcceptor
from gunicorn_passenger.serving.asgi_thread import AsgiThread
from gunicorn_passenger.serving.scheduler import ThreadResult


async def app(_scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


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


def test_the_context_variables_of_the_caller_do_not_reach_the_application():
    """A program may open a server while it serves a request."""
    variable = ContextVar("variable")
    seen = []

    async def look(scope, receive, send):
        seen.append((scope["type"], variable.get("empty")))
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

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
        assert thread.finished

    log = SimpleNamespace(debug=print, error=print, warning=print, exception=print)
    thread = AsgiThread(look, "test", configuration(), log, Threads())
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
