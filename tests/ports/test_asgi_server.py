"""An ASGI application as a second server, beside a WSGI primary."""

import http.client
import os
import re
import signal
from contextlib import closing
from importlib import metadata

import pytest
import websockets.sync.client
from conditions import wait_for
from free_ports import free_port
from http_client import Client, answers, fetch, refused
from processes import GUNICORN, NO_CONTROL, PROGRAMS
from status_commands import only
from unmodified_servers import Requests, answering
from websockets.exceptions import ConnectionClosed

import gunicorn_passenger as passenger
from gunicorn_passenger import errors


async def asgi(scope, receive, send):
    pass


class Site:
    """The program ``asgi_site``, under gunicorn."""

    def __init__(self, start, *arguments, workers=2, **env):
        self.port = free_port()
        self.go, self.life = start.home / "go", start.home / "life"
        self.life.touch()
        self.env = {"P1": self.port, "GO": self.go, "LIFE": self.life, **env}
        self.workers = workers
        self._start, self._arguments = start, arguments

    def run(self):
        self.process = self._start.gunicorn(
            "asgi_site", *self._arguments, workers=self.workers, env=self.env
        ).wait_ready()
        return self

    def pids(self):
        wait_for(lambda: len(self.process.workers()) == self.workers, "the workers")
        return set(self.process.workers())

    def said(self, text):
        """The workers whose lifespan has said so."""
        lines = self.life.read_text().splitlines()
        return {int(line.split()[1]) for line in lines if line.split()[0] == text}


def test_an_asgi_application_beside_the_primary(start):
    site = Site(start).run()
    process, before = site.process, site.pids()
    answering(site.port, before)
    assert site.said("up") == site.said("listening") == before

    # what FastAPI calls in a thread runs in one of the system's
    assert fetch(site.port, "/threads") == (200, '{"result":"slept"}')
    assert fetch(site.port, "/fail")[0] == 500
    process.wait_log("the program's own error")
    with websockets.sync.client.connect(f"ws://127.0.0.1:{site.port}/ws") as peer:
        peer.send("hello")
        assert peer.recv().split()[0] == "hello"

    # the loop of each worker is blocked: the primary responds
    blocked = [Client(site.port) for _ in range(8)]
    for client in blocked:
        client.request("GET", "/block")
    wait_for(site.go.with_name("blocked").exists, "a blocked loop")
    for _ in range(20):
        assert fetch(process.socket) == (200, "primary")
    site.go.touch()
    for client in blocked:
        assert client.getresponse().read() == b"unblocked"
        client.close()
    site.go.unlink()

    def figures():
        (found,) = [s for s in only(start)["servers"] if s["name"] == "api"]
        return found

    # each worker publishes its counts once a second: those of the error may come after the others
    wait_for(lambda: figures()["requests"] >= 11 and figures()["errors"], "the figures")
    found = figures()
    assert found["errors"] == 1
    assert found["bytes"] > found["requests"] * 100
    assert len(found["workers"]) == 2

    # a reload under requests: none fails; the old workers finish what is open
    streaming, kept = Client(site.port), Client(site.port)
    streaming.request("GET", "/stream")
    response = streaming.getresponse()
    assert response.read(6) == b"first "
    kept.request("GET", "/")
    kept.getresponse().read()
    with (
        websockets.sync.client.connect(f"ws://127.0.0.1:{site.port}/ws") as peer,
        Requests(site.port) as asked,
    ):
        process.signal(signal.SIGHUP)
        with pytest.raises(ConnectionClosed) as closed:
            peer.recv(timeout=30)
        assert closed.value.rcvd.code == 1012
        wait_for(lambda: before.isdisjoint(asked.pids[-20:]), "the new workers alone to accept")
        assert site.said("down") <= before
        assert len(site.said("down")) < 2, "the worker with a response has not ended"
        site.go.touch()
        assert response.read() == b"second"
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert not asked.failures
    assert site.said("down") == before
    assert kept.sock.recv(1) == b""
    answering(site.port, site.pids())

    assert process.stop() == 0
    assert refused(site.port)
    assert site.said("down") == site.said("up")
    assert "graceful timeout" not in process.log()
    assert process.log().count("Traceback") == 1


def test_the_graceful_timeout(start):
    """It ends a response and a lifespan that are not finished."""
    site = Site(start, "--graceful-timeout", 1, workers=1, STAY=1).run()
    streaming = Client(site.port)
    streaming.request("GET", "/stream")
    response = streaming.getresponse()
    assert response.read(6) == b"first "
    (worker,) = site.pids()
    os.kill(worker, signal.SIGTERM)
    wait_for(lambda: worker not in site.process.workers(), "the end of the worker")
    with pytest.raises((OSError, http.client.HTTPException)):
        response.read()
    assert "the connections that are still open are closed" in site.process.log()
    assert "The lifespan of the ASGI server 'api' has not ended" in site.process.log()
    assert "Traceback" not in site.process.log()
    end_the_thread(site)
    assert site.process.stop() == 0


def end_the_thread(site):
    """gunicorn replaces a worker whose ASGI thread has ended. Returns the pid of the worker."""
    wait_for(lambda: answers(site.port), "the server")
    with closing(Client(site.port)) as client:
        client.request("GET", "/")
        worker = int(client.getresponse().read())
        client.request("GET", "/die")
        with pytest.raises((OSError, http.client.HTTPException)):
            client.getresponse()
    site.process.wait_log(
        r"the thread of the ASGI server 'api' has ended \(SystemExit\(.*\)\): gunicorn repl"
    )
    wait_for(lambda: worker not in site.process.workers(), "the end of the worker")
    answering(site.port, site.pids())
    return worker


def test_the_placements_one_and_each(start):
    site = Site(start, PLACEMENT="one", EACH=1).run()
    workers = site.pids()

    def ports():
        """The ports of the workers' own servers, and which worker responds there."""
        named = {s["name"]: s["address"] for s in only(start)["servers"] if s["name"].startswith("each")}
        found = {name: int(address.rpartition(":")[2]) for name, address in named.items()}
        return {name: (port, answers(port) and int(fetch(port)[1])) for name, port in found.items()}

    wait_for(lambda: {pid for _, pid in ports().values()} == workers, "a port for each worker")
    before = ports()
    assert set(before) == {"each.1", "each.2"}
    wait_for(lambda: answers(site.port), "the port")
    first = int(fetch(site.port)[1])
    assert {int(fetch(site.port)[1]) for _ in range(10)} == {first}
    assert site.said("up") == workers, "the lifespan starts in each worker, when it boots"
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: answers(site.port), "the next worker")
    assert fetch(site.port)[1] != str(first)
    wait_for(lambda: {pid for _, pid in ports().values()} == site.pids(), "the successor on its port")
    assert {name: port for name, (port, _) in ports().items()} == {
        name: port for name, (port, _) in before.items()
    }
    assert site.process.stop() == 0


@pytest.mark.parametrize("worker_class", ["gunicorn_passenger.Worker", "sync"])
def test_a_lifespan_that_fails_stops_the_start_in_one_line(start, worker_class):
    site = Site(start, FAIL=1)
    hooked = worker_class == "sync"
    if hooked:
        site.env["PRIMARY"] = 0
    process = start.python(
        GUNICORN, "-k", worker_class, "-w", 2, "-b", f"unix:{start.home}/app.sock", *NO_CONTROL,
        *(["-c", "python:gunicorn_passenger.hooks"] if hooked else []), "asgi_site", env=site.env,
    )  # fmt: skip
    assert process.wait_end() == (3 if hooked else 4)
    log = process.log()
    text = "server 'api' did not start: its lifespan failed at startup (RuntimeError: no database, "
    # gunicorn's own classes log an error with its traceback
    assert log.count("Exception in worker process" if hooked else text) == 1, log
    assert text in log
    assert re.search(r"no database, \S*asgi_site\.py:\d+\); correct", log)
    assert log.count("Traceback") == hooked


def test_under_plain_python(start):
    site = Site(start)
    process = start.python(PROGRAMS / "asgi_site.py", env={**site.env, "PORT": free_port()})
    wait_for(lambda: answers(site.port), process.log)
    assert fetch(site.port, "/threads") == (200, '{"result":"slept"}')
    process.signal(signal.SIGTERM)
    assert process.wait_end() == 0
    assert site.said("down") == {process.pid}


def test_under_another_worker_class(start):
    """By the hooks, in a worker that gevent has not patched; a drain waits for WebSockets with ``ws_stop="wait"``."""
    site = Site(start, WS_STOP="wait")
    conf = start.write("gunicorn.conf.py", "from gunicorn_passenger.hooks import *")
    site.env["PRIMARY"] = 0
    process = site.process = start.python(
        GUNICORN, "-k", "gthread", "-w", 2, "-c", conf, "-b", f"unix:{start.home}/app.sock", "asgi_site",
        env=site.env,
    ).wait_ready()  # fmt: skip
    before = site.pids()
    answering(site.port, before)
    assert fetch(site.port, "/threads") == (200, '{"result":"slept"}')
    with closing(Client(site.port)) as blocked:
        blocked.request("GET", "/block")
        wait_for(site.go.with_name("blocked").exists, "a blocked loop")
        for _ in range(4):
            assert fetch(process.socket) == (200, "primary")
        site.go.touch()
        assert blocked.getresponse().read() == b"unblocked"
    with (
        websockets.sync.client.connect(f"ws://127.0.0.1:{site.port}/ws") as peer,
        Requests(site.port) as asked,
    ):
        process.signal(signal.SIGHUP)
        wait_for(lambda: len(set(asked.pids) - before) == 2, "the new workers to accept")
        wait_for(
            lambda: len(before & set(process.workers())) == 1, "the end of the worker without a WebSocket"
        )
        peer.send("still")
        text, worker = peer.recv().split()
        assert (text, before & set(process.workers())) == ("still", {int(worker)})
        peer.close()
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
        answering(site.port, site.pids())
    assert not asked.failures
    assert site.said("down") == before
    assert "Traceback" not in process.log()
    ended = end_the_thread(site)
    assert process.stop() == 0
    assert site.said("down") == site.said("up") - {ended}


@pytest.mark.parametrize(
    ("version", "text"), [("", "has no uvicorn"), ("0.29.0", "uvicorn 0.29.0, which is too old")]
)
def test_without_uvicorn(monkeypatch, version, text):
    def find(_name):
        if not version:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", find)
    with pytest.raises(errors.PassengerError, match=text) as raised:
        passenger.create_server(asgi)
    assert "pip install 'gunicorn-passenger[asgi]'" in str(raised.value)
