"""The proxy's connections: which are used again, which never, what a lost one means, and that none is left over."""

import contextlib
import re
import signal

import pytest
from conditions import stopped, wait_for
from free_ports import free_port
from proxy_harness import (
    ALL,
    EVERYWHERE,
    OK,
    PLACES,
    asked,
    cut_off,
    final_of,
    get,
    name_of,
    path,
    proxied,
    request_of,
    response_of,
    upstream_for,
    wait_read,
)
from upstream_sockets import Upstream, connect

SERVERS = {
    **PLACES,
    "to_unix": "UNIX",
    "fresh": "UP, HOST, agent=False",
    "few": "UP, HOST, agent=http_proxy.Agent(max_connections=1, connect_timeout=0.5)",
    "queue": "UP, HOST, agent=http_proxy.Agent(max_connections=1, connect_timeout=60)",
    "one_idle": "UP, HOST, agent=http_proxy.Agent(max_idle=1)",
    "short_idle": "UP, HOST, agent=http_proxy.Agent(idle_timeout=0.2)",
}


# --- used again --------------------------------------------------------------------------------------


REUSED = {
    "length": ("GET", OK),
    "chunked": ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    "head": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"),
    "204": ("DELETE", b"HTTP/1.1 204 None\r\n\r\n"),
    "304": ("GET", b"HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n"),
    "error": ("GET", b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"),
    "interim": ("GET", b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK),
    "keep-alive": ("GET", b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n"),
}  # fmt: skip


@EVERYWHERE
@pytest.mark.parametrize("case", REUSED)
def test_a_connection_is_used_again_for_any_client(px, where, case):
    method, answer = REUSED[case]
    with upstream_for(px, where) as upstream:
        wire = None
        for number in range(3):
            with connect(px[where]) as client:
                client.send(get(f"/{number}", method=method))
                wire = wire or upstream.accept()
                assert request_of(wire).target == f"/{number}"
                wire.send(answer)
                assert final_of(client, method).status == int(answer.split(b"HTTP/1.1 ")[-1][:3])


@ALL
def test_a_connection_is_used_again_after_bodies(px, where):
    with px.upstream() as upstream:
        wire = None
        for body, field in (
            (b"hello", "Content-Length: 5"),
            (b"3\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        ):
            with connect(px[where]) as client:
                client.send(get("/", field, method="POST") + body)
                wire = wire or upstream.accept()
                request_of(wire)
                wire.send(OK)
                assert response_of(client).body == b"ok"


NOT_REUSED = {
    "said so": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "said so among others": b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok",
    "said so in a second field": (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    ),
    "old": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
}


@ALL
@pytest.mark.parametrize("case", NOT_REUSED)
def test_a_connection_that_ends_is_not_used_again(px, where, case):
    with px.upstream() as upstream, connect(px[where]) as client:
        wire = asked(client, upstream, answer=NOT_REUSED[case])
        asked(client, upstream)
        assert wire.ended()


def test_without_an_agent_each_request_has_its_own_connection(px):
    with px.upstream() as upstream, connect(px["fresh"]) as client:
        for _ in range(2):
            client.send(get())
            wire = upstream.accept()
            assert request_of(wire).get("connection") == "close"
            wire.send(OK)
            assert response_of(client).body == b"ok"
            assert wire.ended()


@ALL
def test_requests_at_the_same_time_have_connections_of_their_own(px, where):
    with px.upstream() as upstream, connect(px[where]) as one, connect(px[where]) as two:
        one.send(get("/one"))
        first = upstream.accept()
        assert request_of(first).target == "/one"
        two.send(get("/two"))
        second = upstream.accept()
        assert request_of(second).target == "/two"
        second.send(OK)
        assert response_of(two).body == b"ok"
        first.send(OK)
        assert response_of(one).body == b"ok"


def test_an_idle_connection_is_closed_after_a_time(px):
    with px.upstream() as upstream, connect(px["short_idle"]) as client:
        assert asked(client, upstream).ended()


def test_no_more_stay_open_than_allowed(px):
    with px.upstream() as upstream, connect(px["one_idle"]) as one, connect(px["one_idle"]) as two:
        one.send(get("/one"))
        first = upstream.accept()
        two.send(get("/two"))
        second = upstream.accept()
        first.send(OK)
        assert response_of(one).body == b"ok"
        second.send(OK)
        assert response_of(two).body == b"ok"
        request_of(first), request_of(second)
        assert second.ended()
        one.send(get("/three"))
        assert request_of(first).target == "/three"


def test_a_request_beyond_the_limit_is_503(px):
    target = path()
    with px.upstream() as upstream, connect(px["few"]) as one, connect(px["few"]) as two:
        one.send(get())
        wire = upstream.accept()
        two.send(get(target))
        answer = response_of(two)
        assert answer.status == 503
        assert re.fullmatch("[0-9]+", answer.get("retry-after"))
        px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \(GET {target}\): 503")
        request_of(wire)
        wire.send(OK)
        assert response_of(one).body == b"ok"
        two.send(get("/next"))
        assert request_of(wire).target == "/next"
        wire.send(OK)
        assert response_of(two).body == b"ok"


def test_a_request_waits_for_a_connection(px):
    with px.upstream() as upstream, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(px["queue"])) for _ in range(5)]
        clients[0].send(get("/0"))
        wire = upstream.accept()
        for number, client in enumerate(clients[1:], 1):
            client.send(get(f"/{number}"))
        seen = set()
        for _ in clients:
            seen.add(request_of(wire).target)
            wire.send(OK)
        assert seen == {f"/{n}" for n in range(5)}
        for client in clients:
            assert response_of(client).body == b"ok"
        assert not upstream.connects_within(0.05)


def test_a_place_becomes_free_when_its_client_goes_or_its_upstream_fails(px):
    with px.upstream() as upstream, connect(px["queue"]) as last:
        with connect(px["queue"]) as one:
            one.send(get())
            wire = upstream.accept()
            assert wire.until(b"\r\n\r\n")
        assert wire.ended()
        with connect(px["queue"]) as two:
            two.send(get())
            upstream.accept().close()
            assert response_of(two).status == 502
        asked(last, upstream)


# --- stale -------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("end", ["close", "finish", "reset"])
# a UNIX socket has no reset
@pytest.mark.leave_out(lambda where, end: where == "to_unix" and end == "reset")
def test_a_connection_that_was_closed_while_idle_is_not_used(px, where, method, end):
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        getattr(wire, end)()
        client.send(get("/next", "Content-Length: 3", method=method) + b"abc")
        wire = upstream.accept()
        got = request_of(wire)
        assert (got.target, got.body) == ("/next", b"abc")
        wire.send(OK)
        assert response_of(client).body == b"ok"
    assert not px.lines("/next")


@EVERYWHERE
@pytest.mark.parametrize("end", ["close", "finish"])
def test_a_connection_closed_in_the_same_moment_in_which_a_post_comes(px, where, end):
    """The worker sees both at once; the closed connection could be known, and nothing was sent on it."""
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        with stopped(px.worker):
            client.send(get("/next", "Content-Length: 3", method="POST") + b"abc")
            getattr(wire, end)()
        wire = upstream.accept()
        assert request_of(wire).body == b"abc"
        wire.send(OK)
        assert response_of(client).body == b"ok"


@EVERYWHERE
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("end", ["close", "reset"])
# a UNIX socket has no reset
@pytest.mark.leave_out(lambda where, end: where == "to_unix" and end == "reset")
def test_an_idempotent_request_that_met_a_stale_connection_is_sent_once_more(px, where, method, end):
    target = path()
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        client.send(get(target, method=method))
        request_of(wire)
        getattr(wire, end)()
        again = upstream.accept()
        got = request_of(again)
        assert (got.method, got.target) == (method, target)
        again.send(OK if method != "HEAD" else OK[:-2])
        assert response_of(client, method).status == 200
        # and the fresh one is kept
        client.send(get("/next"))
        assert request_of(again).target == "/next"
    assert not px.lines(target)


NOT_SAFE = {
    "post with a body": get("%s", "Content-Length: 3", method="POST") + b"abc",
    "post without": get("%s", "Content-Length: 0", method="POST"),
    "patch": get("%s", "Transfer-Encoding: chunked", method="PATCH") + b"3\r\nabc\r\n0\r\n\r\n",
    "unknown": get("%s", method="FROB"),
}


@ALL
@pytest.mark.parametrize("case", NOT_SAFE)
def test_what_is_not_idempotent_is_not_sent_twice(px, where, case):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        client.send(NOT_SAFE[case].replace(b"%s", target.encode()))
        request_of(wire)
        wire.close()
        assert response_of(client).status == 502
        assert not upstream.connects_within(0.1)
    px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \([A-Z]+ {target}\): 502")


@ALL
def test_never_more_than_one_retry(px, where):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as one, connect(px[where]) as two:
        one.send(get())
        first = upstream.accept()
        two.send(get())
        second = upstream.accept()
        for wire, client in ((first, one), (second, two)):
            request_of(wire)
            wire.send(OK)
            assert response_of(client).body == b"ok"
        one.send(get(target))
        # whichever of the two it is sent on
        first.sock.setblocking(False)

        def arrived():
            for wire in (first, second):
                wire.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    wire.more()
                    return wire
            return None

        used = wait_for(arrived, "the request")
        used.close()
        again = upstream.accept()  # a fresh one, not the other idle one, which may be as stale
        assert request_of(again).target == target
        again.close()
        assert response_of(one).status == 502
        assert not upstream.connects_within(0.1)
        other = second if used is first else first
        other.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert not other.sock.recv(100)
    px.one_line(target, r"\): 502")


@ALL
def test_a_fresh_connection_that_is_closed_is_not_a_stale_one(px, where):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        client.send(get(target))
        wire = upstream.accept()
        request_of(wire)
        wire.close()
        assert response_of(client).status == 502
        assert not upstream.connects_within(0.1)
    px.one_line(target, rf"proxy: {name_of(px)}: .+ after [\d.]+ s \(GET {target}\): 502")


@ALL
@pytest.mark.parametrize(
    "part", [b"H", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"]
)
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_connection_that_has_begun_a_response_is_not_a_stale_one(px, where, part, end):
    target = path()
    with px.upstream() as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        client.send(get(target))
        request_of(wire)
        wire.send(part)
        wait_read(wire)  # a reset would take it away
        getattr(wire, end)()
        if upstream.connects_within(0.5):
            raise AssertionError("it was sent once more")
        assert final_of(client).status == 502
    px.one_line(target, r"\): 502")


# --- never matched with the wrong request ------------------------------------------------------------


POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nX-Poison: 1\r\n\r\npoison"

SURPLUS = {
    "length": ("GET", OK + b"surplus"),
    "an answer": ("GET", OK + POISON),
    "a byte": ("GET", OK + b"\n"),
    "a line": ("GET", OK + b"\r\n"),
    "chunked": (
        "GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + POISON,
    ),
    "head": ("HEAD", OK),
    "204": ("GET", b"HTTP/1.1 204 None\r\nContent-Length: 113\r\n\r\n" + POISON),
    "304": ("GET", b"HTTP/1.1 304 Same\r\n\r\n" + POISON),
    "interim behind": ("GET", OK + b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@EVERYWHERE
@pytest.mark.parametrize("case", SURPLUS)
@pytest.mark.parametrize("split", [False, True])
def test_surplus_bytes_retire_the_connection(px, where, case, split):
    method, answer = SURPLUS[case]
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        client.send(get(method=method))
        wire = upstream.accept()
        request_of(wire)
        if split:
            # the head first, so that the surplus does not come in the same piece
            head, _, rest = answer.partition(b"\r\n\r\n")
            whole = {"head": b"", "204": b"", "304": b""}.get(case, b"ok")
            cut = rest.index(b"ok") + 2 if whole and case != "chunked" else len(b"2\r\nok\r\n0\r\n\r\n")
            cut = cut if whole else 0
            wire.send(head + b"\r\n\r\n" + rest[:cut])
            first = response_of(client, method)
            with contextlib.suppress(BrokenPipeError):  # the proxy has closed the connection already
                wire.send(rest[cut:])
        else:
            wire.send(answer)
            first = response_of(client, method)
        assert first.status == int(answer.split(b" ")[1])
        assert b"poison" not in first.body
        for target in ("/one", "/two"):
            client.send(get(target))
            if target == "/one":
                again = upstream.accept()
            assert request_of(again).target == target
            again.send(OK)
            answer_again = response_of(client)
            assert (answer_again.body, answer_again.all("x-poison")) == (b"ok", [])
        cut_off(wire)


@EVERYWHERE
def test_an_unrequested_response_reaches_no_client(px, where):
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        wire.send(POISON)
        assert asked(client, upstream, get("/next")) is not wire
        assert wire.ended()


@EVERYWHERE
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_response_at_the_moment_of_a_request_reaches_no_client(px, where, method):
    """The worker sees both at once, whichever it looks at first."""
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        wire = asked(client, upstream)
        with stopped(px.worker):
            client.send(get("/next", "Content-Length: 3", method=method) + b"abc")
            wire.send(POISON)
        again = upstream.accept()
        assert request_of(again).target == "/next"
        again.send(OK)
        answer = response_of(client)
        assert (answer.body, answer.all("x-poison")) == (b"ok", [])


@ALL
def test_a_connection_whose_request_was_not_sent_whole_is_not_used_again(px, where):
    """The upstream answers early, the client goes: what comes next on that connection would be read as body."""
    with px.upstream() as upstream, connect(px[where]) as other:
        client = connect(px[where]).send(get("/", "Content-Length: 100", method="POST") + b"abc")
        wire = upstream.accept()
        wire.head()
        wire.exactly(3)
        wire.send(OK)
        assert response_of(client).body == b"ok"
        client.close()
        assert not cut_off(wire)
        asked(other, upstream)


@ALL
def test_a_response_whose_client_has_left_reaches_no_other_client(px, where):
    with px.upstream() as upstream, connect(px[where]) as other:
        client = connect(px[where]).send(get("/secret"))
        wire = upstream.accept()
        request_of(wire)
        client.close()
        wire.ended()
        with contextlib.suppress(OSError):
            wire.send(POISON)
        asked(other, upstream)


# --- nothing is left ---------------------------------------------------------------------------------


@EVERYWHERE
def test_nothing_stays_open(px, where):
    """Whatever way an exchange ends."""
    # what was kept of earlier tests goes when it is found closed
    with connect(px[where]) as client:
        client.send(get())
        response_of(client)
    settled = []

    def count():
        settled.append((px.sockets(), px.pipes()))
        return len(settled) > 20 and len(set(settled[-20:])) == 1

    wait_for(count, "the descriptors to settle")
    sockets, pipes = settled[-1]
    with upstream_for(px, where) as upstream:
        for _ in range(5):
            with connect(px[where]) as client:  # the client goes
                client.send(get())
                upstream.accept()
            with connect(px[where]) as client:  # inside the body
                client.send(get("/", "Content-Length: 100", method="POST") + b"abc")
                upstream.accept()
            with connect(px[where]) as client:  # the upstream goes
                client.send(get())
                upstream.accept().close()
                response_of(client)
            with connect(px[where]) as client:  # inside the answer
                client.send(get())
                wire = upstream.accept()
                wire.head()
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc").close()
                cut_off(client)
            with connect(px[where]) as client:  # garbage
                client.send(get())
                upstream.accept().send(b"nonsense\r\n\r\n")
                assert response_of(client).status == 502
            with connect(px[where]) as client:  # surplus
                client.send(get())
                wire = upstream.accept()
                wire.head()
                wire.send(POISON + POISON)
                response_of(client)
        with connect(px[where]) as client:
            asked(client, upstream, answer=NOT_REUSED["said so"])
    with connect(px[where]) as client:
        for _ in range(5):  # refused
            client.send(get())
            assert response_of(client).status == 502
    wait_for(
        lambda: px.sockets() <= sockets and px.pipes() <= pipes,
        lambda: f"{sockets} sockets, {pipes} pipes; now {px.sockets()}, {px.pipes()}",
    )


def test_idle_connections_that_the_upstream_closes_do_not_stay(px):
    with px.upstream() as upstream, contextlib.ExitStack() as stack:
        before = px.sockets()
        clients = [stack.enter_context(connect(px["second"])) for _ in range(20)]
        wires = []
        for client in clients:
            client.send(get())
            wires.append(upstream.accept())
        for client, wire in zip(clients, wires, strict=True):
            request_of(wire)
            wire.send(OK)
            response_of(client)
        for wire in wires:
            wire.close()
        for client in clients:
            client.close()
        wait_for(lambda: px.sockets() <= before, lambda: f"{before} sockets, now {px.sockets()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_requests_in_hand_are_finished_on_a_graceful_stop(number):
    with (
        proxied(PLACES, "--graceful-timeout", 30, "--keep-alive", 1) as px,
        px.upstream() as upstream,
        contextlib.ExitStack() as stack,
    ):
        clients = {where: stack.enter_context(connect(px[where])) for where in PLACES}
        wires = {}
        for where, client in clients.items():
            client.send(get(f"/{where}"))
            wires[where] = upstream.accept()
            request_of(wires[where])
            wires[where].send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
            client.until(b"abc")
        worker = px.worker
        px.process.signal(number)
        px.process.wait_log(r"Handling signal: (term|hup)")
        for where, client in clients.items():
            wires[where].send(b"def")
            assert client.exactly(3) == b"def"
        wait_for(lambda: worker not in px.process.workers(), "the worker's end")
        for wire in wires.values():
            assert wire.ended()  # idle ones do not keep it
        if number == signal.SIGTERM:
            assert px.process.wait_end() == 0
        assert "Traceback" not in px.process.log()
        assert "graceful timeout" not in px.process.log()


def test_the_targets_of_another_port_have_connections_of_their_own():
    other = free_port()
    with (
        proxied({"primary": f"lambda request: UP if request.path == '/a' else {other}, HOST"}) as px,
        px.upstream() as one,
        Upstream(other) as two,
        connect(px["primary"]) as client,
    ):
        first = asked(client, one, get("/a"))
        second = asked(client, two, get("/b"))
        for target, wire in (("/a", first), ("/b", second), ("/a", first)):
            client.send(get(target))
            assert request_of(wire).target == target
            wire.send(OK)
            assert response_of(client).body == b"ok"
