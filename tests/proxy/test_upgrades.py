"""Upgraded connections through the proxy: every byte, both ends of both directions, and a graceful stop."""

import contextlib
import hashlib
import os
import re
import resource
import signal
import struct
import time

import pytest
from conftest import fetch, wait_for
from proxy_harness import (
    OK,
    PLACES,
    Message,
    background,
    buffers,
    came,
    cut_off,
    fill,
    get,
    path,
    proxied,
    request_of,
    response_of,
)
from upstream_sockets import connect

MB = 1 << 20

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
    "brief": "UP, HOST, ws_timeout=0.5",
    "patient": "UP, HOST, ws_timeout=4",
    "late": "UP, HOST, proxy_timeout=0.5",
    "handled": "UP, HOST",
    "evil": "UP, HOST",
}

#: ``inside_ws`` is an app that calls ``proxy.ws``.
EVERYWHERE = pytest.mark.parametrize("where", [*PLACES, "to_unix", "inside_ws"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["websocket", "tcp"])


@pytest.fixture(scope="module")
def shared():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 16384) if before[1] > 0 else 16384, before[1]))
    try:
        with proxied(
            {**SERVERS, "inside_ws": "UP, HOST"}, "--worker-connections", 5000, after=HANDLERS
        ) as px:
            yield px
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def px(shared):
    yield shared
    fetch(shared.status)
    shared.quiet()


def upgrading(target="/chat", protocol="websocket", *fields, method="GET", version="1.1"):
    return get(
        target, "Connection: keep-alive, Upgrade", f"Upgrade: {protocol}", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Origin: http://client.example", *fields,
        method=method, version=version,
    )  # fmt: skip


def switching(protocol="websocket"):
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + protocol.encode() + b"\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nX-Answer: 1\r\n\r\n"
    )


def upstream_for(px, where):
    return px.unix_upstream() if where == "to_unix" else px.upstream()


@contextlib.contextmanager
def tunnel(px, where="primary", protocol="websocket", target="/chat"):
    """Both ends of an upgraded connection."""
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        yield client, dial(client, upstream, protocol, target)


def dial(client, upstream, protocol="websocket", target="/chat"):
    client.send(upgrading(target, protocol))
    wire = upstream.accept()
    request_of(wire)
    wire.send(switching(protocol))
    assert Message(client.head()).status == 101
    return wire


def frame(payload=b"", opcode=1, mask=False, fin=True):
    bit, key = (0x80, b"\x11\x22\x33\x44") if mask else (0, b"")
    head = bytes([(0x80 if fin else 0) | opcode])
    size = len(payload)
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    return head + key + masked(payload, key)


def masked(data, key):
    return bytes(byte ^ key[n % 4] for n, byte in enumerate(data)) if key else data


def frames(data):
    """All frames of a stream: opcode, payload, whether it was masked; and what is left of one."""
    found = []
    while True:
        if len(data) < 2:
            return found, data
        size, at = data[1] & 0x7F, 2
        if size == 126:
            if len(data) < 4:
                return found, data
            (size,), at = struct.unpack(">H", data[2:4]), 4
        elif size == 127:
            if len(data) < 10:
                return found, data
            (size,), at = struct.unpack(">Q", data[2:10]), 10
        key = b""
        if data[1] & 0x80:
            key, at = data[at : at + 4], at + 4
        if len(data) < at + size:
            return found, data
        found.append((data[0] & 0x0F, masked(data[at : at + size], key), bool(data[1] & 0x80)))
        data = data[at + size :]


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
    """Its answer is an ordinary one; what the client sends on is no tunnel's, but a request like others."""
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
        if "end" not in case:
            # on whichever connection, if at all: as a request, not as a tunnel's bytes
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
def test_what_is_no_upgrade_is_an_ordinary_request(px, where, request_):
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
def test_a_switch_to_what_nobody_asked_for_is_502(px, where, answer):
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
def test_an_upgrade_whose_upstream_goes_is_502(px, where, sent):
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


def test_the_timeout_of_answers_is_none_of_a_tunnels(px):
    with tunnel(px, "late") as (client, wire):
        time.sleep(1)
        client.send(b"still")
        assert wire.exactly(5) == b"still"
        wire.send(b"there")
        assert client.exactly(5) == b"there"


# --- ends --------------------------------------------------------------------------------------------


@EVERYWHERE
@PROTOCOLS
def test_the_client_says_no_more_and_still_listens(px, where, protocol):
    with tunnel(px, where, protocol) as (client, wire):
        client.send(b"the last")
        client.finish()
        assert wire.rest() == b"the last"
        for _ in range(3):
            wire.send(b"answer")
            assert client.exactly(6) == b"answer"
        wire.send(os.urandom(200_000))
        client.exactly(200_000)
        wire.close()
        assert client.rest() == b""


@EVERYWHERE
@PROTOCOLS
def test_the_upstream_says_no_more_and_still_listens(px, where, protocol):
    with tunnel(px, where, protocol) as (client, wire):
        wire.send(b"the last")
        wire.finish()
        assert client.rest() == b"the last"
        for _ in range(3):
            client.send(b"answer")
            assert wire.exactly(6) == b"answer"
        client.send(os.urandom(200_000))
        wire.exactly(200_000)
        client.close()
        assert wire.rest() == b""


@EVERYWHERE
def test_half_closed_at_once(px, where):
    """Everything and the end in the same moment as the 101."""
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(upgrading("/", "tcp") + b"all of it")
        wire = upstream.accept()
        request_of(wire)
        wire.send(switching("tcp") + b"all of that")
        wire.finish()
        assert Message(client.head()).status == 101
        assert client.rest() == b"all of that"
        client.finish()
        assert wire.rest() == b"all of it"


@EVERYWHERE
@pytest.mark.parametrize("first", ["client", "upstream"])
@pytest.mark.parametrize("how", ["close", "finish", "reset"])
# a UNIX socket has no reset
@pytest.mark.leave_out(
    lambda where, first, how: (
        how == "reset" and (first, where) in (("client", "primary"), ("upstream", "to_unix"))
    )
)
def test_whoever_ends_it_the_other_sees_it_and_nothing_stays(px, where, first, how):
    with upstream_for(px, where) as upstream:
        with connect(px[where]) as client:  # what an earlier test has left goes
            client.send(upgrading())
            upstream.accept()
        wait_for(lambda: still(px), "the descriptors to settle")
        sockets, pipes = px.sockets(), px.pipes()
        for _ in range(5):
            client = connect(px[where])
            wire = dial(client, upstream)
            one, other = (client, wire) if first == "client" else (wire, client)
            one.send(b"bye")
            assert other.exactly(3) == b"bye"
            getattr(one, how)()
            assert other.ended()
            other.close()
            if how == "finish":
                assert one.ended()
                one.close()
        wait_for(
            lambda: px.sockets() <= sockets and px.pipes() <= pipes,
            lambda: f"{sockets} sockets, {pipes} pipes; now {px.sockets()}, {px.pipes()}",
        )


def still(px):
    """Whether the worker's sockets stay the same for a while."""
    seen = []
    for _ in range(10):
        seen.append(px.sockets())
        time.sleep(0.02)
    return len(set(seen)) == 1


@EVERYWHERE
def test_what_was_sent_before_the_end_arrives(px, where):
    """Much of it, and the end right behind."""
    data = os.urandom(3 * MB)
    for first in ("client", "upstream"):
        with tunnel(px, where, "tcp") as (client, wire):
            one, other = (client, wire) if first == "client" else (wire, client)
            with background(lambda one=one: (one.send(data), one.finish())):
                assert hashlib.sha256(other.rest()).digest() == hashlib.sha256(data).digest()


def test_a_tunnels_connection_is_not_used_again(px):
    with px.upstream() as upstream, connect(px["primary"]) as client:
        wire = dial(client, upstream)
        client.close()
        assert wire.ended()
        with connect(px["primary"]) as other:
            other.send(get("/next"))
            again = upstream.accept()
            assert request_of(again).target == "/next"
            again.send(OK)
            assert response_of(other).body == b"ok"


def test_a_silent_tunnel_ends_after_its_timeout(px):
    with tunnel(px, "brief") as (client, wire):
        assert client.ended()
        assert wire.ended()


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_tunnel_that_one_side_speaks_in_is_not_silent(px, direction):
    with tunnel(px, "patient") as (client, wire):
        one, other = (wire, client) if direction == "down" else (client, wire)
        begun, last, longest = time.monotonic(), time.monotonic(), 0.0
        while time.monotonic() - begun < 5.5:
            time.sleep(0.25)
            longest = max(longest, time.monotonic() - last)
            try:
                one.send(b"x")
                assert other.exactly(1) == b"x"
            except (AssertionError, OSError):
                assert longest > 2, "it was ended, and nobody was silent"  # else the machine was
                return
            last = time.monotonic()


# --- traffic -----------------------------------------------------------------------------------------


@EVERYWHERE
def test_pings_and_all_other_frames_go_through_as_they_are(px, where):
    with tunnel(px, where) as (client, wire):
        up = [
            frame(b"ping", 9, mask=True), frame(b"pong", 10, mask=True), frame(b"a", 1, mask=True, fin=False),
            frame(b"in between", 9, mask=True), frame(b"b", 0, mask=True), frame(b"\xff" * 126, 2, mask=True),
            frame(b"x" * 65535, 2, mask=True), frame(b"", 1, mask=True), b"\xf7\xff no frame at all",
        ]  # fmt: skip
        down = [
            frame(b"ping", 9),
            frame(b"x" * 65536, 2),
            frame(b"\x03\xe8bye", 8),
            b"\x00\x01\x02 none either",
        ]
        for data in up:
            client.send(data)
            assert wire.exactly(len(data)) == data
        for data in down:
            wire.send(data)
            assert client.exactly(len(data)) == data


@EVERYWHERE
def test_byte_by_byte(px, where):
    with tunnel(px, where) as (client, wire):
        for byte in frame(b"hello", 1, mask=True):
            client.send(bytes([byte]))
            assert wire.exactly(1) == bytes([byte])
        for byte in frame(b"hello"):
            wire.send(bytes([byte]))
            assert client.exactly(1) == bytes([byte])


def pattern(total):
    block = os.urandom(MB)
    for number in range(total // MB):
        yield struct.pack(">Q", number) + block[8:]


def pour(wire, total):
    digest = hashlib.blake2b()
    for piece in pattern(total):
        digest.update(piece)
        wire.send(piece)
    return digest.hexdigest()


def drink(wire, total):
    digest = hashlib.blake2b(wire.data[:total])
    left = total - len(wire.data[:total])
    buffer = memoryview(bytearray(256 * 1024))
    while left:
        size = wire.sock.recv_into(buffer[: min(left, len(buffer))])
        assert size, f"ended, {left} bytes are missing"
        digest.update(buffer[:size])
        left -= size
    return digest.hexdigest()


@EVERYWHERE
def test_much_both_ways_at_once(px, where):
    total = 40 * MB
    with tunnel(px, where, "tcp") as (client, wire):
        with (
            background(pour, client, total) as up,
            background(pour, wire, total) as down,
            background(drink, wire, total) as came_up,
        ):
            came_down = drink(client, total)
        assert came_up == up
        assert [came_down] == down


@EVERYWHERE
@PROTOCOLS
@pytest.mark.parametrize("direction", ["down", "up"])
def test_whoever_does_not_read_is_waited_for(px, where, protocol, direction):
    with tunnel(px, where, protocol) as (client, wire):
        one, other = (wire, client) if direction == "down" else (client, wire)
        block = frame(os.urandom(100_000), 2, mask=direction == "up")
        before = px.rss()
        sent = fill(one.sock, block, 2 * buffers() + 8 * MB)
        assert px.rss() < before + 24 * MB
        # the other direction goes on meanwhile
        other.send(b"hello")
        assert one.exactly(5) == b"hello"
        expected = hashlib.sha256((block * (sent // len(block) + 1))[:sent]).digest()
        assert hashlib.sha256(other.exactly(sent)).digest() == expected


def test_memory_does_not_grow_with_what_goes_through(px):
    total = 200 * MB
    with tunnel(px, "primary", "tcp") as (client, wire):
        before = px.rss()
        for one, other in ((client, wire), (wire, client)):
            with background(pour, one, total) as sent:
                received = drink(other, total)
            assert [received] == sent
            assert px.rss() < before + 16 * MB


@pytest.mark.parametrize("where", ["primary", "second", "inside"])
def test_five_hundred_tunnels_at_once(px, where):
    with px.upstream() as upstream, contextlib.ExitStack() as stack:
        wait_for(lambda: still(px), "the descriptors to settle")
        before = px.sockets()
        pairs = []
        for _ in range(500):
            client = stack.enter_context(connect(px[where]))
            pairs.append((client, dial(client, upstream)))
        for number, (client, wire) in enumerate(pairs):
            client.send(b"up %03d" % number)
            wire.send(b"down %03d" % number)
        for number, (client, wire) in reversed(list(enumerate(pairs))):
            assert wire.exactly(6) == b"up %03d" % number
            assert client.exactly(8) == b"down %03d" % number
        with connect(px[where]) as other:  # beside them, an ordinary request
            other.send(get("/beside"))
            again = upstream.accept()
            request_of(again)
            again.send(OK)
            assert response_of(other).body == b"ok"
            again.close()
        for number, (client, wire) in enumerate(pairs):
            (client if number % 2 else wire).close()
        for number, (client, wire) in enumerate(pairs):
            assert (wire if number % 2 else client).ended()
            (wire if number % 2 else client).close()
        wait_for(lambda: px.sockets() <= before, lambda: f"{before} sockets, now {px.sockets()}")


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


# --- a graceful stop ---------------------------------------------------------------------------------

CLOSE = (8, b"\x03\xe9")
STOPS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])


@contextlib.contextmanager
def stopping(ws_stop, timeout=300):
    arguments = f"UP, HOST, ws_stop={ws_stop!r}"
    servers = dict.fromkeys(PLACES, arguments)
    with (
        proxied(servers, "--graceful-timeout", timeout, "--timeout", 0, "--keep-alive", 1) as px,
        px.upstream() as upstream,
        contextlib.ExitStack() as stack,
    ):

        def opened(where="primary", protocol="websocket"):
            client = stack.enter_context(connect(px[where]))
            return client, dial(client, upstream, protocol)

        yield px, opened, upstream


def gone(px, worker):
    wait_for(
        lambda: worker not in px.process.workers(), lambda: f"the worker's end\n{px.process.log()[-3000:]}"
    )


def is_close(data, mask):
    found, left = frames(data)
    assert not left, data
    ((opcode, payload, was_masked),) = found
    assert (opcode, payload[:2], was_masked) == (*CLOSE, mask), data
    return True


@STOPS
@pytest.mark.parametrize("where", list(PLACES))
def test_a_graceful_stop_closes_websockets_with_1001(number, where):
    with stopping("close") as (px, opened, _):
        client, wire = opened(where)
        big = frame(os.urandom(70_000), 2, mask=True)
        for data in (frame(b"hello", mask=True), big, frame(b"", 9, mask=True)):
            client.send(data)
            assert wire.exactly(len(data)) == data
        for data in (frame(b"x" * 200), frame(b"part", fin=False)):
            wire.send(data)
            assert client.exactly(len(data)) == data
        unused, unused_wire = opened(where)  # without a frame ever
        worker = px.worker
        px.process.signal(number)
        # nobody answers the closing frame, and nobody hangs up
        assert is_close(cut_off(client), mask=False)
        assert is_close(cut_off(wire), mask=True)
        assert is_close(cut_off(unused), mask=False)
        assert is_close(cut_off(unused_wire), mask=True)
        gone(px, worker)
        assert "Traceback" not in px.process.log()
        assert "graceful timeout" not in px.process.log()
        if number == signal.SIGTERM:
            assert px.process.wait_end() == 0


HALVES = {
    "first byte": 1,
    "length": 2,
    "inside the extended length": 3,
    "inside the payload": 30,
    "all but one": -1,
}


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_closing_frame_is_never_put_inside_another(direction, goes_on):
    """All places of a frame at once, each in a tunnel of its own."""
    with stopping("close") as (px, opened, _):
        mask = direction == "up"
        whole = frame(b"p" * 300, 2, mask=mask)
        tunnels = []
        for cut in HALVES.values():
            client, wire = opened()
            one, other = (wire, client) if direction == "down" else (client, wire)
            one.send(frame(b"first", mask=mask))
            first = other.exactly(len(frame(b"first", mask=mask)))
            assert first == frame(b"first", mask=mask)
            one.send(whole[:cut])
            # the proxy may keep back what is not whole
            tunnels.append((one, other, whole[:cut], whole[cut:]))
        fetch(px.status)
        worker = px.worker
        px.process.signal(signal.SIGTERM)
        px.process.wait_log("Handling signal: term")
        for one, other, _, behind in tunnels:
            if goes_on:
                with contextlib.suppress(OSError):
                    one.send(behind)
            data = cut_off(other)
            found, left = frames(data)
            for opcode, payload, was_masked in found:
                if opcode == 8:
                    assert (payload[:2], was_masked) == (CLOSE[1], mask)
                else:
                    assert (opcode, payload) == (2, b"p" * 300)
            assert [opcode for opcode, *_ in found] in ([], [2], [8], [2, 8]), found
            assert whole.startswith(left)
            if left:
                assert found == []
            # the direction whose frames are whole is closed in order
            back, rest = frames(cut_off(one))
            assert not rest
            assert [(opcode, payload[:2], m) for opcode, payload, m in back] in ([], [(*CLOSE, not mask)])
        gone(px, worker)
        assert "graceful timeout" not in px.process.log()


def test_a_side_that_does_not_read_does_not_keep_the_worker():
    with stopping("close") as (px, opened, _):
        client, wire = opened("second")
        block = frame(os.urandom(50_000), 2)
        fill(wire.sock, block, 2 * buffers() + 8 * MB)
        worker = px.worker
        px.process.signal(signal.SIGTERM)
        gone(px, worker)
        assert "graceful timeout" not in px.process.log()
        # what arrived is whole frames, a closing one, or a cut
        found, _ = frames(cut_off(client))
        assert {opcode for opcode, *_ in found[:-1]} <= {2}
        assert {payload for opcode, payload, _ in found if opcode == 2} <= {block[-50_000:]}


@STOPS
def test_a_graceful_stop_waits_for_websockets_if_told_to(number):
    with stopping("wait") as (px, opened, _):
        pairs = [opened(where) for where in PLACES]
        worker = px.worker
        px.process.signal(number)
        if number == signal.SIGHUP:
            wait_for(lambda: len(px.process.workers()) == 2, "the next worker")
        px.process.wait_log(r"Handling signal: (term|hup)")
        for client, wire in pairs:
            for count in range(5):
                client.send(b"up %d" % count)
                assert wire.exactly(4) == b"up %d" % count
                wire.send(b"dn %d" % count)
                assert client.exactly(4) == b"dn %d" % count
        assert worker in px.process.workers()
        for client, wire in pairs:
            client.close()
            assert wire.rest() == b""  # and no closing frame of ours
            wire.close()
        gone(px, worker)
        assert "graceful timeout" not in px.process.log()


@STOPS
@pytest.mark.parametrize("where", list(PLACES))
def test_other_upgrades_are_always_waited_for(number, where):
    with stopping("close") as (px, opened, _):
        client, wire = opened(where, "tcp")
        worker = px.worker
        px.process.signal(number)
        px.process.wait_log(r"Handling signal: (term|hup)")
        client.send(b"hello")
        assert wire.exactly(5) == b"hello"
        wire.send(b"there")
        assert client.exactly(5) == b"there"
        assert not came(client)
        assert worker in px.process.workers()
        wire.close()
        assert client.rest() == b""
        client.close()
        gone(px, worker)


def test_waiting_ends_with_the_graceful_timeout():
    with stopping("wait", timeout=1) as (px, opened, _):
        client, wire = opened()
        worker = px.worker
        px.process.signal(signal.SIGTERM)
        cut_off(client)
        cut_off(wire)
        gone(px, worker)
        assert px.process.wait_end() == 0


def test_an_upgrade_that_is_answered_after_the_stop_has_begun():
    """It is neither lost nor left over: carried or refused, and the worker goes."""
    with stopping("close") as (px, _, upstream), connect(px["primary"]) as client:
        client.send(upgrading())
        wire = upstream.accept()
        request_of(wire)
        worker = px.worker
        px.process.signal(signal.SIGTERM)
        px.process.wait_log("Handling signal: term")
        with contextlib.suppress(ConnectionError):
            wire.send(switching())
        data = cut_off(client)
        assert re.match(rb"HTTP/1\.1 (101|50\d) ", data) or not data, data
        gone(px, worker)
        assert "graceful timeout" not in px.process.log()
