"""Reloads without a gap, and reloads that fail: a worker accepts at any time.

A worker of ``gated_app`` boots when the test lets it, so nothing here depends on how long that takes.
"""

import json
import os
import re
import signal
import threading

import pytest
import socketio
import websocket
from conditions import wait_for
from free_ports import free_port, free_range
from http_client import Client, fetch, pids_answering, refused
from processes import COMMAND
from status_commands import wait_workers_ready


class Gated:
    """A gunicorn with ``gated_app`` on all of its servers."""

    def __init__(self, start, home, *arguments, workers=1, app="gated_app", env=None, conf=""):
        self.home, self.number = home, workers
        first = free_range(3)
        self.ports = [first, first + 1, first + 2]
        self.release("1")
        self.version("1")
        if conf:
            start.write("gunicorn.conf.py", conf)
        self.process = start.gunicorn(
            app, "--graceful-timeout", 600, "--timeout", 600, *arguments, workers=workers,
            env={"P1": first, "P2": first + 1, "P3": first + 2, **(env or {})},
        ).wait_ready()  # fmt: skip
        self.places = [self.process.socket, *self.ports]
        wait_for(lambda: len(self.boots("1")) == workers, "the workers to boot")
        wait_for(self.all_ready, self.process.log)

    def version(self, version):
        """What a worker that boots from now on is."""
        (self.home / "version").write_text(version)

    def release(self, version):
        """Let the workers of a version boot."""
        (self.home / f"go-{version}").touch()

    def boots(self, version):
        """The pids of the workers that began to boot with a version."""
        return {int(path.name.rpartition("-")[2]) for path in self.home.glob(f"boots-{version}-*")}

    def report(self, start):
        done = start.python(COMMAND, "status", "--json")
        assert done.wait_end() == 0, done.log()
        return json.loads(done.log())["applications"][0]

    def all_ready(self):
        return {fetch(self.process.socket)[1] for _ in range(4 * self.number)} and all(
            fetch(place)[0] == 200 for place in self.ports
        )

    def ask(self, times=1):
        """Ask every server; the versions and the pids of those that answered."""
        found = [fetch(place) for place in self.places for _ in range(times)]
        assert {status for status, _ in found} == {200}
        return {body.split()[0] for _, body in found}, {int(body.split()[1]) for _, body in found}

    def hup(self, version):
        """Reload; return when as many workers as there are to be have begun to boot."""
        self.version(version)
        self.process.signal(signal.SIGHUP)
        wait_for(lambda: len(self.boots(version)) >= self.number, self.process.log)

    def replaced_by(self, version):
        """Wait until only workers of this version are left."""
        wait_for(
            lambda: (
                len(self.process.workers()) == self.number
                and set(self.process.workers()) <= self.boots(version)
            ),
            self.process.log,
        )
        assert self.ask(3)[0] == {version}


class Asking:
    """Asks every server all the time, in a thread for each; every request has to be answered."""

    def __init__(self, places):
        self.failures, self.answers, self._ended = [], [], threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(place,)) for place in places]

    def _ask(self, place):
        while not self._ended.is_set():
            try:
                status, body = fetch(place)
                self.answers.append(body.split()[0])
                if status != 200:
                    self.failures.append((place, body))
            except OSError as error:
                self.failures.append((place, error))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join()
        assert not self.failures


@pytest.mark.parametrize("workers", [1, 4])
def test_the_old_workers_serve_until_the_new_ones_do(start, home, workers):
    site = Gated(start, home, workers=workers)
    old = set(site.process.workers())
    with Asking(site.places):
        site.hup("2")
        versions, pids = site.ask(5)
        assert versions == {"1"}
        assert pids <= old
        assert old <= set(site.process.workers())
        site.release("2")
        site.replaced_by("2")
    assert "Traceback" not in site.process.log()


@pytest.mark.parametrize("workers", [1, 4])
def test_reloads_faster_than_the_program_boots(start, home, workers):
    """The old workers serve, boots that a further reload has overtaken end, and the last version wins."""
    site = Gated(start, home, workers=workers)
    old = set(site.process.workers())
    with Asking(site.places):
        for version in "23456":
            site.hup(version)
            assert site.ask()[0] == {"1"}
        wait_for(lambda: set(site.process.workers()) == old | site.boots("6"), site.process.log)
        for version in "23456":
            site.release(version)
        site.replaced_by("6")
    assert "Traceback" not in site.process.log()


def test_reloads_before_the_first_workers_are_ready(start, home):
    (home / "version").write_text("1")
    process = start.gunicorn("gated_app", "--timeout", 600, workers=1)

    def boots(version):
        return len(list(home.glob(f"boots-{version}-*")))

    wait_for(lambda: boots("1"), process.log)
    for version in "23":
        (home / "version").write_text(version)
        process.signal(signal.SIGHUP)
        wait_for(lambda v=version: boots(v), process.log)
    # the one that began first is not given up, since nothing else serves
    wait_for(lambda: len(process.workers()) == 2, process.log)
    (home / "go-1").touch()
    process.wait_ready()
    assert fetch(process.socket)[1].startswith("1 ")
    (home / "go-3").touch()
    wait_for(lambda: fetch(process.socket)[1].startswith("3 "), process.log)
    # the master dies while a worker boots: that ends, and the worker that serves drains
    (home / "version").write_text("4")
    process.signal(signal.SIGHUP)
    wait_for(lambda: boots("4"), process.log)
    sock = Client(process.socket)
    sock.connect()
    ws = websocket.create_connection("ws://localhost/", socket=sock.sock, timeout=60)
    process.signal(signal.SIGKILL)
    assert ws.recv_data()[0] == websocket.ABNF.OPCODE_CLOSE
    ws.close()
    wait_for(lambda: process.log().count("if the master has died, start gunicorn again") == 2, process.log)
    (home / "go-4").touch()
    wait_for(lambda: not process.session(), process.log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_does_not_wait_for_the_new_workers(start, home, number):
    site = Gated(start, home, workers=2)
    site.hup("2")
    site.process.signal(number)
    assert site.process.wait_end() == 0
    assert "graceful timeout" not in site.process.log()
    wait_for(lambda: not site.process.session(), "no process to be left")


#: gunicorn obeys WINCH only where this is set
DAEMON = """
def when_ready(server):
    server.cfg.set("daemon", True)
on_reload = when_ready
"""


def test_ttou_ttin_and_winch_while_a_reload_boots(start, home):
    site = Gated(start, home, workers=2, conf=DAEMON)
    site.hup("2")
    site.process.signal(signal.SIGTTOU)
    site.process.wait_log("Handling signal: ttou")
    site.number = 1
    wait_for(lambda: len(site.process.workers()) == 2, site.process.log)
    assert site.ask(3)[0] == {"1"}
    site.process.signal(signal.SIGTTIN)
    site.release("2")
    site.number = 2
    site.replaced_by("2")
    site.hup("3")
    site.process.signal(signal.SIGWINCH)
    wait_for(lambda: not site.process.workers(), site.process.log)
    # the workers that were stopped while they booted are not a failure
    assert not site.report(start)["failure"]
    assert site.process.stop() == 0


def test_without_an_overlap_the_old_workers_leave_at_once(start, home):
    site = Gated(start, home, workers=2, env={"PASSENGER_OVERLAP": 0})
    old = set(site.process.workers())
    site.hup("2")
    wait_for(lambda: not old & set(site.process.workers()), site.process.log)
    site.release("2")
    site.replaced_by("2")


def test_after_the_overlap_the_old_workers_leave(start, home):
    site = Gated(start, home, workers=2, conf="import gunicorn_passenger as p\np.configure(overlap=0.5)\n")
    old = set(site.process.workers())
    site.hup("2")
    wait_for(lambda: not old & set(site.process.workers()), site.process.log)
    site.process.wait_log("WARNING.*a new worker is still booting after 0.5 s.*set overlap to more seconds")
    site.release("2")
    site.replaced_by("2")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_has_had_its_requests_serves_until_its_successor_does(start, home, workers):
    site = Gated(start, home, "--max-requests", 60, workers=workers)
    site.version("2")
    with Asking(site.places):
        wait_for(lambda: site.boots("2"), site.process.log)
        for _ in range(20):
            assert site.ask()[0] == {"1"}
        site.release("2")
        wait_for(lambda: site.ask()[0] == {"2"}, site.process.log)
    assert site.process.log().count("Autorestarting worker") >= workers
    assert "Traceback" not in site.process.log()


#: a Socket.IO server, too
SOCKET_IO = """
import socketio, gunicorn_passenger as p
server = socketio.Server(async_mode="gevent", transports=["websocket"])
server.on("version", lambda sid: VERSION)
p.listen({port}, socketio.WSGIApp(server))
"""


class SocketIO:
    """A Socket.IO client that connects again, and counts its connections."""

    def __init__(self, port):
        self.connections, self.refused = 0, []
        self.client = socketio.Client(reconnection_delay=0.02, randomization_factor=0)
        self.client.on("connect", self.on_connect)
        self.client.on("connect_error", self.refused.append)
        self.client.connect(f"http://127.0.0.1:{port}", transports=["websocket"], wait_timeout=60)

    def on_connect(self):
        self.connections += 1

    def version(self):
        return self.client.call("version", timeout=60)


def test_connections_wait_for_the_successor(start, home):
    """Idle connections move, and WebSockets are closed, when there is a worker that takes them."""
    port = free_port()
    (home / "boot.py").write_text(SOCKET_IO.format(port=port))
    site = Gated(start, home, "--keep-alive", 600)
    client = SocketIO(port)
    assert client.version() == "1"
    idle = Client(site.ports[0])

    def ask():
        idle.request("GET", "/")
        response = idle.getresponse()
        return response.read().decode().split()[0], response.getheader("Connection")

    assert ask() == ("1", "keep-alive")
    sock = Client(site.ports[0])
    sock.connect()
    ws = websocket.create_connection("ws://localhost/", socket=sock.sock, timeout=60)
    site.hup("2")
    assert ask() == ("1", "keep-alive")
    ws.send("hello")
    assert ws.recv() == "hello"
    assert client.version() == "1"
    assert client.connections == 1
    before = idle.sock
    site.release("2")
    opcode, data = ws.recv_data()
    assert (opcode, data[:2]) == (websocket.ABNF.OPCODE_CLOSE, b"\x03\xe9")
    # a client that connects again is served at once
    assert fetch(site.ports[0])[1].startswith("2 ")
    ws.close()
    wait_for(lambda: client.connections == 2, site.process.log)
    assert client.version() == "2"
    assert not client.refused
    client.client.disconnect()
    site.replaced_by("2")
    assert ask() == ("2", "keep-alive")
    assert idle.sock is before
    idle.close()


def test_a_server_that_the_new_program_opens_late_always_has_a_worker_that_accepts(start, home, port):
    text = f"""
        import os, threading, time
        def listen_late():
            while not os.path.exists("late-" + VERSION):
                time.sleep(0.02)
            import gunicorn_passenger as passenger
            passenger.create_server(application).listen({port})
        threading.Thread(target=listen_late, daemon=True).start()
        """
    start.write("boot.py", text)
    (home / "late-1").touch()
    site = Gated(start, home)
    wait_for(lambda: not refused(port), "the late server")
    with Asking([port]):
        site.hup("2")
        site.release("2")
        wait_for(lambda: fetch(site.process.socket)[1].startswith("2 "), site.process.log)
        assert fetch(port)[1].startswith("1 ")
        (home / "late-2").touch()
        wait_for(lambda: fetch(port)[1].startswith("2 "), site.process.log)
        site.replaced_by("2")


@pytest.mark.parametrize("mixin", ["ThreadingMixIn", "ForkingMixIn"])
def test_a_captured_primary(start, home, mixin):
    """``gunicorn-passenger start``: an unmodified server on the primary socket."""
    script = """
        import os, time, socketserver
        from http.server import BaseHTTPRequestHandler, HTTPServer

        version = open("version").read()
        open(f"boots-{version}-{os.getpid()}", "w").close()
        while not os.path.exists(f"go-{version}"):
            time.sleep(0.02)

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(f"{version} {os.getpid()}".encode())

        type("Server", (getattr(socketserver, MIXIN), HTTPServer), {})(("127.0.0.1", 8000), Answer).serve_forever()
        """
    start.write("script.py", script.replace("MIXIN", repr(mixin)))
    (home / "version").write_text("1")
    (home / "go-1").touch()
    process = start.start_script("script.py", "--graceful-timeout", 600, "--timeout", 600).wait_ready()
    with Asking([process.socket]):
        (home / "version").write_text("2")
        process.signal(signal.SIGHUP)
        wait_for(lambda: list(home.glob("boots-2-*")), process.log)
        for _ in range(5):
            assert fetch(process.socket)[1].startswith("1 ")
        (home / "go-2").touch()
        wait_for(lambda: fetch(process.socket)[1].startswith("2 "), process.log)


# --- a new generation that cannot start ---------------------------------------------------------------

BROKEN = {
    "syntax": ("def (:", "SyntaxError: invalid syntax"),
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "listen": ("import gunicorn_passenger as p\np.listen(1, application)", "port 1 is not allocated"),
    "exit": ("import sys\nsys.exit(3)", "a worker exited while it was loading the program"),
    "death": ("import os\nos._exit(4)", "a worker exited while it was loading the program"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_broken_program_does_not_take_the_old_workers_down(start, home, workers, kind):
    text, reason = BROKEN[kind]
    site = Gated(start, home, workers=workers, env={"PASSENGER_PORTS": "1024-65535"})
    process, old = site.process, set(site.process.workers())
    with Asking(site.places):
        (home / "boot.py").write_text(text)
        site.release("2")
        site.hup("2")
        failed = rf"reload failed: .*{re.escape(reason)}.*continue to serve. Repair the program and reload"
        process.wait_log(failed + ".* the master tries again in 2 s", 1)
        assert old <= set(process.workers())
        assert site.ask(3) == ({"1"}, old) or workers > 1
        report = site.report(start)
        assert re.search(f"^reload failed: .*{re.escape(reason)}", report["failure"])
        assert report["totals"]["boot_failure"] >= 2
        done = start.python(COMMAND, "status")
        assert done.wait_end() == 0
        assert "reload failed: " in done.log()
        (home / "boot.py").unlink()
        site.release("3")
        site.hup("3")
        site.replaced_by("3")
    assert not site.report(start)["failure"]
    refused_or_dead = kind in ("listen", "exit", "death")
    assert process.log().count("Traceback") == (0 if refused_or_dead else 1), process.log()
    assert process.stop() == 0


def test_an_attempt_that_succeeds_completes_the_reload(start, home):
    """What was missing is there again, such as a database: no further HUP is needed."""
    port = free_port()
    works = f"import gunicorn_passenger as p\np.listen({port}, p.status)"
    (home / "boot.py").write_text(works)
    site = Gated(start, home, workers=3)
    (home / "boot.py").write_text("raise RuntimeError('no database')")
    site.release("2")
    site.hup("2")
    site.process.wait_log("reload failed: RuntimeError: no database")
    # the control server and the status page read one report, a moment later than the log
    wait_for(lambda: "\ngunicorn_passenger_boot_failing 1" in fetch(port, "/metrics")[1], site.process.log)
    shown = json.loads(fetch(port, "/status.json")[1])
    assert shown["failure"] == "reload failed: RuntimeError: no database (boot.py:1)"
    (home / "boot.py").write_text(works)
    site.replaced_by("2")
    assert not site.report(start)["failure"]
    wait_for(lambda: "\ngunicorn_passenger_boot_failing 0" in fetch(port, "/metrics")[1], site.process.log)


def test_a_successor_that_cannot_start_leaves_the_worker_in_place(start, home):
    site = Gated(start, home, "--max-requests", 60)
    (old,) = site.process.workers()
    (home / "boot.py").write_text("raise RuntimeError('broken')")
    site.version("2")
    site.release("2")
    with Asking(site.places):
        site.process.wait_log("new workers cannot start: RuntimeError: broken.*that run continue to serve", 2)
        assert site.ask() == ({"1"}, {old})
        (home / "boot.py").unlink()
        wait_for(lambda: site.ask()[0] == {"2"}, site.process.log)


@pytest.mark.parametrize("workers", [1, 3])
def test_at_the_first_start_gunicorn_halts(start, home, workers):
    (home / "boot.py").write_text("raise RuntimeError('broken')")
    (home / "version").write_text("1")
    (home / "go-1").touch()
    process = start.gunicorn("gated_app", workers=workers)
    assert process.wait_end() == 3
    assert process.log().count("RuntimeError: broken") == 1
    assert "reload failed" not in process.log()
    assert "Worker failed to boot" in process.log()


def test_a_hook_that_fails_in_the_new_workers(start, home):
    """gunicorn calls ``post_fork`` before the worker's own code runs."""
    site = Gated(start, home, workers=2, conf="def post_fork(server, worker): pass\n")
    old = set(site.process.workers())
    with Asking(site.places):
        start.write("gunicorn.conf.py", "def post_fork(server, worker): raise RuntimeError('broken hook')\n")
        site.version("2")
        site.process.signal(signal.SIGHUP)
        site.process.wait_log(
            "reload failed: a worker exited while it was loading the program.*tries again in 2 s"
        )
        assert old <= set(site.process.workers())
        start.write("gunicorn.conf.py", "def post_fork(server, worker): pass\n")
        site.release("2")
        site.hup("2")
        site.replaced_by("2")


CONFIGURATIONS = {
    "syntax": ("def (:", "reload failed: gunicorn's output says why"),
    "value": ("workers = 'many'", "reload failed: gunicorn's output says why"),
    "setting": (
        "import gunicorn_passenger as p\np.configure(overlap='long')",
        "reload failed: Error: .*gunicorn.conf.py, line 3: .*'long' is not a number of seconds",
    ),
    "hook": (
        "import gunicorn_passenger as p\ndef on_reload(server): p.configure(overlap='long')",
        "reload failed: configure.*'long' is not a number of seconds.* \\(gunicorn.conf.py:3\\)",
    ),
    "pre_fork": (
        "def pre_fork(server, worker): raise RuntimeError('broken hook')",
        "reload failed: RuntimeError: broken hook \\(gunicorn.conf.py:2\\)",
    ),
    "exit": ("raise SystemExit('not today')", "reload failed: not today"),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_broken_configuration_changes_nothing(start, home, kind):
    text, reason = CONFIGURATIONS[kind]
    conf = "workers = 2\nraw_env = ['COLOUR=blue']\n"
    site = Gated(start, home, workers=2, conf=conf)
    process, old = site.process, set(site.process.workers())
    with Asking(site.places):
        start.write("gunicorn.conf.py", f"raw_env = ['COLOUR=red']\n{text}\n")
        process.signal(signal.SIGHUP)
        process.wait_log(f"{reason}")
        process.wait_log("The previous workers and configuration stay. Repair gunicorn's configuration")
        assert ("Traceback" in process.log()) == (kind in ("syntax", "pre_fork"))
        assert set(process.workers()) == old
        assert re.search("^reload failed: ", site.report(start)["failure"])
        # a worker that is started now has the environment of the previous configuration
        (home / "boot.py").write_text("import os\nassert os.environ['COLOUR'] == 'blue'\n")
        os.kill(min(old), signal.SIGTERM)
        wait_for(lambda: len(site.boots("1")) == 3, process.log)
        wait_for(lambda: len(process.workers()) == 2 and min(old) not in process.workers(), process.log)
        (home / "boot.py").unlink()
        start.write("gunicorn.conf.py", conf)
        site.release("2")
        site.hup("2")
        site.replaced_by("2")
    assert not site.report(start)["failure"]
    assert process.stop() == 0


def test_hooks_that_fail_while_gunicorn_runs(start, home):
    """Plain gunicorn would exit. The hooks fail from the second worker on, and then no more."""
    start.write(
        "gunicorn.conf.py",
        """
        import os
        def fail(*arguments):
            if os.path.exists("broken"):
                raise RuntimeError(f"broken {len(arguments)}")
        def pre_fork(server, worker): fail()
        def child_exit(server, worker): fail(worker)
        def nworkers_changed(server, new, old): fail(new, old)
        """,
    )
    process = start.gunicorn("anything", "-c", "gunicorn.conf.py", workers=2).wait_ready()
    wait_workers_ready(start, 2)
    old = set(process.workers())
    (home / "broken").touch()
    process.signal(signal.SIGTTIN)
    failed = r"a hook of gunicorn's configuration failed: RuntimeError: broken {} \(gunicorn.conf.py:5\)"
    process.wait_log(failed.format(2))
    os.kill(min(old), signal.SIGKILL)
    process.wait_log(failed.format(1))
    process.wait_log(r"a worker could not be started: RuntimeError: broken 0 \(gunicorn.conf.py:5\); correct")
    assert fetch(process.socket)[0] == 200
    (home / "broken").unlink()
    wait_for(lambda: len(set(process.workers()) - {min(old)}) == 3, process.log)
    assert process.stop() == 0


def test_a_bind_that_is_in_use_changes_nothing(start, home):
    """gunicorn would close its listeners first, and exit when it cannot open the new ones."""
    taken = free_port()
    other = start.python("-m", "http.server", taken, "--bind", "127.0.0.1")
    wait_for(lambda: not refused(taken), other.log)
    conf = "bind = ['unix:app.sock', '127.0.0.1:{}']\n"
    (home / "version").write_text("1")
    (home / "go-1").touch()
    start.write("gunicorn.conf.py", "bind = ['unix:app.sock']\n")
    gunicorn = COMMAND.parent / "gunicorn"
    process = start.python(gunicorn, "-k", "gunicorn_passenger.Worker", "--umask", "007", "gated_app")
    process.wait_ready()
    old = set(process.workers())
    start.write("gunicorn.conf.py", conf.format(taken))
    process.signal(signal.SIGHUP)
    process.wait_log(f"reload failed: OSError: .*cannot bind 127.0.0.1:{taken}: Address already in use")
    assert set(process.workers()) == old
    assert fetch(process.socket)[0] == 200
    second = free_port()
    start.write("gunicorn.conf.py", conf.format(second))
    process.signal(signal.SIGHUP)
    wait_for(lambda: not refused(second), process.log)
    wait_for(lambda: not old & set(process.workers()), process.log)
    assert fetch(process.socket)[0] == 200
    assert process.stop() == 0


def test_a_preloaded_program_whose_port_is_taken_away(start, home):
    first = free_range(2)
    allowed = "import gunicorn_passenger as p\npreload_app = True\np.configure(ports='{}')\n"
    (home / "version").write_text("1")
    (home / "go-1").touch()
    start.write("gunicorn.conf.py", allowed.format(f"{first},{first + 1}"))
    process = start.gunicorn("gated_app", workers=2, env={"P1": first}).wait_ready()
    pids_answering(first, 2)
    old = set(process.workers())
    with Asking([process.socket, first]):
        start.write("gunicorn.conf.py", allowed.format(first + 1))
        process.signal(signal.SIGHUP)
        process.wait_log(f"reload failed: port {first} is not allocated.*continue to serve")
        assert old <= set(process.workers())
        start.write("gunicorn.conf.py", allowed.format(f"{first},{first + 1}"))
        process.hup(2)


def test_the_reloader_keeps_the_worker_until_the_changed_program_starts(start, home, port):
    text = """
        {line}
        import os
        import gunicorn_passenger as passenger

        def application(environ, start_response):
            start_response("200 OK", [])
            return [b"{version} %d" % os.getpid()]

        passenger.create_server(application).listen({port})
        """
    start.write("changing.py", text.format(line="", version=1, port=port))
    process = start.gunicorn("changing", "--reload", "--reload-engine", "poll", workers=1).wait_ready()
    with Asking([process.socket, port]):
        start.write("changing.py", text.format(line="import no_such_module", version=2, port=port))
        process.wait_log("new workers cannot start: ModuleNotFoundError: No module named 'no_such_module'", 2)
        assert fetch(port)[1].startswith("1 ")
        start.write("changing.py", text.format(line="", version=3, port=port))
        wait_for(lambda: fetch(port)[1].startswith("3 "), process.log)
        wait_for(lambda: fetch(process.socket)[1].startswith("3 "), process.log)
    assert process.log().count("Traceback") == 1
