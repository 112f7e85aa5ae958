"""X-Forwarded-*, Forwarded and Via: what the proxy adds, and what it believes."""

import io

import pytest
from free_ports import free_port
from http_client import Client
from proxy_laboratory import MODES, OK, accept, answer, ask, has_ipv6, read_request, read_response, request
from upstream_sockets import connect


def forwarded_elements(message):
    """The elements of Forwarded, each as a dict."""
    elements = []
    for element in ",".join(message.get("forwarded")).split(","):
        pairs = (pair.partition("=") for pair in element.strip().split(";"))
        elements.append({name.lower(): value for name, _, value in pairs})
    return elements


# --- X-Forwarded-*, Forwarded, Via -------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("value", ["True", "'append'", "'replace'"])
def test_xfwd_writes_the_four_fields(lab, upstream, port, mode, value):
    where = lab.serve(f"{port}, xfwd={value}", mode)
    got, _ = ask(where, upstream, request("/x", "Host: example.org:81"))
    assert got.get("x-forwarded-for") == ["127.0.0.1"]
    assert got.get("x-forwarded-proto") == ["http"]
    assert got.get("x-forwarded-port") == ["81"]
    assert got.get("x-forwarded-host") == ["example.org:81"]
    assert got.get("host") == ["example.org:81"]


def test_xfwd_without_a_port_in_host(lab, upstream, port):
    got, _ = ask(lab.serve(f"{port}, xfwd=True"), upstream)
    assert got.get("x-forwarded-port") == ["80"]


SENT_FORWARDED = [
    "X-Forwarded-For: 203.0.113.7", "X-Forwarded-Proto: https", "X-Forwarded-Port: 443",
    "X-Forwarded-Host: outer.example",
]  # fmt: skip


@MODES
@pytest.mark.parametrize("value", ["True", "'append'"])
@pytest.mark.parametrize(
    "trusted", ["", ", trusted='*'", ", trusted=['127.0.0.0/8']", ", trusted=['127.0.0.1']"]
)
def test_xfwd_appends_to_what_a_trusted_client_sent(lab, upstream, port, mode, value, trusted):
    where = lab.serve(f"{port}, xfwd={value}{trusted}", mode, free_port())
    got, _ = ask(where, upstream, request("/x", *SENT_FORWARDED))
    assert [v.strip() for v in ",".join(got.get("x-forwarded-for")).split(",")] == [
        "203.0.113.7",
        "127.0.0.1",
    ]
    for name, first in (("proto", "https"), ("port", "443"), ("host", "outer.example")):
        assert ",".join(got.get(f"x-forwarded-{name}")).split(",")[0].strip() == first


@MODES
@pytest.mark.parametrize(
    "options",
    [
        "xfwd='replace'", "xfwd='replace', trusted='*'", "xfwd=True, trusted=['203.0.113.0/24', '2001:db8::/32']",
        "xfwd='append', trusted=['203.0.113.7']", "xfwd=True, trusted=[]",
    ],
)  # fmt: skip
def test_xfwd_replaces(lab, upstream, port, mode, options):
    where = lab.serve(f"{port}, {options}", mode, free_port())
    got, _ = ask(where, upstream, request("/x", "X-FORWARDED-FOR: 198.51.100.1", *SENT_FORWARDED))
    assert got.get("x-forwarded-for") == ["127.0.0.1"]
    assert got.get("x-forwarded-proto") == ["http"]
    assert got.get("x-forwarded-host") == ["example.org"]
    assert got.get("x-forwarded-port") != ["443"]
    assert len(got.get("x-forwarded-port")) == 1


@pytest.mark.parametrize("xfwd", ["True", "'replace'"])
def test_xfwd_under_another_spelling_is_replaced_too(lab, upstream, port, xfwd):
    """A target that is WSGI or CGI takes an underscore for a hyphen."""
    where = lab.serve(f"{port}, xfwd={xfwd}, trusted=[]", where=free_port())
    got, _ = ask(where, upstream, request("/x", "X_Forwarded_For: 198.51.100.1"))
    for name, value in got.fields:
        if name.lower().replace("_", "-") == "x-forwarded-for":
            assert value == "127.0.0.1"


@MODES
@pytest.mark.parametrize("value", ["True", "'append'", "'replace'"])
def test_forwarded_is_written(lab, upstream, port, mode, value):
    where = lab.serve(f"{port}, forwarded={value}", mode)
    got, _ = ask(where, upstream, request("/x", "Host: example.org:81"))
    (element,) = forwarded_elements(got)
    assert element["for"] in ("127.0.0.1", '"127.0.0.1"')
    assert element["proto"] == "http"
    # a colon is not a token character
    assert element["host"] == '"example.org:81"'
    assert not got.get("x-forwarded-for")


@MODES
def test_forwarded_appends_to_what_a_trusted_client_sent(lab, upstream, port, mode):
    where = lab.serve(f"{port}, forwarded=True, trusted='*'", mode, free_port())
    got, _ = ask(where, upstream, request("/x", 'Forwarded: for="[2001:db8::1]";proto=https'))
    first, second = forwarded_elements(got)
    assert first == {"for": '"[2001:db8::1]"', "proto": "https"}
    assert second["for"] == "127.0.0.1"


@MODES
@pytest.mark.parametrize("options", ["forwarded='replace'", "forwarded=True, trusted=['203.0.113.7']"])
def test_forwarded_replaces(lab, upstream, port, mode, options):
    where = lab.serve(f"{port}, {options}", mode, free_port())
    got, _ = ask(where, upstream, request("/x", "Forwarded: for=203.0.113.7", "forwarded: for=unknown"))
    (element,) = forwarded_elements(got)
    assert element["for"] == "127.0.0.1"
    assert "203.0.113.7" not in repr(got)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
def test_forwarded_for_a_client_on_ipv6(lab, upstream, port):
    own = free_port()
    lab.run(f"serve('[::1]:{own}', 'direct', {port}, forwarded=True, xfwd=True)")
    client = Client(("::1", own))
    try:
        client.request("GET", "/")
        wire = upstream.accept()
        got = read_request(wire)
        wire.send(OK)
        assert client.getresponse().read() == b"ok"
    finally:
        client.close()
    assert forwarded_elements(got)[0]["for"] == '"[::1]"'
    assert got.get("x-forwarded-for") == ["::1"]


@MODES
def test_via(lab, upstream, port, mode):
    got, came = ask(lab.serve(f"{port}, via=True", mode), upstream)
    for message in (got, came):
        (value,) = message.get("via")
        version, _, name = value.partition(" ")
        assert version == "1.1"
        assert name
        assert " " not in name


@MODES
def test_via_with_a_pseudonym_is_appended(lab, upstream, port, mode):
    where = lab.serve(f"{port}, via='edge'", mode)
    sent = request("/x", "Via: 1.0 first, 1.1 second")
    got, came = ask(where, upstream, sent, answer("200 OK", "Via: 1.1 origin"))
    assert ", ".join(got.get("via")) == "1.0 first, 1.1 second, 1.1 edge"
    assert ", ".join(came.get("via")) == "1.1 origin, 1.1 edge"


def test_via_tells_the_version_that_was_received(lab, upstream, port):
    where = lab.serve(f"{port}, via='edge'")
    with connect(where) as client:
        wire = accept(upstream, client.send(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n"))
        assert read_request(wire).get("via") == ["1.0 edge"]
        wire.send(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
        assert read_response(client).get("via") == ["1.0 edge"]


# --- 23, 24 ------------------------------------------------------------------------------------------


@MODES
def test_trailers_that_tell_what_a_proxy_has_to_tell_are_not_handed_on(lab, upstream, port, mode):
    names = [
        "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "Via", "Proxy-X", "Proxy",
        "X_Forwarded_For", "Under_Score", "X-Real", "X-Checksum",
    ]  # fmt: skip
    sent = (
        request("/x", "Transfer-Encoding: chunked", "Trailer: X-Checksum", method="POST")
        + b"3\r\nabc\r\n0\r\n"
    )
    sent += "".join(f"{name}: 6.6.6.6\r\n" for name in names).encode() + b"\r\n"
    got, came_back = ask(lab.serve(f"{port}", mode), upstream, sent)
    assert came_back.status == 200
    trailers = [line.partition(b":")[0].lower() for line in io.BytesIO(got.body.partition(b"\r\n0\r\n")[2])]
    assert set(trailers) - {b"\r\n"} == {b"x-real", b"x-checksum"}
