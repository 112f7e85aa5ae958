"""The events error and econnreset, and handlers that raise."""

import pytest
from free_ports import free_port
from proxy_laboratory import (
    MODES,
    NOTE_ALL,
    accept,
    answer,
    ask,
    on_answer,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

# --- error -------------------------------------------------------------------------------------------


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
    """The rest of a body that the application did not read is not a request."""
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


# --- a handler that raises ---------------------------------------------------------------------------


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


# --- econnreset --------------------------------------------------------------------------------------


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
