"""A program between the server and the proxy: what it has read of the body, and clients that go meanwhile."""

import pytest
from free_ports import free_port
from proxy_laboratory import Origin, accept, get, read_request, read_response, request
from upstream_sockets import Upstream, connect


def place(lab, transport):
    return free_port() if transport == "tcp" else lab.place()


def serve_program(lab, port, body, transport="unix", options=""):
    """A program that runs ``body`` and returns what ``carry()`` does."""
    where = place(lab, transport)
    address = repr(f"unix:{where}") if isinstance(where, str) else where
    lines = "\n".join(f"            {line}" for line in body.splitlines())
    lab.run(f"""
        proxy = http_proxy.create_server({port}, "127.0.0.1"{options})
        proxy.on("econnreset", lambda error, request, target: seen.append(request.path))

        def program(environ, start_response):
{lines}

        passenger.create_server(program).listen({address})
    """)
    return where


CHUNKED = (
    request("/x", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n"
)
SIZED = request("/x", method="POST", body=b"helloworld")
BODIES = pytest.mark.parametrize("sent", [CHUNKED, SIZED], ids=["chunked", "sized"])
READS = pytest.mark.parametrize("read", ["read(1)", "read(5)", "read()", "readline()"])


@BODIES
@READS
def test_a_body_that_the_program_has_read_is_not_forwarded_truncated(lab, sent, read):
    port = free_port()
    where = serve_program(
        lab, port, f"environ['wsgi.input'].{read}\nreturn proxy.web(environ, start_response)"
    )
    with Origin(port) as origin:
        assert get(where, sent).status == 500
        assert origin.requests == []
    text = lab.wait_log("buffer=io.BytesIO(body)")
    assert "the program has read the request's body" in text
    assert "POST /x" in text


@BODIES
def test_a_body_that_a_handler_has_read_is_not_forwarded_truncated(lab, sent):
    port = free_port()
    where = lab.serve(f"{port}, '127.0.0.1'")
    lab.run("proxy.on('proxy_req', lambda upstream_request, request, options: request.get_data() and None)")
    with Origin(port) as origin:
        assert get(where, sent).status == 500
        assert origin.requests == []


@BODIES
def test_a_body_that_the_program_passes_on_is_forwarded(lab, sent):
    port = free_port()
    where = serve_program(
        lab,
        port,
        "body = environ['wsgi.input'].read()\n"
        "return proxy.web(environ, start_response, buffer=io.BytesIO(body.upper()))",
    )
    with Origin(port) as origin:
        assert get(where, sent).status == 200
        ((_, message),) = origin.requests
        assert message.text == b"HELLOWORLD"


@BODIES
def test_a_program_that_reads_nothing_changes_nothing(lab, sent):
    port = free_port()
    where = serve_program(
        lab, port, "environ['wsgi.input'].read(0)\nreturn proxy.web(environ, start_response)"
    )
    with Origin(port) as origin:
        assert get(where, sent).status == 200
        ((_, message),) = origin.requests
        assert message.text == b"helloworld"


WRAPPED = """
def started(*arguments):
    return start_response(*arguments)

return proxy.web(environ, started)
"""
VIEW = """
import flask
app = flask.Flask("view")

@app.route("/<path:path>", methods=["GET", "POST"])
def view(path):
    return Response.from_app(proxy.web, flask.request.environ)

return app(environ, start_response)
"""
BETWEEN = pytest.mark.parametrize("program", [WRAPPED, VIEW], ids=["wrapped", "flask"])


@BETWEEN
@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("body", [b"", b"body"])
def test_a_client_that_goes_is_noticed_before_the_target_responds(lab, program, transport, body):
    port = free_port()
    where = serve_program(lab, port, program, transport)
    with Upstream(port) as upstream:
        with connect(where) as client:
            client.send(request("/gone", method="POST" if body else "GET", body=body))
            wire = accept(upstream, client)
            assert read_request(wire).body == body
        assert wire.ended()
    assert lab.wait_seen() == ["/gone"]


@BETWEEN
def test_a_client_that_goes_during_the_response_is_noticed(lab, program):
    port = free_port()
    where = serve_program(lab, port, program, "tcp")
    with Upstream(port) as upstream:
        with connect(where) as client:
            client.send(request("/gone"))
            wire = accept(upstream, client)
            read_request(wire)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
            assert client.until(b"hello")
        assert wire.ended()


@BETWEEN
def test_repeated_headers_stay_apart(lab, program):
    port = free_port()
    where = serve_program(lab, port, program)
    with Origin(port) as origin:
        assert get(where, request("/x", "X-One: a", "Accept: b", "X-One: c")).status == 200
        ((_, message),) = origin.requests
        assert message.get("x-one") == ["a", "c"]


@BETWEEN
def test_a_connection_is_used_for_the_next_request(lab, program):
    port = free_port()
    where = serve_program(lab, port, program)
    with Origin(port) as origin, connect(where) as client:
        for number in range(3):
            client.send(request(f"/{number}", method="POST", body=b"body"))
            assert read_response(client).text == b"ok"
        assert origin.paths == ["/0", "/1", "/2"]
