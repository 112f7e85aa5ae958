"""Nothing desynchronises: each message leaves the proxy with one framing, and what can be read in two ways ends here."""

import contextlib
import re

import pytest
from free_ports import free_port
from processes import GUNICORN
from proxy_harness import (
    ALL,
    OK,
    PLACES,
    Message,
    background,
    chunk,
    cpu,
    cut_off,
    final_of,
    get,
    path,
    request_of,
    response_of,
)
from upstream_sockets import Upstream, connect

SERVERS = PLACES


# --- what clients send -------------------------------------------------------------------------------


BODY = b"5\r\nhello\r\n0\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: evil\r\n\r\n"


@ALL
@pytest.mark.parametrize("method", ["DELETE", "GET", "OPTIONS", "POST", "PROPFIND", "HEAD"])
def test_a_chunked_body_keeps_its_framing_whatever_the_method(px, where, method):
    """node-http-proxy sends a chunked DELETE as Content-Length: 0 with the body behind it."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Transfer-Encoding: chunked", method=method) + chunk(SMUGGLED) + b"0\r\n\r\n")
        wire = upstream.accept()
        got = request_of(wire)
        assert (got.get("transfer-encoding"), got.all("content-length"), got.body) == (
            "chunked",
            [],
            SMUGGLED,
        )
        wire.send(OK if method != "HEAD" else OK[:-2])
        assert response_of(client, method).status == 200
        client.send(get("/next"))
        assert request_of(wire).target == "/next"


@ALL
@pytest.mark.parametrize("method", ["DELETE", "GET", "OPTIONS", "HEAD"])
def test_a_sized_body_keeps_its_framing_whatever_the_method(px, where, method):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", f"Content-Length: {len(SMUGGLED)}", method=method) + SMUGGLED)
        wire = upstream.accept()
        got = request_of(wire)
        assert (got.get("content-length"), got.body) == (str(len(SMUGGLED)), SMUGGLED), got
        wire.send(OK if method != "HEAD" else OK[:-2])
        assert response_of(client, method).status == 200
        client.send(get("/next"))
        assert request_of(wire).target == "/next"


REFUSED = {
    "both": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "both, swapped": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + BODY,
    "both, nominated": b"Connection: content-length\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    + BODY,
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a list of lengths": b"Content-Length: 5, 6\r\n\r\nhello!",
    "signed": b"Content-Length: +5\r\n\r\nhello",
    "negative": b"Content-Length: -5\r\n\r\nhello",
    "hexadecimal": b"Content-Length: 0x5\r\n\r\nhello",
    "underscore": b"Content-Length: 1_0\r\n\r\nhello67890",
    "no number": b"Content-Length: five\r\n\r\nhello",
    "empty": b"Content-Length: \r\n\r\nhello",
    "te gzip": b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "te xchunked": b"Transfer-Encoding: xchunked\r\n\r\n" + BODY,
    "te chunked twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n" + BODY,
    "te chunked, then identity": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + BODY,
    "te chunked first": b"Transfer-Encoding: chunked, gzip\r\n\r\n" + BODY,
    "te with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n" + BODY,
    "te quoted": b'Transfer-Encoding: "chunked"\r\n\r\n' + BODY,
    "te with a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n" + BODY,
    "te with a nul": b"Transfer-Encoding: chunked\0\r\n\r\n" + BODY,
    "te behind a bare lf": b"X-A: 1\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "te behind a bare cr": b"X-A: 1\rTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "te folded": b"Transfer-Encoding:\r\n chunked\r\n\r\n" + BODY,
    "length folded": b"Content-Length:\r\n 5\r\n\r\nhello",
    "a space in a name": b"X A: 1\r\n\r\n",
    "a nul in a value": b"X-A: a\0b\r\n\r\n",
    "no colon": b"nonsense\r\n\r\n",
    "no name": b": value\r\n\r\n",
    "two hosts": b"Host: other.example\r\n\r\n",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_read_in_two_ways_never_reaches_the_upstream(px, case):
    with px.upstream() as upstream:
        for where in PLACES:
            with connect(px[where]) as client:
                with contextlib.suppress(ConnectionError):
                    client.send(b"POST /bad HTTP/1.1\r\nHost: x\r\n" + REFUSED[case] + SMUGGLED)
                got = cut_off(client) if not upstream.connects_within(0.02) else b""
                if got:
                    assert re.match(rb"HTTP/1\.1 (400|501|431) ", got), got
                    assert got.count(b"HTTP/1.1 ") == 1
        assert not upstream.connects_within(0.1), "it was handed on"


@ALL
@pytest.mark.parametrize(
    "bad",
    [
        b"+5\r\nhello\r\n", b"-5\r\nhello\r\n", b"0x5\r\nhello\r\n", b" 5\r\nhello\r\n", b"5_0\r\nhello\r\n", b"\r\nhello\r\n",
        b"5\nhello\r\n", b"5\r\nhelloXX", b"5;a\nb\r\nhello\r\n", b"g\r\nhello\r\n",
        b"5\r\nhello\n", b"00000000000000000000000000000000000000005;" + b"x" * 70000 + b"\r\nhello\r\n",
    ],
)  # fmt: skip
def test_a_broken_body_never_reaches_the_upstream_as_a_whole_one(px, where, bad):
    with px.upstream() as upstream, connect(px[where]) as client:
        with contextlib.suppress(ConnectionError):
            client.send(get("/", "Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n" + bad)
            client.send(b"0\r\n\r\n" + SMUGGLED)
        arrived = b""
        if upstream.connects_within(1):
            arrived = cut_off(upstream.wires[0])
        assert not arrived.endswith(b"0\r\n\r\n")
        assert b"smuggled" not in arrived
        got = cut_off(client)
        assert not got or re.match(rb"HTTP/1\.1 (400|431|413) ", got), got
        assert got.count(b"HTTP/1.1 ") <= 1


@ALL
@pytest.mark.parametrize(
    "trailer",
    [
        "Content-Length: 5",
        "Transfer-Encoding: chunked",
        "Host: evil",
        "Connection: close",
        "Authorization: x",
        "Cookie: x",
    ],
)
def test_trailers_that_would_change_the_message_are_not_handed_on(px, where, trailer):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n0\r\n")
        client.send(f"X-Sum: 1\r\n{trailer}\r\n\r\n".encode())
        wire = upstream.accept()
        try:
            got = request_of(wire)
        except AssertionError as error:
            assert "the connection ended" in str(error)  # refused, which is right, too
            assert response_of(client).status == 400
            return
        assert trailer.partition(":")[0].lower() not in [name.lower() for name, _ in got.trailers]
        assert trailer.partition(":")[0].lower() not in set(got.names()) - {
            "host",
            "transfer-encoding",
            "connection",
        }


@ALL
@pytest.mark.parametrize(
    "bad", [b"X A: 1", b"nonsense", b"X-A: a\rb", b"X-A: a\0b", b"X-A: 1\nX-B: 2", b": x", b" folded"]
)
def test_broken_trailers_of_a_request_are_not_handed_on(px, where, bad):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n0\r\n")
        client.send(bad + b"\r\n\r\n")
        wire = upstream.accept()
        try:
            got = request_of(wire)
            assert not got.trailers
        except AssertionError as error:
            assert "the connection ended" in str(error)


@ALL
@pytest.mark.parametrize(
    "target",
    [
        "http://[::1/",
        "http://[foo]/",
        "http://[]/",
        "http:///x",
        "http://a:b/",
        "http://a:99999/",
        "http://",
        "://x/",
        "foo",
    ],
)
def test_a_target_that_is_not_a_url_is_400(px, where, target):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        if upstream.connects_within(0.3):
            got = request_of(upstream.wires[0])
            assert got.target.startswith("/")
            assert len(got.all("host")) == 1
            assert re.fullmatch(r"[A-Za-z0-9.:\[\]-]*", got.get("host")), got
            return
        assert response_of(client).status == 400


@ALL
def test_an_h2c_upgrade_is_not_carried(px, where):
    """It would be a tunnel through all that looks at requests; RFC 9113 has given it up."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(
            get(
                "/", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAA"
            )
        )
        if upstream.connects_within(1):
            wire = upstream.wires[0]
            got = request_of(wire)
            assert not got.all("upgrade")
            assert not got.all("http2-settings")
            wire.send(OK)
            assert response_of(client).body == b"ok"
        else:
            assert response_of(client).status in (400, 501)


# --- what upstreams answer ---------------------------------------------------------------------------


POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nX-Poison: 1\r\n\r\npoison"

START = b"HTTP/1.1 200 OK\r\n"
BAD_ANSWERS = {
    "two lengths": START + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
    "a list of lengths": START + b"Content-Length: 2, 3\r\n\r\nok!",
    "length and chunked": START + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked and length": START + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "negative": START + b"Content-Length: -2\r\n\r\nok",
    "negative nought": START + b"Content-Length: -0\r\n\r\n",
    "signed": START + b"Content-Length: +2\r\n\r\nok",
    "hexadecimal": START + b"Content-Length: 0x2\r\n\r\nok",
    "underscore": START + b"Content-Length: 0_2\r\n\r\nok",
    "fraction": START + b"Content-Length: 2.0\r\n\r\nok",
    "with more": START + b"Content-Length: 2;x\r\n\r\nok",
    "two words": START + b"Content-Length: 2 2\r\n\r\nok",
    "no number": START + b"Content-Length: two\r\n\r\nok",
    "empty length": START + b"Content-Length:\r\n\r\nok",
    "fullwidth": START + "Content-Length: \uff12\r\n\r\nok".encode(),
    "superscript": START + b"Content-Length: \xb2\r\n\r\nok",
    "huge": START + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nok",
    "gzip, chunked": START + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked, chunked": START + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked twice": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked first": START + b"Transfer-Encoding: chunked, identity\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "xchunked": START + b"Transfer-Encoding: xchunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "vertical tab": START + b"Transfer-Encoding: \x0bchunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "empty coding": START + b"Transfer-Encoding:\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked in http/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "space before the colon": START + b"Content-Length : 2\r\n\r\nok",
    "space in a name": START + b"X Y: 1\r\nContent-Length: 2\r\n\r\nok",
    "tab before the colon": START + b"X-A\t: 1\r\nContent-Length: 2\r\n\r\nok",
    "no name": START + b": 1\r\nContent-Length: 2\r\n\r\nok",
    "no colon": START + b"nonsense\r\nContent-Length: 2\r\n\r\nok",
    "a name outside ascii": START + b"X-\xe9: 1\r\nContent-Length: 2\r\n\r\nok",
    "a bracket in a name": START + b"X(A): 1\r\nContent-Length: 2\r\n\r\nok",
    "nul in a value": START + b"X-A: a\0b\r\nContent-Length: 2\r\n\r\nok",
    "nul in a name": START + b"X-\0A: b\r\nContent-Length: 2\r\n\r\nok",
    "bare cr in a value": START + b"X-A: a\rX-B: b\r\nContent-Length: 2\r\n\r\nok",
    "bare cr before the end": START + b"X-A: a\r\r\nContent-Length: 2\r\n\r\nok",
    "bare lf in a value": START + b"X-A: a\nX-B: b\r\nContent-Length: 2\r\n\r\nok",
    "bare lf before the end": START + b"X-A: a\r\n\nContent-Length: 2\r\n\r\nok",
    "lf alone": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "a fold at the beginning": START + b" X-A: a\r\nContent-Length: 2\r\n\r\nok",
    "cr in the reason": b"HTTP/1.1 200 O\rK\r\nContent-Length: 2\r\n\r\nok",
    "nul in the reason": b"HTTP/1.1 200 O\0K\r\nContent-Length: 2\r\n\r\nok",
    "two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
    "four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "letters": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\nok",
    "sign": b"HTTP/1.1 +20 OK\r\nContent-Length: 2\r\n\r\nok",
    "below 100": b"HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok",
    "nought": b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok",
    "no space": b"HTTP/1.1200 OK\r\nContent-Length: 2\r\n\r\nok",
    "status with a colon": b"HTTP/1.1 200: OK\r\nContent-Length: 2\r\n\r\nok",
    "small letters": b"http/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "http/2": b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "http/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "http/11": b"HTTP/11 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "a space first": b" HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "icy": b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "http/0.9": b"<html>an old answer</html>\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "http/2 frames": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64\x00\x04\x00\x00\xff\xff",
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": b"\x15\x03\x01\x00\x02\x02\x46",
    "a request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "nothing but lines": b"\r\n\r\n\r\n\r\n",
    "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "101 behind 103": b"HTTP/1.1 103 X\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    "bad interim": b"HTTP/1.1 103 X\r\nX Y: 1\r\n\r\n" + OK,
    "nul in an interim": b"HTTP/1.1 103 X\r\nLink: a\0b\r\n\r\n" + OK,
    "bad behind an interim": b"HTTP/1.1 103 X\r\n\r\nnonsense\r\n\r\n",
    "a long name": START + b"X" * 300_000 + b": 1\r\n\r\n",
    "a long reason": b"HTTP/1.1 200 " + b"K" * 300_000 + b"\r\n\r\n",
    "a thousand and more fields": START + b"X-A: 1\r\n" * 60_000 + b"Content-Length: 2\r\n\r\nok",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_response_that_is_not_http_is_502(px, case):
    for where in PLACES:
        target = path()
        with px.upstream() as upstream, connect(px[where]) as client:
            client.send(get(target))
            wire = upstream.accept()
            request_of(wire)
            with contextlib.suppress(OSError):
                wire.send(BAD_ANSWERS[case] + POISON)
                wire.finish()
            answer = final_of(client)
            assert answer.status == 502, (where, answer)
            assert b"poison" not in answer.body
            # the connections: this one is not used again, the client's stays open
            cut_off(wire)
            client.send(get("/next"))
            again = upstream.accept()
            assert request_of(again).target == "/next"
            again.send(OK)
            assert response_of(client).body == b"ok"
        line = px.one_line(
            target, rf"proxy: http://127.0.0.1:{px.up}: .+ after [\d.]+ s \(GET {target}\): 502"
        )
        assert len(line) < 2000
        assert line.isprintable()


TOLERATED = {
    "the same length twice": START + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "the same length in a list": START + b"Content-Length: 2, 2\r\n\r\nok",
    "obs-fold": START + b"X-A: a\r\n  b\r\nContent-Length: 2\r\n\r\nok",
    "obs-fold of a length": START + b"Content-Length:\r\n 2\r\n\r\nok",
    "zeros": START + b"Content-Length: 0002\r\n\r\nok",
    "an empty line first": b"\r\n" + START + b"Content-Length: 2\r\n\r\nok",
    "capitals": START + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "spaces": START + b"Transfer-Encoding: \t chunked \t\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a parameter": START + b"Transfer-Encoding: chunked;q=1\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "identity": START + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok",
    "extension": START + b"Transfer-Encoding: chunked\r\n\r\n2;a=b;c=\"d\"\r\nok\r\n0;x\r\n\r\n",
    "zeros in a size": START + b"Transfer-Encoding: chunked\r\n\r\n0002\r\nok\r\n0000\r\n\r\n",
    "small letters in a size": START + b"Transfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n",
    "a length in an interim": b"HTTP/1.1 103 X\r\nContent-Length: 60\r\n\r\n" + OK,
    "chunked in an interim": b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\n" + OK,
    "http/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok",
}  # fmt: skip


@pytest.mark.parametrize("case", TOLERATED)
def test_an_answer_that_is_odd_is_taken_in_one_way_or_not_at_all(px, case):
    for where in PLACES:
        with px.upstream() as upstream, connect(px[where]) as client:
            client.send(get())
            wire = upstream.accept()
            request_of(wire)
            wire.send(TOLERATED[case])
            wire.finish()
            answer = client.head()
            while answer.startswith(b"HTTP/1.1 1"):
                assert b"content-length" not in answer.lower()
                assert b"transfer-encoding" not in answer.lower()
                answer = client.head()
            assert not re.search(rb"\r\n[ \t]", answer), "a fold was handed on"
            client.data = answer + client.data
            seen = response_of(client)
            if seen.status != 502:
                assert seen.status == 200
                assert seen.body in (b"ok", b"0123456789")
            client.send(get("/next"))
            again = upstream.accept()
            assert request_of(again).target == "/next"


MUST_WORK = [
    "capitals",
    "spaces",
    "extension",
    "zeros in a size",
    "small letters in a size",
    "http/1.0",
    "no reason",
]


@ALL
@pytest.mark.parametrize("case", MUST_WORK)
def test_an_answer_that_is_right_is_taken(px, where, case):
    _, seen = px.exchange(get(), TOLERATED[case], where=where)
    assert (seen.status, seen.body) == (200, b"0123456789" if "small" in case else b"ok")


BAD_CHUNKS = {
    "signed": b"+5\r\nhello\r\n",
    "negative": b"-5\r\nhello\r\n",
    "prefix": b"0x5\r\nhello\r\n",
    "a space first": b" 5\r\nhello\r\n",
    "a tab first": b"\t5\r\nhello\r\n",
    "two words": b"5 5\r\nhello\r\n",
    "underscore": b"0_5\r\nhello\r\n",
    "empty": b"\r\nhello\r\n",
    "empty with extension": b";a=b\r\nhello\r\n",
    "no digit": b"g\r\nhello\r\n",
    "overflow": b"10000000000000005\r\nhello\r\n",
    "overflow of signs": b"FFFFFFFFFFFFFFFF\r\nhello\r\n",
    "long overflow": b"1" + b"0" * 40 + b"5\r\nhello\r\n",
    "bare lf": b"5\nhello\r\n",
    "bare cr": b"5\rhello\r\n",
    "lf in the extension": b"5;a\nb\r\nhello\r\n",
    "cr in the extension": b"5;a\rb\r\nhello\r\n",
    "nul in the extension": b"5;a\0b\r\nhello\r\n",
    "more data": b"5\r\nhello!\r\n",
    "less data": b"5\r\nhell\r\n",
    "no line end": b"5\r\nhelloXX",
    "lf behind the data": b"5\r\nhello\n",
    "cr behind the data": b"5\r\nhello\rX",
    "arabic": "\u0665\r\nhello\r\n".encode(),
    "superscript": b"\xb2\r\nhello\r\n",
    "endless size": b"0" * 200_000 + b"5\r\nhello\r\n",
    "endless extension": b"5;" + b"a" * 200_000 + b"\r\nhello\r\n",
    "bare lf at the end": b"0\r\n\n",
    "bad trailer": b"0\r\nX A: 1\r\n\r\n",
    "trailer without a colon": b"0\r\nnonsense\r\n\r\n",
    "trailer with a bare cr": b"0\r\nX-A: a\rb\r\n\r\n",
    "trailer with a bare lf": b"0\r\nX-A: a\nX-B: b\r\n\r\n",
    "trailer with a nul": b"0\r\nX-A: a\0b\r\n\r\n",
    "folded trailer": b"0\r\nX-A: a\r\n b\r\n\r\n",
    "endless trailers": b"0\r\n" + b"X-A: b\r\n" * 60_000 + b"\r\n",
    "a long trailer": b"0\r\nX-A: " + b"b" * 300_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_a_bad_chunk_ends_the_answer_and_is_never_whole(px, case):
    for where in PLACES:
        target = path()
        with px.upstream() as upstream, connect(px[where]) as client:
            client.send(get(target))
            wire = upstream.accept()
            request_of(wire)
            wire.send(START + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            client.head()
            assert client.until(b"abc\r\n") == b"3\r\nabc\r\n"
            with contextlib.suppress(OSError):
                wire.send(BAD_CHUNKS[case] + b"0\r\n\r\n" + POISON)
                wire.finish()
            rest = cut_off(client)
            assert not rest.endswith(b"0\r\n\r\n"), (where, rest[:100])
            assert b"\r\n0\r\n" not in b"\r\n" + rest, (where, rest[:100])
            assert b"poison" not in rest
            assert b"HTTP/1.1" not in rest
            cut_off(wire)
        px.one_line(target, rf"proxy: http://127.0.0.1:{px.up}: .+ after [\d.]+ s \(GET {target}\)")


@ALL
@pytest.mark.parametrize("case", ["signed", "no digit", "empty", "overflow"])
def test_a_bad_chunk_together_with_the_head(px, where, case):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(START + b"Transfer-Encoding: chunked\r\n\r\n" + BAD_CHUNKS[case] + b"0\r\n\r\n" + POISON)
        head = Message(client.head())
        if head.status == 502:
            return
        rest = cut_off(client)
        assert not rest.endswith(b"0\r\n\r\n")
        assert b"poison" not in rest
        assert b"HTTP/1.1" not in rest


@ALL
@pytest.mark.parametrize(
    "trailer", [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Set-Cookie: a=b", b"Connection: x"]
)
def test_trailers_of_an_answer_that_would_change_the_message_are_not_handed_on(px, where, trailer):
    _, seen = px.exchange(
        get("/", "TE: trailers"),
        START + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n" + trailer + b"\r\n\r\n",
        where=where,
    )
    assert seen.body == b"ok"
    name = trailer.partition(b":")[0].decode().lower()
    assert name not in [key.lower() for key, _ in seen.trailers]


@ALL
@pytest.mark.parametrize("piece", [b"X-Field: value\r\n" * 64, b"x" * 1024], ids=["fields", "one line"])
def test_a_head_without_end_is_bounded(px, where, piece):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)
        wire.send(START)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                wire.send(piece)
                sent += len(piece)
        assert sent < 64 << 20, "it was taken all"
        assert response_of(client).status == 502
    px.one_line(target, r"\): 502")


BLANKS = b" " * 60_000


@pytest.mark.parametrize(
    "answer",
    [
        START + b"X-A: a" + BLANKS + b"\0\r\n\r\n",
        START + b"X-A: a" + b"\t" * 60_000 + b"\0\r\n\r\n",
        START + b"X-A: a\r\n" + b" \r\n" * 20_000 + b"\0\r\n\r\n",
        START + b"X-A: " + b"a " * 30_000 + b"\r\n\0\r\n\r\n",
        START + b"Content-Length: " + b"0," * 30_000 + b"x\r\n\r\n",
        START + b"Connection: " + b"," * 60_000 + b"\r\n\0\r\n\r\n",
        b"HTTP/1.1 200 " + BLANKS + b"\0\r\n\r\n",
        START + b"Transfer-Encoding: chunked\r\n\r\n5" + b" " * 3_000 + b"\0\r\n",
    ],
    ids=["blanks", "tabs", "folds", "words", "lengths", "options", "reason", "size"],
)
def test_an_answer_cannot_keep_the_worker_busy(px, answer):
    """What a few bytes of an upstream cost is in proportion to them (no regular expression runs wild)."""
    before = cpu(px.worker)
    for _ in range(3):
        with px.upstream() as upstream, connect(px["second"]) as client:
            client.send(get())
            wire = upstream.accept()
            request_of(wire)
            with contextlib.suppress(OSError):
                wire.send(answer)
                wire.finish()
            cut_off(wire)
            client.finish()
            cut_off(client)
    assert cpu(px.worker) - before < 1.5


@pytest.mark.parametrize(
    "fields",
    [
        ["Connection: " + "," * 7_000], ["Connection: " + "a," * 3_500], ["X-A: a" + " " * 8_000 + "b"],
        ["Forwarded: " + "for=a," * 1_000], ["Via: " + "1.1 a, " * 1_000], ["Cookie: " + "a=b; " * 1_500],
        ["TE: " + "trailers," * 800, "Connection: TE"], ["Upgrade: " + "a," * 3_500, "Connection: upgrade"],
    ],
    ids=["commas", "options", "blanks", "forwarded", "via", "cookie", "te", "upgrade"],
)  # fmt: skip
def test_a_request_cannot_keep_the_worker_busy(px, fields):
    before = cpu(px.worker)
    for _ in range(3):
        with px.upstream() as upstream, connect(px["second"]) as client:
            client.send(get("/" + "%41" * 1_000, *fields))
            if upstream.connects_within(1):
                upstream.wires[0].close()
            client.head()
    assert cpu(px.worker) - before < 1.5


@ALL
@pytest.mark.parametrize(
    "piece",
    [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 X\r\nLink: a\r\n\r\n", b"HTTP/1.1 102 X\r\n\r\n"],
)
def test_interim_answers_without_end_are_bounded(px, where, piece):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)

        def read():
            try:
                return final_of(client).status
            except (AssertionError, ConnectionError) as error:
                return str(error)

        with background(read) as status:
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 64 << 20:
                    wire.send(piece * 64)
                    sent += len(piece) * 64
            assert sent < 64 << 20, "they were taken all"
        assert status[0] == 502 or "the connection ended" in str(status[0]), status
    px.one_line(target, r"proxy: ")


@ALL
def test_trailers_without_end_are_bounded(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(START + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                wire.send(b"X-Field: value\r\n" * 64)
                sent += 1024
        assert sent < 64 << 20, "they were taken all"
        assert not cut_off(client).endswith(b"0\r\n\r\n")


@ALL
def test_a_second_answer_is_never_the_next_ones(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/one") + get("/two"))
        wire = upstream.accept()
        assert request_of(wire).target == "/one"
        wire.send(OK + POISON)
        assert response_of(client).body == b"ok"
        again = upstream.accept()
        assert request_of(again).target == "/two"
        again.send(OK)
        answer = response_of(client)
        assert (answer.body, answer.all("x-poison")) == (b"ok", [])


@ALL
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_body_where_none_may_be_is_never_the_next_answer(px, where, method):
    status = b"200 OK" if method == "HEAD" else b"304 Not Modified"
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/one", method=method) + get("/two"))
        wire = upstream.accept()
        request_of(wire)
        wire.send(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n%s" % (len(POISON), POISON))
        assert response_of(client, method).status == int(status[:3])
        again = upstream.accept()
        assert request_of(again).target == "/two"
        again.send(OK)
        assert response_of(client).body == b"ok"


# --- a body that the proxy reads through another server ----------------------------------------------------

BEHIND = {
    "gevent": (["-k", "gevent"], b""),
    "PROXY protocol": (
        ["-k", "gunicorn_passenger.Worker", "--proxy-protocol"],
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_the_rest_of_an_interrupted_body_is_not_a_request(start, port, name):
    """The server's own reader of the body loses its place when the proxy gives the body up (RFC 9112 section 11.2)."""
    options, preface = BEHIND[name]
    start.write(
        "behind.py",
        f"from gunicorn_passenger import http_proxy\napplication = http_proxy.create_server({port}, '127.0.0.1')\n",
    )
    where = free_port()
    with Upstream(port) as upstream:
        process = start.python(GUNICORN, *options, "-w", 1, "-b", f"127.0.0.1:{where}", "behind")
        process.wait_log("Booting worker")
        smuggled = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
        with connect(where) as client:
            client.send(preface + get("/", "Transfer-Encoding: chunked", method="POST"))
            client.send(b"%x\r\n" % (5 + len(smuggled)) + b"12345")
            wire = upstream.accept()
            wire.head()
            wire.close()
            assert client.head().startswith(b"HTTP/1.1 502 ")
            with contextlib.suppress(OSError):
                client.send(smuggled + b"\r\n0\r\n\r\n")
                client.rest()
        with connect(where) as client:
            client.send(preface + get("/next"))
            wire = upstream.accept()
            assert request_of(wire).target == "/next"
            wire.send(OK)
            assert client.head().startswith(b"HTTP/1.1 200 ")


# --- a response of which the end is the end of the connection ------------------------------------------


@ALL
def test_a_response_that_ends_with_the_broken_body_of_its_request_is_not_whole(px, where):
    """The proxy ends the connection to the upstream itself; that is not the end of the response."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Transfer-Encoding: chunked", method="POST") + chunk(b"one"))
        wire = upstream.accept()
        wire.until(b"one\r\n")
        wire.send(b"HTTP/1.1 200 OK\r\n\r\nfirst part")
        client.until(b"first part")
        client.send(b"zz\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"0\r\n\r\n" not in client.rest()


@ALL
def test_a_response_before_the_end_of_a_large_body_says_that_the_connection_closes(px, where):
    """The proxy does not read the rest for long, so the client must not wait for a turn (RFC 9112 section 9.6)."""
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Content-Length: 10000000", method="POST") + b"x" * 1000)
        upstream.accept().send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        came = response_of(client)
        assert (came.status, came.body) == (413, b"big")
        if where != "inside":  # WSGI leaves this header to the server
            assert came.get("connection") == "close"
