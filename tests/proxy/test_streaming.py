"""The proxy hands on what has come, when it has come, both ways; and holds nothing but what its peers do not take."""

import contextlib
import gzip
import hashlib
import os
import time

import pytest
from conditions import wait_for
from proxy_harness import (
    ALL,
    EVERYWHERE,
    OK,
    PLACES,
    Message,
    background,
    buffers,
    came,
    chunk,
    cut_off,
    elapsed,
    fill,
    final_of,
    get,
    path,
    request_of,
    response_of,
)
from upstream_sockets import connect

MB = 1 << 20

SERVERS = {**PLACES, "to_unix": "UNIX"}


@contextlib.contextmanager
def talking(px, where, request):
    """A client that has asked, and the upstream's end."""
    with (
        px.unix_upstream() if where == "to_unix" else px.upstream() as upstream,
        connect(px[where]) as client,
    ):
        client.send(request)
        yield client, upstream.accept()


FRAMINGS = pytest.mark.parametrize("framing", ["length", "chunked"])
HEADS = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
}


def head_for(framing, length):
    return HEADS[framing].replace(b"%d", str(length).encode())


# --- at once -----------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_answer_comes_down_head_first_and_byte_by_byte(px, where, framing):
    with talking(px, where, get()) as (client, wire):
        request_of(wire)
        wire.send(head_for(framing, 5))
        head = Message(client.head())  # before there is a byte of the body
        assert head.status == 200
        for byte in (b"a", b"b", b"c", b"d", b"e"):
            wire.send(chunk(byte) if framing == "chunked" else byte)
            client.until(byte + (b"" if framing == "length" else b"\r\n"))
        if framing == "chunked":
            wire.send(b"0\r\n\r\n")
        elif framing == "close":
            wire.close()
        if framing != "length":
            assert client.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        assert not came(client)


@EVERYWHERE
@FRAMINGS
def test_a_request_goes_up_head_first_and_byte_by_byte(px, where, framing):
    field = "Content-Length: 5" if framing == "length" else "Transfer-Encoding: chunked"
    with talking(px, where, get("/", field, method="POST")) as (client, wire):
        head = Message(wire.head())
        assert head.get("content-length") == ("5" if framing == "length" else None)
        assert head.get("transfer-encoding") == (None if framing == "length" else "chunked")
        for byte in (b"a", b"b", b"c", b"d", b"e"):
            client.send(chunk(byte) if framing == "chunked" else byte)
            wire.until(byte + (b"" if framing == "length" else b"\r\n"))
        if framing == "chunked":
            client.send(b"0\r\n\r\n")
            assert wire.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        wire.send(OK)
        assert response_of(client).body == b"ok"


@ALL
@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_server_sent_events(px, where, framing):
    with talking(px, where, get("/events", "Accept: text/event-stream", "Last-Event-ID: 7")) as (
        client,
        wire,
    ):
        assert request_of(wire).get("last-event-id") == "7"
        wire.send(
            head_for(framing, 0)[:-2] + b"Content-Type: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"
        )
        assert Message(client.head()).get("content-type") == "text/event-stream"
        for number in range(20):
            event = b"id: %d\ndata: thing\n\n" % number
            wire.send(chunk(event) if framing == "chunked" else event)
            client.until(event)


@ALL
def test_the_answer_in_the_same_piece_as_its_head(px, where):
    """Small answers in one piece, in two, and a piece that ends inside the head."""
    for cuts in ((), (20,), (len(OK) - 2,), (len(OK) - 1,), tuple(range(1, len(OK)))):
        with talking(px, where, get()) as (client, wire):
            request_of(wire)
            for start, end in zip((0, *cuts), (*cuts, len(OK)), strict=True):
                wire.send(OK[start:end])
            assert response_of(client).body == b"ok"


@ALL
@FRAMINGS
def test_a_request_body_cut_anywhere(px, where, framing):
    body = b"hello" if framing == "length" else b"3;ext=1\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
    field = "Content-Length: 5" if framing == "length" else "Transfer-Encoding: chunked"
    request = get("/", field, method="PUT") + body
    with px.upstream() as upstream, connect(px[where]) as client:
        wire = None
        for cut in range(len(request) - len(body) - 3, len(request)):
            client.send(request[:cut])
            client.send(request[cut:])
            wire = wire or upstream.accept()
            assert request_of(wire).body == b"hello"
            wire.send(OK)
            assert response_of(client).body == b"ok"


# --- back-pressure -----------------------------------------------------------------------------------


BLOCK = os.urandom(MB)


@EVERYWHERE
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_upstream_waits_for_a_client_that_does_not_read(px, where, framing):
    with talking(px, where, get()) as (client, wire):
        request_of(wire)
        wire.send(head_for(framing, 1 << 40))
        block = chunk(BLOCK) if framing == "chunked" else BLOCK
        fill(wire.sock, block, 2 * buffers() + 8 * MB)
        client.close()
        assert not cut_off(wire)


@EVERYWHERE
@FRAMINGS
def test_a_client_waits_for_an_upstream_that_does_not_read(px, where, framing):
    field = f"Content-Length: {1 << 40}" if framing == "length" else "Transfer-Encoding: chunked"
    with talking(px, where, get("/", field, method="POST")) as (client, wire):
        wire.head()
        block = chunk(BLOCK) if framing == "chunked" else BLOCK
        fill(client.sock, block, 2 * buffers() + 8 * MB)
        wire.close()
        client.close()


@EVERYWHERE
@FRAMINGS
def test_memory_does_not_grow_with_a_body(px, where, framing):
    total, growth = 200 * MB, 16 * MB
    block = chunk(BLOCK) if framing == "chunked" else BLOCK
    end = b"0\r\n\r\n" if framing == "chunked" else b""
    field = f"Content-Length: {total}" if framing == "length" else "Transfer-Encoding: chunked"

    def send(wire):
        for _ in range(total // MB):
            wire.send(block)
        wire.send(end)

    def drain(wire):
        """Read to the body's end; the most memory that the worker had meanwhile."""
        buffer, taken, most, tail = bytearray(MB), 0, 0, b""
        while taken < total or not tail.endswith(end):
            size = wire.sock.recv_into(buffer)
            assert size, "ended early"
            tail = (tail + buffer[max(0, size - 5) : size])[-5:]
            if (taken + size) // (16 * MB) != taken // (16 * MB):
                most = max(most, px.rss())
            taken += size
        return most

    with talking(px, where, get("/", field, method="POST")) as (client, wire):
        wire.head()
        before = px.rss()
        with background(send, client):
            assert drain(wire) < before + growth
        wire.send(head_for(framing, total))
        Message(client.head())
        with background(send, wire):
            assert drain(client) < before + growth


# --- 100-continue ------------------------------------------------------------------------------------


EXPECTING = get("/", "Expect: 100-continue", "Content-Length: 5", method="POST")


@ALL
def test_100_continue_is_the_upstreams_to_say(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        begun = time.monotonic()
        client.send(EXPECTING)
        wire = upstream.accept()
        head = Message(wire.head())
        assert head.get("expect") == "100-continue"
        assert head.get("content-length") == "5"
        early = came(client)
        # after a moment the proxy may send the body without the upstream's 100
        assert not early or elapsed(begun) > 0.5, early
        if not early:
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert Message(client.head()).status == 100
        client.send(b"hello")
        assert wire.exactly(5) == b"hello"
        wire.send(OK)
        assert response_of(client).body == b"ok"
        # no second 100, and the connection stays open
        client.send(get("/next"))
        assert request_of(wire).target == "/next"
        wire.send(OK)
        assert response_of(client).status == 200


@ALL
def test_a_body_that_was_sent_without_waiting_is_held_until_the_upstreams_100(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        begun = time.monotonic()
        client.send(EXPECTING + b"hello")
        wire = upstream.accept()
        assert Message(wire.head()).get("expect") == "100-continue"
        early = came(wire)
        assert not early or elapsed(begun) > 0.5, early
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert early or wire.exactly(5) == b"hello"
        wire.send(OK)
        assert final_of(client).body == b"ok"


@ALL
@pytest.mark.parametrize("status", [b"413 Too Large", b"417 No", b"401 Who", b"200 OK"])
@pytest.mark.parametrize("sent", [b"", b"hello"])
def test_a_final_answer_in_place_of_100(px, where, status, sent):
    with px.upstream() as upstream, connect(px[where]) as client:
        begun = time.monotonic()
        client.send(EXPECTING + sent)
        wire = upstream.accept()
        wire.head()
        late = elapsed(begun) > 0.5
        wire.send(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nsaid")
        answer = response_of(client)
        assert late or answer.status == int(status[:3]), answer
        if answer.status >= 200:
            assert answer.body == b"said"
        # whether the client sends its body now or not: no byte of it may be taken for a request
        with contextlib.suppress(ConnectionError):
            client.send(b"hello" if not sent else b"")
            client.send(get("/behind"))
        if got := cut_off_or_answer(client, wire, upstream):
            assert got.target == "/behind"


def cut_off_or_answer(client, wire, upstream):
    """The next request, wherever the proxy sends it; ``None`` when it has closed the client's connection."""
    for each in (wire, None):
        if each is None:
            if not upstream.connects_within(0.3):
                return None
            each = upstream.wires[-1]
        with contextlib.suppress(AssertionError, ConnectionError, TimeoutError):
            each.sock.settimeout(0.5)
            got = Message(each.head())
            each.send(OK)
            return got
    return None


@ALL
def test_an_upstream_that_says_nothing_gets_the_body_after_a_moment(px, where):
    """Of a client that does not wait; one that waits is told to send it."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(EXPECTING + b"hello")
        wire = upstream.accept()
        wire.head()
        assert wire.exactly(5) == b"hello"
        wire.send(OK)
        assert final_of(client).body == b"ok"


@ALL
def test_a_client_that_waits_for_100_is_not_left_waiting_by_a_silent_upstream(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(EXPECTING)
        wire = upstream.accept()
        wire.head()
        assert response_of(client).status == 100
        client.send(b"hello")
        assert wire.exactly(5) == b"hello"
        wire.send(OK)
        assert response_of(client).body == b"ok"


@ALL
def test_a_late_100_of_the_upstream_is_not_sent_to_the_client_again(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(EXPECTING + b"hello")
        wire = upstream.accept()
        wire.head()
        assert wire.exactly(5) == b"hello"
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
        seen = [response_of(client).status]
        while seen[-1] < 200:
            seen.append(response_of(client).status)
        assert seen in ([200], [100, 200])


# --- interim answers ---------------------------------------------------------------------------------


@ALL
def test_interim_answers_come_down_at_once_and_in_order(px, where):
    with talking(px, where, get()) as (client, wire):
        request_of(wire)
        for status, link in (
            ("103 Early Hints", "</a.css>"),
            ("102 Processing", ""),
            ("103 Early Hints", "b"),
        ):
            field = f"Link: {link}\r\nLink: second\r\n" if link else ""
            wire.send(f"HTTP/1.1 {status}\r\n{field}\r\n".encode())
            interim = Message(client.head())
            assert interim.status == int(status[:3])
            assert interim.all("link") == ([link, "second"] if link else [])
            assert not interim.all("content-length")
            assert not interim.all("transfer-encoding")
        wire.send(OK)
        answer = response_of(client)
        assert (answer.status, answer.body, answer.all("link")) == (200, b"ok", [])


@ALL
def test_interim_and_final_answers_in_one_piece(px, where):
    with talking(px, where, get()) as (client, wire):
        request_of(wire)
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK)
        assert [response_of(client).status for _ in range(3)] == [103, 102, 200]


@ALL
def test_a_client_of_http_1_0_gets_no_interim_answer(px, where):
    with talking(px, where, get(version="1.0")) as (client, wire):
        request_of(wire)
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK)
        assert response_of(client).status == 200


# --- trailers ----------------------------------------------------------------------------------------


@ALL
def test_trailers_of_an_answer(px, where):
    with talking(px, where, get("/", "TE: trailers", "Connection: TE")) as (client, wire):
        request_of(wire)
        wire.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, X-More\r\n\r\n"
            b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-More: a\r\nX-More: b\r\n\r\n"
        )
        answer = response_of(client)
        assert answer.body == b"abc"
        assert [(n.lower(), v) for n, v in answer.trailers] == [
            ("x-sum", "1"),
            ("x-more", "a"),
            ("x-more", "b"),
        ]
        assert answer.get("trailer") == "X-Sum, X-More"
        assert "x-sum" not in answer.names()


@ALL
def test_trailers_of_a_request(px, where):
    request = get("/", "Transfer-Encoding: chunked", "Trailer: X-Sum", method="POST")
    with talking(px, where, request + b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n") as (client, wire):
        got = request_of(wire)
        assert got.body == b"abc"
        assert [(n.lower(), v) for n, v in got.trailers] == [("x-sum", "1"), ("x-more", "2")]
        assert "x-sum" not in got.names()
        wire.send(OK)
        assert response_of(client).body == b"ok"


@ALL
def test_a_client_of_http_1_0_gets_the_body_without_its_trailers(px, where):
    with talking(px, where, get(version="1.0")) as (client, wire):
        request_of(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")
        answer = response_of(client)
        assert answer.body == b"abc"
        assert not answer.all("transfer-encoding")


# --- lengths -----------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_body_that_ends_with_its_connection_is_chunked_for_a_client(px, where, version):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/" + version + b" 200 OK\r\nX-A: 1\r\n\r\nall of").send(b" it").close()
        answer = response_of(client)
        assert answer.get("transfer-encoding") == "chunked"
        assert answer.body == b"all of it"
        assert answer.line.startswith("HTTP/1.1 ")
        # the client's connection stays open, the upstream's was closed
        client.send(get("/next"))
        wire = upstream.accept()
        assert request_of(wire).target == "/next"
        wire.send(OK)
        assert response_of(client).body == b"ok"


@ALL
@pytest.mark.parametrize("framing", ["close", "chunked"])
def test_a_body_of_unknown_length_ends_with_the_connection_of_a_client_of_http_1_0(px, where, framing):
    with talking(px, where, get("/", "Connection: keep-alive", version="1.0")) as (client, wire):
        request_of(wire)
        wire.send(head_for(framing, 0))
        wire.send(b"3\r\nabc\r\n0\r\n\r\n" if framing == "chunked" else b"abc").close()
        answer = response_of(client)
        assert answer.body == b"abc"
        assert not answer.all("transfer-encoding")
        assert not answer.all("content-length")


@ALL
def test_a_client_of_http_1_0_that_keeps_its_connection(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        wire = None
        for number in range(3):
            client.send(get(f"/{number}", "Connection: keep-alive", version="1.0"))
            wire = wire or upstream.accept()
            got = request_of(wire)
            assert got.line == f"GET /{number} HTTP/1.1"
            wire.send(OK)
            answer = response_of(client)
            assert answer.body == b"ok"
            assert (answer.get("connection") or "").lower() == "keep-alive"


@ALL
def test_a_client_of_http_1_0_with_a_body(px, where):
    got, answer = px.exchange(
        get("/", "Content-Length: 3", method="POST", version="1.0") + b"abc", where=where
    )
    assert (got.body, answer.body) == (b"abc", b"ok")


BODILESS = {
    "head with a length": ("HEAD", b"200 OK", b"Content-Length: 1234\r\n", "1234"),
    "head of a chunked page": ("HEAD", b"200 OK", b"Transfer-Encoding: chunked\r\n", None),
    "head of nothing known": ("HEAD", b"200 OK", b"", None),
    "head of an error": ("HEAD", b"404 No", b"Content-Length: 9\r\n", "9"),
    "304": ("GET", b"304 Not Modified", b'ETag: "x"\r\n', None),
    "304 with a length": ("GET", b"304 Not Modified", b"Content-Length: 77\r\n", "77"),
    "204": ("DELETE", b"204 No Content", b"", None),
    "nothing": ("GET", b"200 OK", b"Content-Length: 0\r\n", "0"),
}


@ALL
@pytest.mark.parametrize("case", BODILESS)
def test_answers_without_a_body(px, where, case):
    method, status, fields, length = BODILESS[case]
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(method=method))
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 " + status + b"\r\n" + fields + b"\r\n")
        head = response_of(client, method)
        assert head.status == int(status[:3])
        assert head.get("content-length") == length
        if status[:3] in (b"204", b"304"):
            assert not head.all("transfer-encoding")
        # nothing came behind it: the next answer is the next
        client.send(get("/next"))
        assert request_of(wire).target == "/next"
        wire.send(OK)
        assert response_of(client).body == b"ok"


@ALL
def test_a_204_has_no_length(px, where):
    """RFC 9110 section 8.6: a server must not send one; it is not handed on."""
    with talking(px, where, get()) as (client, wire):
        request_of(wire)
        wire.send(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
        answer = response_of(client)
        assert (answer.status, answer.all("content-length")) == (204, [])


@ALL
def test_a_post_without_a_body_says_so(px, where):
    got, _ = px.exchange(get("/", "Content-Length: 0", method="POST"), where=where)
    assert got.all("content-length") == ["0"]
    got, _ = px.exchange(get("/", method="GET"), where=where)
    assert not got.all("content-length")
    assert not got.all("transfer-encoding")


@ALL
def test_gzip_is_not_touched(px, where):
    page = gzip.compress(b"<html>" * 1000)
    answer = b'HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nETag: "abc"\r\nContent-Length: %d\r\n\r\n%s'
    got, seen = px.exchange(get("/", "Accept-Encoding: gzip, br"), answer % (len(page), page), where=where)
    assert got.get("accept-encoding") == "gzip, br"
    assert seen.body == page
    assert (seen.get("content-encoding"), seen.get("etag"), seen.get("content-length")) == (
        "gzip", '"abc"', str(len(page)),
    )  # fmt: skip
    got, _ = px.exchange(get("/", "X-A: 1"), where=where)
    assert got.get("accept-encoding") is None


# --- pipelines, early answers, both ways at once -----------------------------------------------------


@ALL
def test_pipelined_requests_are_answered_in_order(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        requests = []
        for number in range(30):
            body = b"x" * number
            if number % 3 == 0:
                requests.append(get(f"/{number}"))
            elif number % 3 == 1:
                requests.append(get(f"/{number}", f"Content-Length: {number}", method="POST") + body)
            else:
                requests.append(
                    get(f"/{number}", "Transfer-Encoding: chunked", method="PUT") + chunk(body) + b"0\r\n\r\n"
                )
        client.send(b"".join(requests))
        wire = upstream.accept()
        for number in range(30):
            got = request_of(wire)
            assert got.target == f"/{number}"
            assert got.body == (b"" if number % 3 == 0 else b"x" * number)
            text = f"answer {number}".encode()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            assert response_of(client).body == text


@ALL
def test_a_pipelined_request_waits_for_the_answer_before(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/one") + get("/two"))
        wire = upstream.accept()
        assert request_of(wire).target == "/one"
        wire.send(head_for("chunked", 0) + chunk(b"slowly"))
        client.until(b"slowly")
        assert not came(wire)
        assert not upstream.connects_within(0.05)
        wire.send(b"0\r\n\r\n")
        assert request_of(wire).target == "/two"
        wire.send(OK)
        client.until(b"0\r\n\r\n")
        assert response_of(client).body == b"ok"


@ALL
@FRAMINGS
@pytest.mark.parametrize("end", ["stays", "closes", "resets"])
def test_an_answer_before_the_request_is_complete(px, where, framing, end):
    """An early 413 reaches a client that is still sending; the rest of its body is not taken for a request."""
    total = 8 * MB
    field = f"Content-Length: {total}" if framing == "length" else "Transfer-Encoding: chunked"
    with talking(px, where, get("/up", field, method="POST")) as (client, wire):
        wire.head()
        client.send(BLOCK[:100] if framing == "length" else chunk(BLOCK[:100]))
        wire.exactly(100)
        wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        if end == "closes":
            wire.finish()

        def rest():
            with contextlib.suppress(OSError):
                for _ in range(7):
                    client.send(BLOCK if framing == "length" else chunk(BLOCK))

        with background(rest):
            answer = response_of(client)
            assert (answer.status, answer.body) == (413, b"big")
            if end == "resets":
                wire.reset()
            # the proxy reads what a client still sends, or closes the connection; the client does not hang
            client.sock.shutdown(2)


@EVERYWHERE
@FRAMINGS
def test_both_directions_at_once(px, where, framing):
    field = "Content-Length: 500" if framing == "length" else "Transfer-Encoding: chunked"
    with talking(px, where, get("/", field, method="POST")) as (client, wire):
        wire.head()
        wire.send(head_for(framing, 500))
        Message(client.head())
        for number in range(50):
            piece = b"%010d" % number
            client.send(piece if framing == "length" else chunk(piece))
            wire.until(piece if framing == "length" else piece + b"\r\n")
            wire.send(piece if framing == "length" else chunk(piece))
            client.until(piece if framing == "length" else piece + b"\r\n")
        if framing == "chunked":
            client.send(b"0\r\n\r\n")
            assert wire.until(b"0\r\n\r\n") == b"0\r\n\r\n"
            wire.send(b"0\r\n\r\n")
            assert client.until(b"0\r\n\r\n") == b"0\r\n\r\n"
        client.send(get("/next"))
        assert request_of(wire).target == "/next"
        wire.send(OK)
        assert response_of(client).body == b"ok"


@EVERYWHERE
def test_a_response_that_ends_while_the_request_continues(px, where):
    """Whole answer, then the rest of the body: the next request is not mixed up with it."""
    target = path()
    with talking(px, where, get(target, "Content-Length: 10", method="POST") + b"01234") as (client, wire):
        wire.head()
        wire.exactly(5)
        wire.send(OK)
        assert response_of(client).body == b"ok"
        with contextlib.suppress(ConnectionError):
            client.send(b"56789" + get("/behind"))
        assert b"56789/" not in cut_off_soon(wire)


def cut_off_soon(wire):
    """What still comes, for a short time."""
    data = b""
    while piece := came(wire, 0.3):
        data += piece
    return data


# --- large -------------------------------------------------------------------------------------------


def large(total, framing, sink, end):
    """Bytes that are different everywhere, and their hash."""
    digest = hashlib.blake2b()
    sizes = [65536, 1, 7, 16384, 300_000, 1_000_003, 4096]
    left, number = total, 0
    while left:
        size = min(left, sizes[number % len(sizes)])
        piece = (b"%020d" % number + BLOCK * 2)[:size]
        digest.update(piece)
        sink(chunk(piece) if framing == "chunked" else piece)
        left -= size
        number += 1
    if framing != "length":
        end(b"0\r\n\r\n" if framing == "chunked" else b"")
    return digest.hexdigest()


class Reader:
    """Reads much by its framing, without keeping it."""

    def __init__(self, wire):
        self.wire = wire
        self.digest = hashlib.blake2b()

    def take(self, count):
        taken, self.wire.data = self.wire.data[:count], self.wire.data[count:]
        self.digest.update(taken)
        left = count - len(taken)
        buffer = memoryview(bytearray(256 * 1024))
        while left:
            size = self.wire.sock.recv_into(buffer[: min(left, len(buffer))])
            assert size, f"ended, {left} bytes are missing"
            self.digest.update(buffer[:size])
            left -= size

    def body(self, framing, total):
        if framing == "length":
            self.take(total)
        elif framing == "chunked":
            while size := int(self.wire.until(b"\r\n").split(b";")[0], 16):
                self.take(size)
                assert self.wire.exactly(2) == b"\r\n"
            assert self.wire.exactly(2) == b"\r\n"
        else:
            buffer = memoryview(bytearray(256 * 1024))
            self.digest.update(self.wire.data)
            while size := self.wire.sock.recv_into(buffer):
                self.digest.update(buffer[:size])
        return self.digest.hexdigest()


@EVERYWHERE
@FRAMINGS
def test_a_large_answer(px, where, framing):
    total = 100 * MB
    with talking(px, where, get()) as (client, wire):
        request_of(wire)
        wire.send(head_for(framing, total))
        with background(large, total, framing, wire.send, wire.send) as sent:
            head = Message(client.head())
            assert head.all("content-length") == ([str(total)] if framing == "length" else [])
            received = Reader(client).body(framing, total)
        assert [received] == sent


@pytest.mark.parametrize("where", ["primary", "second"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_large_answer_that_ends_with_its_connection(px, where, version):
    total = 30 * MB
    with talking(px, where, get(version=version)) as (client, wire):
        request_of(wire)
        wire.send(head_for("close", 0))
        with background(large, total, "close", wire.send, lambda _: wire.finish()) as sent:
            Message(client.head())
            received = Reader(client).body("chunked" if version == "1.1" else "close", total)
        assert [received] == sent


@EVERYWHERE
@FRAMINGS
def test_a_large_request(px, where, framing):
    total = 100 * MB
    field = f"Content-Length: {total}" if framing == "length" else "Transfer-Encoding: chunked"
    with talking(px, where, get("/", field, method="PUT")) as (client, wire):
        with background(large, total, framing, client.send, client.send) as sent:
            wire.head()
            received = Reader(wire).body(framing, total)
        assert [received] == sent
        wire.send(OK)
        assert response_of(client).body == b"ok"


@ALL
@FRAMINGS
def test_large_bodies_both_ways_at_once(px, where, framing):
    """Neither direction waits for the other: that would be a deadlock."""
    total = 30 * MB
    field = f"Content-Length: {total}" if framing == "length" else "Transfer-Encoding: chunked"
    with talking(px, where, get("/", field, method="POST")) as (client, wire):
        wire.head()
        wire.send(head_for(framing, total))
        with (
            background(large, total, framing, client.send, client.send) as up,
            background(large, total, framing, wire.send, wire.send) as down,
            background(lambda: Reader(wire).body(framing, total)) as came_up,
        ):
            client.head()
            came_down = Reader(client).body(framing, total)
        wait_for(lambda: came_up and up and down, "all of it")
        assert came_up == up
        assert [came_down] == down


@pytest.mark.parametrize("where", ["primary", "second"])
def test_many_clients_at_once(px, where):
    """Each gets its own answer, whatever the order in which the upstream gives them."""
    with px.upstream() as upstream, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(px[where])) for _ in range(100)]
        for number, client in enumerate(clients):
            client.send(get(f"/{number}"))
        wires = {}
        for _ in clients:
            wire = upstream.accept()
            wires[request_of(wire).target] = wire
        for number in reversed(range(100)):
            text = f"for {number}".encode()
            wires[f"/{number}"].send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
        for number, client in enumerate(clients):
            assert response_of(client).body == f"for {number}".encode()
