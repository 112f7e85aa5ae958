"""Unmodified servers share their ports under every worker class of gunicorn, by the hooks alone."""

import http.client
import json
import os
import signal
import socket
from contextlib import ExitStack, contextmanager
from textwrap import dedent

import pytest
import websocket
from broker_access import run
from conditions import wait_for
from free_ports import free_port
from http_client import Client, accepted, answers, fetch, refused
from processes import GUNICORN, NO_CONTROL, listens, require_worker_class, starting
from status_commands import only
from unmodified_servers import Requests, answering

HOOKS = "from gunicorn_passenger.hooks import *\n"

CLASSES = ["sync", "gthread", "gevent", "gevent_pywsgi", "tornado", "asgi", "uvicorn_worker.UvicornWorker"]
#: Those whose primary is an ASGI application.
ASGI = ["asgi", "uvicorn_worker.UvicornWorker"]
#: Those whose ``--reload`` is tried here; for ``sync`` another test does.
RELOADED = ["gthread", "gevent", "asgi"]


class Site:
    """A gunicorn of another worker class, whose program has ports of its own."""

    def __init__(self, start, worker_class, *arguments, conf=HOOKS, app="ports_in_threads:wsgi", **env):
        self.go = start.home / "go"
        self.metrics, self.pages, self.ours, self.asgi = (free_port() for _ in range(4))
        self.ports = [self.metrics, self.pages, self.ours]
        if env.pop("asgi", False):
            self.ports.append(self.asgi)
            env["ASGI"] = self.asgi
        self.process = start.python(
            GUNICORN, "-k", worker_class, "-w", 2, "-c", start.write("gunicorn.conf.py", conf),
            "-b", f"unix:{start.home}/app.sock", "-b", f"127.0.0.1:{self.pages}", *NO_CONTROL, *arguments, app,
            env={"METRICS": self.metrics, "PAGES": self.pages, "OURS": self.ours, "GO": self.go, **env},
        ).wait_ready()  # fmt: skip

    def all_answer(self):
        """Both workers respond on all ports, and no other process does. Returns their pids."""
        wait_for(lambda: len(self.process.workers()) == 2, "two workers")
        workers = self.process.workers()
        for port in self.ports:
            answering(port, workers)
        assert self.servers_of_pages() == {"BaseHTTP"}
        return workers

    def servers_of_pages(self):
        """What serves the port that is in gunicorn's bind, too: the first words of its ``Server``."""
        found = set()
        for _ in range(8):
            client = Client(self.pages)
            client.request("GET", "/")
            response = client.getresponse()
            response.read()
            found.add(response.headers["Server"].partition("/")[0])
            client.close()
        return found


@pytest.mark.parametrize("worker_class", CLASSES)
def test_servers_survive_their_workers(start, worker_class):
    """They share the master's sockets, and a worker that exits finishes what they have accepted."""
    require_worker_class(worker_class)
    app = "ports_in_threads:" + ("asgi" if worker_class in ASGI else "wsgi")
    changed = start.write("changed.py", "")
    reload = ("--reload", "--reload-engine", "poll", "--reload-extra-file", changed)
    site = Site(start, worker_class, *reload * (worker_class in RELOADED), app=app, asgi=True)
    process, before = site.process, set(site.all_answer())
    kept = Client(site.pages)
    kept.request("GET", "/")
    assert int(kept.getresponse().read()) in before
    waiting = [Client(site.pages), Client(site.ours), Client(site.asgi)]
    for client in waiting:
        client.request("GET", "/wait")
        wait_for(lambda client=client: accepted(client), "a worker to accept")

    with replaced(site, lambda: process.signal(signal.SIGHUP)):
        # the old workers finish their requests; their idle connections end
        site.go.touch()
        for client in waiting:
            response = client.getresponse()
            assert response.status == 200
            assert int(response.read()) in before
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert kept.sock.recv(1) == b""

    first, second = site.all_answer()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: first not in (now := process.workers()) and len(now) == 2, "a worker in its place")
    assert second in site.all_answer()
    listed = {server["address"]: server for server in only(start)["servers"]}
    assert len(listed[f"127.0.0.1:{site.pages}"]["workers"]) == 2
    for port in (site.ours, site.asgi):
        ours = listed[f"127.0.0.1:{port}"]
        assert len(ours["workers"]) == 2
        assert ours["requests"] > 0
    if worker_class in RELOADED:
        with replaced(site, lambda: os.utime(changed)):
            pass
    assert "Worker graceful timeout" not in process.log()
    assert process.stop() == 0
    assert all(map(refused, site.ports))


@contextmanager
def replaced(site, begin):
    """Have gunicorn replace the workers by other ones. No request to a port is lost meanwhile and in the body."""
    before = set(site.process.workers())
    with ExitStack() as stack:
        asked = [stack.enter_context(Requests(port, threads=1)) for port in site.ports]
        begin()
        wait_for(
            lambda: all(r.pids and before.isdisjoint(r.pids[-20:]) for r in asked),
            "the new workers alone to accept",
        )
        yield
    assert [requests.failures for requests in asked] == [[], [], [], []]


def test_unmodified_servers_in_threads_of_a_worker_without_gevent(start):
    """wsgiref, waitress, cheroot, asyncio, uvicorn, hypercorn, tornado, aiohttp; a reload loses no client of theirs."""
    ports = [free_port() for _ in range(8)]
    process = start.python(
        GUNICORN, "-k", "sync", "-w", 2, "-c", "python:gunicorn_passenger.hooks", "-b",
        f"unix:{start.home}/app.sock", *NO_CONTROL, "servers_in_threads:wsgi",
        env={"PORTS": " ".join(map(str, ports)), "START_IN_HOOK": 1},
    ).wait_ready()  # fmt: skip
    wait_for(lambda: len(process.workers()) == 2, "two workers")
    before = set(process.workers())
    for port in ports:
        wait_for(lambda port=port: answers(port), "the first worker's thread to listen")
        answering(port, before)
    with ExitStack() as stack:
        asked = [stack.enter_context(Requests(port, threads=1)) for port in ports]
        process.signal(signal.SIGHUP)
        wait_for(
            lambda: all(len({*requests.pids} - before) == 2 for requests in asked),
            "the new workers to accept",
        )
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert [requests.failures for requests in asked] == [[]] * len(ports)
    assert "Worker graceful timeout" not in process.log()
    assert process.stop() == 0


#: Programs that gevent patches after the hooks were installed: unmodified servers on P1 and P3, which have greenlets
#: of the main thread. ``/wait`` on P3 responds when the file ``go`` is there. All threads of gevent's pool are busy.
PATCHED = """
    from gevent import monkey

    monkey.patch_all({patched})

    import os
    import time
    from http.server import HTTPServer
    from threading import Thread

    import gevent
    from gevent.pywsgi import WSGIServer
    from answering import Handler, application
    import gunicorn_passenger as passenger

    def wait(path):
        while path == "/wait" and not os.path.exists("go"):
            gevent.sleep(0.02)
        if path == "/wait":
            Thread(target=work, daemon=False).start()

    def work():
        for _ in range(10):
            time.sleep(0.02)
        open(f"worked-{os.getpid()}", "w").close()

    class Slow(Handler):
        def do_GET(self):
            wait(self.path)
            super().do_GET()

    def slow(environ, start_response):
        wait(environ["PATH_INFO"])
        return application(environ, start_response)

    def in_thread(port):
        Thread(target=HTTPServer(("127.0.0.1", port), Slow).serve_forever, daemon=True).start()

    def in_hub(port):
        WSGIServer(("127.0.0.1", port), slow, log=None).start()

    for name in ("P1", "P3"):
        {serve}(int(os.environ[name]))
    pool = gevent.get_hub().threadpool
    for _ in range(pool.maxsize):
        gevent.spawn(pool.spawn, monkey.get_original("time", "sleep"), 600)
    """


def gevent_patched(start, port, slow, patched="", serve="in_thread", others=""):
    start.write("late.py", dedent(PATCHED).replace("{patched}", patched).replace("{serve}", serve) + others)
    process = start.python(
        GUNICORN, "-k", "sync", "-w", 2, "-c", "python:gunicorn_passenger.hooks", "-b",
        f"unix:{start.home}/app.sock", *NO_CONTROL, "late:application",
        env={
            "P1": port, "P2": free_port(), "P3": slow,
            "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}",
        },
    ).wait_ready()  # fmt: skip
    wait_for(lambda: len(process.workers()) == 2, "two workers")
    answering(port, process.workers())
    waiting = Client(slow)
    waiting.request("GET", "/wait")
    wait_for(lambda: accepted(waiting), "a worker to accept")
    return process, waiting


OURS_BESIDE = "passenger.create_server(application).listen(int(os.environ['P2']))\n"


@pytest.mark.parametrize(
    ("patched", "serve", "others"),
    [("", "in_thread", ""), ("", "in_thread", OURS_BESIDE), ("thread=False", "in_hub", "")],
)
def test_a_program_that_gevent_patches_in_a_sync_worker(start, port, patched, serve, others):
    """Sockets of gevent's class get the master's, too. The program's greenlets belong to the thread in which
    gunicorn's loop ran: the worker that drains lets them go on."""
    process, waiting = gevent_patched(start, port, free_port(), patched, serve, others)
    before = set(process.workers())
    with Requests(port, threads=1) as asked:
        process.signal(signal.SIGHUP)
        wait_for(lambda: len({*asked.pids} - before) == 2, "the new workers to accept")
        wait_for(lambda: len(before & {*process.workers()}) == 1, "the end of an old worker")
        (start.home / "go").touch()
        response = waiting.getresponse()
        assert response.status == 200
        pid = int(response.read())
        assert pid in before
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert (start.home / f"worked-{pid}").exists()
    assert asked.failures == []
    waiting.close()
    for word in ("Traceback", "Worker graceful timeout"):
        assert word not in process.log()
    assert process.stop() == 0


def test_a_quick_stop_of_a_worker_whose_greenlets_finish(start, port):
    """gunicorn's signal handler sleeps, which gevent's hub must not."""
    slow = free_port()
    process, waiting = gevent_patched(start, port, slow)
    process.signal(signal.SIGTERM)
    wait_for(lambda: len(process.workers()) == 1, "the end of the worker without a request")
    (last,) = process.workers()
    os.kill(last, signal.SIGQUIT)
    assert process.wait_end() == 0
    waiting.close()
    for word in ("Traceback", "exited with code", "SIGKILL"):
        assert word not in process.log()


def test_an_asyncio_server_in_the_loop_of_a_patched_worker(start, port):
    """When gunicorn's loop has ended, its connections cannot finish: the worker does not wait for them."""
    require_worker_class("uvicorn_worker.UvicornWorker")
    start.write(
        "late.py",
        """
        import os
        from gevent import monkey

        monkey.patch_all()

        import asyncio

        kept = []

        async def answer(reader, writer):
            kept.append(writer)
            while await reader.readuntil(b"\\r\\n\\r\\n"):
                writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")

        async def application(scope, receive, send):
            while scope["type"] == "lifespan":
                message = await receive()
                if message["type"] == "lifespan.startup":
                    kept.append(await asyncio.start_server(answer, "127.0.0.1", int(os.environ["P1"])))
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})
        """,
    )
    process = start.python(
        GUNICORN, "-k", "uvicorn_worker.UvicornH11Worker", "-c", "python:gunicorn_passenger.hooks", "-b",
        f"unix:{start.home}/app.sock", "--graceful-timeout", 600, "--timeout", 600, *NO_CONTROL, "late:application",
        env={"P1": port, "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"},
    ).wait_ready()  # fmt: skip
    client = Client(port)
    wait_for(lambda: answers(port), "the server to listen")
    client.request("GET", "/")
    assert client.getresponse().read() == b"ok"
    assert process.stop() == 0
    client.close()


def test_hooks_and_children_of_the_program(start):
    """With ``--preload`` the program is imported in the master: a server of ours waits for the fork, and a hook
    starts the others. A child that a hook forks keeps no port open, and does not hide the end of its worker.
    """
    conf = """
        import os
        import time
        from gunicorn_passenger.hooks import *
        from gunicorn_passenger.hooks import *

        def pre_fork(server, worker):
            server.log.info("the user's pre_fork")

        def post_fork(server, worker):
            worker.log.info("the user's post_fork")
            if not os.fork():
                while not os.path.exists(os.environ["GO"]):
                    time.sleep(0.05)
                os._exit(0)
            import ports_in_threads
            ports_in_threads.start()
        """
    site = Site(start, "sync", "--preload", conf=conf, START_IN_HOOK=1)
    first, second = site.all_answer()
    for hook in ("pre_fork", "post_fork"):
        assert site.process.log().count(f"the user's {hook}") == 2
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: first not in (now := site.process.workers()) and len(now) == 2, "a worker in its place")
    site.all_answer()
    listed = {server["address"]: server for server in only(start)["servers"]}
    assert len(listed[f"127.0.0.1:{site.ours}"]["workers"]) == 2
    site.go.touch()
    assert site.process.stop() == 0


@pytest.mark.parametrize("worker_class", ["sync", "asgi"])
def test_a_worker_that_is_stopped_while_it_boots_finishes_what_it_has_accepted(start, worker_class):
    """gunicorn's asgi class loses the signal if uvloop is installed, and would be killed."""
    require_worker_class(worker_class)
    start.write(
        "slow_program.py",
        """
        import os
        import time
        from ports_in_threads import asgi, wsgi

        while not os.path.exists("loaded"):
            time.sleep(0.02)
        """,
    )
    pages, go = free_port(), start.home / "go"
    process = start.python(
        GUNICORN, "-k", worker_class, "-c", start.write("gunicorn.conf.py", HOOKS),
        "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, "--chdir", start.home,
        "slow_program:" + ("asgi" if worker_class == "asgi" else "wsgi"),
        env={"METRICS": free_port(), "PAGES": pages, "GO": go},
    )  # fmt: skip
    wait_for(lambda: answers(pages), "a server of the worker that boots")
    (old,) = process.workers()
    waiting = Client(pages)
    waiting.request("GET", "/wait")
    wait_for(lambda: accepted(waiting), "the worker to accept")
    os.kill(old, signal.SIGTERM)
    (start.home / "loaded").touch()
    wait_for(lambda: not listens(old, pages), "the worker to stop accepting")
    go.touch()
    response = waiting.getresponse()
    assert (response.status, int(response.read())) == (200, old)
    process.wait_ready()
    assert old not in process.workers()
    assert "Worker graceful timeout" not in process.log()
    assert process.stop() == 0


#: Code of gunicorn.conf.py: the first worker is told to stop when its class makes its event loop.
STOPPED_BEFORE_THE_LOOP = """
    import os
    import signal

    def post_worker_init(worker):
        if os.path.exists("told"):
            return
        open("told", "w").close()
        place, name = PLACE
        make = getattr(place, name)

        def make_loop(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return make(*arguments)

        setattr(place, name, make_loop)
    """


@pytest.mark.parametrize(
    ("worker_class", "place"),
    [
        ("tornado", "__import__('tornado.ioloop').ioloop.IOLoop, 'instance'"),
        ("uvicorn_worker.UvicornWorker", "worker.config, 'get_loop_factory'"),
    ],
)
def test_a_worker_that_is_stopped_before_its_loop_runs_finishes_what_it_has_accepted(
    start, worker_class, place
):
    """tornado's class forgets such a stop, and uvicorn's would end at once."""
    require_worker_class(worker_class)
    pages, ours, go = free_port(), free_port(), start.home / "go"
    start.write(
        "slow_program.py",
        """
        import os
        import time
        from ports_in_threads import asgi, wsgi

        while not os.path.exists("loaded"):
            time.sleep(0.02)
        """,
    )
    process = start.python(
        GUNICORN, "-k", worker_class,
        "-c", start.write("gunicorn.conf.py", HOOKS + dedent(STOPPED_BEFORE_THE_LOOP.replace("PLACE", place))),
        "-b", f"unix:{start.home}/app.sock", "--graceful-timeout", 600, "--timeout", 600, *NO_CONTROL,
        "--chdir", start.home, "slow_program:" + ("wsgi" if worker_class == "tornado" else "asgi"),
        env={"METRICS": free_port(), "PAGES": pages, "OURS": ours, "GO": go},
    )  # fmt: skip
    wait_for(lambda: answers(pages), "a server of the worker that boots")
    (old,) = process.workers()
    waiting = Client(pages)
    waiting.request("GET", "/wait")
    wait_for(lambda: accepted(waiting), "the worker to accept")
    (start.home / "loaded").touch()
    wait_for(
        lambda: (start.home / "told").exists() and not listens(old, pages), "the worker to stop accepting"
    )
    go.touch()
    response = waiting.getresponse()
    assert (response.status, int(response.read())) == (200, old)
    wait_for(lambda: old not in process.workers(), "the end of the worker")
    process.wait_ready()
    wait_for(lambda: answers(pages) and answers(ours), "the servers of the worker in its place")
    assert process.stop() == 0
    assert "Traceback" not in process.log()


def test_a_worker_that_leaves_loses_at_most_what_it_had_in_hand(start):
    """``TTOU``, gunicorn's timeout (``SIGABRT``), ``--reload`` and ``max_requests``; idle connections migrate to
    a sibling.
    """
    changed = start.write("changed.py", "")
    reload = ("--reload", "--reload-engine", "poll", "--reload-extra-file", changed)
    site = Site(start, "sync", "--max-requests", 40, *reload)
    process, workers = site.process, set(site.all_answer())

    def kept():
        """A connection to each worker."""
        found = {}

        def connect():
            client = Client(site.ours)
            client.request("GET", "/")
            found.setdefault(int(client.getresponse().read()), client)
            return set(found) == workers

        wait_for(connect, lambda: f"a connection to each of {workers}: {found}")
        return found

    with Requests(site.ours, threads=1) as asked:
        connections = kept()
        process.signal(signal.SIGTTOU)
        wait_for(lambda: len(process.workers()) == 1, "the end of a worker")
        (left,) = process.workers()
        for client in connections.values():
            client.request("GET", "/")
            assert int(client.getresponse().read()) == left
        process.signal(signal.SIGTTIN)
        workers = set(site.all_answer())
    assert asked.failures == []

    blocked = Client(process.socket)
    blocked.request("GET", "/block")
    free = {int(fetch(process.socket)[1]) for _ in range(3)}
    (stuck,) = workers - free
    with Requests(site.ours, threads=1) as asked:
        connections = kept()
        for client in connections.values():
            client.request("GET", "/wait")
        os.kill(stuck, signal.SIGABRT)
        wait_for(lambda: stuck not in process.workers(), "the end of the blocked worker")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            connections.pop(stuck).getresponse()
        site.go.touch()
        (client,) = connections.values()
        assert client.getresponse().status == 200
        workers = set(site.all_answer())
    assert not [error for error in asked.failures if isinstance(error, ConnectionRefusedError)]

    site.go.unlink()
    waiting = [Client(site.pages), Client(site.ours)]
    with Requests(site.ours, threads=1) as asked, Requests(site.pages, threads=1) as pages:
        for client in waiting:
            client.request("GET", "/wait")
            wait_for(lambda client=client: accepted(client), "a worker to accept")
        os.utime(changed)
        # gunicorn starts the next workers when these have exited; new clients wait until then
        wait_for(lambda: not any(listens(pid, site.ours) for pid in workers), "the workers to stop accepting")
        site.go.touch()
        for client in waiting:
            response = client.getresponse()
            assert response.status == 200
            assert int(response.read()) in workers
        wait_for(lambda: len({*asked.pids} - workers) == 2, "the next workers to accept")
    assert asked.failures == pages.failures == []
    workers = set(site.all_answer())

    with Requests(site.ours, threads=1) as asked, Requests(site.pages, threads=1) as pages:
        wait_for(
            lambda: fetch(process.socket)[0] == 200 and workers.isdisjoint(process.workers()),
            "the end of workers that have served enough",
        )
    assert asked.failures == pages.failures == []
    assert process.stop() == 0


class OneWorker:
    """A gunicorn with one worker of the class ``sync``, whose program opens servers when it is asked to."""

    def __init__(self, start, *arguments):
        self.ours, self.proxy, self.hub = free_port(), free_port(), free_port()
        self.go = start.home / "go"
        self.process = start.python(
            GUNICORN, "-k", "sync", "-c", "python:gunicorn_passenger.hooks",
            "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, *arguments, "every_kind_of_server",
            env={"OURS": self.ours, "PROXY": self.proxy, "HUB": self.hub, "GO": self.go},
        ).wait_ready()  # fmt: skip

    def facts(self, path="/"):
        status, body = fetch(self.process.socket, path)
        assert status == 200, body
        return json.loads(body)


@pytest.fixture(scope="module")
def one():
    with starting() as start:
        worker = OneWorker(start)
        before = worker.facts()
        assert (before["gevent"], before["threads"], before["active"]) == (False, 1, True)
        worker.home = start
        worker.facts("/open")
        yield worker
        worker.go.touch()
        assert worker.process.stop() == 0
        assert worker.process.log().count("exit of") == 1
        assert worker.process.log().count("once ends in") == 1


def test_the_application_runs_in_native_threads(one):
    """Calls that block hold up neither the server nor each other, and no more than ``threads`` run."""
    waiting = [Client(one.ours) for _ in range(4)]
    for client in waiting[:2]:
        client.request("GET", "/wait")
    assert fetch(one.ours)[0] == 200
    waiting[2].request("GET", "/wait")
    wait_for(lambda: len({*one.facts()["waiting"]}) == 3, "three threads to wait")
    waiting[3].request("GET", "/")
    # the proxy and the server without threads are not concerned
    hub = fetch(one.hub)[1]
    assert fetch(one.hub)[1] == hub
    assert only(one.home)["servers"]
    waiting[3].sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        waiting[3].sock.recv(1)
    one.go.touch()
    for client in waiting[:3]:
        assert client.getresponse().status == 200
    waiting[3].sock.settimeout(30)
    assert waiting[3].getresponse().status == 200


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/length", b"x" * 300_000, (200, "300000")),
        ("/length", [b"x" * 1000] * 20, (200, "20000")),
        ("/file", None, (200, "from a file")),
        ("/write", None, (200, "written, returned")),
    ],
)
@pytest.mark.parametrize("through", ["ours", "proxy", "primary"])
def test_requests(one, path, body, expected, through):
    """Directly, through a proxy on a port, and through a proxy that is a part of the primary."""
    where, prefix = (one.process.socket, "/via") if through == "primary" else (getattr(one, through), "")
    assert fetch(where, prefix + path, "GET" if body is None else "POST", body) == expected


def test_errors(one):
    assert fetch(one.ours, "/error")[0] == 500
    one.process.wait_log("ValueError: as asked")
    client = Client(one.ours)
    client.request("GET", "/late")
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        client.getresponse().read()
    assert fetch(one.ours)[0] == 200


def test_a_stream_is_sent_at_once_from_one_thread_and_closed_when_the_client_leaves(one):
    client = Client(one.ours)
    client.request("GET", "/stream")
    response = client.getresponse()
    assert len({response.readline() for _ in range(5)}) == 1
    response.close()
    client.close()
    wait_for(lambda: one.facts()["closed"] == ["/stream"], "the end of the stream")


@pytest.mark.parametrize("through", ["ours", "proxy"])
def test_a_websocket(one, through):
    ws = websocket.create_connection(f"ws://127.0.0.1:{getattr(one, through)}/ws", timeout=30)
    for size in (5, 70_000):
        ws.send("x" * size)
        assert ws.recv() == "x" * size
    ws.close()


def test_what_the_program_and_the_operator_see(one):
    facts = one.facts()
    assert facts["told"] == {"ready": 1, "listening": ["ours", "proxy", "hub"], "exit": 0}
    assert [server[0] for server in facts["servers"]] == ["ours", "proxy", "hub"]
    assert (
        "listen('passenger') needs -k gunicorn_passenger.Worker" in fetch(one.process.socket, "/primary")[1]
    )
    assert fetch(one.hub)[0] == 200

    def counted():
        listed = {server["name"]: server for server in only(one.home)["servers"]}
        return listed["hub"]["requests"] > 0 and listed["hub"]["bytes"] > 0

    wait_for(counted, "the requests of the server in the report")
    one.process.wait_log(r"once runs in \d+")
    (worker,) = only(one.home)["workers"]
    assert worker["state"] == "ready"


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


def test_a_worker_that_cannot_boot_because_gunicorn_stops_is_not_a_failure(start):
    """The port of an unmodified server may be a leaving sibling's still. gunicorn would end with a traceback."""
    start.write(
        "refused_at_the_stop.py",
        """
        import errno
        import os
        import signal
        import time
        from ports_in_threads import wsgi

        if os.path.exists("again"):
            # gunicorn has closed its sockets and sent the signal, which its class has not seen
            sent = []
            signal.signal(signal.SIGTERM, lambda *_: sent.append(True))
            open("booting", "w").close()
            while not sent:
                time.sleep(0.02)
            raise OSError(errno.EADDRINUSE, "refused")
        """,
    )
    process = start.python(
        GUNICORN, "-k", "sync", "-c", start.write("gunicorn.conf.py", HOOKS), "-b", f"unix:{start.home}/app.sock",
        # the thread of the unmodified server must not keep the worker until gunicorn kills it
        "--graceful-timeout", 600, *NO_CONTROL, "--chdir", start.home, "refused_at_the_stop:wsgi",
        env={"METRICS": free_port(), "PAGES": free_port()},
    ).wait_ready()  # fmt: skip
    (start.home / "again").touch()
    process.signal(signal.SIGTTIN)
    wait_for((start.home / "booting").exists, "the second worker to boot")
    assert process.stop() == 0
    assert "Traceback" not in process.log()


def test_without_the_hooks_the_program_does_not_start(start):
    """What the hooks are for."""
    process = start.python(
        GUNICORN, "-k", "sync", "-w", 2, "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, "ports_in_threads:wsgi",
        env={"METRICS": free_port(), "PAGES": free_port()},
    )  # fmt: skip
    assert process.wait_end() != 0
    assert "Address already in use" in process.log()


def test_a_port_closes_after_no_worker_has_used_it_for_the_grace_period(start, port):
    conf = HOOKS + "import gunicorn_passenger\ngunicorn_passenger.configure(grace_period=0.2)\n"
    process = start.python(
        GUNICORN, "-k", "sync", "-c", start.write("gunicorn.conf.py", conf), "-b", f"unix:{start.home}/app.sock",
        *NO_CONTROL, "anything",
    ).wait_ready()  # fmt: skip
    run(process, f"server = passenger.create_server(whoami).listen({port})")
    wait_for(lambda: answers(port), "the server")
    run(process, "server.close()")
    process.wait_log(f"Closed 127.0.0.1:{port}: no worker has wanted it for 0.2 s")
    assert refused(port)
    assert process.stop() == 0


def test_the_hooks_beside_our_own_worker_class(start):
    site = Site(start, "gunicorn_passenger.Worker", app="ports_in_threads:wsgi")
    site.all_answer()
    assert site.process.stop() == 0
