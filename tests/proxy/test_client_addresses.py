"""Where a client says it comes from: the names of UNIX sockets, and what the proxy makes of them."""

import contextlib
import os
import re
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from free_ports import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy_laboratory import accept, answer, ask, read_request, read_response, request
from upstream_sockets import Wire
from wsgi_calls import environ

from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.downstream import WsgiDownstream
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.target import parse_target

RELAXED = settings(deadline=None, derandomize=True, database=None)

SMUGGLED = "x\r\nX-Role: admin\r\n\r\nGET x HTTP/1.1\r\nHost: a\r\nX: y"


@pytest.fixture(scope="module")
def port():
    return free_port()


@contextlib.contextmanager
def named_client(where, name):
    """A client on a UNIX socket that has given its own end a name."""
    with tempfile.TemporaryDirectory(prefix="gp-", dir="/tmp") as home, socket.socket(socket.AF_UNIX) as sock:
        place = Path(home, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        sock.bind(str(place))
        sock.connect(where)
        yield Wire(sock)


@pytest.mark.parametrize("name", [SMUGGLED, "x\nX-Role: admin", "a,b", "10.9.8.7", "\u00e9"])
@pytest.mark.parametrize("mode", ["direct", "routed"])
@pytest.mark.parametrize("options", ["xfwd=True", "forwarded=True", "xfwd=True, trusted='10.0.0.0/8'"])
def test_the_name_of_a_unix_client_is_not_handed_on(lab, upstream, port, name, mode, options):
    where = lab.serve(f"{port}, '127.0.0.1', {options}", mode)
    with named_client(where, name) as client:
        client.send(request())
        target = accept(upstream, client)
        got = read_request(target)
        assert not target.data
        assert got.get("x-role") == []
        if "forwarded" in options:
            assert got.get("forwarded") == ["for=127.0.0.1;host=example.org;proto=http"]
        else:
            assert got.get("x-forwarded-for") == ["127.0.0.1"]
        target.send(answer())
        assert read_response(client).status == 200


@pytest.mark.parametrize("wanted", ["X-Forwarded-For", "Forwarded"])
def test_an_address_that_a_program_believes_is_written(lab, upstream, port, wanted):
    option = "xfwd=True" if wanted[0] == "X" else "forwarded=True"
    where = lab.route(f"{port}, '127.0.0.1', {option}", "environ['REMOTE_ADDR'] = '203.0.113.5'")
    got, _ = ask(where, upstream)
    assert "203.0.113.5" in got.get(wanted)[0]


ADDRESSES = {
    "": "127.0.0.1",
    "192.0.2.1": "192.0.2.1",
    "2001:DB8::1": "2001:db8::1",
    "fe80::1%eth0": "fe80::1",
    "fe80::1%a\r\nX-Role: admin": "fe80::1",
    "example.org": "unknown",
    "192.0.2.1, 10.0.0.1": "unknown",
    "192.0.2.1\r\nX-Role: admin": "unknown",
    "192.0.2.1\n": "unknown",
    "unix:": "unknown",
    "0177.0.0.1": "unknown",
    "\u0661.1.1.1": "unknown",
}


@pytest.mark.parametrize("said", ADDRESSES)
def test_only_an_address_is_written_as_one(foreign, said):
    wanted = ADDRESSES[said]
    (status, _, _), (got,) = foreign(environ(REMOTE_ADDR=said), xfwd=True, forwarded=True)
    assert status == 200
    assert got.get("x-forwarded-for") == [wanted]
    shown_as = f'"[{wanted}]"' if ":" in wanted else wanted
    assert got.get("forwarded") == [f"for={shown_as};host=client.example;proto=http"]
    assert got.get("x-role") == []


NAMES = st.binary(max_size=60) | st.builds(lambda a, b: a + b"\r\nX: " + b, st.binary(), st.binary())


@RELAXED
@given(NAMES, st.booleans())
def test_the_name_of_a_peer_is_never_more_than_an_address(name, forwarded):
    """However a server decodes the name, and also under our own."""
    options = Options().merged({"forwarded" if forwarded else "xfwd": True}, "test")
    carrier = SimpleNamespace(head=b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", context=SimpleNamespace(addr=name))
    for text in name.decode("latin-1"), os.fsdecode(name):
        for client in (
            WsgiDownstream(environ(REMOTE_ADDR=text), None),
            WsgiDownstream(environ(REMOTE_ADDR=text), None, carrier),
        ):
            origin = client.forwarded_info(options, "a")
            assert re.fullmatch(r"[0-9a-f.:]+|unknown|", origin.address), origin.address
            lines = wire.lines_of(
                rules.upstream_headers(client.headers(False), options, parse_target(9), origin)
            )
            assert b"\nX: " not in lines
