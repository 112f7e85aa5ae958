"""Daemons through reloads, deaths, stops and upgrades."""

import os
import re
import signal
import socket
import subprocess

import pytest
from conditions import wait_for
from daemon_site import Site, daemons, gone, hup, job, lives, pid_of, starts, supervisor_of, workers_of
from http_client import answers, fetch, pids_answering, refused
from processes import COMMAND


def command(start, verb, name):
    return subprocess.run(
        [COMMAND, verb, name], env=start.environment, capture_output=True, text=True, timeout=60
    )


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
        r"Daemon quick is not started again: it has exited 5 times in a row, each time within seconds of its start; .*restart quick"
    )
    pauses = re.findall(
        r"Daemon quick exited with status 3; it is started again in ([\d.]+) s", process.log()
    )
    assert pauses == ["0.1", "0.2", "0.4", "0.8"]
    assert starts(process, "quick") == 5
    assert daemons(site.start, process)["quick"]["state"] == "failed"
    assert refused(port)  # its clients would wait in vain
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
    assert command(site.start, "stop", "unknown").returncode == 1


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
        "passenger.spawn(daemon_jobs.stubborn)\n",
        # gunicorn's sync worker looks after its master only twice in this time
        "--timeout", 6,
    ).wait_ready()  # fmt: skip
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


def test_a_supervisor_that_gets_a_stop_signal_continues(site):
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
