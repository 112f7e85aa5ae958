"""The broker against workers that misbehave, and gunicorn without a broker."""

import os
import signal
import socket

import pytest
from broker_access import BROKER, raw, run
from conditions import stopped, wait_for
from free_ports import free_port
from http_client import answers, fetch, pids_answering, refused
from processes import NO_CONTROL, descriptors


@pytest.fixture
def process(start, port):
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    return start.gunicorn("anything", workers=1).wait_ready()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"garbage", "not a JSON packet"),
        (b'{"v":1,"type":"Dance","id":9}', "unknown type 'Dance'"),
        (b'{"v":2,"type":"WorkerReady","id":9}', "not of version 1"),
        (b'{"v":1,"type":"PortOpened","id":9,"key":"x"}', "only the master sends PortOpened"),
        (b"x" * 20000, "longer than 16384 bytes"),
    ],
)
def test_an_invalid_message_is_logged_and_answered(process, port, data, said):
    (worker,) = process.workers()
    run(process, raw(data))
    process.wait_log(rf"WARNING.*worker {worker} sent a malformed message: {said}")
    process.wait_log(rf"the master rejected a message of this worker: {said}")
    assert answers(port)
    assert run(process, "passenger.listen('auto', whoami).listening") == "True"


def test_a_flood_of_garbage_costs_only_that_worker_its_channel(start, port):
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", workers=2).wait_ready()
    pids_answering(port, 2)
    victim = run(process, f"[os.getpid(), [{raw(b'garbage')} for _ in range(150)]][0]")
    process.wait_log(rf"closing the channel of worker {victim} after 100 malformed messages")
    assert len(pids_answering(port, 2)) == 2  # itself, or its successor

    def other():
        pid, state = eval(run(process, "(os.getpid(), passenger.listen('auto', whoami).listening)"))
        return str(pid) != victim and state

    wait_for(other, "the other worker to get a port")


def test_a_worker_that_never_reads_cannot_hold_the_master_up(start, port):
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", workers=2).wait_ready()
    # asks on and on without letting the hub read the answers, until the master closes the channel
    flood = f"""
from gevent import monkey
sleep = monkey.get_original("time", "sleep")
sock = {BROKER}._sock._sock
while True:
    try:
        sock.send(b'{{"v":1,"type":"OpenPort","id":1,"kind":"tcp","host":"127.0.0.1","port":1}}')
    except BlockingIOError:
        sleep(0.001)
    except OSError:
        break
"""
    run(process, flood)
    process.wait_log("does not read its channel; the master closes it")
    assert run(process, "1") == "1"
    assert len(pids_answering(port, 2)) == 2


def test_a_worker_that_dies_in_mid_message_is_forgotten(start, port):
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", *NO_CONTROL, workers=1).wait_ready()
    (worker,) = process.workers()
    before = len(descriptors(process.pid))
    run(process, raw(b'{"v":1,"type":"OpenPort"'))
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: process.workers() and worker not in process.workers(), "the next worker")
    wait_for(lambda: answers(port), "an answer")
    wait_for(lambda: len(descriptors(process.pid)) == before, "the channel to be closed")


def test_a_childs_end_of_the_channel_does_not_keep_a_dead_worker(start, port):
    """multiprocessing forks: the child must not hold the port's claim of a worker that is gone."""
    start.write("gunicorn.conf.py", "import gunicorn_passenger as p\np.configure(grace_period=0.2)\n")
    start.write(
        "program.py",
        f"""
        server = passenger.create_server(whoami).listen({port}) if not os.path.exists("second") else None
        """,
    )
    process = start.gunicorn("anything", "-c", "gunicorn.conf.py", workers=1).wait_ready()
    child = int(
        run(
            process,
            "__import__('multiprocessing').get_context('fork').Process(target=lambda: None) and os.getpid()",
        )
    )
    assert child in process.workers()
    code = """
pid = os.fork()
if not pid:
    import signal
    signal.pause()
"""
    run(process, code)
    orphan = int(run(process, "pid"))
    try:
        (start.home / "second").touch()
        os.kill(child, signal.SIGKILL)
        process.wait_log(f"Closed 127.0.0.1:{port}")
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_more_ports_than_an_application_may_hold(start):
    start.write(
        "gunicorn.conf.py", "from gunicorn_passenger.system import port_opening\nport_opening.MAX_PORTS = 3\n"
    )
    start.write("program.py", "for _ in range(3): passenger.listen('auto', whoami)")
    process = start.gunicorn("anything", "-c", "gunicorn.conf.py", workers=1).wait_ready()
    status, text = fetch(process.socket, "/eval", "POST", "passenger.listen('auto', whoami)")
    assert status == 500
    assert "this application already holds 3 ports, which is the limit" in text


BROKEN = {
    "no thread": """
        from gunicorn_passenger.system import unpatched
        def none(function):
            raise RuntimeError("can't start new thread")
        unpatched.start_thread = none
    """,
    "no socketpair": """
        import errno, os
        from gunicorn_passenger.ipc import channel
        def none():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        channel.pair = none
    """,
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("kind", ["ours", "unmodified"])
def test_without_a_broker_gunicorn_serves_the_primary_and_says_what_is_lost(start, port, fault, kind):
    conf = start.write("gunicorn.conf.py", BROKEN[fault])
    if fault == "no thread":
        # the master does not respond, and does not learn that the workers of the reload are ready
        with conf.open("a") as file:
            file.write(
                "import gunicorn_passenger\n"
                "gunicorn_passenger.configure(overlap=1)\n"
                "from gunicorn_passenger.serving import broker_client\n"
                "assert hasattr(broker_client, 'RESPONSE_TIMEOUT')\n"
                "broker_client.RESPONSE_TIMEOUT = 0.3\n"
            )
    text = f"server = passenger.create_server(whoami).listen({port})"
    if kind == "unmodified":
        text = f"""
from gevent.pywsgi import WSGIServer
WSGIServer(('127.0.0.1', {port}), whoami).start()
"""
    start.write("program.py", text)
    spare = free_port()
    process = start.gunicorn("anything", "-c", conf, "-b", f"127.0.0.1:{spare}", workers=2).wait_ready()
    process.wait_log(
        r"ERROR.*the port broker (cannot start|failed) .*: (only the primary is served|the workers serve the primary)"
    )
    process.wait_log(rf"ERROR.*127.0.0.1:{port} is not available in this worker: the master's port broker")
    assert len(pids_answering(process.socket, 2)) == 2
    assert len(pids_answering(spare, 2)) == 2
    assert refused(port)
    assert run(process, "[s.state for s in passenger.servers()]") == "['lost']"
    process.hup(2)
    assert len(pids_answering(process.socket, 2)) == 2


@pytest.mark.parametrize(
    "listen",
    [
        "kept = passenger.create_server(whoami).listen({port})",
        "from gevent.pywsgi import WSGIServer; kept = WSGIServer(('127.0.0.1', {port}), whoami); kept.start()",
    ],
    ids=["ours", "unmodified"],
)
def test_a_server_that_asked_a_stopped_master_is_served_when_the_master_continues(start, port, listen):
    """A virtual machine may be paused for longer than a worker waits."""
    process = start.gunicorn("anything", workers=1).wait_ready()
    with stopped(process.pid):
        run(
            process,
            "import gunicorn_passenger.serving.broker_client as c\nc.RESPONSE_TIMEOUT = 0.2\n"
            + listen.format(port=port),
        )
        assert run(process, "[s.state for s in passenger.servers()]") == "['lost']"
        process.wait_log(rf"127.0.0.1:{port} is not available in this worker: .*did not respond within 0.2 s")
    wait_for(lambda: answers(port), "the server")
    assert run(process, "[s.state for s in passenger.servers()]") == "['listening']"


def test_a_late_denial_is_logged(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        process = start.gunicorn("anything", workers=1).wait_ready()
        with stopped(process.pid):
            run(
                process,
                "import gunicorn_passenger.serving.broker_client as c\nc.RESPONSE_TIMEOUT = 0.2\n"
                f"kept = passenger.create_server(whoami).listen({number})",
            )
        process.wait_log(rf"a server of this worker gets no port: 127.0.0.1:{number} is in use")


def test_the_brokers_thread_survives_a_failure(start, port):
    """Whatever goes wrong in a round is logged, and the next round serves."""
    conf = start.write(
        "gunicorn.conf.py",
        """
        from gunicorn_passenger.master.broker import Broker
        serve, failed = Broker.serve_worker, []
        def fail_once(self, fd):
            if not failed:
                failed.append(True)
                raise ZeroDivisionError("a mistake of ours")
            serve(self, fd)
        Broker.serve_worker = fail_once
        """,
    )
    process = start.gunicorn("two_servers", "-c", conf, env={"P1": port}).wait_ready()
    assert len(pids_answering(port, 2)) == 2
    assert "a mistake of ours" in process.log()
    assert "internal error in the port broker" in process.log()


def test_a_broker_that_hangs_does_not_wedge_a_fork(start, port):
    conf = start.write(
        "gunicorn.conf.py",
        """
        import os, time
        from gunicorn_passenger.master import loop
        from gunicorn_passenger.master.listener_sync import ListenerSync
        loop.LOCK_TIMEOUT = 0.2
        decide = ListenerSync.decide_stop_or_reload
        def hang(self):
            while os.path.exists("hang"):
                time.sleep(0.05)
            decide(self)
        ListenerSync.decide_stop_or_reload = hang
        """,
    )
    process = start.gunicorn("two_servers", "-c", conf, workers=2, env={"P1": port}).wait_ready()
    pids_answering(port, 2)
    (start.home / "hang").touch()
    for victim in process.workers():
        os.kill(victim, signal.SIGKILL)
    process.wait_log("the port broker hangs")
    wait_for(lambda: answers(process.socket), "the primary to be served")
    (start.home / "hang").unlink()
    process.hup(2)
    assert len(pids_answering(port, 2)) == 2


def test_a_patched_master_has_a_thread_of_the_system(start, port):
    """monkey.patch_all() at the top of gunicorn.conf.py patches the master too."""
    conf = start.write("gunicorn.conf.py", "from gevent import monkey\nmonkey.patch_all()\n")
    process = start.gunicorn("two_servers", "-c", conf, workers=2, env={"P1": port}).wait_ready()
    old = pids_answering(port, 2)
    process.hup(2)
    assert not pids_answering(port, 2) & old
    assert process.stop() == 0


def test_idle_costs_nothing(start, port):
    process = start.gunicorn("two_servers", workers=1, env={"P1": port}).wait_ready()
    assert answers(port)

    def cpu():
        with open(f"/proc/{process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def switches():
        total = 0
        for task in os.listdir(f"/proc/{process.pid}/task"):
            with open(f"/proc/{process.pid}/task/{task}/status") as file:
                total += next(int(li.split()[1]) for li in file if li.startswith("voluntary"))
        return total

    # gunicorn's own loop turns once a second; the broker's thread sleeps until a message arrives
    import time

    before, begun = switches(), time.monotonic()
    wait_for(lambda: time.monotonic() - begun > 3, "three seconds")
    assert (switches() - before) / (time.monotonic() - begun) < 20


@pytest.mark.parametrize(
    "field",
    [
        '"kind":"auto","host":"127.0.0.1","within":"zzz"',
        '"kind":"unix","path":"/tmp/\\ud800.sock"',
        '"kind":"tcp","host":"nowhere","port":9000',
        '"kind":"dance"',
    ],
)
def test_whatever_is_asked_for_is_answered(process, port, field):
    import json

    ask = '{"v":1,"type":"OpenPort","id":77,' + field + "}"
    assert json.loads(ask)
    code = f"""
import gevent
from gevent.event import AsyncResult
link = {BROKER}
link._pending[77] = AsyncResult()
link._sock._sock.send({ask.encode()!r})
answer = type(link._pending[77].get(timeout=30)[0]).__name__
"""
    assert fetch(process.socket, "/eval", "POST", code) == (200, "")
    assert run(process, "answer") == "'RequestDenied'"
    assert "Traceback" not in process.log()


def test_an_absurd_backlog_is_bounded(start, port):
    start.write(
        "program.py", f"import socket\ns = socket.socket()\ns.bind(('127.0.0.1', {port}))\ns.listen(2**31)"
    )
    start.gunicorn("anything").wait_ready()
    assert not refused(port)


def test_ports_leave_the_master_room_for_workers(start):
    start.write("program.py", "")
    process = start.run(
        "sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *gunicorn_command(start), env={}
    ).wait_ready()  # fmt: skip
    code = """
said = ""
try:
    for _ in range(300): passenger.listen("auto", whoami).close
except OSError as error:
    said = str(error)
"""
    assert fetch(process.socket, "/eval", "POST", code)[0] == 200
    assert "already holds 100 ports, which is the limit" in run(process, "said")
    (worker,) = process.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: answers(process.socket), "the next worker")


def gunicorn_command(start):
    import sys

    from processes import GUNICORN

    return [sys.executable, GUNICORN, "-k", "gunicorn_passenger.Worker", "--umask", "007", "-b",
            f"unix:{start.home}/app.sock", "anything"]  # fmt: skip
