"""One direction of a connection ends, and the other continues."""

import pytest
from proxy_harness import background, came
from proxy_laboratory import OK, WAYS, accept, listening_place, read_request, read_response, request, silent
from upstream_sockets import connect

# --- 12: half-closed tunnels -------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("protocol", ["websocket", "x"])
@pytest.mark.parametrize("secure", [False, True])
def test_what_a_target_says_after_a_half_close_arrives(lab, upstream, port, tls, way, protocol, secure):
    scheme = "https" if secure else "http"
    where = lab.serve(f"'{scheme}://localhost:{port}', secure=False", where=listening_place(way))
    last = b"last words" * 20_000
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", f"Upgrade: {protocol}"))
        wire = accept(upstream, client)
        if secure:
            wire.sock = tls.wrap_socket(wire.sock, server_side=True)
        wire.head()
        wire.send(f"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode())
        client.head()
        client.send(b"bye").finish()
        assert wire.exactly(3) == b"bye"
        assert not came(wire, 1.0)  # the end, or nothing
        with background(wire.send, last):
            assert client.exactly(len(last)) == last
        wire.sock.close()
        assert client.rest() == b""


# --- 13, 14: clients that go -------------------------------------------------------------------------


def test_a_unix_client_that_half_closes_and_then_goes(lab, upstream, port):
    where = lab.serve(f"{port}")
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        client.finish()
        assert silent(wire), "a half-close is not an end"
    wire.sock.settimeout(15)
    assert wire.ended()


def test_a_unix_client_that_half_closes_gets_its_answer(lab, upstream, port):
    where = lab.serve(f"{port}")
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        client.finish()
        assert silent(wire)
        wire.send(OK)
        assert read_response(client).text == b"ok"
