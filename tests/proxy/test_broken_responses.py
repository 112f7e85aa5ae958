"""Targets that end a response too early."""

import pytest
from proxy_harness import background, cut_off, wait_read
from proxy_laboratory import MODES, WAYS, accept, listening_place, read_request, read_response, request
from upstream_sockets import connect


@WAYS
@MODES
def test_a_target_that_resets_inside_a_long_body(lab, upstream, port, way, mode):
    where = lab.serve(f"{port}", mode, listening_place(way))
    lab.note_errors()
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n")
        client.head()
        with background(wire.send, b"x" * 400_000):
            client.exactly(400_000)
        wait_read(wire)
        wire.reset()
        assert len(cut_off(client)) < 4_600_000
    lab.one_line("(GET /x)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(GET /x\)")
    assert lab.wait_seen() == [("UpstreamClosed", f"http://localhost:{port}")]


HANDLES = """
def handle(upstream_response, request):
    if request.path == "/read":
        return Response(upstream_response.stream.read())
    return Response(iter(lambda: upstream_response.stream.read1(100), b""))
proxy.on("proxy_res", handle)
"""


@WAYS
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_streaming_answer_of_a_handler_whose_target_breaks_off(lab, upstream, port, way, end):
    where = lab.serve(f"{port}, self_handle_response=True", where=listening_place(way))
    lab.run("\n" + HANDLES)
    with connect(where) as client:
        client.send(request("/stream"))
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
        assert b" 200 " in client.head()
        client.until(b"abc\r\n")
        getattr(wire, end)()
        assert cut_off(client) == b""
    lab.one_line("(GET /stream)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(GET /stream\)")


@WAYS
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_handler_that_reads_what_its_target_breaks_off(lab, upstream, port, way, end):
    where = lab.serve(f"{port}, self_handle_response=True", where=listening_place(way))
    lab.run("\n" + HANDLES)
    lab.note_errors()
    with connect(where) as client:
        client.send(request("/read"))
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
        wait_read(wire)
        getattr(wire, end)()
        assert read_response(client).status == 502
    lab.one_line("(GET /read)", rf"proxy: http://localhost:{port}: .+ after [\d.]+ s \(GET /read\): 502")
    assert lab.wait_seen() == [("UpstreamClosed", f"http://localhost:{port}")]
