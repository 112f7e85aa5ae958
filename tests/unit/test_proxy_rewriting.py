"""What the proxy rewrites in paths, redirects and cookies, and what it refuses as an option: functions alone."""

import re

import pytest

from gunicorn_passenger import http_proxy
from gunicorn_passenger.proxy import rewrite
from gunicorn_passenger.proxy.events import HandlerFailed
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import ForwardedInfo, RequestHeaders, upstream_headers
from gunicorn_passenger.proxy.request_target import rewritten_path
from gunicorn_passenger.proxy.target import parse_target

TARGET = parse_target("http://target.test:9000/base")
ORIGIN = ForwardedInfo("127.0.0.1", "http", "http", "public.test", True, "/api")


def options(**changes):
    return Options().merged(changes, "here")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/login", "/api/login"),
        ("/login?next=/x#y", "/api/login?next=/x#y"),
        ("/", "/api/"),
        ("/base/login", "/api/login"),
        ("/base", "/api"),
        ("/based", "/api/based"),
        ("/api/login", "/api/login"),
        ("/api", "/api"),
        ("/apiary", "/api/apiary"),
        ("login", "login"),
        ("?page=2", "?page=2"),
        ("", ""),
        ("http://public.test/login", "http://public.test/api/login"),
        ("http://public.test/api/login", "http://public.test/api/login"),
        ("https://other.test/login", "https://other.test/login"),
        ("//other.test/login", "//other.test/login"),
        ("http://target.test:9000/base/login", "http://target.test:9000/base/login"),
        ("http://[bad/", "http://[bad/"),
    ],
)
def test_a_redirect_gets_the_prefix_that_was_removed(location, expected):
    assert rewrite.location(location, options(), TARGET, ORIGIN) == expected


def test_a_redirect_to_the_target_gets_host_and_prefix():
    changed = options(auto_rewrite=True, protocol_rewrite="https")
    assert (
        rewrite.location("http://target.test:9000/base/x", changed, TARGET, ORIGIN)
        == "https://public.test/api/x"
    )
    changed = options(host_rewrite="front.test")
    assert rewrite.location("http://target.test:9000/x", changed, TARGET, ORIGIN) == "http://front.test/api/x"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("; Path=/", "; Path=/api"),
        ("; path=/x; HttpOnly", "; path=/api/x; HttpOnly"),
        ("; Path=/api", "; Path=/api"),
        ("; Path=/api/x", "; Path=/api/x"),
        ("; Path=x", "; Path=x"),
        ("", ""),
    ],
)
def test_a_cookie_gets_the_prefix_that_was_removed(path, expected):
    assert rewrite.cookie(f"a=b{path}", options(), "/api") == f"a=b{expected}"
    assert rewrite.cookie(f"a=b{path}", options()) == f"a=b{path}"


def test_a_rule_for_the_path_of_cookies_comes_before_the_prefix():
    changed = options(cookie_path_rewrite={"/": "/other", "/gone": ""})
    assert rewrite.cookie("a=b; Path=/", changed, "/api") == "a=b; Path=/other"
    assert rewrite.cookie("a=b; Path=/gone", changed, "/api") == "a=b"
    assert rewrite.cookie("a=b; Path=/x", changed, "/api") == "a=b; Path=/api/x"


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"cookie_secure": True}, "a=b; Path=/", "a=b; Path=/; Secure"),
        ({"cookie_secure": True}, "a=b; secure; Path=/", "a=b; Path=/; Secure"),
        ({"cookie_secure": False}, "a=b; Secure; Path=/", "a=b; Path=/"),
        ({"cookie_secure": False}, "a=secure; Secured=1", "a=secure; Secured=1"),
        ({"cookie_samesite": "Lax"}, "a=b", "a=b; SameSite=Lax"),
        ({"cookie_samesite": "None", "cookie_secure": True}, "a=b; samesite = strict;Secure", "a=b; SameSite=None; Secure"),
        ({}, "a=b; SameSite=Strict; Secure", "a=b; SameSite=Strict; Secure"),
    ],
)  # fmt: skip
def test_the_flags_of_cookies(changes, given, expected):
    assert rewrite.cookie(given, options(**changes)) == expected
    assert options(**changes).plain_response is not bool(changes)


@pytest.mark.parametrize(
    ("rules", "path", "expected"),
    [
        ({"^/old/": "/new/"}, "/old/x?y=1", "/new/x?y=1"),
        ({"^/old/": "/new/"}, "/other/old/?y=1", "/other/old/?y=1"),
        ({r"^/u/(\d+)$": r"/user?id=\1"}, "/u/7", "/user?id=7"),
        ({r"^/u/(\d+)$": r"/user?id=\1"}, "/u/7?x=/u/8", "/user?id=7&x=/u/8"),
        ({"^/a": "/b", "^/b": "/c"}, "/a", "/b"),
        ({re.compile("^/A", re.I): "/b"}, "/a", "/b"),
        (lambda path, request: path.upper(), "/x?y", "/X?y"),
        (lambda path, request: path + request, "/x", "/x-request"),
    ],
)
def test_paths_are_rewritten(rules, path, expected):
    assert rewritten_path(options(rewrite=rules).rewrite, path, lambda: "-request") == expected


@pytest.mark.parametrize("result", ["", "x", "//\n", "/a b", "/\xe4", None, b"/x", 5])
def test_a_rewritten_path_that_cannot_be_sent(result):
    with pytest.raises(HandlerFailed, match="rewrite="):
        rewritten_path(lambda path, request: result, "/x", lambda: None)


def test_a_rewriting_function_that_raises():
    with pytest.raises(HandlerFailed, match=r"the function of rewrite= failed"):
        rewritten_path(lambda path, request: 1 / 0, "/x", lambda: None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rewrite", value) for value in ("^/a", {"(": "/"}, {"/a": 5}, {"/a": r"\1"}, ["a"], 5, str)),
        *(("max_body", value) for value in (-1, 1.5, "5", True)),
        *(("retry_statuses", value) for value in (502, "502", [200], ["502"], [None])),
        *(("health", value) for value in ("health", "", "/a b", "/\n", 5, True)),
        *(("health_interval", value) for value in (0, -1, None, "5")),
        *(("servername", value) for value in ("", "a b", "a\n", 5)),
        *(("cookie_secure", value) for value in ("yes", 1)),
        *(("cookie_samesite", value) for value in ("lax", True, "")),
    ],
)
def test_what_cannot_be_used(name, value):
    with pytest.raises(ValueError, match=name):
        http_proxy.create_server(9000, **{name: value})


@pytest.mark.parametrize("value", [-1, 0, "5", True])
def test_an_age_that_an_agent_cannot_use(value):
    with pytest.raises(ValueError, match="max_age"):
        http_proxy.Agent(max_age=value)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("http://public.test", "http://target.test:9000"),
        ("https://Public.test", "http://target.test:9000"),
        ("https://evil.test", "https://evil.test"),
        ("https://public.test.evil.test", "https://public.test.evil.test"),
        ("null", "null"),
    ],
)
def test_the_origin_of_a_websocket_follows_the_host(sent, expected):
    fields = [("Host", "public.test"), ("Origin", sent), ("Upgrade", "websocket"), ("Connection", "Upgrade")]
    websocket = RequestHeaders(fields, False)
    changed = dict(upstream_headers(websocket, options(change_origin=True), TARGET, ORIGIN))
    assert (changed["host"], changed["origin"]) == ("target.test:9000", expected)
    # not without change_origin, and not without an upgrade, such as for CORS
    assert dict(upstream_headers(websocket, options(), TARGET, ORIGIN))["origin"] == sent
    plain = RequestHeaders(fields[:2], False)
    assert dict(upstream_headers(plain, options(change_origin=True), TARGET, ORIGIN))["origin"] == sent


@pytest.mark.parametrize(
    ("sent", "trusted", "prefix", "expected"),
    [
        ([], False, "/api", "/api"),
        (["/front"], True, "/api", "/front/api"),
        (["/front"], False, "/api", "/api"),
        (["/front/"], True, "", "/front"),
        (["/front"], False, "", None),
        ([], True, "/a b\xe4", "/a%20b%E4"),
    ],
)
def test_the_prefix_is_forwarded(sent, trusted, prefix, expected):
    headers = RequestHeaders([("Host", "a"), *(("X-Forwarded-Prefix", value) for value in sent)], False)
    origin = ForwardedInfo("127.0.0.1", "http", "http", "a", trusted, prefix)
    found = upstream_headers(headers, options(xfwd=True), TARGET, origin)
    assert dict(found).get("x-forwarded-prefix") == expected
