"""WebSockets and Socket.IO through the proxy, between real clients and servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket

import pytest
from conditions import wait_for
from peer_clients import (
    CLIENTS,
    DEFLATE,
    SOCKETIO_CLIENTS,
    SOCKETS,
    TRANSPORTS,
    UPSTREAMS,
    assert_conversation,
    converse,
)
from peer_servers import LIMIT, node_client
from upstream_sockets import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as ws_connect

# --- WebSockets --------------------------------------------------------------------------------------


@UPSTREAMS
@CLIENTS
@DEFLATE
def test_websocket(site, upstream, client, deflate):
    """Text, binary and empty messages, up to a megabyte; pings of both sides; the server closes."""
    found = converse(client, site.port, SOCKETS[upstream], deflate, closed=3002)
    assert_conversation(found, upstream, deflate, [3002, "as asked"])


@pytest.mark.parametrize("code", [1000, 1001, 1011, 4999])
@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_close_code_of_the_server(site, upstream, code):
    with ws_connect(f"ws://127.0.0.1:{site.port}{SOCKETS[upstream]}", open_timeout=LIMIT) as ws:
        ws.send(f"close {code}")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(LIMIT)
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (code, "as asked")


@pytest.mark.parametrize("code", [1000, 1001, 3001])
@CLIENTS
@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_close_code_of_the_client(single, upstream, client, code):
    ends = {
        "ws": lambda: [tuple(pair) for pair in single.peers.state()["closed"]],
        "websockets": lambda: list(single.peers.websockets.closed),
    }[upstream]
    before = len(ends())
    found = converse(client, single.port, SOCKETS[upstream], True, close=code)
    assert found["closed"] == [code, "by the client"]  # the echo of the closing handshake
    # those of tests before may come late
    wait_for(lambda: (code, "by the client") in ends()[before:], lambda: f"{code}, there are {ends()}")


def test_websocket_that_ends_without_a_word(site):
    """Of the server's side, and of the client's: the other learns of it."""
    with ws_connect(f"ws://127.0.0.1:{site.port}/ws/", open_timeout=LIMIT) as ws:
        ws.send("terminate")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(LIMIT)
        assert caught.value.rcvd is None
    before = len(site.peers.state()["closed"])
    with ws_connect(f"ws://127.0.0.1:{site.port}/ws/", open_timeout=LIMIT) as ws:
        ws.send("x")
        assert ws.recv(LIMIT) == "x"
        ws.socket.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: [1006, ""] in site.peers.state()["closed"][before:], "the upstream to hear of it")


@CLIENTS
@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_subprotocols(site, upstream, client):
    found = converse(
        client, site.port, SOCKETS[upstream], False, protocols=["first.example", "second.example"]
    )
    assert found["protocol"] == "second.example"


@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_handshake_as_the_upstream_sees_it(site, upstream):
    with ws_connect(
        f"ws://127.0.0.1:{site.port}{SOCKETS[upstream]}",
        open_timeout=LIMIT,
        additional_headers=[("Cookie", "a=b"), ("X-Twice", "1"), ("X-Twice", "2")],
        origin="http://example.org",
    ) as ws:
        ws.send("info")
        seen = json.loads(ws.recv(LIMIT))
    assert seen["path"] == SOCKETS[upstream]
    fields = seen["headers"]
    pairs = (
        list(zip(fields[::2], fields[1::2], strict=True))
        if isinstance(fields[0], str)
        else map(tuple, fields)
    )
    by_name = {}
    for name, value in pairs:
        by_name.setdefault(name.lower(), []).append(value)
    assert by_name["host"] == [f"127.0.0.1:{site.port}"]
    assert by_name["cookie"] == ["a=b"]
    assert by_name["origin"] == ["http://example.org"]
    assert by_name["x-twice"] == ["1", "2"]
    assert [value.lower() for value in by_name["upgrade"]] == ["websocket"]
    assert [value.lower() for value in by_name["connection"]] == ["upgrade"]
    assert by_name["x-forwarded-for"] == ["127.0.0.1"]
    assert by_name["x-forwarded-proto"] in (["ws"], ["http"])
    assert len(by_name["sec-websocket-key"]) == len(by_name["sec-websocket-version"]) == 1


@pytest.mark.parametrize(("path", "status"), [("/ws/denied", 401), ("/pyws/denied", 403)])
@CLIENTS
def test_websocket_that_is_denied(site, client, path, status):
    if client == "node":
        found = node_client("ws_client.js", f"ws://127.0.0.1:{site.port}{path}")
        assert found["status"] == status
        assert found["body"].startswith("not you")
        return
    with pytest.raises(InvalidStatus) as caught:
        ws_connect(f"ws://127.0.0.1:{site.port}{path}", open_timeout=LIMIT)
    assert caught.value.response.status_code == status
    assert caught.value.response.body.startswith(b"not you")


def test_another_protocol_than_websockets(site):
    with connect(site.port) as client:
        client.send(
            b"GET /node/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly"
        )
        head = client.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"upgrade: echo" in head.lower()
        assert client.exactly(10) == b"helloearly"
        client.send(b"more")
        assert client.exactly(4) == b"more"
        client.finish()
        assert client.rest() == b""


def test_websockets_fifty_at_once_and_requests_beside(site):
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(
                ws_connect(
                    f"ws://127.0.0.1:{site.port}{path}",
                    open_timeout=LIMIT,
                    close_timeout=LIMIT,
                    compression=None,
                )
            )
            for path in itertools.islice(itertools.cycle(SOCKETS.values()), 51)
        ]
        for number, ws in enumerate(clients):
            ws.send(f"client {number}")
        assert site.get("/nginx/small.txt")[0] == 200
        for number, ws in reversed(list(enumerate(clients))):
            assert ws.recv(LIMIT) == f"client {number}"
        assert site.get("/node/")[0] == 200


# --- Socket.IO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_socketio_of_node(site, client, transports):
    SOCKETIO_CLIENTS[client](site.port, "/io", TRANSPORTS[transports])


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_socketio_of_flask(single, client, transports):
    """A second server of the same program. With more workers, polling would have to be sticky."""
    SOCKETIO_CLIENTS[client](single.port, "/socket.io", TRANSPORTS[transports])


@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_socketio_of_flask_in_four_workers(four_workers, client):
    SOCKETIO_CLIENTS[client](four_workers.port, "/socket.io", ["websocket"])
