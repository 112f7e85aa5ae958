"""The option forward: a copy of each request for a second target, and that no copy leaves anything behind."""

import contextlib
import re
import threading
from pathlib import Path

import pytest
from conditions import wait_for
from free_ports import free_port
from proxy_harness import background, cut_off
from proxy_laboratory import (
    MB,
    MODES,
    OK,
    Origin,
    accept,
    answer,
    ask,
    get,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

# --- forward -----------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("form", "path"),
    [
        ("{port}", "/x?q"),
        ("'http://127.0.0.1:{port}'", "/x?q"),
        ("'http://127.0.0.1:{port}/copy'", "/copy/x?q"),
    ],
)
def test_forward_gets_a_copy(lab, upstream, port, mode, form, path):
    second = free_port()
    where = lab.serve(f"{port}, forward={form.format(port=second)}", mode)
    with Upstream(second) as copies, connect(where) as client:
        client.send(request("/x?q", "X-Thing: 1", method="POST", body=b"hello"))
        wire = accept(upstream, client)
        got = read_request(wire)
        wire.send(OK)
        assert read_response(client).text == b"ok"
        copy = copies.accept()
        copied = read_request(copy)
        copy.send(answer("500 No", body=b"not read"))
    assert (got.path, got.text) == ("/x?q", b"hello")
    assert (copied.path, copied.text, copied.get("x-thing")) == (path, b"hello", ["1"])
    assert copied.start.startswith("POST ")


def test_forward_to_a_unix_socket(lab, upstream, port):
    path = lab.place()
    with Upstream(path) as copies:
        _, came = ask(lab.serve(f"{port}, forward='unix:{path}'"), upstream)
        assert came.status == 200
        assert read_request(copies.accept()).path == "/x"


def test_without_forward_there_is_no_copy(lab, upstream, port):
    got, came = ask(lab.serve(f"{port}, forward=None"), upstream)
    assert (got.path, came.status) == ("/x", 200)


def test_a_copy_ends_when_a_redirect_makes_its_body_needless(lab, upstream, port):
    second = free_port()
    where = lab.serve(f"{port}, forward={second}, follow_redirects=True")
    with Upstream(second) as copies, connect(where) as client:
        client.send(request("/x", "Expect: 100-continue", "Content-Length: 5", method="POST"))
        wire = accept(upstream, client)
        wire.head()
        wire.send(answer("303 See Other", "Location: /y"))
        wire = upstream.accept()
        assert read_request(wire).path == "/y"
        wire.send(OK)
        assert read_response(client).text == b"ok"
        copy = copies.accept()
        copy.head()
        assert copy.ended()


def test_forward_that_refuses_does_no_harm(lab, upstream, port):
    where = lab.serve(f"{port}, forward={free_port()}")
    for _ in range(2):
        got, came = ask(where, upstream, request(method="POST", body=b"hello"), answer(body=b"fine"))
        assert (got.text, came.status, came.text) == (b"hello", 200, b"fine")
        upstream.wires[-1].close()


def test_forward_that_never_reads_does_not_delay(lab, upstream, port):
    second = free_port()
    body = b"0123456789abcdef" * 500_000
    with Upstream(second) as copies:
        where = lab.serve(f"{port}, forward={second}")
        with connect(where) as client:
            sender = threading.Thread(target=client.send, args=[request(method="POST", body=body)])
            sender.start()
            wire = upstream.accept()
            assert len(read_request(wire).text) == len(body)
            wire.send(OK)
            assert read_response(client).text == b"ok"
            sender.join()
        assert copies.connects_within(30)


def test_forward_alone_is_a_pure_copy(lab, upstream, port):
    where = lab.serve(f"None, forward={port}")
    with connect(where) as client:
        client.send(request("/x", method="POST", body=b"hello"))
        came = read_response(client)
        assert (came.status, came.text) == (200, b"")
        got = read_request(upstream.accept())
        assert (got.start, got.text) == ("POST /x HTTP/1.1", b"hello")
        # a client's connection is in order for the next one
        client.send(request("/y"))
        assert read_response(client).status == 200


def test_forward_alone_sends_the_body_of_the_option_buffer(lab, upstream, port):
    where = lab.serve(f"None, forward={port}, buffer=__import__('io').BytesIO(b'from the buffer')")
    with connect(where) as client:
        client.send(request("/x", method="POST", body=b"hello"))
        assert read_response(client).status == 200
        assert read_request(upstream.accept()).text == b"from the buffer"


def test_forward_alone_that_refuses_is_still_200(lab):
    came = refuse(lab.serve(f"None, forward={free_port()}"))
    assert (came.status, came.text) == (200, b"")


def test_a_target_or_forward_must_be_given():
    with pytest.raises(ValueError, match="target"):
        http_proxy.create_server(None)


# --- 6, 7, 19: copies --------------------------------------------------------------------------------


LEAKS = {
    "no target": ("lambda request: None", "", 404),
    "an unknown server": ("'no-such-server'", "", 502),
    "a body by a handler": ("{port}", "upstream_request.body = b'other body'", 200),
    "a handler that raises": ("{port}", "1 / 0", 500),
}


@pytest.mark.parametrize("case", LEAKS)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_copy_of_a_request_that_is_not_carried_ends(lab, origins, port, case, framing):
    target, handler, status = LEAKS[case]
    second = free_port()
    origins(port), origins(second)
    where = lab.serve(f"{target.format(port=port)}, forward={second}, agent=False")
    if handler:
        lab.run(f"""
def change(upstream_request, request, options):
    {handler}
proxy.on("proxy_req", change)
""")
    before = lab.settled_sockets()
    for _ in range(5):
        if framing == "length":
            sent = request("/x", "Connection: close", method="POST", body=b"hello")
        else:
            sent = request("/x", "Connection: close", "Transfer-Encoding: chunked", method="POST")
            sent += b"5\r\nhello\r\n0\r\n\r\n"
        assert get(where, sent).status == status
    lab.wait_sockets(before)


def test_a_copy_of_a_request_whose_body_was_not_wanted_ends(lab, origins, upstream, port):
    second = free_port()
    origins(second)
    where = lab.serve(f"{port}, forward={second}, agent=False")
    before = lab.settled_sockets()
    for _ in range(5):
        with connect(where) as client:
            client.send(request("/x", "Content-Length: 5", "Expect: 100-continue", method="POST"))
            wire = accept(upstream, client)
            wire.head()
            wire.send(answer("417 No", body=b""))
            assert read_response(client).status == 417
        cut_off(wire)
        wire.close()
    lab.wait_sockets(before)


def test_a_buffer_is_sent_with_every_request_and_copied(lab, origins, port):
    second = free_port()
    main, copies = origins(port), origins(second)
    body = b"0123456789" * 4
    where = lab.serve(f"{port}, forward={second}, buffer=io.BytesIO({body!r}), agent=False")
    before = lab.settled_sockets()
    for _ in range(3):
        assert get(where, request(method="POST", body=b"hello")).text == b"ok"
    wait_for(lambda: len(copies.requests) == 3, lambda: f"three copies; there are {copies.requests}", 15)
    for origin in (main, copies):
        assert [(m.get("content-length"), m.text) for _, m in origin.requests] == [(["40"], body)] * 3
    lab.wait_sockets(before)


@pytest.mark.parametrize("size", [40, 3 * MB])
def test_a_buffer_for_one_request_is_copied(lab, origins, port, size):
    second = free_port()
    main, copies = origins(port), origins(second)
    where = lab.route(
        f"{port}, forward={second}",
        f"return proxy.web(environ, start_response, buffer=io.BytesIO(b'B' * {size}))",
    )
    for _ in range(2):
        assert get(where, request(method="POST", body=b"hello")).text == b"ok"
    if size == 40:  # a copy of much is given up when its target is the slower one
        wait_for(lambda: len(copies.requests) == 2, lambda: f"two copies; there are {copies.requests}", 15)
    for _, message in main.requests + copies.requests:
        assert (message.get("content-length"), message.text) == ([str(size)], b"B" * size)
    assert len(main.requests) == 2


class Drain(Origin):
    """A target that reads bodies without keeping them."""

    def _serve(self, number, wire):
        with contextlib.suppress(OSError, AssertionError):
            head = wire.head()
            left = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1]) - len(wire.data)
            room = bytearray(256 * 1024)
            while left > 0:
                left -= wire.sock.recv_into(room)
            wire.send(answer("200 OK", "Connection: close"))
        wire.close()


def test_copies_for_a_target_that_does_not_read_take_no_memory(lab, port):
    second, size = free_port(), 14 * MB
    where = lab.serve(f"{port}, forward={second}")
    (pid,) = lab.process.workers()

    def rss():
        return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) * 1024

    body = bytes(size)
    done = []

    def upload(client):
        client.send(request("/x", f"Content-Length: {size}", method="POST")).send(body)
        assert read_response(client).text == b"ok"
        done.append(client)

    with Drain(port), Upstream(second), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where)) for _ in range(10)]
        before = rss()
        with contextlib.ExitStack() as uploads:
            for client in clients:
                uploads.enter_context(background(upload, client))
        assert len(done) == 10
        assert rss() < before + 30 * MB, f"it grew by {(rss() - before) / MB:.0f} MB"
