"""Options about paths and bodies: ``remove_prefix`` and what follows from it, ``rewrite``, ``max_body``."""

import pytest
from free_ports import free_port
from proxy_laboratory import Origin, answer, ask, get, request
from upstream_sockets import Upstream


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def upstream(port):
    with Upstream(port) as upstream:
        yield upstream


MODES = pytest.mark.parametrize("mode", ["direct", "routed"])


def test_a_removed_prefix_comes_back(lab, upstream, port):
    table = f"{{'/api/': {{'target': 'http://127.0.0.1:{port}', 'remove_prefix': True, 'xfwd': True}}}}"
    where = lab.serve(table)
    reply = answer("302 Found", "Location: /login", "Set-Cookie: a=b; Path=/")
    for _ in range(4):  # as well when the plan of the last request is used again
        got, came = ask(where, upstream, request("/api/x"), reply)
        assert (got.path, got.get("x-forwarded-prefix")) == ("/x", ["/api"])
        assert (came.get("location"), came.get("set-cookie")) == (["/api/login"], ["a=b; Path=/api"])
        upstream.wires[-1].close()


def test_a_prefix_that_stays_is_not_added(lab, upstream, port):
    where = lab.serve(f"{{'/api/': 'http://127.0.0.1:{port}'}}, xfwd=True")
    got, came = ask(where, upstream, request("/api/x"), answer("302 Found", "Location: /login"))
    assert (got.path, got.get("x-forwarded-prefix"), came.get("location")) == ("/api/x", [], ["/login"])


def test_the_path_of_a_mounted_proxy_comes_back(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
        from werkzeug.middleware.dispatcher import DispatcherMiddleware
        proxy = http_proxy.create_server("http://127.0.0.1:{port}", xfwd=True)
        passenger.create_server(DispatcherMiddleware(None, {{"/mount": proxy}})).listen("unix:{where}")
    """)
    got, came = ask(where, upstream, request("/mount/x"), answer("302 Found", "Location: /login"))
    assert (got.path, got.get("x-forwarded-prefix")) == ("/x", ["/mount"])
    assert came.get("location") == ["/mount/login"]


@MODES
def test_rewrite(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1', rewrite={{'^/old/(.*)': r'/new/\\1'}}", mode)
    for sent, expected in [("/old/x?y=/old/", "/new/x?y=/old/"), ("/other", "/other")] * 2:
        got, came = ask(where, upstream, request(sent))
        assert (got.path, came.status) == (expected, 200)
        upstream.wires[-1].close()


def test_rewrite_by_a_function(lab, upstream, port):
    function = "lambda path, request: path + '/' + request.headers['X-User']"
    where = lab.serve(f"{port}, '127.0.0.1', rewrite={function}")
    got, _ = ask(where, upstream, request("/x?y", "X-User: alice"))
    assert got.path == "/x/alice?y"
    assert get(where, request("/x")).status == 500  # it raises
    lab.wait_log("the function of rewrite= failed")


BODY = b"0123456789"
CHUNKED = b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n"


@MODES
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(("most", "status"), [(9, 413), (10, 200), (0, 413)])
def test_max_body(lab, port, mode, framing, most, status):
    where = lab.serve(f"{port}, '127.0.0.1', max_body={most}", mode)
    sent = request(method="POST", body=BODY)
    if framing == "chunked":
        sent = request("/x", "Transfer-Encoding: chunked", method="POST") + CHUNKED
    with Origin(port) as origin:
        assert get(where, sent).status == status
        assert get(where, request()).status == 200
        whole = [message for _, message in origin.requests if message.start.startswith("POST")]
        assert [message.text for message in whole] == ([BODY] if status == 200 else [])


def test_max_body_does_not_bound_what_the_program_sends(lab, port):
    where = lab.serve(f"{port}, '127.0.0.1', max_body=3, buffer=io.BytesIO(b'0123456789')")
    with Origin(port) as origin:
        assert get(where, request(method="POST", body=b"abc")).status == 200
        assert origin.requests[0][1].text == BODY
