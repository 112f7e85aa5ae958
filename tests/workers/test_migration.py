"""Idle connections that move to another worker: whatever their clients are, and whatever the siblings do."""

import os
import resource
import signal
import socket

from conditions import wait_for
from http_client import Client, fetch, pids_answering

KEPT = ("--keep-alive", 600, "--graceful-timeout", 600, "--timeout", 600)

PROGRAM = """
    import os
    import gevent.monkey
    import gunicorn_passenger as passenger

    sleep = gevent.monkey.get_original("time", "sleep")

    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        if environ["PATH_INFO"] == "/block":
            open(f"blocked-{os.getpid()}", "w").close()
            while not os.path.exists("go"):
                sleep(0.02)
        return [str(os.getpid()).encode()]

    passenger.create_server(application).listen({port})
    """


def ask(client, path="/"):
    client.request("GET", path)
    return int(client.getresponse().read())


class Named(Client):
    """A client of a UNIX socket whose own end has a name."""

    def __init__(self, where, name):
        super().__init__(where)
        self.name = name

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.bind(self.name)
        self.sock.connect(self.where)


def test_clients_whose_sockets_have_names_move_like_the_others(start, port, home):
    process = start.gunicorn("two_servers", *KEPT, workers=2, env={"P1": port}).wait_ready()
    pids_answering(process.socket, 2)
    names: list[str | bytes | None] = [
        "",
        b"\0abstract\xff",
        str(home / "client.sock"),
        b"\0{}\n",
        *[None] * 26,
    ]
    clients = [Client(process.socket) if name is None else Named(process.socket, name) for name in names]
    for client in clients:
        ask(client)
    socks = [client.sock for client in clients]
    process.hup(2)
    assert {ask(client) for client in clients} <= set(process.workers())
    assert [client.sock for client in clients] == socks
    for client in clients:
        client.close()
    assert "Traceback" not in process.log()


def blocking(start, port, workers):
    """A program with a worker that does nothing until the file "go" is there; its pid, and the request."""
    start.write("blocking.py", PROGRAM.replace("{port}", str(port)))
    process = start.gunicorn("blocking", *KEPT, workers=workers).wait_ready()
    pids_answering(port, workers)
    return process


def block(process, pid):
    """Have one worker block, through a connection that it serves."""
    client = Client(process.socket)
    while ask(client) != pid:
        client.close()
    client.request("GET", "/block")
    wait_for(lambda: (process.home / f"blocked-{pid}").exists(), "the worker to block")
    return client


def test_a_busy_worker_of_the_old_generation_is_offered_nothing(start, port, home):
    process = blocking(start, port, 3)
    clients = [Client(port) for _ in range(30)]
    old = process.workers()
    busy = old[-1]
    mine = [client for client in clients if ask(client) != busy]
    blocked = block(process, busy)
    process.signal(signal.SIGHUP)
    wait_for(lambda: set(process.workers()) & set(old) == {busy}, "the other old workers to exit")
    new = set(process.workers()) - {busy}
    assert {ask(client) for client in mine} <= new
    (home / "go").touch()
    assert int(blocked.getresponse().read()) == busy
    wait_for(lambda: busy not in process.workers(), "the busy worker to exit")
    assert {ask(client) for client in clients} <= set(process.workers())
    for client in (*clients, blocked):
        client.close()


def test_connections_that_a_busy_sibling_does_not_take_go_to_another(start, port, home):
    process = blocking(start, port, 3)
    leaving, busy, other = sorted(process.workers())
    clients = [Client(port) for _ in range(60)]
    mine = [client for client in clients if ask(client) == leaving]
    blocked = block(process, busy)
    process.signal(signal.SIGTTOU)
    wait_for(lambda: leaving not in process.workers(), "the oldest worker to exit")
    assert {ask(client) for client in mine} == {other}
    (home / "go").touch()
    assert int(blocked.getresponse().read()) == busy
    # what it was offered at first is not its own: it reads nothing from there
    for _ in range(3):
        assert {ask(client) for client in mine} == {other}
    for client in (*clients, blocked):
        client.close()
    assert "Traceback" not in process.log()


def test_many_connections_move(start, port):
    """More than one packet has room for; none of them is closed."""
    count = 600
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > count + 200
    process = start.gunicorn(
        "two_servers", *KEPT, "--worker-connections", 2 * count, workers=1, env={"P1": port}
    ).wait_ready()
    clients = [Client(port) for _ in range(count)]
    (old,) = {ask(client) for client in clients}
    socks = [client.sock for client in clients]
    process.hup(1)
    (new,) = process.workers()
    assert {ask(client) for client in clients} == {new} != {old}
    assert [client.sock for client in clients] == socks
    for client in clients:
        client.close()
    assert int(fetch(port)[1]) == new
    os.kill(new, 0)
