"""listen(): every form of address, everywhere it may be called from, and what a Server tells."""

import ast
import os
import stat
import time

import pytest
from conditions import wait_for
from free_ports import free_port, free_range
from http_client import answers, fetch, pids_answering, refused
from processes import NO_CONTROL


def ask(process, code):
    """Evaluate in one worker; the value."""
    status, text = fetch(process.socket, "/eval", "POST", code)
    assert status == 200, text
    return ast.literal_eval(text) if text else None


def program(start, text, workers=2, **env):
    start.write("program.py", text)
    return start.gunicorn("anything", workers=workers, env=env).wait_ready()


@pytest.mark.parametrize(
    ("form", "where", "address"),
    [
        ("{port}", ("127.0.0.1", "{port}"), ("127.0.0.1", "{port}")),
        ("'{port}'", ("127.0.0.1", "{port}"), ("127.0.0.1", "{port}")),
        ("'127.0.0.1:{port}'", ("127.0.0.1", "{port}"), ("127.0.0.1", "{port}")),
        ("'localhost:{port}'", ("127.0.0.1", "{port}"), ("127.0.0.1", "{port}")),
        ("'[::1]:{port}'", ("::1", "{port}"), ("::1", "{port}")),
        ("('127.0.0.1', {port})", ("127.0.0.1", "{port}"), ("127.0.0.1", "{port}")),
        ("{port}, host='0.0.0.0'", ("127.0.0.1", "{port}"), ("0.0.0.0", "{port}")),
        ("{port}, host='::1', name='six'", ("::1", "{port}"), ("::1", "{port}")),
    ],
)
def test_forms_of_tcp_addresses(start, port, form, where, address):
    process = program(start, f"server = passenger.create_server(whoami).listen({form.format(port=port)})")
    assert len(pids_answering((where[0], port), 2)) == 2
    assert ask(process, "server.address") == (address[0], port)
    assert ask(process, "server.listening") is True


def test_unix_address(start, home):
    path = f"{home}/second.sock"
    process = program(start, f"server = passenger.create_server(whoami).listen('unix:{path}')")
    assert len(pids_answering(path, 2)) == 2
    assert ask(process, "server.address") == f"unix:{path}"
    # gunicorn was started with --umask 007
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    process.hup(2)
    assert len(pids_answering(path, 2)) == 2
    assert process.stop() == 0
    assert not os.path.exists(path)


def test_unix_address_is_private_when_gunicorn_sets_no_umask(start, home):
    start.write("program.py", f"passenger.create_server(whoami).listen('unix:{home}/second.sock')")
    start.gunicorn("anything", "--umask", "0").wait_ready(f"{home}/second.sock")
    assert stat.S_IMODE(os.stat(f"{home}/second.sock").st_mode) == 0o600


def test_unix_socket_of_a_dead_server_is_replaced_and_removed_by_grace(start, home):
    import socket

    path = f"{home}/second.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    start.write("gunicorn.conf.py", "import gunicorn_passenger as p\np.configure(grace_period=0.2)\n")
    process = program(start, f"server = passenger.create_server(whoami).listen('unix:{path}')", workers=1)
    assert answers(path)
    ask(process, "server.close()")
    wait_for(lambda: not os.path.exists(path), "the file to go")


def test_auto_is_one_port_for_all_workers_and_one_for_each_server(start):
    """The ports are those at the top of the allocation: programs name the first ones, perhaps a line later."""
    first = free_range(3)
    process = program(
        start,
        f"""
        a = passenger.create_server(whoami).listen("auto")
        b = passenger.create_server(whoami).listen("auto")
        passenger.create_server(whoami).listen({first})
        """,
        PASSENGER_PORTS=f"{first}-{first + 2}",
    )
    ports = ask(process, "[a.address[1], b.address[1]]")
    assert ports == [first + 2, first + 1]
    for number in ports:
        assert len(pids_answering(number, 2)) == 2
    process.hup(2)
    assert ask(process, "[a.address[1], b.address[1]]") == ports


def test_auto_skips_a_port_that_is_taken(start):
    import socket

    first = free_range(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        process = program(
            start,
            "a = passenger.create_server(whoami).listen('auto')",
            PASSENGER_PORTS=f"{first}-{first + 1}",
        )
        assert ask(process, "a.address[1]") == first


def test_auto_without_an_allocation_is_any_port(start):
    process = program(start, "a = passenger.create_server(whoami).listen('auto', host='::1')")
    host, number = ask(process, "a.address")
    assert host == "::1"
    assert len(pids_answering((host, number), 2)) == 2


def test_names_states_and_servers(start, port):
    other = free_port()
    process = program(
        start,
        f"""
        from gunicorn_passenger import http_proxy
        http_proxy.create_server({{"/a": "metrics", "/b": ["metrisc", "anything.whoami"]}})
        fresh = passenger.create_server(whoami)
        a = passenger.create_server(whoami).listen({port}, name="metrics")
        b = passenger.listen({other}, whoami)
        """,
        workers=1,
    )
    assert ask(process, "[tuple(s) for s in passenger.servers()]") == [
        ("metrics", ("127.0.0.1", port), "shared", "listening"),
        ("anything.whoami", ("127.0.0.1", other), "shared", "listening"),
    ]
    assert ask(process, "[fresh.listening, fresh.address, a.name]") == [False, None, "metrics"]
    assert ask(process, "passenger.active()") is True
    assert (
        "a server named 'metrics' already listens"
        in fetch(process.socket, "/eval", "POST", "passenger.listen('auto', whoami, name='metrics')")[1]
    )
    process.wait_log(
        r"WARNING\] A proxy sends requests to the server 'metrisc', which does not exist "
        r"\(did you mean 'metrics'\?\); they fail until"
    )
    assert process.log().count("A proxy sends requests") == 1
    ask(process, "[a.close(), a.close()]")
    assert ask(process, "[a.listening, a.address, len(passenger.servers())]") == [False, None, 1]
    assert fetch(other)[0] == 200


def test_listen_later_in_a_greenlet_and_from_an_event(start, port):
    later = free_port()
    process = program(
        start,
        f"""
        import gevent

        @passenger.on("ready")
        def ready(worker):
            passenger.create_server(whoami).listen({port})

        gevent.spawn_later(0.1, lambda: passenger.create_server(whoami).listen({later}))
        """,
    )
    for number in (port, later):
        wait_for(lambda n=number: answers(n), f"a response on {number}:\n{process.log()}")
        assert len(pids_answering(number, 2)) == 2


def test_listen_from_a_request(start, port):
    """A request to the master does not block the hub, and the first HTTP request gets its response."""
    process = program(start, "", workers=1)
    assert ask(process, f"passenger.create_server(whoami).listen({port}).address") == ("127.0.0.1", port)
    assert answers(port)


def test_listen_from_a_thread_of_the_system(start, port):
    process = program(
        start,
        f"""
        import gevent
        pool = gevent.get_hub().threadpool
        server = passenger.create_server(whoami)
        pool.apply(server.listen, ({port},))
        """,
    )
    assert len(pids_answering(port, 2)) == 2
    assert ask(process, "server.listening")


def test_listen_in_post_worker_init(start, port):
    start.write(
        "gunicorn.conf.py",
        f"""
        import os
        import gunicorn_passenger as passenger

        def metrics(environ, start_response):
            start_response("200 OK", [])
            return [str(os.getpid()).encode()]

        def post_worker_init(worker):
            passenger.create_server(metrics).listen({port})
        """,
    )
    start.gunicorn("two_servers").wait_ready()
    assert len(pids_answering(port, 2)) == 2


def test_preload(start, port, home):
    """Called in the master: the server starts in every worker after the fork."""
    path = f"{home}/second.sock"
    start.write(
        "program.py",
        f"""
        a = passenger.create_server(whoami).listen({port})
        b = passenger.create_server(whoami).listen("unix:{path}")
        c = passenger.create_server(whoami).listen("auto")
        closed = passenger.create_server(whoami).listen({free_port()})
        in_master = [passenger.active(), a.listening, a.address, [s.state for s in passenger.servers()]]
        closed.close()
        master = os.getpid()
        """,
    )
    process = start.gunicorn("anything", "--preload", workers=3).wait_ready()
    workers = pids_answering(port, 3)
    assert str(process.pid) not in workers
    assert pids_answering(path, 3) == workers
    assert pids_answering(ask(process, "c.address"), 3) == workers
    assert ask(process, "in_master") == [True, False, None, ["waiting"] * 4]
    assert ask(process, "master") == process.pid
    assert ask(process, "[a.listening, a.address]") == [True, ("127.0.0.1", port)]
    process.hup(3)
    assert not pids_answering(port, 3) & workers


def test_two_servers_in_one_worker_cannot_share_a_port(start, port):
    process = program(start, f"a = passenger.create_server(whoami).listen({port})", workers=1)
    status, text = fetch(process.socket, "/eval", "POST", f"passenger.create_server(whoami).listen({port})")
    assert status == 500
    assert f"PortInUse: 127.0.0.1:{port} already has a server in this program" in text
    assert answers(port)
    assert ask(process, "len(passenger.servers())") == 1


def test_a_closed_server_stops_and_its_port_can_be_had_again(start, port):
    process = program(start, f"a = passenger.create_server(whoami).listen({port})", workers=1)
    ask(process, "a.close()")
    assert ask(process, f"passenger.create_server(whoami).listen({port}).listening")
    assert answers(port)


def test_many_listens_and_closes_leak_nothing(start, port):
    start.write("program.py", "")
    process = start.gunicorn("anything", *NO_CONTROL, workers=1).wait_ready()
    (worker,) = process.workers()
    ask(process, f"[passenger.create_server(whoami).listen({port}).close() for _ in range(5)]")
    before = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (process.pid, worker)]
    ask(process, f"[passenger.create_server(whoami).listen({port}).close() for _ in range(300)]")
    after = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (process.pid, worker)]
    assert after[0] == before[0]
    assert after[1] <= before[1] + 1


def test_events(start, port, home):
    process = program(
        start,
        f"""
        def note(text):
            with open("events", "a") as file:
                file.write(text + "\\n")

        passenger.on("listening", lambda server: note(f"listening {{server.name}} {{server.address}}"))
        passenger.on("ready", lambda worker: note(f"ready {{worker.pid == os.getpid()}}"))

        @passenger.on("exit")
        def leaving(worker):
            note(f"exit {{worker.pid == os.getpid()}}")

        @passenger.on("ready")
        def bad(worker):
            raise RuntimeError("a handler of the user's")

        passenger.create_server(whoami).listen({port}, name="second")
        """,
        workers=1,
    )
    assert answers(port)
    assert process.stop() == 0
    assert (home / "events").read_text().splitlines() == [
        f"listening second ('127.0.0.1', {port})",
        "ready True",
        "exit True",
    ]
    assert "handler of the event 'ready' raised" in process.log()
    assert "a handler of the user's" in process.log()


def test_plain_python(start, home):
    """The same file without gunicorn: "passenger" is a TCP port for development, others are as they are."""
    dev, port = free_port(), free_port()
    start.write(
        "app.py",
        f"""
        import os
        import gunicorn_passenger as passenger

        def whoami(environ, start_response):
            start_response("200 OK", [])
            return [repr(passenger.active()).encode()]

        passenger.on("ready", lambda worker: print("ready", worker, flush=True))
        passenger.on("exit", lambda worker: print("exit", worker, flush=True))
        application = passenger.create_server(whoami).listen("passenger")
        passenger.create_server(whoami).listen({port})
        passenger.create_server(whoami).listen("unix:{home}/second.sock")
        auto = passenger.create_server(whoami).listen("auto")
        print("auto", auto.address, flush=True)
        passenger.serve_forever()
        print("over", flush=True)
        """,
    )
    process = start.python("app.py", env={"PORT": dev}).wait_ready(dev)
    auto = int(process.wait_log(r"auto \('127.0.0.1', (\d+)\)").group(1))
    for where in (dev, port, f"{home}/second.sock", auto):
        assert fetch(where) == (200, "False")
    assert f"Serving on http://127.0.0.1:{dev}/" in process.log()
    assert process.stop() == 0
    assert process.log().splitlines()[-3:] == ["ready None", "exit None", "over"]
    assert refused(port)
    assert not os.path.exists(f"{home}/second.sock")


def test_plain_python_default_port(start):
    start.write(
        "show.py",
        "from gunicorn_passenger.serving import standalone\nprint(standalone.development_port())",
    )
    process = start.python("show.py")
    process.wait_end()
    assert process.log() == "8000\n"


def test_serve_forever_returns_at_once_under_the_worker(start, port):
    begun = time.monotonic()
    process = program(
        start,
        f"passenger.create_server(whoami).listen({port})\npassenger.serve_forever()\nover = True",
        workers=1,
    )
    assert ask(process, "over")
    assert time.monotonic() - begun < 60


def test_a_preloaded_unmodified_server_is_explained(start, port):
    on_purpose = free_port()
    text = "from http.server import *\nkept = HTTPServer(('127.0.0.1', {}), SimpleHTTPRequestHandler)"
    start.write("program.py", text.format(port))
    conf = start.write(
        "gunicorn.conf.py", f"def when_ready(server):\n    exec({text.format(on_purpose)!r}, globals())"
    )
    process = start.gunicorn("anything", "--preload", "-c", conf).wait_ready()
    process.wait_log(rf"WARNING.*127.0.0.1:{port} was opened in the master.*--preload")
    assert f":{on_purpose}" not in process.log()
    assert "without Python's socket module" not in process.log()


def test_a_server_opened_after_another_was_closed_accepts(start, port):
    process = program(start, f"server = passenger.create_server(whoami).listen({port})", workers=1)
    for _ in range(3):
        code = f"server.close()\nserver = None\nserver = passenger.create_server(whoami).listen({port})"
        assert fetch(process.socket, "/eval", "POST", code)[0] == 200
        assert answers(port)


def test_children_of_a_worker_do_not_run_the_workers_loop(start, port):
    """socketserver's ForkingMixIn: each child responds to its client, however long that takes."""
    process = program(
        start,
        f"""
        import threading
        from http.server import BaseHTTPRequestHandler, HTTPServer
        from socketserver import ForkingMixIn
        import time

        class Forking(ForkingMixIn, HTTPServer):
            pass

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/slow":
                    time.sleep(2.5)  # longer than a turn of the worker's loop
                self.send_response(200)
                self.end_headers()
                self.wfile.write(str(os.getpid()).encode())

        threading.Thread(target=Forking(("127.0.0.1", {port}), Answer).serve_forever, daemon=True).start()
        """,
        workers=1,
    )
    import threading

    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(port, "/slow"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    (worker,) = process.workers()
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200, 200, 200]
    assert str(worker) not in {pid for _, pid in found}
    assert "Parent changed" not in process.log()
    assert process.workers() == [worker]
    assert fetch(process.socket) == (200, str(worker))


def test_a_copy_of_a_bound_socket_listens_as_the_original_would(start, port):
    process = program(
        start,
        f"""
        import socket, threading
        s = socket.socket()
        s.bind(("127.0.0.1", {port}))
        copy = s.dup()
        copy.listen()
        name = copy.getsockname()
        """,
    )
    assert ask(process, "name") == ("127.0.0.1", port)
    assert not refused(port)
    process.wait_log(f"Opened 127.0.0.1:{port}")
