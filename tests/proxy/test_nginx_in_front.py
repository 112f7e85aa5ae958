"""nginx in front of the proxy, and reloads under load."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import signal
import threading
import zlib

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch
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
from peer_servers import LIMIT, nginx
from peer_site import BIG, TEXT, Site, names, sha256
from processes import starting
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as ws_connect
from websockets.sync.client import unix_connect


@pytest.fixture(scope="module")
def front(peers):
    """nginx in front of the proxy's UNIX socket, as a user deploys it."""
    with starting() as start:
        port = free_port()
        process = peers.gunicorn(start, workers=2, bind=f"unix:{start.home}/app.sock")
        nginx(
            start,
            "front",
            f"""
            map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
            upstream app {{ server unix:{start.home}/app.sock fail_timeout=0; keepalive 8; }}
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://app;
                    proxy_http_version 1.1;
                    proxy_set_header Host $http_host;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection $connection_upgrade;
                    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                    proxy_set_header X-Forwarded-Proto https;
                    proxy_read_timeout 300s;
                }}
            }}
            """,
            port,
        )
        site = Site(peers, process, port, 2)
        yield site
        site.assert_quiet()


# --- nginx in front ----------------------------------------------------------------------------------


def test_front_plain(front):
    status, fields, body = front.get("/nginx/big.bin")
    assert (status, sha256(body)) == (200, sha256(BIG))
    status, fields, body = front.get("/nginx/text.txt", Accept_Encoding="gzip")
    assert (status, fields["content-encoding"], gzip.decompress(body)) == (200, "gzip", TEXT)
    body = BIG[:2_000_000]
    seen = json.loads(front.get("/node/x", "POST", body)[2])
    assert (seen["length"], seen["sha256"]) == (len(body), sha256(body))
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    seen = json.loads(front.get("/node/x", "POST", pieces)[2])
    assert (seen["length"], seen["sha256"]) == (len(body), sha256(body))
    assert front.get("/nothing")[0] == 204
    assert front.get("/unmodified")[0] == 304


def test_the_address_of_the_client_is_known(front):
    """nginx speaks over a UNIX socket of this machine, and is believed."""
    _, _, body = front.get("/node/", X_Forwarded_For="203.0.113.9", Host="example.org")
    got = {name.lower(): value for name, value in names(json.loads(body))}
    addresses = [value.strip() for value in got["x-forwarded-for"].split(",")]
    assert addresses[:2] == ["203.0.113.9", "127.0.0.1"]
    assert got["x-forwarded-proto"].split(",")[0] == "https"
    assert got["host"] == "example.org"


@UPSTREAMS
@CLIENTS
@DEFLATE
def test_front_websocket(front, upstream, client, deflate):
    found = converse(client, front.port, SOCKETS[upstream], deflate, closed=3003)
    assert_conversation(found, upstream, deflate, [3003, "as asked"])


def test_front_websocket_denied(front):
    with pytest.raises(InvalidStatus) as caught:
        ws_connect(f"ws://127.0.0.1:{front.port}/ws/denied", open_timeout=LIMIT)
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_front_socketio(front, client, transports):
    SOCKETIO_CLIENTS[client](front.port, "/io", TRANSPORTS[transports])


# --- a reload under load -----------------------------------------------------------------------------


def test_reload_under_load(start, peers):
    """Four workers are replaced twice: every response is complete; WebSockets get 1001, or stay open."""
    process = peers.gunicorn(start, "--graceful-timeout", 120, workers=4, bind=f"unix:{start.home}/app.sock")
    end, answers, wrong = threading.Event(), [0] * 4, []
    body = BIG[:100_000]

    def ask(client, turn):
        """One request; an exception, or what is wrong with it."""
        if turn % 3 == 0:
            client.request("GET", "/nginx/text.txt")
            response = client.getresponse()
            return (response.status, response.read()) != (200, TEXT)
        if turn % 3 == 1:
            client.request("POST", "/node/x", body)
            response = client.getresponse()
            return response.status != 200 or json.loads(response.read())["sha256"] != sha256(body)
        client.request("GET", "/node/pieces")
        response = client.getresponse()
        return response.status != 200 or zlib.crc32(response.read()) != pieces

    def load(number):
        for turn in itertools.count():
            if end.is_set():
                return
            client = Client(process.socket, timeout=LIMIT)
            try:
                if ask(client, turn):
                    wrong.append(turn)
            except Exception as error:
                wrong.append(f"{turn}: {error!r}")
            finally:
                client.close()
            answers[number] += 1

    pieces = zlib.crc32(b"".join(b"piece %d\n" % number for number in range(1000)))

    def dial(path):
        try:
            return unix_connect(
                process.socket,
                f"ws://localhost{path}",
                open_timeout=LIMIT,
                close_timeout=LIMIT,
                compression=None,
                ping_interval=None,
            ).__enter__()
        except InvalidStatus as error:
            answer = error.response
            raise AssertionError(f"{answer}\n{answer.body}\n{process.log()[-3000:]}") from error

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                closing = [
                    stack.enter_context(contextlib.closing(dial(path))) for path in ["/ws/", "/pyws/"] * 8
                ]
                waiting = [stack.enter_context(contextlib.closing(dial("/waits/ws/"))) for _ in range(4)]
                for ws in closing + waiting:
                    ws.send("before")
                    assert ws.recv(LIMIT) == "before"
                before = set(process.workers())
                process.signal(signal.SIGHUP)
                for ws in closing:
                    with pytest.raises(ConnectionClosed) as caught:
                        ws.recv(LIMIT)
                    assert caught.value.rcvd is not None, caught.value
                    assert caught.value.rcvd.code == 1001
                # those that may wait stay open, in workers that drain
                for ws in waiting:
                    ws.send("after")
                    assert ws.recv(LIMIT) == "after"
                    ws.close(1000)
                    assert ws.protocol.close_rcvd is not None
                wait_for(
                    lambda before=before: not before & set(process.workers()) and len(process.workers()) == 4,
                    lambda: f"the reload:\n{process.log()[-3000:]}",
                )
                done = sum(answers)
                wait_for(lambda done=done: sum(answers) > done + 20, "more answers")
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:20]
    assert process.stop() == 0, process.log()
    for word in ("Traceback", "[ERROR]", "[CRITICAL]"):
        assert word not in process.log(), process.log()


def test_reload_behind_nginx(start, peers, home):
    """nginx in front with kept connections to the socket: none of its requests fails, either."""
    process = peers.gunicorn(start, workers=4, bind=f"unix:{home}/app.sock")
    port = free_port()
    nginx(
        start,
        "front",
        f"""
        upstream app {{ server unix:{home}/app.sock fail_timeout=0; keepalive 8; }}
        server {{
            listen 127.0.0.1:{port};
            location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }}
        }}
        """,
        port,
    )
    end, answers = threading.Event(), []

    def load():
        while not end.is_set():
            try:
                answers.append(fetch(port, "/nginx/small.txt"))
            except Exception as error:
                answers.append(repr(error))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            process.hup(4)
            done = len(answers)
            wait_for(lambda done=done: len(answers) > done + 20, "more answers")
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {(200, "0123456789" * 10)}
