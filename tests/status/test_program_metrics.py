"""The metrics that the program counts itself, of all workers."""

import fcntl
import os
import re
import signal
import stat
import subprocess

import pytest
from conditions import wait_for
from http_client import answers, fetch
from processes import GUNICORN, NO_CONTROL, require
from status_requests import ready, samples, value

from gunicorn_passenger.status import prometheus_multiproc

needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")

PROMETHEUS = "import gunicorn_passenger as passenger\npassenger.configure(prometheus=True)\n"


def counting(start, port, *arguments, workers=3, conf=PROMETHEUS, **env):
    path = start.write("prometheus.conf.py", conf)
    process = start.gunicorn(
        "status_app", "-c", path, *arguments, workers=workers, env={"P1": port, "COUNT": 1, **env}
    ).wait_ready()
    ready(port, workers)
    return process


def directories(start):
    return sorted(str(path) for path in start.home.glob("run*/prometheus-*"))


def hello(port):
    return value(samples(port), "hello_total")


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_one_line_serves_the_programs_counters_whole(start, port, preload):
    process = counting(start, port, *preload)
    pids = set()
    for _ in range(30):
        pids.add(fetch(process.socket, "/count")[1])
    assert len(pids) > 1
    assert {hello(port) for _ in range(12)} == {30}
    (directory,) = directories(start)
    assert directory.endswith(f"prometheus-{process.pid}")
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert value(samples(port), "alive") == 3

    # a gone worker's counts stay, its gauge of live processes goes
    victim = process.workers()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(process.workers()) == 3 and victim not in process.workers(), "a new worker")
    ready(port, 3)
    wait_for(lambda: value(samples(port), "alive") == 3, "three live ones")
    assert not [
        name for name in os.listdir(directory) if name.startswith("gauge_live") and str(victim) in name
    ]
    assert hello(port) == 30
    process.hup(3)
    ready(port, 3)
    assert hello(port) == 30
    wait_for(lambda: value(samples(port), "alive") == 3, "three live ones")
    assert process.stop() == 0
    assert directories(start) == []


def test_from_the_environment(start, port):
    process = counting(start, port, conf="", PASSENGER_PROMETHEUS=1)
    for _ in range(12):
        fetch(process.socket, "/count")
    assert hello(port) == 12
    assert process.stop() == 0
    assert directories(start) == []


def test_a_killed_masters_directory_is_removed_at_the_next_start(start, port):
    process = counting(start, port)
    (left,) = directories(start)
    process.signal(signal.SIGKILL)
    process.wait_end()
    wait_for(lambda: not process.session(), "the end of its workers")
    assert directories(start) == [left]
    again = counting(start, port)
    assert [os.path.basename(path) for path in directories(start)] == [f"prometheus-{again.pid}"]


def test_a_directory_that_a_process_holds_is_not_removed(home):
    """Two containers with one runtime directory: the other's pids say nothing here."""
    path = home / f"prometheus-{1 << 22}"
    path.mkdir()
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    prometheus_multiproc._clear(str(home))
    assert path.exists()
    os.close(held)
    prometheus_multiproc._clear(str(home))
    assert not path.exists()


def test_after_usr2_the_new_master_has_its_own(start, port):
    process = counting(start, port, workers=2)
    process.hup(2)  # gunicorn takes the environment of a reload for the original one
    ready(port, 2)
    fetch(process.socket, "/count")
    process.signal(signal.SIGUSR2)
    wait_for(lambda: len(directories(start)) == 2, "two directories")
    new = next(path for path in directories(start) if not path.endswith(f"-{process.pid}"))
    master = int(new.rpartition("-")[2])
    process.signal(signal.SIGTERM)
    process.wait_end()
    assert directories(start) == [new]
    ready(port, 2)
    fetch(process.socket, "/count")
    assert hello(port) == 1
    os.kill(master, signal.SIGTERM)
    wait_for(lambda: not process.session(), "the end")
    assert directories(start) == []


def test_a_directory_of_the_users_own_is_used_and_left(start, port):
    own = start.home / "own"
    own.mkdir()
    process = counting(start, port, PROMETHEUS_MULTIPROC_DIR=own)
    for _ in range(5):
        fetch(process.socket, "/count")
    assert hello(port) == 5
    assert directories(start) == []
    victim = process.workers()[0]
    assert list(own.glob(f"gauge_live*_{victim}.db"))
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not list(own.glob(f"gauge_live*_{victim}.db")), "the end of its gauges")
    assert process.stop() == 0
    assert list(own.glob("counter_*.db"))


def test_imported_too_early_is_said(start, port):
    process = counting(start, port, conf=f"import prometheus_client\n{PROMETHEUS}")
    process.wait_log(
        "prometheus_client was imported in the master too early, so the workers' own counters are not added up"
    )


def test_switched_on_by_a_reload(start, port):
    process = counting(start, port, conf="")
    start.write("prometheus.conf.py", PROMETHEUS)
    process.hup(3)
    ready(port, 3)
    for _ in range(9):
        fetch(process.socket, "/count")
    assert hello(port) == 9
    assert process.stop() == 0
    assert directories(start) == []


def test_not_for_the_program(start, port):
    start.write(
        "wrong.py",
        "import gunicorn_passenger as p\np.configure(prometheus=True)\ndef application(e, s): pass\n",
    )
    process = start.gunicorn("wrong", "--chdir", start.home)
    assert process.wait_end() != 0
    assert "configure(prometheus=...) is for gunicorn.conf.py: the master acts on it" in process.log()


def test_a_file_that_is_broken_costs_the_programs_own_only(start, port):
    process = counting(start, port)
    (directory,) = directories(start)
    with open(f"{directory}/counter_1.db", "wb") as file:
        # 100 bytes are used, it says, and the first entry would be longer
        file.write(b"\x64\0\0\0\0\0\0\0" + b"\x7f" * 92)
    found = samples(port)
    assert value(found, "gunicorn_passenger_up") == 1
    process.wait_log("the program's own metrics are not shown: ")


@needs_root
def test_a_master_that_is_root_and_workers_that_are_not(start, port):
    start.home.chmod(0o1777)
    process = counting(start, port, "-u", "nobody", "-g", "nogroup", "--preload")
    for _ in range(12):
        fetch(process.socket, "/count")
    assert hello(port) == 12
    (directory,) = directories(start)
    assert os.path.dirname(directory) == f"{start.home}/run-users"
    info = os.stat(directory)
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (65534, 0o700)
    above = os.stat(os.path.dirname(directory))
    assert (above.st_uid, stat.S_IMODE(above.st_mode)) == (0, 0o711)
    assert stat.S_IMODE(os.stat(start.home / "run").st_mode) == 0o700
    assert process.stop() == 0
    assert directories(start) == []


def as_nobody(*command):
    return subprocess.run(
        [require("setpriv"), "--reuid", "65534", "--regid", "65534", "--clear-groups", *command],
        check=True, timeout=60,
    )  # fmt: skip


@needs_root
def test_root_touches_nothing_that_a_worker_has_put_into_the_directory(start, port):
    """Links to files of root's stay what they are, through a reload, a worker's end and the end of all."""
    start.home.chmod(0o1777)
    process = counting(start, port, "-u", "nobody", "-g", "nogroup", "--preload", workers=2)
    fetch(process.socket, "/count")
    (directory,) = directories(start)
    target = start.home / "roots"
    target.write_text("precious")
    target.chmod(0o666)  # else the system may not let others make a hard link to it (fs.protected_hardlinks)
    above = start.home / "others"
    above.mkdir(mode=0o755)
    for kind, name in (("-s", "counter_1.db"), ("", "histogram_2.db"), ("-s", "gauge_liveall_7.db")):
        as_nobody("ln", *([kind] if kind else []), str(target), f"{directory}/{name}")
    as_nobody("ln", "-s", str(above), f"{directory}/inner")
    # whatever the master has there under its own name may be another's by now
    for path in [p for p in os.listdir(directory) if p.endswith(f"_{process.pid}.db")]:
        as_nobody("rm", f"{directory}/{path}")
        as_nobody("ln", "-s", str(target), f"{directory}/{path}")
    victim = process.workers()[0]
    as_nobody("ln", "-s", str(target), f"{directory}/gauge_liveall_{victim}.db")
    process.hup(2)
    process.hup(2)
    ready(port, 2)
    for path in (target, above):
        assert os.stat(path).st_uid == 0
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o666
    assert stat.S_IMODE(os.stat(above).st_mode) == 0o755
    assert target.read_text() == "precious"
    assert process.stop() == 0
    assert target.read_text() == "precious"
    assert above.is_dir()
    assert directories(start) == []
    assert os.listdir(start.home / "run-users") == []


@needs_root
def test_a_preloaded_program_counts_where_only_root_may_write(start, port):
    start.home.chmod(0o1777)
    process = counting(start, port, "-u", "nobody", "-g", "nogroup", "--preload", workers=2)
    (own,) = start.home.glob("run-users/prometheus.master-*")
    (directory,) = directories(start)
    info = os.stat(own)
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (0, 0o700)
    shared = [name for name in os.listdir(own) if name.endswith(f"_{process.pid}.db")]
    assert shared
    for name in shared:
        info = os.lstat(f"{directory}/{name}")
        # the workers read it, and cannot cut it off under the master
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, grp_of("nogroup"), 0o640)
        assert os.path.samestat(info, os.stat(own / name))
    fetch(process.socket, "/count")
    assert hello(port) == 1
    assert process.stop() == 0
    assert os.listdir(start.home / "run-users") == []


def grp_of(name):
    import grp

    return grp.getgrnam(name).gr_gid


def test_what_is_nested_too_deeply_does_not_end_the_master(home):
    path = home / f"prometheus-{1 << 22}"
    path.mkdir()
    at = os.open(path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=at)
        at, before = os.open("d", os.O_RDONLY, dir_fd=at), at
        os.close(before)
    os.close(at)
    try:
        prometheus_multiproc._clear(str(home))
    finally:
        subprocess.run(["rm", "-rf", str(path)], check=True, timeout=60)


@needs_root
def test_a_directory_that_workers_cannot_reach_is_reported(start, port):
    (start.home / "closed").mkdir(mode=0o700)
    process = counting(start, port, PASSENGER_RUNTIME_DIR=start.home / "closed" / "run")
    process.wait_log(r"own counters are not added up: .*but cannot enter .*closed \(its mode is 0700\)")
    assert process.stop() == 0


def test_counters_under_sync_workers(start, port):
    conf = start.write(
        "g.conf.py",
        f"""
        from gunicorn_passenger.hooks import *
        import gunicorn_passenger as passenger
        from gunicorn_passenger import status
        passenger.configure(prometheus=True)
        status.spawn({port})
        """,
    )
    process = start.python(
        GUNICORN, "-k", "sync", "-w", "3", "-c", conf, "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, "status_app",
        env={"COUNT": 1},
    ).wait_ready()  # fmt: skip
    ready(port, 3)
    for _ in range(20):
        fetch(process.socket, "/count")
    assert hello(port) == 20
    process.signal(signal.SIGHUP)
    # a server that starts while the program is loaded shows the sums from its first response on
    process.wait_log(r"loading: 20\.0")
    assert process.stop() == 0
    assert directories(start) == []


def test_a_program_that_has_gevent_patch_the_process(start):
    """It comes first: otherwise a greenlet that waits for a lock of ``prometheus_client`` would stop all of them.
    Where the package is found only after a first attempt, its counters are summed, too.
    """
    start.write(
        "patched.py",
        """
        import sys

        path, sys.path[:] = sys.path[:], []
        try:
            import prometheus_client
        except ImportError:
            print("not found yet", flush=True)
        sys.path[:] = path

        from gevent import monkey

        monkey.patch_all()
        import prometheus_client

        assert prometheus_client.registry.Lock is not monkey.get_original("threading", "Lock")
        hits = prometheus_client.Counter("hits", "Hits")
        metrics = prometheus_client.make_wsgi_app()

        def application(environ, start_response):
            if environ["PATH_INFO"] != "/metrics":
                hits.inc()
            return metrics(environ, start_response)
        """,
    )
    conf = start.write(
        "g.conf.py",
        """
        from gunicorn_passenger.hooks import *
        import gunicorn_passenger
        gunicorn_passenger.configure(prometheus=True)
        """,
    )
    process = start.python(
        GUNICORN, "-k", "sync", "-w", "2", "-c", conf, "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, "patched",
    )  # fmt: skip
    process.wait_log("not found yet", 2)
    wait_for(lambda: answers(process.socket), "a response")
    for _ in range(10):
        fetch(process.socket)
    (before,) = {hits(process) for _ in range(8)}
    assert before >= 10
    assert process.stop() == 0
    assert "Traceback" not in process.log()


def hits(process):
    """What a worker shows as the sum."""
    return float(re.search(r"^hits_total (.*)$", fetch(process.socket, "/metrics")[1], re.M)[1])
