"""An exception in a callback of the event loop costs one connection of the proxy, and is logged once."""

import _socket
import ast
import contextlib
from pathlib import Path

import gevent
import pytest
from gevent.event import Event
from open_descriptors import open_descriptors
from websocket_frames import frame
from werkzeug.wrappers import Request

from gunicorn_passenger.http import faults
from gunicorn_passenger.proxy import agent as agents
from gunicorn_passenger.proxy import mirror, tunnel
from gunicorn_passenger.proxy.dial import Dialer, DialSettings
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.target import parse_target
from gunicorn_passenger.proxy.tunnel import Tunnel, tls_bridge
from gunicorn_passenger.proxy.upstream_io import GeventStream, _TimedWait, runtime

UNEXPECTED = RuntimeError("unexpected\n[CRITICAL] forged")


def fail(*_):
    raise UNEXPECTED


class Broken:
    """Another object, of which some methods raise."""

    def __init__(self, real, *names):
        self.real = real
        self.names = names

    def __getattr__(self, name):
        return fail if name in self.names else getattr(self.real, name)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Nothing reaches the hub itself, no descriptor stays, and the test ends."""
    hub = gevent.get_hub()
    reached = []
    monkeypatch.setattr(hub, "handle_error", lambda *error: reached.append(error))
    runtime()
    before = open_descriptors()
    with gevent.Timeout(30):
        yield hub
    assert reached == []
    assert open_descriptors() <= before


@pytest.fixture
def logged(caplog):
    """Shows that the error is logged once, on one line beside its traceback."""

    def check():
        # the hub leaves the line to a greenlet
        until(lambda: any("Unexpected" in record.getMessage() for record in caplog.records))
        lines = [record.getMessage() for record in caplog.records]
        (line,) = [line for line in lines if "Unexpected" in line]
        assert line.startswith("Unexpected error: proxy: ")
        assert line.endswith(" was closed")
        assert "forged" not in line
        assert caplog.records[-1].exc_info

    faults._seen.clear()
    yield check
    faults._seen.clear()


@pytest.fixture
def pairs():
    """Makes connected sockets; the far ends are closed with the test."""
    with contextlib.ExitStack() as stack:

        def pair():
            near, far = _socket.socketpair()
            stack.callback(far.close)
            near.setblocking(False)
            far.setblocking(False)
            return near, far

        yield pair


def until(condition):
    while not condition():
        gevent.sleep(0.001)


def ended(far):
    """Whether the other end is shut."""
    try:
        while far.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def received(far, count):
    came = b""
    while len(came) < count:
        with contextlib.suppress(BlockingIOError):
            came += far.recv(65536)
        gevent.sleep(0.001)
    return came


# --- streams -----------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_sent_keeps_no_other_from_it(pairs, logged):
    ends = [pairs() for _ in range(3)]
    streams = [GeventStream(near, runtime()) for near, _ in ends]
    streams[1].sock = Broken(ends[1][0], "send")
    for stream in streams:
        runtime().send_at_end_of_iteration(stream, b"request")
    gevent.sleep(0)
    assert [received(far, 7) for _, far in ends[::2]] == [b"request"] * 2
    until(lambda: ended(ends[1][1]))
    assert streams[1].recv(10) == b""  # the greenlet that waits for the response sees the end
    assert (streams[1].failed, streams[1].partially_sent) == (True, False)
    runtime().send_at_end_of_iteration(streams[0], b"another")
    assert received(ends[0][1], 7) == b"another"
    for stream in streams:
        stream.close()
    logged()


def test_the_rest_of_a_request_that_cannot_be_sent_ends_its_connection(pairs, logged):
    near, far = pairs()
    stream = GeventStream(near, runtime())
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(b"x" * 65536)
    runtime().send_at_end_of_iteration(stream, b"request")
    stream.sock = Broken(near, "send")

    class Once(Broken):
        def send(self, data):
            self.send = fail
            raise BlockingIOError

    stream.sock = Once(near)
    until(lambda: stream.flush_incomplete)
    until(lambda: ended(far))
    stream.close()
    logged()


def test_a_callback_of_an_idle_stream_that_raises_closes_it(pairs, logged):
    near, far = pairs()
    other = GeventStream(pairs()[0], runtime())
    stream = GeventStream(near, runtime())
    stream.on_unsolicited(fail)
    stream.rearm()
    far.send(b"x")
    until(lambda: ended(far))
    assert stream.sock.fileno() == -1
    assert not stream.is_quiet()
    other.close()
    logged()


def test_a_deadline_that_raises_keeps_no_other_from_it(logged):
    reached = []
    deadlines = runtime().timeouts(0.01)
    waiting = [_TimedWait(fail), _TimedWait(reached.append), _TimedWait(reached.append)]
    for one in waiting:
        deadlines.add(one)
    until(lambda: len(reached) == 2)
    logged()


def test_a_watcher_that_cannot_be_closed_leaves_no_descriptor(pairs):
    near, far = pairs()
    stream = GeventStream(near, runtime())
    real, stream._readable = stream._readable, Broken(stream._readable, "close")
    with pytest.raises(RuntimeError):
        stream.close()
    real.close()
    assert ended(far)


# --- pools -------------------------------------------------------------------------------------------


@pytest.fixture
def pool(monkeypatch, pairs):
    """A pool whose connections lead to ``far`` of their links."""

    def connect(dialer, seconds):
        near, far = pairs()
        stream = GeventStream(near, runtime())
        stream.far = far
        return stream

    monkeypatch.setattr(Dialer, "connect", connect)
    agent = agents.Agent(idle_timeout=0.02)
    yield agent.pool(parse_target(9), DialSettings())
    agent.close()


def test_an_unused_connection_that_cannot_be_looked_at_is_closed(pool, logged, monkeypatch):
    pool.limits.idle_timeout = 30
    one, two = pool.acquire(), pool.acquire()
    pool.release(one)
    pool.release(two)
    monkeypatch.setattr(one.stream, "is_quiet", fail)
    one.stream.far.send(b"x")
    until(lambda: ended(one.stream.far))
    assert pool.acquire() is two
    pool.release(two)
    logged()


def test_an_unused_connection_that_cannot_be_closed_keeps_no_other_open(pool, logged):
    one, two = pool.acquire(), pool.acquire()
    real, one.stream._readable = one.stream._readable, Broken(one.stream._readable, "close")
    pool.release(one)
    pool.release(two)
    until(lambda: pool.empty)
    assert ended(one.stream.far)
    assert ended(two.stream.far)
    real.close()
    # the timer still runs
    three = pool.acquire()
    pool.release(three)
    until(lambda: ended(three.stream.far))
    logged()


def test_a_timer_of_idle_connections_that_raises_continues(pool, logged, monkeypatch):
    one = pool.acquire()
    retire = pool.evict_expired
    calls = []

    def once():
        calls.append(1)
        if len(calls) == 1:
            fail()
        retire()

    monkeypatch.setattr(pool, "evict_expired", once)
    pool.release(one)
    until(lambda: ended(one.stream.far))
    logged()


def test_a_connection_that_cannot_be_dropped_gives_its_place_back(pool):
    one = pool.acquire()
    real, one.stream._readable = one.stream._readable, Broken(one.stream._readable, "close")
    with pytest.raises(RuntimeError):
        pool.discard(one)
    real.close()
    assert pool.empty


# --- tunnels -----------------------------------------------------------------------------------------


class Running:
    """A tunnel in a greenlet of its own."""

    def __init__(self, pairs, ws_timeout=None, query=""):
        near, self.client = pairs()
        far, self.target = pairs()
        self.ends = near, far
        self.tunnel = Tunnel(
            "http://target", lambda: Request({"QUERY_STRING": query}), ws_timeout, "close", True
        )
        self.greenlet = gevent.spawn(self.tunnel.run, near, b"", far, b"")
        until(lambda: self.tunnel._greenlet is not None and self.tunnel._up._readable.active)

    def over(self):
        self.greenlet.get()
        until(lambda: ended(self.client) and ended(self.target))

    def end(self):
        """Both ends close their connections, as they do after a Close frame."""
        self.client.shutdown(2)
        self.target.shutdown(2)
        self.over()

    def passes(self):
        self.client.send(frame(3, True))
        self.target.send(frame(3, False))
        return received(self.target, 9) == frame(3, True) and received(self.client, 5) == frame(3, False)

    def close(self):
        self.tunnel.close()
        self.greenlet.get()
        for end in self.ends:
            end.close()


@pytest.fixture
def running(pairs):
    made = []

    def run(**options):
        made.append(Running(pairs, **options))
        return made[-1]

    yield run
    for one in made:
        one.close()


def test_a_tunnel_whose_frames_cannot_be_read_ends(running, logged):
    one, other = running(), running()
    one.tunnel._up._frames = Broken(None, "feed")
    one.client.send(frame(3, True))
    one.over()
    assert other.passes()
    logged()


def test_a_tunnel_that_cannot_pass_on_ends(running, logged):
    one, other = running(), running()
    one.tunnel._down._send = fail
    one.target.send(frame(3, False))
    one.over()
    assert other.passes()
    logged()


def test_a_tunnel_that_cannot_pass_on_the_rest_ends(running, logged):
    one, other = running(), running()
    data = frame(8 << 20, False)
    sent = 0
    while one.tunnel._down._room is None or not one.tunnel._down._room.active:
        with contextlib.suppress(BlockingIOError):
            sent += one.target.send(data[sent : sent + 65536])
        gevent.sleep(0)
    one.tunnel._down._send = fail
    until(lambda: ended(one.client))
    one.over()
    assert other.passes()
    logged()


def test_a_tunnel_that_cannot_say_goodbye_ends(running, logged):
    one, other = running(), running()
    one.tunnel._up._frames = None
    one.tunnel._down._frames = type("Frames", (), {"between": property(fail)})()
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    gevent.get_hub().loop.run_callback(other.tunnel.begin_shutdown)
    one.over()
    assert received(other.client, 4) == b"\x88\x02\x03\xe9"
    logged()


UPGRADE = "EIO=4&transport=websocket&sid=a"


@pytest.fixture
def short_wait(monkeypatch):
    monkeypatch.setattr(tunnel, "_CLOSING", 0.2)


def test_an_upgrade_of_engineio_is_closed_after_the_targets_first_frame(running):
    """Its client stays without a session for ever if a Close frame comes first."""
    one = running(query=UPGRADE)
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    one.client.send(frame(6, True))
    assert received(one.target, 12) == frame(6, True)
    one.target.send(frame(6, False))
    assert received(one.client, 12) == frame(6, False) + b"\x88\x02\x03\xe9"
    one.end()


def test_a_new_session_of_engineio_is_closed_after_the_targets_second_frame(running):
    """A client of python-socketio waits a second for it, whatever comes in its place."""
    one = running(query="EIO=4&transport=websocket")
    one.target.send(frame(6, False))
    assert received(one.client, 8) == frame(6, False)
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    until(lambda: one.tunnel.shutdown_due)
    one.client.send(frame(6, True))
    assert received(one.target, 12) == frame(6, True)
    one.target.send(frame(6, False))
    assert received(one.client, 12) == frame(6, False) + b"\x88\x02\x03\xe9"
    one.end()


def test_a_new_session_without_a_second_frame_is_closed_after_a_while(running, short_wait):
    """Of a client that does not speak Socket.IO."""
    one = running(query="EIO=4&transport=websocket")
    one.target.send(frame(6, False))
    assert received(one.client, 8) == frame(6, False)
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    assert received(one.client, 4) == b"\x88\x02\x03\xe9"
    one.over()


def test_the_rest_of_a_frame_is_not_taken_for_a_close_frame(running):
    one = running(query="EIO=4&transport=websocket")
    first = b"\x81\x06123\x88\x88\x88"
    one.target.send(first[:5])
    assert received(one.client, 5) == first[:5]
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    until(lambda: one.tunnel.shutdown_due)
    one.target.send(first[5:])
    assert received(one.client, 7) == first[5:] + b"\x88\x02\x03\xe9"
    one.end()


def test_a_target_that_closes_such_an_upgrade_has_the_last_word(running):
    one = running(query=UPGRADE)
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    until(lambda: one.tunnel.shutdown_due)
    one.target.send(b"\x88\x02\x03\xe8")
    assert received(one.client, 4) == b"\x88\x02\x03\xe8"
    one.end()
    assert one.tunnel.bytes_out == 4


def test_an_upgrade_whose_target_says_nothing_ends_without_a_close_frame(running, short_wait):
    one = running(query=UPGRADE)
    gevent.get_hub().loop.run_callback(one.tunnel.begin_shutdown)
    one.over()
    assert one.tunnel.bytes_out == 0


@pytest.mark.parametrize("way", ["_up", "_down"])
def test_a_silent_tunnel_that_cannot_be_closed_ends(running, logged, way):
    one, other = running(ws_timeout=0.02), running()
    broken = getattr(one.tunnel, way)
    setattr(one.tunnel, way, Broken(broken, "close"))
    one.over()
    broken.close()
    assert other.passes()
    logged()


@pytest.mark.parametrize("side", ["recv", "send"])
def test_a_side_with_tls_that_fails_ends_the_tunnel(logged, side):
    go_on = Event()

    def recv(most):
        go_on.wait()
        if side == "recv":
            fail()
        return b""

    near, end = tls_bridge(recv, fail if side == "send" else lambda data: None, go_on.set)
    try:
        if side == "send":
            near.send(b"x")
        else:
            go_on.set()
        until(lambda: ended(near))
    finally:
        go_on.set()
        end()
    logged()


# --- copies ------------------------------------------------------------------------------------------


def test_a_copy_that_fails_leaves_nothing(pool, logged, monkeypatch):
    monkeypatch.setattr(GeventStream, "send", fail)
    mirror.MirroredRequest(parse_target(9), pool, b"GET / HTTP/1.1\r\n\r\n", 0, Options(), fail).start()
    until(lambda: not mirror._under_way)
    assert pool.empty
    logged()


def test_every_callback_of_the_loop_is_known():
    """A change that adds a callback fails here, and needs a test above."""
    found = set()
    for file in Path(tunnel.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if name.endswith((".run_callback", ".start", "gevent.spawn")) and node.args:
                    found.add((file.name, ast.unparse(node.args[0])))
    assert found == {
        ("plan.py", "group"),  # starts the health checks of a group of targets
        ("pool.py", "self._on_timer"),
        ("round_trip.py", "upstream"),  # not a callback
        ("round_trip.py", "self.upstream"),  # neither
        ("request_body.py", "self._run"),
        ("upstream_io.py", "self._send_now"),
        ("upstream_io.py", "self._send_rest"),
        ("upstream_io.py", "self._on_readable"),
        ("upstream_io.py", "function"),  # a copy
        ("upstream_io.py", "switch"),  # a greenlet that waits
        ("tunnel.py", "look"),
        ("tunnel.py", "pump"),
        ("tunnel.py", "self._on_readable"),
        ("tunnel.py", "self._on_room"),
        ("tunnel.py", "self._wake"),
        ("tunnel.py", "self._end_wait"),
        ("tunnel.py", "client_early"),  # not a callback
        ("tunnel.py", "upstream_early"),  # neither
        ("upgrade.py", "tunnel.begin_shutdown"),
    }
