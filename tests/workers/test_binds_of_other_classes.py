"""gunicorn's binds as ports of the program, under worker classes that serve the primary on them by themselves."""

import os
import signal
from contextlib import ExitStack
from http.client import RemoteDisconnected
from textwrap import dedent

import gunicorn
import pytest
from broker_access import run
from conditions import stopped, wait_for
from free_ports import free_port
from http_client import Client, accepted, answers, fetch, pids_answering, refused
from placement_site import report
from processes import GUNICORN, NO_CONTROL, require_worker_class
from status_commands import command
from unmodified_servers import Requests

HOOKS = "from gunicorn_passenger.hooks import *\n"
OURS = "gunicorn_passenger.Worker"


def started(start, worker_class, app, *arguments, binds=(), conf="", workers=2, **env):
    """gunicorn with a UNIX socket for the primary, and further binds."""
    return start.python(
        GUNICORN, "-k", worker_class, "-w", workers,
        "-c", start.write("gunicorn.conf.py", HOOKS + dedent(conf)),
        "-b", f"unix:{start.home}/app.sock", *(word for bind in binds for word in ("-b", f"127.0.0.1:{bind}")),
        *NO_CONTROL, *arguments, app, env=env,
    )  # fmt: skip


def primary_of(worker_class):
    """A program that says ``primary``."""
    return "two_servers:" + ("two_asgi" if worker_class == "asgi" else "two")


def who(where, times=8):
    """Which servers respond there: ``primary`` or ``second``."""
    return {fetch(where, "/which")[1] for _ in range(times)}


def responds(server, where, worker_class):
    """Whether ``server`` responds there now.

    ``gthread`` of gunicorn 23 ends without a response the connections that a leaving worker has accepted and
    not read; 24 does not.
    """
    try:
        return fetch(where, "/which")[1] == server
    except (ConnectionResetError, RemoteDisconnected):
        if worker_class == "gthread" and gunicorn.version_info < (24,):
            return False
        raise


#: A primary, and where the file ``claims`` says so a second server on the bind. ``/which`` says which of them
#: responds, and ``/wait`` responds when the file ``go`` exists.
CLAIMING = """
    import os
    import time
    import two_servers
    import gunicorn_passenger as passenger

    def waiting(app):
        def respond(environ, start_response):
            while environ["PATH_INFO"] == "/wait" and not os.path.exists("go"):
                time.sleep(0.02)
            return app(environ, start_response)
        return respond

    primary = waiting(two_servers.two)

    if os.path.exists("claims"):
        passenger.create_server(waiting(two_servers.which("second"))).listen(int(os.environ["BIND"]))
    """


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "gevent", OURS])
def test_a_program_claims_a_bind_by_a_reload(start, port, home, worker_class):
    """The old program's primary finishes what it has accepted, and the new program's server alone accepts."""
    start.write("claiming.py", CLAIMING)
    process = started(
        start,
        worker_class,
        "claiming:primary",
        "--threads",
        4 if worker_class == "gthread" else 1,
        binds=[port],
        BIND=port,
    ).wait_ready()
    assert who(port) == {"primary"}
    before = set(process.workers())
    held = Client(port)
    held.request("GET", "/wait")
    wait_for(lambda: accepted(held), "a worker to accept")
    (home / "claims").touch()
    process.signal(signal.SIGHUP)
    wait_for(lambda: responds("second", port, worker_class), "the next program to have the bind")
    (home / "go").touch()
    response = held.getresponse()
    assert response.status == 200
    assert int(response.read()) in before
    wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert who(port) == {"second"}
    assert who(process.socket) == {"primary"}
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "gevent", OURS])
def test_a_program_gives_a_bind_back_by_a_reload(start, port, home, worker_class):
    """Also while an old worker is too busy to notice that it leaves: the primary is served there again."""
    start.write("claiming.py", CLAIMING)
    (home / "claims").touch()
    process = started(
        start, worker_class, "claiming:primary", binds=[port], BIND=port, P1=free_port()
    ).wait_ready()
    wait_for(lambda: answers(port), "the bind")
    assert who(port) == {"second"}
    before = set(process.workers())
    (home / "claims").unlink()
    with ExitStack() as busy:
        for pid in before:
            busy.enter_context(stopped(pid))
        process.signal(signal.SIGHUP)
        wait_for(lambda: answers(process.socket), "the next workers")
        wait_for(lambda: responds("primary", port, worker_class), "the next program to have the bind")
    wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
    assert who(port) == {"primary"}
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("opens", ["ours", "unmodified"])
@pytest.mark.parametrize("worker_class", ["sync", "gevent", "asgi"])
def test_a_bind_belongs_to_the_primary_before_gunicorns_loop_runs(start, port, worker_class, opens):
    """The master has said so, and the class accepts there next: a server that comes now gets an error that says
    what to do, and each client gets the primary.
    """
    require_worker_class(worker_class)
    conf = f"""
        import http.server
        import gunicorn_passenger as passenger
        import two_servers

        def late(worker):
            try:
                if "{opens}" == "ours":
                    passenger.create_server(two_servers.two).listen({port})
                else:
                    http.server.HTTPServer(("127.0.0.1", {port}), http.server.BaseHTTPRequestHandler)
            except OSError as error:
                worker.log.error("no server: %s", error)

        passenger.on("ready", late)
        """
    process = started(
        start, worker_class, primary_of(worker_class), binds=[port], conf=conf, P1=free_port()
    ).wait_ready()
    process.wait_log(
        rf"no server: .*127.0.0.1:{port} is in gunicorn's bind, and this worker serves the primary there", 2
    )
    assert who(port) == who(process.socket) == {"primary"}
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "gevent", "asgi"])
def test_one_worker_accepts_on_a_bind(start, port, worker_class):
    """``placement="one"``: neither the other workers nor the primary accept there, whoever leaves."""
    require_worker_class(worker_class)
    conf = f"""
        import gunicorn_passenger as passenger
        import two_servers

        def post_worker_init(worker):
            passenger.create_server(two_servers.which("second")).listen({port}, placement="one", name="jobs")
        """
    process = started(start, worker_class, primary_of(worker_class), binds=[port], conf=conf).wait_ready()
    wait_for(lambda: answers(port), "the bind")

    def accepting():
        """The one worker that accepts, as the master and the clients say."""
        (server,) = [server for server in report(start)["servers"] if server["name"] == "jobs"]
        found = {fetch(port)[1] for _ in range(10)}
        return int(*found) if len(found) == 1 and list(map(str, server["workers"])) == [*found] else 0

    with Requests(port, threads=1) as asked:
        first = wait_for(accepting, "one worker to accept")
        assert who(port) == {"second"}
        before = set(process.workers())
        process.signal(signal.SIGHUP)
        wait_for(lambda: before.isdisjoint(process.workers()), "the end of the old workers")
        second = wait_for(accepting, "one worker to accept after the reload")
    assert asked.failures == []
    assert second != first
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: second not in process.workers(), "the end of the worker")
    third = wait_for(accepting, "another worker to accept")
    assert third != second
    assert who(port) == {"second"}
    assert who(process.socket) == {"primary"}
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("worker_class", ["sync", "gevent"])
@pytest.mark.parametrize(
    "opens",
    [
        "kept = passenger.create_server(whoami).listen({port})",
        "import http.server as h; kept = h.HTTPServer(('127.0.0.1', {port}), h.BaseHTTPRequestHandler)",
    ],
    ids=["ours", "unmodified"],
)
def test_a_denial_that_comes_too_late(start, port, worker_class, opens):
    """The log has the reason, and the worker and its other servers continue."""
    allowed = free_port()
    process = started(start, worker_class, "anything", workers=1, PASSENGER_PORTS=allowed).wait_ready()
    run(process, f"kept_too = passenger.create_server(whoami).listen({allowed})")
    run(process, "import gunicorn_passenger.serving.broker_client as c")
    with stopped(process.pid):
        run(process, "c.RESPONSE_TIMEOUT = 0.2")
        run(process, opens.format(port=port))
        run(process, "c.RESPONSE_TIMEOUT = 10.0")
        process.wait_log(
            rf"\[ERROR\] 127.0.0.1:{port} is not available in this worker: .*did not respond within 0.2 s"
        )
    process.wait_log(
        rf"\[ERROR\] gunicorn-passenger: a server of this worker gets no port: .*\b{port}\b.* not allocated"
    )
    assert refused(port)
    assert answers(allowed)
    run(process, "kept.close() if hasattr(kept, 'close') else kept.server_close()")
    again = run(process, "[s.address for s in passenger.servers()]")
    assert str(allowed) in again
    assert str(port) not in again
    assert process.stop() == 0
    assert "Traceback" not in process.log()


LATE_CLAIM = """
    import os
    import signal
    import threading
    import gunicorn_passenger as passenger
    import gunicorn_passenger.serving.broker_client as client
    import two_servers

    def claim():
        passenger.create_server(two_servers.which("second")).listen({port})

    def post_worker_init(worker):
        if os.path.exists("stopped"):
            claim()
            return
        client.RESPONSE_TIMEOUT = 0.2
        os.kill(os.getppid(), signal.SIGSTOP)
        while True:
            with open(f"/proc/{{os.getppid()}}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "T":
                    break
        open("stopped", "w").close()
        # it returns when the master has not responded
        claim()
        passenger.on("ready", lambda _: setattr(client, "RESPONSE_TIMEOUT", 10.0))
    """


@pytest.mark.parametrize("worker_class", ["sync", "gevent"])
def test_a_bind_whose_claim_is_decided_too_late(start, port, home, worker_class):
    """The primary is served there meanwhile. The log says that a server has the bind, too, and that a reload helps."""
    process = started(
        start,
        worker_class,
        "two_servers:two",
        binds=[port],
        conf=LATE_CLAIM.format(port=port),
        workers=1,
        P1=free_port(),
    )
    try:
        wait_for((home / "stopped").exists, "the master to be stopped")
        wait_for(lambda: answers(port), "the primary on the bind")
        assert who(port) == {"primary"}
    finally:
        process.signal(signal.SIGCONT)
    process.wait_log(
        rf"\[ERROR\] gunicorn-passenger: the primary and a server of the program both accept on "
        rf"127.0.0.1:{port}, .*; reload gunicorn"
    )
    process.hup(1)
    wait_for(lambda: answers(port), "the server on the bind")
    assert who(port) == {"second"}
    assert process.log().count("the primary and a server of the program both accept") == 1
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("worker_class", ["sync", OURS])
def test_an_operator_restarts_and_stops_a_bind(start, port, worker_class):
    """Nothing of the primary's is restarted: the error says what does that. A server of the program is."""
    unclaimed = free_port()
    conf = f"""
        import gunicorn_passenger as passenger
        import two_servers

        def post_worker_init(worker):
            passenger.create_server(two_servers.which("second")).listen({port}, name="jobs")
        """
    process = started(start, worker_class, "two_servers:two", binds=[port, unclaimed], conf=conf).wait_ready()
    wait_for(lambda: answers(port) and len(pids_answering(unclaimed, 2)) == 2, "the binds")
    for verb, remedy in (("restart", "reload gunicorn"), ("stop", "remove it from bind and reload")):
        done = command(start, verb, unclaimed)
        assert done.returncode == 1
        assert (
            f"127.0.0.1:{unclaimed} is in gunicorn's bind, and no server of the program listens"
            in done.stderr
        )
        assert remedy in done.stderr
    assert who(unclaimed) == {"primary"}
    with Requests(port, threads=1) as asked:
        done = command(start, "restart", "jobs")
        assert (done.returncode, done.stdout) == (0, f"restarted jobs (127.0.0.1:{port})\n")
        count = len(asked.pids)
        wait_for(lambda: len({*asked.pids[count:]}) == 2, "both workers to accept again")
    assert asked.failures == []
    assert who(port) == {"second"}
    assert process.stop() == 0


@pytest.mark.parametrize("worker_class", ["sync", "gevent", OURS])
@pytest.mark.parametrize("runtime", [False, True], ids=["", "with another port"])
def test_a_reload_adds_a_bind_and_removes_it(start, port, worker_class, runtime):
    """Those that stay, a server's and the primary's, refuse no client meanwhile: gunicorn alone could not open
    them again while the old workers have them, and would exit.
    """
    unclaimed, added = free_port(), free_port()
    conf = """
        import gunicorn_passenger as passenger
        import two_servers

        bind = {binds}

        def post_worker_init(worker):
            passenger.create_server(two_servers.which("second")).listen({port}, name="jobs")
        """

    def write(*ports):
        binds = [f"unix:{start.home}/app.sock", *(f"127.0.0.1:{number}" for number in ports)]
        return start.write("gunicorn.conf.py", HOOKS + dedent(conf.format(binds=binds, port=port)))

    process = start.python(
        GUNICORN, "-k", worker_class, "-w", 2, "-c", write(port, unclaimed), *NO_CONTROL, "two_servers:two",
        env={"P1": free_port()} if runtime else {},
    ).wait_ready()  # fmt: skip
    wait_for(lambda: answers(port) and answers(unclaimed), "the binds")
    with Requests(port, threads=1) as second, Requests(unclaimed, threads=1) as primary:
        write(added, port, unclaimed)
        process.hup(2)
        wait_for(lambda: answers(added), "the new bind")
        assert who(added) == who(unclaimed) == {"primary"}
        assert who(port) == {"second"}
        write(port, unclaimed)
        process.hup(2)
        wait_for(lambda: refused(added), "the bind to be closed")
        assert who(unclaimed) == {"primary"}
        assert who(port) == {"second"}
    assert second.failures == []
    # a class of gunicorn's own may end connections that it has only just accepted
    assert not [error for error in primary.failures if isinstance(error, ConnectionRefusedError)]
    assert process.stop() == 0
    assert all(map(refused, [port, unclaimed]))
    assert "Traceback" not in process.log()
