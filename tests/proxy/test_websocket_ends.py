"""A WebSocket ends for both sides when one of them has ended it."""

import contextlib

import pytest
from free_ports import free_port
from proxy_laboratory import read_request, request
from upstream_sockets import Upstream, connect


@contextlib.contextmanager
def tunnel(lab, transport, protocol="websocket"):
    """Both ends of an upgraded connection."""
    port = free_port()
    where = free_port() if transport == "tcp" else lab.place()
    lab.serve(f"{port}, '127.0.0.1'", where=where)
    fields = f"Upgrade: {protocol}", "Connection: Upgrade"
    with Upstream(port) as upstream, connect(where) as client:
        client.send(request("/", *fields))
        wire = upstream.accept()
        read_request(wire)
        wire.send("\r\n".join(["HTTP/1.1 101 Switching Protocols", *fields, "", ""]).encode())
        assert client.head().startswith(b"HTTP/1.1 101")
        yield client, wire


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("first", ["client", "target"])
def test_a_silent_other_side_does_not_keep_it(lab, transport, first):
    with tunnel(lab, transport) as ends:
        one, other = ends if first == "client" else ends[::-1]
        other.send(b"\x81\x05hello")
        one.send(b"\x88\x02\x03\xe8")
        one.finish()
        # what was sent arrives on both sides, and then the end, although the other side does nothing
        assert other.rest() == b"\x88\x02\x03\xe8"
        assert one.rest() == b"\x81\x05hello"


def test_another_protocol_has_half_closes(lab):
    with tunnel(lab, "tcp", "tcp") as (client, wire), tunnel(lab, "tcp") as (other_client, other_wire):
        client.finish()
        other_client.finish()
        assert wire.rest() == b""
        # when the WebSocket that has ended at the same time is gone, this one is still there
        assert other_client.rest() == b""
        wire.send(b"still")
        assert client.exactly(5) == b"still"
