"""A graceful stop with open tunnels."""

import contextlib
import os
import re
import signal

import pytest
from conditions import wait_for
from http_client import fetch
from proxy_harness import PLACES, buffers, came, cut_off, fill, proxied, request_of
from upgraded_connections import MB, dial, frame, frames, switching, upgrading
from upstream_sockets import connect

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
        # neither end responds to the close frame or closes its connection
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
@pytest.mark.parametrize("continues", [False, True])
def test_a_closing_frame_is_never_put_inside_another(direction, continues):
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
            if continues:
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
