"""A worker that drains: what becomes of its connections, and how soon it exits."""

import os
import re
import signal
import socket
import threading
import time

import pytest
import websocket
from conditions import wait_for
from http_client import Client, accepted, fetch, pids_answering, refused
from processes import GUNICORN, NO_CONTROL, listens
from status_commands import command

KEPT = ("--keep-alive", 600, "--graceful-timeout", 600, "--timeout", 600)


def two(start, port, *arguments, workers=2):
    process = start.gunicorn("two_servers", *arguments, workers=workers, env={"P1": port}).wait_ready()
    pids_answering(process.socket, workers)
    return process


def ask(client, path="/"):
    client.request("GET", path)
    answer = client.getresponse()
    return int(answer.read()), answer.getheader("Connection")


@pytest.mark.parametrize("which", ["primary", "second"])
def test_idle_connections_live_on_in_another_worker(start, port, which):
    """No connection is closed, so no request can be lost; and the old worker need not wait for any client."""
    process = two(start, port, *KEPT)
    where = process.socket if which == "primary" else port
    clients = [Client(where) for _ in range(30)]
    before = [ask(client)[0] for client in clients]
    assert set(before) == set(process.workers())
    socks = [client.sock for client in clients]
    for _ in range(3):
        process.hup(2)
        after = [ask(client) for client in clients]
        assert {pid for pid, _ in after} <= set(process.workers())
        assert {connection for _, connection in after} == {"keep-alive"}
    assert [client.sock for client in clients] == socks  # no client had to connect again
    for client in clients:
        client.close()
    assert "Traceback" not in process.log()


def test_the_log_names_what_holds_a_worker(start, port, home):
    """A function that blocks its event loop, and a server that forgets the connections of its clients."""
    start.write(
        "program.py",
        f"""
        import os, socket, threading
        server = socket.create_server(("127.0.0.1", {port}))
        accepted = []
        def forget():
            while True:
                accepted.append(server.accept())
        threading.Thread(target=forget, daemon=True).start()
        def compute():
            open("computes", "w").close()
            while not os.path.exists("computed"):
                pass
        def application(environ, start_response):
            if environ["PATH_INFO"] == "/compute":
                compute()
            start_response("200 OK", [])
            return [str(len(accepted)).encode()]
        """,
    )
    env = {"PASSENGER_MAX_BLOCKING_TIME": 0.2}
    process = start.gunicorn(
        "program", "--keep-alive", 0, "--graceful-timeout", 1, workers=1, env=env
    ).wait_ready()
    client = Client(process.socket)
    client.request("GET", "/compute")
    process.wait_log(r"WARNING.*no client for 0.2 s .*: compute\(\) at program.py:\d+.* blocks")
    (home / "computed").touch()
    assert client.getresponse().status == 200
    status = command(start, "status").stdout
    assert re.search(r"EVENT LOOPS  blocked \d+ times, for up to \d+\.\d s; the log names", status), status
    socket.create_connection(("127.0.0.1", port)).close()
    wait_for(lambda: fetch(process.socket)[1] == "1", "the connection to be accepted")
    assert process.stop() == 0
    process.wait_log(rf"WARNING.*third-party server on 127.0.0.1:{port} has not: 1 \(")


@pytest.mark.parametrize("worker_class", ["gunicorn_passenger.Worker", "gthread"])
def test_a_stop_ends_what_takes_too_long_and_says_so(start, port, worker_class):
    """The worker does it, before the master kills it: gunicorn's line then asks whether memory is short."""
    start.write(
        "endless.py",
        """
        import os
        import threading
        import time
        from http.server import HTTPServer
        from answering import Handler, application

        class Endless(Handler):
            def do_GET(self):
                while True:
                    time.sleep(0.1)

        server = HTTPServer(("127.0.0.1", int(os.environ["P1"])), Endless)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        """,
    )
    process = start.python(
        GUNICORN, "-k", worker_class, "-c", "python:gunicorn_passenger.hooks", "-b",
        f"unix:{start.home}/app.sock", *NO_CONTROL, "--graceful-timeout", 2, "endless:application",
        env={"P1": port, "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"},
    ).wait_ready()  # fmt: skip
    client = Client(port)
    client.request("GET", "/")
    wait_for(lambda: accepted(client), "a worker to accept")
    assert process.stop() == 0
    assert process.log().count("Worker graceful timeout (pid:") == 1
    for word in ("SIGKILL", "is not finished"):
        assert word not in process.log()
    client.close()


def test_a_connection_that_has_sent_nothing_yet_lives_on_too(start, port):
    process = two(start, port, *KEPT)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        wait_for(lambda: accepted(sock), "the connection to be accepted")
        process.hup(2)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        sock.settimeout(30)
        assert sock.recv(4096).startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))


def test_a_request_that_comes_while_the_connection_moves_is_answered(start, port):
    """Clients that never pause, through reloads: every request gets its response, on the connection or a new one."""
    process = two(start, port, *KEPT)
    for _ in range(3):
        before = set(process.workers())
        process.signal(signal.SIGHUP)
        client = Client(port)
        asked = 0
        while len(process.workers()) != 2 or before & set(process.workers()):
            pid, connection = ask(client)
            asked += 1
            if connection == "close":
                client.close()
        client.close()
        assert asked


def test_no_successor_no_waiting_for_ever(start, port):
    """The whole application stops: an idle connection is kept for gunicorn's keepalive, and no longer."""
    process = two(start, port, "--keep-alive", 1, "--graceful-timeout", 600, "--timeout", 600)
    client = Client(port)
    ask(client)
    process.signal(signal.SIGTERM)
    assert process.wait_end() == 0
    client.close()


def test_ttou_hands_on_as_well(start, port):
    process = two(start, port, *KEPT)
    clients = [Client(port) for _ in range(20)]
    assert {ask(client)[0] for client in clients} == set(process.workers())
    process.signal(signal.SIGTTOU)
    wait_for(lambda: len(process.workers()) == 1, "one worker")
    (left,) = process.workers()
    assert {ask(client)[0] for client in clients} == {left}
    for client in clients:
        client.close()


def test_a_worker_that_has_had_its_requests_hands_on_the_others(start, port):
    process = two(start, port, *KEPT, "--max-requests", 40)
    clients = [Client(port) for _ in range(20)]
    first = {ask(client)[0] for client in clients}
    done = time.monotonic() + 60
    while first & set(process.workers()) and time.monotonic() < done:
        for client in clients:
            _, connection = ask(client)
            if connection == "close":
                client.close()
    assert not first & set(process.workers())
    for client in clients:
        ask(client)
        client.close()


def test_a_successor_that_dies_takes_only_its_own(start, port):
    process = two(start, port, *KEPT)
    clients = [Client(port) for _ in range(10)]
    for client in clients:
        ask(client)
    process.hup(2)
    pids = {client: ask(client)[0] for client in clients}
    victim = pids[clients[0]]
    os.kill(victim, signal.SIGKILL)
    for client, pid in pids.items():
        if pid != victim:
            assert ask(client)[0] == pid
        client.close()
    assert fetch(port)[0] == 200


# --- servers that are not ours -----------------------------------------------------------------------

PYWSGI = """
    import os
    import gevent
    from gevent.pywsgi import WSGIServer

    def answer(environ, start_response):
        if environ["PATH_INFO"] == "/slow":
            while not os.path.exists("go"):
                gevent.sleep(0.02)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]

    application = answer
    WSGIServer(("127.0.0.1", {port}), answer).start()
    """
HTTP_SERVER = """
    import os
    import threading
    import time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path == "/slow":
                while not os.path.exists("go"):
                    time.sleep(0.02)
            body = str(os.getpid()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]

    server = ThreadingHTTPServer(("127.0.0.1", {port}), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    """
PATIENT = ("--keep-alive", 1, "--graceful-timeout", 600, "--timeout", 600)


@pytest.mark.parametrize("text", [PYWSGI, HTTP_SERVER], ids=["pywsgi", "http_server"])
def test_an_unmodified_server_says_close_and_its_idle_connections_delay_no_exit(start, home, port, text):
    start.write("program.py", text.replace("{port}", str(port)))
    process = start.gunicorn("program", *PATIENT, workers=1).wait_ready()
    wait_for(lambda: not refused(port), "the port")
    idle, busy = Client(port), Client(port)
    assert ask(idle)[1] != "close"
    sock = idle.sock
    (old,) = process.workers()
    busy.request("GET", "/slow")
    wait_for(lambda: accepted(busy.sock), "the slow request to be accepted")
    process.signal(signal.SIGHUP)
    wait_for(lambda: not listens(old, port), "the old worker to drain")
    (home / "go").touch()
    answer = busy.getresponse()
    assert (answer.getheader("Connection") or "").lower() == "close"
    assert int(answer.read()) == old
    # it is gone although a client keeps its connection open
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    sock.settimeout(30)
    assert sock.recv(1) == b""
    idle.close()
    assert int(fetch(port)[1]) != old
    # (gunicorn 23 logs a SIGTERM of its own as an error)
    assert "[ERROR]" not in re.sub(r"\[ERROR\] Worker \(pid:\d+\) was sent SIGTERM!", "", process.log())


# --- WebSockets --------------------------------------------------------------------------------------

WEBSOCKET = """
    import os
    import flask
    import flask_sock
    import gunicorn_passenger as passenger

    app = flask.Flask(__name__)
    sock = flask_sock.Sock(app)

    @sock.route("/ws")
    def echo(ws):
        while True:
            ws.send(ws.receive())

    @app.route("/")
    def pid():
        return str(os.getpid())

    passenger.create_server(app).listen({port})
    application = app
    """


@pytest.mark.parametrize("which", ["primary", "second"])
def test_websockets_end_with_1001_at_once(start, port, which):
    start.write("program.py", WEBSOCKET.replace("{port}", str(port)))
    process = start.gunicorn("program", *KEPT, workers=1).wait_ready()
    ws = websocket_to(process.socket if which == "primary" else port)
    ws.send("hello")
    assert ws.recv() == "hello"
    (old,) = process.workers()
    process.signal(signal.SIGHUP)
    opcode, data = ws.recv_data()
    assert (opcode, data[:2]) == (websocket.ABNF.OPCODE_CLOSE, b"\x03\xe9")
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    ws.close()
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("which", ["primary", "second"])
def test_a_websocket_that_opens_during_the_drain_is_closed(start, port, home, which):
    start.write(
        "program.py",
        WEBSOCKET.replace("{port}", str(port)).replace("return str(os.getpid())", "return 'pid'")
        + """
    import time
    inner = app.wsgi_app
    def slow(environ, start_response):
        if environ["PATH_INFO"] == "/ws":
            open("asked", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.02)
        return inner(environ, start_response)
    app.wsgi_app = slow
    """,
    )
    process = start.gunicorn("program", *KEPT, workers=1, cwd=home).wait_ready()
    (old,) = process.workers()
    found = []
    opening = threading.Thread(
        target=lambda: found.append(websocket_to(process.socket if which == "primary" else port))
    )
    opening.start()
    wait_for(lambda: (home / "asked").exists(), "the handshake to arrive")
    process.signal(signal.SIGHUP)
    wait_for(lambda: not listens(old, port), "the old worker to drain")
    (home / "go").touch()
    opening.join()
    (ws,) = found
    opcode, data = ws.recv_data()
    assert (opcode, data[:2]) == (websocket.ABNF.OPCODE_CLOSE, b"\x03\xe9")
    ws.close()
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    assert "Traceback" not in process.log()


def test_workers_that_proxy_to_each_other_exit_at_once(start, port):
    """A worker is a client of a second server, its own or the other's, which would wait for it to leave."""
    start.write(
        "proxied.py",
        f"""
        import gunicorn_passenger as passenger
        from two_servers import whoami
        passenger.listen({port}, whoami)
        agent = passenger.http_proxy.Agent(idle_timeout=3600)
        app = passenger.http_proxy.create_server(target="http://127.0.0.1:{port}", agent=agent)
        """,
    )
    process = start.gunicorn("proxied:app", *KEPT).wait_ready()
    for _ in range(20):
        assert int(fetch(process.socket)[1]) in process.workers()
    assert process.stop() == 0


def test_a_client_that_sends_no_close_frame_delays_no_exit(start, port):
    start.write("program.py", WEBSOCKET.replace("{port}", str(port)))
    process = start.gunicorn("program", *KEPT, workers=1).wait_ready()
    ws = websocket_to(port)
    ws.send("hello")
    assert ws.recv() == "hello"
    (old,) = process.workers()
    process.signal(signal.SIGHUP)
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    ws.shutdown()


def test_a_setting_keeps_websockets_open(start, port):
    start.write("program.py", WEBSOCKET.replace("{port}", str(port)))
    process = start.gunicorn("program", *KEPT, workers=1, env={"PASSENGER_WS_STOP": "wait"}).wait_ready()
    ws = websocket_to(port)
    (old,) = process.workers()
    process.signal(signal.SIGHUP)
    wait_for(lambda: len(process.workers()) == 2 and int(fetch(port)[1]) != old, "the next worker")
    for _ in range(3):
        ws.send("still here")
        assert ws.recv() == "still here"
    assert old in process.workers()
    ws.close()
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")


def websocket_to(where):
    sock = Client(where)
    sock.connect()
    return websocket.create_connection("ws://localhost/ws", socket=sock.sock, timeout=30)
