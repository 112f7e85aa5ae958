"""The command line: which application it means, what it prints into a pipe, which process has a port, health."""

import json
import os
import subprocess
import sys

import pytest
from conditions import wait_for
from free_ports import free_range
from http_client import fetch, refused
from processes import COMMAND
from status_commands import command, only

REDIS_LIKE = """
    import socket, sys, time
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    print("listens", flush=True)
    time.sleep(1000)
"""

BOOTING = """
    import os, time
    while not os.path.exists("go"):
        time.sleep(0.02)

    def application(environ, start_response):
        start_response("200 OK", [("Content-Length", "0")])
        return []
"""


@pytest.fixture
def shop(start):
    """An application with a server on the first port, and daemons on the second (ours) and third (its own)."""
    first = free_range(4)
    program = start.write("own.py", REDIS_LIKE)
    spawns = (
        f"spawn(daemon_jobs.service, name='jobs', listen={first + 1})\n"
        f"spawn([{sys.executable!r}, {str(program)!r}, '{first + 2}'], name='own')\n"
        f"passenger.create_server(lambda e, s: (s('200 OK', []), [b'x'])[1]).listen({first}, name='second')\n"
    )
    process = start.gunicorn(
        "daemon_app", "-n", "shop", workers=1,
        env={"SPAWN": spawns, "PASSENGER_PORTS": f"{first}-{first + 3}"},
    ).wait_ready()  # fmt: skip
    process.wait_log(r"\[own\] listens")
    process.wait_log(r"\[jobs\] jobs on")
    process.first = first
    return process


def test_ports_names_the_server_and_the_daemon_that_have_a_port(start, shop):
    first = shop.first
    environment = {**start.environment, "PASSENGER_PORTS": f"{first}-{first + 3}"}
    start.environment = environment
    found = json.loads(command(start, "ports", "--json").stdout)
    holders = [(one["port"], one["application"], one["server"], one["daemon"]) for one in found["taken"]]
    assert holders == [
        (first, "shop", "second", None),
        (first + 1, "shop", None, "jobs"),
        (first + 2, "shop", None, "own"),
    ]
    assert found["free"] == str(first + 3)
    lines = command(start, "ports").stdout
    assert f"{first}  by server second of shop: " in lines
    assert f"{first + 2}  by daemon own of shop: " in lines


def test_the_port_that_a_daemon_has_opened_itself_is_not_free(start, shop):
    assert only(start)["ports"]["free"] == str(shop.first + 3)


@pytest.mark.parametrize("kind", ["name", "port", "address"])
def test_restart_and_stop_take_a_name_a_port_or_an_address(start, shop, kind):
    server = {"name": "second", "port": shop.first, "address": f"127.0.0.1:{shop.first}"}[kind]
    daemon = {"name": "jobs", "port": shop.first + 1, "address": f"127.0.0.1:{shop.first + 1}"}[kind]
    done = command(start, "stop", daemon)
    assert done.stdout == "the daemon jobs is being stopped\n", done.stderr
    wait_for(lambda: refused(shop.first + 1), "the daemon's port to be closed")
    done = command(start, "restart", daemon)
    assert done.stdout == "the daemon jobs is being restarted\n", done.stderr
    done = command(start, "restart", server)
    assert done.stdout == f"restarted second (127.0.0.1:{shop.first})\n", done.stderr
    wait_for(lambda: not refused(shop.first) and fetch(shop.first)[1] == "x", "the server")
    events = [event["text"] for event in only(start)["events"]]
    assert f"second (127.0.0.1:{shop.first}) was restarted by an operator" in events
    assert "jobs stopped by an operator" in events
    assert command(start, "restart", shop.first + 3).returncode == 1


def test_status_of_one_application(start, shop):
    for app in ("shop", shop.pid):
        done = command(start, "status", "--app", app)
        assert done.returncode == 0
        assert done.stdout.startswith("shop  running")
    done = command(start, "status", "--app", "shoe")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: --app shoe: no such application; running: shop (pid {shop.pid})")


def test_a_pipe_gets_every_name_whole(start, home):
    name = "a-daemon-with-a-name-of-a-hundred-characters-" + "x" * 55
    argument = "an-argument-of-the-command-that-is-longer-than-the-lines-of-most-terminals-are-wide"
    start.gunicorn(
        "daemon_app", workers=1, env={"SPAWN": f"spawn(['sleep', '9999', '--', '{argument}'], name='{name}')"}
    ).wait_ready()
    text = command(start, "status").stdout
    assert name in text
    assert argument in text


@pytest.mark.parametrize("arguments", [["ports"], ["ports", "--json"], ["status"], ["--help"]])
def test_a_reader_that_has_read_enough_is_not_an_error(start, arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as after `| head -0`
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(
            [sys.executable, COMMAND, *arguments],
            env=start.environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_health_is_the_exit_status_for_a_container(start, home):
    done = command(start, "health")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No application of account" in done.stderr
    start.write("booting.py", BOOTING)
    process = start.gunicorn("booting", "-n", "shop", workers=1)
    wait_for(lambda: "workers: 1 booting" in command(start, "health").stdout, "the worker")
    done = command(start, "health")
    assert done.returncode == 1
    assert done.stdout == f"shop (pid {process.pid}): not healthy; workers: 1 booting\n"
    (home / "go").touch()
    process.wait_ready()
    wait_for(lambda: command(start, "health").returncode == 0, "a worker that serves")
    assert command(start, "health", "--app", "shop").stdout == (
        f"shop (pid {process.pid}): healthy; workers: 1 ready\n"
    )
    assert command(start, "health", "--app", "other").returncode == 1


def test_health_with_another_worker_class(start):
    conf = start.write(
        "gunicorn.conf.py",
        "from gunicorn_passenger.hooks import *\nimport gunicorn_passenger\n"
        "gunicorn_passenger.spawn('sleep 1000')\nworker_class = 'sync'\n",
    )
    start.gunicorn("daemon_app", "-k", "sync", "-c", conf, workers=1).wait_ready()
    wait_for(lambda: "healthy; workers: 1 ready" in command(start, "health").stdout, "a worker that runs")


def test_requests_of_a_captured_primary_are_not_counted(start):
    """It accepts and responds by itself: the report says that the numbers are not known, not 0."""
    script = start.write(
        "server.py",
        """
        from wsgiref.simple_server import make_server
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "0")])
            return []
        make_server("127.0.0.1", 8000, application).serve_forever()
        """,
    )
    process = start.start_script(script, "-w", "1").wait_ready()
    wait_for(lambda: only(start)["servers"] and only(start)["servers"][0]["accepted"], "the connection")
    (primary,) = only(start)["servers"]
    assert [primary[key] for key in ("requests", "bytes", "errors")] == [None] * 3
    row = next(line for line in command(start, "status").stdout.splitlines() if "app.sock" in line)
    assert row.split()[-4:-1] == ["-", "-", "-"]
    assert process.stop() == 0
