"""The proxy under other servers: Werkzeug's ProxyMiddleware replaced, and a plain WSGI callable in threads."""

import contextlib
import http.client
import io
import select
import ssl
import threading
from urllib.parse import unquote_to_bytes

import pytest
import trustme
from conditions import wait_for
from free_ports import free_port
from http_client import Client
from processes import PROGRAMS, starting
from proxy_laboratory import (
    Message,
    Origin,
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
from werkzeug.middleware.http_proxy import ProxyMiddleware as Theirs
from werkzeug.test import Client as AppClient
from werkzeug.test import EnvironBuilder, run_wsgi_app
from werkzeug.wrappers import Response

from gunicorn_passenger import http_proxy

Ours = http_proxy.ProxyMiddleware

#: What our middleware does otherwise, on purpose:
#: - the pieces of an answer are handed on when they come, not when ``chunk_size`` bytes are there;
#: - fields named by Connection are dropped too (RFC 9110 section 7.6.1), under a server that tells which of
#:   them the client has sent;
#: - Host has the target's port, where it is not the scheme's own (section 7.2);
#: - the target gets the path as the client wrote it: %2F stays, and what is not ASCII is not coded twice;
#: - a silent target is 504 (theirs: 502), and a truncated response does not look complete;
#: - a body without length is sent in chunks; connections to the target are kept;
#: - ``Accept-Encoding: identity`` is not added for a client that said nothing;
#: - what cannot be used is told when the middleware is made.
FRAMING = {"connection", "content-length", "transfer-encoding", "host"}


class Echo(Origin):
    """Answers what it was sent, with fields of all kinds."""

    def reply(self, message):
        if message.path.startswith("/static/missing"):
            return answer(
                "404 Not Here", "X-Missing: yes", body=b"" if message.start[:4] == "HEAD" else b"no"
            )
        if message.path.startswith("/static/same"):
            return b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"
        if message.path.startswith("/static/none"):
            return b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n"
        fields = [
            "Content-Type: text/x",
            "Set-Cookie: a=1",
            "Set-Cookie: b=2",
            "Keep-Alive: timeout=5",
            "X-Odd: \xe9",
        ]
        if message.start.startswith("HEAD "):
            return answer("299 Odd", *fields, body=b"")
        if "chunked" in message.path:
            head = "\r\n".join(["HTTP/1.1 299 Odd", *fields, "Transfer-Encoding: chunked", "", ""])
            return head.encode("latin-1") + b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
        return answer("299 Odd", *fields, body=b"you sent " + message.text)


def wrapped(environ, start_response):
    return Response(f"the app: {environ['PATH_INFO']}", 200)(environ, start_response)


@pytest.fixture(scope="module")
def origin():
    port = free_port()
    with Echo(port) as origin:
        origin.port = port
        yield origin


def both(origin, targets, path, **options):
    """The same request through theirs and ours: what the target got of each, and what came of each."""
    results = []
    for middleware in (Theirs, Ours):
        before = len(origin.requests)
        filled = {
            prefix: {
                name: value.format(port=origin.port) if isinstance(value, str) else value
                for name, value in entry.items()
            }
            for prefix, entry in targets.items()
        }
        client = AppClient(middleware(wrapped, filled))
        came = client.open(path, **options)
        data = came.get_data()
        got = [message for _, message in origin.requests[before:]]
        results.append((came, data, got))
        came.close()
    return results


def fields(message, *without):
    """A request's fields that both are to send alike."""
    left_out = FRAMING | set(without)
    return sorted((n.lower(), v) for n, v in message.fields if n.lower() not in left_out)


TARGET = "http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    "entry",
    [
        {"target": TARGET},
        {"target": TARGET + "/"},
        {"target": TARGET + "/base"},
        {"target": TARGET, "remove_prefix": False},
        {"target": TARGET, "remove_prefix": True},
        {"target": TARGET + "/base", "remove_prefix": True},
        {"target": TARGET + "/base/", "remove_prefix": True},
        {"target": TARGET, "headers": {"X-Set": "set", "X-Other": "o"}},
        {"target": TARGET, "host": "<auto>"},
        {"target": TARGET, "host": None},
        {"target": TARGET, "host": "given.example"},
        {"target": TARGET, "host": None, "headers": {}, "ssl_context": None, "remove_prefix": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["/static/", "static", "/static"])
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/static/x?q=1&r=%20", {}),
        ("/static/", {"headers": {"X-Thing": "1", "Accept": "a, b", "Cookie": "k=v"}}),
        ("/static/x", {"method": "POST", "data": b"hello", "content_type": "text/plain"}),
        ("/static/a b(c)!", {"method": "DELETE"}),
    ],
)
def test_the_same_targets(origin, prefix, entry, path, options):
    theirs, ours = both(origin, {prefix: entry}, path, **options)
    assert ours[0].status == theirs[0].status == "299 Odd"
    assert ours[1] == theirs[1]
    (their_request,), (our_request,) = theirs[2], ours[2]
    assert our_request.start == their_request.start
    assert our_request.text == their_request.text
    assert fields(our_request) == fields(their_request, "accept-encoding")
    their_host, our_host = their_request.get("host")[0], our_request.get("host")[0]
    if entry.get("host", "<auto>") == "<auto>":
        assert (their_host, our_host) == ("127.0.0.1", f"127.0.0.1:{origin.port}")
    else:
        assert our_host == their_host


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/static/x", {}),
        ("/static/x", {"method": "HEAD"}),
        ("/static/missing", {}),
        ("/static/missing", {"method": "HEAD"}),
        ("/static/same", {}),
        ("/static/none", {}),
        ("/static/chunked", {}),
        ("/static/x", {"method": "PUT", "data": b"0123456789" * 100_000}),
        ("/static/x", {"method": "OPTIONS"}),
        ("/static/x", {"method": "PROPFIND"}),
    ],
)
def test_the_same_answers(origin, path, options):
    theirs, ours = both(origin, {"/static/": {"target": TARGET}}, path, **options)
    assert ours[0].status == theirs[0].status
    assert ours[1] == theirs[1]
    dropped = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
    for came in (theirs[0], ours[0]):
        assert "Keep-Alive" not in came.headers

    def shown(came):
        return sorted((n.lower(), v) for n, v in came.headers if n.lower() not in dropped)

    assert shown(ours[0]) == shown(theirs[0])


@pytest.mark.parametrize("path", ["/", "/other", "/static", "/stati", "/staticx", "/x/static/", "/STATIC/x"])
def test_the_app_gets_all_else(origin, path):
    for came, data, got in both(origin, {"/static/": {"target": TARGET}}, path):
        assert (came.status_code, data, got) == (200, f"the app: {path}".encode(), [])


def test_several_prefixes(origin):
    targets = {
        "/a/b/": {"target": TARGET, "headers": {"X-Which": "ab"}},
        "/a/": {"target": TARGET, "headers": {"X-Which": "a"}},
        "/c/": {"target": TARGET, "headers": {"X-Which": "c"}, "remove_prefix": True},
    }
    for path, which in [("/a/b/x", "ab"), ("/a/x", "a"), ("/a/b", "a"), ("/c/c/x", "c")]:
        theirs, ours = both(origin, targets, path)
        assert theirs[2][0].get("x-which") == ours[2][0].get("x-which") == [which]
        assert theirs[2][0].path == ours[2][0].path


def test_a_target_that_refuses():
    for middleware in (Theirs, Ours):
        client = AppClient(middleware(wrapped, {"/static/": {"target": f"http://127.0.0.1:{free_port()}"}}))
        assert client.get("/static/x").status_code == 502


def test_its_arguments(origin):
    """As theirs, by position and by name; then options of ours, for all or for one prefix."""
    entry = {"target": TARGET.format(port=origin.port)}
    for arguments, options in [
        ((4096, 5), {}),
        ((), {"chunk_size": 4096, "timeout": 5}),
        ((), {"timeout": 2.5}),
    ]:
        client = AppClient(Ours(wrapped, {"/static/": dict(entry)}, *arguments, **options))
        assert client.get("/static/x").status_code == 299
    client = AppClient(
        Ours(
            wrapped,
            {"/a/": dict(entry), "/b/": {**entry, "xfwd": False, "auth": "u:p"}},
            xfwd=True,
            via="edge",
        )
    )
    for path in ("/a/x", "/b/x"):
        assert client.get(path).headers["Via"] == "1.1 edge"
    a, b = (message for _, message in origin.requests[-2:])
    assert (len(a.get("x-forwarded-for")), len(b.get("x-forwarded-for"))) == (1, 0)
    assert (len(a.get("authorization")), len(b.get("authorization"))) == (0, 1)


@pytest.mark.parametrize(
    ("targets", "options", "error", "said"),
    [
        ({"/a/": {}}, {}, ValueError, "target"),
        ({"/a/": {"target": "ftp://x/"}}, {}, ValueError, "target"),
        ({"/a/": {"target": "http://x", "nonsense": 1}}, {}, TypeError, "nonsense"),
        ({"/a/": {"target": "http://x", "ssl_context": "x"}}, {}, ValueError, "ssl_context"),
        ({"/a/": {"target": "http://x", "headers": {"X": "a\r\nb"}}}, {}, ValueError, "headers"),
        ({"/a/": {"target": "http://x", "host": "a\r\nb"}}, {}, ValueError, "[hH]ost"),
        ({"/a/": {"target": "http://x"}}, {"nonsense": 1}, TypeError, "nonsense"),
        ({"/a/": {"target": "http://x"}}, {"timeout": -1}, ValueError, "timeout"),
        ({"/a/": {"target": "http://x"}}, {"chunk_size": 0}, ValueError, "chunk_size"),
    ],
)
def test_what_cannot_be_used(targets, options, error, said):
    with pytest.raises(error, match=said):
        Ours(wrapped, targets, **options)


def test_https_with_a_context(tmp_path):
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    port = free_port()
    with Echo(port, tls=context):
        for middleware in (Theirs, Ours):
            for own, status in ((trusting, 299), (None, 502)):
                entry = {"target": f"https://localhost:{port}/", "ssl_context": own}
                client = AppClient(middleware(wrapped, {"/static/": entry}))
                assert client.get("/static/x").status_code == status


# --- where ours differs on purpose ---------------------------------------------------------------


def call(app, path="/static/x", **options):
    """The app iterable, started."""
    builder = EnvironBuilder(path, **options)
    environ = builder.get_environ()
    builder.close()
    return run_wsgi_app(app, environ)


def test_pieces_are_handed_on_when_they_come(port):
    app = Ours(wrapped, {"/static/": {"target": f"http://127.0.0.1:{port}"}})
    with Upstream(port) as upstream:
        first, go_on = threading.Event(), threading.Event()

        def target():
            wire = upstream.accept()
            read_request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst")
            first.set()
            go_on.wait(30)
            wire.send(b"other")

        thread = threading.Thread(target=target)
        thread.start()
        try:
            iterable, status, _ = call(app)
            assert status == "200 OK"
            pieces = iter(iterable)
            data = b""
            while len(data) < 5:
                data += next(pieces)
            assert data == b"first"
            assert not go_on.is_set()
        finally:
            go_on.set()
            thread.join()
        assert b"".join(pieces) == b"other"
        getattr(iterable, "close", lambda: None)()


def test_fields_that_connection_names_stay_where_nothing_tells_whose_they_are(origin):
    """The program may have written them; what always speaks of one connection ends here."""
    app = Ours(wrapped, {"/static/": {"target": TARGET.format(port=origin.port)}})
    AppClient(app).get("/static/x", headers={"Connection": "X-Hop", "X-Hop": "1", "X-Kept": "1", "TE": "x"})
    got = origin.requests[-1][1]
    assert (got.get("x-hop"), got.get("te"), got.get("x-kept")) == (["1"], [], ["1"])


@pytest.mark.parametrize("path", ["/static/a%2Fb", "/static/caf%C3%A9", "/static/a%20b", "/static/%25x"])
def test_the_path_is_the_clients(origin, path):
    app = Ours(wrapped, {"/static/": {"target": TARGET.format(port=origin.port)}})
    AppClient(app).get(path)
    assert origin.requests[-1][1].path == path


def test_a_silent_target_is_504(port):
    app = Ours(wrapped, {"/static/": {"target": f"http://127.0.0.1:{port}"}}, timeout=0.2)
    with Upstream(port):
        assert AppClient(app).get("/static/x").status_code == 504


def test_an_answer_that_breaks_off_does_not_look_whole(port):
    app = Ours(wrapped, {"/static/": {"target": f"http://127.0.0.1:{port}"}})
    with Upstream(port) as upstream:

        def target():
            wire = upstream.accept()
            read_request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
            wire.close()

        thread = threading.Thread(target=target)
        thread.start()
        iterable, status, _ = call(app)
        assert status == "200 OK"
        with pytest.raises(Exception) as caught:
            b"".join(iterable)
        assert not isinstance(caught.value, AssertionError)
        thread.join()
        getattr(iterable, "close", lambda: None)()


def test_a_body_without_length_is_sent_in_chunks(origin):
    app = Ours(wrapped, {"/static/": {"target": TARGET.format(port=origin.port)}})
    environ = EnvironBuilder("/static/x", method="POST").get_environ()
    environ.pop("CONTENT_LENGTH", None)
    environ["wsgi.input"] = io.BytesIO(b"without length")
    environ["wsgi.input_terminated"] = True
    environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    iterable, status, _ = run_wsgi_app(app, environ)
    assert b"".join(iterable) == b"you sent without length"
    assert origin.requests[-1][1].get("transfer-encoding") == ["chunked"]


def test_connections_are_kept(origin):
    client = AppClient(Ours(wrapped, {"/static/": {"target": TARGET.format(port=origin.port)}}))
    for _ in range(3):
        assert client.get("/static/x").get_data() == b"you sent "
    assert len({number for number, _ in origin.requests[-3:]}) == 1


# --- under our worker ----------------------------------------------------------------------------


def test_the_middleware_in_an_app_under_our_worker(port):
    with laboratory() as lab, Upstream(port) as upstream:
        scene = lab.scene()
        where = scene.place()
        scene.run(f"""
from flask import Flask
app = Flask("app")
app.route("/own")(lambda: "own")
app.wsgi_app = http_proxy.ProxyMiddleware(
    app.wsgi_app, {{"/static/": {{"target": "http://127.0.0.1:{port}/", "remove_prefix": True}}}}, xfwd=True
)
passenger.create_server(app).listen("unix:{where}")
""")
        got, came = ask(where, upstream, request("/static/a%2Fb?q", method="POST", body=b"hello"))
        assert (got.start, got.text) == ("POST /a%2Fb?q HTTP/1.1", b"hello")
        assert got.get("x-forwarded-for") == ["127.0.0.1"]
        assert got.get("host") == [f"127.0.0.1:{port}"]
        assert came.text == b"ok"
        assert refuse(where, request("/own")).text == b"own"
        upstream.wires[-1].close()
        with connect(where) as client:
            client.send(request("/static/ws", "Connection: Upgrade", "Upgrade: websocket"))
            wire = accept(upstream, client)
            assert Message(wire.head()).path == "/ws"
            wire.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            assert Message(client.head()).status == 101
            wire.send(b"down")
            assert client.exactly(4) == b"down"


# --- under other servers, in threads -------------------------------------------------------------

THREADED = ("waitress", "cheroot", "werkzeug")


class Served:
    """A proxy under another server, to a port where each test has its own target."""

    def __init__(self, starter, name):
        self.name = name
        self.port, self.target = free_port(), free_port()
        with Upstream(self.target):
            self.process = starter.python(PROGRAMS / "proxy_under.py", name, self.port, self.target)

            def ready():
                assert self.process.popen.poll() is None, self.process.log()
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return refuse(self.port, request("/patched")).status == 200
                return False

            wait_for(ready, lambda: f"{name}:\n{self.process.log()}")


@pytest.fixture(scope="module", params=["wsgiref", *THREADED])
def served(request):
    with starting() as starter:
        yield Served(starter, request.param)


@pytest.fixture
def upstream(served):
    with Upstream(served.target) as upstream:
        yield upstream


def carry(served, upstream, method="GET", path="/x?q=1", body=None, headers=None, reply=None):
    """One request through the server: what the target got, and the client's response, read."""
    client = Client(served.port)
    got = []

    def target():
        wire = upstream.accept()
        got.append(read_request(wire))
        pieces = reply if isinstance(reply, list) else [reply or answer("200 OK", "X-A: 1", body=b"hello")]
        for piece in pieces:
            if piece is None:
                wire.close()
            else:
                wire.send(piece)

    thread = threading.Thread(target=target)
    thread.start()
    try:
        client.request(method, path, body, headers or {})
        response = client.getresponse()
        data = response.read()
    finally:
        client.close()
        thread.join()
    return got[0], response, data


def test_nothing_is_patched(served):
    assert refuse(served.port, request("/patched")).text in (b"False", b"5\r\nFalse\r\n0\r\n\r\n")


def test_a_request_under_another_server(served, upstream):
    got, response, data = carry(served, upstream, headers={"X-Thing": "1", "Cookie": "a=b", "Accept": "x, y"})
    assert got.start == "GET /x?q=1 HTTP/1.1"
    assert (got.get("x-thing"), got.get("cookie"), got.get("accept")) == (["1"], ["a=b"], ["x, y"])
    assert got.get("x-forwarded-for") == ["127.0.0.1"]
    assert got.get("host") == ["localhost"]
    assert not got.body
    assert (response.status, response.getheader("x-a"), response.getheader("x-path"), data) == (
        200,
        "1",
        "/x",
        b"hello",
    )


@pytest.mark.parametrize("size", [0, 1, 5, 300_000])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_body_under_another_server(served, upstream, method, size):
    body = b"x" * size
    got, response, data = carry(served, upstream, method, body=body, headers={"Content-Type": "text/x"})
    assert (got.start.split()[0], got.text, got.get("content-type")) == (method, body, ["text/x"])
    assert got.get("content-length") == [str(size)]
    assert (response.status, data) == (200, b"hello")


# wsgiref does not read chunks
@pytest.mark.leave_out(lambda served: served == "wsgiref")
def test_a_chunked_body_under_another_server(served, upstream):
    with connect(served.port) as client:
        client.send(
            request("/x", "Transfer-Encoding: chunked", "Connection: close", method="POST")
            + b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
        )
        wire = accept(upstream, client)
        got = read_request(wire)
        wire.send(answer())
        assert read_response(client).text == b"ok"
    assert got.text == b"onetwo"
    assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1


@pytest.mark.parametrize("early", [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", answer()[:-2]])
def test_a_body_continues_after_the_beginning_of_a_response(served, upstream, early):
    """Nothing runs beside the request in a thread; the rest of the body is sent between two reads."""
    size = 20_000_000
    with connect(served.port) as client:
        head = request("/x", f"Content-Length: {size}", "Connection: close", method="POST")
        sending = threading.Thread(target=client.sock.sendall, args=(head + bytes(size),))
        sending.start()
        wire = accept(upstream, client)
        wire.head()
        wire.send(early)
        wire.exactly(size)
        wire.send(answer()[-2:] if early.startswith(b"HTTP/1.1 200") else answer())
        while (response := Message(client.head())).status == 103:
            continue
        sending.join()
        assert response.status == 200
        assert client.rest().endswith(b"ok")


def test_head_under_another_server(served, upstream):
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\n\r\n"
    got, response, data = carry(served, upstream, "HEAD", reply=reply)
    assert got.start.startswith("HEAD ")
    assert (response.status, response.getheader("x-a"), data) == (200, "1", b"")
    assert response.getheader("content-length") in ("5", None)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_without_a_body_under_another_server(served, upstream, status):
    _, response, data = carry(served, upstream, reply=f"HTTP/1.1 {status}\r\nETag: x\r\n\r\n".encode())
    assert (response.status, response.getheader("etag"), data) == (int(status[:3]), "x", b"")


@pytest.mark.parametrize(
    "reply",
    [
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n", b"5;x=y\r\ntwo..\r\n0\r\nX-T: 1\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\none", b"two..", None],
        [b"HTTP/1.0 200 OK\r\n\r\none", b"two..", None],
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n", answer(body=b"onetwo..")],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nKeep-Alive: timeout=9\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n"
         b"Proxy-Authenticate: x\r\nTrailer: x\r\n\r\nonetwo.."],
    ],
)  # fmt: skip
def test_answers_of_all_framings_under_another_server(served, upstream, reply):
    _, response, data = carry(served, upstream, reply=reply)
    assert (response.status, data) == (200, b"onetwo..")
    assert response.getheader("x-hop") is None
    assert "Traceback" not in served.process.log()


def test_large_answers_and_fields_under_another_server(served, upstream):
    body = b"0123456789abcdef" * 200_000
    reply = answer("404 Not Here", "Set-Cookie: a=1", "Set-Cookie: b=2", "Content-Encoding: gzip", body=body)
    _, response, data = carry(served, upstream, reply=reply)
    assert (response.status, data == body) == (404, True)
    assert response.msg.get_all("set-cookie") == ["a=1", "b=2"]
    assert response.getheader("content-encoding") == "gzip"


@pytest.mark.parametrize("path", ["/a%20b", "/caf%C3%A9/x", "/a;b=c,d/(e)!~", "/%25x?y=%2F&z=%C3%A9"])
def test_paths_under_another_server(served, upstream, path):
    got, _, _ = carry(served, upstream, path=path)
    assert unquote_to_bytes(got.path.partition("?")[0]) == unquote_to_bytes(path.partition("?")[0])
    assert got.path.partition("?")[2] == path.partition("?")[2]


def test_a_target_that_refuses_under_another_server(served):
    for method in ("GET", "POST", "HEAD"):
        client = Client(served.port)
        try:
            client.request(method, "/refused", b"hello" if method == "POST" else None)
            response = client.getresponse()
            assert response.status == 502
            response.read()
        finally:
            client.close()
    served.process.wait_log("error event: UpstreamRefused /refused", 3)


@pytest.mark.parametrize(
    "reply",
    [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", b""],
)
def test_bad_answers_under_another_server(served, upstream, reply):
    _, response, _ = carry(served, upstream, reply=[reply, None] if reply else [None])
    assert response.status == 502


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
# wsgiref's answers without length end with the connection
@pytest.mark.leave_out(lambda served, framing: served == "wsgiref" and "chunked" in framing)
def test_an_answer_that_breaks_off_under_another_server(served, upstream, framing):
    """Where the server has a way to say so: a length not reached, or chunks without their end."""
    piece = b"4\r\nhalf\r\n" if "chunked" in framing else b"half"
    reply = [f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + piece, None]
    try:
        _, response, data = carry(served, upstream, reply=reply)
    except (http.client.IncompleteRead, http.client.BadStatusLine, ConnectionError):
        return
    if response.status == 200:
        # told by closing alone, which is all that HTTP/1.0 has
        assert response.version == 10
        assert "chunked" in framing
    else:
        assert response.status >= 500


def test_an_upgrade_under_another_server(served, upstream):
    """It cannot be carried: 501, or (RFC 9110 section 7.8) answered as the plain request that it is as well."""
    with connect(served.port) as client:
        client.send(request("/x", "Connection: Upgrade", "Upgrade: websocket"))
        ready, _, _ = select.select([upstream.listener, client.sock], [], [], 30)
        if upstream.listener in ready:
            wire = upstream.accept()
            got = read_request(wire)
            wire.send(answer())
            assert got.get("upgrade") == []
            assert read_response(client).text == b"ok"
        else:
            assert read_response(client).status == 501


# wsgiref serves one request at a time
@pytest.mark.leave_out(lambda served: served == "wsgiref")
def test_many_at_once_under_another_server(served):
    """Each thread has its own request, and gets the response to that."""

    class Own(Origin):
        def reply(self, message):
            return answer(body=message.path.encode() + b" " + message.text)

    wrong = []

    def ask_some(number):
        client = Client(served.port)
        try:
            for turn in range(8):
                body = f"body {number} {turn}".encode()
                client.request("POST", f"/{number}/{turn}", body)
                if client.getresponse().read() != f"/{number}/{turn} ".encode() + body:
                    wrong.append((number, turn))
        except (OSError, http.client.HTTPException) as error:
            wrong.append(error)
        finally:
            client.close()

    with Own(served.target) as origin:
        threads = [threading.Thread(target=ask_some, args=[number]) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        # far fewer connections than requests
        assert len(origin.peers) < len(origin.requests)
