"""Tunnels: every byte arrives, and each side learns of the end of the other."""

import contextlib
import hashlib
import os
import resource
import struct
import time

import pytest
from conditions import wait_for
from proxy_harness import (
    OK,
    PLACES,
    Message,
    background,
    buffers,
    fill,
    get,
    proxied,
    request_of,
    response_of,
    upstream_for,
)
from upgraded_connections import EVERYWHERE, MB, PROTOCOLS, dial, frame, switching, tunnel, upgrading
from upstream_sockets import connect

SERVERS = {
    **PLACES,
    "to_unix": "UNIX",
    "brief": "UP, HOST, ws_timeout=0.5",
    "patient": "UP, HOST, ws_timeout=4",
    "inside_ws": "UP, HOST",
}


@pytest.fixture(scope="module")
def shared():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 16384) if before[1] > 0 else 16384, before[1]))
    try:
        with proxied(SERVERS, "--worker-connections", 5000) as px:
            yield px
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- ends --------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("protocol", ["tcp"])  # a WebSocket has no half-close
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
@pytest.mark.parametrize("protocol", ["tcp"])  # a WebSocket has no half-close
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
                assert longest > 2, "it was ended, and neither end was silent"  # else the machine was
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
        # the other direction continues meanwhile
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
