"""What runs: the control socket, and ``gunicorn-passenger status``, ``restart`` and ``stop``."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch, pids_answering, refused
from processes import COMMAND
from status_commands import command, control_socket, only, status

from gunicorn_passenger.status import terminal
from gunicorn_passenger.system.text import printable


def named(entries, name):
    (found,) = [entry for entry in entries if entry["name"] == name]
    return found


# --- the report --------------------------------------------------------------------------------------


def test_status_json_has_everything(start):
    one, two, three, spawned = (free_port() for _ in range(4))
    allocated = f"{one},{two},{three},{spawned}"
    process = start.gunicorn(
        "status_app", workers=3, env={"P1": one, "P2": two, "P3": three, "PASSENGER_PORTS": allocated, "SPAWN": spawned}
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
    # the connection stays open for as long as the command takes
    process = start.gunicorn("status_app", "--keep-alive", "600", workers=1, env={"P2": port}).wait_ready()
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


def test_watch_continues_when_the_application_ends(start):
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


# --- several applications, several masters -----------------------------------------------------------


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


# --- text --------------------------------------------------------------------------------------------


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
