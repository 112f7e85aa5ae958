"""The event proxy_res, and responses that a handler writes itself."""

import gzip
import http.client
import select

import pytest
from http_client import Client
from proxy_laboratory import (
    MODES,
    OK,
    Message,
    accept,
    answer,
    ask,
    ask_again,
    on_answer,
    read_request,
    read_response,
    request,
)
from upstream_sockets import connect

# --- proxy_res ---------------------------------------------------------------------------------------


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


# --- self_handle_response ----------------------------------------------------------------------------


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


def test_self_handle_response_closes_what_the_application_returned(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(
        lab,
        """
class Body:
    def __iter__(self):
        yield b"made"
    def close(self):
        seen.append("closed")
def app(environ, start_response):
    start_response("200 OK", [])
    return Body()
return app""",
    )
    assert ask(where, upstream)[1].text == b"made"
    assert lab.wait_seen() == ["closed"]


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
    on_answer(lab, "return Response(b'not sent', headers={'X-Made': '1'})")
    with connect(where) as client:
        wire = accept(upstream, client.send(request(method="HEAD")))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        assert read_response(client, "HEAD").get("x-made") == ["1"]
        client.send(request("/y", "Connection: close"))
        wire = wire if not upstream.connects_within(0.5) else upstream.wires[-1]
        assert read_request(wire).path == "/y"
        wire.send(OK)
        assert read_response(client).text == b"not sent"


def test_self_handle_response_and_several_handlers(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "seen.append(1)")
    on_answer(lab, "seen.append(2)\nreturn Response('the second')")
    assert ask(where, upstream)[1].text == b"the second"
    assert lab.seen()[:2] == [1, 2]


@MODES
@pytest.mark.parametrize("body", [None, "pass", "return 'text'", "return 5"])
def test_self_handle_response_without_a_response_is_500(lab, upstream, port, mode, body):
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
