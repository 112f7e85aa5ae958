"""A client or an upstream leaves in the middle of an exchange, or is late."""

import contextlib
import os
import re
import socket

import pytest
from proxy_harness import (
    ALL,
    EVERYWHERE,
    OK,
    PLACES,
    Message,
    asked,
    background,
    chunk,
    cut_off,
    final_of,
    get,
    name_of,
    path,
    request_of,
    response_of,
    upstream_for,
)
from upstream_sockets import connect

SERVERS = {
    **PLACES,
    "to_unix": "UNIX",
    "late": "UP, HOST, proxy_timeout=0.5",
    "inside_late": "UP, HOST, proxy_timeout=0.5",
    "hurried": "UP, HOST, agent=http_proxy.Agent(connect_timeout=0.5)",
    "nowhere": "'http://no-such-host.invalid:80'",
}


# --- the client goes ---------------------------------------------------------------------------------


def leave(client, how):
    if how == "resets":
        client.reset()
    else:
        client.close()


LEAVING = pytest.mark.parametrize(
    ("where", "how"),
    [("primary", "closes"), ("second", "closes"), ("second", "resets"), ("inside", "closes"), ("inside", "resets"),
     ("to_unix", "closes")],
)  # fmt: skip


@LEAVING
def test_the_client_goes_while_the_answer_is_awaited(px, where, how):
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(get())
        wire = upstream.accept()
        request_of(wire)
        leave(client, how)
        assert wire.ended()


@LEAVING
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_the_client_goes_inside_the_answer(px, where, how, framing):
    """While the target sends nothing: a failed write cannot reveal it."""
    head = {
        "length": b"Content-Length: 100\r\n\r\nabc",
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        "close": b"Connection: close\r\n\r\nabc",
    }[framing]
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\n" + head)
        client.until(b"abc")
        leave(client, how)
        assert wire.ended()


@LEAVING
def test_the_client_goes_while_it_is_sent_much(px, where, how):
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.head()
        block = chunk(b"x" * 65536)

        def flood():
            with pytest.raises(ConnectionError):
                while True:
                    wire.send(block)

        with background(flood):
            client.exactly(1 << 20)
            leave(client, how)


@LEAVING
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_client_goes_inside_its_request(px, where, how, framing):
    field = "Content-Length: 100" if framing == "length" else "Transfer-Encoding: chunked"
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(get("/", field, method="POST"))
        wire = upstream.accept()
        wire.head()
        client.send(b"abc" if framing == "length" else b"3\r\nabc\r\n")
        wire.until(b"abc" if framing == "length" else b"abc\r\n")
        leave(client, how)
        assert b"0\r\n" not in cut_off(wire)


@LEAVING
def test_the_client_goes_while_both_are_talking(px, where, how):
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(get("/", "Transfer-Encoding: chunked", method="POST"))
        wire = upstream.accept()
        wire.head()
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.until(b"abc\r\n")
        leave(client, how)
        assert not cut_off(wire)


@LEAVING
def test_the_client_leaves_a_body_that_is_not_read(px, where, how):
    """The upstream reads nothing, so what the client has sent cannot be handed on; it is missed all the same."""
    with upstream_for(px, where) as upstream:
        client = connect(px[where]).send(get("/", "Content-Length: 1000000000000", method="POST"))
        wire = upstream.accept()
        client.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                client.sock.send(b"x" * 65536)
        leave(client, how)
        assert wire.head()
        cut_off(wire)


# --- the upstream goes -------------------------------------------------------------------------------


PARTS = {
    "length": b"Content-Length: 100\r\n\r\nabc",
    "length, nothing yet": b"Content-Length: 100\r\n\r\n",
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "chunked, nothing yet": b"Transfer-Encoding: chunked\r\n\r\n",
    "inside a chunk": b"Transfer-Encoding: chunked\r\n\r\na\r\nabc",
    "inside a size": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1",
    "behind a chunk": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc",
    "inside the end": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    "inside the trailers": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-A: 1\r\n",
}


@EVERYWHERE
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("end", ["close", "reset"])
# a UNIX socket has no reset
@pytest.mark.leave_out(lambda where, end: where == "to_unix" and end == "reset")
def test_an_answer_that_breaks_off_is_not_taken_for_whole(px, where, part, end):
    target = path()
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\n" + PARTS[part])
        head = b"" if "nothing" in part else client.head()
        getattr(wire, end)()
        body = cut_off(client)
        if not head or body.startswith(b"HTTP/1.1"):
            head, _, body = body.partition(b"\r\n\r\n")
            head += b"\r\n\r\n"
        first = Message(head)
        if "nothing" in part and first.status == 502:
            return  # the head had not left yet
        assert first.status == 200
        assert b"HTTP/1.1" not in body
        if first.all("content-length"):
            assert len(body) < int(first.get("content-length"))
        else:
            assert first.get("transfer-encoding") == "chunked"
            assert not body.endswith(b"0\r\n\r\n")
            assert b"\r\n0\r\n" not in b"\r\n" + body
    px.one_line(target, rf"proxy: {name_of(px, where)}: .+ after [\d.]+ s \(GET {target}\)")


@pytest.mark.parametrize("where", ["second", "inside"])
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_client_of_http_1_0_sees_by_a_reset_that_an_answer_broke_off(px, where, end):
    """It knows no chunks: a clean end would tell it that the answer is whole."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(version="1.0"))
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        client.until(b"abc")
        getattr(wire, end)()
        with pytest.raises(ConnectionResetError):
            client.rest()


@EVERYWHERE
# a UNIX socket has no reset
@pytest.mark.leave_out(lambda where: where == "to_unix")
def test_a_reset_is_not_the_end_of_a_body_that_ends_with_its_connection(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        client.until(b"abc\r\n")
        wire.reset()
        assert b"0\r\n" not in cut_off(client)


@ALL
@pytest.mark.parametrize(
    "part", [b"", b"HTT", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"HTTP/1.1 103 X\r\n\r\n"]
)
@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_upstream_that_goes_before_its_answer_is_502(px, where, part, end):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target, "Content-Length: 3", method="POST") + b"abc")
        wire = upstream.accept()
        request_of(wire)
        wire.send(part)
        if part.startswith(b"HTTP/1.1 103"):
            assert Message(client.head()).status == 103  # or the reset might overtake it
        getattr(wire, end)()
        assert response_of(client).status == 502
        # the client's connection stays open
        asked(client, upstream, get("/next"))
    line = px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \(POST {target}\): 502")
    assert "Traceback" not in line


@ALL
def test_an_upstream_that_goes_while_the_client_still_sends_is_502(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Content-Length: 100", method="POST") + b"abc")
        wire = upstream.accept()
        wire.head()
        wire.exactly(3)
        wire.reset()
        assert response_of(client).status == 502


# --- time and refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["late", "inside_late"])
def test_a_late_answer_is_504(px, where):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)
        assert response_of(client).status == 504
        assert wire.ended()
    line = px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \(GET {target}\): 504")
    assert 0.5 <= float(re.search(r"after ([\d.]+) s", line)[1]) < 30


@pytest.mark.parametrize("where", ["late", "inside_late"])
@pytest.mark.parametrize("part", [b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_an_answer_that_stops_in_its_head_is_504(px, where, part):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)
        wire.send(part)
        assert final_of(client).status == 504
    px.one_line(target, r"\): 504")


@pytest.mark.parametrize("where", ["late", "inside_late"])
@pytest.mark.parametrize("part", ["length", "chunked", "inside a chunk"])
def test_an_answer_that_stops_in_its_body_is_cut_off(px, where, part):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\n" + PARTS[part])
        client.head()
        rest = cut_off(client)
        assert b"abc" in rest
        assert b"0\r\n\r\n" not in rest
        assert b"HTTP/" not in rest
        cut_off(wire)
    px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \(GET {target}\)")


@pytest.mark.parametrize("where", ["late", "inside_late"])
def test_a_slow_client_is_not_a_silent_upstream(px, where):
    """proxy_timeout is about the target: while the proxy waits for the request's body, the target may be silent."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Content-Length: 3", method="POST"))
        wire = upstream.accept()
        wire.head()
        with connect(px[where]) as other:
            other.send(get("/silent"))
            request_of(upstream.accept())
            assert final_of(other).status == 504  # so proxy_timeout has passed for the first request, too
        client.send(b"abc")
        assert wire.exactly(3) == b"abc"
        wire.send(OK)
        answer = response_of(client)
        assert answer.status in (200, 504)  # 504 only if the worker was not run in time
        assert answer.status == 200


@EVERYWHERE
def test_a_target_that_refuses_is_502(px, where):
    if os.path.exists(px.unix):
        os.unlink(px.unix)
    target = path()
    with connect(px[where]) as client:
        client.send(get(target, "Content-Length: 3", method="POST") + b"abc")
        answer = response_of(client)
        assert answer.status == 502
        assert str(px.up) not in answer.body.decode()  # clients are not told what is behind
        assert "up.sock" not in answer.body.decode()
        px.one_line(target, rf"proxy: {name_of(px, where)}: .+ after [\d.]+ s \(POST {target}\): 502")
        # the client's connection stays open
        with upstream_for(px, where) as upstream:
            asked(client, upstream)


def test_a_stale_unix_socket_refuses(px):
    target = path()
    with px.unix_upstream():
        pass
    assert os.path.exists(px.unix)
    with connect(px["to_unix"]) as client:
        assert response_of(client.send(get(target))).status == 502
    px.one_line(target, r"\): 502")


def test_a_name_that_does_not_resolve_is_502(px):
    target = path()
    with connect(px["nowhere"]) as client:
        client.sock.settimeout(120)
        assert response_of(client.send(get(target))).status in (502, 504)
    px.one_line(target, rf"proxy: http://no-such-host.invalid.*: .+ after [\d.]+ s \(GET {target}\): 50[24]")


def test_connecting_that_takes_too_long_is_504(px):
    """A listener whose queue is full does not answer at all."""
    target = path()
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", px.up))
        full.listen(0)
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(("127.0.0.1", px.up))
            except TimeoutError:
                break
        else:
            raise AssertionError("the queue cannot be filled here")
        with connect(px["hurried"]) as client:
            assert response_of(client.send(get(target))).status == 504
    px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \(GET {target}\): 504")


def test_a_unix_socket_whose_queue_is_full(px):
    """connect() fails with EAGAIN at once there; the proxy tries again, because there may be room a moment later."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(px.unix)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(px.unix)
        listener.listen(1)
        listener.settimeout(30)
        clients = [stack.enter_context(connect(px["to_unix"])) for _ in range(20)]
        for client in clients:
            client.send(get("/crowd"))

        def serve():
            from upstream_sockets import Wire

            for _ in clients:
                sock, _ = listener.accept()
                stack.callback(sock.close)
                wire = Wire(sock)
                request_of(wire)
                wire.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

        with background(serve):
            assert [response_of(client).status for client in clients] == [200] * 20
