"""An upgrade to h2c never passes the proxy: it would let a client speak to the target unseen."""

import pytest
from proxy_laboratory import MODES, OK, accept, ask, read_request, read_response, request
from upstream_sockets import connect

LISTS = ["h2c", "H2C", "h2c, websocket", "websocket, h2c", "h2c, h2c", "h2c,", ",h2c"]


@MODES
@pytest.mark.parametrize("value", LISTS)
def test_h2c_is_not_handed_on_in_any_list(lab, upstream, port, mode, value):
    where = lab.serve(f"{port}") if mode == "direct" else lab.route(port)
    fields = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {value}", "HTTP2-Settings: AAMAAABkAAQCAAAA"]
    with connect(where) as client:
        client.send(request("/x", *fields))
        wire = accept(upstream, client)
        got = read_request(wire)
        assert not got.get("upgrade"), got
        assert not got.get("http2-settings"), got
        assert "upgrade" not in ",".join(got.get("connection")).lower(), got
        wire.send(OK)
        assert read_response(client).text == b"ok"


@pytest.mark.parametrize("values", [("websocket", "h2c"), ("h2c", "websocket")], ids=" + ".join)
def test_h2c_in_a_field_of_its_own_is_not_handed_on(lab, upstream, port, values):
    fields = ["Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQCAAAA"]
    sent = request("/x", *fields, *(f"Upgrade: {value}" for value in values))
    got, came_back = ask(lab.serve(f"{port}"), upstream, sent)
    assert "h2c" not in ",".join(got.get("upgrade")), got
    assert not got.get("http2-settings"), got
    assert came_back.text == b"ok"


@pytest.mark.parametrize("value", LISTS)
def test_h2c_is_not_an_upgrade(lab, upstream, port, value):
    where = lab.route(port, "return proxy.ws(environ, start_response)")
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", f"Upgrade: {value}"))
        assert read_response(client).status == 400
    assert not upstream.connects_within(0.05)


@MODES
@pytest.mark.parametrize("value", ["h2c", "H2C", "h2c, websocket", "websocket, h2c", "h2c,"])
@pytest.mark.parametrize("asked", ["websocket", "h2c, websocket"])
@pytest.mark.leave_out(lambda mode, asked: mode == "routed" and asked != "websocket")
def test_a_target_that_switches_to_h2c_is_502(lab, upstream, port, mode, value, asked):
    where = lab.serve(f"{port}", mode)
    with connect(where) as client:
        client.send(request("/x", "Connection: Upgrade", f"Upgrade: {asked}"))
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(f"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: {value}\r\n\r\nframes".encode())
        assert read_response(client).status == 502
        assert wire.ended()
    lab.one_line("(GET /x)", r"\): 502")
