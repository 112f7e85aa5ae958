"""Upgrades through the proxy: the handshake, and the handlers."""

import contextlib
import os
import select

import pytest
from conditions import PATIENCE
from http_client import fetch
from proxy_harness import (
    PLACES,
    Message,
    background,
    came,
    cut_off,
    get,
    path,
    request_of,
    response_of,
    upstream_for,
)
from upgraded_connections import EVERYWHERE, PROTOCOLS, dial, switching, upgrading
from upstream_sockets import connect

HANDLERS = """
def change(upstream_request, request, options):
    upstream_request.headers["X-Made"] = request.headers.get("X-Asked", "?")
    upstream_request.path = "/changed"
    upstream_request.headers["Sec-WebSocket-Protocol"] = "other"
def opened(tunnel):
    print("opened", tunnel.target, tunnel.request.path, flush=True)
    if tunnel.request.path == "/close-at-once":
        tunnel.close()
def closed(tunnel):
    print("closed", tunnel.target, tunnel.request.path, tunnel.bytes_in, tunnel.bytes_out, flush=True)
def evil(upstream_request, request, options):
    upstream_request.headers._list.append(("X-Made", "a\\r\\nX-Evil: 1"))
P["handled"].on("proxy_req_ws", change)
P["handled"].on("open", opened)
P["handled"].on("close", closed)
P["evil"].on("proxy_req_ws", evil)
"""

SERVERS = {
    **PLACES,
    "to_unix": "UNIX",
    "no_ws": "UP, HOST, ws=False",
    "inside_no_ws": "UP, HOST, ws=False",
    "late": "UP, HOST, proxy_timeout=0.5",
    "handled": "UP, HOST",
    "evil": "UP, HOST",
    "inside_ws": "UP, HOST",
}


# --- the handshake -----------------------------------------------------------------------------------


@EVERYWHERE
@PROTOCOLS
def test_the_handshake_and_bytes_both_ways(px, where, protocol):
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading("/chat?room=1", protocol, "Connection: X-Hop", "X-Hop: 1", "Cookie: a=b"))
        wire = upstream.accept()
        got = request_of(wire)
        assert got.line == "GET /chat?room=1 HTTP/1.1"
        assert got.get("upgrade") == protocol
        assert "upgrade" in [option.strip().lower() for option in got.get("connection").split(",")]
        assert got.get("host") == "client.example"
        assert got.get("sec-websocket-key") == "dGhlIHNhbXBsZSBub25jZQ=="
        assert got.get("origin") == "http://client.example"
        assert got.get("cookie") == "a=b"
        # inside an application, nothing tells what the client has sent from what the application has written
        assert got.all("x-hop") == (["1"] if where.startswith("inside") else [])
        assert not got.all("content-length")
        assert not got.all("transfer-encoding")
        wire.send(switching(protocol))
        head = Message(client.head())
        assert head.line == "HTTP/1.1 101 Switching Protocols"
        assert head.get("upgrade") == protocol
        assert head.get("connection").lower() == "upgrade"
        assert head.get("sec-websocket-accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert head.get("x-answer") == "1"
        assert not head.all("content-length")
        assert not head.all("transfer-encoding")
        for number in range(20):
            data = b"message %d" % number
            client.send(data)
            assert wire.exactly(len(data)) == data
            wire.send(data.upper())
            assert client.exactly(len(data)) == data.upper()


@EVERYWHERE
@PROTOCOLS
def test_bytes_that_came_early_are_kept(px, where, protocol):
    """The client's together with its request, the upstream's together with its 101."""
    early, answer = (
        b"early " * 100 + b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"first " * 100,
    )
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading("/", protocol) + early)
        wire = upstream.accept()
        request_of(wire)
        wire.send(switching(protocol) + answer)
        assert Message(client.head()).status == 101
        assert client.exactly(len(answer)) == answer
        assert wire.exactly(len(early)) == early
        client.send(b"more")
        assert wire.exactly(4) == b"more"
        wire.send(b"less")
        assert client.exactly(4) == b"less"


@EVERYWHERE
def test_many_early_bytes_are_kept(px, where):
    """More than a read takes, while the upstream has not said anything yet."""
    early = os.urandom(400_000)
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading())
        with background(client.send, early):
            wire = upstream.accept()
            request_of(wire)
            wire.send(switching() + early[::-1])
            assert Message(client.head()).status == 101
            assert client.exactly(len(early)) == early[::-1]
            assert wire.exactly(len(early)) == early


@EVERYWHERE
def test_the_101_cut_anywhere(px, where):
    for cut in (1, 12, 40, len(switching()) - 1):
        with upstream_for(px, where) as upstream, connect(px[where]) as client:
            client.send(upgrading()[:cut]).send(upgrading()[cut:])
            wire = upstream.accept()
            request_of(wire)
            wire.send(switching()[:cut]).send(switching()[cut:] + b"x")
            assert Message(client.head()).status == 101
            assert client.exactly(1) == b"x"


@EVERYWHERE
def test_an_interim_answer_before_the_101(px, where):
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading())
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + switching() + b"x")
        head = Message(client.head())
        if head.status == 103:
            head = Message(client.head())
        assert head.status == 101
        assert client.exactly(1) == b"x"


@EVERYWHERE
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_upgrade_with_a_body(px, where, framing):
    field = "Content-Length: 5" if framing == "length" else "Transfer-Encoding: chunked"
    body = b"hello" if framing == "length" else b"5\r\nhello\r\n0\r\n\r\n"
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading("/", "tcp", field, method="POST") + body + b"early")
        if not upstream.connects_within(1):
            assert response_of(client).status in (400, 501)
            return
        wire = upstream.wires[0]
        assert request_of(wire).body == b"hello"
        wire.send(switching("tcp") + b"x")
        assert Message(client.head()).status == 101
        assert client.exactly(1) == b"x"
        assert wire.exactly(5) == b"early"
        client.send(b"more")
        assert wire.exactly(4) == b"more"


REFUSALS = {
    "403": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
    "200": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
    "426": b"HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 8\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
    "401, then the end": b"HTTP/1.1 401 Who\r\nWWW-Authenticate: Basic\r\n\r\nno",
    "upgrade in it": b"HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nno",
}


@EVERYWHERE
@PROTOCOLS
@pytest.mark.parametrize("case", REFUSALS)
def test_an_upgrade_that_the_upstream_refuses(px, where, protocol, case):
    """Its response is an ordinary one; what the client sends next is not tunneled, but an ordinary request."""
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        target = path()
        client.send(upgrading(target, protocol))
        wire = upstream.accept()
        assert request_of(wire).target == target
        wire.send(REFUSALS[case])
        if "end" in case:
            wire.finish()
        answer = response_of(client)
        assert answer.status == int(REFUSALS[case][9:12])
        assert answer.body == b"no"
        with contextlib.suppress(ConnectionError):
            client.send(get("/next", "TE: smuggled", "Connection: TE, X-Hop", "X-Hop: 1"))
        # on whichever connection, if at all: as a request, not as a tunnel's bytes
        if "end" in case:
            # here, or the next test's upstream would get the connection
            ready, _, _ = select.select([upstream.listener, client.sock], [], [], PATIENCE)
            assert ready
            got = upstream.accept().head() if upstream.listener in ready else b""
        else:
            got = came(wire, 1.0)
            if not got and upstream.connects_within(0.1):
                got = upstream.wires[-1].head()
        assert b"smuggled" not in got
        assert not got or got.startswith(b"GET /next ")


@pytest.mark.parametrize("where", ["no_ws", "inside_no_ws"])
@PROTOCOLS
def test_without_the_option_an_upgrade_is_501(px, where, protocol):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(upgrading("/", protocol))
        assert response_of(client).status == 501
        assert not upstream.connects_within(0.05)


@pytest.mark.parametrize("where", ["primary", "second", "inside"])
@pytest.mark.parametrize(
    "request_",
    [
        get("/", "Upgrade: websocket"),
        get("/", "Connection: upgrade"),
        get("/", "Connection: close", "Upgrade: websocket"),
        upgrading(version="1.0"),
        get("/", "Connection: upgrade", "Upgrade: "),
    ],
    ids=["not nominated", "no protocol", "close", "http/1.0", "empty"],
)
def test_what_is_not_an_upgrade_is_an_ordinary_request(px, where, request_):
    got, answer = px.exchange(request_, where=where)
    assert not got.all("upgrade")
    assert "upgrade" not in (got.get("connection") or "").lower()
    assert answer.body == b"ok"


@pytest.mark.parametrize("where", ["primary", "second", "inside", "inside_ws"])
@pytest.mark.parametrize(
    "answer",
    [
        switching("h2c"),
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
    ids=["another", "none"],
)
def test_a_switch_to_an_unrequested_protocol_is_502(px, where, answer):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(upgrading(target))
        wire = upstream.accept()
        request_of(wire)
        wire.send(answer + b"x")
        assert response_of(client).status == 502
        assert cut_off(wire) == b""
    px.one_line(target, r"\): 502")


@EVERYWHERE
def test_an_upgrade_to_a_target_that_refuses_is_502(px, where):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(px.unix)
    target = path()
    with connect(px[where]) as client:
        client.send(upgrading(target))
        assert response_of(client).status == 502
    px.one_line(target, rf"proxy: .+ after [\d.]+ s \(GET {target}\): 502")


@EVERYWHERE
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 101 Switch", b"nonsense\r\n\r\n"])
def test_an_upgrade_whose_upstream_leaves_is_502(px, where, sent):
    target = path()
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading(target))
        wire = upstream.accept()
        request_of(wire)
        wire.send(sent).close()
        assert response_of(client).status == 502
    px.one_line(target, r"\): 502")


@EVERYWHERE
def test_the_client_goes_before_the_101(px, where):
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(upgrading())
        wire = upstream.accept()
        request_of(wire)
        client.close()
        assert wire.ended()


def test_an_upgrade_that_is_not_answered_in_time_is_504(px):
    target = path()
    with px.upstream() as upstream, connect(px["late"]) as client:
        client.send(upgrading(target))
        request_of(upstream.accept())
        assert response_of(client).status == 504
    px.one_line(target, r"\): 504")


def test_the_timeout_of_responses_does_not_end_a_tunnel(px):
    with upstream_for(px, "late") as upstream, connect(px["late"]) as client, connect(px["late"]) as other:
        wire = dial(client, upstream)
        other.send(get("/silent"))
        request_of(upstream.accept())
        assert response_of(other).status == 504  # so the time has passed for the tunnel, too
        client.send(b"still")
        assert wire.exactly(5) == b"still"
        wire.send(b"there")
        assert client.exactly(5) == b"there"


# --- handlers ----------------------------------------------------------------------------------------


def test_a_handlers_changes_reach_the_upstream(px):
    with px.upstream() as upstream, connect(px["handled"]) as client:
        client.send(upgrading("/chat", "websocket", "X-Asked: this", "Sec-WebSocket-Protocol: mine"))
        wire = upstream.accept()
        got = request_of(wire)
        assert got.line == "GET /changed HTTP/1.1"
        assert got.get("x-made") == "this"
        assert got.get("sec-websocket-protocol") == "other"
        assert got.get("upgrade") == "websocket"
        wire.send(switching())
        assert Message(client.head()).status == 101


def test_the_events_of_a_tunnel(px):
    target = path()
    with px.upstream() as upstream, connect(px["handled"]) as client:
        wire = dial(client, upstream, target=target)
        px.process.wait_log(rf"opened http://127.0.0.1:{px.up} {target}\n")
        client.send(b"12345")
        wire.exactly(5)
        wire.send(b"123")
        client.exactly(3)
        client.close()
        assert wire.ended()
        wire.close()
        line = px.process.wait_log(rf"closed http://127.0.0.1:{px.up} {target} (\d+) (\d+)\n")
        assert sorted(line.groups()) == ["3", "5"]
        fetch(px.status)
        assert px.process.log().count(f"closed http://127.0.0.1:{px.up} {target} ") == 1


def test_a_handler_may_close_a_tunnel(px):
    with px.upstream() as upstream, connect(px["handled"]) as client:
        client.send(upgrading("/close-at-once"))
        wire = upstream.accept()
        request_of(wire)
        wire.send(switching())
        cut_off(client)
        cut_off(wire)


def test_a_handler_cannot_break_an_upgrade(px):
    with px.upstream() as upstream, connect(px["evil"]) as client:
        client.send(upgrading())
        assert response_of(client).status == 500
        if upstream.connects_within(0.05):
            assert cut_off(upstream.wires[0]) == b""
    px.mark = len(px.process.log())  # what a handler raises is logged with its traceback
