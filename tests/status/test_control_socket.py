"""The control socket of the master."""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import time

import pytest
from conditions import wait_for
from http_client import fetch
from processes import require
from status_commands import ask, control_socket, only, status

from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.status import control_server

# --- the socket --------------------------------------------------------------------------------------


def test_modes_and_end(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert process.stop() == 0
    assert not path.exists()


def test_a_killed_masters_socket_is_removed(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    process.signal(signal.SIGKILL)
    process.wait_end()
    wait_for(lambda: not process.session(), "the end of its workers")
    assert path.exists()
    assert status(start) == []
    assert not path.exists()


def test_a_start_removes_what_killed_masters_have_left(start):
    run = start.home / "run"
    run.mkdir(mode=0o700)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(run / f"{dead.pid}.sock"))
    (run / f"{dead.pid}.txt").touch()
    (run / "name.sock").touch()
    process = start.gunicorn("status_app", workers=1).wait_ready()
    assert {entry.name for entry in run.iterdir()} == {f"{process.pid}.sock", f"{dead.pid}.txt", "name.sock"}


def test_a_socket_that_another_program_has_put_there_is_not_removed(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    path.unlink()
    path.write_text("of another program")
    assert process.stop() == 0
    assert path.read_text() == "of another program"


def test_a_removed_socket_comes_back_with_a_reload(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    path.unlink()
    assert status(start) == []
    process.hup(1)
    assert only(start)["pid"] == process.pid
    assert process.stop() == 0
    assert not path.exists()


def test_one_line_in_one_line_out(start):
    path = control_socket(start, start.gunicorn("status_app", workers=1).wait_ready())
    answer = ask(path, b'{"command": "report"}\n')
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    assert json.loads(answer)["report"]["workers"]


@pytest.mark.parametrize(
    ("request_line", "error"),
    [
        (b"\n", "a request is one line with a JSON object"),
        (b"GET / HTTP/1.1\r\n", "a request is one line with a JSON object"),
        (b"[" * 4000 + b"\n", "a request is one line with a JSON object"),
        (b'["report"]\n', "a request is one line with a JSON object"),
        (b'{"command": "shutdown"}\n', "unknown command; use report, restart, stop, publish or subscribe"),
        (b'{"command": {}}\n', "unknown command; use report, restart, stop, publish or subscribe"),
        (b'{"command": "stop"}\n', "stop needs a name"),
        (b'{"command": "publish", "topic": "x"}\n', "publish needs a topic and data"),
        (b'{"command": "stop", "name": 7}\n', "stop needs a name"),
        (b'{"command": "stop", "name": "x"}\n', "'x'"),
        (
            b"x" * (control_server.MAX_REQUEST + 1),
            f"the request is longer than {control_server.MAX_REQUEST} bytes",
        ),
        (b"\xff\xfe\n", "a request is one line with a JSON object"),
    ],
)
def test_bad_requests(start, request_line, error):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    assert error in json.loads(ask(path, request_line))["error"]
    assert only(start)["pid"] == process.pid
    assert "Traceback" not in process.log()


def test_clients_that_do_nothing_are_let_go(start):
    """More than are served at a time, silent ones and ones that do not read: a report comes all the same."""
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    idle = []
    try:
        for number in range(control_server.MAX_CLIENTS * 2):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(30)
            sock.connect(str(path))
            if number % 2:
                sock.sendall(b'{"command": "rep')
            idle.append(sock)
        assert fetch(process.socket)[0] == 200
        assert idle[0].recv(1) == b""  # after PATIENCE seconds
        answer = wait_for(lambda: ask(path, b'{"command": "report"}\n'), "a report")
        assert json.loads(answer)["report"]["pid"] == process.pid
    finally:
        for sock in idle:
            sock.close()
    wait_for(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) < 60, "the master's descriptors")


def test_a_client_that_does_not_read_is_let_go(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock.connect(str(control_socket(start, process)))
        sock.sendall(b'{"command": "report"}\n')
        assert only(start)["pid"] == process.pid


def test_no_descriptor_for_a_client(start):
    """EMFILE in the master: said once, no busy loop, and over when there are descriptors again."""
    conf = start.write(
        "g.conf.py",
        """
        import resource
        def when_ready(server):
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        """,
    )
    process = start.gunicorn("status_app", "-c", conf, workers=1).wait_ready()
    path = control_socket(start, process)
    used = {int(fd) for fd in os.listdir(f"/proc/{process.pid}/fd")}
    subprocess.run(
        [require("prlimit"), f"--nofile={min(set(range(1000)) - used)}:", "--pid", str(process.pid)],
        check=True,
        timeout=30,
    )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(path))
        sock.sendall(b'{"command": "report"}\n')
        process.wait_log(
            r"the control socket cannot accept connections: Too many open files; raise the limit"
        )
        ticks = cpu_ticks(process.pid)
        assert fetch(process.socket)[0] == 200
        subprocess.run(
            [require("prlimit"), "--nofile=1024:", "--pid", str(process.pid)], check=True, timeout=30
        )
        assert json.loads(sock.makefile().readline())["report"]["pid"] == process.pid
    assert cpu_ticks(process.pid) - ticks < 50
    assert process.log().count("the control socket cannot accept") == 1


def cpu_ticks(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# --- the part by itself ------------------------------------------------------------------------------


class Log:
    def __init__(self):
        self.lines = []

    def warning(self, text, *args):
        self.lines.append(text % args)

    error = exception = warning


class Broker:
    """Stands for the broker."""

    def __init__(self):
        self.log = Log()
        self.asked = 0
        self.told = []

    def report(self):
        self.asked += 1
        return {"pid": os.getpid(), "size": "x" * 300000}

    def command(self, verb, name):
        if name == "broken":
            raise RuntimeError("no")
        if name == "missing":
            raise PassengerError("there is none")
        self.told.append((verb, name))
        return f"{verb} {name}"


def turn(control, seconds=0.05):
    """One round of the broker's loop."""
    poll = select.poll()
    for fd, wanted in control.descriptors().items():
        poll.register(fd, wanted)
    for fd, events in poll.poll(seconds * 1000):
        control.serve(fd, events)
    return control.tick(time.monotonic())


def read_line(control, sock):
    sock.setblocking(False)
    received = b""
    deadline = time.monotonic() + 30
    while not received.endswith(b"\n"):
        assert time.monotonic() < deadline
        turn(control)
        with contextlib.suppress(BlockingIOError):
            received += sock.recv(4096)
    return json.loads(received)


@pytest.fixture
def control(home, monkeypatch):
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(home / "run"))
    control = control_server.ControlServer(Broker())
    control.open()
    yield control
    control.stop()


def test_a_persistent_connection_has_many_requests_and_only_reports(control):
    ours, theirs = socket.socketpair()
    control.watch_reports(theirs)
    for count in (1, 2, 3):
        ours.sendall(b'{"command": "report"}\n')
        assert read_line(control, ours)["report"]["pid"] == os.getpid()
        assert control._broker.asked == count
    ours.setblocking(True)
    ours.sendall(b'{"command": "stop", "name": "x"}\n{"command": "report"}\n')
    first = read_line_exactly(control, ours)
    assert first == {"error": "stop is not allowed on this connection, which is for reports"}
    assert read_line(control, ours)["report"]
    assert control._broker.told == []
    ours.close()
    turn(control)
    assert control._clients == {}


def test_descriptors_that_come_with_a_request_are_closed(control):
    """Also one whose close waits, and those with a request that is never read."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    control.watch_reports(theirs)
    for count in (1, 2):
        read, write = os.pipe()
        socket.send_fds(ours, [b'{"command": "report"}\n'], [read, write])
        os.close(read)
        os.close(write)
        if count == 1:
            assert read_line(control, ours)["report"]["pid"] == os.getpid()
    control._drop(next(iter(control._clients.values())))
    ours.close()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) == before, "all descriptors to be closed")


def test_a_client_that_triggers_an_internal_error_is_closed(control, monkeypatch):
    ours, theirs = socket.socketpair()
    control.watch_reports(theirs)

    def fail(*_):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(control, "_respond", fail)
    ours.sendall(b'{"command": "report"}\n')
    wait_for(lambda: (turn(control), not control._clients)[1], "the end of the client")
    assert control._broker.log.lines == [
        "gunicorn-passenger: internal error in the control socket; the client's connection is closed"
    ]
    assert ours.recv(10) == b""
    ours.close()


def read_line_exactly(control, sock):
    received = b""
    deadline = time.monotonic() + 30
    sock.setblocking(False)
    while not received.endswith(b"\n"):
        assert time.monotonic() < deadline
        turn(control)
        with contextlib.suppress(BlockingIOError):
            received += sock.recv(1)
    return json.loads(received)


def test_a_persistent_connection_that_is_not_read_sends_no_further_request(control):
    """One response is kept for it, however many requests it sends."""
    ours, theirs = socket.socketpair()
    control.watch_reports(theirs)
    ours.setblocking(False)
    sent = 0
    for _ in range(3000):
        try:
            sent += ours.send(b'{"command": "report"}\n' * 100)
        except BlockingIOError:
            turn(control, 0)
    assert control._broker.asked < 10
    (client,) = control._clients.values()
    assert len(client.received) <= control_server.MAX_PERSISTENT_REQUEST + 1
    ours.close()
    turn(control)
    turn(control)
    assert control._clients == {}


def test_each_round_serves_one_request(control):
    """However many arrive at once, and however fast the client reads the responses."""
    ours, theirs = socket.socketpair()
    control.watch_reports(theirs)
    count = control_server.MAX_PERSISTENT_REQUEST
    ours.sendall(b"\n" * count)
    received = b""
    turns = 0
    ours.setblocking(False)
    while received.count(b"\n") < count:
        turn(control)
        turns += 1
        assert turns < 3 * count
        with contextlib.suppress(BlockingIOError):
            received += ours.recv(1 << 20)
        assert received.count(b"\n") <= turns
    assert {json.loads(line)["error"] for line in received.splitlines()} == {
        "a request is one line with a JSON object"
    }
    ours.close()
    turn(control)


def test_persistent_connections_are_limited(control):
    pairs = []
    with pytest.raises(OSError, match="which is the limit"):
        for _ in range(control_server.MAX_PERSISTENT + 1):
            pairs.append(socket.socketpair())
            control.watch_reports(pairs[-1][1])
    assert len(control._clients) == control_server.MAX_PERSISTENT
    control.forked(upgrades=False)
    assert control._clients == {}
    assert control.descriptors() == {}
    for ours, _ in pairs:
        ours.close()


def test_what_fails_in_the_broker_is_an_answer(control, home):
    path = home / "run" / f"{os.getpid()}.sock"
    for name, error in (
        ("missing", "there is none"),
        ("broken", "stop failed in the master; see its error log"),
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(json.dumps({"command": "stop", "name": name}).encode() + b"\n")
            assert read_line(control, sock) == {"error": error}
    assert control._broker.log.lines == ["gunicorn-passenger: internal error in the command stop"]


def test_a_client_has_so_many_seconds(control, home, monkeypatch):
    monkeypatch.setattr(control_server, "PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(home / "run" / f"{os.getpid()}.sock"))
        turn(control)
        assert len(control._clients) == 1
        assert turn(control) is not None
        wait_for(lambda: turn(control) is None, "the end of its time")
        assert control._clients == {}
        assert sock.recv(1) == b""


def test_more_clients_than_are_served_wait(control, home):
    path = str(home / "run" / f"{os.getpid()}.sock")
    clients = [socket.socket(socket.AF_UNIX) for _ in range(control_server.MAX_CLIENTS + 3)]
    for sock in clients:
        sock.connect(path)
    for _ in range(len(clients) * 2):
        turn(control, 0)
    assert len(control._clients) == control_server.MAX_CLIENTS
    for sock in clients[: control_server.MAX_CLIENTS]:
        sock.close()
    clients[-1].sendall(b'{"command": "report"}\n')
    assert read_line(control, clients[-1])["report"]
    for sock in clients:
        sock.close()


def test_credentials_are_asked_of_the_kernel(control, monkeypatch):
    ours, theirs = socket.socketpair()
    assert control_server._may_ask(theirs)
    fake = struct.pack("iII", os.getpid(), 65534, 0)
    monkeypatch.setattr(socket, "SO_PEERCRED", socket.SO_PEERCRED)

    class Lying:
        def getsockopt(self, *_):
            return fake

    assert not control_server._may_ask(Lying())
    ours.close()
    theirs.close()
