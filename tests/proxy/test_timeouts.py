"""The options timeout and proxy_timeout: what ends a request, and what progress keeps it."""

import contextlib
import http.client
import socket
import time

import pytest
from http_client import Client, fetch
from proxy_harness import background, cut_off
from proxy_laboratory import (
    MB,
    MODES,
    OK,
    WAYS,
    accept,
    listening_place,
    read_response,
    request,
)
from upstream_sockets import Upstream, connect

# --- timeouts ----------------------------------------------------------------------------------------


@MODES
def test_proxy_timeout_while_the_answer_is_awaited_is_504(lab, upstream, port, mode):
    where = lab.serve(f"{port}, proxy_timeout=0.2", mode)
    with connect(where) as client:
        wire = accept(upstream, client.send(request("/late")))
        wire.head()
        assert read_response(client).status == 504
        assert wire.ended()
    log = lab.wait_log("504")
    assert "GET /late" in log
    assert "Traceback" not in log


def test_proxy_timeout_in_the_body_truncates(lab, upstream, port):
    where = lab.serve(f"{port}, proxy_timeout=3")
    client = Client(where)
    try:
        client.request("GET", "/")
        wire = upstream.accept()
        wire.head()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        response = client.getresponse()
        assert response.status == 200
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        assert wire.ended()
    finally:
        client.close()


@MODES
def test_timeout_of_a_client_that_is_silent_in_its_body_is_408(lab, upstream, port, mode):
    where = lab.serve(f"{port}, timeout=0.3", mode)
    with connect(where) as client:
        client.send(request("/x", "Content-Length: 100", method="POST") + b"half")
        assert read_response(client).status == 408
    assert "Traceback" not in lab.log()


# --- 2: proxy_timeout and uploads --------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("target", ["reads all", "reads nothing"])
def test_an_upload_to_a_target_that_does_not_answer_is_504(lab, upstream, port, way, target):
    where = lab.serve(f"{port}, proxy_timeout=1", where=listening_place(way))
    size = 20 * MB

    def upload():
        with contextlib.suppress(OSError):
            client.send(request("/x", f"Content-Length: {size}", method="POST")).send(bytes(size))

    with connect(where) as client, background(upload):
        wire = accept(upstream, client)
        with background(cut_off, wire) if target == "reads all" else contextlib.nullcontext():
            assert read_response(client).status == 504
            client.sock.shutdown(socket.SHUT_RDWR)
    lab.one_line("(POST /x)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(POST /x\): 504")


@pytest.mark.parametrize("slow", ["target on tcp", "target on unix", "client"])
def test_an_upload_that_is_slower_than_proxy_timeout_is_not_cut_off(lab, port, slow):
    """There is progress all the time."""
    unix = lab.place()
    with Upstream(unix if slow == "target on unix" else port) as upstream:
        where = lab.serve(
            f"{f'unix:{unix}'!r}, proxy_timeout=2" if "unix" in slow else f"{port}, proxy_timeout=2"
        )
        size, step = {"target on tcp": (20 * MB, MB), "target on unix": (5 * MB, MB // 4), "client": (20, 1)}[
            slow
        ]

        def upload():
            client.send(request("/x", f"Content-Length: {size}", method="POST"))
            for _ in range(0, size, step):
                client.send(bytes(min(step, size)))
                if slow == "client":
                    time.sleep(0.2)

        with connect(where) as client, background(upload):
            wire = accept(upstream, client)
            begin = time.monotonic()
            wire.head()
            left = size - len(wire.data)
            while left:
                for _ in range(max(1, step // 65536)):
                    piece = wire.sock.recv(min(left, 65536))
                    assert piece or not left, f"cut off, {left} bytes are missing"
                    left -= len(piece)
                if slow != "client":
                    time.sleep(0.2)
            assert time.monotonic() - begin > 2.5, "the test was too quick to show anything"
            wire.send(OK)
            assert read_response(client).text == b"ok"
    assert not lab.proxy_lines("(POST /x)")


# --- 16: a short proxy_timeout -----------------------------------------------------------------------


def test_a_short_proxy_timeout_and_a_client_that_pauses(lab, upstream, port):
    where = lab.serve(f"{port}, proxy_timeout=0.003")
    with connect(where) as client:
        client.send(request("/x", "Transfer-Encoding: chunked", method="POST"))
        wire = accept(upstream, client)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nfirst")
        client.send(b"3\r\nabc\r\n")
        begin = time.monotonic()
        client.sock.settimeout(0.5)
        while time.monotonic() < begin + 4:
            try:
                if not client.sock.recv(65536):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        with contextlib.suppress(OSError):
            client.send(b"0\r\n\r\n")
            wire.send(bytes(4995))
        fetch(lab.process.socket)
    lab.assert_calm()
