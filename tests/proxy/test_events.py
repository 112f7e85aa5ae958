"""The proxy's events: when each is called, with what, and what a handler may change."""

import pytest
from proxy_laboratory import (
    MODES,
    NOTE_ALL,
    OK,
    WAYS,
    Message,
    Origin,
    accept,
    answer,
    ask,
    ask_again,
    handle,
    listening_place,
    on_answer,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import connect

from gunicorn_passenger import http_proxy

EVENTS = ["start", "proxy_req", "proxy_req_ws", "proxy_res", "end", "open", "close", "error", "econnreset"]


# --- adding handlers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
def test_a_handler_is_added_by_a_call_or_as_a_decorator(event):
    proxy = http_proxy.create_server(9000)

    def called(*arguments):
        pass

    proxy.on(event, called)

    @proxy.on(event)
    def decorated(*arguments):
        pass

    assert decorated is not None
    assert callable(decorated)
    assert decorated.__name__ == "decorated"


@pytest.mark.parametrize("event", ["proxyReq", "nonsense", "", None, 5])
def test_an_event_that_there_is_not(event):
    with pytest.raises((ValueError, TypeError)):
        http_proxy.create_server(9000).on(event, print)


@pytest.mark.parametrize("handler", [5, "print"])
def test_a_handler_that_cannot_be_called(handler):
    with pytest.raises((ValueError, TypeError)):
        http_proxy.create_server(9000).on("start", handler)


# --- the order of events, and what they are given ----------------------------------------------------


@MODES
def test_the_events_of_a_request(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    lab.run(NOTE_ALL)
    ask(where, upstream, request(method="POST", body=b"hello"))
    assert lab.wait_seen(4) == ["start", "proxy_req", "proxy_res", "end"]
    ask_again(where, upstream)
    assert lab.wait_seen(8) == ["start", "proxy_req", "proxy_res", "end"] * 2


@MODES
def test_what_the_handlers_are_given(lab, upstream, port, mode):
    where = lab.serve(f"'http://127.0.0.1:{port}/base', xfwd=True, headers={{'X-Set': 'ours'}}", mode)
    lab.run("""
@proxy.on("start")
def start(request, target):
    seen.append(("start", isinstance(request, Request), request.method, request.path, request.args["q"],
                 request.headers["X-Thing"], str(target)))

@proxy.on("proxy_req")
def proxy_req(upstream_request, request, options):
    headers = upstream_request.headers
    seen.append(("proxy_req", upstream_request.method, upstream_request.path, headers["X-Set"], headers["x-thing"],
                 headers["X-Forwarded-For"], headers["Host"], type(headers).__name__, request.path))

@proxy.on("proxy_res")
def proxy_res(upstream_response, request):
    headers = upstream_response.headers
    seen.append(("proxy_res", upstream_response.status_code, upstream_response.reason, headers["x-answer"],
                 headers.getlist("Set-Cookie"), type(headers).__name__, request.path))

@proxy.on("end")
def end(request, upstream_response):
    seen.append(("end", request.path, upstream_response.status_code))
""")
    reply = answer("299 Odd One", "X-Answer: 1", "Set-Cookie: a=1", "Set-Cookie: b=2")
    ask(where, upstream, request("/x?q=1", "X-Thing: 2", method="PUT", body=b"hello"), reply)
    start, sent, came, end = lab.wait_seen(4)
    assert start[:6] == ("start", True, "PUT", "/x", "1", "2")
    assert f"127.0.0.1:{port}" in start[6]
    assert sent == (
        "proxy_req", "PUT", "/base/x?q=1", "ours", "2", "127.0.0.1", "example.org", "Headers", "/x",
    )  # fmt: skip
    assert came == ("proxy_res", 299, "Odd One", "1", ["a=1", "b=2"], "Headers", "/x")
    assert end == ("end", "/x", 299)


def test_nothing_is_sent_before_start_and_proxy_req_have_returned(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run(NOTE_ALL)
    lab.run("""
gate = gevent.event.Event()
proxy.on("proxy_req", lambda *arguments: gate.wait())
""")
    with connect(where) as client:
        client.send(request())
        lab.wait_seen(2)
        assert lab.seen() == ["start", "proxy_req"]
        # at most connected
        if upstream.connects_within(0.2):
            upstream.wires[-1].sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                upstream.wires[-1].more()
            upstream.wires[-1].sock.settimeout(30)
        lab.run("gate.set()")
        wire = upstream.wires[-1] if upstream.wires else accept(upstream, client)
        assert read_request(wire).path == "/x"
        wire.send(OK)
        assert read_response(client).status == 200


def test_the_handlers_of_a_request_run_in_its_own_greenlet(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("""
for name in ("start", "proxy_req", "proxy_res", "end"):
    proxy.on(name, lambda *arguments: seen.append(id(gevent.getcurrent())))
""")
    ask(where, upstream)
    assert len(set(lab.wait_seen(4))) == 1


def test_several_handlers_are_called_in_the_order_in_which_they_were_added(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("""
for event in ("proxy_res", "proxy_req", "end", "start"):
    for number in range(3):
        proxy.on(event, lambda *arguments, event=event, number=number: seen.append((event, number)))
""")
    ask(where, upstream)
    expected = [(event, n) for event in ("start", "proxy_req", "proxy_res", "end") for n in range(3)]
    assert lab.wait_seen(12) == expected


def test_a_later_handler_sees_what_an_earlier_one_changed(lab, upstream, port):
    where = lab.serve(f"{port}")
    for _ in range(2):
        handle(
            lab,
            "proxy_req",
            "upstream_request.headers['X-N'] = upstream_request.headers.get('X-N', '') + 'x'",
        )
        on_answer(lab, "upstream_response.status_code += 1")
    got, came = ask(where, upstream)
    assert got.get("x-n") == ["xx"]
    assert came.status == 202


# --- proxy_req ---------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    ("body", "start"),
    [
        ("upstream_request.method = 'OPTIONS'", "OPTIONS /x?q HTTP/1.1"),
        ("upstream_request.path = '/other?z=%20'", "GET /other?z=%20 HTTP/1.1"),
        ("upstream_request.path += '&more=1'", "GET /x?q&more=1 HTTP/1.1"),
        ("upstream_request.method, upstream_request.path = 'DELETE', '/'", "DELETE / HTTP/1.1"),
    ],
)
def test_proxy_req_changes_the_request_line(lab, upstream, port, mode, body, start):
    where = lab.serve(f"{port}", mode)
    handle(lab, "proxy_req", body)
    got, came = ask(where, upstream, request("/x?q"))
    assert got.start == start
    assert came.status == 200


@MODES
def test_proxy_req_changes_the_fields(lab, upstream, port, mode):
    where = lab.serve(f"{port}", mode)
    body = """
headers = upstream_request.headers
headers["X-Set"] = "set"
headers["x-there"] = "replaced"
headers.add("X-Two", "1")
headers.add("X-Two", "2")
del headers["X-Gone"]
headers["Host"] = "handler.example"
"""
    handle(lab, "proxy_req", body)
    sent = request("/x", "X-There: before", "X-Gone: gone", "X-Kept: kept", "X-There: again")
    got, _ = ask(where, upstream, sent)
    assert got.get("x-set") == ["set"]
    assert got.get("x-there") == ["replaced"]
    assert got.get("x-two") == ["1", "2"]
    assert got.get("x-gone") == []
    assert got.get("x-kept") == ["kept"]
    assert got.get("host") == ["handler.example"]


def test_proxy_req_may_clear_the_headers(lab, upstream, port):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", "upstream_request.headers.clear()\nupstream_request.headers['X-Only'] = '1'")
    got, came = ask(where, upstream, request("/x", "Cookie: a=b"))
    assert got.get("x-only") == ["1"]
    assert got.get("cookie") == []
    # a request of HTTP/1.1 has one, whatever is removed
    assert len(got.get("host")) == 1
    assert came.status == 200


@MODES
@pytest.mark.parametrize("framing", ["none", "length", "chunked"])
@pytest.mark.parametrize("new", [b"", b"new", b"longer than the one before" * 1000])
@pytest.mark.parametrize("made", ["{}", "bytearray({})", "__import__('io').BytesIO({})"])
def test_proxy_req_replaces_the_body(lab, upstream, port, mode, framing, new, made):
    where = lab.serve(f"{port}", mode)
    handle(lab, "proxy_req", f"upstream_request.body = {made.format(repr(new))}")
    sent = {
        "none": request(method="POST"),
        "length": request(method="POST", body=b"hello"),
        "chunked": request("/x", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n0\r\n\r\n",
    }[framing]
    with connect(where) as client:
        wire = accept(upstream, client.send(sent))
        got = read_request(wire)
        assert got.text == new
        assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1 or not new
        wire.send(OK)
        assert read_response(client).status == 200
        # nothing of the client's own body is taken for a request, or follows ours
        client.finish()
        client.rest()
    assert wire.data == b""


def test_without_a_change_the_body_is_the_clients(lab, upstream, port):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", "seen.append(upstream_request.body)")
    got, _ = ask(where, upstream, request(method="POST", body=b"hello"))
    assert got.text == b"hello"
    assert lab.seen() == [None]


@pytest.mark.parametrize(
    "body",
    [
        "upstream_request.headers['Content-Length'] = '99'",
        "upstream_request.headers['Transfer-Encoding'] = 'chunked'",
        "upstream_request.headers.add('Content-Length', '4')",
        "upstream_request.headers.add('Transfer-Encoding', 'identity')",
        "del upstream_request.headers['Content-Length']",
        "upstream_request.method = 'GET'",
    ],
)
def test_proxy_req_does_not_change_the_framing(lab, upstream, port, body):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", body)
    with connect(where) as client:
        client.send(request(method="POST", body=b"hello"))
        try:
            wire = accept(upstream, client)
        except AssertionError as error:
            # refused is as good
            assert "500" in str(error)
            return
        got = read_request(wire)
        assert got.text == b"hello"
        assert len(got.get("content-length")) + len(got.get("transfer-encoding")) == 1, got
        wire.send(OK)
        assert read_response(client).status == 200


@MODES
@pytest.mark.parametrize(
    "body",
    [
        r"upstream_request.path = '/x HTTP/1.1\r\nX-Evil: 1\r\n\r\n'",
        "upstream_request.path = '/a b'",
        r"upstream_request.path = '/a\nb'",
        "upstream_request.path = '/\u20ac'",
        "upstream_request.path = None",
        r"upstream_request.method = 'GET / HTTP/1.1\r\nX-Evil: 1\r\n\r\nGET'",
        "upstream_request.method = 'GE T'",
        "upstream_request.method = ''",
        r"upstream_request.headers._list.append(('X-A', 'a\r\nX-Evil: 1'))",
        r"upstream_request.headers._list.append(('X-A\r\nX-Evil', '1'))",
        "upstream_request.headers.add('X A', '1')",
        r"upstream_request.headers['X-A'] = 'a\r\nX-Evil: 1'",
        "upstream_request.body = 'text'",
        "upstream_request.body = 5",
    ],
)
def test_what_proxy_req_may_not_send(lab, upstream, port, mode, body):
    where = lab.serve(f"{port}", mode)
    handle(lab, "proxy_req", body)
    assert refuse(where).status == 500
    assert not (upstream.connects_within(0.1) and upstream.wires[-1].rest())
    lab.wait_log("[ERROR]")
    assert "X-Evil" not in repr(upstream.wires)


def test_proxy_req_cannot_send_two_hosts(lab, upstream, port):
    where = lab.serve(f"{port}")
    handle(lab, "proxy_req", "upstream_request.headers.add('Host', 'second.example')")
    with connect(where) as client:
        client.send(request())
        try:
            wire = accept(upstream, client)
        except AssertionError as error:
            assert "500" in str(error)
            return
        assert len(read_request(wire).get("host")) == 1
        wire.send(OK)
        assert read_response(client).status == 200


# --- end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reply"),
    [
        ("GET", b"HTTP/1.1 204 None\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Same\r\nETag: x\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        ("GET", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"),
    ],
)
def test_end_of_answers_of_all_kinds(lab, upstream, port, method, reply):
    where = lab.serve(f"{port}")
    lab.run(
        "\nproxy.on('end', lambda request, response: seen.append((request.method, response.status_code)))"
    )
    ask(where, upstream, request(method=method), reply)
    assert lab.wait_seen() == [(method, int(reply.split(b" ")[1]))]


def test_end_comes_after_the_whole_answer(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('end', lambda *a: seen.append('end'))")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        client.head()
        client.exactly(4)
        assert lab.seen() == []
        wire.send(b"half")
        client.exactly(4)
    assert lab.wait_seen() == ["end"]


def test_no_end_of_an_answer_that_broke_off(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('end', lambda *a: seen.append('end'))")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        client.head()
        client.exactly(4)
        wire.close()
        assert client.ended()
    upstream.wires.clear()
    # a request that came later has ended; the one before has not
    ask(where, upstream)
    assert lab.wait_seen() == ["end"]


def test_end_with_self_handle_response(lab, upstream, port):
    where = lab.serve(f"{port}, self_handle_response=True")
    on_answer(lab, "return Response('made')")
    lab.run("\nproxy.on('end', lambda request, response: seen.append(response.status_code))")
    ask(where, upstream)
    assert lab.wait_seen() == [200]


# --- upgrades ----------------------------------------------------------------------------------------


UPGRADE = request(
    "/chat?q",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: x",
    "Sec-WebSocket-Version: 13",
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\n"
)


@MODES
def test_the_events_of_an_upgrade(lab, upstream, port, mode):
    where = lab.serve(f"{port}, '127.0.0.1'", mode)
    lab.run("""
@proxy.on("start")
def start(request, target):
    seen.append(("start", request.path))

@proxy.on("proxy_req")
def proxy_req(*arguments):
    seen.append("proxy_req")

@proxy.on("proxy_req_ws")
def proxy_req_ws(upstream_request, request, options):
    seen.append(("proxy_req_ws", upstream_request.method, upstream_request.path, request.path))
    upstream_request.headers["X-Set"] = "set"
    upstream_request.path = "/other"

@proxy.on("open")
def opened(tunnel):
    seen.append(("open", str(tunnel.target), tunnel.request.path, tunnel.bytes_in, tunnel.bytes_out))

@proxy.on("close")
def closed(tunnel):
    seen.append(("close", tunnel.request.path, tunnel.bytes_in, tunnel.bytes_out))
""")
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        got = Message(wire.head())
        assert got.path == "/other"
        assert got.get("x-set") == ["set"]
        assert got.get("sec-websocket-key") == ["x"]
        wire.send(SWITCH)
        switched = Message(client.head())
        assert switched.status == 101
        assert switched.get("set-cookie") == ["a=1", "b=2"]
        start, sent, opened = lab.wait_seen(3)
        assert start == ("start", "/chat")
        assert sent == ("proxy_req_ws", "GET", "/chat?q", "/chat")
        assert opened[0] == "open"
        assert f"127.0.0.1:{port}" in opened[1]
        assert opened[2:] == ("/chat", 0, 0)
        client.send(b"12345")
        assert wire.exactly(5) == b"12345"
        wire.send(b"1234567")
        assert client.exactly(7) == b"1234567"
    assert wire.rest() == b""
    wire.close()
    # in: from the client; out: to the client
    assert lab.wait_seen(4)[3:] == [("close", "/chat", 5, 7)]


def test_a_tunnel_is_closed_by_the_program(lab, upstream, port):
    where = lab.serve(f"{port}")
    lab.run(
        "\ntunnels = []\nproxy.on('open', tunnels.append)\nproxy.on('close', lambda t: seen.append(t is tunnels[0]))"
    )
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(SWITCH)
        client.head()
        lab.run("gevent.sleep(0.01)")
        while not lab.run("len(tunnels)"):
            pass
        lab.run("tunnels[0].close()")
        client.rest()
        wire.rest()
    assert lab.wait_seen() == [True]


@MODES
def test_an_upgrade_that_is_refused_is_an_answer(lab, upstream, port, mode):
    where = lab.serve(f"{port}", mode)
    lab.run(NOTE_ALL)
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(answer("403 Forbidden", "X-Why: no", body=b"denied"))
        came = read_response(client)
    assert (came.status, came.get("x-why"), came.text) == (403, ["no"], b"denied")
    assert lab.seen()[:2] == ["start", "proxy_req_ws"]
    assert "open" not in lab.seen()
    assert "close" not in lab.seen()


@MODES
def test_an_upgrade_whose_target_fails(lab, port, mode):
    where = lab.serve(f"{port}", mode)
    lab.run("\nproxy.on('error', lambda e, request, target: seen.append((type(e).__name__, request.path)))")
    assert refuse(where, UPGRADE).status == 502
    assert lab.seen() == [("UpstreamRefused", "/chat")]


def test_the_error_handler_answers_an_upgrade(lab, port):
    where = lab.serve(f"{port}")
    lab.run("\nproxy.on('error', lambda e, request, target: Response('later', 503))")
    came = refuse(where, UPGRADE)
    assert (came.status, came.text) == (503, b"later")


@pytest.mark.parametrize("event", ["start", "proxy_req_ws"])
def test_a_handler_of_an_upgrade_that_raises(lab, upstream, port, event):
    where = lab.serve(f"{port}")
    lab.run(f"\nproxy.on({event!r}, lambda *a: 1 // 0)")
    assert refuse(where, UPGRADE).status == 500
    lab.wait_log("ZeroDivisionError")


@pytest.mark.parametrize("event", ["open", "close"])
def test_a_handler_of_a_tunnel_that_raises(lab, upstream, port, event):
    """The 101 was sent: it is logged, and nothing else breaks."""
    where = lab.serve(f"{port}")
    lab.run(f"\nproxy.on({event!r}, lambda *a: 1 // 0)")
    with connect(where) as client:
        wire = accept(upstream, client.send(UPGRADE))
        wire.head()
        wire.send(SWITCH)
        client.more()
    wire.close()
    lab.wait_log("ZeroDivisionError")
    assert ask(where, upstream)[1].status == 200


# --- 17: methods that a handler changes --------------------------------------------------------------


class Long(Origin):
    """A target that tells a length of 50, and sends that many bytes but to HEAD."""

    def reply(self, message):
        whole = answer(body=b"B" * 50)
        return whole[:-50] if message.start.startswith("HEAD ") else whole


@WAYS
@MODES
@pytest.mark.parametrize(("method", "becomes"), [("GET", "HEAD"), ("HEAD", "GET")])
def test_a_handler_that_changes_the_method(lab, port, way, mode, method, becomes):
    where = lab.serve(f"{port}", mode, listening_place(way))
    lab.run(f"""
def change(upstream_request, request, options):
    if request.path == "/changed":
        upstream_request.method = {becomes!r}
proxy.on("proxy_req", change)
""")
    with Long(port) as target, connect(where) as client:
        for _ in range(2):
            client.send(request("/changed", method=method))
            changed = read_response(client, method)
            assert (changed.status, changed.body) == (200, b"")
            if method == "GET":
                assert changed.get("content-length") == ["0"]
            client.send(request("/next"))
            assert read_response(client).text == b"B" * 50
    assert [message.start.split(" ")[0] for _, message in target.requests] == [becomes, "GET"] * 2
    lab.assert_calm()


@pytest.mark.parametrize(
    "new", ["b'from the handler'", "__import__('io').BytesIO(b'from the handler')"], ids=["bytes", "buffer"]
)
def test_a_body_in_place_of_one_that_the_client_has_not_sent_yet(lab, upstream, port, new):
    """The client waits for "100 Continue", which never comes: its body is not needed."""
    if new.startswith("b"):
        where = lab.serve(f"{port}")
        handle(lab, "proxy_req", f"upstream_request.body = {new}")
    else:
        where = lab.serve(f"{port}, buffer={new}")
    with connect(where) as client:
        client.send(request("/x", "Expect: 100-continue", "Content-Length: 5", method="POST"))
        wire = accept(upstream, client)
        got = read_request(wire)
        assert (got.text, got.get("expect")) == (b"from the handler", [])
        wire.send(OK)
        came = read_response(client)
        assert (came.status, came.get("connection")) == (200, ["close"])
