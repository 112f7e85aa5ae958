"""The header lines of ordinary requests: the same bytes as those that are made header by header."""

from __future__ import annotations

import io
import string
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gunicorn_passenger.proxy import plan, wire
from gunicorn_passenger.proxy.agent import Agent
from gunicorn_passenger.proxy.options import NAMES as OPTIONS
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.plain_headers import forwards_plainly, plain_lines
from gunicorn_passenger.proxy.plan import ForwardPlan
from gunicorn_passenger.proxy.request_headers import RequestHeaders
from gunicorn_passenger.proxy.target import parse_target

#: names that are forwarded as they are, and all of those that are not
PLAIN = ["Accept", "user-agent", "COOKIE", "X-Forwarded-For", "If-None-Match", "Sec-WebSocket-Key", "X~!"]
SPECIAL = [
    "Connection",
    "Content-Length",
    "Expect",
    "HTTP2-Settings",
    "Host",
    "Keep-Alive",
    "Proxy",
    "Proxy-Authorization",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "X_Real_IP",
]
NAMES = (
    st.sampled_from(PLAIN)
    | st.sampled_from(SPECIAL)
    | st.text("!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters, min_size=1, max_size=12)
)
VALUES = (
    st.sampled_from(["keep-alive", "close", "Keep-Alive, close", "upgrade", "x-a", "0", "example.org", "a:b", " a", "a "])
    | st.text(["\t", *map(chr, range(0x20, 0x7F)), *map(chr, range(0x80, 0x100))], max_size=12)
)  # fmt: skip
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=6)
HOSTS = st.sampled_from([("Host", "example.org"), ("hOST", "[::1]:80"), ("host", "a b"), ("Host", "")])


def head_of(headers: list[tuple[str, str]], separator: str = ": ") -> bytes:
    lines = "".join(f"{name}{separator}{value}\r\n" for name, value in headers)
    return f"GET /x?y HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


def host_in(headers: list[tuple[str, str]]) -> str | None:
    """What the environ has of it."""
    found = [value.strip(" \t") for name, value in headers if name.lower() == "host"]
    return ",".join(found) if found else None


@settings(deadline=None, derandomize=True, max_examples=400)
@given(HEADERS, HOSTS, HEADERS, st.booleans())
@example([], ("Host", "h"), [("Connection", "keep-alive")], False)
@example([("A", "")], ("Host", "h"), [], True)
@example([("Connection", "close")], ("Host", "h"), [("TE", "close")], True)
def test_the_lines_are_those_that_are_made_header_by_header(before, host, behind, keep_case):
    headers = [*before, host, *behind]
    lines = plain_lines(head_of(headers), host_in(headers), keep_case)
    if lines is None:
        return
    stripped = [(name, value.strip(" \t")) for name, value in headers]
    request = RequestHeaders(stripped, keep_case)
    assert request.valid
    assert not (request.upgrade or request.expect or request.te_trailers or request.measured)
    assert lines == wire.lines_of(request.lines) + b"\r\n"


@pytest.mark.parametrize("keep_case", [False, True])
@pytest.mark.parametrize("option", ["keep-alive", "Keep-Alive", "close", "Close", None])
def test_an_ordinary_request(option, keep_case):
    headers = [("Host", "example.org:8000"), *[(name, f"{name}: 1") for name in PLAIN]]
    sent = [*headers, ("Connection", option)] if option else headers
    made = plain_lines(head_of(sent), "example.org:8000", keep_case)
    expected = headers if keep_case else [(name.lower(), value) for name, value in headers]
    assert made == head_of(expected).partition(b"\r\n")[2]


@pytest.mark.parametrize("name", [name for name in SPECIAL if name != "Host"])
@pytest.mark.parametrize("write", [str, str.lower, str.upper])
def test_a_header_with_a_rule_of_its_own_is_not_ordinary(name, write):
    headers = [("Host", "example.org"), (write(name), "1"), ("Accept", "*/*")]
    for _ in range(2):
        assert plain_lines(head_of(headers), "example.org", False) is None


@pytest.mark.parametrize("host", [None, "", "a,b", "a b", "a/b", "user@host"])
def test_without_a_valid_host_it_is_not_ordinary(host):
    assert plain_lines(head_of([("Host", "example.org")]), host, False) is None


@pytest.mark.parametrize(
    "line", ["A:b", "A:  b", "A: b ", "A: b\t", "A:\tb", "A: ", "A:", "A : b", "A: \x00", ": b", "A"]
)
def test_an_unusual_line_is_not_ordinary(line):
    head = head_of([("Host", "h")])[:-2] + line.encode() + b"\r\n\r\n"
    assert plain_lines(head, "h", False) is None


def test_names_are_not_kept_without_end():
    for number in range(3000):
        headers = [("Host", "h"), (f"X-{number}", "1"), ("x" * 100 + str(number), "2")]
        assert plain_lines(head_of(headers), "h", True) == head_of(headers).partition(b"\r\n")[2]
    from gunicorn_passenger.proxy import plain_headers

    assert 0 < len(plain_headers._kept) <= 1000
    assert max(map(len, plain_headers._kept)) <= 64


@pytest.mark.parametrize(
    "changes",
    [
        {"change_origin": True},
        {"xfwd": True},
        {"forwarded": True},
        {"via": "proxy"},
        {"headers": {"X-A": "1"}},
        {"sticky": "cookie"},
        {"agent": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_that_change_headers(changes):
    assert forwards_plainly(Options())
    assert not forwards_plainly(Options(**changes))


def test_every_option_is_known_to_the_fast_path():
    """A new option needs a decision here: may a cached plan forward requests with it?"""
    of_request = {"change_origin", "xfwd", "forwarded", "via", "headers", "auth", "sticky", "agent"}
    of_response = {"host_rewrite", "auto_rewrite", "protocol_rewrite", "via", "sticky", "follow_redirects"}
    of_response |= {"cookie_domain_rewrite", "cookie_path_rewrite", "cookie_secure", "cookie_samesite"}
    of_response |= {"self_handle_response"}
    of_plan = {"forward", "to_proxy", "rewrite", "buffer", "prepend_path", "ignore_path"}
    # the same for every request, or only for upgrades, bodies, new connections or a second attempt
    of_none = {"ws", "ws_timeout", "ws_stop", "trusted", "secure", "servername", "local_address"}
    of_none |= {"preserve_header_key_case", "proxy_timeout", "timeout", "max_body", "balance", "fail_timeout"}
    of_none |= {"retry_statuses", "health", "health_interval", "sticky_name"}
    assert of_request | of_response | of_plan | of_none == set(OPTIONS)
    assert not of_none & (of_request | of_response | of_plan)
    values = {"via": "proxy", "headers": {"X-A": "1"}, "auth": "a:b", "sticky": "cookie", "agent": False}
    values |= {"host_rewrite": "a", "protocol_rewrite": "https", "cookie_domain_rewrite": "a"}
    values |= {"cookie_path_rewrite": "/", "cookie_samesite": "Lax"}
    for name in of_request:
        assert not forwards_plainly(Options(**{name: values.get(name, True)})), name
    for name in of_response:
        assert not Options(**{name: values.get(name, True)}).copies_responses, name
    values |= {
        "forward": "http://localhost:9",
        "rewrite": {"/a": "/b"},
        "buffer": io.BytesIO(b"a"),
        "prepend_path": False,
    }
    for name in of_plan - {"prepend_path"}:  # which matters for a target with a path only
        assert not repeatable(Options(**{name: values.get(name, True)}), "http://localhost:9"), name
    assert repeatable(Options(), "http://localhost:9")
    assert not repeatable(Options(), "http://localhost:9/path")


def repeatable(options, target):
    """Whether one plan serves all ordinary requests with these options to a target."""
    headers = SimpleNamespace(valid=True, upgrade=False, expect=False)
    request = SimpleNamespace(headers=headers, forwarded_info=SimpleNamespace(prefix=""))
    route = SimpleNamespace(always_targets=lambda target: True)
    return plan._is_repeatable(SimpleNamespace(options=options, target=parse_target(target)), request, route)


def test_a_plan_does_not_hold_when_connections_are_kept_no_longer():
    """From then on each target is told with ``Connection: close``, as a draining worker does."""
    options = Options(agent=Agent())
    plan = ForwardPlan(
        options, parse_target(9), options.agent.pool(parse_target(9), options.dial), None, None, b""
    )
    assert not plan.is_outdated()
    options.agent.max_idle = 0
    assert plan.is_outdated()
