"""The users that daemons run as."""

import os

import pytest
from daemon_site import daemons

from gunicorn_passenger.daemons.run_as import resolve_run_as
from gunicorn_passenger.daemons.spec import DaemonSpec
from gunicorn_passenger.errors import DaemonError

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")


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
    process.wait_log("cannot be opened: the workers run as nobody")


@ROOT_ONLY
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("asked", [{"user": "daemon"}, {"user": "root"}, {"group": "root"}])
def test_a_master_that_is_not_root_becomes_no_other_user(asked):
    spec = DaemonSpec("it", ("id",), "id").replace(**asked)
    child = os.fork()
    if child == 0:
        # not by a program of its own: other users cannot run a Python in a home directory
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            same = resolve_run_as(spec.replace(user="nobody", group=""), 65534, 65534, False, True)
            assert not same.changes
            resolve_run_as(spec, 65534, 65534, False, True)
        except DaemonError as error:
            status = 0 if "a master that runs as nobody cannot run it as" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
