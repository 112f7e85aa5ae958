"""Each option of the proxy: its forms, its default, and what cannot be used."""

import base64
import io
import ssl
import threading
from urllib.parse import urlsplit

import pytest
from free_ports import free_port
from http_client import fetch
from proxy_laboratory import (
    MODES,
    OK,
    Message,
    accept,
    answer,
    ask,
    kept,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

# --- what is done without any option -----------------------------------------------------------------


@MODES
def test_defaults(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    sent = request(
        "/a//b/../c%2F?x=1&y=//z", "Host: example.org:81", "X-Forwarded-For: 203.0.113.7", "Via: 1.0 there",
        "Forwarded: for=203.0.113.7", "Authorization: Basic eDp5",
    )  # fmt: skip
    reply = answer(
        "302 Found", f"Location: http://127.0.0.1:{port}/there", "Set-Cookie: a=1; Domain=a.example; Path=/a",
        "Via: 1.1 origin",
    )  # fmt: skip
    got, came = ask(where, upstream, sent, reply)
    assert got.start == "GET /a//b/../c%2F?x=1&y=//z HTTP/1.1"
    assert got.get("host") == ["example.org:81"]
    assert got.get("x-forwarded-for") == ["203.0.113.7"]
    assert not [name for name, _ in got.fields if name.lower() in ("x-forwarded-host", "x-forwarded-proto")]
    assert got.get("via") == ["1.0 there"]
    assert got.get("forwarded") == ["for=203.0.113.7"]
    assert got.get("authorization") == ["Basic eDp5"]
    assert came.start == "HTTP/1.1 302 Found"
    assert came.get("location") == [f"http://127.0.0.1:{port}/there"]
    assert came.get("set-cookie") == ["a=1; Domain=a.example; Path=/a"]
    assert came.get("via") == ["1.1 origin"]


# --- the request's target ----------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("base", "options", "path", "expected"),
    [
        ("", "", "/x?q", "/x?q"),
        ("/", "", "/x?q", "/x?q"),
        ("/base", "", "/x?q", "/base/x?q"),
        ("/base/", "", "/x?q", "/base/x?q"),
        ("/base/", "", "/", "/base/"),
        ("/base", "", "/", "/base/"),
        ("/a/b", "prepend_path=True", "/x/y/", "/a/b/x/y/"),
        ("/base", "", "/?u=http://a.example/?b=1%26c&d=2//", "/base/?u=http://a.example/?b=1%26c&d=2//"),
        ("/base", "", "/a%20b%2Fc", "/base/a%20b%2Fc"),
        ("/ba%20se", "", "/x", "/ba%20se/x"),
        ("/base", "prepend_path=False", "/x?q", "/x?q"),
        ("/base/", "prepend_path=False", "/", "/"),
        ("/base", "ignore_path=True", "/x?q", "/base"),
        ("/base/", "ignore_path=True", "/x", "/base/"),
        ("/base?own=1", "ignore_path=True", "/x?q", "/base?own=1"),
        ("", "ignore_path=True", "/x?q", "/"),
        ("/base", "ignore_path=True, prepend_path=False", "/x?q", "/"),
        ("/base", "ignore_path=False", "/x", "/base/x"),
    ],
)
def test_paths(lab, upstream, port, mode, base, options, path, expected):
    where = lab.serve(f"'http://127.0.0.1:{port}{base}', {options}", mode)
    got, came = ask(where, upstream, request(path))
    assert got.start == f"GET {expected} HTTP/1.1"
    assert came.status == 200


@MODES
@pytest.mark.parametrize(
    ("path", "host", "expected"),
    [
        ("/x?q=http://a//b", "example.org:81", "http://example.org:81/x?q=http://a//b"),
        ("/", "example.org", "http://example.org/"),
        ("http://elsewhere.example/y", "elsewhere.example", "http://elsewhere.example/y"),
    ],
)
def test_to_proxy(lab, upstream, port, mode, path, host, expected):
    where = lab.serve(f"{port}, to_proxy=True", mode)
    got, _ = ask(where, upstream, request(path, f"Host: {host}"))
    assert got.start == f"GET {expected} HTTP/1.1"
    assert got.get("host") == [host]


def test_without_to_proxy_an_absolute_url_is_asked_for_by_its_path(lab, upstream, port):
    where = lab.serve(f"{port}")
    got, _ = ask(where, upstream, request("http://elsewhere.example/y?q", "Host: elsewhere.example"))
    assert got.path == "/y?q"
    assert got.get("host") == ["elsewhere.example"]


# --- the request's fields ----------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("{port}", "", "example.org"),
        ("{port}", "change_origin=False", "example.org"),
        ("{port}", "change_origin=True", "localhost:{port}"),
        ("{port}, '127.0.0.1'", "change_origin=True", "127.0.0.1:{port}"),
        ("'http://127.0.0.1:{port}/base'", "change_origin=True", "127.0.0.1:{port}"),
        ("'http://LocalHost:{port}'", "change_origin=True", "localhost:{port}"),
    ],
)
def test_change_origin(lab, upstream, port, mode, target, options, expected):
    where = lab.serve(f"{target.format(port=port)}, {options}", mode)
    got, _ = ask(where, upstream)
    assert got.get("host") == [expected.format(port=port)]


@MODES
def test_headers_are_set(lab, upstream, port, mode):
    options = "headers={'X-New': 'new', 'user-agent': 'proxy', 'X-Both': 'ours'}"
    where = lab.serve(f"{port}, {options}", mode)
    sent = request("/x", "User-Agent: client", "X-BOTH: one", "X-Both: two", "X-Kept: kept")
    got, _ = ask(where, upstream, sent)
    assert got.get("x-new") == ["new"]
    assert got.get("user-agent") == ["proxy"]
    assert got.get("x-both") == ["ours"]
    assert got.get("x-kept") == ["kept"]


def test_headers_may_name_the_host(lab, upstream, port):
    got, _ = ask(lab.serve(f"{port}, headers={{'Host': 'given.example'}}"), upstream)
    assert got.get("host") == ["given.example"]


def test_headers_are_sent_with_every_request(lab, upstream, port):
    where = lab.serve(f"{port}, headers={{'X-New': 'new'}}")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        for _ in range(2):
            assert read_request(wire).get("x-new") == ["new"]
            wire.send(OK)
            assert read_response(client).status == 200
            client.send(request())


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "Connection"])
def test_headers_do_not_change_the_framing(lab, upstream, port, name):
    """Either such a field is refused when the proxy is made, or it has no effect."""
    value = {"Content-Length": "99", "Transfer-Encoding": "chunked", "Connection": "upgrade"}[name]
    try:
        http_proxy.create_server(9000, headers={name: value})
    except ValueError as error:
        assert "headers" in str(error)
        return
    got, came = ask(
        lab.serve(f"{port}, headers={{{name!r}: {value!r}}}"),
        upstream,
        request(method="POST", body=b"hello"),
    )
    assert got.text == b"hello"
    assert value not in got.get(name)
    assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1
    assert came.status == 200


@MODES
@pytest.mark.parametrize("given", ["user:password", "user:pass:word", "user:", "us\u00e9r:p\u00e4ss"])
def test_auth(lab, upstream, port, mode, given):
    got, _ = ask(lab.serve(f"{port}, auth={given!r}", mode), upstream)
    (value,) = got.get("authorization")
    scheme, _, credentials = value.partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(credentials).decode() == given


def test_auth_leaves_one_authorization(lab, upstream, port):
    got, _ = ask(lab.serve(f"{port}, auth='a:b'"), upstream, request("/x", "Authorization: Bearer token"))
    assert len(got.get("authorization")) == 1


@MODES
@pytest.mark.parametrize("kept", [True, False])
def test_the_letter_case_of_field_names(lab, upstream, port, mode, kept):
    where = lab.serve(f"{port}, preserve_header_key_case={kept}", mode)
    sent = request("/x", "hOST: example.org", "X-ThiNg: A", "ACCEPT: b", "x-thing: C", "Cookie: k=V")
    reply = answer("200 OK", "X-AnsWer: D", "SET-COOKIE: a=E", "etag: F", "Set-Cookie: b=G", "x-answer: H")
    got, came = ask(where, upstream, sent, reply)
    wanted = [
        ("hOST", "example.org"), ("X-ThiNg", "A"), ("ACCEPT", "b"), ("x-thing", "C"), ("Cookie", "k=V"),
    ]  # fmt: skip
    answered = [
        ("X-AnsWer", "D"),
        ("SET-COOKIE", "a=E"),
        ("etag", "F"),
        ("Set-Cookie", "b=G"),
        ("x-answer", "H"),
    ]

    def shown(fields):
        return fields if kept else [(name.lower(), value) for name, value in fields]

    assert [field for field in got.fields if field[0].lower() not in ("connection",)] == shown(wanted)
    names = {name.lower() for name, _ in answered}
    assert [field for field in came.fields if field[0].lower() in names] == shown(answered)


def test_the_letter_case_is_lower_by_default(lab, upstream, port):
    reply = answer("200 OK", "X-Answer: 1")
    got, came = ask(lab.serve(f"{port}"), upstream, request("/x", "X-Thing: 1"), reply)
    assert ("x-thing", "1") in got.fields
    assert ("x-answer", "1") in came.fields
    assert all(name == name.lower() for name, _ in got.fields), got.fields


# --- ws and other upgrades ---------------------------------------------------------------------------


UPGRADE = request(
    "/chat", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@MODES
@pytest.mark.parametrize("options", ["", ", ws=True"])
def test_ws_is_on(lab, upstream, port, mode, options):
    where = lab.serve(f"{port}{options}", mode)
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        got = Message(wire.head())
        assert got.get("upgrade") == ["websocket"]
        assert [v.lower() for v in got.get("connection")] == ["upgrade"]
        wire.send(SWITCH + b"early")
        assert Message(client.head()).status == 101
        assert client.exactly(5) == b"early"
        client.send(b"up")
        assert wire.exactly(2) == b"up"
        wire.close()
        assert client.ended()


@MODES
def test_ws_off_is_501(lab, upstream, port, mode):
    where = lab.serve(f"{port}, ws=False", mode)
    assert refuse(where, UPGRADE).status == 501
    assert not upstream.connects_within(0.1)
    assert ask(where, upstream)[1].status == 200


@MODES
def test_ws_timeout(lab, upstream, port, mode):
    where = lab.serve(f"{port}, ws_timeout=0.2", mode)
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(SWITCH)
        assert Message(client.head()).status == 101
        client.rest()
        wire.rest()


# --- buffer ------------------------------------------------------------------------------------------


def buffered(lab, port, code, method="POST"):
    """A program that reads the body itself and hands it, or another, to the proxy as ``buffer``."""
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port})
class Pieces:
    def __init__(self, *pieces):
        self.pieces = list(pieces)
    def read(self, size=-1):
        return self.pieces.pop(0) if self.pieces else b""
def app(environ, start_response):
    {code}
    return proxy.web(environ, start_response, buffer=buffer)
passenger.create_server(app).listen("unix:{where}")
""")
    return where


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("body = environ['wsgi.input'].read(); buffer = io.BytesIO(body)", b"hello"),
        (
            "environ['wsgi.input'].read(); buffer = io.BytesIO(b'a longer one than before')",
            b"a longer one than before",
        ),
        ("buffer = io.BytesIO(b'short')", b"short"),
        ("environ['wsgi.input'].read(); buffer = io.BytesIO(b'')", b""),
        ("environ['wsgi.input'].read(); buffer = Pieces(b'one', b'two', b'three')", b"onetwothree"),
        ("environ['wsgi.input'].read(); buffer = io.BytesIO(b'x' * 300000)", b"x" * 300000),
        ("buffer = io.BytesIO(b'skipped, sent'); buffer.seek(9)", b"sent"),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_buffer_is_sent_in_place_of_the_body(lab, upstream, port, code, expected, framing):
    where = buffered(lab, port, code)
    body = b"hello" if "Length" in framing else b"5\r\nhello\r\n0\r\n\r\n"
    with connect(where) as client:
        client.send(request("/x", framing, method="POST") + body)
        wire = accept(upstream, client)
        got = read_request(wire)
        assert got.text == expected
        assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1
        wire.send(OK)
        assert read_response(client).text == b"ok"


def test_buffer_gives_a_body_to_a_request_without(lab, upstream, port):
    got, came = ask(buffered(lab, port, "buffer = io.BytesIO(b'given')"), upstream, request(method="PUT"))
    assert (got.text, came.status) == (b"given", 200)


def test_buffer_leaves_the_clients_connection_in_order(lab, upstream, port):
    """The body that was replaced is not taken for the next request."""
    where = buffered(lab, port, "buffer = io.BytesIO(b'other')")
    hidden = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(where) as client:
        client.send(request("/x", method="POST", body=hidden))
        wire = accept(upstream, client)
        assert read_request(wire).text == b"other"
        wire.send(OK)
        assert read_response(client).status == 200
        rest = client.send(request("/last", "Connection: close"))
        try:
            if kept(wire, upstream, client):
                assert read_request(wire).path == "/last"
            elif upstream.connects_within(10):
                assert read_request(upstream.wires[-1]).path == "/last"
        except (AssertionError, ConnectionError, BrokenPipeError) as error:
            assert "smuggled" not in str(error)
        assert b"smuggled" not in rest.data


# --- what cannot be used -----------------------------------------------------------------------------


BAD_NUMBERS = [-1, -0.5, "x", "5", True, float("nan"), float("-inf"), [1]]
BAD_SWITCHES = ["no", "yes", None, 2, []]
SWITCHES = [
    "ws", "secure", "to_proxy", "prepend_path", "ignore_path", "change_origin", "preserve_header_key_case",
    "auto_rewrite", "self_handle_response",
]  # fmt: skip
BAD = [
    *((name, value) for name in SWITCHES for value in BAD_SWITCHES),
    *((name, value) for name in ("proxy_timeout", "timeout", "ws_timeout", "fail_timeout") for value in BAD_NUMBERS),
    *(("forward", value) for value in (0, 70000, -1, True, "", "ftp://x", "http://", "http://x:y", "unix:", 1.5)),
    *(("forward", value) for value in ("http://a b/", "http://x:0", "http://x:65536", "http://x/\r\nA: b", "http://x/a b")),
    *((name, value) for name in ("xfwd", "forwarded") for value in ("prepend", "", 2, b"append")),
    *(("trusted", value) for value in ("nonsense", ["300.1.1.1"], ["10.0.0.0/33"], 5, [5], ["a\r\nb"])),
    *(("via", value) for value in ("a b", "a\r\nb", "", "a,b", 5, b"x")),
    *(("local_address", value) for value in ("300.1.1.1", "", 5, "a b", True)),
    *(("auth", value) for value in (5, b"a:b", ("a", "b"), True)),
    *(("host_rewrite", value) for value in ("a b", "a\r\nb", "", "a/b", "http://a", "a:x", "a:70000", "a@b", 5, True)),
    *(("protocol_rewrite", value) for value in ("ftp", "", "https\r\n", "javascript", 5, True)),
    *((name, value) for name in ("cookie_domain_rewrite", "cookie_path_rewrite") for value in
      (True, 5, ["a"], "a;b", "a\r\nb", "a\0b", {"a": "x;y"}, {"a": "x\ny"}, {"a": 5}, {5: "a"}, "a\u20acb")),
    *(("headers", value) for value in
      ("x", 5, {"a b": "c"}, {"": "c"}, {"X": "a\r\nb"}, {"X": "a\0b"}, {"X": "a\nb"}, {"X:": "a"}, {"X\r\nY": "a"},
       {"X": None}, {5: "a"}, {"X": "\u20ac"}, {"\u00e9": "a"})),
    *(("follow_redirects", value) for value in (-1, "yes", 1.5, [])),
    *(("buffer", value) for value in ("text", b"bytes", 5, ["a"], io.StringIO("text"))),
    *(("agent", value) for value in (5, True, "x", object(), http_proxy)),
    *(("ws_stop", value) for value in ("later", "", None, True)),
    *(("balance", value) for value in ("random", "", None, True, "Round_Robin")),
    *(("sticky", value) for value in ("ip", True, "", 5, "Cookie")),
    *(("sticky_name", value) for value in ("a b", "a=b", "", 5, "a;b", "a\r\nb", None, "a,b", "\u00e9")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), BAD, ids=lambda value: repr(value).partition(" at 0x")[0].partition(" from ")[0][:30]
)
def test_what_cannot_be_used(name, value):
    with pytest.raises(ValueError, match=name):
        http_proxy.create_server(9000, **{name: value})


@pytest.mark.parametrize("name", ["nonsense", "proxyTimeout", "changeOrigin", "hostRewrite", "ssl", "Xfwd"])
def test_unknown_options(name):
    with pytest.raises(TypeError, match=name):
        http_proxy.create_server(9000, **{name: True})


GOOD = {
    "forward": [None, 9001, "http://x:81/y", "unix:/x/y"],
    "xfwd": [True, False, "append", "replace"],
    "forwarded": [True, False, "append", "replace"],
    "trusted": [None, "*", [], ["10.0.0.0/8", "::1"], ("127.0.0.1",), {"192.0.2.1"}],
    "via": [False, True, "edge", "edge.example:8080"],
    "local_address": [None, "127.0.0.1", "::1", "0.0.0.0"],
    "auth": [None, "a:b", "a:"],
    "host_rewrite": [None, "a.example", "a.example:81", "127.0.0.1", "[::1]:81"],
    "protocol_rewrite": [None, "http", "https"],
    "cookie_domain_rewrite": [False, "", "a.example", {}, {"a.example": "", "*": "b.example"}],
    "cookie_path_rewrite": [False, "", "/", {"/a": "/b", "*": ""}],
    "headers": [None, {}, {"X": "a"}, {"X": ""}],
    "proxy_timeout": [None, 1, 0.5],
    "timeout": [None, 1, 0.5],
    "ws_timeout": [None, 1, 0.5],
    "follow_redirects": [False, True, 0, 3],
    "buffer": [None, io.BytesIO(b"")],
    "agent": [None, False],
    "ws_stop": ["close", "wait"],
    "balance": ["round_robin", "least_connections"],
    "fail_timeout": [0.5, 10],
    "sticky": [None, "cookie"],
    "sticky_name": ["there", "__Host-there"],
    **{name: [True, False] for name in SWITCHES},
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_can_be_used(name):
    for value in GOOD[name]:
        assert callable(http_proxy.create_server(9000, **{name: value}))


def test_an_agent_can_be_used():
    assert callable(http_proxy.create_server(9000, agent=http_proxy.Agent()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_connections", value) for value in (0, -1, 1.5, "5", True)),
        *(("max_idle", value) for value in (-1, 1.5, "5", None)),
        *(
            (name, value)
            for name in ("idle_timeout", "connect_timeout")
            for value in (-1, "5", float("nan"), True)
        ),
        *(("ssl_context", value) for value in ("x", True, 5)),
    ],
)
def test_what_an_agent_cannot_use(name, value):
    with pytest.raises(ValueError, match=name):
        http_proxy.Agent(**{name: value})


def test_what_an_agent_can_use():
    http_proxy.Agent(
        max_connections=1,
        max_idle=0,
        idle_timeout=0.5,
        connect_timeout=1,
        ssl_context=ssl.create_default_context(),
    )
    http_proxy.Agent(max_connections=None)
    with pytest.raises(TypeError):
        http_proxy.Agent(nonsense=1)


@pytest.mark.parametrize(
    ("options", "error"), [("nonsense=1", "TypeError"), ("proxy_timeout=-1", "ValueError")]
)
def test_what_cannot_be_used_for_one_request(lab, upstream, port, options, error):
    where = lab.serve(f"{port}, {options}", "routed")
    assert refuse(where).status == 500
    name = options.partition("=")[0]
    assert name in lab.wait_log(name)
    assert not upstream.connects_within(0.1)


def test_options_for_one_request_are_gone_with_the_next(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port}, headers={{"X-Always": "1"}})
def app(environ, start_response):
    more = {{"headers": {{"X-Once": "1"}}, "change_origin": True}} if environ["PATH_INFO"] == "/once" else {{}}
    return proxy.web(environ, start_response, **more)
passenger.create_server(app).listen("unix:{where}")
""")
    once, _ = ask(where, upstream, request("/once", "Connection: close"))
    upstream.wires[-1].close()
    then, _ = ask(where, upstream, request("/then"))
    assert (once.get("x-once"), once.get("host")) == (["1"], [f"localhost:{port}"])
    assert (then.get("x-once"), then.get("x-always"), then.get("host")) == ([], ["1"], ["example.org"])


def test_a_target_for_one_request(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({free_port()})
def app(environ, start_response):
    return proxy.web(environ, start_response, target="http://127.0.0.1:{port}/base")
passenger.create_server(app).listen("unix:{where}")
""")
    got, came = ask(where, upstream)
    assert (got.path, came.status) == ("/base/x", 200)


def test_the_proxy_is_a_wsgi_callable(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port}, headers={{"X-Through": "call"}})
passenger.create_server(lambda environ, start_response: proxy(environ, start_response)).listen("unix:{where}")
""")
    got, came = ask(where, upstream)
    assert (got.get("x-through"), came.text) == (["call"], b"ok")


def test_many_proxies_of_one_program(lab):
    """Each with a target and options of its own."""
    ports = [free_port() for _ in range(3)]
    places = [
        lab.serve(f"{port}, headers={{'X-Number': '{port}'}}, change_origin={port == ports[1]}")
        for port in ports
    ]
    for port, where in zip(ports, places, strict=True):
        with Upstream(port) as upstream:
            got, _ = ask(where, upstream)
            assert got.get("x-number") == [str(port)]
            assert got.get("host") == [f"localhost:{port}" if port == ports[1] else "example.org"]


def test_nothing_was_logged_as_a_bug(gunicorn, lab, upstream, port):
    """A request of fetch, as the other tests make it, and a log without tracebacks of the proxy's own."""
    where = lab.serve(f"{port}")
    thread = threading.Thread(target=lambda: upstream.accept().send(OK))
    thread.start()
    assert fetch(where) == (200, "ok")
    thread.join()
    assert "gunicorn_passenger/proxy" not in lab.log()


# --- 23, 24 ------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("asked", ["/asked?q", "http://example.org/asked?q"])
def test_the_path_of_the_target_alone_for_a_proxy(lab, upstream, port, mode, asked):
    where = lab.serve(f"'http://127.0.0.1:{port}/base?x=1', to_proxy=True, ignore_path=True", mode)
    got, _ = ask(where, upstream, request(asked))
    url = urlsplit(got.path)
    assert (url.path, url.query) == ("/base", "x=1"), got
