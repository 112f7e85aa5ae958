"""Which fields go through the proxy, in which shape, and what it adds: RFC 9110 section 7.6, RFC 7239, docs/reference/proxy.md."""

import base64
import re

import pytest
from proxy_harness import ALL, OK, PLACES, Message, came, get, path, proxied, request_of, response_of
from upstream_sockets import connect

SERVERS = {
    **PLACES,
    "case": "UP, HOST, preserve_header_key_case=True",
    "inside_case": "UP, HOST, preserve_header_key_case=True",
    "origin": "UP, HOST, change_origin=True",
    "origin_unix": "UNIX, change_origin=True",
    "xfwd": "UP, HOST, xfwd=True",
    "inside_xfwd": "UP, HOST, xfwd=True",
    "xfwd_replace": "UP, HOST, xfwd='replace'",
    "xfwd_untrusted": "UP, HOST, xfwd=True, trusted=['192.0.2.0/24', '2001:db8::1']",
    "inside_xfwd_untrusted": "UP, HOST, xfwd=True, trusted=['192.0.2.0/24']",
    "xfwd_any": "UP, HOST, xfwd='append', trusted='*'",
    "fwd": "UP, HOST, forwarded=True",
    "fwd_replace": "UP, HOST, forwarded='replace'",
    "fwd_untrusted": "UP, HOST, forwarded=True, trusted='192.0.2.1'",
    "via": "UP, HOST, via=True",
    "via_named": "UP, HOST, via='front.example'",
    "inside_via": "UP, HOST, via='front.example'",
    "set": "UP, HOST, headers={'X-Set': '1', 'User-Agent': 'mine'}",
    "auth": "UP, HOST, auth='user:password'",
    "based": "'http://127.0.0.1:%d/base/' % UP",
    "to_proxy": "UP, HOST, to_proxy=True",
}


def answer(*fields: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *fields, "Content-Length: 2"]
    return ("\r\n".join(lines) + "\r\n\r\nok").encode("latin-1")


def own(message: Message, *ignored: str) -> list[tuple[str, str]]:
    """The fields but for those that each side writes for itself."""
    skip = {
        "connection",
        "keep-alive",
        "te",
        "content-length",
        "transfer-encoding",
        "date",
        "server",
        *ignored,
    }
    return [(name, value) for name, value in message.fields if name.lower() not in skip]


# --- fields of one connection ------------------------------------------------------------------------

HOP = [
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "Proxy-Authorization: Basic c2VjcmV0",
    "Proxy: http://evil.example",
    "TE: gzip, deflate;q=0.5",
    "Upgrade: h2c",
    "X-Hop: secret",
    "X-Second: secret",
]


@ALL
def test_hop_by_hop_fields_of_a_request_end_here(px, where):
    got, _ = px.exchange(
        get("/", "Connection: X-Hop, keep-alive", "X-Kept: 1", *HOP, "connection:,  x-SECOND ,,"), where=where
    )
    nominated = [("x-hop", "secret"), ("x-second", "secret")]
    # inside an application, nothing tells what the client has sent from what the application has written
    assert own(got) == [
        ("host", "client.example"),
        ("x-kept", "1"),
        *(nominated if where == "inside" else []),
    ]
    for name in ("keep-alive", "upgrade", "te", "transfer-encoding"):
        assert not got.all(name), got


@ALL
def test_hop_by_hop_fields_of_an_answer_end_here(px, where):
    _, seen = px.exchange(
        get(),
        answer(
            "Connection: X-Hop", "X-Hop: secret", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive",
            "Proxy-Authenticate: Basic realm=x", "X-Kept: 1", "Upgrade: h2c", "Connection: x-second", "X-Second: 2",
        ),
        where=where,
    )  # fmt: skip
    assert own(seen) == [("x-kept", "1")]
    assert "timeout=5" not in str(seen.fields)
    assert not seen.all("upgrade")


@ALL
def test_hop_by_hop_fields_of_an_interim_answer_end_here(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get())
        wire = upstream.accept()
        request_of(wire)
        wire.send(
            b"HTTP/1.1 103 Early Hints\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nLink: a\r\n\r\n"
            + OK
        )
        interim = Message(client.head())
        assert own(interim) == [("link", "a")]
        assert response_of(client).status == 200


@ALL
@pytest.mark.parametrize("nominated", ["host", "content-length", "Host, Content-Length, close"])
def test_what_the_message_needs_cannot_be_nominated_away(px, where, nominated):
    request = get("/", f"Connection: {nominated}", "Content-Length: 3", method="POST") + b"abc"
    got, _ = px.exchange(request, where=where)
    assert (got.all("host"), got.body) == (["client.example"], b"abc")


@ALL
def test_the_framing_of_a_chunked_request_cannot_be_nominated_away(px, where):
    request = get("/", "Connection: transfer-encoding", "Transfer-Encoding: chunked", method="POST")
    got, _ = px.exchange(request + b"3\r\nabc\r\n0\r\n\r\n", where=where)
    assert (got.get("transfer-encoding"), got.body) == ("chunked", b"abc")


@ALL
@pytest.mark.parametrize(
    "field", ["Authorization: Basic x", "Cookie: a=b", "Cache-Control: no-store", "Content-Type: text/x"]
)
def test_end_to_end_fields_cannot_be_nominated_away(px, where, field):
    """RFC 9110 section 7.6.1: they are "never appropriate as a connection option"; to drop them helps attackers only."""
    name, _, value = field.partition(": ")
    got, _ = px.exchange(get("/", f"Connection: {name}", field), where=where)
    assert got.all(name) == [value]


@pytest.mark.parametrize(
    ("where", "name"),
    [("xfwd", "X-Forwarded-For"), ("xfwd", "X-Forwarded-Proto"), ("fwd", "Forwarded"), ("via", "Via"), ("set", "X-Set"),
     ("auth", "Authorization"), ("origin", "Host")],
)  # fmt: skip
def test_what_the_proxy_writes_cannot_be_nominated_away(px, where, name):
    got, _ = px.exchange(get("/", f"Connection: close, {name}"), where=where)
    assert got.all(name)


@ALL
@pytest.mark.parametrize("nominated", ["content-length", "date, content-type"])
def test_the_framing_of_an_answer_cannot_be_nominated_away(px, where, nominated):
    _, seen = px.exchange(get(), answer(f"Connection: {nominated}", "X-Kept: 1"), where=where)
    assert (seen.body, seen.get("x-kept")) == (b"ok", "1")


@ALL
def test_the_chunked_framing_of_an_answer_cannot_be_nominated_away(px, where):
    _, seen = px.exchange(
        get(),
        b"HTTP/1.1 200 OK\r\nConnection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        where=where,
    )
    assert seen.body == b"ok"


@ALL
@pytest.mark.parametrize("te", ["trailers", "gzip, Trailers", "trailers;q=1", "deflate", "trailers, chunked"])
def test_te_goes_no_further_than_trailers(px, where, te):
    got, _ = px.exchange(get("/", f"TE: {te}", "Connection: TE"), where=where)
    assert [value.lower() for value in got.all("te")] in ([], ["trailers"])
    if got.all("te"):
        assert "te" in (got.get("connection") or "").lower()
        assert "trailers" in te.lower()


@ALL
def test_te_trailers_is_handed_on(px, where):
    """gRPC's servers insist on it, and without it an upstream may leave out its trailers."""
    got, _ = px.exchange(get("/", "TE: trailers", "Connection: TE"), where=where)
    assert got.get("te") == "trailers"
    assert "te" in got.get("connection").lower()


# --- order, case, duplicates -------------------------------------------------------------------------

LIST = [
    "X-B: 1",
    "X-A: 2",
    "X-B: 3",
    "Accept: text/html",
    "Accept: */*;q=0.1",
    "x-a: ",
    "X-B:\t1 \t",
    "User-Agent: t",
]
LISTED = [
    ("x-b", "1"), ("x-a", "2"), ("x-b", "3"), ("accept", "text/html"), ("accept", "*/*;q=0.1"), ("x-a", ""),
    ("x-b", "1"), ("user-agent", "t"),
]  # fmt: skip


@ALL
def test_order_and_duplicates_of_a_request_are_kept(px, where):
    got, _ = px.exchange(get("/", *LIST), where=where)
    assert own(got, "host") == LISTED


@ALL
def test_order_and_duplicates_of_an_answer_are_kept(px, where):
    _, seen = px.exchange(get(), answer(*LIST), where=where)
    assert own(seen) == LISTED


@ALL
def test_set_cookie_is_never_merged(px, where):
    cookies = ["a=1; Path=/; Expires=Wed, 09 Jun 2030 10:18:14 GMT", "b=2; HttpOnly", "a=3"]
    _, seen = px.exchange(get(), answer(*(f"Set-Cookie: {cookie}" for cookie in cookies)), where=where)
    assert seen.all("set-cookie") == cookies


@ALL
def test_cookies_of_a_request_are_kept(px, where):
    got, _ = px.exchange(get("/", "Cookie: a=1; b=2"), where=where)
    assert got.all("cookie") == ["a=1; b=2"]


@pytest.mark.parametrize("where", ["case", "inside_case"])
def test_the_case_of_names_is_kept_if_asked_for(px, where):
    names = ["X-MiXeD", "x-low", "X-UP", "ETag", "X-MIXED", "WWW-Authenticate", "DNT"]
    got, seen = px.exchange(
        get("/", *(f"{name}: 1" for name in names)), answer(*(f"{name}: 1" for name in names)), where=where
    )
    if where == "case":  # the environ of an app has no letter case
        assert own(got) == [("Host", "client.example"), *((name, "1") for name in names)]
    assert own(seen) == [(name, "1") for name in names]


@ALL
def test_names_are_in_lower_case_otherwise(px, where):
    got, seen = px.exchange(get("/", "X-MiXeD: A", "ETag: B"), answer("X-MiXeD: A", "ETag: B"), where=where)
    for message in got, seen:
        assert [name for name, _ in own(message, "host")] == ["x-mixed", "etag"]
    assert all(name == name.lower() for name, _ in got.fields)


@ALL
def test_values_are_bytes(px, where):
    """Latin-1, UTF-8 or nothing in particular."""
    value = bytes(range(0x80, 0x100)).decode("latin-1")
    got, seen = px.exchange(
        get("/", f"X-A: a\tb  c{value}"), answer(f"X-A: a\tb  c{value}", status=f"299 {value}"), where=where
    )
    assert got.get("x-a") == seen.get("x-a") == f"a\tb  c{value}"


@ALL
def test_many_and_large_fields(px, where):
    fields = [f"X-{number}: {'v' * 500}" for number in range(60)]
    got, seen = px.exchange(get("/", *fields), answer(*fields), where=where)
    expected = [(f"x-{number}", "v" * 500) for number in range(60)]
    assert own(got, "host") == expected
    assert own(seen) == expected


@ALL
@pytest.mark.parametrize(
    "status", ["200 OK", "299 Odd Reason", "404 ", "418 I'm a teapot", "599 X", "302 Found"]
)
def test_status_and_reason_are_kept(px, where, status):
    _, seen = px.exchange(get(), answer("Location: /relative", status=status), where=where)
    assert seen.line.partition(" ")[2].strip() == status.strip()
    assert seen.get("location") == "/relative"


@ALL
def test_an_answer_without_a_reason(px, where):
    _, seen = px.exchange(get(), b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", where=where)
    assert (seen.status, seen.body) == (200, b"ok")


@ALL
def test_date_and_server_are_those_of_the_upstream_and_not_doubled(px, where):
    _, seen = px.exchange(get(), answer("Date: Tue, 01 Jan 2030 00:00:00 GMT", "Server: theirs"), where=where)
    assert seen.get("date") == "Tue, 01 Jan 2030 00:00:00 GMT"
    assert seen.get("server") == "theirs"
    _, seen = px.exchange(get(), where=where)
    assert len(seen.all("date")) < 2
    assert len(seen.all("server")) < 2


@ALL
@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "M-SEARCH"]
)
def test_methods_are_kept(px, where, method):
    body = ["Content-Length: 0"] if method in ("POST", "PUT", "PATCH") else []
    got, _ = px.exchange(get("/", *body, method=method), where=where)
    assert got.line == f"{method} / HTTP/1.1"


@ALL
def test_names_with_an_underscore_do_not_pass_for_others(px, where):
    """gunicorn drops them (header_map): behind the proxy X_Forwarded_For would be taken for X-Forwarded-For."""
    got, _ = px.exchange(get("/", "X_Forwarded_For: 192.0.2.9", "X-Kept: 1"), where=where)
    assert own(got) == [("host", "client.example"), ("x-kept", "1")]


# --- Host and targets --------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("host", ["example.org", "example.org:8080", "[::1]:81", "EXAMPLE.org."])
def test_host_is_kept(px, where, host):
    got, _ = px.exchange(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), where=where)
    assert got.all("host") == [host]


def test_change_origin(px):
    got, _ = px.exchange(
        get("/", "Origin: http://client.example", "Referer: http://client.example/"), where="origin"
    )
    assert got.all("host") == [f"127.0.0.1:{px.up}"]
    assert got.get("origin") == "http://client.example"
    assert got.get("referer") == "http://client.example/"


def test_change_origin_for_a_unix_socket(px):
    with px.unix_upstream() as upstream, connect(px["origin_unix"]) as client:
        client.send(get())
        assert request_of(upstream.accept()).all("host") == ["localhost"]


@ALL
def test_a_request_of_http_1_0_without_host_gets_one(px, where):
    """The upstream is asked in HTTP/1.1, where it must not be missing (it may be empty)."""
    got, _ = px.exchange(b"GET / HTTP/1.0\r\nX-A: 1\r\n\r\n", where=where)
    assert got.line == "GET / HTTP/1.1"
    assert len(got.all("host")) == 1


@ALL
@pytest.mark.parametrize(
    ("target", "host", "sent"),
    [
        ("http://other.example/a/b?q=1", "other.example", "/a/b?q=1"),
        ("http://other.example:81/", "other.example:81", "/"),
        ("http://other.example", "other.example", "/"),
        ("http://other.example?q", "other.example", "/?q"),
        ("HTTP://Other.example/a%2Fb", "Other.example", "/a%2Fb"),
        ("https://other.example/x", "other.example", "/x"),
        ("http://[::1]:81/x", "[::1]:81", "/x"),
    ],
)
def test_the_absolute_form_sets_host(px, where, target, host, sent):
    """HTTP_HOST decides, into which the server puts one of the two: see test_proxy_security."""
    got, _ = px.exchange(get(target), where=where)
    assert got.target == sent
    assert got.get("host").lower() in (host.lower(), "client.example")


@ALL
def test_credentials_in_a_target_are_refused(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("http://user:password@other.example/x"))
        assert response_of(client).status == 400
        assert not upstream.connects_within(0.05)


@ALL
def test_the_asterisk_form(px, where):
    got, _ = px.exchange(get("*", method="OPTIONS"), where=where)
    assert got.line == "OPTIONS * HTTP/1.1"


@ALL
def test_options_of_a_whole_server_in_the_absolute_form(px, where):
    """RFC 9112 section 3.2.4: the last proxy makes an asterisk of it."""
    got, _ = px.exchange(get("http://other.example", method="OPTIONS"), where=where)
    assert got.line == "OPTIONS * HTTP/1.1"
    assert got.get("host") in ("other.example", "client.example")


@ALL
@pytest.mark.parametrize(
    "target",
    [
        "/", "/a%20b/%2F?q=%41", "//double", "/a//b/../c/./d", "/?", "/a?b?c", "/;p=1/x", "/a:b@c", "/%E9", "/%", "/a%zz",
        "/a'b(c)*,!$&+", "/{x}|y^z`", "/\"<>", "/a\\b", "/~x-_.",
    ],
)  # fmt: skip
def test_targets_are_kept_as_they_were_written(px, where, target):
    got, _ = px.exchange(get(target), where=where)
    assert got.line == f"GET {target} HTTP/1.1"


@ALL
@pytest.mark.parametrize("target", ["client.example:443", "/", "http://other.example/"])
def test_connect_is_refused(px, where, target):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target, method="CONNECT"))
        assert response_of(client).status in (400, 405, 501)
        assert not upstream.connects_within(0.05)


@ALL
def test_trace_that_is_meant_for_the_proxy_is_not_implemented(px, where):
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get("/", "Max-Forwards: 0", method="TRACE"))
        response = response_of(client)
        assert response.status == 501
        assert b"does not send a request back" in response.body
        assert not upstream.connects_within(0.05)


@pytest.mark.parametrize(
    ("target", "sent"),
    [("/", "/base/"), ("/a?b", "/base/a?b"), ("//a", "/base//a"), ("http://o.example/x", "/base/x")],
)
def test_the_targets_path_comes_first(px, target, sent):
    got, _ = px.exchange(get(target), where="based")
    assert got.target == sent


def test_the_absolute_form_for_a_further_proxy(px):
    got, _ = px.exchange(get("/a?b"), where="to_proxy")
    assert re.fullmatch(rf"http://(127\.0\.0\.1:{px.up}|client\.example)/a\?b", got.target), got.target


# --- forwarded fields --------------------------------------------------------------------------------

SENT = [
    "X-Forwarded-For: 203.0.113.7",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Port: 443",
    "X-Forwarded-Host: www.example",
    "X-Real-IP: 203.0.113.7",
]


@pytest.mark.parametrize("where", ["xfwd", "inside_xfwd", "xfwd_replace", "xfwd_untrusted", "xfwd_any"])
def test_forwarded_fields_are_written(px, where):
    got, _ = px.exchange(get(), where=where)
    assert got.get("x-forwarded-for") == "127.0.0.1"
    assert got.get("x-forwarded-proto") == "http"
    assert got.get("x-forwarded-host") == "client.example"
    assert re.fullmatch("[0-9]+", got.get("x-forwarded-port"))


@pytest.mark.parametrize("where", ["xfwd", "inside_xfwd", "xfwd_any"])
def test_forwarded_fields_of_a_trusted_client_are_appended_to(px, where):
    got, _ = px.exchange(get("/", *SENT), where=where)
    assert got.get("x-forwarded-for") == "203.0.113.7, 127.0.0.1"
    assert re.fullmatch("https(, ?https?)?", got.get("x-forwarded-proto"))
    assert got.get("x-forwarded-port").startswith("443")
    assert got.get("x-forwarded-host") == "www.example"


@pytest.mark.parametrize("where", ["xfwd_replace", "xfwd_untrusted", "inside_xfwd_untrusted"])
def test_forwarded_fields_that_are_not_believed_are_replaced(px, where):
    got, _ = px.exchange(get("/", *SENT, "x-forwarded-for: 203.0.113.8"), where=where)
    assert got.get("x-forwarded-for") == "127.0.0.1"
    assert got.get("x-forwarded-proto") == "http"
    assert got.get("x-forwarded-host") == "client.example"
    assert "443" not in got.get("x-forwarded-port")


@pytest.mark.parametrize("where", ["xfwd", "inside_xfwd"])
def test_several_forwarded_fields_become_one_list(px, where):
    """The order of a list over several lines is that of the lines: the nearest hop is the last."""
    got, _ = px.exchange(
        get("/", "X-Forwarded-For: 203.0.113.7", "X-A: 1", "X-Forwarded-For: 203.0.113.8, 203.0.113.9"),
        where=where,
    )
    values = re.sub(" ?, ?", ", ", ",".join(got.all("x-forwarded-for")))
    assert values == "203.0.113.7, 203.0.113.8, 203.0.113.9, 127.0.0.1"


def test_without_xfwd_nothing_is_written(px):
    got, _ = px.exchange(get(), where="second")
    assert not [name for name in got.names() if "forwarded" in name or name == "via"]


def forwarded(message):
    """Forwarded, parsed: a list of dicts."""
    elements = []
    for element in ", ".join(message.all("forwarded")).split(","):
        pairs = dict(pair.strip().split("=", 1) for pair in element.split(";"))
        elements.append({name.lower(): value.strip('"') for name, value in pairs.items()})
    return elements


@pytest.mark.parametrize("where", ["fwd", "fwd_replace", "fwd_untrusted"])
def test_rfc_7239_is_written(px, where):
    got, _ = px.exchange(b"GET / HTTP/1.1\r\nHost: client.example:8080\r\n\r\n", where=where)
    (element,) = forwarded(got)
    assert element["for"].partition(":")[0] == "127.0.0.1"
    assert element["proto"] == "http"
    assert element["host"] == "client.example:8080"
    assert 'host="client.example:8080"' in got.get("forwarded").lower()  # a colon must be quoted


def test_rfc_7239_of_a_trusted_client_is_appended_to(px):
    got, _ = px.exchange(get("/", 'Forwarded: for="[2001:db8::1]:81";proto=https'), where="fwd")
    first, second = forwarded(got)
    assert first == {"for": "[2001:db8::1]:81", "proto": "https"}
    assert second["for"].partition(":")[0] == "127.0.0.1"


@pytest.mark.parametrize("where", ["fwd_replace", "fwd_untrusted"])
def test_rfc_7239_that_is_not_believed_is_replaced(px, where):
    got, _ = px.exchange(get("/", "Forwarded: for=203.0.113.7", "Forwarded: for=203.0.113.8"), where=where)
    (element,) = forwarded(got)
    assert element["for"].partition(":")[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ['a"b', "a;for=1.2.3.4", "a,for=1.2.3.4", "a\\"])
def test_a_host_cannot_add_to_rfc_7239(px, host):
    with px.upstream() as upstream, connect(px["fwd"]) as client:
        client.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        if not upstream.connects_within(1):
            assert response_of(client).status == 400
            return
        value = request_of(upstream.wires[0]).get("forwarded")
        # a token, or a string with its quotes closed
        pair = r"[a-z]+=([!#$%&'*+.^_`|~0-9A-Za-z-]+|\"([^\"\\]|\\.)*\")"
        assert re.fullmatch(f"{pair}(;{pair})*", value), value


def test_forwarded_fields_of_a_unix_client(px):
    """The primary's client has no address; nothing is invented, and what the web server wrote is kept."""
    with proxied({"primary": "UP, HOST, xfwd=True, forwarded=True"}) as other:
        got, _ = other.exchange(get())
        assert got.get("x-forwarded-host") == "client.example"
        got, _ = other.exchange(get("/", *SENT))
        assert got.get("x-forwarded-for").startswith("203.0.113.7")
        assert got.get("x-forwarded-proto").startswith("https")


# --- Via ---------------------------------------------------------------------------------------------


def test_via(px):
    got, seen = px.exchange(get(), where="via")
    for message in got, seen:
        assert re.fullmatch(r"1\.1 [!#$%&'*+.^_`|~0-9A-Za-z:-]+", message.get("via")), message


@pytest.mark.parametrize("where", ["via_named", "inside_via"])
def test_via_is_appended_to(px, where):
    got, seen = px.exchange(
        get("/", "Via: 1.0 first, 1.1 second"), answer("Via: 2 origin", "X-A: 1", "Via: 1.1 cdn"), where=where
    )
    assert ", ".join(got.all("via")) == "1.0 first, 1.1 second, 1.1 front.example"
    assert ", ".join(seen.all("via")) == "2 origin, 1.1 cdn, 1.1 front.example"


def test_via_says_what_version_was_received(px):
    got, _ = px.exchange(get(version="1.0"), where="via_named")
    assert got.get("via") == "1.0 front.example"
    _, seen = px.exchange(get(), b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", where="via_named")
    assert seen.get("via") == "1.0 front.example"


@ALL
def test_without_the_option_via_is_kept_as_it_is(px, where):
    got, seen = px.exchange(get("/", "Via: 1.0 first"), answer("Via: 1.1 x"), where=where)
    assert (got.all("via"), seen.all("via")) == (["1.0 first"], ["1.1 x"])


# --- set fields --------------------------------------------------------------------------------------


def test_set_fields_replace_what_the_client_sent(px):
    got, _ = px.exchange(get("/", "x-set: evil", "user-agent: theirs", "X-SET: again"), where="set")
    assert (got.all("x-set"), got.all("user-agent")) == (["1"], ["mine"])


def test_auth_replaces_what_the_client_sent(px):
    got, _ = px.exchange(get("/", "Authorization: Bearer x"), where="auth")
    assert got.all("authorization") == ["Basic " + base64.b64encode(b"user:password").decode()]


@ALL
def test_authorization_is_handed_on(px, where):
    got, _ = px.exchange(get("/", "Authorization: Bearer x"), where=where)
    assert got.all("authorization") == ["Bearer x"]


@ALL
def test_the_answer_tells_nothing_of_the_upstreams_connection(px, where):
    """The proxy alone decides about the client's connection; the end of the upstream's does not concern the client."""
    with px.upstream() as upstream, connect(px[where]) as client:
        for target in (path(), path()):
            client.send(get(target))
            wire = upstream.accept()
            assert request_of(wire).target == target
            wire.send(answer("Connection: close"))
            seen = response_of(client)
            assert "close" not in (seen.get("connection") or "").lower()
            wire.close()
        assert not came(client, 0.05)
