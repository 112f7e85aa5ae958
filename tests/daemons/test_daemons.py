"""Daemons: one process for the whole application, its life, its sockets, its output, its end."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import time

import pytest
from conftest import (
    COMMAND,
    GUNICORN,
    NO_CONTROL,
    PROGRAMS,
    answers,
    descriptors,
    fetch,
    free_port,
    free_range,
    pids_answering,
    refused,
    require,
    wait_for,
)

from gunicorn_passenger.daemons import supervisor
from gunicorn_passenger.daemons.requested import RequestedDaemons
from gunicorn_passenger.daemons.run_as import resolve_run_as
from gunicorn_passenger.daemons.spec import DaemonSpec, SpawnArguments, build_spec
from gunicorn_passenger.errors import DaemonError

HEAD = "from gunicorn_passenger.hooks import *\nimport gunicorn_passenger as passenger\nimport daemon_jobs\n"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")


def lives(pid):
    """Whether a process is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(*pids):
    wait_for(lambda: not any(lives(pid) for pid in pids), lambda: [pid for pid in pids if lives(pid)])


def pid_of(process, name, count=1):
    """The pid of a daemon when it has been started for the ``count``-th time."""
    return int(process.wait_log(rf"Daemon {name} runs as pid (\d+)", count).group(1))


def starts(process, name):
    return len(re.findall(rf"Daemon {name} runs as pid", process.log()))


def children(process):
    """The children of a master, whichever of its threads has started them."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/task/{thread}/children") as file:
                found += [int(pid) for pid in file.read().split()]
    return found


def supervisor_of(process):
    def find():
        for pid in children(process):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"daemons/supervisor.py" in file.read():
                    return pid
        return None

    return wait_for(find, "a supervisor")


def workers_of(process):
    found = []
    for pid in children(process):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"daemons/supervisor.py" not in file.read():
                found.append(pid)
    return found


def hup(process, workers=2):
    before = set(workers_of(process))
    process.signal(signal.SIGHUP)
    wait_for(
        lambda: len(workers_of(process)) == workers and not before & set(workers_of(process)),
        lambda: f"the reload; log:\n{process.log()[-3000:]}",
    )


def job(port, text="work"):
    with socket.create_connection(("127.0.0.1", port), 30) as client, client.makefile("rw") as stream:
        stream.write(text + "\n")
        stream.flush()
        return stream.readline().strip()


def daemons(start, process):
    """What ``gunicorn-passenger status`` tells, by name."""
    env = {**start.environment, "PASSENGER_RUNTIME_DIR": str(start.home / "run")}
    done = subprocess.run([COMMAND, "status", "--json"], env=env, capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    found = report if isinstance(report, dict) and "daemons" in report else None
    if found is None:
        listed = report["applications"] if isinstance(report, dict) else report
        found = next(app for app in listed if app["pid"] == process.pid)
    return {daemon["name"]: daemon for daemon in found["daemons"]}


def command(start, verb, name):
    return subprocess.run(
        [COMMAND, verb, name], env=start.environment, capture_output=True, text=True, timeout=60
    )


class Site:
    """gunicorn with a configuration file that spawns, and any worker class."""

    def __init__(self, start, worker="sync", workers=2, app="daemon_app", head=HEAD):
        self.start, self.worker, self.workers, self.app, self.head = start, worker, workers, app, head

    def configure(self, text):
        return self.start.write("gunicorn.conf.py", self.head + text)

    def run(self, text, *arguments, **options):
        conf = self.configure(text)
        return self.start.python(
            GUNICORN, "-k", self.worker, "-w", self.workers, "-c", conf, "-b", f"unix:{self.start.home}/app.sock",
            *arguments, self.app, **options,
        )  # fmt: skip


@pytest.fixture
def site(start):
    return Site(start)


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


def test_a_worker_of_another_class_cannot_ask(site):
    process = site.run("", env={"SPAWN": "spawn('sleep 5')"})
    assert process.wait_end() != 0
    assert "was called in a worker that has no channel to the master: run gunicorn with -k" in process.log()


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
        assert fetch(process.socket, "/jobs")[1] == f"<Daemon 'service' ('127.0.0.1', {first})>"
    assert job(first) == f"done work {pid}"


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


# --- reloads -----------------------------------------------------------------------------------------


def test_a_reload_keeps_restarts_changes_adds_and_drops(site):
    process = site.run(
        "passenger.spawn('sleep 1000', name='kept')\n"
        "passenger.spawn('sleep 1000', name='fresh', on_reload='restart')\n"
        "passenger.spawn('sleep 1000', name='changed')\n"
        "passenger.spawn('sleep 1000', name='dropped')\n"
    ).wait_ready()
    before = {name: pid_of(process, name) for name in ("kept", "fresh", "changed", "dropped")}
    site.configure(
        "passenger.spawn('sleep 1000', name='kept')\n"
        "passenger.spawn('sleep 1000', name='fresh', on_reload='restart')\n"
        "passenger.spawn('sleep 1001', name='changed')\n"
        "passenger.spawn('sleep 1000', name='added')\n"
    )
    hup(process)
    pid_of(process, "fresh", 2)
    pid_of(process, "changed", 2)
    pid_of(process, "added")
    gone(before["fresh"], before["changed"], before["dropped"])
    assert lives(before["kept"])
    assert set(daemons(site.start, process)) == {"kept", "fresh", "changed", "added"}
    assert starts(process, "kept") == 1


def test_a_port_stays_open_while_its_daemon_restarts(site, port):
    text = (
        f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port}, on_reload='restart', args=['%s'])"
    )
    process = site.run(text % "one").wait_ready()
    pid_of(process, "jobs")
    assert job(port).startswith("one")
    site.configure(text % "two")
    hup(process)
    assert not refused(port)
    pid = pid_of(process, "jobs", 2)
    wait_for(lambda: job(port) == f"two work {pid}", "the new one to answer")
    assert process.log().count(f"Opened 127.0.0.1:{port}") == 1


def test_a_reload_that_cannot_be_had_leaves_the_daemon_as_it_was(site):
    process = site.run("passenger.spawn('sleep 1000', name='it')").wait_ready()
    pid = pid_of(process, "it")
    site.configure("passenger.spawn('/no/such/command', name='it')")
    hup(process)
    process.wait_log(
        r"ERROR.*daemon 'it': the command '/no/such/command' does not exist.*; the daemon is unchanged"
    )
    assert lives(pid)
    assert process.log().count("/no/such/command") == 1


# --- death -------------------------------------------------------------------------------------------


def test_a_dead_daemon_is_started_again(site, port):
    process = site.run(f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port})").wait_ready()
    os.kill(pid_of(process, "jobs"), signal.SIGKILL)
    process.wait_log(r"Daemon jobs was killed by SIGKILL; it is started again in 0.1 s")
    assert job(port) == f"done work {pid_of(process, 'jobs', 2)}"
    assert daemons(site.start, process)["jobs"]["restarts"] == 1


def test_pauses_grow_and_it_is_given_up(site, port):
    process = site.run(
        f"passenger.spawn(['sh', '-c', 'exit 3'], name='quick', listen={port}, give_up_after=5)"
    ).wait_ready()
    process.wait_log(
        r"Daemon quick is not started again: it has exited 5 times in a row within seconds; .*restart quick"
    )
    pauses = re.findall(
        r"Daemon quick exited with status 3; it is started again in ([\d.]+) s", process.log()
    )
    assert pauses == ["0.1", "0.2", "0.4", "0.8"]
    assert starts(process, "quick") == 5
    assert daemons(site.start, process)["quick"]["state"] == "failed"
    assert refused(port)  # nobody would ever answer
    done = command(site.start, "restart", "quick")
    assert done.returncode == 0, done
    pid_of(process, "quick", 6)
    process.wait_log("Daemon quick is not started again", 2)
    hup(process)
    pid_of(process, "quick", 11)  # a reload gives it another chance
    assert answers(process.socket)


def test_one_that_goes_into_the_background_is_told_not_to(site):
    process = site.run("passenger.spawn(daemon_jobs.leaves, name='old', give_up_after=2)").wait_ready()
    left = int(process.wait_log(r"\[old\] left behind (\d+)").group(1))
    process.wait_log(
        "Daemon old: its first process has exited, but 1 other processes are left.*must stay in the foreground"
    )
    gone(left)
    process.wait_log("Daemon old is not started again")


def test_stop_and_restart_by_an_operator(site, port):
    process = site.run(f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port})").wait_ready()
    pid = pid_of(process, "jobs")
    assert daemons(site.start, process)["jobs"] | {"memory": 1, "started": 1} == {
        "name": "jobs", "pid": pid, "state": "running", "address": f"127.0.0.1:{port}", "started": 1, "restarts": 0,
        "command": "daemon_jobs.service()", "memory": 1, "user": daemons(site.start, process)["jobs"]["user"],
    }  # fmt: skip
    assert command(site.start, "stop", "jobs").returncode == 0
    gone(pid)
    wait_for(lambda: daemons(site.start, process)["jobs"]["state"] == "stopped", "it to stop")
    assert refused(port)
    assert command(site.start, "restart", "jobs").returncode == 0
    assert job(port) == f"done work {pid_of(process, 'jobs', 2)}"
    assert command(site.start, "restart", "jobs").returncode == 0
    assert pid_of(process, "jobs", 3)
    assert command(site.start, "stop", "nobody").returncode == 1


def test_workers_know_where_a_stopped_one_was(start):
    """A worker that is started while the daemon is stopped is told its address, and there it is afterwards."""
    env = {"SPAWN": "jobs = spawn(daemon_jobs.service, listen='auto')"}
    process = start.gunicorn("daemon_app", workers=2, env=env).wait_ready()
    pid = pid_of(process, "service")
    before = fetch(process.socket, "/jobs")[1]
    port = int(re.search(r"(\d+)\)>$", before).group(1))
    assert job(port) == f"done work {pid}"
    assert command(start, "stop", "service").returncode == 0
    wait_for(lambda: refused(port), "the port to close")
    workers = workers_of(process)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: len(set(workers_of(process)) - set(workers)) == 2, "new workers")
    for _ in range(4):
        assert fetch(process.socket, "/jobs")[1] == before
    assert refused(port)
    assert command(start, "restart", "service").returncode == 0
    assert job(port) == f"done work {pid_of(process, 'service', 2)}"


def test_a_daemon_that_cannot_be_started_leaves_the_others_alone(site):
    process = site.run(
        """
import errno, os
import gunicorn_passenger.daemons.supervisor_client as supervision
real = supervision.SupervisorClient.start
def start(self, spec, *rest):
    if spec.name == "second" and not os.path.exists("corrected"):
        raise OSError(errno.EMFILE, "Too many open files")
    return real(self, spec, *rest)
supervision.SupervisorClient.start = start
passenger.spawn("sleep 1000", name="first")
passenger.spawn("sleep 1000", name="second")
passenger.spawn("sleep 1000", name="third")
"""
    ).wait_ready()
    first = pid_of(process, "first")
    process.wait_log("the daemon second cannot be started now: .*Too many open files", 2)
    (site.start.home / "corrected").touch()
    pid_of(process, "second")
    pid_of(process, "third")
    assert starts(process, "first") == 1
    assert lives(first)


def test_a_stopped_one_can_have_its_port_taken(site, port):
    process = site.run(f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port})").wait_ready()
    pid_of(process, "jobs")
    command(site.start, "stop", "jobs")
    wait_for(lambda: refused(port), "the port to close")
    with socket.create_server(("127.0.0.1", port)):
        done = command(site.start, "restart", "jobs")
        assert done.returncode == 1
        process.wait_log(rf"ERROR.*daemon jobs: 127.0.0.1:{port} is in use by")
    command(site.start, "restart", "jobs")
    assert job(port).startswith("done")


# --- the end -----------------------------------------------------------------------------------------


def test_one_that_ignores_sigterm_is_killed_with_all_of_its_processes(site):
    process = site.run("passenger.spawn(daemon_jobs.stubborn, stop_timeout=0.5)").wait_ready()
    pid = pid_of(process, "stubborn")
    child = int(process.wait_log(r"\[stubborn\] child (\d+)").group(1))
    assert process.stop() == 0
    assert not lives(pid)
    assert not lives(child)
    assert "Daemon stubborn has not stopped within 0.5 s (stop_timeout): killing 2 processes" in process.log()


@pytest.mark.parametrize("bare", [False, True], ids=["marked", "unmarked"])
def test_children_and_those_that_have_left_end_with_it(site, bare):
    process = site.run("passenger.spawn(daemon_jobs.family)", env={"BARE": "1"} if bare else {}).wait_ready()
    pid = pid_of(process, "family")
    family = [int(pid) for pid in process.wait_log(r"\[family\] family (\d+) (\d+)").groups()]
    assert all(lives(pid) for pid in family)
    assert process.stop() == 0
    assert not any(lives(pid) for pid in (pid, *family))


def test_a_restart_ends_those_that_have_left(site):
    process = site.run("passenger.spawn(daemon_jobs.family)").wait_ready()
    pid = pid_of(process, "family")
    family = [int(pid) for pid in process.wait_log(r"\[family\] family (\d+) (\d+)").groups()]
    os.kill(pid, signal.SIGKILL)
    pid_of(process, "family", 2)
    assert not any(lives(pid) for pid in family)


@pytest.mark.parametrize("worker", ["sync", "gunicorn_passenger.Worker"])
def test_nothing_outlives_a_master_that_is_killed(start, port, worker):
    site = Site(start, worker)
    process = site.run(
        f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port})\n"
        "passenger.spawn(daemon_jobs.family)\n"
        "passenger.spawn(daemon_jobs.stubborn)\n"
    ).wait_ready()
    pids = [pid_of(process, name) for name in ("jobs", "family", "stubborn")]
    pids += [int(pid) for pid in process.wait_log(r"\[family\] family (\d+) (\d+)").groups()]
    pids += [int(process.wait_log(r"\[stubborn\] child (\d+)").group(1)), supervisor_of(process)]
    process.signal(signal.SIGKILL)
    process.wait_end()
    gone(*pids)
    assert refused(port)
    wait_for(lambda: not process.session(), "gunicorn's own workers to notice")


def test_a_killed_supervisor_takes_all_with_it_and_all_are_started_again(site, port):
    process = site.run(
        f"passenger.spawn(daemon_jobs.service, name='jobs', listen={port})\npassenger.spawn(daemon_jobs.family)\n"
    ).wait_ready()
    pids = [pid_of(process, "jobs"), pid_of(process, "family")]
    pids += [int(pid) for pid in process.wait_log(r"\[family\] family (\d+) (\d+)").groups()]
    supervisor = supervisor_of(process)
    os.kill(supervisor, signal.SIGKILL)
    process.wait_log(
        rf"ERROR.*the supervisor of the daemons \(pid {supervisor}\) has exited; the master starts it"
    )
    assert job(port) == f"done work {pid_of(process, 'jobs', 2)}"
    pid_of(process, "family", 2)
    gone(*pids)
    assert supervisor_of(process) != supervisor
    assert len(pids_answering(process.socket, 2)) == 2
    assert process.stop() == 0


def test_a_supervisor_that_is_told_to_stop_goes_on(site):
    """systemd tells every process of a unit; the master's end is what counts."""
    process = site.run("passenger.spawn('sleep 1000', name='it')").wait_ready()
    supervisor = supervisor_of(process)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        os.kill(supervisor, number)
    os.kill(pid_of(process, "it"), signal.SIGTERM)
    pid_of(process, "it", 2)
    assert supervisor_of(process) == supervisor


# --- USR2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["sync", "gunicorn_passenger.Worker"])
def test_an_upgrade_hands_the_sockets_over_and_starts_when_the_old_one_is_gone(start, port, worker):
    site = Site(start, worker)
    path = f"{start.home}/jobs.sock"
    process = site.run(
        f"passenger.spawn(daemon_jobs.service, name='jobs', listen=[{port}, 'auto', 'unix:{path}'])",
        "--pid", start.home / "pid",
    ).wait_ready()  # fmt: skip
    first = pid_of(process, "jobs")
    address = daemons(start, process)["jobs"]["address"]
    process.signal(signal.SIGUSR2)
    wait_for(
        lambda: (start.home / "pid.2").exists() and (start.home / "pid.2").read_text().strip(), "a new master"
    )
    new = int((start.home / "pid.2").read_text())
    try:
        process.wait_log(r"Daemons are started when the previous master \(pid \d+\) has exited")
        process.wait_log("Booting worker", 4)
        assert job(port) == f"done work {first}"
        assert starts(process, "jobs") == 1
        process.signal(signal.SIGTERM)
        process.wait_end()
        wait_for(lambda: starts(process, "jobs") == 2, lambda: process.log())
        second = pid_of(process, "jobs", 2)
        assert not lives(first)
        assert job(port) == f"done work {second}"
        assert process.log().count(f"Opened 127.0.0.1:{port}") == 1
        process.pid = new  # for the report
        assert daemons(start, process)["jobs"]["address"] == address
        assert os.path.exists(path)
    finally:
        os.kill(new, signal.SIGTERM)
    wait_for(lambda: not lives(new), "the new master to end")
    gone(second)
    assert refused(port)
    assert not os.path.exists(path)


def test_an_upgrade_that_is_rolled_back_does_not_touch_the_daemon(site, start, port):
    process = site.run(
        f"passenger.spawn(daemon_jobs.service, name='jobs', listen=[{port}, 'unix:{start.home}/jobs.sock'])",
        "--pid", start.home / "pid",
    ).wait_ready()  # fmt: skip
    first = pid_of(process, "jobs")
    process.signal(signal.SIGUSR2)
    process.wait_log("Booting worker", 4)
    new = int(wait_for(lambda: (start.home / "pid.2").exists() and (start.home / "pid.2").read_text(), "it"))
    os.kill(new, signal.SIGTERM)
    wait_for(lambda: not lives(new), "the new master to end")
    assert job(port) == f"done work {first}"
    assert starts(process, "jobs") == 1
    assert os.path.exists(f"{start.home}/jobs.sock")
    assert process.stop() == 0
    gone(first)
    assert not os.path.exists(f"{start.home}/jobs.sock")


def test_an_upgrade_that_wants_no_daemon_closes_the_ports(site, start, port):
    text = "passenger.configure(grace_period=0.5)\n"
    process = site.run(
        text + f"passenger.spawn(daemon_jobs.service, listen={port})", "--pid", start.home / "pid"
    ).wait_ready()
    pid_of(process, "service")
    site.configure(text)
    process.signal(signal.SIGUSR2)
    process.wait_log("Booting worker", 4)
    new = int(wait_for(lambda: (start.home / "pid.2").exists() and (start.home / "pid.2").read_text(), "it"))
    try:
        process.signal(signal.SIGTERM)
        process.wait_end()
        wait_for(lambda: refused(port), "the port to close")
        assert answers(process.socket)
    finally:
        os.kill(new, signal.SIGTERM)
    wait_for(lambda: not lives(new), "the new master to end")


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
def test_a_flood_waits_and_disturbs_nobody(site, flood):
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
    program = supervisor.Supervisor.__new__(supervisor.Supervisor)
    program.send_event = said.append
    program.forward_lines(supervisor.SupervisedProcess("key", {}, [], None), [b"y"] * 1050)
    assert [len(packet["lines"]) for packet in said] == [100] * 10 + [50]


def test_what_counts_is_how_long_its_first_process_has_lived():
    """Not how long those took to end that it has left behind."""
    said = []
    program = supervisor.Supervisor.__new__(supervisor.Supervisor)
    program.send_event, program.daemons = said.append, {}
    daemon = program.daemons["key"] = supervisor.SupervisedProcess("key", {"give_up_after": 2}, [], None)
    now = time.monotonic()
    for _ in range(2):
        daemon.status, daemon.started, daemon.ended = 0, now - 60.0, now - 59.5
        program.on_all_exited(daemon)
    assert [message["event"] for message in said] == ["exited", "exited", "given_up"]
    assert said[0]["lived"] == 0.5


def test_what_cannot_be_killed_is_left_alone(monkeypatch):
    said = []
    program = supervisor.Supervisor.__new__(supervisor.Supervisor)
    program.send_event, program.daemons = said.append, {}
    daemon = program.daemons["key"] = supervisor.SupervisedProcess("key", {"give_up_after": 0}, [], None)
    daemon.pid, daemon.kill_at, daemon.stopped_for_good = 1 << 30, 100.0, True
    monkeypatch.setattr(supervisor, "processes_of", lambda daemon: [1 << 30])
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
    spec = build_spec(SpawnArguments(target="sleep 1", name="one"))
    for _ in range(2):
        requested.add_persistent(spec, True)
    assert requested.all() == [(spec, True)]
    with pytest.raises(DaemonError, match="one"):
        requested.add_persistent(dataclasses.replace(spec, stop_timeout=2.0), True)


# --- users -------------------------------------------------------------------------------------------


@ROOT_ONLY
def test_daemons_run_as_the_workers_user_unless_the_operator_says_otherwise(site, port):
    site.start.home.chmod(0o1777)
    # commands of the system: other users cannot run a Python in a home directory
    process = site.run(
        f"passenger.spawn(['sh', '-c', 'id; exec sleep 1000'], name='default', listen={port})\n"
        "passenger.spawn(['sh', '-c', 'id; env; exec sleep 1000'], name='named', user='daemon')\n"
        "passenger.spawn(['id', '-u'], name='root', user='root', give_up_after=1)\n"
        "passenger.spawn(['id'], name='number', user=12345, group='daemon', give_up_after=1)\n",
        "--user", "nobody", "--group", "nogroup",
    )  # fmt: skip
    process.wait_log(r"\[default\] uid=65534\(nobody\) gid=65534\(nogroup\) groups=65534\(nogroup\)")
    process.wait_log(r"\[named\] uid=1\(daemon\) gid=1\(daemon\) groups=1\(daemon\)")
    process.wait_log(r"\[named\] HOME=/usr/sbin")
    process.wait_log(r"\[named\] USER=daemon")
    process.wait_log(r"\[root\] 0\n")
    process.wait_log(r"\[number\] uid=12345 gid=1\(daemon\) groups=1\(daemon\)")
    assert daemons(site.start, process)["default"]["user"] == "nobody"


@ROOT_ONLY
def test_the_application_gets_the_workers_user_and_no_other(start, port):
    start.home.chmod(0o1777)
    spawning = (
        f"spawn(['sh', '-c', 'id; exec sleep 1000'], name='it', listen={port})\n"
        "spawn(['id'], user='nobody', give_up_after=1)"
    )
    process = start.gunicorn("daemon_app", "--user", "nobody", "--group", "nogroup", env={"SPAWN": spawning})
    process.wait_log(r"\[it\] uid=65534\(nobody\) gid=65534\(nogroup\) groups=65534\(nogroup\)")
    process.wait_log(r"\[id\] uid=65534\(nobody\) gid=65534\(nogroup\) groups=65534\(nogroup\)")
    assert process.stop() == 0


@ROOT_ONLY
@pytest.mark.parametrize("asked", ["user='root'", "user=0", "group='root'", "user='daemon'"])
def test_the_application_may_not_choose_a_user(start, asked):
    start.home.chmod(0o1777)
    process = start.gunicorn(
        "daemon_app", "--user", "nobody", "--group", "nogroup", env={"SPAWN": f"spawn('id', {asked})"}
    )
    assert process.wait_end() != 0
    assert process.log().count("the application may not run it as") == 1
    assert "Daemon id runs" not in process.log()
    assert "Traceback" not in process.log()


@ROOT_ONLY
def test_a_unix_socket_of_a_daemon_is_not_for_workers_of_another_user(start):
    start.home.chmod(0o1777)
    process = start.gunicorn(
        "daemon_app",
        "--user",
        "nobody",
        env={"SPAWN": f"spawn('sleep 9', listen='unix:{start.home}/x.sock')"},
    )
    assert process.wait_end() != 0
    assert "cannot be opened: the workers run as nobody" in process.log()


@ROOT_ONLY
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("asked", [{"user": "daemon"}, {"user": "root"}, {"group": "root"}])
def test_a_master_that_is_not_root_becomes_nobody_else(asked):
    spec = dataclasses.replace(DaemonSpec("it", ("id",), "id"), **asked)
    child = os.fork()
    if child == 0:
        # not by a program of its own: other users cannot run a Python in a home directory
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            same = resolve_run_as(
                dataclasses.replace(spec, user="nobody", group=""), 65534, 65534, False, True
            )
            assert not same.changes
            resolve_run_as(spec, 65534, 65534, False, True)
        except DaemonError as error:
            status = 0 if "a master that runs as nobody cannot run it as" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


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
    assert fetch(port)[1] == str(pid_of(process, "socketio", 2))  # who connects meanwhile waits
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


# --- bad input ---------------------------------------------------------------------------------------


BAD = [
    ("'/no/such/thing'", "the command '/no/such/thing' does not exist; give its path, or install it"),
    ("'no-such-command-at-all'", "the command 'no-such-command-at-all' does not exist"),
    ("'/etc/passwd'", "the command '/etc/passwd' is not executable (chmod +x)"),
    ("'sleep 9', listen=1", "port 1 is not allocated to account"),
    ("'sleep 9', listen='passenger'", "the primary socket belongs to the workers"),
    ("'sleep 9', listen='nowhere'", "cannot listen on 'nowhere': it has no port"),
    ("''", "the command is empty"),
    ("'sh \"'", "no closing quotation"),
    ("3", "use a command line, a list of strings or a function"),
    ("lambda: 1", "it is a lambda"),
    ("(lambda: [f for f in [lambda: 1]])()[0]", "it is a lambda"),
    ("__import__('functools').partial(print, 1)", "it has no name"),
    ("daemon_jobs.sleep, args=[object()]", "use JSON values for a function"),
    ("'sleep 9', name='a:b'", "printable characters without a colon"),
    ("'sleep 9', name=7", "it is not a str"),
    ("'sleep 9', on_reload='sometimes'", "use 'keep' or 'restart'"),
    ("'sleep 9', stop_timeout=-1", "use 0 to 3600 seconds"),
    ("'sleep 9', stop_timeout='x'", "it is not a number of seconds"),
    ("'sleep 9', give_up_after=-1", "use a number of exits in a row"),
    ("'sleep 9', env={'A': 1}", "use a mapping of names to strings"),
    ("'sleep 9', env={'A=B': 'c'}", "is empty or contains ="),
    ("'sleep 9', user='no-such-user'", "this machine has no user 'no-such-user'"),
    ("'sleep 9', group='no-such-group'", "this machine has no group 'no-such-group'"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=[text for text, _ in BAD])
@pytest.mark.parametrize("where", ["conf", "app"])
def test_bad_input_stops_the_start_with_one_line(start, arguments, text, where):
    env = {"PASSENGER_PORTS": free_port()}
    if where == "conf":
        process = Site(start).run(f"passenger.spawn({arguments})", env=env)
    else:
        process = start.gunicorn("daemon_app", env={**env, "SPAWN": f"spawn({arguments})"})
    assert process.wait_end() != 0
    log = process.log()
    assert "Traceback" not in log
    assert sum(text in line for line in log.splitlines()) == 1, log
    assert not process.session()


def test_a_name_used_twice(start):
    twice = "spawn('sleep 8', name='it')\n{}spawn('sleep 9', name='it')\n"
    process = Site(start).run("passenger." + twice.format("passenger."))
    assert process.wait_end() == 1
    assert re.search(
        r"Error: .*gunicorn.conf.py, line 5: spawn\(name='it'\): the name is used twice", process.log()
    )
    process = start.gunicorn("daemon_app", env={"SPAWN": twice.format("")})
    assert process.wait_end() != 0
    assert process.log().count("the name is used twice") == 1
    conf = start.write(
        "other.py", "import gunicorn_passenger\ngunicorn_passenger.spawn('sleep 7', name='it')\n"
    )
    process = start.gunicorn("daemon_app", "-c", conf, env={"SPAWN": "spawn('sleep 8', name='it')"})
    assert process.wait_end() != 0
    assert process.log().count("the name is used twice") == 1


def test_a_port_that_is_not_allocated_is_not_opened(site, port):
    other = free_port()
    process = site.run(f"passenger.spawn('sleep 9', listen={other})", env={"PASSENGER_PORTS": port})
    assert process.wait_end() == 1
    assert f"port {other} is not allocated" in process.log()
    assert "Opened" not in process.log()


def test_the_programs_own_narrowing_holds_for_its_daemons(start):
    first = free_range(3)
    narrow = f"passenger.configure(ports={first + 1})\n"
    env = {"PASSENGER_PORTS": f"{first}-{first + 2}"}
    process = start.gunicorn("daemon_app", env={**env, "SPAWN": narrow + f"spawn('sleep 9', listen={first})"})
    assert process.wait_end() != 0
    assert f"port {first} is not allocated" in process.log()
    process = start.gunicorn(
        "daemon_app", env={**env, "SPAWN": narrow + "jobs = spawn(daemon_jobs.service, listen='auto')"}
    ).wait_ready()
    assert fetch(process.socket, "/jobs")[1] == f"<Daemon 'service' ('127.0.0.1', {first + 1})>"


def test_a_port_that_the_application_has_itself(start, port):
    text = f"spawn('sleep 9', name='a', listen={port}); spawn('sleep 9', name='b', listen={port})"
    process = start.gunicorn("daemon_app", env={"SPAWN": text})
    assert process.wait_end() != 0
    assert f"127.0.0.1:{port} is in use by this application itself (its daemon 'a')" in process.log()


def test_a_worker_cannot_use_up_the_masters_descriptors(start):
    """Too many sockets and too many daemons are refused; what is there goes on."""
    text = (
        "refused = []\n"
        "for number in range(80):\n"
        "    try: spawn('sleep 1000', name=f'd{number}', listen=['auto'] * 16)\n"
        "    except passenger.PassengerError as error: refused.append(str(error))\n"
        "first = refused[0]\n"
    )
    conf = start.write(
        "limits.py", "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
    )
    process = start.gunicorn("daemon_app", "-c", conf, workers=1, env={"SPAWN": text}).wait_ready()
    assert "already holds 128 ports, which is the limit" in fetch(process.socket, "/first")[1]
    assert len(descriptors(process.pid)) < 256
    process.wait_log(r"Daemon d\d runs as pid", 8)
    text = text.replace("listen=['auto'] * 16", "args=[number]")
    process.stop()
    process = start.gunicorn("daemon_app", workers=1, env={"SPAWN": text}).wait_ready()
    assert "already has 64 daemons, which is the limit" in fetch(process.socket, "/first")[1]
    assert process.stop() == 0


def test_what_a_worker_sends_is_no_daemon(start):
    """The master denies a malformed request of a worker, and continues."""
    text = (
        "from gunicorn_passenger.ipc.messages import SpawnDaemon\n"
        "from gunicorn_passenger.daemons.spec import SpawnArguments, build_spec\n"
        "from gunicorn_passenger.serving.registry import registry\n"
        "import dataclasses, json\n"
        "given = SpawnArguments(target=['sleep', '1'], listen='auto', stop_timeout=1, give_up_after=1)\n"
        "good = json.loads(build_spec(given).pack())\n"
        "bad = ['', '[]', '{', '[' * 4000, 'null', '{}']\n"
        "for name, value in [('name', 1), ('name', 'a\\nb'), ('listen', [{}]), ('listen', 7), ('env', [1]), ('command', []),\n"
        "    ('command', [1]), ('user', 0), ('user', 'root'), ('stop_timeout', 1e9), ('cwd', 'here'), ('extra', 1),\n"
        "    ('within', 'x'), ('give_up_after', True), ('env', [['A', 'b\\0c']]), ('group', '0'),\n"
        "    ('listen', [{'kind': 'tcp', 'host': '127.0.0.1', 'port': 1}]),\n"
        "    ('listen', [{'kind': 'tcp', 'host': 'localhost', 'port': 19999}]),\n"
        "    ('listen', [{'kind': 'unix', 'path': 'relative'}])]:\n"
        "    bad.append(json.dumps({**good, name: value}))\n"
        "answers = sorted({type(registry.broker.request(SpawnDaemon(0, text), 'it')).__name__ for text in bad})\n"
    )
    start.home.chmod(0o1777)
    user = ["--user", "nobody", "--group", "nogroup"] if os.geteuid() == 0 else []
    process = start.gunicorn("daemon_app", *user, workers=1, env={"SPAWN": text}).wait_ready()
    assert fetch(process.socket, "/answers")[1] == "['RequestDenied']"
    assert "runs as pid" not in process.log()
    assert "Traceback" not in process.log()


def test_an_interpreter_that_does_not_exist_is_said_when_it_is_run(site):
    script = site.start.write("script.sh", "#!/no/such/interpreter\n")
    script.chmod(0o755)
    process = site.run(f"passenger.spawn('{script}', give_up_after=2)").wait_ready()
    process.wait_log(
        r"Daemon script.sh cannot run .*script.sh: No such file or directory; it is started again"
    )
    process.wait_log("Daemon script.sh is not started again")


def test_a_directory_that_is_gone_is_said(site):
    process = site.run("passenger.spawn('sleep 9', cwd='/no/such/place', give_up_after=1)").wait_ready()
    process.wait_log("Daemon sleep cannot enter its directory /no/such/place: No such file or directory")


def test_other_options_than_gunicorns_reach_a_master_with_patched_modules(start, port):
    """A gunicorn.conf.py that patches the master: the broker's thread and the supervisor are the system's."""
    site = Site(start, "gevent", head="from gevent import monkey\nmonkey.patch_all()\n" + HEAD)
    process = site.run(f"passenger.spawn(daemon_jobs.service, listen={port})", *NO_CONTROL).wait_ready()
    assert job(port) == f"done work {pid_of(process, 'service')}"
    assert process.stop() == 0
