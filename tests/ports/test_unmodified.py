"""Servers that are not ours, with no change to their code, under several workers."""

import json
import re

import pytest
from conditions import wait_for
from http_client import fetch, refused
from processes import PROGRAMS
from unmodified_servers import Requests, answering

SERVERS = [
    "gevent_pywsgi",
    "gevent_stream",
    "wsgiref",
    "http_server",
    "http_server_threading",
    "socketserver",
    "werkzeug",
    "flask",
    "prometheus",
    "cheroot",
    "waitress",
    "waitress_create",
    "asyncio",
]


def without_terms(log):
    """gunicorn 23 calls it an error when its second SIGTERM meets a worker that is at its end already."""
    return re.sub(r".*Worker \(pid:\d+\) was sent SIGTERM!", "", log)


@pytest.mark.parametrize("server", SERVERS)
def test_under_four_workers(start, port, server):
    process = start.gunicorn(f"serve_{server}", workers=4, env={"P1": port}).wait_ready(port)
    wait_for(lambda: len(process.workers()) == 4, "four workers")
    answering(port, process.workers())
    with Requests(port) as requests:
        process.hup(4)
        answering(port, process.workers())
    assert not requests.failures
    assert process.stop() == 0
    assert refused(port)
    assert len(re.findall(f"Opened 127.0.0.1:{port} ", process.log())) == 1
    assert not re.search("in use|EADDRINUSE|Traceback|ERROR", without_terms(process.log())), process.log()


#: Server -> what it says of a client on the UNIX socket; None where it says nothing.
PEERS = dict.fromkeys([*SERVERS, "flask_debug"], r"127\.0\.0\.1 [1-9]\d*") | {
    "wsgiref": r"127\.0\.0\.1 -",
    "prometheus": None,
}


@pytest.mark.parametrize("server", PEERS)
def test_captured_as_primary(start, port, server):
    """``gunicorn-passenger start`` on the program as it is."""
    script = PROGRAMS / f"serve_{server}.py"
    process = start.start_script(script, "-w", 3, env={"P1": port}).wait_ready()
    wait_for(lambda: len(process.workers()) == 3, "three workers")
    answering(process.socket, process.workers())
    if PEERS[server]:
        status, peer = fetch(process.socket, "/peer")
        assert status == 200
        assert re.fullmatch(PEERS[server], peer)
    assert refused(port)
    with Requests(process.socket) as requests:
        process.hup(3)
        answering(process.socket, process.workers())
    assert not requests.failures
    assert process.stop() == 0
    log = process.log()
    assert "Opened" not in log
    # several processes write the log: what follows on the line may be another's
    assert set(re.findall(r"listens on (\([^)]*\))", log)) <= {f"('127.0.0.1', {port})"}
    assert not re.search("in use|EADDRINUSE|Traceback|ERROR", without_terms(log)), log


def test_tcp_options_on_the_captured_primary(start, port):
    process = start.start_script(PROGRAMS / "tcp_options.py", env={"P1": port}).wait_ready()
    status, text = fetch(process.socket)
    assert status == 200
    found = json.loads(text)
    assert found["listening"]["name"] == found["accepted"]["name"] == ["127.0.0.1", port]
    (host, port), same = found["peers"]
    assert [host, port] == same
    assert host == "127.0.0.1"
    assert port > 0
    for sock in found["listening"], found["accepted"]:
        assert sock["info"] == 104
        assert len(sock["options"]) == 5
        assert sock["options"][4] == 1, "SO_KEEPALIVE is any socket's"
    assert "Traceback" not in process.log()


def test_the_debugger_of_a_captured_flask_script(start, port):
    process = start.start_script(PROGRAMS / "serve_flask_debug.py", "-w", 2, env={"P1": port}).wait_ready()
    status, text = fetch(process.socket, "/fail")
    assert status == 500
    assert "shown by the debugger" in text
    assert "Werkzeug Debugger" in text
    process.wait_log("Werkzeug's reloader is disabled under gunicorn; use gunicorn's own --reload", 2)


def test_a_captured_server_that_closes_and_listens_again(start, port):
    """Such as a script that restarts its server."""
    script = start.write(
        "restarts.py",
        f"""
        from http.server import HTTPServer
        from answering import Handler

        for _ in range(3):
            with HTTPServer(("127.0.0.1", {port}), Handler) as server:
                for _ in range(4):
                    server.handle_request()
        HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
        """,
    )
    process = start.start_script(script).wait_ready()
    for _ in range(20):
        assert fetch(process.socket)[0] == 200
    assert refused(port)
    assert "ERROR" not in process.log()


def test_a_script_whose_thread_outlives_it(start, port):
    """Plain Python waits for threads that are not daemons."""
    script = start.write(
        "outlives.py",
        """
        import threading
        import gevent
        from wsgiref.simple_server import make_server
        from answering import PORT, application

        script = gevent.getcurrent()

        def serve():
            script.join()  # the script has ended
            make_server("127.0.0.1", PORT, application).serve_forever()

        threading.Thread(target=serve).start()
        """,
    )
    process = start.start_script(script, env={"P1": port}).wait_ready()
    assert process.stop() == 0


def test_a_server_that_binds_by_itself_in_every_worker(start, port):
    process = start.gunicorn("c_server", workers=2, env={"P1": port})
    process.wait_log(
        r"\[ERROR\] A server of the program opens its port without Python's socket module, so the master "
        r"cannot share the port among the workers \(.*in use\): run gunicorn with --workers 1, or pass the "
        "server a listening socket made with Python's socket module"
    )
    assert process.wait_end() != 0
    assert refused(port)


def test_an_error_of_another_kind_that_says_that_the_port_is_in_use(start):
    """pyzmq's ``ZMQError`` has the number, but is not an ``OSError``."""
    start.write(
        "app.py",
        """
        import errno

        class ZMQError(Exception):
            errno = errno.EADDRINUSE

        raise ZMQError("Address already in use")
        """,
    )
    process = start.gunicorn("app", workers=1)
    assert process.wait_end() != 0
    assert "A server of the program opens its port without Python's socket module" in process.log()


def test_a_server_that_binds_by_itself_in_one_worker(start, home, port):
    process = start.gunicorn("c_server", workers=2, env={"P1": port, "FIRST": home / "first"}).wait_ready()
    pid = process.wait_log(
        rf"\[WARNING\] 127.0.0.1:{port} was opened without Python's socket module, so the master cannot share "
        r"it: only this worker accepts there \(pid:(\d+)\)"
    )[1]
    assert int(pid) in process.workers()
    wait_for(lambda: len(process.workers()) == 2, "two workers")
    answering(process.socket, process.workers())
    assert process.log().count("was opened without Python") == 1
    assert process.stop() == 0


def test_a_server_that_binds_by_itself_under_one_worker(start, port):
    """It works, and nothing is said."""
    process = start.gunicorn("c_server", workers=1, env={"P1": port}).wait_ready()
    assert not refused(port)
    assert process.stop() == 0
    assert "Python's socket module" not in process.log()
