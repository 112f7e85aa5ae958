"""Conversations of real WebSocket and Socket.IO clients."""

from __future__ import annotations

import contextlib
import json
import os
import threading

import pytest
import socketio
from conditions import wait_for
from peer_servers import LIMIT, node_client
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as ws_connect

#: Upstreams of WebSockets: the path, and what is known of each.
SOCKETS = {"ws": "/ws/a%20b?c=d", "websockets": "/pyws/a%20b?c=d", "flask-sock": "/chat/sock"}

UPSTREAMS = pytest.mark.parametrize("upstream", SOCKETS)
DEFLATE = pytest.mark.parametrize("deflate", [True, False], ids=["deflate", "plain"])
CLIENTS = pytest.mark.parametrize("client", ["python", "node"])


def python_client(port, path, deflate, protocols=(), closed=1000, close=None):
    """What node/ws_client.js does, by the websockets package."""
    messages = [
        "text", "", "žluťoučký kůň", b"\x00\xff\x80", b"", "x" * 70000, os.urandom(1 << 20),
        os.urandom(1 << 19).hex(),
    ]  # fmt: skip
    with ws_connect(
        f"ws://127.0.0.1:{port}{path}",
        compression="deflate" if deflate else None,
        subprotocols=list(protocols) or None,
        max_size=None,
        open_timeout=LIMIT,
        close_timeout=LIMIT,
        ping_interval=None,
    ) as ws:
        result = {
            "extensions": ws.response.headers.get("Sec-WebSocket-Extensions", ""),
            "protocol": ws.subprotocol or "",
        }
        # all are sent before the last answer is read
        sender = threading.Thread(target=lambda: [ws.send(message) for message in messages])
        sender.start()
        result["echoed"] = [ws.recv(LIMIT) == message for message in messages]
        sender.join()
        assert ws.ping("from the client").wait(LIMIT)
        ws.send("ping")
        result["answer"] = ws.recv(LIMIT)
        if close:
            ws.close(close, "by the client")
        else:
            ws.send(f"close {closed}")
            with contextlib.suppress(ConnectionClosed):
                ws.recv(LIMIT)
        result["closed"] = [ws.protocol.close_rcvd.code, ws.protocol.close_rcvd.reason]
    return result


def converse(client, port, path, deflate, **options):
    if client == "python":
        return python_client(port, path, deflate, **options)
    found = node_client(
        "ws_client.js", f"ws://127.0.0.1:{port}{path}", json.dumps({"deflate": deflate, **options})
    )
    assert found.get("pong") == "from the client", found
    return found


def assert_conversation(found, upstream, deflate, closed):
    assert found["echoed"] == [True] * 8
    assert ("permessage-deflate" in found["extensions"]) == deflate
    assert found["closed"] == closed
    assert found["answer"] == {"ws": "pong from the server", "websockets": "pong True"}.get(upstream, "ping")


#: Which transports a client tries; an upgrade begins with polling.
TRANSPORTS = {"polling": ["polling"], "websocket": ["websocket"], "upgrade": ["polling", "websocket"]}


def socketio_python(port, path, transports):
    """A python-socketio client: echoes, a call, a broadcast, and the server's disconnect."""
    client = socketio.Client(reconnection=False, request_timeout=LIMIT)
    heard, told, gone = [], [], threading.Event()
    client.on("echoed", lambda data: heard.append(data))
    client.on("told", lambda data: told.append(data))
    client.on("disconnect", lambda *reason: gone.set())
    client.connect(f"http://127.0.0.1:{port}", socketio_path=path, transports=transports, wait_timeout=LIMIT)
    try:
        large, binary = os.urandom(1 << 19).hex(), os.urandom(1 << 20)
        for data in ["text", "", {"nested": ["žluť", 3, None]}, b"\x00\xff\x80", binary, large]:
            client.emit("echo", data)
            wait_for(lambda: heard, "the echo")
            assert heard.pop() == data
        client.emit("all", "news")
        wait_for(lambda: told, "the news")
        wanted = transports[-1]
        wait_for(lambda: client.call("ask", "x", timeout=LIMIT)["transport"] == wanted, f"{wanted}")
        assert client.transport() == wanted
        client.emit("leave")
        assert gone.wait(LIMIT)
    finally:
        client.disconnect()


def socketio_node(port, path, transports):
    found = node_client("io_client.js", f"http://127.0.0.1:{port}", f"{path}/", json.dumps(transports))
    assert found.get("echoed") == [True] * 6, found
    assert found["told"] == "news"
    assert found["reply"]["data"] == "x"
    assert found["transport"] == found["reply"]["transport"] == transports[-1]
    assert found["reason"] == "io server disconnect"


SOCKETIO_CLIENTS = {"python": socketio_python, "node": socketio_node}
