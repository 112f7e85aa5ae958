"""What handlers write into requests and responses: nothing of it splits a message."""

import contextlib

import pytest
from http_client import fetch
from proxy_harness import OK, PLACES, cut_off, get, request_of, response_of
from upstream_sockets import connect

from gunicorn_passenger import http_proxy

HANDLERS = """
def change_request(upstream_request, request, options):
    todo = request.headers.get("X-Do")
    fields = upstream_request.headers
    if todo == "path": upstream_request.path = bytes.fromhex(request.headers["X-With"]).decode("latin-1")
    elif todo == "method": upstream_request.method = bytes.fromhex(request.headers["X-With"]).decode("latin-1")
    elif todo == "value": fields["X-Made"] = bytes.fromhex(request.headers["X-With"]).decode("latin-1")
    elif todo == "value past werkzeug":
        fields._list.append(("X-Made", bytes.fromhex(request.headers["X-With"]).decode("latin-1")))
    elif todo == "name": fields._list.append((bytes.fromhex(request.headers["X-With"]).decode("latin-1"), "1"))
    elif todo == "unicode": fields["X-Made"] = "\\u4e2d"
    elif todo == "field": fields.set(*request.headers["X-With"].split(": "))
    elif todo == "add": fields.add(*request.headers["X-With"].split(": "))
    elif todo == "body": upstream_request.body = b"new body"
    elif todo == "remove": del fields[request.headers["X-With"]]

def change_response(upstream_response, request):
    todo = request.headers.get("X-Do")
    fields = upstream_response.headers
    what = request.headers.get("X-With", "")
    if todo == "answer reason": upstream_response.reason = bytes.fromhex(what).decode("latin-1")
    elif todo == "answer status": upstream_response.status_code = int(what)
    elif todo == "answer value": fields["X-Made"] = bytes.fromhex(what).decode("latin-1")
    elif todo == "answer value past werkzeug":
        fields._list.append(("X-Made", bytes.fromhex(what).decode("latin-1")))
    elif todo == "answer name": fields._list.append((bytes.fromhex(what).decode("latin-1"), "1"))
    elif todo == "answer field": fields.set(*what.split(": "))
    elif todo == "answer add": fields.add(*what.split(": "))
    elif todo == "answer remove": del fields[what]

for name in ("handled", "inside_handled"):
    P[name].on("proxy_req", change_request)
    P[name].on("proxy_res", change_response)
"""
SERVERS = {**PLACES, "handled": "UP, HOST", "inside_handled": "UP, HOST"}
HANDLED = pytest.mark.parametrize("where", ["handled", "inside_handled"])


@pytest.fixture
def px(shared, request):
    yield shared
    fetch(shared.status)
    # a handler that raises is logged with its traceback
    if "handled" in request.node.name:
        shared.mark = len(shared.process.log())
    shared.quiet()


START = b"HTTP/1.1 200 OK\r\n"

EVIL = "a\r\nX-Evil: 1"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("headers", {"X": EVIL}), ("headers", {"X": "a\nb"}), ("headers", {"X": "a\rb"}), ("headers", {"X": "a\0b"}),
        ("headers", {"X\r\nY": "a"}), ("headers", {"X Y": "a"}), ("headers", {"": "a"}), ("headers", {"X:": "a"}),
        ("headers", {"X": "\u4e2d"}), ("headers", {"X-\xe9": "a"}), ("headers", {"X": b"a"}), ("headers", {"X": None}),
        ("headers", {"Content-Length": "5"}), ("headers", {"Transfer-Encoding": "chunked"}),
        ("host_rewrite", EVIL), ("host_rewrite", "a b"), ("host_rewrite", "a/b"), ("host_rewrite", "user@a"),
        ("protocol_rewrite", "javascript"), ("protocol_rewrite", "http\r\nX: y"),
        ("cookie_domain_rewrite", EVIL), ("cookie_domain_rewrite", "a; Secure"), ("cookie_domain_rewrite", {"*": EVIL}),
        ("cookie_domain_rewrite", {"a": "b;c"}), ("cookie_path_rewrite", "/a\nb"), ("cookie_path_rewrite", {"/": "/;x"}),
        ("via", EVIL), ("via", "a b"), ("via", "a, 1.1 b"), ("sticky_name", "a\r\nb"), ("sticky_name", "a=b"),
        ("sticky_name", "a b"), ("auth", 5), ("local_address", "a\r\nb"),
    ],
)  # fmt: skip
def test_options_that_would_break_a_message_are_refused(option, value):
    with pytest.raises((ValueError, TypeError), match=option):
        http_proxy.create_server(9000, **{option: value})


@pytest.mark.parametrize(
    "target",
    [
        "http://h/a\r\nX: y",
        "http://h/a b",
        "http://h\r\nX: y/",
        "http://h/\n",
        "http://h/\u4e2d",
        "http://a b/",
        "http://h/\0",
    ],
)
def test_targets_that_would_break_a_message_are_refused(target):
    with pytest.raises(ValueError, match="target"):
        http_proxy.create_server(target)


def asking(todo, what, *fields, method="GET"):
    return get("/", f"X-Do: {todo}", f"X-With: {what}", *fields, method=method)


BROKEN = ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rX-Evil: 1", "a\0b", "\r\n"]


@HANDLED
@pytest.mark.parametrize(
    ("todo", "value"),
    [
        *[("path", "/" + value) for value in BROKEN],
        ("path", "/a b"), ("path", "/ HTTP/1.1\r\nHost: evil\r\n\r\nGET /evil"), ("path", "/\x7f"), ("path", "/\t"),
        *[("method", value) for value in BROKEN],
        ("method", "GET /evil HTTP/1.1\r\n\r\nGET"), ("method", "GET "), ("method", ""), ("method", "G\xc9T"), ("method", "G:T"),
        *[("value", value) for value in BROKEN],
        *[("value past werkzeug", value) for value in BROKEN],
        *[("name", value) for value in BROKEN],
        ("name", "X Evil"), ("name", ""), ("name", "X:Evil"), ("name", "X-\xc9vil"),
        ("unicode", ""),
    ],
)  # fmt: skip
def test_a_handler_cannot_break_the_request(px, where, todo, value):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(asking(todo, value.encode("latin-1").hex()))
        assert response_of(client).status == 500
        if upstream.connects_within(0.05):
            # at most a connection that was made ready before
            assert not upstream.wires[0].data
            assert not cut_off(upstream.wires[0])


@HANDLED
@pytest.mark.parametrize("todo", ["field", "add"])
@pytest.mark.parametrize(
    "field",
    [
        "Content-Length: 3",
        "Content-Length: 0",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip",
        "Connection: close",
    ],
)
@pytest.mark.parametrize("framing", ["none", "length", "chunked"])
def test_a_handler_cannot_break_the_framing_of_a_request(px, where, todo, field, framing):
    framed = {
        "none": ([], b""),
        "length": (["Content-Length: 5"], b"hello"),
        "chunked": (["Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n"),
    }[framing]
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(asking(todo, field, *framed[0], method="POST") + framed[1])
        if not upstream.connects_within(2):
            assert response_of(client).status == 500
            return
        wire = upstream.wires[0]
        got = request_of(wire)  # asserts that there is one framing
        assert got.body == (b"" if framing == "none" else b"hello")
        wire.send(OK)
        assert response_of(client).body == b"ok"
        assert not wire.data


@HANDLED
@pytest.mark.parametrize("framing", ["none", "length", "chunked"])
@pytest.mark.parametrize("field", ["Content-Length", "Transfer-Encoding", "Host"])
def test_a_handler_cannot_take_the_framing_away(px, where, framing, field):
    framed = {
        "none": ([], b""),
        "length": (["Content-Length: 5"], b"hello"),
        "chunked": (["Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n"),
    }[framing]
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(asking("remove", field, *framed[0], method="POST") + framed[1])
        if not upstream.connects_within(2):
            assert response_of(client).status == 500
            return
        got = request_of(upstream.wires[0])
        assert got.body == (b"" if framing == "none" else b"hello")
        if field == "Host":
            assert len(got.all("host")) == 1


@HANDLED
@pytest.mark.parametrize("framing", ["none", "length", "chunked"])
def test_a_body_of_a_handler_has_its_own_framing(px, where, framing):
    framed = {
        "none": ([], b""),
        "length": (["Content-Length: 5"], b"hello"),
        "chunked": (["Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n"),
    }[framing]
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(asking("body", "", *framed[0], method="POST") + framed[1])
        wire = upstream.accept()
        got = request_of(wire)
        assert (got.get("content-length"), got.body) == ("8", b"new body")
        wire.send(OK)
        assert response_of(client).body == b"ok"
        client.send(get("/next"))
        assert request_of(wire).target == "/next"


@HANDLED
@pytest.mark.parametrize(
    ("todo", "value"),
    [
        *[("answer reason", value.encode().hex()) for value in BROKEN],
        ("answer status", "99"), ("answer status", "1000"), ("answer status", "101"), ("answer status", "103"),
        ("answer status", "-200"),
        *[("answer value", value.encode().hex()) for value in BROKEN],
        *[("answer value past werkzeug", value.encode().hex()) for value in BROKEN],
        *[("answer name", value.encode().hex()) for value in [*BROKEN, "X Evil", ""]],
    ],
)  # fmt: skip
def test_a_handler_cannot_break_the_answer(px, where, todo, value):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(asking(todo, value))
        wire = upstream.accept()
        request_of(wire)
        wire.send(OK)
        answer = response_of(client)
        assert answer.status == 500
        assert not answer.all("x-evil")


@HANDLED
@pytest.mark.parametrize("todo", ["answer field", "answer add"])
@pytest.mark.parametrize(
    "field", ["Content-Length: 3", "Content-Length: 1", "Transfer-Encoding: chunked", "Connection: close"]
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_handler_cannot_break_the_framing_of_an_answer(px, where, todo, field, framing):
    answer = OK if framing == "length" else START + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(asking(todo, field))
        wire = upstream.accept()
        request_of(wire)
        wire.send(answer)
        try:
            seen = response_of(client)
        except AssertionError as error:
            # told to announce a length that is not: cut off
            assert "the connection ended" in str(error)
            return
        if seen.status == 200 and seen.body == b"ok":
            client.send(get("/next"))
            again = wire if not upstream.connects_within(0.02) else upstream.wires[-1]
            with contextlib.suppress(AssertionError):
                assert request_of(again).target == "/next"
                again.send(OK)
                assert response_of(client).body == b"ok"
        else:
            assert seen.status in (500, 502) or cut_off(client) == b"", seen
