"""Several targets for one proxy: which gets a request, and what happens when one is down."""

import itertools
import select
import threading

import pytest
from conditions import wait_for
from free_ports import free_port
from proxy_laboratory import (
    MODES,
    OK,
    Origin,
    accept,
    answer,
    get,
    labels,
    read_request,
    read_response,
    refuse,
    request,
)
from upstream_sockets import Upstream, connect

# --- several targets ---------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("options", ["", ", balance='round_robin'"])
def test_round_robin(lab, origins, mode, options):
    ports = [free_port() for _ in range(3)]
    for number, port in enumerate(ports):
        origins(port, b"%d" % number)
    found = labels(lab.serve(f"{ports}{options}", mode), 9)
    for begin in range(0, 9, 3):
        assert set(found[begin : begin + 3]) == {b"0", b"1", b"2"}


def test_targets_of_different_forms(lab, origins):
    ports, path = [free_port() for _ in range(2)], lab.place()
    origins(ports[0], b"port")
    origins(path, b"unix")
    based = origins(ports[1], b"url")
    where = lab.serve(f"[{ports[0]}, 'unix:{path}', 'http://127.0.0.1:{ports[1]}/base']")
    assert set(labels(where, 3)) == {b"port", b"unix", b"url"}
    assert based.paths == ["/base/x"]


@MODES
def test_least_connections(lab, mode):
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, balance='least_connections'", mode)
    with Upstream(ports[0]) as first, Upstream(ports[1]) as second, connect(where) as held:
        held.send(request("/held"))
        ready, _, _ = select.select([first.listener, second.listener], [], [], 30)
        busy, idle = (first, second) if first.listener in ready else (second, first)
        wire = busy.accept()
        read_request(wire)
        # while that one is in hand, all others go to the target that has none
        for _ in range(4):
            with connect(where) as client:
                client.send(request("/more", "Connection: close"))
                other = accept(idle, client)
                assert read_request(other).path == "/more"
                other.send(answer("200 OK", "Connection: close"))
                assert read_response(client).status == 200
        wire.send(OK)
        assert read_response(held).status == 200


@pytest.mark.parametrize("body", [b"", b"hello", b"0123456789" * 50000])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_request_whose_target_refuses_goes_to_another(lab, origins, body, framing):
    dead, live = free_port(), free_port()
    origin = origins(live, b"live")
    where = lab.serve(f"[{dead}, {live}], fail_timeout=0.001")
    if framing == "chunked":
        chunks = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
        sent = request("/x", "Transfer-Encoding: chunked", method="POST") + chunks
    else:
        sent = request(method="POST", body=body)
    assert labels(where, 6, sent) == [b"live"] * 6
    assert all(message.text == body for _, message in origin.requests)
    assert len(origin.requests) == 6


def test_a_dead_target_is_skipped(lab, origins):
    ports = [free_port() for _ in range(2)]
    origins(ports[0], b"live")
    where = lab.serve(f"{ports}, fail_timeout=1000")
    assert labels(where, 2) == [b"live"] * 2
    # it is there again, but not asked for a while
    back = origins(ports[1], b"back")
    assert labels(where, 6) == [b"live"] * 6
    assert back.requests == []
    assert back.peers == []


def test_a_dead_target_returns(lab, origins):
    ports = [free_port() for _ in range(2)]
    origins(ports[0], b"live")
    where = lab.serve(f"{ports}, fail_timeout=0.1")
    assert labels(where, 4) == [b"live"] * 4
    origins(ports[1], b"back")
    wait_for(lambda: labels(where, 1) == [b"back"], "the target to return")
    wait_for(lambda: set(labels(where, 2)) == {b"live", b"back"}, "the targets to take turns")


def test_a_target_is_not_skipped_when_there_is_no_other(lab, origins):
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, fail_timeout=1000")
    for _ in range(3):
        assert refuse(where).status == 502
    origins(ports[1], b"back")
    assert labels(where, 4) == [b"back"] * 4


def test_a_lone_target_is_never_skipped(lab, origins, port):
    where = lab.serve(f"{port}, fail_timeout=1000")
    assert refuse(where).status == 502
    origins(port)
    assert get(where).status == 200


def test_a_500_or_a_closed_connection_is_not_a_refusal(lab):
    """A request that was sent is not given to another target."""
    ports = [free_port() for _ in range(2)]
    where = lab.serve(f"{ports}, fail_timeout=1000")
    with Upstream(ports[0]) as first, Upstream(ports[1]) as second, connect(where) as client:
        client.send(request(method="POST", body=b"hello"))
        ready, _, _ = select.select([first.listener, second.listener], [], [], 30)
        hit, other = (first, second) if first.listener in ready else (second, first)
        wire = hit.accept()
        read_request(wire)
        wire.close()
        assert read_response(client).status == 502
        assert not other.connects_within(0.2)


# --- 9, 10, 18, 22: several targets ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_target_that_is_back_takes_over_from_one_that_has_gone(lab, method):
    a, b = free_port(), free_port()
    sent = request(method=method, body=b"hello" if method == "POST" else b"")
    where = lab.serve(f"[{a}, {b}], fail_timeout=1000")
    with Origin(b, b"b"):
        assert labels(where, 4, sent) == [b"b"] * 4
    with Origin(a, b"a"):
        assert labels(where, 8, sent) == [b"a"] * 8
    with Origin(b, b"b"):
        assert labels(where, 8, sent) == [b"b"] * 8


def test_several_targets_for_one_request_take_turns(lab, origins):
    a, b = free_port(), free_port()
    origins(a, b"a"), origins(b, b"b")
    where = lab.route(a, f"return proxy.web(environ, start_response, target=[{a}, {b}])")
    came_back = labels(where, 8)
    assert sorted(came_back) == [b"a"] * 4 + [b"b"] * 4
    assert all(one != other for one, other in itertools.pairwise(came_back))


def test_a_dead_one_of_several_targets_for_one_request_is_skipped(lab, origins):
    dead, live = free_port(), free_port()
    origins(live, b"live")
    where = lab.route(
        f"{live}, fail_timeout=1000",
        f"return proxy.web(environ, start_response, target=[{dead}, {live}])",
    )
    assert labels(where, 4) == [b"live"] * 4
    back = origins(dead, b"back")
    assert labels(where, 6) == [b"live"] * 6
    assert back.peers == []


class Busy(Origin):
    """A target that keeps ``/hold`` waiting."""

    def __init__(self, *arguments):
        self.go_on = threading.Event()
        super().__init__(*arguments)

    def reply(self, message):
        if message.path == "/hold":
            self.go_on.wait(60)
        return super().reply(message)

    def __exit__(self, *_):
        self.go_on.set()
        super().__exit__()


@pytest.mark.parametrize("balance", ["round_robin", "least_connections"])
def test_a_target_whose_connections_are_in_use_is_passed_over(lab, balance):
    a, b = free_port(), free_port()
    agent = "http_proxy.Agent(max_connections=1, connect_timeout=1000)"
    where = lab.serve(f"[{a}, {b}], balance={balance!r}, agent={agent}")
    with Busy(a, b"a") as one, Busy(b, b"b") as other, connect(where) as client:
        client.send(request("/hold"))
        wait_for(lambda: one.requests or other.requests, "the one that is kept waiting")
        busy, free = (one, other) if one.requests else (other, one)
        for _ in range(6):
            with connect(where) as quick:
                quick.sock.settimeout(10)
                quick.send(request())
                assert read_response(quick).text == free.label
        busy.go_on.set()
        assert read_response(client).text == busy.label
    lab.assert_calm()
