"""The broker against one worker that sends whatever it likes, both in this process."""

import array
import contextlib
import gc
import json
import logging
import math
import os
import select
import signal
import socket
import struct
import threading
import time

import pytest
from conditions import wait_for
from free_ports import free_port
from gunicorn.config import Config
from gunicorn.sock import TCPSocket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_descriptors import open_descriptors, wait_closed

from gunicorn_passenger import errors
from gunicorn_passenger.config.port_allocation import PortAllocation, parse_ports
from gunicorn_passenger.ipc import channel, messages, scoreboard
from gunicorn_passenger.master import descriptors, upgrade_state
from gunicorn_passenger.master import loop as loop_module
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.service import BrokerService
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels
from gunicorn_passenger.status import report
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.text import MAX_NAME, escape_error_log, printable


class Log:
    """gunicorn's logger, as far as the master needs it: its error log is escaped on the way out."""

    def __init__(self):
        self.lines = lines = []

        class Keep(logging.Handler):
            def emit(self, record):
                lines.append(self.format(record))

        self.error_log = logging.Logger("gunicorn.error")
        handler = Keep()
        handler.setFormatter(logging.Formatter("%(message)s"))
        self.error_log.addHandler(handler)
        escape_error_log(self)

    def __getattr__(self, name):
        return getattr(self.error_log, name)

    def grep(self, text):
        return [line for line in self.lines if text in line]


class Workers:
    """A broker with workers that are ends of channels in this process."""

    def __init__(self):
        self.log = Log()
        self.cfg = Config()
        self.broker = Broker(self.log, [], self.cfg, report.build)
        self.broker.listeners.allocation = PortAllocation("me")
        self.ends = {}
        self.number = 0

    def add(self, age, ready=True):
        ours, theirs = channel.pair()
        ours.setblocking(False)
        with self.broker.locked():
            self.broker.workers.add(WorkerChannel(age, ours, scoreboard.Scoreboard(), ready=ready))
        self.broker.loop.start()
        theirs.settimeout(30)
        self.ends[age] = theirs
        return theirs

    def ask(self, age, type, /, fd=None, **fields):
        """Send a message with whatever is in it, and receive the answer."""
        self.number += 1
        data = json.dumps({"v": 1, "type": type, "id": self.number, **fields}).encode()
        return self.exchange(age, data, [] if fd is None else [fd], self.number)

    def exchange(self, age, data, fds=(), number=None):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.ends[age].sendmsg([data], rights)
        while True:
            message, fds = channel.receive(self.ends[age])
            for fd in fds:
                os.close(fd)
            # grants come by themselves
            if isinstance(
                message, messages.AcceptGranted | messages.SuccessorReady | messages.AssignConnections
            ):
                continue
            if number is None or message.id == number:
                return message

    def open(self, age, name="", **fields):
        return self.ask(age, "OpenPort", **{"kind": "auto", "host": "127.0.0.1", "name": name, **fields})

    def report(self, age):
        answer = self.ask(age, "GetReport")
        assert isinstance(answer, messages.ReportSent), answer
        with self.broker.locked():
            return self.broker.report()

    def lives(self, age):
        return self.broker.workers.by_age(age) is not None

    def close(self):
        for end in self.ends.values():
            end.close()
        wait_for(lambda: not self.broker.workers.ages(), "the broker to see that its workers are gone")
        with self.broker.locked():
            for key in list(self.broker.listeners.ports):
                self.broker.listeners.close(key, True)
            # the thread ends as if the process did: an exception that nothing catches, and no revival
            self.broker.loop._restart = lambda: setattr(self.broker.loop, "running", False)
            self.broker.loop._run_once = end_of_thread
        self.broker.wake()
        wait_for(lambda: not self.broker.loop.running, "the end of the thread")
        self.broker.placement.upgrade_lock.close()
        os.close(self.broker.loop._wake_read)
        os.close(self.broker.loop._wake_write)


def end_of_thread():
    raise SystemExit


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(loop_module, "_FAILURE_PAUSE", 0.001)  # close() ends the loop with a failure
    made = Workers()
    made.add(1)
    yield made
    made.close()


# --- descriptors --------------------------------------------------------------------------------------


def sendable(kind):
    """A descriptor of this kind, and what must stay open with it."""
    if kind == "pipe":
        read, write = os.pipe()
        os.close(write)
        return read
    if kind == "file":
        return os.open(__file__, os.O_RDONLY)
    if kind == "epoll":
        poll = select.epoll()
        fd = os.dup(poll.fileno())
        poll.close()
        return fd
    if kind == "memfd":
        return os.memfd_create("test")
    if kind == "listening":
        sock = socket.create_server(("127.0.0.1", 0))
    elif kind == "udp":
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    elif kind == "seqpacket":
        sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.close()
    elif kind == "netlink":
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    else:
        sock, other = socket.socketpair()
        other.close()
    return sock.detach()


KINDS = ["pipe", "file", "epoll", "memfd", "listening", "udp", "seqpacket", "netlink", "pair"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "message", ["OfferConnections", "WorkerReady", "GetReport", "PortOpened", "nonsense"]
)
def test_no_descriptor_of_a_worker_stays_open_in_the_master(workers, kind, message):
    workers.add(2)
    workers.report(1)
    before = open_descriptors()
    for _ in range(20):
        fd = sendable(kind)
        data = {"v": 1, "type": message, "id": 1000, "key": "primary", "addrs": '[["127.0.0.1", 5]]'}
        keep = {"OfferConnections": ("key", "addrs"), "PortOpened": ("key",)}.get(message, ())
        data = {key: value for key, value in data.items() if key in ("v", "type", "id", *keep)}
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        workers.ends[1].sendmsg([json.dumps(data).encode()], rights)
        os.close(fd)
        if message == "OfferConnections" and kind == "pair":
            break  # it was passed on: worker 2 has it now
    workers.report(1) if message != "OfferConnections" else None
    if not (message == "OfferConnections" and kind == "pair"):
        wait_closed(before)
    assert workers.lives(1)
    assert workers.lives(2)


def lingering():
    """A TCP socket whose ``close`` waits: it lingers, and its client does not take what was sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.getsockname())
        sock, _ = server.accept()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    return client, sock


@pytest.mark.parametrize("how", ["OfferConnections", "WorkerReady", "two", "unread", "nested"])
def test_a_socket_that_lingers_does_not_hold_the_master_up(workers, how):
    # it does not serve, so nothing is passed on to it, and the last reference is the broker's
    workers.add(2, ready=False)
    client, sock = lingering()
    try:
        # the broker waits meanwhile, so that the last reference is not this test's to close
        with workers.broker.locked():
            if how == "nested":
                # it lies in the queue of a UNIX socket that is sent
                outer, inner = socket.socketpair()
                with outer:
                    send_last(outer, {}, sock)
                send_last(
                    workers.ends[1], {"type": "OfferConnections", "key": "primary", "addrs": "[null]"}, inner
                )
            elif how == "OfferConnections":
                send_last(
                    workers.ends[1], {"type": "OfferConnections", "key": "primary", "addrs": "[null]"}, sock
                )
            else:
                send_last(workers.ends[1], {"type": "WorkerReady"}, sock, twice=how == "two")
            if how == "unread":
                # it is thrown away with the channel
                workers.broker._dispatcher.close_channel(workers.broker.workers.by_age(1))
        began = time.monotonic()
        assert "pid" in workers.report(2)
        assert time.monotonic() - began < 20
        assert workers.lives(2)
    finally:
        # what waits is let go
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    wait_for(lambda: not descriptors._busy, "the socket to be closed")


def send_last(end, fields, sock, twice=False):
    """Send a message with a socket that this process has no longer."""
    data = json.dumps({"v": 1, "id": 7, **fields}).encode()
    fds = array.array("i", [sock.fileno()] * (2 if twice else 1))
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    sock.close()


def test_a_worker_whose_descriptors_cannot_be_closed_loses_its_channel(workers, monkeypatch):
    workers.add(2)
    monkeypatch.setattr(descriptors, "MAX_WAITING", 3)
    monkeypatch.setattr(descriptors, "STALL_TIMEOUT", 0.1)
    held = [lingering() for _ in range(4)]
    try:
        with workers.broker.locked():
            for _, sock in held:
                send_last(
                    workers.ends[1], {"type": "OfferConnections", "key": "primary", "addrs": "[null]"}, sock
                )
        wait_for(lambda: not workers.lives(1), "the end of the channel")
        assert workers.log.grep("the master cannot close the descriptors that worker")
        assert workers.lives(2)
        assert "pid" in workers.report(2)
    finally:
        for client, _ in held:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
    wait_for(lambda: not descriptors._busy, "the sockets to be closed")


def test_a_worker_waits_while_the_master_closes_what_it_has_sent(workers, monkeypatch):
    """The closing thread may get no processor for a while: the worker keeps its channel, and what it asks for
    is done afterwards."""
    workers.add(2)
    monkeypatch.setattr(descriptors, "MAX_WAITING", 3)
    closer = workers.broker.workers.by_age(1).closer
    start = closer._start
    monkeypatch.setattr(closer, "_start", lambda: None)
    for _ in range(3):
        send_last(
            workers.ends[1],
            {"type": "OfferConnections", "key": "primary", "addrs": "[null]"},
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        )
    wait_for(lambda: closer.full, "the descriptors to wait")
    channel.send(workers.ends[1], messages.GetReport(9))
    wait_for(lambda: 1 not in ages_read(workers), "the master not to read the channel")
    assert "pid" in workers.report(2)
    assert unpatched.is_readable(workers.broker.workers.by_age(1).sock.fileno())
    monkeypatch.setattr(closer, "_start", start)  # at the end it closes the channel
    start()
    wait_for(lambda: not unpatched.is_readable(workers.broker.workers.by_age(1).sock.fileno()), "the request")
    assert workers.lives(1)
    assert not workers.log.lines
    wait_for(lambda: not descriptors._busy, "the descriptors to be closed")


def test_when_a_sender_is_cut_off(monkeypatch):
    """A master that was stopped for a minute has closed nothing meanwhile; the sender is not at fault."""
    monkeypatch.setattr(descriptors, "MAX_WAITING", 1)
    closer = descriptors.Closer()
    monkeypatch.setattr(closer, "_start", lambda: None)
    closer.close(sendable("udp"))
    assert closer.full
    assert not closer.stalled(1000.0)
    assert not closer.stalled(1060.0)
    moments = [1060.0 + 0.02 * n for n in range(260)]
    assert [closer.stalled(now) for now in moments].index(True) in range(230, 250)
    closer._closing_for = 0.0  # as when one is closed, and the next is waited for
    assert not closer.stalled(2000.0)
    for now in (2000.0 + 0.02 * n for n in range(1500)):
        closer._closing_for = 0.0
        cut_off = closer.stalled(now)
    assert cut_off
    closer._run()
    assert not closer.full


def ages_read(workers):
    """The workers whose channels the master reads."""
    with workers.broker.locked():
        table = workers.broker.workers
        return {table.by_fd(fd).age for fd in table.fds_to_read()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pair"])
def test_only_connected_stream_sockets_are_connections(kind):
    fd = sendable(kind)
    assert not descriptors.is_connection(fd)
    os.close(fd)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert descriptors.is_connection(ours.fileno())
        assert ours.fileno() >= 0


# --- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["shared", "each"])
def test_many_ranges_cost_no_memory(workers, placement):
    import tracemalloc

    within = ("1-65535," * 500)[:4000].rstrip(",-0123456789") + ",1-65535"
    tracemalloc.start()
    try:
        for _ in range(3):
            workers.open(1, within=within, placement=placement)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_a_worker_waits_for_a_limited_number_of_ports(workers, monkeypatch):
    monkeypatch.setattr(workers.broker.listeners, "open_each", lambda *_: None)  # none is free
    for number in range(64):
        opened = workers.open(1, f"server {number}", placement="each", port=9000 + number)
        assert isinstance(opened, messages.PortOpened)
        assert not opened.granted
    denied = workers.open(1, "one more", placement="each", port=9064)
    assert isinstance(denied, messages.RequestDenied)
    assert "already waits for 64 ports of servers with the placement 'each'" in denied.text


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(0, 300)), max_size=30))
def test_ranges_are_merged(pairs):
    ranges = [(low, min(65535, low + more)) for low, more in pairs]
    text = ",".join(f"{low}-{high}" for low, high in ranges)
    assert parse_ports(text, "test") == {n for low, high in ranges for n in range(low, high + 1)}


def test_a_number_that_is_too_long_is_a_setting_error():
    with pytest.raises(errors.SettingError, match="cannot read"):
        parse_ports("9" * 5000, "test")


def test_a_name_that_is_too_long_is_refused(workers):
    answer = workers.open(1, "n" * (MAX_NAME + 1))
    assert isinstance(answer, messages.RequestDenied)
    assert f"has {MAX_NAME + 1} characters, but {MAX_NAME} are allowed" in answer.text
    assert "listen(..., name=...)" in answer.text
    assert isinstance(workers.open(1, "n" * MAX_NAME), messages.PortOpened)


def test_one_worker_does_not_get_all_ports(workers, monkeypatch):
    workers.add(2)
    monkeypatch.setattr(WorkerChannels, "planned", 2)
    monkeypatch.setattr(Listeners, "limit", staticmethod(lambda: 8))
    opened = [workers.open(1, f"server {n}") for n in range(6)]
    assert all(isinstance(answer, messages.PortOpened) for answer in opened)
    refused = workers.open(1, "one more")
    assert (
        refused.text
        == "this worker already has 6 ports, which is the limit for one worker; close some servers"
    )
    # those that it has given back, and that stay for the grace period, count
    for answer in opened:
        workers.ends[1].send(json.dumps({"v": 1, "type": "ReleasePort", "id": 0, "key": answer.key}).encode())
    assert isinstance(workers.open(1, "one more"), messages.RequestDenied)
    assert isinstance(workers.open(2, "another's"), messages.PortOpened)


NAMES = ["\ud800", "a\udcffb", "two\nlines", "\x1b]0;title\x07", "\u202egnp.exe", "\x9b31m", "\U000e0001"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_unprintable_characters_is_escaped_everywhere(workers, name):
    answer = workers.open(1, name)
    assert isinstance(answer, messages.PortOpened)
    workers.broker.workers.by_age(1).ready = False  # its first message of that kind is the one that counts
    workers.ends[1].send(json.dumps({"v": 1, "type": "WorkerReady", "id": 0, "primary": name}).encode())
    report = workers.report(1)
    (server,) = [server for server in report["servers"] if server["address"] == answer.key]
    assert server["name"] == printable(name)
    assert all(text.isprintable() for text in strings(report))
    json.dumps(report, ensure_ascii=False).encode()
    with workers.broker.locked():
        assert workers.broker.workers.primary_name == printable(name)
        # the name as it is shown, and as the program has it
        assert "stopped" in workers.broker.command("stop", server["name"])
        with pytest.raises(errors.PassengerError):
            workers.broker.command("stop", name + "x")
        assert all(text.isprintable() for text in strings(workers.broker.report()))
    fault = workers.ask(1, "BootFailure", text=f"it failed: {name}")
    assert isinstance(fault, messages.BootVerdict)
    assert all(line.isprintable() for line in workers.log.lines), workers.log.lines


def strings(value):
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", ["/tmp/\ud800", "/tmp/" + "x" * 200, "relative", "/tmp/a\0b"])
def test_a_path_that_is_not_valid_is_refused(workers, path):
    answer = workers.ask(1, "OpenPort", kind="unix", path=path)
    assert isinstance(answer, messages.RequestDenied)
    assert all(line.isprintable() for line in workers.log.lines)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 16000,
        b'{"v":1,"type":"OfferConnections","id":1,"key":"primary","addrs":"' + b"[" * 4000 + b'"}',
        b'{"v":1,"type":"SpawnDaemon","id":1,"spec":"' + b"[" * 4000 + b'"}',
        b'{"v":1,"type":"GetReport","id":' + b"9" * 5000 + b"}",
        b'{"v":1e999,"type":"GetReport","id":NaN}',
        b'{"v":1,"type":["GetReport"],"id":1}',
        b'{"v":1,"type":{"a":1},"id":[]}',
        b'{"v":1,"type":"OpenPort","id":1,"kind":{}}',
        b'{"v":1,"type":"OpenPort","id":true,"kind":"tcp"}',
        b"\xff\xfe[",
        b'"\\ud800"',
    ],
)
def test_json_that_is_hard_to_read(workers, data):
    workers.add(2)
    answer = workers.exchange(1, data)
    assert isinstance(answer, messages.PacketRejected | messages.OfferSettled | messages.RequestDenied)
    assert workers.lives(1)
    assert not workers.log.grep("failed")


def test_a_mistake_of_ours_costs_one_worker_its_channel(workers, monkeypatch):
    workers.add(2)

    def fail(*_):
        raise ZeroDivisionError("a mistake of ours\nERROR forged line")

    monkeypatch.setattr(workers.broker.placement, "on_accept_paused", fail)
    for _ in range(3):
        with contextlib.suppress(OSError):
            workers.ends[1].send(b'{"v":1,"type":"AcceptPaused","id":0,"key":"x"}')
    assert workers.ends[1].recv(10) == b""
    assert isinstance(workers.open(2, "another's"), messages.PortOpened)
    (line,) = workers.log.grep("internal error while handling the message AcceptPaused of worker number 1")
    assert "ZeroDivisionError: a mistake of ours" in line
    assert workers.broker.loop.running


@pytest.fixture
def bind(workers):
    """A bind of gunicorn's beside the primary's own."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        listener = TCPSocket(sock.getsockname(), workers.cfg, workers.log, fd=os.dup(sock.fileno()))
        with workers.broker.locked():
            workers.broker.listeners.register(listener, True)
        number = sock.getsockname()[1]
        yield number
        with workers.broker.locked():
            workers.broker.listeners.ports.pop(f"127.0.0.1:{number}").listener.close()


def listening_on(port):
    return {"kind": "tcp", "host": "127.0.0.1", "port": port}


@pytest.mark.parametrize("for_good", [True, False])
def test_the_master_decides_whether_the_primary_or_a_server_has_a_bind(workers, bind, for_good):
    """Another thread of the worker may ask for it while the worker becomes ready."""
    key = f"127.0.0.1:{bind}"
    workers.add(2, ready=False)
    kept = workers.ask(1, "KeepBind", key=key, for_good=for_good)
    assert isinstance(kept, messages.Acknowledged)
    # a class of gunicorn's own serves the primary there from now on; ours can stop
    late = workers.open(1, **listening_on(bind))
    assert isinstance(late, messages.RequestDenied if for_good else messages.PortOpened), late
    # a worker whose own server has it
    assert isinstance(workers.open(2, **listening_on(bind)), messages.PortOpened)
    assert isinstance(workers.ask(2, "KeepBind", key=key, for_good=for_good), messages.RequestDenied)


def test_a_worker_keeps_only_binds_in_mind(workers, bind):
    for n in range(100):
        workers.ask(1, "KeepBind", key=f"127.0.0.1:{n}", for_good=True)
    opened = workers.open(1)
    workers.ask(1, "KeepBind", key=opened.key, for_good=True)
    assert workers.broker.workers.by_age(1).primary_binds == {}


def test_a_worker_is_ready_once(workers):
    """Else a hostile worker fills the channel of one that drains, and that loses it."""
    workers.add(2, ready=False)
    workers.ask(1, "WorkerLeaving")
    for _ in range(3):
        workers.ends[2].send(b'{"v":1,"type":"WorkerReady","id":0,"primary":"app","serves_primary":true}')
    workers.report(2)  # all three were read
    workers.ends[1].setblocking(False)
    told = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            told += isinstance(channel.receive(workers.ends[1])[0], messages.SuccessorReady)
    assert told == 1


class Failing(BrokerService):
    """A service that fails whatever it is asked."""

    def __init__(self, fd):
        self.fd = fd
        self.calls = []

    def descriptors(self):
        return {self.fd: select.POLLIN}

    def serve(self, fd, events):
        self.fail("serve")

    def tick(self, now):
        self.fail("tick")

    def message(self, age, message):
        self.fail("message")

    def left(self, age):
        self.fail("left")

    def fail(self, name):
        self.calls.append(name)
        raise ZeroDivisionError("a mistake of ours")


def test_a_service_that_fails_keeps_no_worker_waiting(workers):
    read, write = os.pipe()
    service = Failing(read)
    try:
        os.write(write, b"x")
        workers.broker.loop.add(service)
        for number in range(5):
            assert isinstance(workers.open(1, f"server {number}"), messages.PortOpened)
        assert {"serve", "tick"} <= set(service.calls)
        assert workers.log.grep("internal error in Failing; it continues")
        assert not workers.log.grep("internal error in the port broker")
    finally:
        with workers.broker.locked():
            workers.broker.loop.services.remove(service)
        os.close(read)
        os.close(write)


def test_a_report_that_fails_costs_no_worker_its_channel(workers, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(workers.broker, "_build_report", fail)
    assert isinstance(workers.ask(1, "GetReport"), messages.RequestDenied)
    assert workers.lives(1)


# --- whatever is sent ---------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["primary", "auto", "tcp", "unix", "", "127.0.0.1", "[" * 3000]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
#: by the annotation of a field
right = {"str": texts, "int": st.integers(-5, 70000), "bool": st.booleans()}


@st.composite
def packets(draw):
    """A packet: bytes, or a message of which some fields are as they should be."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(min_size=1, max_size=200))
    kind = draw(st.sampled_from(sorted(messages.Message.types)))
    fields = {"v": 1, "type": kind, "id": draw(st.integers(0, 1000))}
    for name, annotation in messages.Message.types[kind].fields.items():
        if name != "id":
            wrong = draw(st.integers(0, 9)) == 0
            fields[name] = draw(values if wrong else right[annotation])
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)):
        if draw(st.booleans()):
            fields[name] = draw(values)
    if fields.get("kind") == "unix":
        fields["kind"] = "tcp"  # nothing is to be made on the disk
    return json.dumps(fields).encode()[: channel.MAX_MESSAGE + 100]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(packets(), st.lists(st.sampled_from([None, *KINDS]), max_size=3)), min_size=1, max_size=6
    )
)
def test_whatever_a_worker_sends_the_broker_continues(several):
    workers = THE_BROKER[0]
    before = open_descriptors()
    workers.add(2)
    workers.log.lines.clear()
    end = workers.ends[2]
    end.setblocking(False)
    try:
        for data, kinds in several:
            fds = [sendable(kind) for kind in kinds if kind is not None]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                end.sendmsg([data], rights)
            except OSError:
                pass  # its channel is closed
            finally:
                for fd in fds:
                    os.close(fd)
    finally:
        end.close()
    wait_for(lambda: not workers.lives(2), "the end of the worker")
    del workers.ends[2]
    with workers.broker.locked():
        for key in list(workers.broker.listeners.ports):
            workers.broker.sync.close_port(workers.broker.listeners.ports[key])
    assert "pid" in workers.report(1)
    assert workers.broker.loop.running
    failed = [line for line in workers.log.lines if "failed" in line or "Traceback" in line]
    assert not failed, failed
    assert all(line.isprintable() for line in workers.log.lines), workers.log.lines
    wait_closed(before)


THE_BROKER = []


@pytest.fixture(autouse=True, scope="module")
def the_broker():
    """The one that the test above uses for all of its examples."""
    made = Workers()
    made.add(1)
    THE_BROKER[:] = [made]
    yield
    gc.collect()
    made.close()


# --- numbers ------------------------------------------------------------------------------------------


def test_whatever_a_worker_writes_on_its_board_stays_a_number(workers):
    worker = workers.broker.workers.by_age(1)
    answer = workers.open(1, "counted")
    words = worker.scoreboard._words
    for index in range(len(words)):
        words[index] = (1 << 64) - 1
    for _ in range(3):
        report = workers.report(1)
        (server,) = [server for server in report["servers"] if server["address"] == answer.key]
        assert server["requests"] == scoreboard._LIMIT
        assert all(0 <= n <= scoreboard._LIMIT and not math.isnan(n) for n in numbers(report))
    # and what stays of it when the worker is gone
    workers.add(2)
    workers.ends.pop(1).close()
    wait_for(lambda: not workers.lives(1), "its end")
    assert all(0 <= n <= scoreboard._LIMIT for n in numbers(workers.report(2)["servers"]))


def numbers(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("count", [-1, -(1 << 70), 1 << 64, 1 << 200])
def test_a_count_that_has_no_place_on_the_board(count):
    one = scoreboard.Scoreboard()
    one.write(1, scoreboard.Counters(count, 2, 3, 4, 5))
    assert 0 <= one.read(1).connections <= scoreboard._LIMIT
    assert one.read(1).accepted == 2
    one.close()


# --- the next master ----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(upgrade_state, "_state", [])


@pytest.mark.usefixtures("fresh")
def test_the_state_goes_through_a_file_in_memory():
    state = {"ports": {"open": [[f"127.0.0.1:{n}", "n" * 2000] for n in range(1024)], "stopped": []}}
    environ = {}
    before = open_descriptors()
    upgrade_state.export(environ, 40, state)
    (number,) = environ.values()
    assert int(number) >= 40
    assert os.get_inheritable(int(number))
    assert len(number) < 10
    assert upgrade_state.inherited(environ) == state
    assert environ == {}
    assert open_descriptors() <= before


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("number", ["", "x", "-1", "1", "99999999999999999999", "0", "³"])
def test_a_variable_that_is_not_a_state_is_left_alone(number):
    before = open_descriptors()
    assert upgrade_state.inherited({upgrade_state.VARIABLE: number}) == {}
    assert open_descriptors() <= before


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("content", [b"", b"[" * 100000, b"[]", b'{"version": 2, "ports": {}}', b"\xff"])
def test_a_state_that_cannot_be_read_is_ignored(content):
    fd = os.memfd_create(upgrade_state._NAME)
    os.write(fd, content)
    assert upgrade_state.inherited({upgrade_state.VARIABLE: str(fd)}) == {}
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_child_closes_what_its_parent_has_not_closed_yet():
    """Or the client of a connection that was handed on would wait for an end that never comes."""
    closer = descriptors.Closer()
    ours, theirs = socket.socketpair()
    with closer._lock:
        closer._waiting.append((ours.fileno(), descriptors._open_file(ours.detach())))
        descriptors._busy.add(closer)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(read, 1)
        os._exit(0)
    try:
        closer._run()
        theirs.settimeout(60)
        assert theirs.recv(1) == b""
    finally:
        os.write(write, b"x")
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
        theirs.close()


def test_a_child_does_not_close_a_number_that_was_reused():
    """The closing thread may be between its ``close`` and the note that it is done: the number is free, and the
    next file of the master gets it, for example the heartbeat file of the worker that is forked next."""
    closer = descriptors.Closer()
    number = os.open("/dev/null", os.O_RDONLY)
    closer._waiting.append((number, "socket:[1]"))
    descriptors._busy.add(closer)
    try:
        pid = os.fork()
        if not pid:
            signal.alarm(60)
            while closer._runs or closer._waiting:
                time.sleep(0.01)
            os._exit(0 if descriptors._open_file(number) == "/dev/null" else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        descriptors._busy.discard(closer)
        os.close(number)


def test_a_pipe_is_closed_at_once():
    closer = descriptors.Closer()
    fd = sendable("pipe")
    closer.close(fd)
    with pytest.raises(OSError):
        os.fstat(fd)
    assert not closer._runs


def test_threads_of_the_closer_end():
    closer = descriptors.Closer()
    before = open_descriptors()
    for _ in range(50):
        closer.close(sendable("udp"))
    wait_for(lambda: not closer._runs, "the thread to end")
    wait_closed(before)
    assert threading.active_count() < 50
    assert free_port()
