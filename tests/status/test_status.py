"""What runs: the control socket, and ``gunicorn-passenger status``, ``restart`` and ``stop``."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import traceback

import pytest
from conftest import COMMAND, Client, fetch, free_port, pids_answering, refused, require, wait_for

from gunicorn_passenger import cli
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.status import control_client, control_server, terminal
from gunicorn_passenger.system import listening_sockets, runtime_dir
from gunicorn_passenger.system.text import printable

needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")


def command(start, *arguments, **env):
    """The command line in the environment of the test's programs."""
    return subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)],
        env=start.environment | env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def status(start, **env):
    done = command(start, "status", "--json", **env)
    return json.loads(done.stdout)["applications"]


def only(start):
    (application,) = status(start)
    return application


def control_socket(start, process):
    return start.home / "run" / f"{process.pid}.sock"


def ask(path, data, wait=True):
    """Send raw bytes to a control socket; all that it answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while wait and (more := sock.recv(65536)):
                received += more
        return received


def named(entries, name):
    (found,) = [entry for entry in entries if entry["name"] == name]
    return found


# --- the report --------------------------------------------------------------------------------


def test_status_json_has_everything(start):
    one, two, three = (free_port() for _ in range(3))
    allocated = f"{one},{two},{three}"
    process = start.gunicorn(
        "status_app", workers=3, env={"P1": one, "P2": two, "P3": three, "PASSENGER_PORTS": allocated, "SPAWN": one + 1}
        | {"PASSENGER_PORTS": f"{allocated},{one + 1}"},
    )  # fmt: skip
    process.wait_ready()
    pids_answering(process.socket, 3)
    for _ in range(4):
        fetch(two, "/")
    fetch(two, "/500")

    def counted():
        found = only(start)
        ready = [worker["state"] for worker in found["workers"]] == ["ready"] * 3
        up = [daemon["state"] for daemon in found.get("daemons", [])] == ["running"]
        return ready and up and named(found["servers"], "second")["requests"] == 5 and found

    found = wait_for(counted, "the counts in the report")
    assert found["pid"] == process.pid
    assert found["state"] == "running"
    assert abs(found["started"] - time.time()) < 100
    assert 5_000_000 < found["memory"] < 500_000_000
    pids = {worker["pid"] for worker in found["workers"]}
    assert pids <= set(process.workers())
    for worker in found["workers"]:
        assert worker["memory"] > 5_000_000
        assert abs(worker["started"] - time.time()) < 100
    second = named(found["servers"], "second")
    assert second["address"] == f"127.0.0.1:{two}"
    assert second["placement"] == "shared"
    assert second["accepted"] == 5
    assert second["errors"] == 1
    assert second["bytes"] > 500
    assert set(second["workers"]) == pids
    single = named(found["servers"], "single")
    assert single["placement"] == "one"
    assert len(single["workers"]) == 1
    assert f"unix:{process.socket}" in [server["address"] for server in found["servers"]]
    assert {int(port) for port in re.findall(r"\d+", found["ports"]["open"])} >= {one, two, three}
    (daemon,) = found["daemons"]
    assert daemon["name"] == "health"
    assert daemon["pid"]


def test_connections_now_and_bytes(start, port):
    process = start.gunicorn("status_app", workers=1, env={"P2": port}).wait_ready()
    client = Client(port)
    client.request("GET", "/")
    client.getresponse().read()
    wait_for(lambda: named(only(start)["servers"], "second")["connections"] == 1, "one open connection")
    client.close()
    wait_for(lambda: named(only(start)["servers"], "second")["connections"] == 0, "none open")
    assert process.stop() == 0


def test_status_table(start, port):
    process = start.gunicorn(
        "status_app", workers=2, env={"P2": port, "NAME": "naughty\x1b[31m name", "PASSENGER_PORTS": port}
    ).wait_ready()
    pids_answering(process.socket, 2)
    wait_for(lambda: [w["state"] for w in only(start)["workers"]] == ["ready"] * 2, "two ready workers")
    done = command(start, "status")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"^\S+  running for \d+ s, as user \w+", text)
    assert re.search(rf"^master +{process.pid} +running +\d+ s +\d+ MB$", text, re.M)
    for pid in process.workers():
        assert re.search(rf"^worker \d+ +{pid} +ready +\d+ s +\d+ MB$", text, re.M)
    assert re.search(rf"^naughty\\x1b\[31m name +127\.0\.0\.1:{port} +shared .*all 2$", text, re.M)
    assert f"PORTS  allocated {port}; open {port}; free none" in text
    assert "\x1b" not in text


def test_events_reload_and_crash(start):
    process = start.gunicorn("status_app", workers=2).wait_ready()
    pids_answering(process.socket, 2)
    wait_for(lambda: [w["state"] for w in only(start)["workers"]] == ["ready"] * 2, "two ready workers")
    process.hup(2)
    wait_for(lambda: [w["state"] for w in only(start)["workers"]] == ["ready"] * 2, "two ready workers")
    victim = process.workers()[0]
    os.kill(victim, signal.SIGKILL)
    kinds = wait_for(
        lambda: {"reload", "crash"} <= {event["kind"] for event in only(start)["events"]} and only(start),
        "the events",
    )
    assert kinds["totals"]["reload"] == 1, kinds["events"]
    assert kinds["totals"]["crash"] == sum(event["kind"] == "crash" for event in kinds["events"])
    (crash,) = [event["text"] for event in kinds["events"] if event["kind"] == "crash"]
    # gunicorn may have forgotten the pid already
    assert re.match(rf"worker ({victim}|number \d+) ", crash)
    text = command(start, "status").stdout
    assert "RECENT EVENTS" in text
    assert crash in text


def test_counts_of_gone_workers_stay(start, port):
    process = start.gunicorn("status_app", workers=2, env={"P2": port}).wait_ready()
    for _ in range(10):
        fetch(port)
    wait_for(lambda: named(only(start)["servers"], "second")["requests"] == 10, "ten requests")
    process.hup(2)
    fetch(port)
    wait_for(lambda: named(only(start)["servers"], "second")["requests"] == 11, "eleven requests")


def test_nothing_runs(start):
    done = command(start, "status")
    assert done.returncode == 1
    assert re.fullmatch(r"No application of account \w+ runs under gunicorn-passenger\n", done.stderr)
    assert done.stdout == ""
    done = command(start, "status", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["applications"] == []
    done = command(start, "restart", "jobs")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: no application of account \w+ runs under gunicorn-passenger\n", done.stderr)


def test_watch_without_a_terminal_prints_again(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    watching = start.python(COMMAND, "status", "--watch")
    watching.wait_log(rf"master +{process.pid} +running", 3)
    assert "\x1b" not in watching.log()
    watching.signal(signal.SIGINT)
    assert watching.wait_end() == 0
    assert "Traceback" not in watching.log()


def test_watch_on_a_terminal_redraws(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    ours, theirs = pty.openpty()
    try:
        watching = subprocess.Popen(
            [sys.executable, COMMAND, "status", "--watch"],
            env=start.environment | {"COLUMNS": "100", "LINES": "40"}, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        seen = b""
        deadline = time.monotonic() + 60
        while seen.count(b"\x1b[H") < 3:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536)
        os.kill(watching.pid, signal.SIGINT)
        assert watching.wait(30) == 0
        assert f"{process.pid}".encode() in seen
        assert b"Traceback" not in seen
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)
        os.close(theirs)


def test_watch_goes_on_when_the_application_ends(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    watching = start.python(COMMAND, "status", "--watch")
    watching.wait_log("master +")
    assert process.stop() == 0
    watching.wait_log("No application of account")
    watching.signal(signal.SIGINT)
    assert watching.wait_end() == 0


def test_a_reader_that_has_enough(start):
    start.gunicorn("status_app", workers=1).wait_ready()
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {COMMAND} status --watch | head -1"],
        env=start.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "running" in done.stdout
    assert done.stderr == ""


# --- several applications, several masters -----------------------------------------------------


def second_application(start, home, name, **env):
    return start.gunicorn(
        "status_app", "-n", name, workers=1, bind=f"unix:{home}/{name}.sock", env=env
    ).wait_ready(f"{home}/{name}.sock")


def test_several_applications(start, home):
    port, other = free_port(), free_port()
    first = second_application(start, home, "shop", P2=port)
    second = second_application(start, home, "blog", P2=other)
    assert {(a["name"], a["pid"]) for a in status(start)} == {("shop", first.pid), ("blog", second.pid)}
    text = command(start, "status").stdout
    assert "shop  running" in text
    assert "blog  running" in text

    done = command(start, "stop", "second")
    assert done.returncode == 1
    assert "'second' is in several applications: " in done.stderr
    assert f"shop (pid {first.pid})" in done.stderr
    assert "gunicorn-passenger stop second --app PID" in done.stderr
    done = command(start, "stop", "second", "--app", "nowhere")
    assert done.returncode == 1
    assert "--app nowhere: no such application; running: " in done.stderr
    done = command(start, "stop", "nothing")
    assert done.returncode == 1
    assert "no application has a server or a daemon 'nothing'" in done.stderr

    done = command(start, "stop", "second", "--app", "blog")
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout
    wait_for(lambda: refused(other), "the end of the port")
    assert fetch(port)[0] == 200
    done = command(start, "restart", f"127.0.0.1:{other}", "--app", second.pid)
    assert done.returncode == 0, done.stderr
    assert pids_answering(other, 1)


def test_restart_and_stop_a_server(start, port):
    process = start.gunicorn("status_app", workers=2, env={"P2": port}).wait_ready()
    pids_answering(port, 2)
    assert command(start, "stop", "second").returncode == 0
    wait_for(lambda: refused(port), "the end of the port")
    assert named(only(start)["servers"], "second")["state"] == "stopped"
    assert "stopped" in command(start, "status").stdout
    assert fetch(process.socket)[0] == 200
    assert command(start, "restart", "second").returncode == 0
    wait_for(lambda: not refused(port), "the port")
    pids_answering(port, 2)
    done = command(start, "restart", "nothing")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .*'nothing'.*\n", done.stderr)


def test_restart_and_stop_a_daemon(start, port):
    process = start.gunicorn("status_app", workers=2, env={"SPAWN": port}).wait_ready()

    def daemon(*states):
        found = named(only(start).get("daemons") or [{"name": "health", "state": ""}], "health")
        return found["state"] in states and found

    before = wait_for(lambda: daemon("running"), "the daemon")
    wait_for(lambda: fetch_status(port, "/health") == 200, "its answer")
    assert command(start, "restart", "health").returncode == 0
    wait_for(lambda: (found := daemon("running")) and found["pid"] != before["pid"], "another pid")
    wait_for(lambda: fetch_status(port, "/health") == 200, "its answer")
    assert command(start, "stop", "health").returncode == 0
    wait_for(lambda: daemon("stopped"), "the daemon's end")
    assert process.stop() == 0


def fetch_status(port, path):
    try:
        return fetch(port, path)[0]
    except OSError:
        return None


def test_after_usr2_each_master_has_its_own(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    before = control_socket(start, process)
    process.signal(signal.SIGUSR2)
    masters = wait_for(lambda: len(found := status(start)) == 2 and found, "two masters")
    assert process.pid in {master["pid"] for master in masters}
    (new,) = {master["pid"] for master in masters} - {process.pid}
    # roll-back, then once more and carried through
    os.kill(new, signal.SIGTERM)
    wait_for(lambda: [master["pid"] for master in status(start)] == [process.pid], "the roll-back")
    assert before.exists()
    # gunicorn ignores USR2 until it has reaped the master that it started
    wait_for(lambda: not os.path.exists(f"/proc/{new}"), "the end of the new master")
    process.signal(signal.SIGUSR2)
    masters = wait_for(lambda: len(found := status(start)) == 2 and found, "two masters")
    (new,) = {master["pid"] for master in masters} - {process.pid}
    process.signal(signal.SIGTERM)
    process.wait_end()
    assert not before.exists()
    assert only(start)["pid"] == new
    os.kill(new, signal.SIGTERM)
    wait_for(lambda: not list((start.home / "run").glob("*.sock")), "no socket left")
    wait_for(lambda: not process.session(), "the end")


# --- the socket --------------------------------------------------------------------------------


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


def test_a_socket_that_somebody_put_there_since_is_not_removed(start):
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    path.unlink()
    path.write_text("somebody's")
    assert process.stop() == 0
    assert path.read_text() == "somebody's"


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
        (b'{"command": "shutdown"}\n', "unknown command; use report, restart or stop"),
        (b'{"command": {}}\n', "unknown command; use report, restart or stop"),
        (b'{"command": "stop"}\n', "stop needs a name"),
        (b'{"command": "stop", "name": 7}\n', "stop needs a name"),
        (b'{"command": "stop", "name": "x"}\n', "'x'"),
        (b"x" * 4097, "the request is longer than 4096 bytes"),
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


# --- who may ask, and who is believed ----------------------------------------------------------


def as_nobody(function):
    """Call a function as another user, in a child; what it returns as text, or ``error <type>``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                said = str(function())
            except Exception as error:
                said = f"error {type(error).__name__}"
            os.write(write, said.encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@needs_root
def test_another_user_gets_nothing(start, home, monkeypatch):
    home.chmod(0o755)
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(home / "run"))
    assert len(control_client.find()) == 1
    assert as_nobody(control_client.find) == "[]"
    assert as_nobody(lambda: ask(path, b'{"command": "report"}\n')) == "error PermissionError"
    assert as_nobody(lambda: os.listdir(path.parent)) == "error PermissionError"
    # and even where the directory and the file let them: the kernel says who it is
    path.parent.chmod(0o755)
    path.chmod(0o666)
    assert as_nobody(lambda: ask(path, b'{"command": "report"}\n')) in ("b''", "error BrokenPipeError")
    assert as_nobody(lambda: ask(path, b'{"command": "stop", "name": "x"}\n')) in (
        "b''",
        "error BrokenPipeError",
    )
    done = subprocess.run(
        [require("setpriv"), "--reuid", "65534", "--clear-groups", require("curl"), "-s", "--max-time", "10",
         "--unix-socket", str(path), "http://x/"], capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == b""
    assert done.returncode != 0


@needs_root
def test_a_directory_of_somebody_else_is_not_believed(home, monkeypatch):
    """An attacker has made the directory in /tmp before, with a socket that lies."""
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(home / "run"))
    (home / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(home / "run" / f"{os.getpid()}.sock"))
        sock.listen()
        assert runtime_dir.directories() == [str(home / "run")]
        os.chown(home / "run", 65534, 65534)
        assert runtime_dir.directories() == []
        assert control_client.find() == []
        os.chown(home / "run", 0, 0)
        (home / "run").chmod(0o777)
        assert control_client.find() == []


@needs_root
@pytest.mark.parametrize("what", ["directory", "writable", "socket"])
def test_a_status_socket_that_somebody_else_owns(start, home, what):
    run = home / "run"
    run.mkdir(mode=0o700)
    if what == "directory":
        os.chown(run, 65534, 65534)
    elif what == "writable":
        run.chmod(0o777)
    else:
        run.rmdir()
        run.write_text("a file")
    process = start.gunicorn("status_app", workers=2).wait_ready()
    pids_answering(process.socket, 2)
    lines = [
        line for line in process.log().splitlines() if "'gunicorn-passenger status' will not find" in line
    ]
    assert len(lines) == 1
    assert "set PASSENGER_RUNTIME_DIR" in lines[0]
    assert status(start) == []
    process.hup(2)
    assert fetch(process.socket)[0] == 200
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@needs_root
def test_read_only_runtime_directory(start, home):
    """A line in the log, and the application goes on; a reload tries again."""
    run = home / "run"
    run.mkdir(mode=0o700)
    script = f'mount -t tmpfs -o ro,mode=700 tmpfs {run} && exec "$@"'
    process = start.run(
        require("unshare"), "-m", "sh", "-c", script, "sh", sys.executable,
        os.path.join(os.path.dirname(sys.executable), "gunicorn"), "-k", "gunicorn_passenger.Worker", "-w", "2",
        "--umask", "007", "-b", f"unix:{home}/app.sock", "status_app",
    ).wait_ready()  # fmt: skip
    process.wait_log("'gunicorn-passenger status' will not find this application.*Read-only file system")
    process.hup(2)
    process.wait_log("'gunicorn-passenger status' will not find this application.*Read-only file system", 2)
    assert fetch(process.socket)[0] == 200
    subprocess.run(
        [require("nsenter"), "-m", "-t", str(process.pid), "mount", "-o", "remount,rw", str(run)],
        check=True, timeout=30,
    )  # fmt: skip
    process.hup(2)
    found = subprocess.run(
        [require("nsenter"), "-m", "-t", str(process.pid), sys.executable, COMMAND, "status", "--json"],
        env=start.environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(found.stdout)["applications"][0]["pid"] == process.pid
    assert process.stop() == 0


def test_a_directory_that_cannot_be_made(start, home):
    process = start.gunicorn(
        "status_app", workers=1, env={"PASSENGER_RUNTIME_DIR": "/proc/nowhere/run"}
    ).wait_ready()
    process.wait_log("will not find this application, which runs all the same: .*cannot be made")
    assert process.stop() == 0


def test_a_path_that_is_too_long(start, home):
    process = start.gunicorn(
        "status_app", workers=1, env={"PASSENGER_RUNTIME_DIR": f"{home}/{'x' * 100}"}
    ).wait_ready()
    process.wait_log("will not find this application.*AF_UNIX path too long")
    assert process.stop() == 0


def test_found_by_itself_wherever_the_service_has_put_it(start, home):
    """The command line's environment is not that of the service."""
    process = start.gunicorn("status_app", workers=1).wait_ready()
    env = {k: v for k, v in start.environment.items() if k != "PASSENGER_RUNTIME_DIR"}
    done = subprocess.run(
        [sys.executable, COMMAND, "status", "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.pid in [application["pid"] for application in json.loads(done.stdout)["applications"]]


def test_a_master_that_does_not_answer(start):
    """It is shown, and does not keep the others from being shown."""
    process = start.gunicorn("status_app", workers=1).wait_ready()
    process.signal(signal.SIGSTOP)
    try:
        done = command(start, "status")
        assert f"pid {process.pid}: does not respond (no response within 3 s)" in done.stdout
        assert done.returncode == 0
        done = command(start, "stop", "x")
        assert done.returncode == 1
        assert f"the master with pid {process.pid} did not respond" in done.stderr
    finally:
        process.signal(signal.SIGCONT)
    assert only(start)["pid"] == process.pid


# --- the part by itself ------------------------------------------------------------------------


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
        "gunicorn-passenger: closing a client of the control socket after an internal error"
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
    assert len(client.received) <= control_server.MAX_REQUEST + 1
    ours.close()
    turn(control)
    turn(control)
    assert control._clients == {}


def test_each_round_serves_one_request(control):
    """However many arrive at once, and however fast the client reads the responses."""
    ours, theirs = socket.socketpair()
    control.watch_reports(theirs)
    count = control_server.MAX_REQUEST
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
    control.forked()
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
    assert control._broker.log.lines == ["gunicorn-passenger: stop failed"]


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


# --- text --------------------------------------------------------------------------------------


def test_sizes_times_and_numbers():
    assert [terminal._bytes(n) for n in (None, 0, 999, 1000, 9949, 31_000_000, 1.5e9, 2e15)] == [
        "-", "0 B", "999 B", "1.0 kB", "9.9 kB", "31 MB", "1.5 GB", "2000.0 TB",
    ]  # fmt: skip
    assert [terminal._duration(s) for s in (-3, 0, 59.9, 60, 3600, 86399, 90000)] == [
        "0 s", "0 s", "59 s", "1 min", "1 h 00 min", "23 h 59 min", "1 d 01 h",
    ]  # fmt: skip
    assert [terminal._number(n) for n in (None, 0, 1234, 9876543)] == ["-", "0", "1 234", "9 876 543"]
    assert terminal._cut("abcdefghij", 7) == "abc…hij"
    assert terminal._cut("abc", 1) == "…"
    assert printable("a\x1b]0;x\x07\nb\u202e") == r"a\x1b]0;x\x07\x0ab\u202e"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_longer_than_the_terminal(width):
    worker = {"pid": 4194304, "number": 12345, "started": 1.0, "state": "leaving", "memory": 987_654_321}
    workers = [dict(worker, pid=4194304 + n) for n in range(9)]
    server = {
        "name": "x" * 200, "address": "unix:/" + "y" * 100, "placement": "shared", "state": "listening",
        "connections": 99999, "accepted": 10**12, "requests": 10**12, "bytes": 10**15, "errors": 10**6,
        "workers": [w["pid"] for w in workers[:5]],
    }  # fmt: skip
    daemon = {
        "name": "d" * 100, "pid": 4194304, "state": "stopping", "address": "[::1]:65535", "started": 1.0,
        "restarts": 10**6, "command": "c" * 500, "memory": 10**9, "user": "gunicorn-user",
    }  # fmt: skip
    found = {
        "version": "0.1.0", "name": "n" * 30, "pid": 4194304, "user": "gunicorn", "started": 1.0,
        "state": "running", "memory": 10**9, "workers": workers, "servers": [server, server], "daemons": [daemon],
        "ports": {"limited": True, "allocated": "9000", "open": None, "free": "9000"},
        "events": [{"time": 1.0, "kind": "x", "text": "t" * 500}], "totals": {"x": 1},
    }  # fmt: skip
    lines = terminal.table(found, width)
    assert max(map(len, lines)) <= max(width, 110)
    assert max(map(len, lines)) <= width or width == 80


# --- directories that other users have made -----------------------------------------------------------


SCRIPT = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *_): pass

HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


@needs_root
def test_a_script_starts_although_another_user_has_the_runtime_directory(start, home):
    """gunicorn-passenger start with -b needs no such directory; without -b it says so."""
    (home / "run").mkdir(mode=0o755)
    os.chown(home / "run", 65534, 65534)
    script = start.write("server.py", SCRIPT)
    process = start.start_script(script, "-w", "1").wait_ready()
    process.wait_log("WARNING.*will not find this application.*must belong to you.*set PASSENGER_RUNTIME_DIR")
    assert process.stop() == 0
    without = start.python(COMMAND, "start", script)
    assert without.wait_end() != 0
    assert "must belong to you, and only you may write to it" in without.log()
    assert "or name another address with -b" in without.log()
    assert "Traceback" not in without.log()
    assert os.listdir(home / "run") == []


@pytest.fixture
def squatted(home, monkeypatch):
    """What another user has made where this one's runtime directory would be in /tmp."""
    path = home / f"gunicorn-passenger-{os.geteuid()}"
    monkeypatch.setattr(runtime_dir, "_in_tmp", lambda: str(path))
    monkeypatch.setattr(runtime_dir.os, "access", lambda *_: False)
    for name in ("PASSENGER_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    return path


def make_another_users(path, what):
    if what == "directory":
        path.mkdir(mode=0o755)
    elif what == "closed":
        path.mkdir(mode=0o700)
    elif what == "file":
        path.write_text("")
    elif what == "dangling":
        path.symlink_to("/nowhere")
    else:
        path.symlink_to(path.parent)
    os.chown(path, 65534, 65534, follow_symlinks=False)


@needs_root
@pytest.mark.parametrize("what", ["directory", "closed", "file", "dangling", "link"])
def test_a_directory_with_a_name_that_cannot_be_foreseen_stands_in(squatted, what):
    make_another_users(squatted, what)
    said = []
    path = runtime_dir.ensure(said.append)
    assert re.fullmatch(rf"{re.escape(str(squatted))}-[a-z0-9_]{{8}}", path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert len(said) == 1
    assert f"the runtime directory {squatted} belongs to nobody and cannot be trusted" in said[0]
    # the same one again, and the command line finds it
    assert runtime_dir.ensure() == path
    assert path in runtime_dir.directories()
    assert str(squatted) not in runtime_dir.directories()


@needs_root
def test_nobody_can_make_the_one_that_stands_in(squatted):
    make_another_users(squatted, "directory")
    evil = squatted.with_name(f"{squatted.name}-aaaaaaaa")
    make_another_users(evil, "directory")
    open_to_all = squatted.with_name(f"{squatted.name}-bbbbbbbb")
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link = squatted.with_name(f"{squatted.name}-cccccccc")
    link.symlink_to(squatted.parent)
    assert runtime_dir.ensure() not in {str(evil), str(open_to_all), str(link)}


@needs_root
def test_a_runtime_directory_below_one_of_another_users(home, monkeypatch):
    """Its owner could put another in its place while root works in it."""
    theirs = home / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    monkeypatch.delenv("PASSENGER_RUNTIME_DIR", raising=False)
    assert not runtime_dir.directory().startswith(str(theirs))
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(theirs / "run"))
    with pytest.raises(PassengerError, match=r"theirs belongs to another user, or others may write to it"):
        runtime_dir.ensure()


# --- a socket whose file another user has replaced ----------------------------------------------------


@pytest.mark.parametrize("what", ["symbolic link", "hard link", "file", "another socket"])
def test_the_file_of_a_socket_that_was_replaced_is_left_alone(home, what):
    target = home / "roots"
    target.write_text("precious")
    target.chmod(0o640)
    path = str(home / "s.sock")
    with contextlib.closing(listening_sockets.open_unix(path, 0o600, 1)):
        file = listening_sockets.inode_id(path)
        os.unlink(path)
        if what == "symbolic link":
            os.symlink(target, path)
        elif what == "hard link":
            os.link(target, path)
        elif what == "file":
            os.rename(target, path)
            target = home / "s.sock"
        else:
            other = socket.socket(socket.AF_UNIX)
            other.bind(str(target) + ".sock")
            os.link(str(target) + ".sock", path)
            other.close()
        with pytest.raises(OSError):
            listening_sockets.give(path, 65534, 65534)
        with pytest.raises(OSError), listening_sockets._own_file(path):
            pass
        listening_sockets.remove(path, file)
        assert os.path.lexists(path)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o640
    assert os.stat(target).st_uid == os.geteuid()


def test_the_file_of_a_socket_is_removed(home):
    path = str(home / "s.sock")
    with contextlib.closing(listening_sockets.open_unix(path, 0o600, 1)):
        file = listening_sockets.inode_id(path)
        listening_sockets.remove(path, None)
        listening_sockets.remove(path, (file[0], file[1] + 1))
        assert os.path.lexists(path)
        listening_sockets.remove(path, file)
        assert not os.path.lexists(path)
        listening_sockets.remove(path, file)
        listening_sockets.remove("nowhere/\0", file)


def test_the_ports_that_other_users_processes_hold_are_printed_without_control_characters(
    monkeypatch, capsys
):
    taken = {"port": 9000, "by": "evil\x1b]0;title\x07\u202e", "pid": 7, "user": "mallory"}
    found = {"account": "me", "limited": False, "taken": [taken]}
    monkeypatch.setattr(cli, "port_report", lambda: found)
    assert cli.main(["ports"]) == 0
    printed = capsys.readouterr().out
    assert r"evil\x1b]0;title\x07\u202e" in printed
    assert all(line.isprintable() for line in printed.splitlines())
