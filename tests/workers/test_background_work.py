"""Work that the program does in threads: a worker that exits finishes it, within the graceful timeout."""

import signal

import pytest
from conditions import wait_for
from http_client import fetch

PROGRAM = """
    import os
    import queue
    import threading
    import time
    from concurrent.futures import ThreadPoolExecutor
    from wsgiref.simple_server import make_server

    threading.Thread(target=queue.Queue().get).start()
    pool = ThreadPoolExecutor(2)

    def work(path):
        while not os.path.exists(f"{os.environ['GATE']}"):
            time.sleep(0.05)
        with open(f"{os.environ['DONE']}{path}", "w") as file:
            file.write(str(os.getpid()))

    def consume(jobs):
        while True:
            work(jobs.get())

    def application(environ, start_response):
        path = environ["PATH_INFO"].strip("/")
        if path == "pool":
            pool.submit(work, path)
        elif path == "thread":
            threading.Thread(target=work, args=(path,), name="careful", daemon=False).start()
        elif path == "queue":
            jobs = queue.Queue()
            for _ in range(2):
                threading.Thread(target=consume, args=(jobs,), name="consumer", daemon=False).start()
            jobs.put(path)
        elif path == "server":
            server = make_server("127.0.0.1", int(os.environ["P1"]), application)
            threading.Thread(target=server.serve_forever).start()
        start_response("200 OK", [("Content-Length", "0")])
        return []
    """


@pytest.fixture
def run(start, home, port):
    start.write("background.py", PROGRAM)

    def begin(*arguments):
        env = {"P1": port, "GATE": home / "gate", "DONE": home / "done-"}
        env["PYTHONPATH"] = f"{home}:{start.environment['PYTHONPATH']}"
        return start.gunicorn("background", *arguments, workers=1, env=env).wait_ready()

    return begin


@pytest.mark.parametrize("where", ["pool", "thread", "queue"])
@pytest.mark.parametrize("how", ["TERM", "HUP", "max_requests"])
def test_work_in_threads_is_finished(run, home, where, how):
    process = run(*(["--max-requests", 2] if how == "max_requests" else []))
    (pid,) = process.workers()
    assert fetch(process.socket, f"/{where}")[0] == 200
    if how != "max_requests":
        process.signal(getattr(signal, f"SIG{how}"))
    if how == "HUP":
        wait_for(lambda: set(process.workers()) - {pid}, "the next worker")
        assert pid in process.workers()
    (home / "gate").touch()
    wait_for((home / f"done-{where}").exists, "the end of the work")
    wait_for(lambda: pid not in process.workers(), "the exit of the worker")
    assert (home / f"done-{where}").read_text() == str(pid)
    assert process.stop() == 0
    assert "is not finished" not in process.log()  # the threads that wait for a next job do not count


@pytest.mark.parametrize(("where", "named"), [("thread", "careful"), ("pool", "a pool of threads, .*")])
def test_work_that_takes_too_long(run, where, named):
    process = run("--graceful-timeout", 2)
    assert fetch(process.socket, f"/{where}")[0] == 200
    process.signal(signal.SIGTERM)
    assert process.wait_end() == 0
    process.wait_log(
        rf"\[WARNING\] Worker graceful timeout: .*threads is not finished: {named}; raise --graceful-timeout"
    )


def test_a_quick_stop_waits_for_no_thread(run):
    process = run("--graceful-timeout", 60)
    assert fetch(process.socket, "/thread")[0] == 200
    process.signal(signal.SIGINT)
    assert process.wait_end() == 0


def test_a_server_in_a_thread_has_no_end(run):
    """Plain Python would wait for it, and for a thread that waits for work; the worker does not."""
    process = run("--graceful-timeout", 600)
    assert fetch(process.socket, "/server")[0] == 200
    assert process.stop() == 0
    assert "is not finished" not in process.log()
