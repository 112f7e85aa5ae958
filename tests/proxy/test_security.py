"""Nothing that a client, a target or a handler chooses reaches the other side, or the log, as more than it is."""

import ast
import contextlib
import logging
import re
import ssl
from pathlib import Path

import pytest
from free_ports import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy_harness import came
from proxy_laboratory import Origin, accept, answer, ask, read_request, read_response, refuse, request
from upstream_sockets import Upstream, connect
from werkzeug.middleware.proxy_fix import ProxyFix
from wsgi_calls import call, environ

import gunicorn_passenger.proxy
from gunicorn_passenger import http_proxy
from gunicorn_passenger.errors import BadRequestBody, BadResponse, SettingError
from gunicorn_passenger.http.grammar import FIELD_VALUE
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.downstream import WsgiDownstream
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_target import BadTarget, request_path
from gunicorn_passenger.proxy.response_head import ResponseChunks, ResponseHead, serialize_headers
from gunicorn_passenger.system.text import printable

RELAXED = settings(deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def port():
    return free_port()


# --- the last place before the wire ------------------------------------------------------------------


TEXTS = st.text(max_size=20) | st.sampled_from(
    ["a\r\nb: c", "a\nb", "a\rb", "a\0", "", " ", "\u20ac", "\udc80"]
)


@RELAXED
@given(TEXTS, TEXTS)
def test_a_request_line_is_one_line_or_none(method, target):
    try:
        line = wire.request_line(method, target)
    except wire.Unsendable as error:
        assert printable(str(error)) == str(error)
        return
    assert re.fullmatch(rb"[!-~]+ [!-~]+ HTTP/1\.1\r\n", line)


@RELAXED
@given(st.integers(-1, 1200), TEXTS)
def test_a_status_line_is_one_line_or_none(status, reason):
    with contextlib.suppress(wire.Unsendable):
        line = wire.status_line(status, reason)
        assert re.fullmatch(rb"HTTP/1\.1 [0-9]{3} [\t\x20-\x7e\x80-\xff]*\r\n", line)


@RELAXED
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
def test_headers_are_a_line_each_or_none(fields):
    try:
        lines = wire.lines_of(fields)
    except wire.Unsendable as error:
        assert printable(str(error)) == str(error)
        return
    assert lines.count(b"\n") == lines.count(b"\r") == len(fields)
    for line, (name, value) in zip(lines.split(b"\r\n"), fields, strict=False):
        assert line == f"{name}: {value}".encode("latin-1")
        assert b":" not in name.encode()


def test_heads_are_written_in_one_place():
    """A text with a line break is put together from others in ``wire`` alone; what is left makes no text of others."""
    found = set()
    for file in Path(gunicorn_passenger.proxy.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = []
            if isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.Add)):
                parts = [side.value for side in (node.left, node.right) if isinstance(side, ast.Constant)]
            for part in parts:
                text = part.decode("latin-1") if isinstance(part, bytes) else str(part)
                if "\r\n" in text and text != "\r\n":
                    found.add((file.name, text))
    assert {(file, text) for file, text in found if file != "wire.py"} == {
        ("handler.py", "GET %b HTTP/1.1\r\n"),
        ("response_head.py", "Connection: keep-alive\r\n\r\n"),
        ("upgrade.py", "%b%b%b\r\n"),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"REQUEST_METHOD": "GET / HTTP/1.1\r\nX:"},
        {"REQUEST_METHOD": "G T"},
        {"REQUEST_METHOD": ""},
        {"wsgi.url_scheme": "http\r\nX-Role: admin"},
        {"HTTP_X_A": "1\r\nX-Role: admin"},
        {"HTTP_X_A\r\nX-Role": "1"},
        {"CONTENT_TYPE": "a\r\nX-Role: admin"},
        {"HTTP_HOST": "a\r\nX-Role: admin"},
        {"HTTP_COOKIE": "a=1\r\nX-Role: admin"},
    ],
)
@pytest.mark.parametrize("more", [{}, {"forward": True}])
def test_what_a_program_has_broken_is_not_sent(foreign, change, more):
    """In the copy for ``forward``, neither."""
    options = {"xfwd": True, "forwarded": True}
    with contextlib.ExitStack() as stack:
        copies = None
        if more:
            number = free_port()
            copies = stack.enter_context(Upstream(number))
            options["forward"] = number
        (status, _, _), got = foreign(environ(**change), **options)
        assert status in (400, 500)
        assert got == []
        assert copies is None or not copies.connects_within(0.05)


def test_what_a_handler_has_broken_is_not_sent_to_a_client(foreign):
    """The last place checks what a response of ``self_handle_response`` does not go through."""
    number = free_port()
    with Origin(number):
        proxy = http_proxy.create_server(number, "127.0.0.1")
        proxy.on("proxy_res", lambda response, request: response.headers._list.append(("X", "a\r\nb: c")))
        status, headers, _ = call(proxy.web, environ())
        proxy.proxy.close()
    assert status == 500
    assert not [value for _, value in headers if "\n" in value]


# --- the log -----------------------------------------------------------------------------------------


@RELAXED
@given(st.text() | st.builds(lambda a, b: f"{a}\n[CRITICAL] {b}", st.text(), st.text()))
def test_a_shown_text_is_one_printable_line(text):
    assert printable(text).isprintable()
    assert len(printable(text).splitlines()) <= 1
    printable(text).encode("utf-8")


def test_a_target_that_a_function_names_cannot_forge_a_line(lab):
    where = lab.serve("lambda request: 'unix:/none\\n[2020-01-01] [1] [CRITICAL] forged'")
    assert refuse(where).status == 502
    log = lab.wait_log("forged")
    assert "unix:/none\\x0a[2020-01-01]" in log
    assert "\n[2020-01-01]" not in log


def test_a_method_that_a_program_has_made_up_cannot_forge_a_line(foreign, caplog, monkeypatch):
    # a gunicorn Logger that another test has made turns both down
    caplog.set_level(logging.ERROR, "gunicorn.error")
    monkeypatch.setattr(logging.getLogger("gunicorn.error"), "propagate", True)
    (status, _, _), got = foreign(environ(REQUEST_METHOD="GET\n[CRITICAL] forged"))
    assert (status, got) == (500, [])
    lines = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert lines
    assert all(line.isprintable() for line in lines)


# --- the host (P2) -----------------------------------------------------------------------------------


#: With these the program sees the header's host, or that of the target: our worker decides.
EITHER = (["other.example"], ["example.org"])


@pytest.mark.parametrize(
    "target", ["http://other.example/x", "http://other.example", "HTTP://other.example/?q"]
)
def test_the_target_is_told_the_host_that_the_program_sees(lab, upstream, port, target):
    where = lab.place()
    lab.run(f"""
def choose(request):
    seen.append(request.host)
    return "http://127.0.0.1:{port}"
proxy = serve("unix:{where}", "direct", choose, xfwd=True, forwarded=True)
proxy.on("proxy_req", lambda asked, request, options: seen.append(request.environ["HTTP_HOST"]))
""")
    got, _ = ask(where, upstream, request(target))
    told = got.get("host")
    assert told in EITHER
    assert lab.seen() == told * 2
    assert got.get("x-forwarded-host") == told
    assert f";host={told[0]};" in got.get("forwarded")[0]


def test_the_host_that_a_program_has_set_stays(lab, upstream, port):
    where = lab.route(f"{port}, '127.0.0.1', xfwd=True, agent=False", "environ['HTTP_HOST'] = 'www.example'")
    for target in "/x", "http://other.example/x":
        with connect(where) as client:
            client.send(request(target, "X-A: 1", "X-B: 2", "X-A: 3"))
            wire = accept(upstream, client)
            got = read_request(wire)
            wire.send(answer())
            assert read_response(client).status == 200
        assert (got.get("host"), got.get("x-forwarded-host")) == (["www.example"], ["www.example"])
        assert [value for name, value in got.fields if name.startswith("x-") and len(name) == 3] == [
            "1",
            "2",
            "3",
        ]


@pytest.mark.parametrize("key", ["RAW_URI", "REQUEST_URI"])
def test_the_same_under_another_server(foreign, key):
    made = environ(**{key: "http://internal.example/x?q", "PATH_INFO": "/x", "QUERY_STRING": "q"})
    (status, _, _), (got,) = foreign(made, xfwd=True)
    assert (status, got.path) == (200, "/x?q")
    assert (got.get("host"), got.get("x-forwarded-host")) == (["client.example"], ["client.example"])


def test_proxy_fix_decides(foreign):
    made = environ(RAW_URI="http://internal.example/", HTTP_X_FORWARDED_HOST="www.example")
    _, (got,) = foreign(made, wrap=lambda app: ProxyFix(app, x_host=1))
    assert got.get("host") == ["www.example"]


def test_a_further_proxy_is_asked_for_the_host_that_the_program_sees(foreign):
    made = environ(RAW_URI="https://internal.example/x", PATH_INFO="/x")
    _, (got,) = foreign(made, to_proxy=True)
    assert (got.path, got.get("host")) == ("https://client.example/x", ["client.example"])


# --- what Connection names (P3) ----------------------------------------------------------------------


def test_a_header_of_the_program_stays_whatever_connection_names(lab, upstream, port):
    where = lab.route(f"{port}, '127.0.0.1', agent=False", "environ['HTTP_X_USER'] = 'alice'")
    # also the value that the program writes, which nothing tells from the program's
    for sent in (), ("X-User: mallory",), ("X-User: alice",):
        with connect(where) as client:
            client.send(request("/x", "Connection: keep-alive, X-User, X-Hop", "X-Hop: 1", *sent))
            wire = accept(upstream, client)
            got = read_request(wire)
            wire.send(answer())
            assert read_response(client).status == 200
        # what the client has nominated of its own stays, too: it cannot be told from the program's
        assert (got.get("x-user"), got.get("x-hop")) == (["alice"], ["1"])


def test_a_header_that_the_client_has_sent_ends_here(lab, upstream, port):
    where = lab.serve(f"{port}, '127.0.0.1'")
    got, _ = ask(where, upstream, request("/x", "Connection: X-Hop", "X-Hop: 1", "X-Kept: 1"))
    assert (got.get("x-hop"), got.get("x-kept")) == ([], ["1"])


def test_a_wrapped_start_response_changes_nothing_of_that(lab, upstream, port):
    """As Sentry and OpenTelemetry do; fields keep their repetition."""
    code = "outer = start_response; start_response = lambda *a: outer(*a); environ['HTTP_X_USER'] = 'alice'"
    where = lab.route(f"{port}, '127.0.0.1'", code)
    got, _ = ask(where, upstream, request("/x", "Connection: X-User, X-Hop", "X-Hop: 1", "X-A: 1", "X-A: 2"))
    assert (got.get("x-user"), got.get("x-hop"), got.get("x-a")) == (["alice"], ["1"], ["1", "2"])


def test_another_server_does_not_tell_which_side_wrote_a_header(foreign):
    """So it stays: it may be the program's. What always speaks of one connection ends here all the same."""
    made = environ(HTTP_CONNECTION="X-User, TE", HTTP_X_USER="alice", HTTP_TE="trailers", HTTP_KEEP_ALIVE="5")
    _, (got,) = foreign(made)
    assert (got.get("x-user"), got.get("te"), got.get("keep-alive"), got.get("connection")) == (
        ["alice"],
        [],
        [],
        [],
    )


@pytest.mark.parametrize("option", ["headers={'X-User': 'alice'}", "auth='a:b'", "xfwd=True", "via=True"])
def test_what_options_write_stays_whatever_connection_names(lab, upstream, port, option):
    where = lab.serve(f"{port}, '127.0.0.1', {option}")
    names = ["x-user", "authorization", "x-forwarded-for", "via"]
    got, _ = ask(where, upstream, request("/x", f"Connection: {', '.join(names)}"))
    assert sum(len(got.get(name)) for name in names) == 1


def test_what_a_handler_adds_stays_whatever_connection_names(lab, upstream, port):
    where = lab.serve(f"{port}, '127.0.0.1'")
    lab.run("""
proxy.on("proxy_req", lambda asked, request, options: asked.headers.set("X-User", "alice"))
proxy.on("proxy_res", lambda response, request: response.headers.set("X-Seen", "yes"))
""")
    got, came = ask(
        where,
        upstream,
        request("/x", "Connection: X-User", "X-User: mallory"),
        answer("200 OK", "Connection: X-Seen, X-Hop", "X-Seen: no", "X-Hop: 1"),
    )
    assert got.get("x-user") == ["alice"]
    assert (came.get("x-seen"), came.get("x-hop")) == (["yes"], [])


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["X-A", "x-a", "X-B", "Content-Type", "Cookie"]), st.sampled_from(["1", "2", ""])
    ),
    max_size=5,
)


@RELAXED
@given(HEADERS, st.dictionaries(st.sampled_from(["HTTP_X_A", "HTTP_X_B", "HTTP_X_C", "CONTENT_TYPE"]), TEXTS))
def test_what_the_program_has_left_is_what_is_sent(came, changes):
    made = {}
    for name, value in came:
        key = name.upper().replace("-", "_")
        key = key if key == "CONTENT_TYPE" else f"HTTP_{key}"
        made[key] = f"{made[key]},{value}" if key in made else value
    before = dict(made)
    made.update(changes)
    try:
        fields = rules.present_headers(made, came)
    except BadRequestBody:
        assert any(FIELD_VALUE.fullmatch(value) is None for value in changes.values())
        return
    joined = {}
    for name, value in fields:
        low = name.lower()
        joined[low] = f"{joined[low]},{value}" if low in joined else value
    left = {
        key.removeprefix("HTTP_").replace("_", "-").lower(): value
        for key, value in made.items()
        if value or key != "CONTENT_TYPE" or before.get(key) == value
    }
    assert joined == left
    if made == before:
        assert fields == came


def test_a_unix_peer_is_believed_only_when_trusted_says_so(lab, port, upstream):
    """A list of trusted addresses that does not name it must not let it through."""
    said = "X-Forwarded-For: 6.6.6.6"
    for trusted, wanted in (
        ("[]", "127.0.0.1"),
        ("'unix'", "6.6.6.6, 127.0.0.1"),
        ("'*'", "6.6.6.6, 127.0.0.1"),
    ):
        where = lab.serve(f"{port}, '127.0.0.1', agent=False, xfwd=True, trusted={trusted}")
        got, _ = ask(where, upstream, request("/x", said))
        assert got.get("x-forwarded-for") == [wanted]


# --- lengths (P7) ------------------------------------------------------------------------------------


LENGTHS = {
    "0": 0, "5": 5, "05": 5, "0" * 30 + "5": 5, "0" * 4401: 0, "0" * 4400 + "7": 7,
    str(2**63 - 1): 2**63 - 1, str(2**63): None, str(2**64 + 5): None, "9" * 23: None, "9" * 4401: None,
    "": None, "+5": None, "-0": None, "5 ": None, "0x5": None, "1_0": None, "\u0665": None, "\u00b2": None, "5\n": None,
}  # fmt: skip


@pytest.mark.parametrize("text", LENGTHS, ids=lambda text: repr(text[:12]))
def test_what_a_content_length_says(text):
    assert rules.number_of_bytes(text) == LENGTHS[text]


@RELAXED
@given(st.integers(0, 1 << 70), st.integers(0, 5000))
def test_any_number_of_bytes_is_written_in_one_way(number, zeros):
    text = "0" * zeros + str(number)
    wanted = number if number < 1 << 63 else None
    assert rules.number_of_bytes(text) == wanted
    client = WsgiDownstream(environ(CONTENT_LENGTH=text), None)
    if wanted is None:
        with pytest.raises(BadRequestBody):
            client.length()
        with pytest.raises(BadResponse):
            ResponseHead(f"HTTP/1.1 200 OK\r\nContent-Length: {text}\r\n\r\n".encode(), False)
        return
    assert client.length() == number
    assert ("content-length", str(number)) in client.headers(False).lines
    head = ResponseHead(f"HTTP/1.1 200 OK\r\nContent-Length: {text}\r\n\r\n".encode(), False)
    assert (head.length, head.headers) == (number, [("content-length", str(number))])


@pytest.mark.parametrize("text", ["05", "0000005"])
@pytest.mark.parametrize("mode", ["direct", "routed"])
def test_a_length_is_written_anew(lab, upstream, port, mode, text):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    sent = request("/x", f"Content-Length: {text}", method="POST") + b"hello"
    got, came = ask(where, upstream, sent, b"HTTP/1.1 200 OK\r\nContent-Length: 002\r\n\r\nok")
    assert (got.get("content-length"), got.body) == (["5"], b"hello")
    assert came.get("content-length") == ["2"]


@pytest.mark.parametrize("text", [str(2**63), str(2**64 + 5), "9" * 23, "0" * 10 + "9" * 23])
@pytest.mark.parametrize("mode", ["direct", "routed"])
def test_a_length_without_bound_is_400(lab, upstream, port, mode, text):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    with connect(where) as client:
        client.send(request("/x", f"Content-Length: {text}", method="POST") + b"hello")
        assert read_response(client).status == 400
        assert not upstream.connects_within(0.05)


@pytest.mark.parametrize("text", ["0" + "9" * 4401, "9" * 4401, str(2**63)])
def test_a_length_of_thousands_of_digits_is_400_under_another_server(foreign, text):
    (status, _, _), got = foreign(environ(CONTENT_LENGTH=text, REQUEST_METHOD="POST"))
    assert (status, got) == (400, [])


def test_a_length_of_a_response_without_bound_is_502(lab, upstream, port):
    where = lab.serve(f"{port}, '127.0.0.1'")
    _, came = ask(where, upstream, None, f"HTTP/1.1 200 OK\r\nContent-Length: {2**63}\r\n\r\nok".encode())
    assert came.status == 502


# --- upgrades with a body (P8) -----------------------------------------------------------------------


UPGRADE = ("Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
BODIES = {
    "sized": ("Content-Length: 5", b"hello"),
    "chunked": ("Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("protocol", ["websocket", "WebSocket", "websocket/13", "tcp, websocket"])
@pytest.mark.parametrize("mode", ["direct", "routed"])
def test_a_websocket_with_a_body_is_400(lab, upstream, port, mode, protocol, body):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    framing, data = BODIES[body]
    with connect(where) as client:
        client.send(request("/x", *UPGRADE, f"Upgrade: {protocol}", framing) + data)
        assert read_response(client).status == 400
        assert not upstream.connects_within(0.05)


@pytest.mark.parametrize("body", BODIES)
def test_docker_attaches_with_a_body(lab, upstream, port, body):
    where = lab.serve(f"{port}, '127.0.0.1'")
    framing, data = BODIES[body]
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", "Upgrade: tcp", framing, method="POST") + data)
        wire = accept(upstream, client)
        got = read_request(wire)
        assert (got.get("upgrade"), b"hello" in got.body) == (["tcp"], True)
        wire.send(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhi")
        assert client.head().startswith(b"HTTP/1.1 101 ")
        assert client.exactly(2) == b"hi"
        client.send(b"there")
        assert wire.exactly(5) == b"there"


def test_a_websocket_without_a_body_may_say_so(lab, upstream, port):
    where = lab.serve(f"{port}, '127.0.0.1', buffer=io.BytesIO(b'hello')")
    with connect(where) as client:
        client.send(request("/x", *UPGRADE, "Upgrade: websocket", "Content-Length: 0"))
        wire = accept(upstream, client)
        got = read_request(wire)
        # as in node-http-proxy, buffer= is for requests that are not upgrades
        assert (got.get("upgrade"), got.body, wire.data) == (["websocket"], b"", b"")
        wire.send(answer())
        assert read_response(client).status == 200


def test_a_handler_cannot_give_a_websocket_a_body(lab, upstream, port):
    where = lab.serve(f"{port}, '127.0.0.1'")
    lab.run("proxy.on('proxy_req_ws', lambda asked, request, options: setattr(asked, 'body', b'hello'))")
    with connect(where) as client:
        client.send(request("/x", *UPGRADE, "Upgrade: websocket"))
        assert read_response(client).status == 500
        assert not upstream.connects_within(0.05)
    lab.wait_log("a WebSocket request has no body")


# --- targets in absolute form (P9) -------------------------------------------------------------------


BAD_TARGETS = [
    "http:///x", "http://", "http://user@host/", "http://user:secret@host/x", "http://@host/", "file:///etc/passwd",
    "ftp://host/x", "http:/x", "http:x", "//host/x@y:"[2:], "urn:a", "http://:80/x", "http://a:b/", "http://a:0/",
    "http://a:65536/", "http://a:1000080/", "http://[foo]/", "http://a b/", "http://a,b/", "host:80", "*",
]  # fmt: skip


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_a_bad_target_is_400_under_another_server(foreign, target):
    (status, _, body), got = foreign(environ(RAW_URI=target))
    assert (status, got) == (400, [])
    assert b"target" in body


@pytest.mark.parametrize("target", [target for target in BAD_TARGETS if " " not in target])
@pytest.mark.parametrize("mode", ["direct", "routed"])
def test_a_bad_target_is_400(lab, upstream, port, mode, target):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    with connect(where) as client:
        client.send(request(target))
        assert read_response(client).status == 400
        assert not upstream.connects_within(0.02)


PARTS = st.sampled_from(
    [
        "",
        "a",
        "a.example",
        "u@a",
        "a:80",
        "a:",
        ":80",
        "[::1]",
        "[::1]:8",
        "[x]",
        "a:99999",
        "a\r\nX: y",
        "\u00e9",
    ]
)


@RELAXED
@given(
    st.sampled_from(["http", "HTTPS", "file", "ws", "", "ht\ntp"]),
    PARTS,
    st.sampled_from(["", "/", "/x?q#f", "?q", "#f", "/a b", "/\r\nX: y", "//b", "/@c"]),
    st.sampled_from(["GET", "OPTIONS"]),
)
def test_any_absolute_target_is_read_in_one_way(scheme, authority, rest, method):
    made = environ(RAW_URI=f"{scheme}://{authority}{rest}", REQUEST_METHOD=method, PATH_INFO="/x")
    try:
        path, said = request_path(made)
    except BadTarget:
        good = scheme.lower() in ("http", "https") and authority in (
            "a",
            "a.example",
            "a:80",
            "a:",
            "[::1]",
            "[::1]:8",
            "\u00e9",
        )
        assert not good
        return
    assert said == scheme.lower()
    assert "@" not in authority
    assert re.fullmatch(r"\*|/[\x21-\x22\x24-\x7e]*", path), path


# --- smaller (P10) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["direct", "routed"])
@pytest.mark.parametrize("handler", [False, True])
def test_a_426_says_what_to_upgrade_to(lab, upstream, port, mode, handler):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    if handler:
        lab.run("proxy.on('proxy_res', lambda response, request: response.headers.set('X-Seen', 'yes'))")
    reply = answer("426 Upgrade Required", "Upgrade: websocket", "Connection: Upgrade")
    _, came = ask(where, upstream, None, reply)
    assert (came.status, came.get("upgrade")) == (426, ["websocket"])
    assert "upgrade" in [value.lower() for value in came.get("connection")]


def test_other_responses_say_nothing_of_upgrades():
    head = ResponseHead(b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n", False)
    assert b"pgrade" not in serialize_headers(head.headers, head.status)


class Refusing(Origin):
    """Asks each client to upgrade."""

    def reply(self, message):
        return answer("426 Upgrade Required", "Upgrade: a", "Connection: Upgrade")


def test_a_426_under_another_server_has_no_hop_by_hop_header():
    """PEP 3333 leaves these to the server."""
    number = free_port()
    with Refusing(number):
        proxy = http_proxy.create_server(number, "127.0.0.1")
        status, headers, body = call(proxy.web, environ())
        proxy.proxy.close()
    assert (status, body) == (426, b"ok")
    assert [name for name, _ in headers if name.lower() in ("upgrade", "connection")] == []


@pytest.mark.parametrize("where", ["options", "table", "middleware", "merged"])
def test_secure_false_beside_a_context_is_refused(where):
    agent = http_proxy.Agent(ssl_context=ssl.create_default_context())
    with pytest.raises(SettingError, match="secure=False has no effect on an agent with an ssl_context"):
        if where == "options":
            http_proxy.create_server("https://a", secure=False, agent=agent)
        elif where == "table":
            http_proxy.create_server({"/": {"target": "https://a", "secure": False}}, agent=agent)
        elif where == "middleware":
            entry = {"target": "https://a", "ssl_context": ssl.create_default_context()}
            http_proxy.ProxyMiddleware(None, {"/": entry}, secure=False)
        else:
            Options().merged({"agent": agent}, "a").merged({"secure": False}, "b")
    http_proxy.create_server("https://a", secure=True, agent=agent)
    http_proxy.create_server("https://a", secure=False, agent=http_proxy.Agent())


@pytest.mark.parametrize("size", [65536, 65537, 70000])
@pytest.mark.parametrize("interim", [False, True])
def test_the_head_of_a_response_has_64_kib(lab, upstream, port, size, interim):
    where = lab.serve(f"{port}, '127.0.0.1'")
    reply = answer("103 Early Hints" if interim else "200 OK", "X-A: ", body=b"ok")
    if interim:
        reply = b"HTTP/1.1 103 Early Hints\r\nX-A: \r\n\r\n"
    head = reply.removesuffix(b"ok")
    reply = reply.replace(b"X-A: ", b"X-A: " + b"a" * (size - len(head)))
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        with contextlib.suppress(ConnectionError):
            wire.send(reply + (answer() if interim else b""))
        came = read_response(client)
        if interim and size <= 65536:
            assert came.status == 103
            came = read_response(client)
        assert came.status == (200 if size <= 65536 else 502)


@pytest.mark.parametrize("size", [65536, 65537])
def test_trailers_of_a_response_have_64_kib(size):
    section = b"X-A: " + b"a" * (size - len(b"X-A: \r\n\r\n")) + b"\r\n\r\n"
    assert len(section) == size
    decoder = ResponseChunks()
    with contextlib.nullcontext() if size <= 65536 else pytest.raises(BadResponse, match="trailers"):
        decoder.feed(b"0\r\n" + section)
        assert decoder.finished


# --- 3: what an app puts into environ ----------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "bob\r\nX-Admin: yes\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: b",
        "a\r\n b",
        "a\nb",
        "a\rb",
        "a\0b",
        "\u20ac",
    ],
)
def test_a_field_that_an_app_has_broken_is_400(lab, upstream, port, value):
    where = lab.route(port, f"environ['HTTP_X_USER'] = {value!a}")
    with connect(where) as client:
        client.send(request())
        assert read_response(client).status == 400
        if upstream.connects_within(0.1):
            assert not came(upstream.wires[0])
    lab.assert_calm()
