"""Location and Set-Cookie in responses, rewritten to the names that the client knows."""

import pytest
from proxy_laboratory import MODES, answer, ask, request

# --- Location ----------------------------------------------------------------------------------------


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


# --- Set-Cookie --------------------------------------------------------------------------------------


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
