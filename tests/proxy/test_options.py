"""Each option of the proxy: its forms, its default, and what cannot be used."""

import base64
import http.client
import io
import select
import ssl
import threading
import time

import pytest
from conftest import Client, fetch, free_port
from proxy_laboratory import (
    OK,
    Message,
    accept,
    answer,
    ask,
    has_ipv6,
    laboratory,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

from gunicorn_passenger import http_proxy

#: The options are given when the proxy is made, or with each request: the same must come of it.
MODES = pytest.mark.parametrize("mode", ["direct", "routed"])


@pytest.fixture(scope="module")
def gunicorn():
    with laboratory() as lab:
        yield lab


@pytest.fixture
def lab(gunicorn):
    return gunicorn.scene()


@pytest.fixture
def upstream(port):
    with Upstream(port) as upstream:
        yield upstream


def forwarded_elements(message):
    """The elements of Forwarded, each as a dict."""
    elements = []
    for element in ",".join(message.get("forwarded")).split(","):
        pairs = (pair.partition("=") for pair in element.strip().split(";"))
        elements.append({name.lower(): value for name, _, value in pairs})
    return elements


# --- what is done without any option -------------------------------------------------------------


@MODES
def test_defaults(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    sent = request(
        "/a//b/../c%2F?x=1&y=//z", "Host: example.org:81", "X-Forwarded-For: 203.0.113.7", "Via: 1.0 there",
        "Forwarded: for=203.0.113.7", "Authorization: Basic eDp5",
    )  # fmt: skip
    reply = answer(
        "302 Found", f"Location: http://127.0.0.1:{port}/there", "Set-Cookie: a=1; Domain=a.example; Path=/a",
        "Via: 1.1 origin",
    )  # fmt: skip
    got, came = ask(where, upstream, sent, reply)
    assert got.start == "GET /a//b/../c%2F?x=1&y=//z HTTP/1.1"
    assert got.get("host") == ["example.org:81"]
    assert got.get("x-forwarded-for") == ["203.0.113.7"]
    assert not [name for name, _ in got.fields if name.lower() in ("x-forwarded-host", "x-forwarded-proto")]
    assert got.get("via") == ["1.0 there"]
    assert got.get("forwarded") == ["for=203.0.113.7"]
    assert got.get("authorization") == ["Basic eDp5"]
    assert came.start == "HTTP/1.1 302 Found"
    assert came.get("location") == [f"http://127.0.0.1:{port}/there"]
    assert came.get("set-cookie") == ["a=1; Domain=a.example; Path=/a"]
    assert came.get("via") == ["1.1 origin"]


# --- the request's target ------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("base", "options", "path", "expected"),
    [
        ("", "", "/x?q", "/x?q"),
        ("/", "", "/x?q", "/x?q"),
        ("/base", "", "/x?q", "/base/x?q"),
        ("/base/", "", "/x?q", "/base/x?q"),
        ("/base/", "", "/", "/base/"),
        ("/base", "", "/", "/base/"),
        ("/a/b", "prepend_path=True", "/x/y/", "/a/b/x/y/"),
        ("/base", "", "/?u=http://a.example/?b=1%26c&d=2//", "/base/?u=http://a.example/?b=1%26c&d=2//"),
        ("/base", "", "/a%20b%2Fc", "/base/a%20b%2Fc"),
        ("/ba%20se", "", "/x", "/ba%20se/x"),
        ("/base", "prepend_path=False", "/x?q", "/x?q"),
        ("/base/", "prepend_path=False", "/", "/"),
        ("/base", "ignore_path=True", "/x?q", "/base"),
        ("/base/", "ignore_path=True", "/x", "/base/"),
        ("/base?own=1", "ignore_path=True", "/x?q", "/base?own=1"),
        ("", "ignore_path=True", "/x?q", "/"),
        ("/base", "ignore_path=True, prepend_path=False", "/x?q", "/"),
        ("/base", "ignore_path=False", "/x", "/base/x"),
    ],
)
def test_paths(lab, upstream, port, mode, base, options, path, expected):
    where = lab.serve(f"'http://127.0.0.1:{port}{base}', {options}", mode)
    got, came = ask(where, upstream, request(path))
    assert got.start == f"GET {expected} HTTP/1.1"
    assert came.status == 200


@MODES
@pytest.mark.parametrize(
    ("path", "host", "expected"),
    [
        ("/x?q=http://a//b", "example.org:81", "http://example.org:81/x?q=http://a//b"),
        ("/", "example.org", "http://example.org/"),
        ("http://elsewhere.example/y", "elsewhere.example", "http://elsewhere.example/y"),
    ],
)
def test_to_proxy(lab, upstream, port, mode, path, host, expected):
    where = lab.serve(f"{port}, to_proxy=True", mode)
    got, _ = ask(where, upstream, request(path, f"Host: {host}"))
    assert got.start == f"GET {expected} HTTP/1.1"
    assert got.get("host") == [host]


def test_without_to_proxy_an_absolute_url_is_asked_for_by_its_path(lab, upstream, port):
    where = lab.serve(f"{port}")
    got, _ = ask(where, upstream, request("http://elsewhere.example/y?q", "Host: elsewhere.example"))
    assert got.path == "/y?q"
    assert got.get("host") == ["elsewhere.example"]


# --- the request's fields ------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("{port}", "", "example.org"),
        ("{port}", "change_origin=False", "example.org"),
        ("{port}", "change_origin=True", "localhost:{port}"),
        ("{port}, '127.0.0.1'", "change_origin=True", "127.0.0.1:{port}"),
        ("'http://127.0.0.1:{port}/base'", "change_origin=True", "127.0.0.1:{port}"),
        ("'http://LocalHost:{port}'", "change_origin=True", "localhost:{port}"),
    ],
)
def test_change_origin(lab, upstream, port, mode, target, options, expected):
    where = lab.serve(f"{target.format(port=port)}, {options}", mode)
    got, _ = ask(where, upstream)
    assert got.get("host") == [expected.format(port=port)]


@MODES
def test_headers_are_set(lab, upstream, port, mode):
    options = "headers={'X-New': 'new', 'user-agent': 'proxy', 'X-Both': 'ours'}"
    where = lab.serve(f"{port}, {options}", mode)
    sent = request("/x", "User-Agent: client", "X-BOTH: one", "X-Both: two", "X-Kept: kept")
    got, _ = ask(where, upstream, sent)
    assert got.get("x-new") == ["new"]
    assert got.get("user-agent") == ["proxy"]
    assert got.get("x-both") == ["ours"]
    assert got.get("x-kept") == ["kept"]


def test_headers_may_name_the_host(lab, upstream, port):
    got, _ = ask(lab.serve(f"{port}, headers={{'Host': 'given.example'}}"), upstream)
    assert got.get("host") == ["given.example"]


def test_headers_are_sent_with_every_request(lab, upstream, port):
    where = lab.serve(f"{port}, headers={{'X-New': 'new'}}")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        for _ in range(2):
            assert read_request(wire).get("x-new") == ["new"]
            wire.send(OK)
            assert read_response(client).status == 200
            client.send(request())


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", "Connection"])
def test_headers_do_not_change_the_framing(lab, upstream, port, name):
    """Either such a field is refused when the proxy is made, or it has no effect."""
    value = {"Content-Length": "99", "Transfer-Encoding": "chunked", "Connection": "upgrade"}[name]
    try:
        http_proxy.create_server(9000, headers={name: value})
    except ValueError as error:
        assert "headers" in str(error)
        return
    got, came = ask(
        lab.serve(f"{port}, headers={{{name!r}: {value!r}}}"),
        upstream,
        request(method="POST", body=b"hello"),
    )
    assert got.text == b"hello"
    assert value not in got.get(name)
    assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1
    assert came.status == 200


@MODES
@pytest.mark.parametrize("given", ["user:password", "user:pass:word", "user:", "us\u00e9r:p\u00e4ss"])
def test_auth(lab, upstream, port, mode, given):
    got, _ = ask(lab.serve(f"{port}, auth={given!r}", mode), upstream)
    (value,) = got.get("authorization")
    scheme, _, credentials = value.partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(credentials).decode() == given


def test_auth_leaves_one_authorization(lab, upstream, port):
    got, _ = ask(lab.serve(f"{port}, auth='a:b'"), upstream, request("/x", "Authorization: Bearer token"))
    assert len(got.get("authorization")) == 1


@MODES
@pytest.mark.parametrize("kept", [True, False])
def test_the_letter_case_of_field_names(lab, upstream, port, mode, kept):
    where = lab.serve(f"{port}, preserve_header_key_case={kept}", mode)
    sent = request("/x", "hOST: example.org", "X-ThiNg: A", "ACCEPT: b", "x-thing: C", "Cookie: k=V")
    reply = answer("200 OK", "X-AnsWer: D", "SET-COOKIE: a=E", "etag: F", "Set-Cookie: b=G", "x-answer: H")
    got, came = ask(where, upstream, sent, reply)
    wanted = [
        ("hOST", "example.org"), ("X-ThiNg", "A"), ("ACCEPT", "b"), ("x-thing", "C"), ("Cookie", "k=V"),
    ]  # fmt: skip
    answered = [
        ("X-AnsWer", "D"),
        ("SET-COOKIE", "a=E"),
        ("etag", "F"),
        ("Set-Cookie", "b=G"),
        ("x-answer", "H"),
    ]

    def shown(fields):
        return fields if kept else [(name.lower(), value) for name, value in fields]

    assert [field for field in got.fields if field[0].lower() not in ("connection",)] == shown(wanted)
    names = {name.lower() for name, _ in answered}
    assert [field for field in came.fields if field[0].lower() in names] == shown(answered)


def test_the_letter_case_is_lower_by_default(lab, upstream, port):
    reply = answer("200 OK", "X-Answer: 1")
    got, came = ask(lab.serve(f"{port}"), upstream, request("/x", "X-Thing: 1"), reply)
    assert ("x-thing", "1") in got.fields
    assert ("x-answer", "1") in came.fields
    assert all(name == name.lower() for name, _ in got.fields), got.fields


# --- X-Forwarded-*, Forwarded, Via ---------------------------------------------------------------


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
def test_xfwd_under_another_spelling_is_no_way_around(lab, upstream, port, xfwd):
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
    # a colon is no token character
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


# --- Location ------------------------------------------------------------------------------------

REWRITES = [
    ("host_rewrite='public.example'", "http://public.example/a?b#c"),
    ("host_rewrite='public.example:8443'", "http://public.example:8443/a?b#c"),
    ("auto_rewrite=True", "http://example.org:81/a?b#c"),
    ("protocol_rewrite='https'", "https://127.0.0.1:{port}/a?b#c"),
    ("protocol_rewrite='http'", "http://127.0.0.1:{port}/a?b#c"),
    ("host_rewrite='public.example', auto_rewrite=True", "http://public.example/a?b#c"),
    ("host_rewrite='public.example', protocol_rewrite='https'", "https://public.example/a?b#c"),
    ("auto_rewrite=True, protocol_rewrite='https'", "https://example.org:81/a?b#c"),
    ("auto_rewrite=True, change_origin=True", "http://example.org:81/a?b#c"),
    ("host_rewrite=None, auto_rewrite=False, protocol_rewrite=None", "http://127.0.0.1:{port}/a?b#c"),
]


def location(lab, upstream, port, options, status, value, mode="direct"):
    where = lab.serve(f"'http://127.0.0.1:{port}', {options}", mode)
    _, came = ask(
        where, upstream, request("/x", "Host: example.org:81"), answer(status, f"Location: {value}")
    )
    (result,) = came.get("location")
    return result


@MODES
@pytest.mark.parametrize(("options", "expected"), REWRITES)
def test_location_is_rewritten(lab, upstream, port, mode, options, expected):
    sent = f"http://127.0.0.1:{port}/a?b#c"
    assert location(lab, upstream, port, options, "302 Found", sent, mode) == expected.format(port=port)


@pytest.mark.parametrize(
    "status", ["201 Created", "301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
@pytest.mark.parametrize("options", ["host_rewrite='public.example'", "auto_rewrite=True"])
def test_location_of_which_status(lab, upstream, port, options, status):
    expected = "http://public.example/a" if "host" in options else "http://example.org:81/a"
    assert location(lab, upstream, port, options, status, f"http://127.0.0.1:{port}/a") == expected


@pytest.mark.parametrize(
    "value",
    [
        "http://elsewhere.example/a", "http://127.0.0.1/a", "http://127.0.0.1:1/a", "http://127.0.0.2:{port}/a",
        "/a?b#c", "a", "//elsewhere.example/a", "?q", "http://127.0.0.1:{port}@elsewhere.example/a", "mailto:a@b",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "options", ["host_rewrite='public.example', protocol_rewrite='https'", "auto_rewrite=True"]
)
def test_location_that_is_not_the_targets_stays(lab, upstream, port, options, value):
    value = value.format(port=port)
    assert location(lab, upstream, port, options, "302 Found", value) == value


def test_location_of_other_answers_stays(lab, upstream, port):
    value = f"http://127.0.0.1:{port}/a"
    assert location(lab, upstream, port, "host_rewrite='public.example'", "200 OK", value) == value


def test_the_host_of_the_target_is_compared_without_case(lab, upstream, port):
    where = lab.serve(f"'http://LOCALHOST:{port}', auto_rewrite=True")
    reply = answer("302 Found", f"Location: HTTP://LocalHost:{port}/A")
    assert ask(where, upstream, request(), reply)[1].get("location") == ["http://example.org/A"]


# --- Set-Cookie ----------------------------------------------------------------------------------

COOKIES = [
    "a=1; Domain=old.example; Path=/old/; Secure",
    "b=domain=old.example; DOMAIN=other.example;path=/other; HttpOnly",
    "c=3",
    "d=4; domain=Keep.example; Path=/keep; SameSite=Lax",
]
OLD_DOMAIN, OTHER_DOMAIN, KEEP_DOMAIN = (
    "; Domain=old.example",
    "; DOMAIN=other.example",
    "; domain=Keep.example",
)
OLD_PATH, OTHER_PATH, KEEP_PATH = "; Path=/old/", ";path=/other", "; Path=/keep"


def cookies(**changed):
    """The cookies with their attributes replaced."""
    result = []
    for cookie in COOKIES:
        for old, new in changed.items():
            cookie = cookie.replace(globals()[old], new)
        result.append(cookie)
    return result


@MODES
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", COOKIES),
        ("cookie_domain_rewrite=False, cookie_path_rewrite=False", COOKIES),
        ("cookie_domain_rewrite={}", COOKIES),
        (
            "cookie_domain_rewrite='new.example'",
            cookies(OLD_DOMAIN="; Domain=new.example", OTHER_DOMAIN="; DOMAIN=new.example",
                    KEEP_DOMAIN="; domain=new.example"),
        ),
        ("cookie_domain_rewrite=''", cookies(OLD_DOMAIN="", OTHER_DOMAIN="", KEEP_DOMAIN="")),
        (
            "cookie_domain_rewrite={'old.example': 'new.example'}",
            cookies(OLD_DOMAIN="; Domain=new.example"),
        ),
        (
            "cookie_domain_rewrite={'old.example': 'new.example', 'other.example': '', '*': 'rest.example'}",
            cookies(OLD_DOMAIN="; Domain=new.example", OTHER_DOMAIN="", KEEP_DOMAIN="; domain=rest.example"),
        ),
        (
            "cookie_domain_rewrite={'old.example': 'old.example', '*': ''}",
            cookies(OTHER_DOMAIN="", KEEP_DOMAIN=""),
        ),
        ("cookie_domain_rewrite={'*': 'new.example'}", cookies(
            OLD_DOMAIN="; Domain=new.example", OTHER_DOMAIN="; DOMAIN=new.example",
            KEEP_DOMAIN="; domain=new.example")),
        (
            "cookie_path_rewrite='/new/'",
            cookies(OLD_PATH="; Path=/new/", OTHER_PATH=";path=/new/", KEEP_PATH="; Path=/new/"),
        ),
        ("cookie_path_rewrite='/'", cookies(OLD_PATH="; Path=/", OTHER_PATH=";path=/", KEEP_PATH="; Path=/")),
        ("cookie_path_rewrite=''", cookies(OLD_PATH="", OTHER_PATH="", KEEP_PATH="")),
        (
            "cookie_path_rewrite={'/keep': '/keep', '/old/': '/new', '*': ''}",
            cookies(OLD_PATH="; Path=/new", OTHER_PATH=""),
        ),
        (
            "cookie_domain_rewrite={'old.example': ''}, cookie_path_rewrite={'/other': '/new'}",
            cookies(OLD_DOMAIN="", OTHER_PATH=";path=/new"),
        ),
    ],
)  # fmt: skip
def test_cookies_are_rewritten(lab, upstream, port, mode, options, expected):
    where = lab.serve(f"{port}, {options}", mode)
    _, came = ask(where, upstream, request(), answer("200 OK", *(f"Set-Cookie: {c}" for c in COOKIES)))

    def parts(cookie):
        name, *attributes = (part.strip() for part in cookie.split(";"))
        return [name, *((k.lower(), v) for k, _, v in (a.partition("=") for a in attributes))]

    assert [parts(cookie) for cookie in came.get("set-cookie")] == [parts(cookie) for cookie in expected]


def test_cookies_that_are_not_rewritten_stay_byte_for_byte(lab, upstream, port):
    odd = ['a="x; y"; path = /q', "b=1;;Path=/;", "c", 'd=4; expires=Thu, 01 Jan 1970 00:00:00 GMT;Domain=""']
    where = lab.serve(f"{port}, cookie_domain_rewrite={{'old.example': 'new.example'}}")
    _, came = ask(where, upstream, request(), answer("200 OK", *(f"Set-Cookie: {c}" for c in odd)))
    assert came.get("set-cookie") == [c.strip() for c in odd]


# --- forward -------------------------------------------------------------------------------------


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
        copy.send(answer("500 No", body=b"nobody reads this"))
    assert (got.path, got.text) == ("/x?q", b"hello")
    assert (copied.path, copied.text, copied.get("x-thing")) == (path, b"hello", ["1"])
    assert copied.start.startswith("POST ")


def test_forward_to_a_unix_socket(lab, upstream, port):
    path = lab.place()
    with Upstream(path) as copies:
        _, came = ask(lab.serve(f"{port}, forward='unix:{path}'"), upstream)
        assert came.status == 200
        assert read_request(copies.accept()).path == "/x"


def test_forward_is_none_by_default(lab, upstream, port):
    got, came = ask(lab.serve(f"{port}, forward=None"), upstream)
    assert (got.path, came.status) == ("/x", 200)


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


def test_forward_alone_that_refuses_is_still_200(lab):
    came = refuse(lab.serve(f"None, forward={free_port()}"))
    assert (came.status, came.text) == (200, b"")


def test_a_target_or_forward_must_be_given():
    with pytest.raises(ValueError, match="target"):
        http_proxy.create_server(None)


# --- ws and other upgrades -----------------------------------------------------------------------

UPGRADE = request(
    "/chat", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@MODES
@pytest.mark.parametrize("options", ["", ", ws=True"])
def test_ws_is_on(lab, upstream, port, mode, options):
    where = lab.serve(f"{port}{options}", mode)
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        got = Message(wire.head())
        assert got.get("upgrade") == ["websocket"]
        assert [v.lower() for v in got.get("connection")] == ["upgrade"]
        wire.send(SWITCH + b"early")
        assert Message(client.head()).status == 101
        assert client.exactly(5) == b"early"
        client.send(b"up")
        assert wire.exactly(2) == b"up"
        wire.close()
        assert client.ended()


@MODES
def test_ws_off_is_501(lab, upstream, port, mode):
    where = lab.serve(f"{port}, ws=False", mode)
    assert refuse(where, UPGRADE).status == 501
    assert not upstream.connects_within(0.1)
    assert ask(where, upstream)[1].status == 200


@MODES
def test_ws_timeout(lab, upstream, port, mode):
    where = lab.serve(f"{port}, ws_timeout=0.2", mode)
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(SWITCH)
        assert Message(client.head()).status == 101
        client.rest()
        wire.rest()


# --- timeouts ------------------------------------------------------------------------------------


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


def test_timeout_does_not_end_a_request_that_is_whole(lab, upstream, port):
    """The client has said all: that it is silent while the target thinks is in order."""
    where = lab.serve(f"{port}, timeout=0.2")
    with connect(where) as client:
        client.send(request("/x", method="POST", body=b"hello"))
        wire = accept(upstream, client)
        read_request(wire)
        begin = time.monotonic()
        while time.monotonic() < begin + 0.5:
            time.sleep(0.05)
        wire.send(OK)
        assert read_response(client).status == 200


# --- follow_redirects ----------------------------------------------------------------------------


def redirected(where, upstream, sent, *replies):
    """One request of a client whose target answers so: all that the target got, and what the client got."""
    got = []
    with connect(where) as client:
        client.send(sent)
        wire = None
        for reply in replies:
            if wire is None:
                wire = accept(upstream, client)
            elif not kept(wire, upstream, client):
                wire = upstream.accept()
            got.append(read_request(wire))
            wire.send(reply)
        return got, read_response(client, sent.split(b" ")[0].decode())


def kept(wire, upstream, client):
    """Whether the next request comes on the same connection."""
    if wire.data:
        return True
    ready, _, _ = select.select([wire.sock, upstream.listener, client.sock], [], [], 30)
    assert ready, "no next request"
    assert client.sock not in ready, f"answered: {client.sock.recv(1000)!r}"
    if wire.sock in ready:
        try:
            wire.data += wire.sock.recv(65536)
        except ConnectionError:
            return False
        return bool(wire.data)
    return False


def moved(status, to):
    return answer(status, f"Location: {to}", body=b"moved")


@MODES
def test_redirects_are_not_followed_by_default(lab, upstream, port, mode):
    for options in ("", ", follow_redirects=False"):
        _, came = ask(lab.serve(f"{port}{options}", mode), upstream, request(), moved("302 Found", "/y"))
        assert (came.status, came.get("location"), came.text) == (302, ["/y"], b"moved")


@MODES
@pytest.mark.parametrize("value", ["True", "1", "5"])
def test_redirects_are_followed(lab, upstream, port, mode, value):
    where = lab.serve(f"{port}, follow_redirects={value}", mode)
    got, came = redirected(where, upstream, request("/a/b", "Cookie: k=v"), moved("302 Found", "/y?q"), OK)
    assert [message.path for message in got] == ["/a/b", "/y?q"]
    assert got[1].get("cookie") == ["k=v"]
    assert (came.status, came.text, came.get("location")) == (200, b"ok", [])


@pytest.mark.parametrize(
    ("to", "path"),
    [
        ("c", "/a/c"), ("../c?q", "/c?q"), ("?q", "/a/b?q"), ("http://127.0.0.1:{port}/z", "/z"),
        ("//127.0.0.1:{port}/z", "/z"), ("/c#fragment", "/c"), ("http://127.0.0.1:{port}", "/"),
    ],
)  # fmt: skip
def test_where_a_redirect_leads(lab, upstream, port, to, path):
    """Relative to what was asked of the target, whatever the client's Host says."""
    where = lab.serve(f"'http://127.0.0.1:{port}', follow_redirects=True")
    sent = request("/a/b", "Host: evil.example")
    got, came = redirected(where, upstream, sent, moved("302 Found", to.format(port=port)), OK)
    assert got[1].path == path
    assert came.status == 200


@pytest.mark.parametrize(
    ("status", "method", "body", "then"),
    [
        (301, "GET", b"", "GET"), (302, "GET", b"", "GET"), (303, "GET", b"", "GET"), (307, "GET", b"", "GET"),
        (308, "GET", b"", "GET"), (302, "HEAD", b"", "HEAD"), (303, "HEAD", b"", "HEAD"), (307, "HEAD", b"", "HEAD"),
        (301, "POST", b"hello", "GET"), (302, "POST", b"hello", "GET"), (303, "POST", b"hello", "GET"),
        (303, "PUT", b"hello", "GET"), (303, "DELETE", b"", "GET"), (307, "DELETE", b"", "DELETE"),
        (308, "OPTIONS", b"", "OPTIONS"),
    ],
)  # fmt: skip
def test_the_method_after_a_redirect(lab, upstream, port, status, method, body, then):
    where = lab.serve(f"{port}, follow_redirects=True")
    sent = request("/a", "Content-Type: text/plain", method=method, body=body)
    if then == "HEAD":
        first = f"HTTP/1.1 {status} Moved\r\nLocation: /b\r\nContent-Length: 5\r\n\r\n".encode()
    else:
        first = moved(f"{status} Moved", "/b")
    second = OK if then != "HEAD" else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    got, came = redirected(where, upstream, sent, first, second)
    assert [message.start for message in got] == [f"{method} /a HTTP/1.1", f"{then} /b HTTP/1.1"]
    assert got[0].text == body
    if then == "GET" and method != "GET":
        assert got[1].text == b""
        assert not [n for n, v in got[1].fields if n.lower().startswith(("content-", "transfer-"))], got[1]
    assert came.status == 200


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_a_redirect_that_would_need_the_body_again_is_handed_over(lab, upstream, port, status, framing):
    where = lab.serve(f"{port}, follow_redirects=True")
    body = b"hello" if "Length" in framing else b"5\r\nhello\r\n0\r\n\r\n"
    sent = request("/a", framing, method="POST") + body
    got, came = ask(where, upstream, sent, moved(f"{status} Moved", "/b"))
    assert got.text == b"hello"
    assert (came.status, came.get("location"), came.text) == (status, ["/b"], b"moved")


@pytest.mark.parametrize(
    "status", ["200 OK", "201 Created", "300 Choices", "304 Not Modified", "404 Not Found"]
)
def test_what_is_no_redirect_is_not_followed(lab, upstream, port, status):
    where = lab.serve(f"{port}, follow_redirects=True")
    reply = f"HTTP/1.1 {status}\r\nLocation: /b\r\n".encode()
    reply += b"\r\n" if "304" in status else b"Content-Length: 0\r\n\r\n"
    assert ask(where, upstream, request(), reply)[1].status == int(status[:3])


def test_a_redirect_without_location_is_handed_over(lab, upstream, port):
    where = lab.serve(f"{port}, follow_redirects=True")
    assert ask(where, upstream, request(), answer("302 Found"))[1].status == 302


@pytest.mark.parametrize(
    "to", ["ftp://127.0.0.1/x", "file:///etc/passwd", "unix:/tmp/x", "http://", "http://[x"]
)
def test_a_redirect_to_what_is_no_http_is_not_followed(lab, upstream, port, to):
    where = lab.serve(f"{port}, follow_redirects=True")
    came = ask(where, upstream, request(), moved("302 Found", to))[1]
    assert came.status in (302, 502)
    assert b"root:" not in came.body
    assert "Traceback" not in lab.log()


@pytest.mark.parametrize(("value", "count"), [("1", 1), ("3", 3), ("True", 21)])
def test_how_many_redirects_are_followed(lab, upstream, port, value, count):
    where = lab.serve(f"{port}, follow_redirects={value}")
    replies = [moved("302 Found", f"/{number + 1}") for number in range(count + 1)]
    got, came = redirected(where, upstream, request("/0"), *replies)
    assert [message.path for message in got] == [f"/{number}" for number in range(count + 1)]
    # the last one is handed over, or told of
    assert came.status in (302, 502)


def test_credentials_stay_with_their_origin(lab, upstream, port):
    second = free_port()
    where = lab.serve(f"'http://127.0.0.1:{port}', follow_redirects=True, headers={{'X-Kept': '1'}}")
    sent = request(
        "/a",
        "Authorization: Bearer secret",
        "Cookie: secret=1",
        "Proxy-Authorization: Basic secret",
        "Accept: x",
    )
    with Upstream(second) as other, connect(where) as client:
        wire = accept(upstream, client.send(sent))
        first = read_request(wire)
        assert first.get("authorization") == ["Bearer secret"]
        wire.send(moved("302 Found", f"http://127.0.0.1:{second}/b"))
        wire = accept(other, client)
        got = read_request(wire)
        wire.send(OK)
        assert read_response(client).status == 200
    assert "secret" not in repr(got).lower()
    assert got.get("accept") == ["x"]
    assert got.get("host") == [f"127.0.0.1:{second}"]


def test_the_proxys_own_credentials_stay_with_their_origin(lab, upstream, port):
    second = free_port()
    where = lab.serve(f"'http://127.0.0.1:{port}', follow_redirects=True, auth='user:secret'")
    with Upstream(second) as other, connect(where) as client:
        wire = accept(upstream, client.send(request()))
        assert read_request(wire).get("authorization")
        wire.send(moved("302 Found", f"http://127.0.0.1:{second}/b"))
        wire = accept(other, client)
        assert read_request(wire).get("authorization") == []
        wire.send(OK)
        assert read_response(client).status == 200


# --- buffer --------------------------------------------------------------------------------------


def buffered(lab, port, code, method="POST"):
    """A program that reads the body itself and hands it, or another, to the proxy as ``buffer``."""
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port})
class Pieces:
    def __init__(self, *pieces):
        self.pieces = list(pieces)
    def read(self, size=-1):
        return self.pieces.pop(0) if self.pieces else b""
def app(environ, start_response):
    {code}
    return proxy.web(environ, start_response, buffer=buffer)
passenger.create_server(app).listen("unix:{where}")
""")
    return where


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("body = environ['wsgi.input'].read(); buffer = io.BytesIO(body)", b"hello"),
        (
            "environ['wsgi.input'].read(); buffer = io.BytesIO(b'a longer one than before')",
            b"a longer one than before",
        ),
        ("buffer = io.BytesIO(b'short')", b"short"),
        ("environ['wsgi.input'].read(); buffer = io.BytesIO(b'')", b""),
        ("environ['wsgi.input'].read(); buffer = Pieces(b'one', b'two', b'three')", b"onetwothree"),
        ("environ['wsgi.input'].read(); buffer = io.BytesIO(b'x' * 300000)", b"x" * 300000),
        ("buffer = io.BytesIO(b'skipped, sent'); buffer.seek(9)", b"sent"),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_buffer_is_sent_in_place_of_the_body(lab, upstream, port, code, expected, framing):
    where = buffered(lab, port, code)
    body = b"hello" if "Length" in framing else b"5\r\nhello\r\n0\r\n\r\n"
    with connect(where) as client:
        client.send(request("/x", framing, method="POST") + body)
        wire = accept(upstream, client)
        got = read_request(wire)
        assert got.text == expected
        assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1
        wire.send(OK)
        assert read_response(client).text == b"ok"


def test_buffer_gives_a_body_to_a_request_without(lab, upstream, port):
    got, came = ask(buffered(lab, port, "buffer = io.BytesIO(b'given')"), upstream, request(method="PUT"))
    assert (got.text, came.status) == (b"given", 200)


def test_buffer_leaves_the_clients_connection_in_order(lab, upstream, port):
    """The body that was replaced is not taken for the next request."""
    where = buffered(lab, port, "buffer = io.BytesIO(b'other')")
    hidden = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(where) as client:
        client.send(request("/x", method="POST", body=hidden))
        wire = accept(upstream, client)
        assert read_request(wire).text == b"other"
        wire.send(OK)
        assert read_response(client).status == 200
        rest = client.send(request("/last", "Connection: close"))
        try:
            if kept(wire, upstream, client):
                assert read_request(wire).path == "/last"
            elif upstream.connects_within(10):
                assert read_request(upstream.wires[-1]).path == "/last"
        except (AssertionError, ConnectionError, BrokenPipeError) as error:
            assert "smuggled" not in str(error)
        assert b"smuggled" not in rest.data


# --- what cannot be used -------------------------------------------------------------------------

BAD_NUMBERS = [-1, -0.5, "x", "5", True, float("nan"), float("-inf"), [1]]
BAD_SWITCHES = ["no", "yes", None, 2, []]
SWITCHES = [
    "ws", "secure", "to_proxy", "prepend_path", "ignore_path", "change_origin", "preserve_header_key_case",
    "auto_rewrite", "self_handle_response",
]  # fmt: skip
BAD = [
    *((name, value) for name in SWITCHES for value in BAD_SWITCHES),
    *((name, value) for name in ("proxy_timeout", "timeout", "ws_timeout", "fail_timeout") for value in BAD_NUMBERS),
    *(("forward", value) for value in (0, 70000, -1, True, "", "ftp://x", "http://", "http://x:y", "unix:", 1.5)),
    *(("forward", value) for value in ("http://a b/", "http://x:0", "http://x:65536", "http://x/\r\nA: b", "http://x/a b")),
    *((name, value) for name in ("xfwd", "forwarded") for value in ("prepend", "", 2, b"append")),
    *(("trusted", value) for value in ("nonsense", ["300.1.1.1"], ["10.0.0.0/33"], 5, [5], ["a\r\nb"])),
    *(("via", value) for value in ("a b", "a\r\nb", "", "a,b", 5, b"x")),
    *(("local_address", value) for value in ("300.1.1.1", "", 5, "a b", True)),
    *(("auth", value) for value in (5, b"a:b", ("a", "b"), True)),
    *(("host_rewrite", value) for value in ("a b", "a\r\nb", "", "a/b", "http://a", "a:x", "a:70000", "a@b", 5, True)),
    *(("protocol_rewrite", value) for value in ("ftp", "", "https\r\n", "javascript", 5, True)),
    *((name, value) for name in ("cookie_domain_rewrite", "cookie_path_rewrite") for value in
      (True, 5, ["a"], "a;b", "a\r\nb", "a\0b", {"a": "x;y"}, {"a": "x\ny"}, {"a": 5}, {5: "a"}, "a\u20acb")),
    *(("headers", value) for value in
      ("x", 5, {"a b": "c"}, {"": "c"}, {"X": "a\r\nb"}, {"X": "a\0b"}, {"X": "a\nb"}, {"X:": "a"}, {"X\r\nY": "a"},
       {"X": None}, {5: "a"}, {"X": "\u20ac"}, {"\u00e9": "a"})),
    *(("follow_redirects", value) for value in (-1, "yes", 1.5, [])),
    *(("buffer", value) for value in ("text", b"bytes", 5, ["a"], io.StringIO("text"))),
    *(("agent", value) for value in (5, True, "x", object(), http_proxy)),
    *(("ws_stop", value) for value in ("later", "", None, True)),
    *(("balance", value) for value in ("random", "", None, True, "Round_Robin")),
    *(("sticky", value) for value in ("ip", True, "", 5, "Cookie")),
    *(("sticky_name", value) for value in ("a b", "a=b", "", 5, "a;b", "a\r\nb", None, "a,b", "\u00e9")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), BAD, ids=lambda value: repr(value).partition(" at 0x")[0].partition(" from ")[0][:30]
)
def test_what_cannot_be_used(name, value):
    with pytest.raises(ValueError, match=name):
        http_proxy.create_server(9000, **{name: value})


@pytest.mark.parametrize("name", ["nonsense", "proxyTimeout", "changeOrigin", "hostRewrite", "ssl", "Xfwd"])
def test_unknown_options(name):
    with pytest.raises(TypeError, match=name):
        http_proxy.create_server(9000, **{name: True})


GOOD = {
    "forward": [None, 9001, "http://x:81/y", "unix:/x/y"],
    "xfwd": [True, False, "append", "replace"],
    "forwarded": [True, False, "append", "replace"],
    "trusted": [None, "*", [], ["10.0.0.0/8", "::1"], ("127.0.0.1",), {"192.0.2.1"}],
    "via": [False, True, "edge", "edge.example:8080"],
    "local_address": [None, "127.0.0.1", "::1", "0.0.0.0"],
    "auth": [None, "a:b", "a:"],
    "host_rewrite": [None, "a.example", "a.example:81", "127.0.0.1", "[::1]:81"],
    "protocol_rewrite": [None, "http", "https"],
    "cookie_domain_rewrite": [False, "", "a.example", {}, {"a.example": "", "*": "b.example"}],
    "cookie_path_rewrite": [False, "", "/", {"/a": "/b", "*": ""}],
    "headers": [None, {}, {"X": "a"}, {"X": ""}],
    "proxy_timeout": [None, 1, 0.5],
    "timeout": [None, 1, 0.5],
    "ws_timeout": [None, 1, 0.5],
    "follow_redirects": [False, True, 0, 3],
    "buffer": [None, io.BytesIO(b"")],
    "agent": [None, False],
    "ws_stop": ["close", "wait"],
    "balance": ["round_robin", "least_connections"],
    "fail_timeout": [0.5, 10],
    "sticky": [None, "cookie"],
    "sticky_name": ["there", "__Host-there"],
    **{name: [True, False] for name in SWITCHES},
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_can_be_used(name):
    for value in GOOD[name]:
        assert callable(http_proxy.create_server(9000, **{name: value}))


def test_an_agent_can_be_used():
    assert callable(http_proxy.create_server(9000, agent=http_proxy.Agent()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_connections", value) for value in (0, -1, 1.5, "5", True)),
        *(("max_idle", value) for value in (-1, 1.5, "5", None)),
        *(
            (name, value)
            for name in ("idle_timeout", "connect_timeout")
            for value in (-1, "5", float("nan"), True)
        ),
        *(("ssl_context", value) for value in ("x", True, 5)),
    ],
)
def test_what_an_agent_cannot_use(name, value):
    with pytest.raises(ValueError, match=name):
        http_proxy.Agent(**{name: value})


def test_what_an_agent_can_use():
    http_proxy.Agent(
        max_connections=1,
        max_idle=0,
        idle_timeout=0.5,
        connect_timeout=1,
        ssl_context=ssl.create_default_context(),
    )
    http_proxy.Agent(max_connections=None)
    with pytest.raises(TypeError):
        http_proxy.Agent(nonsense=1)


@pytest.mark.parametrize(
    ("options", "error"), [("nonsense=1", "TypeError"), ("proxy_timeout=-1", "ValueError")]
)
def test_what_cannot_be_used_for_one_request(lab, upstream, port, options, error):
    where = lab.serve(f"{port}, {options}", "routed")
    assert refuse(where).status == 500
    name = options.partition("=")[0]
    assert name in lab.wait_log(name)
    assert not upstream.connects_within(0.1)


def test_options_for_one_request_are_gone_with_the_next(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port}, headers={{"X-Always": "1"}})
def app(environ, start_response):
    more = {{"headers": {{"X-Once": "1"}}, "change_origin": True}} if environ["PATH_INFO"] == "/once" else {{}}
    return proxy.web(environ, start_response, **more)
passenger.create_server(app).listen("unix:{where}")
""")
    once, _ = ask(where, upstream, request("/once", "Connection: close"))
    upstream.wires[-1].close()
    then, _ = ask(where, upstream, request("/then"))
    assert (once.get("x-once"), once.get("host")) == (["1"], [f"localhost:{port}"])
    assert (then.get("x-once"), then.get("x-always"), then.get("host")) == ([], ["1"], ["example.org"])


def test_a_target_for_one_request(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({free_port()})
def app(environ, start_response):
    return proxy.web(environ, start_response, target="http://127.0.0.1:{port}/base")
passenger.create_server(app).listen("unix:{where}")
""")
    got, came = ask(where, upstream)
    assert (got.path, came.status) == ("/base/x", 200)


def test_the_proxy_is_a_wsgi_callable(lab, upstream, port):
    where = lab.place()
    lab.run(f"""
proxy = http_proxy.create_server({port}, headers={{"X-Through": "call"}})
passenger.create_server(lambda environ, start_response: proxy(environ, start_response)).listen("unix:{where}")
""")
    got, came = ask(where, upstream)
    assert (got.get("x-through"), came.text) == (["call"], b"ok")


def test_many_proxies_of_one_program(lab):
    """Each with a target and options of its own."""
    ports = [free_port() for _ in range(3)]
    places = [
        lab.serve(f"{port}, headers={{'X-Number': '{port}'}}, change_origin={port == ports[1]}")
        for port in ports
    ]
    for port, where in zip(ports, places, strict=True):
        with Upstream(port) as upstream:
            got, _ = ask(where, upstream)
            assert got.get("x-number") == [str(port)]
            assert got.get("host") == [f"localhost:{port}" if port == ports[1] else "example.org"]


def test_nothing_was_logged_as_a_bug(gunicorn, lab, upstream, port):
    """A request of fetch, as the other tests make it, and a log without tracebacks of the proxy's own."""
    where = lab.serve(f"{port}")
    thread = threading.Thread(target=lambda: upstream.accept().send(OK))
    thread.start()
    assert fetch(where) == (200, "ok")
    thread.join()
    assert "gunicorn_passenger/proxy" not in lab.log()
