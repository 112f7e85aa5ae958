"""The proxy's events: when each is called, with what, and what a handler may change."""

import gzip
import http.client
import select

import pytest
from conftest import Client, free_port
from proxy_laboratory import (
    OK,
    Message,
    accept,
    answer,
    ask,
    laboratory,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

MODES = pytest.mark.parametrize("mode", ["direct", "routed"])

EVENTS = ["start", "proxy_req", "proxy_req_ws", "proxy_res", "end", "open", "close", "error", "econnreset"]


@pytest.fixture(scope="module")
def gunicorn():
    with laboratory() as lab:
        yield lab


@pytest.fixture
def lab(gunicorn):
    return gunicorn.scene()


@pytest.fixture
def upstream(port):
    with Upstream(port) as upstream:
        yield upstream


#: notes the name of each event in ``seen``
NOTE_ALL = """
for name in ("start", "proxy_req", "proxy_req_ws", "proxy_res", "end", "open", "close", "error", "econnreset"):
    proxy.on(name, lambda *arguments, name=name: seen.append(name))
"""


def handle(lab, event, body, arguments="upstream_request, request, options"):
    """Add a handler, from the source of its body."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    lab.run(f"\n@proxy.on({event!r})\ndef handler({arguments}):\n{lines}\n")


def on_answer(lab, body):
    handle(lab, "proxy_res", body, "upstream_response, request")


# --- adding handlers -----------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
def test_a_handler_is_added_by_a_call_or_as_a_decorator(event):
    proxy = http_proxy.create_server(9000)

    def called(*arguments):
        pass

    proxy.on(event, called)

    @proxy.on(event)
    def decorated(*arguments):
        pass

    assert decorated is not None
    assert callable(decorated)
    assert decorated.__name__ == "decorated"


@pytest.mark.parametrize("event", ["proxyReq", "nonsense", "", None, 5])
def test_an_event_that_there_is_not(event):
    with pytest.raises((ValueError, TypeError)):
        http_proxy.create_server(9000).on(event, print)


@pytest.mark.parametrize("handler", [5, "print"])
def test_a_handler_that_cannot_be_called(handler):
    with pytest.raises((ValueError, TypeError)):
        http_proxy.create_server(9000).on("start", handler)


# --- the order of events, and what they are given ------------------------------------------------


@MODES
def test_the_events_of_a_request(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    lab.run(NOTE_ALL)
    ask(where, upstream, request(method="POST", body=b"hello"))
    assert lab.wait_seen(4) == ["start", "proxy_req", "proxy_res", "end"]
    ask_again(where, upstream)
    assert lab.wait_seen(8) == ["start", "proxy_req", "proxy_res", "end"] * 2


def ask_again(where, upstream, sent=None, reply=OK):
    """One more request, on the connection that was kept, or a new one."""
    upstream.wires[-1].close()
    return ask(where, upstream, sent, reply)


@MODES
def test_what_the_handlers_are_given(lab, upstream, port, mode):
    where = lab.serve(f"'http://127.0.0.1:{port}/base', xfwd=True, headers={{'X-Set': 'ours'}}", mode)
    lab.run("""
@proxy.on("start")
def start(request, target):
    seen.append(("start", isinstance(request, Request), request.method, request.path, request.args["q"],
                 request.headers["X-Thing"], str(target)))

@proxy.on("proxy_req")
def proxy_req(upstream_request, request, options):
    headers = upstream_request.headers
    seen.append(("proxy_req", upstream_request.method, upstream_request.path, headers["X-Set"], headers["x-thing"],
                 headers["X-Forwarded-For"], headers["Host"], type(headers).__name__, request.path))

@proxy.on("proxy_res")
def proxy_res(upstream_response, request):
    headers = upstream_response.headers
    seen.append(("proxy_res", upstream_response.status_code, upstream_response.reason, headers["x-answer"],
                 headers.getlist("Set-Cookie"), type(headers).__name__, request.path))

@proxy.on("end")
def end(request, upstream_response):
    seen.append(("end", request.path, upstream_response.status_code))
""")
    reply = answer("299 Odd One", "X-Answer: 1", "Set-Cookie: a=1", "Set-Cookie: b=2")
    ask(where, upstream, request("/x?q=1", "X-Thing: 2", method="PUT", body=b"hello"), reply)
    start, sent, came, end = lab.wait_seen(4)
    assert start[:6] == ("start", True, "PUT", "/x", "1", "2")
    assert f"127.0.0.1:{port}" in start[6]
    assert sent == (
        "proxy_req", "PUT", "/base/x?q=1", "ours", "2", "127.0.0.1", "example.org", "Headers", "/x",
    )  # fmt: skip
    assert came == ("proxy_res", 299, "Odd One", "1", ["a=1", "b=2"], "Headers", "/x")
    assert end == ("end", "/x", 299)


def test_nothing_is_sent_before_start_and_proxy_req_have_returned(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run(NOTE_ALL)
    lab.run("""
gate = gevent.event.Event()
proxy.on("proxy_req", lambda *arguments: gate.wait())
""")
    with connect(where) as client:
        client.send(request())
        lab.wait_seen(2)
        assert lab.seen() == ["start", "proxy_req"]
        # at most connected
        if upstream.connects_within(0.2):
            upstream.wires[-1].sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                upstream.wires[-1].more()
            upstream.wires[-1].sock.settimeout(30)
        lab.run("gate.set()")
        wire = upstream.wires[-1] if upstream.wires else accept(upstream, client)
        assert read_request(wire).path == "/x"
        wire.send(OK)
        assert read_response(client).status == 200


def test_the_handlers_of_a_request_run_in_its_own_greenlet(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("""
for name in ("start", "proxy_req", "proxy_res", "end"):
    proxy.on(name, lambda *arguments: seen.append(id(gevent.getcurrent())))
""")
    ask(where, upstream)
    assert len(set(lab.wait_seen(4))) == 1


def test_several_handlers_are_called_in_the_order_in_which_they_were_added(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("""
for event in ("proxy_res", "proxy_req", "end", "start"):
    for number in range(3):
        proxy.on(event, lambda *arguments, event=event, number=number: seen.append((event, number)))
""")
    ask(where, upstream)
    expected = [(event, n) for event in ("start", "proxy_req", "proxy_res", "end") for n in range(3)]
    assert lab.wait_seen(12) == expected


def test_a_later_handler_sees_what_an_earlier_one_changed(lab, upstream, port):
    where = lab.serve(f"{port}")
    for _ in range(2):
        handle(
            lab,
            "proxy_req",
            "upstream_request.headers['X-N'] = upstream_request.headers.get('X-N', '') + 'x'",
        )
        on_answer(lab, "upstream_response.status_code += 1")
    got, came = ask(where, upstream)
    assert got.get("x-n") == ["xx"]
    assert came.status == 202


# --- proxy_req -----------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("body", "start"),
    [
        ("upstream_request.method = 'OPTIONS'", "OPTIONS /x?q HTTP/1.1"),
        ("upstream_request.path = '/other?z=%20'", "GET /other?z=%20 HTTP/1.1"),
        ("upstream_request.path += '&more=1'", "GET /x?q&more=1 HTTP/1.1"),
        ("upstream_request.method, upstream_request.path = 'DELETE', '/'", "DELETE / HTTP/1.1"),
    ],
)
def test_proxy_req_changes_the_request_line(lab, upstream, port, mode, body, start):
    where = lab.serve(f"{port}", mode)
    handle(lab, "proxy_req", body)
    got, came = ask(where, upstream, request("/x?q"))
    assert got.start == start
    assert came.status == 200


@MODES
def test_proxy_req_changes_the_fields(lab, upstream, port, mode):
    where = lab.serve(f"{port}", mode)
    body = """
headers = upstream_request.headers
headers["X-Set"] = "set"
headers["x-there"] = "replaced"
headers.add("X-Two", "1")
headers.add("X-Two", "2")
del headers["X-Gone"]
headers["Host"] = "handler.example"
"""
    handle(lab, "proxy_req", body)
    sent = request("/x", "X-There: before", "X-Gone: gone", "X-Kept: kept", "X-There: again")
    got, _ = ask(where, upstream, sent)
    assert got.get("x-set") == ["set"]
    assert got.get("x-there") == ["replaced"]
    assert got.get("x-two") == ["1", "2"]
    assert got.get("x-gone") == []
    assert got.get("x-kept") == ["kept"]
    assert got.get("host") == ["handler.example"]


def test_proxy_req_may_clear_the_headers(lab, upstream, port):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", "upstream_request.headers.clear()\nupstream_request.headers['X-Only'] = '1'")
    got, came = ask(where, upstream, request("/x", "Cookie: a=b"))
    assert got.get("x-only") == ["1"]
    assert got.get("cookie") == []
    # a request of HTTP/1.1 has one, whatever is removed
    assert len(got.get("host")) == 1
    assert came.status == 200


@MODES
@pytest.mark.parametrize("framing", ["none", "length", "chunked"])
@pytest.mark.parametrize("new", [b"", b"new", b"longer than the one before" * 1000])
def test_proxy_req_replaces_the_body(lab, upstream, port, mode, framing, new):
    where = lab.serve(f"{port}", mode)
    handle(lab, "proxy_req", f"upstream_request.body = {new!r}")
    sent = {
        "none": request(method="POST"),
        "length": request(method="POST", body=b"hello"),
        "chunked": request("/x", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n0\r\n\r\n",
    }[framing]
    with connect(where) as client:
        wire = accept(upstream, client.send(sent))
        got = read_request(wire)
        assert got.text == new
        assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1 or not new
        wire.send(OK)
        assert read_response(client).status == 200
        # nothing of the client's own body is taken for a request, or follows ours
        client.finish()
        client.rest()
    assert wire.data == b""


def test_without_a_change_the_body_is_the_clients(lab, upstream, port):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", "seen.append(upstream_request.body)")
    got, _ = ask(where, upstream, request(method="POST", body=b"hello"))
    assert got.text == b"hello"
    assert lab.seen() == [None]


@pytest.mark.parametrize(
    "body",
    [
        "upstream_request.headers['Content-Length'] = '99'",
        "upstream_request.headers['Transfer-Encoding'] = 'chunked'",
        "upstream_request.headers.add('Content-Length', '4')",
        "upstream_request.headers.add('Transfer-Encoding', 'identity')",
        "del upstream_request.headers['Content-Length']",
        "upstream_request.method = 'GET'",
    ],
)
def test_proxy_req_does_not_change_the_framing(lab, upstream, port, body):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", body)
    with connect(where) as client:
        client.send(request(method="POST", body=b"hello"))
        try:
            wire = accept(upstream, client)
        except AssertionError as error:
            # refused is as good
            assert "500" in str(error)
            return
        got = read_request(wire)
        assert got.text == b"hello"
        assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1, got
        wire.send(OK)
        assert read_response(client).status == 200


@MODES
@pytest.mark.parametrize(
    "body",
    [
        r"upstream_request.path = '/x HTTP/1.1\r\nX-Evil: 1\r\n\r\n'",
        "upstream_request.path = '/a b'",
        r"upstream_request.path = '/a\nb'",
        "upstream_request.path = '/\u20ac'",
        "upstream_request.path = None",
        r"upstream_request.method = 'GET / HTTP/1.1\r\nX-Evil: 1\r\n\r\nGET'",
        "upstream_request.method = 'GE T'",
        "upstream_request.method = ''",
        r"upstream_request.headers._list.append(('X-A', 'a\r\nX-Evil: 1'))",
        r"upstream_request.headers._list.append(('X-A\r\nX-Evil', '1'))",
        "upstream_request.headers.add('X A', '1')",
        r"upstream_request.headers['X-A'] = 'a\r\nX-Evil: 1'",
        "upstream_request.body = 'text'",
        "upstream_request.body = 5",
    ],
)
def test_what_proxy_req_may_not_send(lab, upstream, port, mode, body):
    where = lab.serve(f"{port}", mode)
    handle(lab, "proxy_req", body)
    assert refuse(where).status == 500
    assert not (upstream.connects_within(0.1) and upstream.wires[-1].rest())
    lab.wait_log("[ERROR]")
    assert "X-Evil" not in repr(upstream.wires)


def test_proxy_req_cannot_send_two_hosts(lab, upstream, port):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", "upstream_request.headers.add('Host', 'second.example')")
    with connect(where) as client:
        client.send(request())
        try:
            wire = accept(upstream, client)
        except AssertionError as error:
            assert "500" in str(error)
            return
        assert len(read_request(wire).get("host")) == 1
        wire.send(OK)
        assert read_response(client).status == 200


# --- proxy_res -----------------------------------------------------------------------------------


@MODES
def test_proxy_res_changes_the_answer(lab, upstream, port, mode):
    where = lab.serve(f"{port}", mode)
    body = """
upstream_response.status_code = 418
upstream_response.reason = "I am a teapot"
headers = upstream_response.headers
headers["X-Set"] = "set"
headers["x-there"] = "replaced"
headers.add("Set-Cookie", "c=3")
headers.remove("X-Gone")
"""
    on_answer(lab, body)
    reply = answer("200 OK", "X-There: 1", "X-Gone: 1", "Set-Cookie: a=1", "Set-Cookie: b=2", body=b"body")
    _, came = ask(where, upstream, request(), reply)
    assert came.start == "HTTP/1.1 418 I am a teapot"
    assert came.get("x-set") == ["set"]
    assert came.get("x-there") == ["replaced"]
    assert came.get("set-cookie") == ["a=1", "b=2", "c=3"]
    assert came.get("x-gone") == []
    assert came.text == b"body"


def test_proxy_res_sees_what_the_target_sent(lab, upstream, port):
    """As with node-http-proxy the rewriting of the options comes after the handlers."""
    options = "host_rewrite='public.example', cookie_domain_rewrite='new.example'"
    where = lab.serve(f"'http://127.0.0.1:{port}', {options}")
    on_answer(
        lab, "seen.append((upstream_response.headers['Location'], upstream_response.headers['Set-Cookie']))"
    )
    reply = answer("302 Found", f"Location: http://127.0.0.1:{port}/y", "Set-Cookie: a=1; Domain=old.example")
    _, came = ask(where, upstream, request(), reply)
    assert lab.seen() == [(f"http://127.0.0.1:{port}/y", "a=1; Domain=old.example")]
    assert came.get("location") == ["http://public.example/y"]
    assert came.get("set-cookie") == ["a=1; Domain=new.example"]


@pytest.mark.parametrize(
    "body",
    [
        "upstream_response.headers['Content-Length'] = '99'",
        "upstream_response.headers['Transfer-Encoding'] = 'chunked'",
        "upstream_response.headers.add('Content-Length', '1')",
        "upstream_response.headers.remove('Content-Length')",
    ],
)
def test_proxy_res_does_not_break_the_framing(lab, upstream, port, body):
    """The client gets the body whole and knows where it ends, or a 500; never something cut in two ways."""
    where = lab.serve(f"{port}")
    on_answer(lab, body)
    client = Client(where, timeout=10)
    try:
        client.request("GET", "/")
        wire = upstream.accept()
        read_request(wire)
        wire.send(answer(body=b"hello"))
        response = client.getresponse()
        if response.status == 500:
            return
        fields = [name.lower() for name, _ in response.getheaders()]
        assert fields.count("content-length") + fields.count("transfer-encoding") <= 1
        try:
            assert response.read() == b"hello"
        except (http.client.IncompleteRead, ConnectionError):
            assert "99" in body  # it said so
    finally:
        client.close()


@pytest.mark.parametrize(
    "body",
    [
        "upstream_response.status_code = 'abc'",
        "upstream_response.status_code = 20",
        "upstream_response.status_code = 1000",
        "upstream_response.status_code = None",
        r"upstream_response.reason = 'a\r\nX-Evil: 1'",
        r"upstream_response.headers._list.append(('X-A', 'a\r\nX-Evil: 1'))",
        r"upstream_response.headers._list.append(('X-A\r\nX-Evil', '1'))",
        "upstream_response.headers.add('X A', '1')",
    ],
)
def test_what_proxy_res_may_not_send(lab, upstream, port, body):
    where = lab.serve(f"{port}")
    on_answer(lab, body)
    _, came = ask(where, upstream)
    assert came.status == 500
    assert "X-Evil" not in repr(came)
    lab.wait_log("[ERROR]")


# --- self_handle_response ------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ("return Response('made', 202, {'X-Made': '1'})", 202, b"made"),
        ("return Response(upstream_response.stream.read().upper(), 200, {'X-Made': '1'})", 200, b"HELLO THERE"),
        ("return Response(upstream_response.stream.read(5), 200, {'X-Made': '1'})", 200, b"hello"),
        (
            "return Response(iter(lambda: upstream_response.stream.read1(4096), b''), 200, {'X-Made': '1'})",
            200, b"hello there",
        ),
        (
            "return Response(upstream_response.stream, upstream_response.status_code, {'X-Made': '1'},\n"
            "                direct_passthrough=True) if hasattr(upstream_response.stream, '__iter__') else "
            "Response(upstream_response.stream.read(), 299, {'X-Made': '1'})",
            299, b"hello there",
        ),
        (
            "def app(environ, start_response):\n"
            "    start_response('203 Own', [('X-Made', '1')])\n"
            "    return [environ['PATH_INFO'].encode()]\n"
            "return app",
            203, b"/x",
        ),
        ("return Response(b'', 204, {'X-Made': '1'})", 204, b""),
    ],
)  # fmt: skip
def test_self_handle_response(lab, upstream, port, mode, body, status, text):
    where = lab.serve(f"{port}, self_handle_response=True", mode)
    on_answer(lab, body)
    _, came = ask(where, upstream, request(), answer("299 Odd", "X-Target: 1", body=b"hello there"))
    assert came.status == status
    assert came.get("x-made") == ["1"]
    assert came.get("x-target") == []
    assert came.text == text


def test_self_handle_response_with_a_body_without_length(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "return Response(upstream_response.stream.read() + b'!')")
    reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    _, came = ask(where, upstream, request(), reply)
    assert came.text == b"onetwo!"


def test_self_handle_response_streams(lab, upstream, port):
    """What has been read is there before the rest has come."""
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "return Response(iter(lambda: upstream_response.stream.read1(4096).upper(), b''))")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        wire.head()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nfirs")
        assert Message(client.head()).status == 200
        while b"FIRS" not in client.data:
            client.more()
        wire.send(b"tly!")
        while b"TLY!" not in client.data:
            client.more()


def test_self_handle_response_keeps_what_is_coded(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "import gzip\nreturn Response(gzip.decompress(upstream_response.stream.read()))")
    reply = answer("200 OK", "Content-Encoding: gzip", body=gzip.compress(b"packed"))
    assert ask(where, upstream, request(), reply)[1].text == b"packed"


def test_self_handle_response_that_leaves_the_body_unread(lab, upstream, port):
    """What was not read is not taken for the next answer."""
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "return Response(upstream_response.headers['X-N'])")
    body = b"HTTP/1.1 200 OK\r\nX-N: wrong\r\nContent-Length: 0\r\n\r\n" * 5000
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(answer("200 OK", "X-N: right", body=body[:100]))
        assert read_response(client).text == b"right"
        client.send(request())
        wires = [wire]
        ready, _, _ = select.select([wire.sock, upstream.listener], [], [], 30)
        if upstream.listener in ready or wire.sock.recv(1, 2) == b"":
            wires.append(upstream.accept())
        read_request(wires[-1])
        wires[-1].send(answer("200 OK", "X-N: second", body=body))
        assert read_response(client).text == b"second"


def test_self_handle_response_of_head(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "return Response(b'nobody sees', headers={'X-Made': '1'})")
    with connect(where) as client:
        wire = accept(upstream, client.send(request(method="HEAD")))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        assert read_response(client, "HEAD").get("x-made") == ["1"]
        client.send(request("/y", "Connection: close"))
        wire = wire if not upstream.connects_within(0.5) else upstream.wires[-1]
        assert read_request(wire).path == "/y"
        wire.send(OK)
        assert read_response(client).text == b"nobody sees"


def test_self_handle_response_and_several_handlers(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "seen.append(1)")
    on_answer(lab, "seen.append(2)\nreturn Response('the second')")
    assert ask(where, upstream)[1].text == b"the second"
    assert lab.seen()[:2] == [1, 2]


@MODES
@pytest.mark.parametrize("body", [None, "pass", "return 'text'", "return 5"])
def test_self_handle_response_that_nobody_makes_is_500(lab, upstream, port, mode, body):
    where = lab.serve(f"{port}, self_handle_response=True", mode)
    if body:
        on_answer(lab, body)
    assert ask(where, upstream)[1].status == 500
    lab.wait_log("[ERROR]")


def test_without_self_handle_response_what_a_handler_returns_is_not_sent(lab, upstream, port):
    where = lab.serve(f"{port}")
    on_answer(lab, "return Response('made', 202)")
    _, came = ask(where, upstream)
    assert (came.status, came.text) == (200, b"ok")


def test_self_handle_response_for_one_request(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port})
def app(environ, start_response):
    return proxy.web(environ, start_response, self_handle_response=environ["PATH_INFO"] == "/own")
passenger.create_server(app).listen("unix:{where}")
""")
    on_answer(lab, "return Response('made')")
    assert ask(where, upstream, request("/own"))[1].text == b"made"
    assert ask_again(where, upstream, request("/other"))[1].text == b"ok"


# --- error ---------------------------------------------------------------------------------------

#: answers of a target that are errors
FAILURES = {
    "refused": (None, 502, "UpstreamRefused"),
    "closed": (b"", 502, "UpstreamClosed"),
    "closed in the head": (b"HTTP/1.1 200 OK\r\nConte", 502, "UpstreamClosed"),
    "garbage": (b"nonsense\r\n\r\n", 502, "BadResponse"),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        502,
        "BadResponse",
    ),
    "late": ("late", 504, "UpstreamTimeout"),
}


def fail(lab, port, kind, prepare, mode="direct"):
    """A request whose target fails so: what the client gets."""
    reply, _, _ = FAILURES[kind]
    options = ", proxy_timeout=0.2" if kind == "late" else ""
    where = lab.serve(f"{port}, '127.0.0.1'{options}", mode)
    prepare()
    if kind == "refused":
        return refuse(where)
    with Upstream(port) as upstream, connect(where) as client:
        client.send(request(method="POST", body=b"hello"))
        wire = accept(upstream, client)
        read_request(wire)
        if kind != "late":
            wire.send(reply)
            wire.close()
        return read_response(client)


@MODES
@pytest.mark.parametrize("kind", FAILURES)
def test_what_the_error_handler_is_given(lab, port, mode, kind):
    _, status, name = FAILURES[kind]
    code = """
@proxy.on("error")
def error(exception, request, target):
    seen.append(([cls.__name__ for cls in type(exception).__mro__], isinstance(exception, http_proxy.ProxyError),
                 exception.status_code, str(exception.target), exception.elapsed, request.path, str(target)))
"""
    came = fail(lab, port, kind, lambda: lab.run(code), mode)
    assert came.status == status
    ((classes, is_proxy_error, code, own_target, elapsed, path, target),) = lab.wait_seen()
    assert name in classes
    assert is_proxy_error
    assert code == status
    assert f"127.0.0.1:{port}" in own_target
    assert f"127.0.0.1:{port}" in target
    assert isinstance(elapsed, float)
    assert elapsed >= 0
    assert path == "/x"


@MODES
@pytest.mark.parametrize("kind", FAILURES)
def test_without_a_handler(lab, port, mode, kind):
    _, status, _ = FAILURES[kind]
    assert fail(lab, port, kind, lambda: None, mode).status == status
    method = "GET" if kind == "refused" else "POST"
    log = lab.wait_log(f"({method} /x): {status}")
    lines = [line for line in log.splitlines() if "proxy: " in line]
    assert len(lines) == 1, lines
    assert f"proxy: http://127.0.0.1:{port}: " in lines[0]
    assert " after " in lines[0]
    assert "Traceback" not in log


def test_all_exceptions_are_proxy_errors():
    names = [
        "UpstreamRefused",
        "UpstreamClosed",
        "BadResponse",
        "UpstreamTimeout",
        "PoolExhausted",
        "BadRequestBody",
    ]
    for name in names:
        assert issubclass(getattr(http_proxy, name), http_proxy.ProxyError)
        assert issubclass(getattr(http_proxy, name), Exception)


@MODES
@pytest.mark.parametrize("kind", ["refused", "closed", "garbage", "late"])
def test_the_error_handler_answers(lab, port, mode, kind):
    code = """
@proxy.on("error")
def error(exception, request, target):
    return Response(f"sorry, {request.path}", 599, {"Retry-After": "7"})
"""
    came = fail(lab, port, kind, lambda: lab.run(code), mode)
    assert (came.status, came.text, came.get("retry-after")) == (599, b"sorry, /x", ["7"])


def test_the_error_handler_that_returns_nothing_leaves_the_answer(lab, port):
    assert fail(lab, port, "refused", lambda: lab.run("\nproxy.on('error', lambda *a: None)")).status == 502


def test_several_error_handlers(lab, port):
    code = """
proxy.on("error", lambda *a: seen.append(1))
@proxy.on("error")
def second(exception, request, target):
    seen.append(2)
    return Response("the second", 503)
"""
    came = fail(lab, port, "refused", lambda: lab.run(code))
    assert (came.status, came.text) == (503, b"the second")
    assert lab.seen() == [1, 2]


def test_the_error_handlers_answer_to_head_has_no_body(lab, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('error', lambda *a: Response('a body', 503))")
    with connect(where) as client:
        client.send(request(method="HEAD") + request("/y"))
        assert read_response(client, "HEAD").status == 503
        assert read_response(client).text == b"a body"


def test_the_clients_connection_is_in_order_after_an_error(lab, port):
    """The rest of a body that nobody took is no request."""
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('error', lambda *a: seen.append(a[1].path))")
    hidden = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(where) as client:
        client.send(request("/x", method="POST", body=hidden))
        assert read_response(client).status == 502
        client.finish()
        client.rest()
    assert lab.seen() == ["/x"]


def test_the_events_of_a_failure(lab, port):
    where = lab.serve(f"{port}")
    lab.run(NOTE_ALL)
    assert refuse(where).status == 502
    assert lab.seen() in (["start", "proxy_req", "error"], ["start", "error"])


# --- a handler that raises -----------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("event", ["start", "proxy_req"])
def test_a_handler_that_raises_before_anything_is_sent(lab, upstream, port, mode, event):
    where = lab.serve(f"{port}", mode)
    lab.run(f"\nproxy.on({event!r}, lambda *a: 1 // (a[-2 if {event!r} == 'start' else 1].path != '/x'))")
    with connect(where) as client:
        client.send(request(method="POST", body=b"hello"))
        assert read_response(client).status == 500
    assert "ZeroDivisionError" in lab.wait_log("ZeroDivisionError")
    got, came = ask(where, upstream, request("/fine"))
    assert (got.path, came.status) == ("/fine", 200)
    assert not upstream.connects_within(0.1)


@MODES
@pytest.mark.parametrize("self_handle", [False, True])
def test_a_proxy_res_handler_that_raises(lab, upstream, port, mode, self_handle):
    where = lab.serve(f"{port}, self_handle_response={self_handle}", mode)
    on_answer(lab, "1 // (request.path != '/x')\nreturn Response('made')")
    reply = answer("200 OK", "X-Target: 1", body=b"of the target")
    _, came = ask(where, upstream, request(), reply)
    assert came.status == 500
    assert came.get("x-target") == []
    assert b"of the target" not in came.body
    assert b"ZeroDivision" not in came.body
    lab.wait_log("ZeroDivisionError")
    upstream.wires[-1].close()
    assert ask(where, upstream, request("/fine"))[1].status == 200


def test_an_end_handler_that_raises(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('end', lambda *a: 1 // 0)")
    for _ in range(2):
        _, came = ask(where, upstream)
        assert (came.status, came.text) == (200, b"ok")
        upstream.wires[-1].close()
    lab.wait_log("ZeroDivisionError")


@MODES
def test_an_error_handler_that_raises(lab, port, mode):
    where = lab.serve(f"{port}", mode)
    lab.run("\nproxy.on('error', lambda *a: 1 // 0)")
    for _ in range(2):
        assert refuse(where).status == 500
    lab.wait_log("ZeroDivisionError")


def test_an_error_handler_that_returns_nonsense(lab, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('error', lambda *a: 5)")
    assert refuse(where).status in (500, 502)
    lab.wait_log("[ERROR]")


def test_handlers_after_one_that_raises_are_not_called(lab, port):
    """What the first was to check or set has not happened."""
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('proxy_req', lambda *a: 1 // 0)\nproxy.on('proxy_req', lambda *a: seen.append(2))")
    assert refuse(where).status == 500
    assert lab.seen() == []


def test_a_handler_that_aborts(lab, port):
    """Werkzeug's exceptions are answers elsewhere; here a handler that raises is a 500, or its own status."""
    where = lab.serve(f"{port}")
    lab.run(
        "\nimport werkzeug.exceptions as e\ndef deny(*a):\n    raise e.Forbidden()\nproxy.on('start', deny)"
    )
    assert refuse(where).status == 500


# --- econnreset ----------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("when", ["before the head", "in the body"])
def test_econnreset(lab, upstream, port, mode, when):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    lab.run("""
@proxy.on("econnreset")
def gone(exception, request, target):
    seen.append((isinstance(exception, Exception), request.path, str(target)))
proxy.on("end", lambda *a: seen.append("end"))
proxy.on("error", lambda *a: seen.append("error"))
""")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        if when == "in the body":
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
            client.head()
    # the client is gone
    try:
        if when == "in the body":
            while True:
                wire.send(b"4\r\nmore\r\n")
        else:
            assert wire.ended()
    except ConnectionError:
        pass
    ((is_exception, path, target),) = lab.wait_seen()
    assert is_exception
    assert path == "/x"
    assert f"127.0.0.1:{port}" in target
    assert "Traceback" not in lab.log()


def test_econnreset_of_a_client_that_resets_in_its_body(lab, upstream, port):
    own = free_port()
    lab.serve(f"{port}", where=own)
    lab.run("\nproxy.on('econnreset', lambda *a: seen.append('econnreset'))")
    lab.run("\nproxy.on('end', lambda *a: seen.append('end'))")
    client = connect(own)
    client.send(request("/x", "Content-Length: 100", method="POST") + b"half")
    wire = accept(upstream, client)
    wire.until(b"half")
    client.reset()
    assert wire.ended()
    assert lab.wait_seen() == ["econnreset"]
    assert "Traceback" not in lab.log()


def test_econnreset_handler_that_raises(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('econnreset', lambda *a: 1 // 0)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
    assert wire.ended()
    lab.wait_log("ZeroDivisionError")
    wire.close()
    assert ask(where, upstream)[1].status == 200


# --- end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reply"),
    [
        ("GET", b"HTTP/1.1 204 None\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Same\r\nETag: x\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        ("GET", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"),
    ],
)
def test_end_of_answers_of_all_kinds(lab, upstream, port, method, reply):
    where = lab.serve(f"{port}")
    lab.run(
        "\nproxy.on('end', lambda request, response: seen.append((request.method, response.status_code)))"
    )
    ask(where, upstream, request(method=method), reply)
    assert lab.wait_seen() == [(method, int(reply.split(b" ")[1]))]


def test_end_comes_after_the_whole_answer(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('end', lambda *a: seen.append('end'))")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        client.head()
        client.exactly(4)
        assert lab.seen() == []
        wire.send(b"half")
        client.exactly(4)
    assert lab.wait_seen() == ["end"]


def test_no_end_of_an_answer_that_broke_off(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('end', lambda *a: seen.append('end'))")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        client.head()
        client.exactly(4)
        wire.close()
        assert client.ended()
    upstream.wires.clear()
    # a request that came later has ended; the one before has not
    ask(where, upstream)
    assert lab.wait_seen() == ["end"]


def test_end_with_self_handle_response(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "return Response('made')")
    lab.run("\nproxy.on('end', lambda request, response: seen.append(response.status_code))")
    ask(where, upstream)
    assert lab.wait_seen() == [200]


# --- upgrades ------------------------------------------------------------------------------------

UPGRADE = request(
    "/chat?q",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: x",
    "Sec-WebSocket-Version: 13",
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\n"
)


@MODES
def test_the_events_of_an_upgrade(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    lab.run("""
@proxy.on("start")
def start(request, target):
    seen.append(("start", request.path))

@proxy.on("proxy_req")
def proxy_req(*arguments):
    seen.append("proxy_req")

@proxy.on("proxy_req_ws")
def proxy_req_ws(upstream_request, request, options):
    seen.append(("proxy_req_ws", upstream_request.method, upstream_request.path, request.path))
    upstream_request.headers["X-Set"] = "set"
    upstream_request.path = "/other"

@proxy.on("open")
def opened(tunnel):
    seen.append(("open", str(tunnel.target), tunnel.request.path, tunnel.bytes_in, tunnel.bytes_out))

@proxy.on("close")
def closed(tunnel):
    seen.append(("close", tunnel.request.path, tunnel.bytes_in, tunnel.bytes_out))
""")
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        got = Message(wire.head())
        assert got.path == "/other"
        assert got.get("x-set") == ["set"]
        assert got.get("sec-websocket-key") == ["x"]
        wire.send(SWITCH)
        switched = Message(client.head())
        assert switched.status == 101
        assert switched.get("set-cookie") == ["a=1", "b=2"]
        start, sent, opened = lab.wait_seen(3)
        assert start == ("start", "/chat")
        assert sent == ("proxy_req_ws", "GET", "/chat?q", "/chat")
        assert opened[0] == "open"
        assert f"127.0.0.1:{port}" in opened[1]
        assert opened[2:] == ("/chat", 0, 0)
        client.send(b"12345")
        assert wire.exactly(5) == b"12345"
        wire.send(b"1234567")
        assert client.exactly(7) == b"1234567"
    assert wire.rest() == b""
    wire.close()
    # in: from the client; out: to the client
    assert lab.wait_seen(4)[3:] == [("close", "/chat", 5, 7)]


def test_a_tunnel_is_closed_by_the_program(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run(
        "\ntunnels = []\nproxy.on('open', tunnels.append)\nproxy.on('close', lambda t: seen.append(t is tunnels[0]))"
    )
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(SWITCH)
        client.head()
        lab.run("gevent.sleep(0.01)")
        while not lab.run("len(tunnels)"):
            pass
        lab.run("tunnels[0].close()")
        client.rest()
        wire.rest()
    assert lab.wait_seen() == [True]


@MODES
def test_an_upgrade_that_is_refused_is_an_answer(lab, upstream, port, mode):
    where = lab.serve(f"{port}", mode)
    lab.run(NOTE_ALL)
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(answer("403 Forbidden", "X-Why: no", body=b"denied"))
        came = read_response(client)
    assert (came.status, came.get("x-why"), came.text) == (403, ["no"], b"denied")
    assert lab.seen()[:2] == ["start", "proxy_req_ws"]
    assert "open" not in lab.seen()
    assert "close" not in lab.seen()


@MODES
def test_an_upgrade_whose_target_fails(lab, port, mode):
    where = lab.serve(f"{port}", mode)
    lab.run("\nproxy.on('error', lambda e, request, target: seen.append((type(e).__name__, request.path)))")
    assert refuse(where, UPGRADE).status == 502
    assert lab.seen() == [("UpstreamRefused", "/chat")]


def test_the_error_handler_answers_an_upgrade(lab, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('error', lambda e, request, target: Response('later', 503))")
    came = refuse(where, UPGRADE)
    assert (came.status, came.text) == (503, b"later")


@pytest.mark.parametrize("event", ["start", "proxy_req_ws"])
def test_a_handler_of_an_upgrade_that_raises(lab, upstream, port, event):
    where = lab.serve(f"{port}")
    lab.run(f"\nproxy.on({event!r}, lambda *a: 1 // 0)")
    assert refuse(where, UPGRADE).status == 500
    lab.wait_log("ZeroDivisionError")


@pytest.mark.parametrize("event", ["open", "close"])
def test_a_handler_of_a_tunnel_that_raises(lab, upstream, port, event):
    """The 101 was sent: it is logged, and nothing else breaks."""
    where = lab.serve(f"{port}")
    lab.run(f"\nproxy.on({event!r}, lambda *a: 1 // 0)")
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(SWITCH)
        client.more()
    wire.close()
    lab.wait_log("ZeroDivisionError")
    assert ask(where, upstream)[1].status == 200
