"""PlacementScheduler and connections between workers where things cross: what a review has found, kept found."""

import json
import os
import signal
import socket

import pytest
from broker_access import BROKER, raw, run
from conditions import wait_for
from free_ports import free_port, free_range
from http_client import Client, fetch, pids_answering, refused
from placement_site import accepting, children, placed, report, sockets_of, upgrade
from processes import COMMAND, GUNICORN


def anything(start, program, workers=2, *arguments, **env):
    start.write("program.py", program)
    process = start.gunicorn("anything", *arguments, workers=workers, env=env).wait_ready()
    pids_answering(process.socket, workers)
    return process


BUSY = """
import os, time
import gunicorn_passenger as passenger
time.sleep({boot})

def app(environ, start_response):
    if environ["PATH_INFO"] == "/spin":
        open(f"spins-{{os.getpid()}}", "w").close()
        while not os.path.exists("enough"):
            pass
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]

application = app
passenger.create_server(app).listen({port})
"""


def test_a_sibling_that_is_busy_and_about_to_leave_loses_nothing(start, port, home):
    """It is told to leave, has not heard of it, and is sent a connection: that stays the giver's."""
    start.write("program.py", BUSY.format(boot=1, port=port))
    process = start.gunicorn(
        "program", "--keep-alive", 600, "--graceful-timeout", 600, "--timeout", 600, workers=2
    ).wait_ready()
    pids_answering(port, 2)
    busy = Client(port)
    busy.request("GET", "/spin", headers={"Connection": "close"})
    wait_for(lambda: list(home.glob("spins-*")), "a worker to be busy")
    (spinning,) = [int(path.name.split("-")[1]) for path in home.glob("spins-*")]
    idle = [Client(port) for _ in range(5)]
    for client in idle:
        client.request("GET", "/")
        assert int(client.getresponse().read()) != spinning
    process.signal(signal.SIGHUP)
    wait_for(lambda: len(process.workers()) > 2, "the next workers")
    wait_for(lambda: process.log().count("Booting worker") == 4, "them to boot")
    (home / "enough").touch()
    assert int(busy.getresponse().read()) == spinning
    for client in idle:
        client.request("GET", "/")
        assert client.getresponse().status == 200
        client.close()
    busy.close()
    wait_for(lambda: len(process.workers()) == 2, "the old workers to be gone")


def test_a_reload_that_changes_the_bind_closes_no_connection(start, home):
    """No worker of the next generation listens on its port: the worker keeps it, and its next response is the last."""
    conf = start.write("gunicorn.conf.py", f"bind = ['unix:{home}/app.sock']\nworkers = 1\nkeepalive = 30\n")
    process = start.python(
        GUNICORN, "-k", "gunicorn_passenger.Worker", "--umask", "007", "-c", conf, "two_servers"
    ).wait_ready()
    client = Client(process.socket)
    client.request("GET", "/")
    old = client.getresponse().read()
    conf.write_text(conf.read_text().replace("app.sock", "other.sock"))
    process.signal(signal.SIGHUP)
    wait_for(lambda: not refused(f"{home}/other.sock"), "the next listener")
    wait_for(lambda: len(pids_answering(f"{home}/other.sock", 1)) == 1, "the next worker")

    def is_last() -> bool:
        client.request("GET", "/")
        answer = client.getresponse()
        assert answer.read() == old
        return answer.getheader("Connection") == "close"

    wait_for(is_last, "the old worker to drain")
    client.close()


def test_a_second_listen_that_is_refused_leaves_the_first_alone(start, port):
    process = anything(
        start,
        f"""
        server = passenger.create_server(whoami).listen({port}, placement="one", name="first")
        try:
            passenger.create_server(whoami).listen({port}, placement="one", name="second")
        except passenger.PortInUse as error:
            refusal = error
        """,
        workers=3,
    )
    (inode,) = sockets_of(port, "0A")
    wait_for(lambda: accepting(inode, [process.pid]), "one to accept")
    for _ in range(5):
        fetch(port)
        assert len(accepting(inode, [process.pid])) <= 1
    wait_for(lambda: len(accepting(inode, [process.pid])) == 1, "one to accept still")
    (entry,) = [s for s in report(start)["servers"] if s["address"].endswith(str(port))]
    assert entry["name"] == "first"
    done = start.python(COMMAND, "restart", "first")
    assert done.wait_end() == 0
    assert fetch(port)[0] == 200


def test_closing_and_listening_again_keeps_the_lease(start, port):
    process = anything(start, f"server = passenger.create_server(whoami).listen({port}, placement='one')", 1)
    for _ in range(5):
        run(process, "server.close()")
        run(
            process,
            f"globals().__setitem__('server', passenger.create_server(whoami).listen({port}, placement='one'))",
        )
    assert fetch(port)[0] == 200


def test_after_an_upgrade_the_next_master_need_not_wait_for_slow_requests(start, port):
    process = placed(start, port, "one")
    masters = [process.pid]
    second = upgrade(process, masters)
    slow = Client(port)
    slow.request("GET", "/slow20")
    (inode,) = sockets_of(port, "0A")
    process.signal(signal.SIGTERM)
    wait_for(lambda: set(accepting(inode, masters)) & set(children(second)), "the next master's worker")
    assert int(fetch(port)[1]) in children(second)
    assert process.popen.poll() is None  # the slow request is still under way
    os.kill(process.pid, signal.SIGINT)
    slow.close()
    process.wait_end()
    os.kill(second, signal.SIGTERM)
    wait_for(lambda: not process.session(), "the end of all")


@pytest.mark.parametrize("addr", ["", "[]", '[[["a"], 1]]', '[{"a": 1}]', '[["1.2.3.4", -1]]', "[" * 3000])
def test_a_connection_with_an_invalid_address_reaches_no_program(start, port, addr):
    process = anything(start, f"server = passenger.create_server(whoami).listen({port})")
    hand = json.dumps(
        {"v": 1, "type": "OfferConnections", "id": 999, "key": f"127.0.0.1:{port}", "addrs": addr}
    )
    run(
        process,
        "[__import__('socket').send_fds(type('S', (), {'sendmsg': staticmethod("
        f"{BROKER}._sock._sock.sendmsg)}})(), [{hand.encode()!r}], [0])]",
    )
    run(process, raw(hand.encode()))  # and without a descriptor
    assert run(process, "passenger.listen('auto', whoami).listening") == "True"
    assert len(pids_answering(port, 2)) == 2
    assert "Traceback" not in process.log()


def test_a_new_port_begins_to_count_at_zero(start):
    first, second = free_port(), free_port()
    process = anything(
        start,
        f"server = passenger.create_server(whoami).listen({first}, name='a')",
        1,
        PASSENGER_GRACE_PERIOD=0,
    )
    for _ in range(7):
        fetch(first)
    wait_for(lambda: counted(start, f"127.0.0.1:{first}") == 7, "seven requests to be counted")
    run(process, "server.close()")
    wait_for(lambda: refused(first), "the port to be closed")
    run(process, f"passenger.listen({second}, whoami, name='b').listening")
    assert counted(start, f"127.0.0.1:{second}") == 0
    fetch(second)
    wait_for(lambda: counted(start, f"127.0.0.1:{second}") == 1, "one request")


def counted(start, address):
    (entry,) = [s for s in report(start)["servers"] if s["address"] == address]
    return entry["requests"]


def test_what_was_stopped_stays_so_through_an_upgrade(start, port):
    process = placed(start, port, "shared")
    assert start.python(COMMAND, "stop", "jobs").wait_end() == 0
    wait_for(lambda: refused(port), "the port to be closed")
    second = upgrade(process, [process.pid])
    assert refused(port)
    process.signal(signal.SIGTERM)
    assert process.wait_end() == 0
    assert refused(port)
    assert start.python(COMMAND, "restart", "jobs").wait_end() == 0
    wait_for(lambda: not refused(port), "the port to be open")
    os.kill(second, signal.SIGTERM)
    wait_for(lambda: not process.session(), "the end of all")


def test_a_restart_finds_the_port_taken(start, port):
    placed(start, port, "shared", 1)
    assert start.python(COMMAND, "stop", "jobs").wait_end() == 0
    wait_for(lambda: refused(port), "the port to be closed")
    with socket.create_server(("127.0.0.1", port)):
        done = start.python(COMMAND, "restart", "jobs")
        assert done.wait_end() == 1
        assert "cannot be opened again" in done.log()
    assert start.python(COMMAND, "restart", "jobs").wait_end() == 0
    wait_for(lambda: not refused(port), "the port to be open")
    assert fetch(port)[0] == 200


@pytest.mark.parametrize("placement", ["shared", "one"])
def test_an_unmodified_server_knows_its_port_whoever_accepts(start, port, placement):
    start.write(
        "program.py",
        f"""
        import socket
        from gevent.pywsgi import WSGIServer

        def answer(environ, start_response):
            start_response("200 OK", [])
            return [environ["SERVER_PORT"].encode()]

        application = answer
        server = WSGIServer(("127.0.0.1", {port}), answer)
        server.start()
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        """,
    )
    start.gunicorn("program", workers=2, env={"PASSENGER_PLACEMENT": f"{port}={placement}"}).wait_ready()
    assert fetch(port) == (200, str(port))


def test_each_twice_in_one_program_is_an_error(start):
    first = free_range(4)
    start.write(
        "program.py",
        f"""
        for _ in range(2):
            passenger.create_server(whoami).listen({first}, placement="each", name="x")
        """,
    )
    process = start.gunicorn("anything", workers=2, env={"PASSENGER_PORTS": f"{first}-{first + 3}"})
    assert process.wait_end() != 0
    assert "Traceback" not in process.log()
    assert f"{first}" in process.log()


def test_a_worker_too_many_says_so_once(start):
    first = free_range(1)
    process = placed(start, first, "each", 1, PASSENGER_PORTS=str(first))
    process.signal(signal.SIGTTIN)
    process.wait_log("a worker waits until another worker's port is free")
    for _ in range(5):
        report(start)
    assert process.log().count("a worker waits until another worker's port is free") == 1
    assert process.stop() == 0
    assert process.log().count("Opened") == 1
