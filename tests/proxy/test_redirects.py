"""The option follow_redirects."""

import pytest
from free_ports import free_port
from proxy_laboratory import (
    MODES,
    OK,
    Origin,
    accept,
    answer,
    ask,
    get,
    kept,
    read_request,
    read_response,
    request,
)
from upstream_sockets import Upstream, connect

# --- follow_redirects --------------------------------------------------------------------------------


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
def test_what_is_not_a_redirect_is_not_followed(lab, upstream, port, status):
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
def test_a_redirect_to_another_scheme_is_not_followed(lab, upstream, port, to):
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


# --- 11: redirects -----------------------------------------------------------------------------------


class Redirecting(Origin):
    """``/here`` leads to the target itself, ``/there`` to ``away``."""

    away = ""

    def reply(self, message):
        if message.path in ("/here", "/there"):
            return answer(
                "302 Found", f"Location: {'/end' if message.path == '/here' else self.away}", body=b""
            )
        return super().reply(message)


FIELDS = ["X-Secret: client", "Cookie: passenger_target=zz; s=1"]
GIVEN = "follow_redirects=True, headers={'X-Api-Key': 'k3y'}, auth='u:p', sticky='cookie'"
SIGN = """
def sign(upstream_request, request, options):
    seen.append(upstream_request.path)
    upstream_request.headers.remove("X-Secret")
    upstream_request.headers["X-Signed"] = "yes"
proxy.on("proxy_req", sign)
"""


@pytest.mark.parametrize("path", ["/here", "/there"])
def test_handlers_change_each_request_of_a_redirect(lab, origins, port, path):
    second = free_port()
    with Redirecting(port) as main:
        main.away = f"http://127.0.0.1:{second}/end"
        away = origins(second, b"away")
        where = lab.serve(f"[{port}], {GIVEN}")
        lab.run("\n" + SIGN)
        assert get(where, request(path, *FIELDS)).text == (b"ok" if path == "/here" else b"away")
    sent = [message for _, message in main.requests + away.requests]
    assert [message.path for message in sent] == [path, "/end"]
    assert lab.seen() == [path, "/end"]
    for message in sent:
        assert not message.get("x-secret"), message
        assert message.get("x-signed") == ["yes"], message
        assert "passenger_target" not in str(message.get("cookie")), message


def test_what_the_options_add_stays_with_its_origin(lab, origins, port):
    second = free_port()
    with Redirecting(port) as main:
        main.away = f"http://127.0.0.1:{second}/end"
        away = origins(second, b"away")
        where = lab.serve(f"[{port}], {GIVEN}")
        assert get(where, request("/there", *FIELDS)).text == b"away"
        assert get(where, request("/here", *FIELDS)).text == b"ok"
    for _, message in main.requests:
        assert message.get("x-api-key") == ["k3y"], message
        assert len(message.get("authorization")) == 1, message
        assert message.get("cookie") == ["s=1"], message
    ((_, message),) = away.requests
    assert not message.get("x-api-key"), message
    assert not message.get("authorization"), message
    assert not message.get("cookie"), message


@MODES
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_target_that_names_the_clients_host_means_itself(lab, upstream, port, origins, mode, scheme):
    """Many frameworks build the address from Host: the client must not choose where the proxy connects to."""
    other = free_port()
    internal = origins(other, b"internal")
    where = lab.serve(f"{port}, follow_redirects=True", mode)
    sent = request("/login", f"Host: 127.0.0.1:{other}")
    got, came = redirected(
        where, upstream, sent, moved("302 Found", f"{scheme}://127.0.0.1:{other}/home"), OK
    )
    assert [message.path for message in got] == ["/login", "/home"]
    assert (came.status, came.text) == (200, b"ok")
    assert internal.requests == []
