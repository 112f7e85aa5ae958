"""The proxy's first cut: plain requests, streamed both ways, and nothing that could be smuggled through."""

import contextlib
import socket
import threading

import pytest
from conditions import wait_for
from http_client import Client, fetch, refused

from gunicorn_passenger import http_proxy
from gunicorn_passenger.proxy.request_headers import RequestHeaders
from gunicorn_passenger.proxy.request_target import request_path
from gunicorn_passenger.proxy.target import parse_target


@pytest.fixture
def proxied(start, port):
    """gunicorn with a proxy to ``port`` as its primary, and a second server there where ``app`` is given."""

    def begin(app="", options="", workers=1):
        start.write(
            "program.py",
            app
            + f"""
import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy
application = http_proxy.create_server({port}, '127.0.0.1'{options}).listen("passenger")
""",
        )
        return start.gunicorn("program", workers=workers)

    return begin


class Upstream:
    """A scripted target: accepts one connection and lets the test speak."""

    def __init__(self, port):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.listener.settimeout(30)

    def accept(self):
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(30)
        return self

    def read_until(self, end):
        data = b""
        while not data.endswith(end):
            piece = self.sock.recv(1)
            assert piece, data
            data += piece
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        with contextlib.suppress(AttributeError):
            self.sock.close()


def connect(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(path)
    return sock


def wait_listening(process):
    wait_for(lambda: not refused(process.socket) and process.log().count("Booting worker"), "the start")
    return process


def test_request_and_answer_arrive_as_they_are(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream, contextlib.closing(connect(process.socket)) as client:
        client.sendall(
            b"POST /a%20b/%2F?q=%41 HTTP/1.1\r\nHost: example.org:81\r\nX-Thing: a\r\nCookie: k=v\r\n"
            b"Connection: x-hop\r\nX-Hop: secret\r\nTE: trailers\r\nProxy-Authorization: basic x\r\n"
            b"Content-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
        )
        head = upstream.accept().read_until(b"\r\n\r\n").decode()
        assert upstream.read_until(b"hello") == b"hello"
        lines = head.split("\r\n")
        assert lines[0] == "POST /a%20b/%2F?q=%41 HTTP/1.1"
        fields = sorted(line.lower() for line in lines[1:] if line)
        assert fields == [
            "content-length: 5", "content-type: text/plain", "cookie: k=v", "host: example.org:81",
            "x-thing: a",
        ]  # fmt: skip
        upstream.sock.sendall(
            b"HTTP/1.1 299 Odd\r\nX-Answer: 1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nKeep-Alive: 5\r\n"
            b"Connection: X-Gone\r\nX-Gone: 1\r\nContent-Length: 2\r\n\r\nok"
        )
        data = b""
        while not data.endswith(b"\r\n\r\nok"):
            data += client.recv(4096)
        text = data.decode().lower()
        assert text.startswith("http/1.1 299 odd\r\n")
        assert "set-cookie: a=1\r\n" in text
        assert "set-cookie: b=2\r\n" in text
        assert "x-answer: 1" in text
        assert "x-gone" not in text


def test_the_body_goes_up_while_it_arrives(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream, contextlib.closing(connect(process.socket)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nabc")
        upstream.accept().read_until(b"\r\n\r\nabc")  # before the client has sent the rest
        client.sendall(b"def")
        upstream.read_until(b"def")
        upstream.sock.sendall(b"HTTP/1.1 204 None\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 204")


def test_a_chunked_body_goes_up_while_it_arrives_and_stays_chunked(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream, contextlib.closing(connect(process.socket)) as client:
        client.sendall(b"DELETE / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        head = upstream.accept().read_until(b"\r\n\r\n").lower()
        assert b"transfer-encoding: chunked" in head
        assert b"content-length" not in head
        upstream.read_until(b"3\r\nabc\r\n")
        client.sendall(b"2\r\nde\r\n0\r\n\r\n")
        upstream.read_until(b"2\r\nde\r\n0\r\n\r\n")
        upstream.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_the_answer_comes_down_while_it_arrives(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream, contextlib.closing(connect(process.socket)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        upstream.accept().read_until(b"\r\n\r\n")
        upstream.sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        data = b""
        while b"first" not in data:
            data += client.recv(4096)
        upstream.sock.sendall(b"6\r\nsecond\r\n0\r\n\r\n")
        while b"second" not in data:
            data += client.recv(4096)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n",
    ],
)
def test_a_truncated_answer_stays_truncated(proxied, port, answer):
    import http.client

    process = wait_listening(proxied())
    with Upstream(port) as upstream:
        client = Client(process.socket)
        thread = threading.Thread(
            target=lambda: [
                upstream.accept().read_until(b"\r\n\r\n"),
                upstream.sock.sendall(answer),
                upstream.sock.close(),
            ]
        )
        thread.start()
        client.request("GET", "/")
        response = client.getresponse()
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        thread.join()
        client.close()


def test_an_upload_that_breaks_off_is_not_taken_for_whole(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream:
        client = connect(process.socket)
        client.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnonsense\r\n"
        )
        upstream.accept().read_until(b"3\r\nabc\r\n")
        rest = b""
        while piece := upstream.sock.recv(100):
            rest += piece
        assert b"0\r\n\r\n" not in rest
        client.close()


def test_a_target_that_refuses_is_502_and_one_that_is_late_504(proxied, port):
    process = proxied(options=", proxy_timeout=0.3")
    wait_listening(process)
    assert fetch(process.socket, "/x")[0] == 502
    process.wait_log(rf"proxy: http://127.0.0.1:{port}: connection refused, after [\d.]+ s \(GET /x\): 502")
    with Upstream(port):
        assert fetch(process.socket)[0] == 504


def test_garbage_from_the_target_is_502(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream:
        thread = threading.Thread(target=lambda: upstream.accept().sock.sendall(b"nonsense\r\n\r\n"))
        thread.start()
        assert fetch(process.socket)[0] == 502
        thread.join()


def test_a_large_body_both_ways(proxied, port, start):
    app = f"""
import gunicorn_passenger as passenger
def echo(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
passenger.create_server(echo).listen({port})
"""
    process = proxied(app)
    wait_for(lambda: fetch_or_none(process.socket), "the start")
    data = "0123456789abcdef" * 300_000
    assert fetch(process.socket, "/", "POST", data) == (200, data)


def fetch_or_none(where):
    try:
        return fetch(where)[0] == 200
    except OSError:
        return None


def test_head_has_no_body(proxied, port):
    app = f"""
import gunicorn_passenger as passenger
def page(environ, start_response):
    start_response("200 OK", [("Content-Length", "5"), ("X-Method", environ["REQUEST_METHOD"])])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"12345"]
passenger.create_server(page).listen({port})
"""
    process = proxied(app)
    wait_for(lambda: fetch_or_none(process.socket), "the start")
    client = Client(process.socket)
    for _ in range(2):
        client.request("HEAD", "/")
        response = client.getresponse()
        assert (response.status, response.getheader("content-length"), response.read()) == (200, "5", b"")
    client.close()


def test_a_unix_target_and_web_inside_an_app(start, home):
    start.write(
        "program.py",
        f"""
import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

def target(environ, start_response):
    start_response("200 OK", [])
    return [environ["PATH_INFO"].encode(), b" ", environ.get("HTTP_X_FORWARDED_FOR", "-").encode()]

passenger.create_server(target).listen("unix:{home}/target.sock")
proxy = http_proxy.create_server("unix:{home}/target.sock", xfwd=True)

def application(environ, start_response):
    if environ["PATH_INFO"].startswith("/there"):
        return proxy.web(environ, start_response)
    start_response("200 OK", [])
    return [b"here"]
""",
    )
    process = start.gunicorn("program", workers=2).wait_ready()
    assert fetch(process.socket, "/")[1] == "here"
    assert fetch(process.socket, "/there/x") == (200, "/there/x 127.0.0.1")
    assert (
        fetch(process.socket, "/there/x", X_Forwarded_For="203.0.113.7")[1]
        == "/there/x 203.0.113.7, 127.0.0.1"
    )


@pytest.mark.parametrize(
    ("target", "host", "shown"),
    [
        (9000, None, "http://localhost:9000"),
        (9000, "::1", "http://[::1]:9000"),
        ("http://example.org", None, "http://example.org:80"),
        ("http://example.org:81/base/", None, "http://example.org:81/base"),
        ("unix:/x/y", None, "unix:/x/y"),
    ],
)
def test_targets(target, host, shown):
    assert str(parse_target(target, host)) == shown


@pytest.mark.parametrize(
    "target",
    [
        0,
        70000,
        True,
        None,
        "",
        "no sense",
        "localhost:9000",
        "ftp://x",
        "http://",
        "http://x:y",
        "unix:",
        1.5,
    ],
)
def test_bad_targets(target):
    with pytest.raises(ValueError, match="target="):
        http_proxy.create_server(target)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"nonsense": 1}, TypeError, "has no option 'nonsense'; known options: forward"),
        ({"proxy_timeout": -1}, ValueError, "proxy_timeout=-1 is not a positive number"),
        ({"headers": {"X": "a\r\nb"}}, ValueError, "headers: 'X'"),
    ],
)
def test_bad_options(options, error, said):
    with pytest.raises(error) as caught:
        http_proxy.create_server(9000, **options)
    assert said in str(caught.value)


def test_hop_by_hop_fields_end_here():
    fields = [("A", "1"), ("Connection", "b, Close"), ("B", "2"), ("Upgrade", "x"), ("TE", "y"), ("A", "3")]
    assert RequestHeaders(fields, keep_case=True).lines == [("A", "1"), ("A", "3")]


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"RAW_URI": "/a%2Fb?c", "PATH_INFO": "/a/b", "QUERY_STRING": "c"}, "/a%2Fb?c"),
        ({"RAW_URI": "/a#b", "PATH_INFO": "/a"}, "/a"),
        ({"RAW_URI": "http://evil.example/x?y", "PATH_INFO": "/x", "QUERY_STRING": "y"}, "/x?y"),
        ({"SCRIPT_NAME": "/s", "PATH_INFO": "/a b\xc3\xa9", "QUERY_STRING": "q"}, "/a%20b%C3%A9?q"),
        ({"RAW_URI": "/s/a%62", "SCRIPT_NAME": "/s", "PATH_INFO": "/ab"}, "/a%62"),
        ({"RAW_URI": "/changed", "PATH_INFO": "/by the app"}, "/by%20the%20app"),
        ({"RAW_URI": "/a?changed", "PATH_INFO": "/a", "QUERY_STRING": "by=the&app"}, "/a?by=the&app"),
    ],
)
def test_request_paths(environ, path):
    assert request_path({"REQUEST_METHOD": "GET", **environ})[0] == path


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"Content-Length: 3\r\nTransfer-Encoding: chunked", "both Transfer-Encoding and Content-Length"),
        (b"Content-Length: 3\r\nContent-Length: 5", "two Content-Lengths that differ"),
        (b"Content-Length: -5", "Content-Length '-5'"),
        (b"Content-Length: +5", "Content-Length"),
        (b"Content-Length: abc", "Content-Length 'abc'"),
        (b"Transfer-Encoding: gzip, chunked", "transfer coding"),
        (b"X-Thing: a\0b", "malformed header line"),
        (b"X Thing: a", "malformed header line"),
    ],
)
def test_an_answer_that_could_be_cut_in_two_ways_is_502(proxied, port, head, said):
    process = wait_listening(proxied())
    with Upstream(port) as upstream:
        answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        thread = threading.Thread(target=lambda: upstream.accept().sock.sendall(answer))
        thread.start()
        assert fetch(process.socket)[0] == 502
        thread.join()
    process.wait_log(f"proxy: http://127.0.0.1:{port}: .*{said}.* after [0-9.]+ s \\(GET /\\): 502")
    assert "Traceback" not in process.log()


def test_an_unrequested_switch_is_502(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream:
        answer = b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"
        thread = threading.Thread(target=lambda: upstream.accept().sock.sendall(answer))
        thread.start()
        assert fetch(process.socket)[0] == 502
        thread.join()


def test_a_client_that_goes_in_mid_body_ends_the_exchange(proxied, port):
    process = wait_listening(proxied())
    with Upstream(port) as upstream:
        client = connect(process.socket)
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n0123456789")
        upstream.accept().read_until(b"0123456789")
        client.close()
        assert upstream.sock.recv(100) == b""


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_target_that_answers_early_leaves_the_clients_connection_in_order(proxied, port, framing):
    """A 413 on an upload: the client gets it, and the proxy does not take the rest of the body for a request."""
    process = wait_listening(proxied())
    with Upstream(port) as upstream, contextlib.closing(connect(process.socket)) as client:
        if framing == "length":
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n01234")
        else:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n")
        upstream.accept().read_until(b"01234" if framing == "length" else b"01234\r\n")
        upstream.sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        upstream.sock.close()
        data = b""
        while not data.endswith(b"big"):
            piece = client.recv(4096)
            assert piece
            data += piece
        with contextlib.suppress(OSError):
            client.sendall(b"56789" if framing == "length" else b"5\r\n56789\r\n0\r\n\r\n")
            client.sendall(b"GET /second HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(socket.timeout):
                upstream.listener.settimeout(5)
                head = upstream.accept().read_until(b"\r\n\r\n")
                assert head.startswith(b"GET /second ")
    assert "Traceback" not in process.log()
    assert "ConcurrentObjectUse" not in process.log()


def test_a_coding_that_is_not_understood_is_501(proxied):
    process = wait_listening(proxied())
    status, _ = fetch(
        process.socket, "/", "POST", "5\r\nhello\r\n0\r\n\r\n", Transfer_Encoding="gzip, chunked"
    )
    assert status == 501
