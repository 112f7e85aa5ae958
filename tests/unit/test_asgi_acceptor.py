"""The acceptor of an ASGI server, on a loop of the test."""

import asyncio
import logging
import socket
from types import SimpleNamespace

import pytest

from gunicorn_passenger.serving.asgi_acceptor import AsgiAcceptor


async def app(_scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def _until(condition):
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("keepalive", [0, 2])
def test_a_client_that_has_just_connected_is_served_by_a_worker_that_drains(keepalive):
    async def exchange():
        loop = asyncio.get_running_loop()
        listener, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
        cfg = SimpleNamespace(
            worker_connections=10,
            keepalive=keepalive,
            workers=1,
            accesslog=None,
            forwarded_allow_ips="127.0.0.1",
        )
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
