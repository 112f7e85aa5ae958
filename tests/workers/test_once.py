"""passenger.once(): a function that runs in one worker of the application at a time."""

import os
import re
import signal

import pytest
from http_client import fetch
from obedient_workers import Told
from processes import COMMAND

PROGRAM = """
    import os
    import threading
    import gunicorn_passenger as passenger

    def start():
        print("started in", os.getpid(), flush=True)
        try:
            threading.Event().wait()
        finally:
            print("ended in", os.getpid(), flush=True)

    def stop():
        print("stopping in", os.getpid(), flush=True)

    passenger.once("scheduler", start, stop)

    def application(environ, start_response):
        start_response("200 OK", [("Content-Length", "0")])
        return []
    """


@pytest.fixture
def program(start):
    start.write("scheduled.py", PROGRAM)
    return start.gunicorn(
        "scheduled", workers=3, env={"PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"}
    ).wait_ready()


def events(process):
    """What happened, in the order of the log: at no time may it run twice."""
    found = re.findall(r"^(started|stopping|ended) in (\d+)$", process.log(), re.MULTILINE)
    running = set()
    for what, pid in found:
        if what == "started":
            assert not running, found
            running.add(pid)
        elif what == "ended":
            running.remove(pid)
    return found


def test_it_runs_in_one_worker_and_moves_when_that_drains(program):
    first = program.wait_log(r"started in (\d+)")[1]
    os.kill(int(first), signal.SIGTERM)
    second = program.wait_log(r"started in (\d+)", 2)[1]
    assert second != first
    assert ("stopping", first) in events(program)
    program.hup(3)
    program.wait_log(r"started in (\d+)", 3)
    assert int(events(program)[-1][1]) in program.workers()
    assert program.stop() == 0
    found = events(program)
    assert [what for what, _ in found[-2:]] == ["stopping", "ended"]
    assert "Traceback" not in program.log()


def test_it_moves_when_its_worker_is_killed(program):
    first = program.wait_log(r"started in (\d+)")[1]
    os.kill(int(first), signal.SIGKILL)
    second = program.wait_log(r"started in (\d+)", 2)[1]
    assert second != first


def test_an_operator_restarts_it(start, program):
    program.wait_log(r"started in (\d+)")
    assert start.run(COMMAND, "restart", "scheduler").wait_end() == 0
    program.wait_log("ended in")
    program.wait_log("started in", 2)
    events(program)


def test_an_error_is_logged_and_the_worker_serves(obedient):
    process, worker = obedient(1)
    worker.do("""
        import gunicorn_passenger as passenger
        passenger.once("broken", lambda: 1 / 0)
        """)
    process.wait_log(r"passenger.once\('broken'\): the program's function raised an error")
    process.wait_log("ZeroDivisionError")
    assert fetch(process.socket)[0] == 200
    for code, text in (
        ("passenger.once('broken', print)", "twice"),
        ("passenger.once('', print)", "a string of 1 to"),
        ("passenger.once('x', 5)", "must be functions"),
    ):
        with pytest.raises(Told, match=text):
            worker.do(code)
