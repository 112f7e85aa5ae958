"""The agent: the connections to targets, how many there are, and how long they are kept."""

import contextlib
import http.client
import select
import socket
import threading

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client
from proxy_laboratory import (
    MODES,
    OK,
    Origin,
    accept,
    answer,
    ask,
    get,
    labels,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

# --- connections -------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "options", ["", ", agent=http_proxy.Agent()", ", agent=http_proxy.Agent(max_connections=1)"]
)
def test_connections_are_kept(lab, origins, port, mode, options):
    """Requests of different clients, one after another, on one connection."""
    if mode == "routed" and options:
        lab.run("agent = " + options.partition("=")[2])
        options = ", agent=agent"
    origin = origins(port)
    where = lab.serve(f"{port}{options}", mode)
    assert labels(where, 2) == [b"ok"] * 2
    assert get(where, request(method="POST", body=b"hello")).text == b"ok"
    assert [number for number, _ in origin.requests] == [1, 1, 1]
    for _, message in origin.requests:
        assert "close" not in [value.lower() for value in message.get("connection")]


@MODES
def test_without_an_agent_each_request_has_a_connection(lab, origins, port, mode):
    origin = origins(port)
    where = lab.serve(f"{port}, agent=False", mode)
    assert labels(where, 3) == [b"ok"] * 3
    assert [number for number, _ in origin.requests] == [1, 2, 3]
    for _, message in origin.requests:
        assert [value.lower() for value in message.get("connection")] == ["close"]


def test_without_an_agent_the_connection_is_closed(lab, upstream, port):
    where = lab.serve(f"{port}, agent=False")
    ask(where, upstream)
    assert upstream.wires[0].ended()


def test_an_agent_may_be_shared(lab, origins, port):
    origin = origins(port)
    lab.run("agent = http_proxy.Agent()")
    first, second = (lab.serve(f"{port}, agent=agent") for _ in range(2))
    assert labels(first, 1) + labels(second, 1) == [b"ok"] * 2
    assert len(origin.peers) == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + OK,
    ],
)
def test_connections_that_are_not_kept(lab, upstream, port, reply):
    """The target says so, is of another age, or has sent more than was asked for."""
    where = lab.serve(f"{port}")
    assert ask(where, upstream, request(), reply)[1].text == b"ok"
    assert upstream.wires[0].ended()
    got, came = ask(where, upstream, request("/second"), answer(body=b"second"))
    assert (got.path, came.text) == ("/second", b"second")


def test_a_kept_connection_that_the_target_closed(lab, upstream, port):
    where = lab.serve(f"{port}")
    for number in range(3):
        got, came = ask(where, upstream, request(f"/{number}"))
        assert (got.path, came.status) == (f"/{number}", 200)
        upstream.wires[-1].close()
    assert "proxy: " not in lab.log()


def test_an_unused_connection_is_closed_after_idle_timeout(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(idle_timeout=0.2)")
    ask(where, upstream)
    assert upstream.wires[0].ended()
    ask(where, upstream)


def test_a_connection_in_use_is_not_idle(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(idle_timeout=0.1)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        client.head()
        ask(where, upstream)
        assert upstream.wires[1].ended()  # so idle_timeout has passed for the first connection, too
        wire.send(b"half")
        assert client.exactly(8) == b"halfhalf"


@pytest.mark.parametrize("max_idle", [0, 1, 2])
def test_how_many_unused_connections_are_kept(lab, upstream, port, max_idle):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(max_idle={max_idle}, idle_timeout=600)")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where)) for _ in range(3)]
        for client in clients:
            read_request(accept(upstream, client.send(request())))
        for wire in upstream.wires:
            wire.send(OK)
        for client in clients:
            assert read_response(client).text == b"ok"
        open_ones = list(upstream.wires)
        while len(open_ones) > max_idle:
            ready, _, _ = select.select([wire.sock for wire in open_ones], [], [], 30)
            assert ready, f"{len(open_ones)} are kept"
            for wire in [wire for wire in open_ones if wire.sock in ready]:
                assert wire.ended()
                open_ones.remove(wire)
        assert len(open_ones) == max_idle
        assert not select.select([wire.sock for wire in open_ones], [], [], 0.1)[0]


@MODES
def test_max_connections_and_503(lab, upstream, port, mode):
    lab.run("agent = http_proxy.Agent(max_connections=1, connect_timeout=0.3)")
    where = lab.serve(f"{port}, '127.0.0.1', agent=agent", mode)
    lab.run("\nproxy.on('error', lambda e, request, target: seen.append((type(e).__name__, e.status_code)))")
    with connect(where) as first:
        wire = accept(upstream, first.send(request("/first")))
        read_request(wire)
        came = refuse(where, request("/second"))
        assert came.status == 503
        (after,) = came.get("retry-after")
        assert int(after) >= 0
        assert lab.seen() == [("PoolExhausted", 503)]
        wire.send(OK)
        assert read_response(first).status == 200
    assert "(GET /second): 503" in lab.wait_log("(GET /second): 503")
    # the place is free again
    assert not upstream.connects_within(0.05)
    with connect(where) as third:
        third.send(request("/third"))
        assert read_request(wire).path == "/third"
        wire.send(OK)
        assert read_response(third).status == 200


def test_max_connections_and_waiting(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(max_connections=2, connect_timeout=100)")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where)) for _ in range(5)]
        for number, client in enumerate(clients):
            client.send(request(f"/{number}"))
        wires = [upstream.accept(), upstream.accept()]
        assert not upstream.connects_within(0.3)
        paths = []
        # whichever gets the next one
        while len(paths) < 5:
            ready, _, _ = select.select([w.sock for w in wires] + [upstream.listener], [], [], 30)
            assert ready
            if upstream.listener in ready:
                wires.append(upstream.accept())
                assert len(wires) <= 2, "a third connection"
            for wire in [w for w in wires if w.sock in ready]:
                paths.append(read_request(wire).path)
                wire.send(OK)
        assert sorted(paths) == [f"/{number}" for number in range(5)]
        for client in clients:
            assert read_response(client).text == b"ok"


def test_max_connections_counts_those_that_fail(lab, port):
    """A place is given back however the request ends."""
    where = lab.serve(
        f"{port}, proxy_timeout=0.2, agent=http_proxy.Agent(max_connections=1, connect_timeout=100)"
    )
    assert refuse(where).status == 502
    with Upstream(port) as upstream:
        for kind in ("late", "garbage", "closed", "gone", "half"):
            with connect(where) as client:
                wire = accept(upstream, client.send(request(f"/{kind}")))
                read_request(wire)
                if kind == "garbage":
                    wire.send(b"nonsense\r\n\r\n")
                elif kind == "half":
                    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
                    client.head()
                    wire.close()
                elif kind == "closed":
                    wire.close()
                if kind != "gone":
                    client.rest() if kind == "half" else read_response(client)
            if kind == "gone":
                assert wire.ended()
        assert ask(where, upstream, request("/last"))[1].status == 200


def test_max_connections_are_counted_for_each_target(lab):
    ports = [free_port() for _ in range(2)]
    agent = "agent=http_proxy.Agent(max_connections=1, connect_timeout=100)"
    where = lab.serve(f"{{'/a/': {ports[0]}, '/b/': {ports[1]}}}, {agent}")
    with Upstream(ports[0]) as a, Upstream(ports[1]) as b, connect(where) as held:
        wire = accept(a, held.send(request("/a/")))
        read_request(wire)
        assert ask(where, b, request("/b/"))[1].status == 200
        wire.send(OK)
        assert read_response(held).status == 200


def test_an_upgrade_takes_a_place(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(max_connections=1, connect_timeout=0.3)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request("/x", "Connection: Upgrade", "Upgrade: x")))
        wire.head()
        wire.send(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        client.head()
        assert refuse(where).status == 503
    assert wire.rest() == b""
    wire.close()

    def served():
        with connect(where) as client:
            client.send(request())
            ready, _, _ = select.select([upstream.listener, client.sock], [], [], 30)
            if upstream.listener not in ready:
                assert read_response(client).status == 503
                return False
            wire = upstream.accept()
            read_request(wire)
            wire.send(OK)
            return read_response(client).status == 200

    wait_for(served, "the place of the tunnel")


@pytest.fixture
def full():
    """Makes a listener's backlog full, so that a connecting client waits."""
    with contextlib.ExitStack() as stack:

        def fill(family, address):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen(0)
            for _ in range(4):
                sock = stack.enter_context(socket.socket(family))
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(address)

        yield fill


@MODES
def test_connect_timeout_is_504(lab, full, port, mode):
    full(socket.AF_INET, ("127.0.0.1", port))
    lab.run("agent = http_proxy.Agent(connect_timeout=0.3)")
    where = lab.serve(f"{port}, '127.0.0.1', agent=agent", mode)
    lab.run(
        "\nproxy.on('error', lambda e, request, target: seen.append((type(e).__name__, e.elapsed >= 0.2)))"
    )
    assert refuse(where).status == 504
    assert lab.seen() == [("UpstreamTimeout", True)]
    assert "Traceback" not in lab.wait_log("(GET /x): 504")


def test_connect_timeout_of_a_unix_socket(lab, full):
    path = lab.place()
    full(socket.AF_UNIX, path)
    where = lab.serve(f"'unix:{path}', agent=http_proxy.Agent(connect_timeout=0.3)")
    assert refuse(where).status in (503, 504)
    assert "Traceback" not in lab.wait_log("(GET /x): 50")


def test_tls_that_is_never_answered_is_a_connect_timeout(lab, upstream, port):
    where = lab.serve(
        f"'https://localhost:{port}', secure=False, agent=http_proxy.Agent(connect_timeout=0.3)"
    )
    assert refuse(where).status == 504


def test_connect_timeout_does_not_end_a_slow_answer(lab, upstream, port):
    where = lab.serve(f"{port}, agent=http_proxy.Agent(connect_timeout=0.3)")
    with connect(where) as client:
        wire = accept(upstream, client.send(request()))
        read_request(wire)
        other = lab.serve(
            f"'https://localhost:{port}', secure=False, agent=http_proxy.Agent(connect_timeout=0.3)"
        )
        assert refuse(other).status == 504  # so connect_timeout has passed for the first connection, too
        wire.send(OK)
        assert read_response(client).status == 200


def test_many_requests_at_once(lab, origins, port):
    """More clients than connections: all are served, none gets another's answer."""

    class Own(Origin):
        def reply(self, message):
            return answer(body=message.path.encode())

    with Own(port) as origin:
        where = lab.serve(f"{port}, agent=http_proxy.Agent(max_connections=5, connect_timeout=100)")
        wrong = []

        def ask_some(number):
            client = Client(where)
            try:
                for turn in range(10):
                    client.request("GET", f"/{number}/{turn}")
                    if client.getresponse().read() != f"/{number}/{turn}".encode():
                        wrong.append((number, turn))
            except (OSError, http.client.HTTPException) as error:
                wrong.append(error)
            finally:
                client.close()

        threads = [threading.Thread(target=ask_some, args=[number]) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(origin.peers) <= 5
        assert len(origin.requests) == 200


# --- 20: a kept connection that takes nothing any more -----------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_streaming_body_whose_connection_takes_nothing(lab, method, framing):
    """The target reads no more: no look at the connection tells, but the first send does."""
    path = lab.place()
    where = lab.serve(f"'unix:{path}'")
    with Upstream(path) as upstream, connect(where) as client:
        client.send(request())
        wire = accept(upstream, client)
        read_request(wire)
        wire.send(OK)
        assert read_response(client).text == b"ok"
        wire.sock.shutdown(socket.SHUT_RD)
        if framing == "length":
            client.send(request("/x", "Content-Length: 8", method=method) + b"half")
        else:
            client.send(request("/x", "Transfer-Encoding: chunked", method=method) + b"4\r\nhalf\r\n")
        again = accept(upstream, client)
        client.send(b"more" if framing == "length" else b"4\r\nmore\r\n0\r\n\r\n")
        got = read_request(again)
        assert got.text == b"halfmore"
        again.send(OK)
        assert read_response(client).text == b"ok"
    assert not lab.proxy_lines(f"({method} /x)")
