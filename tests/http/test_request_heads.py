"""The reader of requests against gunicorn's own, on streams of random parts."""

from __future__ import annotations

import os
from typing import Any

import gunicorn
import http_model
import pytest
from gunicorn.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gunicorn_passenger.http import c_parser
from gunicorn_passenger.http import request_head as head_module

pytestmark = pytest.mark.skipif(
    gunicorn.version_info < (25,), reason="gunicorn 23's parser has looser rules of its own"
)

EXAMPLES = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def config(**values: Any) -> Config:
    cfg = Config()
    for name, value in values.items():
        cfg.set(name, value)
    return cfg


CFG = config()
GATE = http_model.gateway(CFG)
#: small limits, to be met often
NARROW = config(limit_request_line=40, limit_request_field_size=60)
NARROW_GATE = http_model.gateway(NARROW)
FEW = config(limit_request_fields=3)
FEW_GATE = http_model.gateway(FEW)
REFUSING = config(header_map="refuse", forwarder_headers="SCRIPT_NAME,X_OWN")
REFUSING_GATE = http_model.gateway(REFUSING)


def test_the_c_parser_is_used() -> None:
    if c_parser.gunicorn_h1c is None:
        assert "CI" not in os.environ, "gunicorn_h1c is missing"
        pytest.skip("gunicorn_h1c is not installed")
    for gate in GATE, NARROW_GATE, REFUSING_GATE:
        assert gate.reader.slow_parser_reason == ""
    assert FEW_GATE.reader.slow_parser_reason == "limit_request_fields is below 100"


def test_an_older_c_parser_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    if c_parser.gunicorn_h1c is None:
        assert "CI" not in os.environ, "gunicorn_h1c is missing"
        pytest.skip("gunicorn_h1c is not installed")
    strict = c_parser.gunicorn_h1c.parse_to_wsgi_environ

    class Older:
        ParseError = c_parser.gunicorn_h1c.ParseError

        @staticmethod
        def parse_to_wsgi_environ(head: bytes, *limits: Any) -> Any:
            return strict(head.replace(b"\r\n b", b"b"), *limits)  # unfolds

    monkeypatch.setattr(c_parser, "gunicorn_h1c", Older)
    assert c_parser.c_parser() is None
    assert "older" in http_model.gateway(CFG).reader.slow_parser_reason
    monkeypatch.setattr(c_parser, "gunicorn_h1c", None)
    assert "missing" in http_model.gateway(CFG).reader.slow_parser_reason


method = st.sampled_from(
    ["GET", "POST", "HEAD", "OPTIONS", "CONNECT", "PATCH", "get", "G", "G T", "M-SEARCH", ""]
)
target = st.one_of(
    st.sampled_from(
        [
            "/",
            "/a?b=c",
            "//a",
            "/a//b",
            "*",
            "http://h:1/p?q",
            "HTTPS://h",
            "http://h?q",
            "http://[::1]:8/p",
            "http:///p",
            "http://u@h/p",
            "http://h:x/",
            "http://h\\i/",
            "file:///etc/passwd",
            "x://h/",
            "h:1",
            "/%2F%00%ff",
            "/#f",
            "/a?",
            "?",
            "",
            "/ é",
        ]
    ),
    st.text(st.characters(max_codepoint=255), max_size=12).map(lambda text: "/" + text),
)
version = st.sampled_from(
    ["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "http/1.1", "HTTP/1.1 ", ""]
)
end = st.sampled_from(["\r\n"] * 20 + ["\n", "\r", "\r\n ", "\r\n\t", "\r\r\n", "\r\n\r\n", "\0\r\n"])
name = st.one_of(
    st.sampled_from(
        [
            "Host",
            "Content-Length",
            "content-length",
            "Content-Type",
            "Transfer-Encoding",
            "Connection",
            "Expect",
            "X-Forwarded-Proto",
            "X-Forwarded-Ssl",
            "X_Forwarded_For",
            "X-Forwarded-For",
            "SCRIPT_NAME",
            "PATH_INFO",
            "X_OWN",
            "Content_Length",
            "Upgrade",
            "",
            " Host",
            "Host ",
        ]
    ),
    st.text(st.characters(max_codepoint=255), max_size=6),
)
value = st.one_of(
    st.sampled_from(
        [
            *("0", "1", "3", "5", "+1", "-1", "0x1", "1, 1", "", " 2 ", "²", "99999999999999999999"),
            *("05", "000", "9223372036854775807", "9223372036854775808", "18446744073709551621", "0" * 5000),
            *("chunked", "Chunked", "gzip", "gzip, chunked", "chunked, chunked", "identity", "x"),
            *(
                "close",
                "keep-alive",
                "Close, x",
                "upgrade",
                "https",
                "http",
                "on",
                "/a",
                "100-continue",
                "100",
            ),
            *("h", "h:80", "h:1:2", "[::1]:80"),
        ]
    ),
    st.text(st.characters(max_codepoint=255), max_size=50),
)
field = st.builds(
    lambda n, sep, v, e: f"{n}{sep}{v}{e}", name, st.sampled_from([": ", ":", " : ", ":\t", ""]), value, end
)
plain_field = st.builds(
    lambda n, v: f"{n}: {v}\r\n",
    st.sampled_from(
        ["Host", "Content-Length", "Transfer-Encoding", "Connection", "X-A", "X_Own", "X-Forwarded-Proto"]
    ),
    st.sampled_from(["0", "3", "5", "chunked", "close", "keep-alive", "https", "a", "/"]),
)
size = st.sampled_from(
    [
        *(
            "3",
            "003",
            "a",
            "A",
            "0",
            "0",
            "-1",
            "0x3",
            " 3",
            "3 ",
            "3;a=b",
            '3 ; a="\\" q"',
            "3;",
            "3;=",
            "g",
            "",
        ),
        *("7fffffffffffffff", "8000000000000000", "10000000000000003", "f" * 200),
    ]
)
chunk = st.builds(
    lambda s, e, d, f: f"{s}{e}{d}{f}", size, end, st.sampled_from(["abc", "abcdefghij", "", "ab"]), end
)
body = st.one_of(
    st.just(""),
    st.sampled_from(["abc", "abcde", "abcdeabcde"]),
    st.lists(chunk, max_size=4).map(lambda chunks: "".join([*chunks, "0\r\n\r\n"])),
    st.sampled_from(
        [
            "3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
            "3\r\nabc\r\n0\r\nContent-Length: 1\r\n\r\n",
            "0\r\n X: 1\r\n\r\n",
            "0\r\n\n",
        ]
    ),
)
message = st.builds(
    lambda m, s, t, s2, v, e, fields, end, b: f"{m}{s}{t}{s2}{v}{e}{''.join(fields)}{end}{b}",
    method,
    st.sampled_from([" "] * 8 + ["  ", "\t", ""]),
    target,
    st.sampled_from([" "] * 8 + ["  ", "\t", ""]),
    version,
    end,
    st.lists(st.one_of(plain_field, field), max_size=5),
    st.sampled_from(["\r\n"] * 8 + ["\n", "", "\r\n\r\n"]),
    body,
)
plain_message = st.builds(
    lambda fields, b: f"POST /x?y HTTP/1.1\r\n{''.join(fields)}\r\n{b}",
    st.lists(plain_field, max_size=4),
    body,
)
stream = st.lists(st.one_of(plain_message, message), min_size=1, max_size=3).map(
    lambda messages: "".join(messages).encode("latin-1")
)
#: what accept() gives for a client: nothing, an address, or the name that a client of a UNIX socket has bound
peers = st.one_of(
    st.just(""),
    st.just(("127.0.0.1", 5)),
    st.binary(min_size=1, max_size=108),
    st.binary(min_size=1, max_size=108).map(lambda name: name.decode("utf-8", "surrogateescape")),
)
cuts = st.lists(st.integers(0, 120), max_size=6)


@given(stream, cuts)
@EXAMPLES
def test_streams_mean_what_they_mean_to_gunicorn(data: bytes, cuts: list[int]) -> None:
    assert http_model.disagreement(GATE, CFG, data, cuts) == ""


@given(stream, cuts, peers)
@EXAMPLES
def test_the_name_of_a_client_changes_nothing(data: bytes, cuts: list[int], peer: Any) -> None:
    named, _, _ = http_model.ours(GATE, [data], peer)
    unnamed, _, _ = http_model.ours(GATE, [data], peer if isinstance(peer, tuple) else "")
    assert named == unnamed
    for environ, _ in named:
        assert environ["REMOTE_ADDR"] == ("127.0.0.1" if isinstance(peer, tuple) else "")
    if not isinstance(peer, tuple):
        assert http_model.disagreement(GATE, CFG, data, cuts, peer) == ""


@given(stream, cuts)
@EXAMPLES
def test_limits_are_gunicorns(data: bytes, cuts: list[int]) -> None:
    assert http_model.disagreement(NARROW_GATE, NARROW, data, cuts) == ""
    assert http_model.disagreement(FEW_GATE, FEW, data, cuts) == ""


@given(stream, cuts)
@EXAMPLES
def test_names_with_underscores_are_refused_where_gunicorn_refuses_them(data: bytes, cuts: list[int]) -> None:
    assert http_model.disagreement(REFUSING_GATE, REFUSING, data, cuts) == ""


#: requests of a client that sends the same fields each time, with one body: some lines come again, too
again = st.builds(
    lambda lines, fields, end, b: "".join(
        f"{line}\r\n{''.join(fields)}{end}{b if method_of(line) != 'GET' else ''}" for line in lines
    ).encode("latin-1"),
    st.lists(
        st.one_of(
            st.sampled_from(
                ["GET /a HTTP/1.1", "GET /a?b HTTP/1.1", "POST /%61 HTTP/1.1", "GET /a HTTP/1.0"]
            ),
            st.builds(lambda m, t, v: f"{m} {t} {v}", method, target, version),
        ),
        min_size=3,
        max_size=7,
    ),
    st.lists(st.one_of(plain_field, plain_field, field), max_size=4),
    st.sampled_from(["\r\n"] * 8 + ["\n", "X: y\r\n\r\n", "\r\n\r\n"]),
    st.one_of(st.just(""), body),
)


def method_of(line: str) -> str:
    return line.partition(" ")[0]


@given(again, cuts)
@EXAMPLES
def test_fields_that_come_again_mean_what_they_meant(data: bytes, cuts: list[int]) -> None:
    assert http_model.disagreement(GATE, CFG, data, cuts) == ""
    assert http_model.disagreement(NARROW_GATE, NARROW, data, cuts) == ""
    assert http_model.disagreement(REFUSING_GATE, REFUSING, data, cuts) == ""


def test_what_is_remembered_is_used_and_bounded() -> None:
    gate = http_model.gateway(CFG)
    calls = []
    parse = gate.reader._parse
    if parse is None:
        assert "CI" not in os.environ, "gunicorn_h1c is missing"
        pytest.skip("gunicorn_h1c is not installed")
    gate.reader._parse = lambda head: calls.append(head) or parse(head)
    peer = gate.new_context("")
    last = head_module.NO_HEAD
    fields = b"\r\nHost: h\r\nX-A: 1\r\n\r\n"

    def read(line: bytes, fields: bytes = fields) -> dict[str, Any]:
        nonlocal last
        environ, last, request = gate.reader.read(line + fields, peer, last)
        assert (last.length, last.persist, request) == (0, True, None)
        return environ

    first, second = read(b"GET /a HTTP/1.1"), read(b"GET /a HTTP/1.1")
    assert len(calls) == 2
    for _ in range(2):
        third = read(b"GET /a HTTP/1.1")
        assert third == second == first
        assert list(third) == list(second)
        third["HTTP_X_A"] = third["REMOTE_ADDR"] = "an application may change its own"
    # nothing is parsed again that has come before
    assert calls[2:] == []
    assert read(b"GET /b?c=d HTTP/1.1")["QUERY_STRING"] == "c=d"
    assert read(b"GET /b HTTP/1.1")["QUERY_STRING"] == ""
    assert not [line for line in gate.reader._lines if b"?" in line]
    assert read(b"GET /a HTTP/1.1", fields.replace(b"1", b"2"))["HTTP_X_A"] == "2"
    assert read(b"GET /a HTTP/1.1")["HTTP_X_A"] == "1"
    read(b"GET /a HTTP/1.1")
    for number in range(3 * head_module._REMEMBER):
        assert read(b"GET /%d HTTP/1.1" % number)["PATH_INFO"] == f"/{number}"
    read(b"GET /%b HTTP/1.1" % (b"x" * head_module._SHORT))
    assert 0 < len(gate.reader._lines) <= head_module._REMEMBER
    assert max(map(len, gate.reader._lines)) <= head_module._SHORT
    last = head_module.NO_HEAD
    assert read(b"GET /a HTTP/1.1") == first


@given(st.binary(max_size=200), cuts)
@EXAMPLES
def test_noise(data: bytes, cuts: list[int]) -> None:
    assert http_model.disagreement(GATE, CFG, data, cuts) == ""


@given(stream, st.integers(1, 7))
@EXAMPLES
def test_how_it_is_cut_makes_no_difference(data: bytes, step: int) -> None:
    whole = http_model.ours(GATE, [data])[:2]
    cut = http_model.ours(GATE, [data[at : at + step] for at in range(0, len(data), step)])[:2]
    assert cut[0] == whole[0]


# --- the target in absolute form, and lengths ----------------------------------------------------------


def read_one(data: bytes) -> tuple[dict[str, Any], bytes]:
    got, end, _ = http_model.ours(GATE, [data])
    assert end == http_model.EOF
    (one,) = got
    return one


@pytest.mark.parametrize(
    ("target", "host", "name", "port"),
    [
        ("http://b/x?y", "b", "b", "80"),
        ("http://b:81/x?y", "b:81", "b", "81"),
        ("HTTPS://b.example/x?y", "b.example", "b.example", "80"),
        ("http://10.0.0.1:5/x?y", "10.0.0.1:5", "10.0.0.1", "5"),
    ],
)
@pytest.mark.parametrize("sent", ["Host: a\r\n", ""])
def test_the_host_of_a_target_in_absolute_form_counts(
    target: str, host: str, name: str, port: str, sent: str
) -> None:
    """RFC 9112 section 3.2.2: whatever the Host header says."""
    environ, _ = read_one(f"GET {target} HTTP/1.1\r\n{sent}\r\n".encode())
    assert environ["HTTP_HOST"] == host
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (name, port)
    assert (environ["PATH_INFO"], environ["QUERY_STRING"]) == ("/x", "y")


@pytest.mark.parametrize(
    "target",
    [
        *("http:///x", "http://", "http://?x", "http://:80/x", "https://user@b/x", "http://user:pass@b/x"),
        *("file:///etc/passwd", "ftp://b/x", "ws://b/x", "x://b/", "://b/x"),
        *("http://b:x/", "http://b:123456/", "http://b\\c/", "http://b,c/", "http://[::1/", "http://b c/"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_a_target_in_absolute_form_that_names_no_host_is_refused(target: str, method: str) -> None:
    """RFC 9110 sections 4.2.1 to 4.2.4."""
    data = f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\nGET /next HTTP/1.1\r\nHost: a\r\n\r\n"
    assert http_model.ours(GATE, [data.encode()])[:2] == ([], 400)


@pytest.mark.parametrize("written", ["5", "05", "0" * 30 + "5", "0" * 4000 + "5"])
def test_a_content_length_is_written_anew_as_a_number(written: str) -> None:
    environ, body = read_one(f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {written}\r\n\r\nabcde".encode())
    assert environ["CONTENT_LENGTH"] == "5"
    assert body == b"abcde"


@pytest.mark.parametrize(
    "written",
    [
        str(1 << 63),
        str((1 << 64) + 5),
        "9" * 23,
        "9" * 4300,
        "9" * 4301,
        "0" * 4401,
        "-1",
        "+5",
        "5 5",
        "\u0665",
    ],
)
def test_a_content_length_that_no_length_can_be_is_refused(written: str) -> None:
    data = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n\r\nabcde" % written.encode()
    assert http_model.ours(GATE, [data])[:2] == ([], 400)


def test_the_largest_content_length_is_accepted() -> None:
    """The body that is then missing is the application's to notice."""
    data = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nabcde" % ((1 << 63) - 1)
    assert http_model.ours(GATE, [data])[1] == http_model.BROKEN


@pytest.mark.parametrize("size", ["8000000000000000", "10000000000000005", "f" * 100])
def test_a_chunk_that_no_chunk_can_be_is_refused(size: str) -> None:
    data = f"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{size}\r\nabcde".encode()
    assert http_model.ours(GATE, [data])[:2] == ([], 400)
