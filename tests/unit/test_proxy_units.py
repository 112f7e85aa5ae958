"""Parts of the proxy tried by themselves: frames, chunks, what is sent soon, connections that are waited for."""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import threading

import gevent
import gevent.event
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_frames import frame
from wsgi_calls import call, environ

from gunicorn_passenger import http_proxy
from gunicorn_passenger.errors import BadResponse, PoolExhausted, TruncatedResponse
from gunicorn_passenger.http.websocket_frames import GOING_AWAY, FrameTracker, close_frame
from gunicorn_passenger.proxy import agent as agents
from gunicorn_passenger.proxy import request_body
from gunicorn_passenger.proxy.dial import Dialer, DialSettings
from gunicorn_passenger.proxy.response_head import ResponseChunks, ResponseHead, parse_response_head
from gunicorn_passenger.proxy.target import parse_target
from gunicorn_passenger.proxy.upstream_io import GeventRuntime, GeventStream, runtime

SIZES = st.lists(st.sampled_from([0, 1, 2, 124, 125, 126, 127, 128, 129, 300, 65535, 65536]), max_size=6)


@settings(deadline=None, derandomize=True)
@given(SIZES, st.booleans(), st.lists(st.integers(1, 400), min_size=1))
def test_frames_are_told_apart_however_they_are_cut(sizes, masked, cuts):
    frames = [frame(size, masked) for size in sizes]
    ends, at = [], 0
    for one in frames:
        at += len(one)
        ends.append(at)
    stream = b"".join(frames)
    tracker = FrameTracker()
    at = number = 0
    while at < len(stream):
        data = stream[at : at + cuts[number % len(cuts)]]
        number += 1
        inside = tracker.feed(data)
        if at == 0 or at in ends:
            assert inside == 0  # nothing had begun
        else:
            first = next(end for end in ends if end > at)
            assert inside == min(first - at, len(data))
        at += len(data)
        assert tracker.between == (at in ends)


def test_a_close_is_1001_and_masked_towards_the_target():
    assert close_frame(GOING_AWAY, masked=False) == b"\x88\x02\x03\xe9"
    masked = close_frame(GOING_AWAY, masked=True)
    assert masked[:2] == b"\x88\x82"
    assert bytes(byte ^ mask for byte, mask in zip(masked[6:], masked[2:4], strict=True)) == b"\x03\xe9"


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.integers(1, 50), st.booleans())
def test_chunks_are_taken_apart_however_they_are_cut(pieces, cut, trailers):
    stream = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    stream += b"0\r\n" + (b"X-T: 1\r\nContent-Length: 5\r\n" if trailers else b"") + b"\r\nsurplus"
    decoder = ResponseChunks()
    body = b""
    at = 0
    while not decoder.finished:
        body += decoder.feed(stream[at : at + cut])
        at += cut
    assert body == b"".join(pieces)
    assert decoder.trailers == ([("X-T", "1")] if trailers else [])
    assert b"surplus".startswith(decoder.rest)


@pytest.mark.parametrize(
    "data",
    [b"-1\r\n", b"0x5\r\n", b" 5\r\n", b"5 \r\n", b"\r\n", b"5\n", b"g\r\n", b"1" * 17 + b"\r\n", b"5\r\nhelloX", b"a" * 5000],
)  # fmt: skip
def test_bad_chunks(data):
    with pytest.raises(BadResponse):
        ResponseChunks().feed(data)


def test_reading_a_head_twice_does_not_change_it():
    data = b"HTTP/1.1 200 OK\r\nX: 1\r\nContent-Length: 2, 2\r\n\r\n"
    head = ResponseHead(data, keep_case=False)
    assert head.headers == [("x", "1"), ("content-length", "2")]
    assert (head.length, head.close, head.dated) == (2, False, False)


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_a_connection_on_which_a_204_announces_a_body_is_not_used_again(framing):
    head = ResponseHead(b"HTTP/1.1 204 No Content\r\n%b\r\n\r\n" % framing, keep_case=False)
    assert head.close
    assert not ResponseHead(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", keep_case=False).close


def pair() -> tuple[GeventStream, _socket.socket]:
    near, far = _socket.socketpair()
    near.setblocking(False)
    return GeventStream(near, runtime()), far


def test_what_is_sent_soon_is_sent_in_order_at_the_end_of_the_turn():
    gevent.get_hub()
    ends = [pair() for _ in range(3)]
    for stream, _ in ends:
        runtime().send_at_end_of_iteration(stream, b"one")
    for _, far in ends:
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(10)
    gevent.sleep(0)
    for stream, far in ends:
        assert far.recv(10) == b"one"
        stream.close()
        far.close()


def test_what_does_not_fit_soon_follows():
    gevent.get_hub()
    stream, far = pair()
    full = 0
    while True:
        try:
            full += stream.sock.send(b"x" * 65536)
        except BlockingIOError:
            break
    runtime().send_at_end_of_iteration(stream, b"the request")
    gevent.sleep(0)
    came = b""
    while len(came) < full + len(b"the request"):
        came += far.recv(1 << 20)
        gevent.sleep(0)
    assert came.endswith(b"xthe request")
    stream.close()
    far.close()


def test_a_closed_stream_sends_nothing_soon():
    gevent.get_hub()
    stream, far = pair()
    runtime().send_at_end_of_iteration(stream, b"x")
    stream.close()
    gevent.sleep(0)
    assert far.recv(10) == b""
    far.close()


def test_a_send_that_fails_soon_is_known():
    gevent.get_hub()
    stream, far = pair()
    far.close()
    runtime().send_at_end_of_iteration(stream, b"x")
    gevent.sleep(0)
    assert stream.failed
    assert not stream.partially_sent
    stream.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_the_target_says_before_it_has_the_request_is_not_a_response_to_it(monkeypatch, method):
    gevent.get_hub()
    ends = []

    def connect(dialer, seconds):
        ends.append(pair())
        gevent.spawn(respond, ends[-1][1])
        return ends[-1][0]

    def respond(far):
        far.setblocking(False)
        got = b""
        while not got.endswith(end):
            gevent.sleep(0.001)
            with contextlib.suppress(BlockingIOError):
                got += far.recv(65536)
        far.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(got), got))

    def late(self, stream, data):
        """The target closes the connection as servers do, just when the loop is busy with other callbacks."""
        monkeypatch.undo()
        monkeypatch.setattr(Dialer, "connect", connect)
        ends[0][1].send(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        gevent.spawn_later(0.05, self.send_at_end_of_iteration, stream, data)

    body = b"hello" if method == "POST" else None
    end = body or b"\r\n\r\n"
    monkeypatch.setattr(Dialer, "connect", connect)
    proxy = http_proxy.create_server(9)
    proxy.on("proxy_req", lambda upstream, request, options: setattr(upstream, "body", body))
    with gevent.Timeout(30):
        assert call(proxy.web, environ(REQUEST_METHOD=method))[0] == 200
        monkeypatch.setattr(GeventRuntime, "send_at_end_of_iteration", late)
        status, _, got = call(proxy.web, environ(REQUEST_METHOD=method))
    assert (status, got.count(b"HTTP/1.1"), len(ends)) == (200, 1, 2)
    proxy.proxy.close()
    for _, far in ends:
        far.close()


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize(
    "begun", [b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx"], ids=["head", "body"]
)
def test_a_host_that_vanishes_ends_the_request(monkeypatch, timeout, begun):
    """TCP keepalive has had no reply: ETIMEDOUT, which is a TimeoutError, too."""
    gevent.get_hub()
    ends = []

    class Vanished:
        def __init__(self, sock):
            self.sock = sock

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def recv(self, *arguments):
            data, said[:] = b"".join(said), []
            if not data:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            return data

    def connect(dialer, seconds):
        stream, far = pair()
        ends.append(far)
        far.send(b"readable")
        stream.sock = Vanished(stream.sock)
        stream.is_quiet = lambda: True
        return stream

    said = [begun] if begun != b"x" else []
    monkeypatch.setattr(Dialer, "connect", connect)
    proxy = http_proxy.create_server(9, proxy_timeout=timeout)
    with gevent.Timeout(30):
        if begun == b"x":
            assert call(proxy.web, environ())[0] == 502
        else:
            with pytest.raises(TruncatedResponse, match="failed inside its response: Connection timed out"):
                call(proxy.web, environ())
    proxy.proxy.close()
    ends[0].close()


class HeldBody:
    """A request body of which the client sends the second half when it is told to."""

    def __init__(self):
        self.go_on = gevent.event.Event()
        self._pieces = [b"first", b"later"]

    def read(self, size=-1):
        if len(self._pieces) == 1:
            self.go_on.wait()
        return self._pieces.pop(0) if self._pieces else b""


def test_the_end_of_a_response_does_not_wait_for_the_rest_of_the_request(monkeypatch):
    gevent.get_hub()
    monkeypatch.setattr(request_body, "_LINGER", 60)
    ends = []

    def connect(dialer, seconds):
        stream, far = pair()
        ends.append(far)
        far.send(b"HTTP/1.1 413 Too Large\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nbig\r\n0\r\n\r\n")
        stream.is_quiet = lambda: True
        return stream

    monkeypatch.setattr(Dialer, "connect", connect)
    proxy = http_proxy.create_server(9)
    ended = []
    proxy.on("end", lambda request, response: ended.append(response.status_code))
    body, statuses = HeldBody(), []
    posted = environ(REQUEST_METHOD="POST", CONTENT_LENGTH="10")
    posted["wsgi.input"] = body
    with gevent.Timeout(30):
        response = proxy.web(posted, lambda status, headers, exc_info=None: statuses.append(status[:3]))
        assert b"".join(response) == b"big"
        assert (statuses, ended) == (["413"], [])
        body.go_on.set()
        response.close()
    assert ended == [413]
    proxy.proxy.close()
    ends[0].close()


@pytest.fixture
def pool(monkeypatch):
    """A pool of two connections at most; they lead nowhere."""
    gevent.get_hub()
    ends = []

    def connect(dialer, seconds):
        stream, far = pair()
        ends.extend([stream, far])
        return stream

    monkeypatch.setattr(Dialer, "connect", connect)
    agent = agents.Agent(max_connections=2, connect_timeout=30)
    yield agent.pool(parse_target(9), DialSettings())
    agent.close()
    for end in ends:
        end.close()


def test_a_connection_that_is_given_back_goes_to_the_request_that_waits_longest(pool):
    one, two = pool.acquire(), pool.acquire()
    waiting = [gevent.spawn(pool.acquire), gevent.spawn(pool.acquire)]
    gevent.sleep(0)
    assert pool.used == 2
    pool.release(one)
    assert waiting[0].get(timeout=30) is one
    pool.discard(two)
    fresh = waiting[1].get(timeout=30)
    assert fresh is not two
    assert pool.used == 2
    pool.release(fresh)
    pool.release(one)
    assert pool.used == 0


def test_a_greenlet_that_is_killed_while_it_waits_leaves_no_trace(pool):
    one, _ = pool.acquire(), pool.acquire()
    waiting = gevent.spawn(pool.acquire)
    gevent.sleep(0)
    waiting.kill()
    pool.release(one)
    assert pool.used == 1
    assert pool.acquire() is one


def test_a_greenlet_that_is_killed_when_just_called_gives_its_place_back(pool):
    one, two = pool.acquire(), pool.acquire()
    waiting = gevent.spawn(pool.acquire)
    gevent.sleep(0)
    pool.release(one)  # it is called, and has not run yet
    waiting.kill()
    if waiting.value is one:
        pool.discard(one)  # it was faster
    pool.discard(two)
    assert pool.used == 0
    assert pool.empty


def test_no_request_waits_for_ever(pool):
    pool.acquire(), pool.acquire()
    pool.limits.connect_timeout = 0.01
    with pytest.raises(PoolExhausted, match="all 2 connections are in use"):
        pool.acquire()
    assert pool.used == 2


def test_a_connection_that_is_too_old_carries_no_further_request(pool, monkeypatch):
    pool.limits.max_age = 100
    now = [0.0]
    monkeypatch.setattr(pool, "clock", lambda: now[0])
    one = pool.acquire()
    now[0] = 99.0
    pool.release(one)
    assert pool.acquire() is one
    now[0] = 100.0
    pool.release(one)
    assert pool.empty
    pool.limits.max_age = None


def test_a_thread_that_asks_ever_new_targets_keeps_few_connections(monkeypatch):
    ends = []

    def connect(dialer, seconds):
        near, far = _socket.socketpair()
        ends.append((near, far))
        return dialer.runtime.open(near)

    def ask():
        agent = agents.Agent(idle_timeout=30)
        for second in range(200):
            pool = agent.pool(parse_target(second + 1), DialSettings())
            pool.clock = lambda: now[0]
            pool.release(pool.acquire())
            now[0] += 1
        opened.append(sum(near.fileno() >= 0 for near, _ in ends))

    now, opened = [0.0], []
    monkeypatch.setattr(Dialer, "connect", connect)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(30)
    for end in ends:
        end[0].close(), end[1].close()
    assert opened[0] < 100


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("timeout=5", 4),
        ("max=100, timeout=5", 4),
        ("TIMEOUT=1", 0.5),
        ("timeout=600", 30),
        ("max=5", 30),
        ("", 30),
    ],
)
def test_an_idle_connection_is_kept_no_longer_than_its_target_does(pool, said, seconds):
    head = f"HTTP/1.1 200 OK\r\nKeep-Alive: {said}\r\nContent-Length: 0\r\n\r\n".encode()
    parse_response_head(pool, head, False)
    assert pool.idle_timeout == seconds
    parse_response_head(pool, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", False)
    assert pool.idle_timeout == 30


def test_a_shorter_time_counts_for_connections_that_are_idle_already(pool):
    one = pool.acquire()
    pool.release(one)
    pool.keep_idle(0.02)
    with gevent.Timeout(20):
        while not pool.empty:
            gevent.sleep(0.005)


def test_a_connection_that_its_target_closes_while_idle_is_closed_here(pool):
    link = pool.acquire()
    pool.release(link)
    assert not pool.empty
    link.stream.sock.shutdown(2)
    for _ in range(100):
        gevent.sleep(0.01)
        if pool.empty:
            break
    assert pool.empty
