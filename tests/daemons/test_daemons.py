"""Daemons: one process for the whole application, its life, its sockets, its output, its end."""

import os
import re
import signal
import socket
import time

import pytest
from conditions import wait_for
from daemon_site import HEAD, Site, daemons, gone, hup, job, lives, pid_of, starts, supervisor_of, workers_of
from free_ports import free_range
from http_client import fetch, pids_answering, refused
from processes import PROGRAMS, descriptors, require

from gunicorn_passenger.daemons.requested import RequestedDaemons
from gunicorn_passenger.daemons.spec import build_spec
from gunicorn_passenger.daemons.supervised_process import SupervisedProcess
from gunicorn_passenger.daemons.supervisor_loop import Supervisor
from gunicorn_passenger.errors import DaemonError

# --- with any worker class, by the hooks alone -------------------------------------------------------


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent", "gunicorn_passenger.Worker"])
def test_one_daemon_for_the_whole_application(start, port, worker):
    site = Site(start, worker, workers=3)
    process = site.run(f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port})").wait_ready()
    pid = pid_of(process, "jobs")
    assert {job(port) for _ in range(5)} == {f"done work {pid}"}
    process.wait_log(rf"\[jobs\] jobs on {port} as")
    assert len(pids_answering(process.socket, 3)) == 3  # gunicorn's own listener is served as ever
    assert starts(process, "jobs") == 1
    supervisor = supervisor_of(process)
    assert process.stop() == 0
    gone(pid, supervisor)
    assert refused(port)
    assert not os.path.exists(process.socket)
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("left_out", ["nworkers_changed", "on_starting", "when_ready"])
def test_hooks_run_once_and_the_users_own_run_too(site, left_out):
    """The user may have hooks by the same names; one of ours is enough."""
    names = [
        name for name in ("on_starting", "when_ready", "on_reload", "on_exit", "pre_exec") if name != left_out
    ]
    two = ["pre_fork", "post_fork", "child_exit", "worker_exit"]
    lines = ["passenger.spawn(daemon_jobs.sleep)"]
    lines += [f"def {name}(server): print('hook {name}', flush=True)" for name in names]
    lines += [f"def {name}(server, worker): print('hook {name}', flush=True)" for name in two]
    if left_out != "nworkers_changed":
        lines += ["def nworkers_changed(server, new, old): print('hook nworkers_changed', flush=True)"]
    process = site.run("\n".join(lines)).wait_ready()
    first = pid_of(process, "sleep")
    hup(process)
    assert process.stop() == 0
    gone(first)
    log = process.log()
    for name in names[:-1]:
        assert log.count(f"hook {name}\n") == 1, name
    assert log.count("hook child_exit\n") == 4
    assert starts(process, "sleep") == 1


def test_a_hook_may_ask_for_a_daemon(site):
    process = site.run("def when_ready(server): passenger.spawn(daemon_jobs.sleep, name='late')").wait_ready()
    first = pid_of(process, "late")
    hup(process)
    assert lives(first)  # it does not ask again, and means it still
    assert starts(process, "late") == 1


def test_without_the_hooks_the_log_says_what_is_missing(start):
    site = Site(start, head=HEAD.partition("\n")[2])
    process = site.run("passenger.spawn(daemon_jobs.sleep)").wait_ready()
    process.wait_log(
        r"ERROR.*spawn\(\) was called, but nothing starts the daemons: add 'from gunicorn_passenger"
    )
    assert process.log().count("nothing starts the daemons") == 1


def test_a_worker_of_another_class_may_ask(site):
    process = site.run("", env={"SPAWN": "spawn('sleep 1000')"}).wait_ready()
    assert lives(pid_of(process, "sleep"))
    assert process.stop() == 0


def test_without_the_hooks_a_worker_of_another_class_cannot_ask(start):
    site = Site(start, head=HEAD.partition("\n")[2])
    process = site.run("", env={"SPAWN": "spawn('sleep 5')"})
    assert process.wait_end() != 0
    assert "has no channel to the master: add 'from gunicorn_passenger.hooks import" in process.log()


def test_the_sockets_and_the_channel_are_not_the_workers(site, port):
    process = site.run(f"passenger.spawn('sleep 1000', listen={port})").wait_ready()
    pid_of(process, "sleep")
    hup(process)  # workers of now were forked while the master held all of it

    def sockets_of(pid):
        return {link for link in descriptors(pid) if link.startswith("socket:")}

    (shared,) = set.intersection(*(sockets_of(pid) for pid in (process.pid, *workers_of(process))))
    for pid in workers_of(process):
        assert sockets_of(pid) & sockets_of(process.pid) == {shared}  # gunicorn's listener


def test_a_daemon_has_its_sockets_and_nothing_of_the_masters(site, port):
    process = site.run(
        f"passenger.spawn(daemon_jobs.descriptors, listen=['127.0.0.1:{port}', 'auto'])\n"
        "passenger.spawn(daemon_jobs.environment, name='env', env={'COLOUR': 'red'}, cwd='/usr')\n"
    ).wait_ready()
    process.wait_log(r"\[descriptors\] descriptors \[0, 1, 2, 3, 4\]")
    text = process.wait_log(r"\[env\] environment (\{.*\}) (\S+) ").groups()
    assert text[1] == "/usr"
    found = eval(text[0])
    assert found.pop("COLOUR") == "red"
    assert found.pop("PASSENGER_DAEMON") == "env"
    assert found.pop("HOME") == str(site.start.home)
    assert found.pop("USER") == os.environ.get("USER")
    assert set(found.values()) == {None}


# --- asked for by the workers ------------------------------------------------------------------------


def test_workers_ask_and_share_one(start, port):
    spawning = f"jobs = spawn(daemon_jobs.service, args=['made'], name='jobs', listen={port})"
    process = start.gunicorn("daemon_app", workers=4, env={"SPAWN": spawning}).wait_ready()
    assert {job(port) for _ in range(4)} == {f"made work {pid_of(process, 'jobs')}"}
    pids_answering(process.socket, 4)
    assert starts(process, "jobs") == 1
    assert fetch(process.socket, "/jobs")[1] == f"<Daemon 'jobs' ('127.0.0.1', {port})>"
    hup(process, 4)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    wait_for(lambda: len(workers_of(process)) == 4, "a new worker")
    assert starts(process, "jobs") == 1
    assert process.stop() == 0
    assert refused(port)


def test_a_function_of_the_module_that_asks(start, port):
    """The daemon imports the module, which asks for a daemon and opens a port: it does neither there."""
    process = start.gunicorn("daemon_app", env={"LOCAL": port}).wait_ready(port)
    process.wait_log(r"\[local\] local \d+ \(1,\)")
    assert starts(process, "local") == 1
    assert len(pids_answering(port, 2)) == 2
    assert "in use" not in process.log()


def test_auto_is_told_to_every_worker(start):
    first = free_range(3)
    env = {
        "SPAWN": "jobs = spawn(daemon_jobs.service, listen='auto')",
        "PASSENGER_PORTS": f"{first}-{first + 2}",
    }
    process = start.gunicorn("daemon_app", env=env).wait_ready()
    pid = pid_of(process, "service")
    for _ in range(4):
        assert fetch(process.socket, "/jobs")[1] == f"<Daemon 'service' ('127.0.0.1', {first + 2})>"
    assert job(first + 2) == f"done work {pid}"


def test_preload_asks_in_the_master(start, port):
    spawning = f"spawn(daemon_jobs.service, listen={port})"
    process = start.gunicorn("daemon_app", "--preload", env={"SPAWN": spawning}).wait_ready()
    pid = pid_of(process, "service")
    hup(process)
    assert job(port) == f"done work {pid}"
    assert starts(process, "service") == 1


def test_one_that_no_worker_wants_any_more_is_stopped(start, home, port):
    conf = start.write(
        "gunicorn.conf.py", "import gunicorn_passenger\ngunicorn_passenger.configure(grace_period=1)\n"
    )
    wants = start.write(
        "wants.py", f"spawn(daemon_jobs.service, listen={port}, name='jobs')\nspawn('sleep 1000')\n"
    )
    process = start.gunicorn("daemon_app", "-c", conf, env={"SPAWN": wants}).wait_ready()
    pid, other = pid_of(process, "jobs"), pid_of(process, "sleep")
    start.write("wants.py", "spawn('sleep 1000')\n")
    hup(process)
    process.wait_log("Stopping the daemon jobs: no worker has used it for 1 s")
    process.wait_log("Daemon jobs has stopped")
    gone(pid)
    wait_for(lambda: refused(port), "the port to close")
    assert lives(other)
    assert starts(process, "sleep") == 1


def test_workers_that_ask_differently_after_a_reload(start):
    wants = start.write("wants.py", "spawn('sleep 1000', name='it')\n")
    process = start.gunicorn("daemon_app", env={"SPAWN": wants}).wait_ready()
    pid = pid_of(process, "it")
    pids_answering(process.socket, 2)
    start.write("wants.py", "spawn('sleep 2000', name='it')\n")
    os.kill(workers_of(process)[0], signal.SIGTERM)
    # the program has changed, and the reload is still to come
    process.wait_log(r"WARNING.*worker \d+ requests the daemon it with other arguments than earlier workers")
    assert len(pids_answering(process.socket, 2)) == 2
    assert lives(pid)
    hup(process)
    other = pid_of(process, "it", 2)
    gone(pid)
    with open(f"/proc/{other}/cmdline") as file:
        assert file.read() == "sleep\x002000\0"


# --- output ------------------------------------------------------------------------------------------


def test_output_comes_line_by_line_under_its_name(site):
    process = site.run("passenger.spawn(daemon_jobs.talk, name='talker', give_up_after=1)").wait_ready()
    process.wait_log("Daemon talker is not started again")
    log = process.log()
    lines = [line.partition("[talker] ")[2] for line in log.splitlines() if "[talker] " in line]
    assert lines[:4] == ["first line", "to stderr", "in two parts", r"\x1b[31mred\x1b[0m\xff"]
    assert lines[-1] == "no end of line"
    assert "".join(lines[4:-1]) == "y" * 10000
    assert re.search(r"\[INFO\] \[talker\] first line", log)


@pytest.mark.parametrize("flood", ["daemon_jobs.flood", "'yes xxx', name='flood'"])
def test_a_flood_waits_and_disturbs_no_other_daemon(site, flood):
    process = site.run(f"passenger.spawn({flood})\npassenger.spawn('sleep 1000')").wait_ready()
    process.wait_log(r"\[flood\] xxx", 20000)
    supervisor = supervisor_of(process)

    def memory(pid):
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    before = memory(supervisor), memory(process.pid)
    hup(process)
    assert daemons(site.start, process)["sleep"]["state"] == "running"
    process.wait_log(r"\[flood\] xxx", 60000)
    assert memory(supervisor) - before[0] < 4096, "kB more"
    assert memory(process.pid) - before[1] < 8192, "kB more"
    assert "broker hangs" not in process.log()
    assert process.stop() == 0


def test_short_lines_come_in_small_packets():
    """The master logs a packet in one go."""
    said = []
    program = Supervisor.__new__(Supervisor)
    program.send_event = said.append
    program.forward_lines(SupervisedProcess("key", {}, [], None), [b"y"] * 1050)
    assert [len(packet["lines"]) for packet in said] == [100] * 10 + [50]


def test_what_counts_is_how_long_its_first_process_has_lived():
    """Not how long those took to end that it has left behind."""
    said = []
    program = Supervisor.__new__(Supervisor)
    program.send_event, program.daemons = said.append, {}
    daemon = program.daemons["key"] = SupervisedProcess("key", {"give_up_after": 2}, [], None)
    now = time.monotonic()
    for _ in range(2):
        daemon.status, daemon.started, daemon.ended = 0, now - 60.0, now - 59.5
        program.on_all_exited(daemon)
    assert [message["event"] for message in said] == ["exited", "exited", "given_up"]
    assert said[0]["lived"] == 0.5


def test_what_cannot_be_killed_is_left_alone(monkeypatch):
    said = []
    program = Supervisor.__new__(Supervisor)
    program.send_event, program.daemons = said.append, {}
    daemon = program.daemons["key"] = SupervisedProcess("key", {"give_up_after": 0}, [], None)
    daemon.pid, daemon.kill_at, daemon.stopped_for_good = 1 << 30, 100.0, True
    monkeypatch.setattr(daemon, "processes", lambda: [1 << 30])
    program.check_exited(daemon, 100.0)
    program.check_exited(daemon, 104.0)
    assert [message["event"] for message in said] == ["killing"]
    assert program.daemons
    program.check_exited(daemon, 105.5)
    assert [(message["event"], message.get("count")) for message in said[1:]] == [
        ("stuck", 1),
        ("stopped", None),
    ]
    assert not program.daemons


def test_a_hook_may_ask_again():
    requested = RequestedDaemons()
    spec = build_spec("sleep 1", name="one")
    for _ in range(2):
        requested.add_persistent(spec, True)
    assert requested.all() == [(spec, True)]
    with pytest.raises(DaemonError, match="one"):
        requested.add_persistent(spec.replace(stop_timeout=2.0), True)


# --- real programs -----------------------------------------------------------------------------------


def test_a_node_program_takes_the_socket(site, port):
    node = require("node")
    process = site.run(
        f"passenger.spawn([{node!r}, {str(PROGRAMS / 'daemon_node.js')!r}], name='socketio', listen={port})"
    ).wait_ready()
    process.wait_log(rf"\[socketio\] node listens on port {port}")
    pid = pid_of(process, "socketio")
    assert fetch(port)[1] == str(pid)
    os.kill(pid, signal.SIGKILL)
    assert fetch(port)[1] == str(pid_of(process, "socketio", 2))  # a client that connects meanwhile waits
    assert process.stop() == 0
    assert refused(port)


def test_redis_on_an_allocated_port(site, port):
    redis = require("redis-server")
    process = site.run(
        f"passenger.spawn('{redis} --port {port} --save \"\" --dir {site.start.home}', name='redis')",
        env={"PASSENGER_PORTS": port},
    ).wait_ready()
    process.wait_log(r"\[redis\] .*Ready to accept connections")
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.sendall(b"SET answer 42\r\nGET answer\r\n")
        reader = client.makefile("rb")
        assert [reader.readline() for _ in range(3)] == [b"+OK\r\n", b"$2\r\n", b"42\r\n"]
    assert process.stop() == 0
    assert refused(port)
    assert re.search(r"\[redis\] .*Redis is now ready to exit", process.log())


# --- plain Python ------------------------------------------------------------------------------------


def test_plain_python_has_it_as_a_child(start, port):
    script = start.write(
        "plain.py",
        f"""
        import sys
        import daemon_jobs
        import gunicorn_passenger as passenger
        daemon = passenger.spawn(daemon_jobs.service, name="jobs", listen={port})
        print(daemon, flush=True)
        sys.stdin.read() if len(sys.argv) < 2 else __import__("time").sleep(1000)
        """,
    )
    process = start.python(script, "stay")
    process.wait_log(rf"<Daemon 'jobs' \('127.0.0.1', {port}\)>")
    process.wait_log(rf"\[jobs\] jobs on {port}")
    pid = int(job(port).split()[-1])
    process.signal(signal.SIGKILL)
    process.wait_end()
    gone(pid)
    wait_for(lambda: refused(port), "the supervisor to end")
    process = start.python(script)  # its standard input is empty: it ends at once, and the daemon with it
    assert process.wait_end() == 0
    assert refused(port)
