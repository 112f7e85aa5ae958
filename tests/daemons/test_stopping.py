"""How daemons stop: which processes get the signal, and in which order the daemons stop."""

import os
import re
import signal
import sys

import pytest
from conditions import wait_for
from daemon_site import lives
from http_client import fetch
from processes import COMMAND, GUNICORN, require, require_package

from gunicorn_passenger.daemons.spec import build_spec, stop_waves

HEAD = "from gunicorn_passenger.hooks import *\nimport gunicorn_passenger as passenger\n"

FAMILY = """
    import os, signal, sys, time

    def stop(who):
        def handler(*_):
            print(who, "got SIGTERM", flush=True)
            if who == "first" and FIRST_WAITS:
                os.waitpid(child, 0)
            os._exit(0)
        return handler

    FIRST_WAITS = len(sys.argv) > 1
    reader, writer = os.pipe()
    child = os.fork()
    signal.signal(signal.SIGTERM, stop("first" if child else "second"))
    if child:
        os.read(reader, 1)
        print("family", os.getpid(), child, flush=True)
    else:
        os.write(writer, b".")
    while True:
        time.sleep(1)
"""

TASKS = """
    import os, time
    from celery import Celery

    app = Celery("tasks", broker=os.environ["REDIS"], backend=os.environ["REDIS"])
    app.conf.worker_hijack_root_logger = False

    @app.task
    def work():
        print("the task runs", flush=True)
        while not os.path.exists("finish"):
            time.sleep(0.02)
        return "done"
"""


def run(start, conf, *arguments, app="daemon_app", **options):
    conf = start.write("gunicorn.conf.py", HEAD + conf)
    return start.python(
        GUNICORN, "-k", "sync", "-w", 1, "-c", conf, "-b", f"unix:{start.home}/app.sock", *arguments, app,
        **options,
    ).wait_ready()  # fmt: skip


def stopped(process):
    """The names of the daemons that have stopped, in this order."""
    return re.findall(r"Daemon (\S+) has stopped", process.log())


def spec(name, **options):
    return build_spec(["sleep", "9"], name=name, **options)


# --- the order -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "waves"),
    [
        ([None, None, None], [["c"], ["b"], ["a"]]),
        ([[], [], []], [["c", "b", "a"]]),
        ([None, [], ["b"]], [["c", "a"], ["b"]]),
        ([None, ["a"], ["a"]], [["c", "b"], ["a"]]),
        ([[], ["a"], ["b"]], [["c"], ["b"], ["a"]]),
    ],
)
def test_daemons_stop_in_reverse_order_of_spawn_unless_after_says_otherwise(after, waves):
    specs = [spec(name, after=names) for name, names in zip("abc", after, strict=True)]
    assert [[one.name for one in wave] for wave in stop_waves(specs)] == waves


def test_daemons_stop_one_after_the_other(start):
    """The second is not told to stop while the first still stops."""
    waits = start.write(
        "waits.py",
        """
        import os, signal, sys, time

        def stop(*_):
            print("stopping", flush=True)
            while not os.path.exists(sys.argv[1]):
                time.sleep(0.02)
            os._exit(0)

        signal.signal(signal.SIGTERM, stop)
        print("runs", flush=True)
        while True:
            time.sleep(1)
        """,
    )
    names = ["store", "queue", "clock"]
    spawns = "".join(
        f"passenger.spawn(['{sys.executable}', '{waits}', '{start.home}/end-{name}'], name='{name}', "
        "stop_timeout=600, on_reload='restart')\n"
        for name in names
    )
    process = run(start, spawns)
    for name in names:
        process.wait_log(rf"\[{name}\] runs")
    for count, number in enumerate([signal.SIGHUP, signal.SIGTERM], 1):
        process.signal(number)
        for name in reversed(names):
            process.wait_log(rf"\[{name}\] stopping", count)
            earlier = names[: names.index(name)]
            assert not any(
                len(re.findall(rf"\[{other}\] stopping", process.log())) == count for other in earlier
            )
            (start.home / f"end-{name}").touch()
        wait_for(lambda count=count: len(stopped(process)) == 3 * count, process.log)
        for name in names:
            (start.home / f"end-{name}").unlink()
            if number == signal.SIGHUP:
                process.wait_log(rf"\[{name}\] runs", 2)
    assert process.wait_end() == 0
    assert stopped(process) == ["clock", "queue", "store"] * 2


def test_plain_python_stops_its_daemons_in_that_order(start):
    start.write("family.py", FAMILY)
    script = start.write(
        "plain.py",
        """
        import os, sys, time
        import gunicorn_passenger as passenger
        for name in ("one", "two"):
            passenger.spawn([sys.executable, "family.py"], name=name)
        while not os.path.exists("end"):
            time.sleep(0.02)
        """,
    )
    process = start.python(script)
    for name in ("one", "two"):
        process.wait_log(rf"\[{name}\] family")
    (start.home / "end").touch()
    assert process.wait_end() == 0
    assert re.findall(r"\[(\w+)\] first got SIGTERM", process.log()) == ["two", "one"]


@pytest.mark.parametrize(
    ("after", "text"),
    [
        ("'store'", "use a list of daemons' names"),
        ("['stroe']", "'queue' can only name daemons that were spawned"),
    ],
)
@pytest.mark.parametrize("where", ["conf", "app", "plain"])
def test_a_mistake_in_after_is_an_error_that_names_it(start, after, text, where):
    spawns = f"spawn('sleep 8', name='store')\nspawn('sleep 9', name='queue', after={after})\n"
    if where == "app":
        process = start.gunicorn("daemon_app", env={"SPAWN": spawns})
    elif where == "plain":
        process = start.python("-c", "from gunicorn_passenger import spawn\n" + spawns)
    else:
        conf = start.write("gunicorn.conf.py", HEAD + "from gunicorn_passenger import spawn\n" + spawns)
        process = start.python(GUNICORN, "-c", conf, "-b", f"unix:{start.home}/app.sock", "daemon_app")
    assert process.wait_end() != 0
    assert text in process.log()
    assert not process.session()


# --- which processes get the signal ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told", "killed"),
    [
        ("", ["first"], True),
        (", kill_mode='mixed'", ["first"], True),
        (", kill_mode='group'", ["first", "second"], False),
    ],
)
def test_kill_mode_says_which_processes_get_sigterm(start, options, told, killed):
    start.write("family.py", FAMILY)
    command = [sys.executable, "family.py", *(["waits"] if "group" in options else [])]
    process = run(start, f"passenger.spawn({command}, name='it', stop_timeout=600{options})")
    pids = [int(pid) for pid in process.wait_log(r"\[it\] family (\d+) (\d+)").groups()]
    assert process.stop() == 0
    log = process.log()
    assert sorted(re.findall(r"\[it\] (\w+) got SIGTERM", log)) == told
    assert ("Daemon it has exited and left 1 processes behind, which are killed" in log) == killed
    assert not any(lives(pid) for pid in pids)


def test_what_a_crashed_daemon_leaves_behind_gets_sigterm_first(start):
    """Its first process cannot stop its children any more."""
    start.write("family.py", FAMILY)
    process = run(start, f"passenger.spawn(['{sys.executable}', 'family.py'], name='it', stop_timeout=600)")
    first, second = (int(pid) for pid in process.wait_log(r"\[it\] family (\d+) (\d+)").groups())
    os.kill(first, signal.SIGKILL)
    process.wait_log(r"\[it\] second got SIGTERM")
    process.wait_log(r"\[it\] family (\d+)", 2)
    assert not lives(second)
    assert process.stop() == 0


def test_an_unknown_kill_mode_is_an_error(start):
    process = start.gunicorn("daemon_app", env={"SPAWN": "spawn('sleep 9', kill_mode='all')"})
    assert process.wait_end() != 0
    assert "spawn(kill_mode='all'): use 'mixed' or 'group'" in process.log()


# --- Celery and Redis --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "restart"])
def test_celery_finishes_its_task_and_stores_the_result_before_redis_stops(start, how):
    require_package("celery")
    redis = require("redis-server")
    start.write("tasks.py", TASKS)
    start.write(
        "app.py",
        """
        import tasks

        def application(environ, start_response):
            if environ["PATH_INFO"] == "/work":
                tasks.work.delay()
            start_response("200 OK", [("Content-Length", "0")])
            return []
        """,
    )
    store = f"{start.home}/redis.sock"
    process = run(
        start,
        f"passenger.spawn('{redis} --port 0 --unixsocket {store} --save \"\" --dir {start.home}', name='redis')\n"
        f"passenger.spawn(['{sys.executable}', '-m', 'celery', '-A', 'tasks', 'worker', '-c', '1', '-l', 'info',"
        " '--without-gossip', '--without-mingle'], name='celery', stop_timeout=600)\n",
        app="app",
        env={"REDIS": f"redis+socket://{store}"},
    )
    process.wait_log(r"\[celery\] .*ready\.")
    assert fetch(process.socket, "/work")[0] == 200
    process.wait_log(r"\[celery\] .*the task runs")
    if how == "restart":
        restart = start.run(COMMAND, "restart", "celery")
        assert restart.wait_end() == 0
    else:
        process.signal(signal.SIGTERM)
    process.wait_log(r"\[celery\] .*Warm shutdown")
    (start.home / "finish").touch()
    process.wait_log(r"\[celery\] .*Task tasks\.work\S* succeeded")
    process.wait_log("Daemon celery has stopped")
    if how == "restart":
        process.wait_log(r"\[celery\] .*ready\.", 2)
        process.signal(signal.SIGTERM)
    assert process.wait_end() == 0
    log = process.log()
    assert "WorkerLostError" not in log
    assert "ConnectionError" not in log
    assert log.rindex("Daemon celery has stopped") < log.index("User requested shutdown")
