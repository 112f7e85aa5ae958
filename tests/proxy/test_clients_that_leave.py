"""Clients that leave before they have their response."""

import pytest
from free_ports import free_port
from proxy_harness import buffers, cut_off, fill
from proxy_laboratory import MB, WAYS, accept, listening_place, read_request, request, silent
from upstream_sockets import connect


@pytest.mark.parametrize("leaves", ["closes", "resets"])
def test_a_client_goes_whose_upload_is_blocked(lab, upstream, port, leaves):
    where = lab.serve(f"{port}", where=free_port())
    before = lab.settled_sockets()
    client = connect(where).send(request("/x", "Content-Length: 1000000000000", method="POST"))
    wire = accept(upstream, client)
    fill(client.sock, bytes(MB), 4 * buffers() + 16 * MB)
    if leaves == "resets":
        client.reset()
        # the client has not read a byte: the worker closes the connection all the same
        lab.wait_sockets(before)
    else:
        client.sock.close()
    cut_off(wire)
    lab.wait_sockets(before)


@WAYS
@pytest.mark.parametrize("first", ["nothing", "half-closes"])
@pytest.mark.leave_out(lambda way, first: way == "tcp" and first == "half-closes")
def test_a_client_that_has_pipelined_and_goes(lab, upstream, port, way, first):
    where = lab.serve(f"{port}", where=listening_place(way))
    with connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        client.send(request("/second"))
        if first == "half-closes":
            client.finish()
        assert silent(wire)
    wire.sock.settimeout(15)
    assert wire.ended()
