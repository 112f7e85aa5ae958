"""Unmodified servers share their ports under every worker class of gunicorn, by the hooks alone."""

import importlib.util
import json
import os
import signal
import socket
from contextlib import ExitStack

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch, refused
from processes import GUNICORN, NO_CONTROL
from status_commands import only
from unmodified_servers import Requests, answering

HOOKS = "from gunicorn_passenger.hooks import *\n"

CLASSES = ["sync", "gthread", "gevent", "tornado", "asgi", "uvicorn_worker.UvicornWorker"]
#: The modules that a class needs beside gunicorn's oldest version.
NEEDS = {"tornado": "tornado", "asgi": "gunicorn.workers.gasgi", CLASSES[-1]: "uvicorn_worker"}


class Site:
    """A gunicorn of another worker class, whose program has ports of its own."""

    def __init__(self, start, worker_class, *arguments, conf=HOOKS, app="ports_in_threads:wsgi", **env):
        self.go = start.home / "go"
        self.metrics, self.pages, self.ours = free_port(), free_port(), free_port()
        self.process = start.python(
            GUNICORN, "-k", worker_class, "-w", 2, "-c", start.write("gunicorn.conf.py", conf),
            "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, *arguments, app,
            env={"METRICS": self.metrics, "PAGES": self.pages, "OURS": self.ours, "GO": self.go, **env},
        ).wait_ready()  # fmt: skip

    def all_answer(self):
        """Both workers respond on all ports, and no other process does. Returns their pids."""
        wait_for(lambda: len(self.process.workers()) == 2, "two workers")
        workers = self.process.workers()
        for port in (self.metrics, self.pages, self.ours):
            answering(port, workers)
        return workers


@pytest.mark.parametrize("worker_class", CLASSES)
def test_servers_survive_their_workers(start, worker_class):
    """They share the master's sockets, and a worker that exits finishes what they have accepted."""
    if (needed := NEEDS.get(worker_class)) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    app = "ports_in_threads:" + ("wsgi" if NEEDS.get(worker_class, "tornado") == "tornado" else "asgi")
    site = Site(start, worker_class, app=app)
    process, before = site.process, set(site.all_answer())
    kept = Client(site.pages)
    kept.request("GET", "/")
    assert int(kept.getresponse().read()) in before
    waiting = [Client(site.pages), Client(site.ours)]
    for client in waiting:
        client.request("GET", "/wait")

    with ExitStack() as stack:
        ports = (site.pages, site.metrics, site.ours)
        asked = [stack.enter_context(Requests(port, threads=1)) for port in ports]
        process.signal(signal.SIGHUP)
        wait_for(
            lambda: all(before.isdisjoint(requests.pids[-20:]) for requests in asked),
            "the new workers alone to accept",
        )
        # the old workers finish their requests; their idle connections end
        site.go.touch()
        for client in waiting:
            response = client.getresponse()
            assert response.status == 200
            assert int(response.read()) in before
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert [requests.failures for requests in asked] == [[], [], []]
    assert kept.sock.recv(1) == b""

    first, second = site.all_answer()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: first not in (now := process.workers()) and len(now) == 2, "a worker in its place")
    assert second in site.all_answer()
    listed = {server["address"]: server for server in only(start)["servers"]}
    assert len(listed[f"127.0.0.1:{site.pages}"]["workers"]) == 2
    ours = listed[f"127.0.0.1:{site.ours}"]
    assert len(ours["workers"]) == 2
    assert ours["requests"] > 0
    assert "Worker graceful timeout" not in process.log()
    assert process.stop() == 0
    assert refused(site.pages)
    assert refused(site.ours)


def test_a_server_that_a_hook_starts_and_the_hooks_of_the_user(start):
    """With ``--preload`` the program's import runs in the master, so a hook starts what listens."""
    conf = """
        from gunicorn_passenger.hooks import *
        from gunicorn_passenger.hooks import *

        def pre_fork(server, worker):
            server.log.info("the user's pre_fork")

        def post_fork(server, worker):
            import ports_in_threads
            worker.log.info("the user's post_fork")
            ports_in_threads.start()
        """
    site = Site(start, "sync", "--preload", conf=conf, START_IN_HOOK=1)
    site.all_answer()
    for hook in ("pre_fork", "post_fork"):
        assert site.process.log().count(f"the user's {hook}") == 2
    assert site.process.stop() == 0


def test_a_worker_that_opens_no_port_pays_for_nothing(start):
    """No thread, and no gevent; a server of ours is refused with one error."""
    site = Site(start, "sync", app="listens_on_request")
    assert json.loads(fetch(site.process.socket)[1]) == {"gevent": False, "threads": 1}
    found = json.loads(fetch(site.process.socket, "/listen")[1])
    assert "the worker class 'sync', under which listen() does not work" in found["error"]
    assert site.process.stop() == 0


def test_a_port_that_another_program_has_stops_gunicorn_with_one_error(start):
    """Only one of the workers says so: a second failed boot would end the master with a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pages = listener.getsockname()[1]
        process = start.python(
            GUNICORN, "-k", "sync", "-w", 3, "-c", start.write("gunicorn.conf.py", HOOKS),
            "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, "ports_in_threads:wsgi",
            env={"METRICS": free_port(), "PAGES": pages},
        )  # fmt: skip
        assert process.wait_end() == 3
    assert f"127.0.0.1:{pages} is in use by" in process.log()
    assert process.log().count("Exception in worker process") == 1
    assert "Reason: Worker failed to boot" in process.log()


def test_the_hooks_beside_our_own_worker_class(start):
    site = Site(start, "gunicorn_passenger.Worker", app="ports_in_threads:wsgi")
    site.all_answer()
    assert site.process.stop() == 0
