"""The worker: which listener serves the primary, what is said at the start, how it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import pytest
from broker_access import run
from conditions import wait_for
from free_ports import free_port
from http_client import Client, answers, fetch, pids_answering, refused
from processes import PROGRAMS, require


@pytest.mark.parametrize("worker", ["gunicorn_passenger.Worker", "egg:gunicorn_passenger#passenger"])
def test_primary_and_second_server_under_four_workers(start, port, worker):
    process = start.gunicorn("two_servers", "-k", worker, workers=4, env={"P1": port}).wait_ready()
    primary = pids_answering(process.socket, 4)
    assert pids_answering(port, 4) == primary == {str(pid) for pid in process.workers()}
    assert "in use" not in process.log()
    assert process.stop() == 0
    assert refused(port)
    assert not os.path.exists(process.socket)


def test_module_and_callable_name(start):
    assert start.gunicorn("two_servers:whoami").wait_ready().stop() == 0


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["no preload", "preload"])
def test_a_program_that_names_its_primary_needs_no_application(start, port, preload):
    """A program ported word for word from Passenger's documentation (N6)."""
    start.write("gunicorn.conf.py", "from gevent import monkey\nmonkey.patch_all()\n")
    start.write(
        "app.py",
        f"""
        import gunicorn_passenger as passenger
        from gunicorn_passenger import http_proxy

        http_proxy.create_server({port}, "localhost").listen("passenger")

        def target(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"request successfully proxied!"]

        passenger.create_server(target).listen({port})
        """,
    )
    process = start.gunicorn("app", *preload).wait_ready()
    assert fetch(process.socket) == (200, "request successfully proxied!")
    assert process.stop() == 0


def test_a_program_without_application_and_primary_does_not_start(start):
    start.write("app.py", "import gunicorn_passenger\n")
    process = start.gunicorn("app")
    assert process.wait_end() == 4
    assert "Failed to find attribute 'application' in 'app'" in process.log()


def test_without_unix_bind_the_first_bind_is_the_primary(start):
    first, second = free_port(), free_port()
    process = start.gunicorn(
        "two_servers", "-b", f"127.0.0.1:{second}", bind=f"127.0.0.1:{first}", env={"P1": second}
    ).wait_ready(first)
    process.wait_log(rf"The primary is served on http://127.0.0.1:{first}, the first bind")
    assert pids_answering(second, 2) == pids_answering(first, 2)
    assert "no server of the program listens" not in process.log()


def test_unix_and_tcp_binds(start):
    claimed, unclaimed = free_port(), free_port()
    process = start.gunicorn(
        "two_servers", "-b", f"0.0.0.0:{claimed}", "-b", f"127.0.0.1:{unclaimed}", env={"P1": claimed}
    ).wait_ready()
    # the operator's word on the host wins: the program asked for 127.0.0.1
    assert pids_answering(claimed, 2) == pids_answering(process.socket, 2)
    assert pids_answering(unclaimed, 2) == pids_answering(process.socket, 2)
    process.wait_log(rf"The primary is served on 127.0.0.1:{unclaimed}, too")
    assert process.log().count("no server of the program listens") == 1


def test_a_bind_that_a_server_claims_later_is_its_own_from_then_on(start, port):
    """In all workers, although one of them alone has claimed it."""
    text = "def other(environ, start_response):\n    start_response('200 OK', [])\n    return [b'other']"
    start.write("program.py", text)
    process = start.gunicorn("anything", "-b", f"127.0.0.1:{port}").wait_ready()
    assert pids_answering(port, 2) == {str(pid) for pid in process.workers()}
    idle = Client(port)
    idle.request("GET", "/")
    assert int(idle.getresponse().read()) in process.workers()
    run(process, f"server = passenger.create_server(other).listen({port})")
    wait_for(lambda: all(fetch(port)[1] == "other" for _ in range(20)), "the server of the program")
    # the old worker finishes its connection
    idle.request("GET", "/")
    response = idle.getresponse()
    assert response.getheader("Connection") == "close"
    assert int(response.read()) in process.workers()
    idle.close()
    assert "Traceback" not in process.log()


def test_a_socket_that_every_user_may_connect_to_is_warned_of(start):
    process = start.gunicorn("two_servers", "--umask", "0").wait_ready()
    process.wait_log(r"WARNING.*Every user of this machine may connect to unix:.*--umask 007")


def test_a_socket_of_the_group_is_not_warned_of(start):
    process = start.gunicorn("two_servers").wait_ready()
    assert "Every user" not in process.log()


def test_two_unix_binds_both_serve_the_primary(start, home):
    other = f"{home}/other.sock"
    process = start.gunicorn("two_servers", "-b", f"unix:{other}").wait_ready()
    assert pids_answering(other, 2) == pids_answering(process.socket, 2)


def test_gunicorns_hooks_are_called(start, home):
    names = ["on_starting", "when_ready", "on_reload", "on_exit"]
    two = ["pre_fork", "post_fork", "child_exit", "worker_exit"]
    lines = [f"def {name}(server): print('hook {name}', flush=True)" for name in names]
    lines += [f"def {name}(server, worker): print('hook {name}', flush=True)" for name in two]
    lines += ["def post_worker_init(worker): print('hook post_worker_init', flush=True)"]
    conf = start.write("gunicorn.conf.py", "\n".join(lines))
    process = start.gunicorn("two_servers", "-c", conf).wait_ready()
    process.hup(2)
    assert process.stop() == 0
    for name in [*names, *two, "post_worker_init"]:
        assert f"hook {name}\n" in process.log(), name


def test_ttin_and_ttou(start, port):
    process = start.gunicorn("two_servers", env={"P1": port}).wait_ready()
    process.signal(signal.SIGTTIN)
    wait_for(lambda: len(process.workers()) == 3, "a third worker")
    pids_answering(port, 3)
    process.signal(signal.SIGTTOU)
    wait_for(lambda: len(process.workers()) == 2, "the third worker to leave")
    assert answers(port)


def test_second_server_is_not_the_primarys_wire(start, port, home):
    """The PROXY protocol is the primary's; a second server speaks plain HTTP."""
    start.gunicorn("two_servers", "--proxy-protocol", "--proxy-allow-from", "*", env={"P1": port}).wait_ready(
        port
    )
    assert fetch(port)[0] == 200


def test_max_requests_counts_and_replaces(start, port):
    start.gunicorn("two_servers", "--max-requests", "5", workers=1, env={"P1": port}).wait_ready()
    assert len(pids_answering(port, 3)) == 3


def test_a_killed_worker_is_replaced_and_the_port_stays(start, port):
    process = start.gunicorn("two_servers", workers=1, env={"P1": port}).wait_ready()
    (before,) = process.workers()
    os.kill(before, signal.SIGKILL)
    assert not refused(port)  # held by the master, whether a worker lives or not
    wait_for(lambda: process.workers() and before not in process.workers(), "a new worker")
    assert fetch(port)[1] != str(before)


def test_tls_is_the_primarys(start, port, home):
    import ssl
    import subprocess

    subprocess.run(
        [require("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-keyout", home / "key.pem", "-out", home / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    process = start.gunicorn(
        "two_servers", "--certfile", "cert.pem", "--keyfile", "key.pem", env={"P1": port}
    ).wait_ready(port)
    context = ssl.create_default_context(cafile=home / "cert.pem")
    client = Client(process.socket)
    client.connect()
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    client.request("GET", "/")
    assert int(client.getresponse().read()) in process.workers()
    client.close()


def test_reuse_port_keeps_its_meaning(start):
    first, second = free_port(), free_port()
    process = start.gunicorn(
        "two_servers", "--reuse-port", bind=f"127.0.0.1:{first}", env={"P1": second}
    ).wait_ready(first)
    assert len(pids_answering(second, 2)) == 2
    process.hup(2)
    assert len(pids_answering(second, 2)) == 2
    assert process.stop() == 0
    assert refused(second)


def test_proxy_protocol_on_the_primary(start):
    process = start.gunicorn("two_servers", "--proxy-protocol", "--proxy-allow-from", "*")
    wait_for(lambda: not refused(process.socket), "the socket")
    client = Client(process.socket)
    client.connect()
    client.sock.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n")
    client.request("GET", "/")
    assert client.getresponse().status == 200
    client.close()


def test_daemon(start, port, home):
    process = start.gunicorn("two_servers", "--daemon", "--pid", f"{home}/pid", env={"P1": port})
    assert process.wait_end() == 0
    wait_for(lambda: answers(port), "the daemon to serve")
    master = int((home / "pid").read_text())
    try:
        assert len(pids_answering(port, 2)) == 2
    finally:
        os.kill(master, signal.SIGTERM)
    wait_for(lambda: not os.path.exists(f"/proc/{master}"), "the daemon to end")
    assert refused(port)


def test_access_log_and_keepalive_hold_on_a_second_server(start, port):
    process = start.gunicorn("two_servers", "--access-logfile", "-", workers=1, env={"P1": port})
    process.wait_ready(port)
    client = Client(port)
    for _ in range(2):
        client.request("GET", "/kept-alive")
        client.getresponse().read()
    client.close()
    process.wait_log(r'"GET /kept-alive HTTP/1.1" 200', count=2)


def test_a_reload_on_a_changed_file(start, port, home):
    start.write(
        "changing.py", (PROGRAMS / "two_servers.py").read_text().replace("str(os.getpid())", "'first'")
    )
    process = start.gunicorn("changing", "--reload", workers=1, env={"P1": port}).wait_ready()
    assert fetch(port)[1] == "first"
    start.write("changing.py", (home / "changing.py").read_text().replace("'first'", "'second'"))
    wait_for(lambda: answers(port) and fetch(port)[1] == "second", lambda: process.log())


def test_ctrl_c_ends_without_noise(start, port):
    """The terminal sends SIGINT to the master and its workers alike."""
    process = start.gunicorn("two_servers", workers=4, env={"P1": port}).wait_ready()
    pids_answering(port, 4)  # one that still boots ends with gunicorn's own word about its signal
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait_end() == 0
    wait_for(lambda: not process.session(), "no process to be left")
    assert "Traceback" not in process.log()
    assert "SystemExit" not in process.log()
    assert "was sent" not in process.log()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_in_a_thread_that_is_not_a_daemon_does_not_keep_the_worker(start, port, how):
    start.write(
        "threaded.py",
        f"""
        import os, threading
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(str(os.getpid()).encode())

        server = ThreadingHTTPServer(("127.0.0.1", {port}), Answer)
        threading.Thread(target=server.serve_forever).start()

        def application(environ, start_response):
            start_response("200 OK", [])
            return [str(os.getpid()).encode()]
        """,
    )
    process = start.gunicorn("threaded", "--graceful-timeout", "600", "--timeout", "600").wait_ready()
    old = pids_answering(port, 2)
    process.hup(2)
    assert not pids_answering(port, 2) & old
    process.signal(how)
    assert process.wait_end() == 0
    assert "Traceback" not in process.log()


def test_a_stop_while_workers_boot_opens_nothing_more(start, port, home):
    """A worker that asks for its port while the application stops is let go."""
    text = (PROGRAMS / "two_servers.py").read_text()
    gate = "import os, time\nopen(f'at-{os.getpid()}', 'w').close()\nwhile not os.path.exists('go'):\n    time.sleep(0.02)\n"
    (home / "gated.py").write_text(gate + text)
    process = start.gunicorn("gated", workers=3, env={"P1": port})
    wait_for(lambda: len(list(home.glob("at-*"))) == 3, "three workers to load")
    process.signal(signal.SIGTERM)
    process.wait_log("Handling signal: term")
    wait_for(lambda: refused(process.socket), "the socket to be gone")
    (home / "go").touch()
    assert process.wait_end() == 0
    assert "Traceback" not in process.log()
    assert "Opened" not in process.log()


def test_a_stop_while_a_worker_boots_whose_interpreter_does_not_end(start, home):
    """gunicorn's timeout does not apply yet, and its stop and reloads would wait for the worker."""
    start.write(
        "gated.py",
        """
        import atexit, contextlib, os, signal, time

        def endless():
            while True:
                # the signal may have interrupted gevent in the middle of a switch, which this sleep then meets
                with contextlib.suppress(Exception):
                    time.sleep(1)

        atexit.register(endless)
        open("at", "w").close()
        endless()
        """,
    )
    process = start.gunicorn("gated", "--graceful-timeout", 2, workers=1, cwd=home)
    wait_for(lambda: (home / "at").exists(), "the worker to load")
    (worker,) = process.workers()
    os.kill(worker, signal.SIGTERM)
    process.wait_log(rf"Worker \(pid:{worker}\) was sent SIGALRM")
    process.stop()


def test_a_stop_while_a_worker_boots_that_python_ignores(start, port, home):
    """Python ignores what is raised in a weakref callback, so also in those of its import system."""
    start.write(
        "stopped.py",
        f"""
        import os, signal, weakref
        import gunicorn_passenger as passenger

        class Gone:
            pass

        def stop(_reference):
            os.kill(os.getpid(), signal.SIGTERM)
            while True:  # until the signal handler has raised
                pass

        def application(environ, start_response):
            start_response("200 OK", [])
            return [str(os.getpid()).encode()]

        if not os.path.exists("stopped"):
            open("stopped", "w").close()
            gone = Gone()
            reference = weakref.ref(gone, stop)
            del gone
        passenger.create_server(application).listen({port})
        """,
    )
    process = start.gunicorn("stopped", workers=1, cwd=home, env={"PASSENGER_PORTS": port}).wait_ready()
    first, second = re.findall(r"Booting worker with pid: (\d+)", process.log())
    assert pids_answering(port, 1) == {second}
    assert f"Worker exiting (pid: {first})" in process.log()
    assert "was sent" not in process.log()


def test_a_stop_while_a_worker_boots_finishes_the_requests_of_its_servers(start, port, home):
    """An unmodified server accepts as soon as the program starts it, long before the program is loaded."""
    start.write(
        "early.py",
        f"""
        import os, time
        from gevent.pywsgi import WSGIServer

        def application(environ, start_response):
            open("asked", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.02)
            start_response("200 OK", [])
            return [b"answered"]

        WSGIServer(("127.0.0.1", {port}), application, log=None).start()
        while True:
            time.sleep(0.02)
        """,
    )
    process = start.gunicorn("early", workers=1, cwd=home, env={"PASSENGER_PORTS": port})
    process.wait_log(f"Opened 127.0.0.1:{port}")
    with contextlib.closing(Client(port)) as client:
        client.request("GET", "/")
        wait_for(lambda: (home / "asked").exists(), "the request to arrive")
        process.signal(signal.SIGTERM)
        process.wait_log("Handling signal: term")
        wait_for(lambda: refused(port), "the port to be closed")
        (home / "go").touch()
        assert client.getresponse().read() == b"answered"
    assert process.wait_end() == 0
    assert "was sent" not in process.log()


def test_a_stop_that_reaches_a_request_while_the_worker_boots_interrupts_the_boot(start, port):
    """Python runs a signal handler wherever it is: here in the greenlet of a request, every time."""
    start.write(
        "early.py",
        f"""
        import os, signal, time
        from gevent.pywsgi import WSGIServer

        def application(environ, start_response):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
            start_response("200 OK", [])
            return [b"answered"]

        WSGIServer(("127.0.0.1", {port}), application, log=None).start()
        try:
            while True:
                time.sleep(0.02)
        finally:
            print("the boot ended", flush=True)
        """,
    )
    process = start.gunicorn("early", workers=1, env={"PASSENGER_PORTS": port})
    process.wait_log(f"Opened 127.0.0.1:{port}")
    with contextlib.closing(Client(port)) as client:
        client.request("GET", "/")
        assert client.getresponse().read() == b"answered"
    process.wait_log("the boot ended")
    assert "Traceback" not in process.log()
    assert process.stop() == 0


def test_a_preloaded_server_is_not_drained_before_it_serves(start, port):
    """The worker is told to stop in the middle of its setup."""
    start.write("gunicorn.conf.py", "from gevent import monkey; monkey.patch_all()")
    start.write(
        "program.py",
        f"""
        import os, signal
        import gunicorn_passenger as passenger
        from gunicorn_passenger.serving.registry import registry

        def stopped():
            os.kill(os.getpid(), signal.SIGTERM)

        if not os.path.exists("stopped"):
            open("stopped", "w").close()
            registry.connect_siblings = stopped
        def application(environ, start_response):
            start_response("200 OK", [])
            return [b"fine"]

        passenger.create_server(application).listen({port})
        """,
    )
    process = start.gunicorn("program", "--preload", workers=1, env={"PASSENGER_PORTS": port})
    process.wait_log("Worker exiting")
    assert "Traceback" not in process.log()
    assert process.stop() == 0


def test_a_stop_that_meets_a_finalizer_of_a_request_interrupts_the_boot():
    """Nothing is raised in the request's greenlet, so the finalizer does not matter."""
    program = """
import sys, gevent
from gunicorn_passenger.arbiter import fork_handlers

class Leaving:
    def __del__(self):
        fork_handlers.exit_boot(15, sys._getframe())

def request():
    Leaving()
    print("finished", flush=True)

gevent.spawn(request)
gevent.sleep(3600)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (0, "finished\n", "")


def test_a_stop_that_meets_a_finalizer_is_remembered_and_not_shown():
    """Python shows and ignores what is raised in a ``__del__``: the worker exits when it has booted."""
    program = """
import sys
from gunicorn_passenger.arbiter import fork_handlers

class Leaving:
    def __del__(self):
        fork_handlers.exit_boot(15, sys._getframe())

leaving = Leaving()
del leaving
assert fork_handlers.stop_requested()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stop_that_comes_with_the_fork_is_not_lost(start, home):
    """A child that has not set its signal handlers yet has the master's, which do nothing in it."""
    start.write(
        "gunicorn.conf.py",
        f"""
        import os, signal

        def told_at_once():
            try:
                os.close(os.open({str(home / "told")!r}, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGTERM)

        os.register_at_fork(after_in_child=told_at_once)
        """,
    )
    process = start.gunicorn("two_servers", workers=1, env={"P1": free_port()}).wait_ready()
    first, second = re.findall(r"Booting worker with pid: (\d+)", process.log())
    assert fetch(process.socket)[1] == second
    assert not os.path.exists(f"/proc/{first}")
    assert "Traceback" not in process.log()
    assert "ignored" not in process.log()


@pytest.mark.parametrize("patched", [False, True])
def test_preload_without_a_patched_master_is_warned_of_before_the_program_runs(start, patched):
    conf = start.write("gunicorn.conf.py", "from gevent import monkey; monkey.patch_all()" if patched else "")
    start.write("program.py", "print('the program runs', flush=True)")
    process = start.gunicorn("anything", "--preload", "-c", conf, workers=1).wait_ready()
    before, _, _ = process.log().partition("the program runs")
    assert before.count("from gevent import monkey; monkey.patch_all()") == (not patched)
    assert process.log().count("monkey.patch_all()") == (not patched)


def test_without_preload_there_is_nothing_to_patch(start):
    assert "monkey" not in start.gunicorn("two_servers", workers=1).wait_ready().log()


def test_the_garbage_collector_of_a_worker_leaves_the_masters_objects_alone(start):
    """They stay in the memory that both share; a search for objects finds those of a preloaded program."""
    start.write("gunicorn.conf.py", "from gevent import monkey; monkey.patch_all()")
    start.write("program.py", "from queue import Queue\nclass Jobs(Queue): pass\njobs = Jobs()")
    process = start.gunicorn("anything", "--preload", workers=1).wait_ready()
    assert int(run(process, "__import__('gc').get_freeze_count()")) > 10_000
    search = "__import__('gunicorn_passenger.system.live_objects').system.live_objects.live_objects"
    assert run(process, f"next({search}(Jobs)) is jobs") == "True"


@pytest.mark.parametrize("own", [False, True], ids=["thawed", "frozen-by-the-program"])
def test_the_garbage_collector_of_the_master_knows_its_objects_after_a_fork(start, own):
    """Workers come and go: what is left of them must not gather in the master. A program may freeze objects itself."""
    conf = start.write(
        "gunicorn.conf.py",
        "import gc\n"
        f"def when_ready(server):\n    if {own}: gc.freeze()\n"
        "def on_exit(server): print('the master has frozen', gc.get_freeze_count() > 10_000, flush=True)\n"
        "def post_worker_init(worker): print('the worker has frozen', gc.get_freeze_count() > 10_000, flush=True)\n",
    )
    process = start.gunicorn("anything", "-c", conf, workers=1).wait_ready()
    process.stop()
    assert process.log().count("the worker has frozen True") == 1
    assert process.log().count(f"the master has frozen {own}") == 1


def test_gunicorn_may_be_started_while_a_module_is_imported(start, port):
    """The program imports that module, too, in a worker, where a greenlet now holds the lock of the import."""
    start.write(
        "launcher.py",
        f"""
        from gunicorn.app.base import BaseApplication

        class Application(BaseApplication):
            def load_config(self):
                self.cfg.set("worker_class", "gunicorn_passenger.Worker")
                self.cfg.set("bind", "127.0.0.1:{port}")

            def load(self):
                import launcher
                print("the program is loaded:", launcher.Application is Application, flush=True)
                return lambda environ, start_response: []

        Application().run()
        """,
    )
    process = start.python("-c", "import launcher", cwd=start.home)
    process.wait_log("the program is loaded: True")
    process.stop()


def test_gevents_plugins_are_called_and_the_installed_packages_read_once(start):
    """gevent asks for plugins at each step of its patching; the metadata of packages is read for the first only."""
    info = start.home / "plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[gevent.plugins.monkey.did_patch_module]\nmodule = plugin:module\n"
        "[gevent.plugins.monkey.did_patch_all]\nall = plugin:all\n"
    )
    start.write(
        "plugin.py",
        """
        def module(event):
            print("plugin: patched", event.module_name)
        def all(event):
            print("plugin: patched all")
        """,
    )
    conf = start.write(
        "conf.py",
        """
        from importlib import metadata
        def post_fork(server, worker):
            read = metadata.entry_points
            def counted(**group):
                print("entry points read")
                return read(**group)
            metadata.entry_points = counted
        def post_worker_init(worker):
            print("restored", metadata.entry_points.__name__)
        """,
    )
    process = start.gunicorn(
        "two_servers:whoami", "-c", conf, workers=1, env={"PYTHONPATH": f"{PROGRAMS}:{start.home}"}
    ).wait_ready()
    process.wait_log("restored counted")
    log = process.log()
    assert "plugin: patched socket" in log
    assert log.count("plugin: patched all") == 1
    assert log.count("entry points read") == 1
