"""Faults that are injected: workers that misbehave, no descriptors, no disk, a broker whose thread dies.

What a single malformed message does is in test_broker.py, a runtime directory that cannot be used in test_status.py.
"""

import contextlib
import itertools
import os
import resource
import signal
import sys
import threading

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client, answers, fetch, pids_answering, refused
from processes import GUNICORN, NO_CONTROL, descriptors, require

#: In a worker: its end of the channel.
BROKER = "__import__('gunicorn_passenger.serving.registry').serving.registry.registry.broker"

#: In a worker: whether it gets a port of the master, which it gives back.
GETS = "(lambda server: (server.listening, server.close())[0])(passenger.listen('auto', whoami))"


def run(process, code):
    """Evaluate an expression, or run statements, in one of the workers."""
    status, text = fetch(process.socket, "/eval", "POST", code)
    assert status == 200, text
    return text


def run_in(process, pid, code):
    """The same, in this worker."""
    guarded = f"({code}) if os.getpid() == {pid} else 'another'"
    return wait_for(lambda: (text := run(process, guarded)) != "'another'" and text, f"worker {pid}")


def conf(start, text):
    return start.write("gunicorn.conf.py", text)


@pytest.fixture
def process(start, port):
    """Two workers, a port that both serve, and a short grace period."""
    path = conf(start, "import gunicorn_passenger as p\np.configure(grace_period=0.1)\n")
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", "-c", path, *NO_CONTROL, workers=2).wait_ready()
    pids_answering(port, 2)
    return process


def memory(pid):
    """Resident memory in kB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


class Others:
    """Clients that are served meanwhile: each request on a connection of its own, in a thread."""

    def __init__(self, *places):
        self.answered = dict.fromkeys(places, 0)
        self.failed = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[place]) for place in places]

    def _ask(self, place):
        while not self._end.is_set():
            try:
                assert fetch(place)[0] == 200
                self.answered[place] += 1
            except Exception as error:
                self.failed.append((place, error))
            self._end.wait(0.005)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()


# --- workers that misbehave ---------------------------------------------------------------------------


def test_a_flood_of_listen_and_close_leaks_nothing_and_disturbs_no_worker(process, port):
    (flooder, other) = process.workers()
    flood = f"sum({GETS} for _ in range(200))"
    assert run_in(process, flooder, flood) == "200"
    wait_for(lambda: process.log().count("Closed 127.0.0.1:") >= 1, "ports to be closed")
    before = settled_descriptors(process)
    kilobytes = memory(process.pid)
    with Others(process.socket, port) as others:
        for _ in range(5):
            assert run_in(process, flooder, flood) == "200"
        assert run_in(process, other, GETS) == "True"
    assert not others.failed
    assert min(others.answered.values()) > 10
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert memory(process.pid) - kilobytes < 4096, "kB more in the master"
    assert set(process.workers()) == {flooder, other}


def settled_descriptors(process):
    """How many descriptors the master has when every unused port is closed."""
    seen = []

    def same():
        seen.append(len(descriptors(process.pid)))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_for(same, lambda: f"the master to settle: {seen[-20:]}")
    return seen[-1]


def test_a_flood_as_fast_as_the_channel_takes_it_does_not_keep_others_waiting(process, port):
    """The worker asks and gives back on and on, past its own hub, while another opens and closes ports."""
    (flooder, other) = process.workers()
    before = settled_descriptors(process)
    code = f"""
if os.getpid() == {flooder}:
    import json, threading
    from gevent import monkey
    raw = {BROKER}._sock._sock
    def flood():
        sleep = monkey.get_original("time", "sleep")
        number = 10**6
        while not os.path.exists("enough"):
            number += 1
            message = {{"v": 1, "type": "OpenPort", "id": number, "kind": "tcp", "host": "127.0.0.1", "port": {port}}}
            for data in (message, {{"v": 1, "type": "ReleasePort", "id": 0, "key": "127.0.0.1:1"}}):
                try:
                    raw.send(json.dumps(data).encode())
                except BlockingIOError:
                    sleep(0.0005)
    monkey.get_original("_thread", "start_new_thread")(flood, ())
    open("begun", "w").close()
"""
    wait_for(lambda: run(process, code) == "" and (process.home / "begun").exists(), "the flood")
    try:
        with Others(port) as others:
            for _ in range(20):
                assert run_in(process, other, GETS) == "True"
    finally:
        (process.home / "enough").touch()
    assert not others.failed
    assert len(pids_answering(port, 2)) == 2
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert "does not read its channel" not in process.log() or process.workers()


@pytest.mark.parametrize("descriptors_sent", [1, 3, 20])
def test_unexpected_descriptors_are_closed(process, port, descriptors_sent):
    before = settled_descriptors(process)
    code = f"""
import array, fcntl, socket, termios, time
end = {BROKER}._sock._sock
for data in (b"garbage", b'{{"v":1,"type":"WorkerReady","id":0,"primary":"x"}}'):
    for _ in range(20):
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range({descriptors_sent})]
        end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        for fd in fds: os.close(fd)
        # a flood would cost this worker its channel: wait until the master has read and closed these
        while any(fcntl.ioctl(end.fileno(), termios.TIOCOUTQ, bytes(4))): time.sleep(0.01)
        while len(os.listdir(f"/proc/{{os.getppid()}}/fd")) > {before + 40}: time.sleep(0.01)
"""
    run(process, code)
    process.wait_log("sent a malformed message: not a JSON packet", count=20)
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert run(process, GETS) == "True"


@pytest.mark.parametrize(
    "addr", ['[["127.0.0.1", 5]]', "{", "[]", "7", '[{"a": 1}]', '["x"]', "[null]", '[""]', '["", ""]']
)
@pytest.mark.parametrize("what", ["/dev/null", "a socket"])
def test_a_descriptor_that_is_not_a_connection_does_not_disturb_the_sibling(process, port, addr, what):
    """A worker hands on what it says is a client's connection; the sibling must be able to ask on."""
    (sender, other) = process.workers()
    code = f"""
if os.getpid() == {sender}:
    import array, json, socket
    def hand(key):
        pair = socket.socketpair() if {what!r} == "a socket" else []
        fd = pair[0].fileno() if pair else os.open("/dev/null", os.O_RDONLY)
        message = {{"v": 1, "type": "OfferConnections", "id": 0, "key": key, "addrs": {addr!r}}}
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        {BROKER}._sock._sock.sendmsg([json.dumps(message).encode()], rights)
        for end in pair: end.close()
        if not pair: os.close(fd)
    for key in ("127.0.0.1:{port}", "primary unix:{process.socket}", "primary", "nonsense"):
        hand(key)
    result = "handed"
"""
    wait_for(
        lambda: run(process, code) == "" and run_in(process, sender, "'result' in globals()") == "True", "it"
    )
    before = len(descriptors(other))
    for _ in range(3):
        assert run_in(process, other, GETS) == "True"
    assert set(process.workers()) == {sender, other}
    assert len(pids_answering(port, 2)) == 2
    wait_for(lambda: len(descriptors(other)) <= before + 1, "what was handed on to be closed")


def test_workers_that_die_while_they_ask_leave_nothing_behind(process, port):
    """Killed in the middle of a flood of questions, again and again."""
    before = settled_descriptors(process)
    for _ in range(5):
        flooder = process.workers()[0]
        code = f"""
if os.getpid() == {flooder}:
    import gevent
    def flood():
        while True:
            passenger.listen('auto', whoami).close()
    gevent.spawn(flood)
    open("flooding-{flooder}", "w").close()
"""
        flag = process.home / f"flooding-{flooder}"
        wait_for(lambda c=code, f=flag: run(process, c) == "" and f.exists(), "the flood")
        os.kill(flooder, signal.SIGKILL)
        wait_for(
            lambda f=flooder: f not in process.workers() and len(process.workers()) == 2, "another worker"
        )
        wait_for(lambda: answers(process.socket), "an answer")
    assert len(pids_answering(port, 2)) == 2
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert "Traceback" not in process.log()


# --- no descriptors -----------------------------------------------------------------------------------


def limit(pid, spare):
    """Leave a process just so many descriptors: those below the limit that are free."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1024) if number not in used)
    soft = next(itertools.islice(free, spare, None))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


def unlimit(pid):
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(hard, 1024), hard))


@pytest.mark.parametrize("place", ["primary", "ours", "unmodified"])
def test_a_worker_without_descriptors_lets_connections_wait(start, place):
    ours, unmodified = free_port(), free_port()
    process = start.gunicorn(
        "storm_app", workers=1, env={"STORM_OURS": ours, "STORM_UNMODIFIED": unmodified}
    ).wait_ready()
    places = {"primary": process.socket, "ours": ours, "unmodified": unmodified}
    assert all(answers(where) for where in places.values())
    (worker,) = process.workers()
    limit(worker, 3)
    with contextlib.ExitStack() as stack:
        clients = [Client(places[place]) for _ in range(8)]
        for client in clients:
            client.connect()
            stack.callback(client.close)
        process.wait_log("Too many open files")
        for client in clients[:4]:
            client.close()
        for client in clients[4:]:
            # each in its turn: there is room for so many
            client.request("GET", "/?it")
            assert client.getresponse().read() == b"it"
            client.close()
    assert all(answers(where) for where in places.values())
    unlimit(worker)
    assert process.workers() == [worker]
    assert process.log().count("Too many open files") < 30


def test_a_worker_without_descriptors_is_told_why_it_gets_no_port(process, port):
    """The descriptor of the port cannot be put into a worker that has no room for it."""
    (worker, other) = process.workers()
    code = f"""
if os.getpid() == {worker}:
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # no descriptor that the worker closes meanwhile makes room: those below 3 stay open
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        said = str(passenger.listen('auto', whoami).state)
    except OSError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
"""
    wait_for(
        lambda: run(process, code) == "" and run_in(process, worker, "'said' in globals()") == "True",
        "the attempt",
    )
    said = run_in(process, worker, "said")
    assert "lost" in said or "open files" in said, said
    process.wait_log("open files")
    assert run_in(process, worker, GETS) == "True"
    assert set(process.workers()) == {worker, other}
    assert len(pids_answering(port, 2)) == 2


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("how", ["TTIN", "kill"])
def test_a_master_without_descriptors_continues(process, port, spare, how):
    """It is to start a worker and has hardly a descriptor: the others serve, and with room again all is well."""
    (victim, other) = process.workers()
    with Others(process.socket, port) as others:
        limit(process.pid, spare)
        if how == "kill":
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in process.workers(), "the end of the worker")
        else:
            process.signal(signal.SIGTTIN)
            process.wait_log("Handling signal: ttin")
        serve_some(process, others)
        assert other in process.workers()
        assert process.log().count("Booting worker") < 20, "workers in a loop"
        unlimit(process.pid)
        wait_for(lambda: len(process.workers()) == (3 if how == "TTIN" else 2), process.log)
    if how == "TTIN":
        assert not others.failed
    process.hup(2)  # which also forgets TTIN
    pids_answering(port, 2)
    assert run(process, GETS) == "True"


def serve_some(process, others):
    """Wait until every place has answered some more requests; the master must be there then."""
    goal = {place: count + 50 for place, count in others.answered.items()}
    wait_for(lambda: all(others.answered[p] >= goal[p] for p in goal) or process.popen.poll(), process.log)
    assert process.popen.poll() is None, process.log()


def test_a_master_without_descriptors_refuses_a_port_and_says_why(process, port):
    limit(process.pid, 0)
    status, text = fetch(process.socket, "/eval", "POST", "passenger.listen('auto', whoami)")
    assert status == 500
    assert "open files" in text
    assert len(pids_answering(port, 2)) == 2
    unlimit(process.pid)
    assert run(process, GETS) == "True"


# --- no disk ------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and "CI" not in os.environ, reason="only root mounts file systems"
)


def on_small_disk(start, port, options, *arguments):
    """gunicorn with a file system of its own for log and runtime directory, in a mount namespace."""
    disk = start.home / "disk"
    disk.mkdir()
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    script = f'mount -t tmpfs -o mode=700,{options} tmpfs {disk} && exec "$@"'
    return start.run(
        require("unshare"), "-m", "sh", "-c", script, "sh", sys.executable, GUNICORN,
        "-k", "gunicorn_passenger.Worker", "-w", 2, "--umask", "007", "-b", f"unix:{start.home}/app.sock",
        *arguments, "anything", env={"PASSENGER_RUNTIME_DIR": disk / "run"},
    )  # fmt: skip


@needs_root
def test_a_full_disk_under_log_and_runtime_directory(start, port, home):
    disk = home / "disk"
    process = on_small_disk(
        start, port, "size=64k", "--error-logfile", disk / "log", "--access-logfile", disk / "access"
    ).wait_ready()  # fmt: skip
    pids_answering(port, 2)
    full = f"""
with open("{disk}/filler", "wb", buffering=0) as file:
    try:
        while True: file.write(b"x" * 512)
    except OSError:
        pass
"""
    run(process, full)
    before = set(process.workers())
    with Others(process.socket, port) as others:
        for victim in before:
            os.kill(victim, signal.SIGKILL)
        wait_for(
            lambda: len(process.workers()) == 2 and not before & set(process.workers()), "the next workers"
        )
        process.wait_log("No space left on device")
    lost = [failure for failure in others.failed if isinstance(failure[1], ConnectionRefusedError)]
    assert not lost
    process.hup(2)
    workers = set(process.workers())
    assert len(pids_answering(port, 2)) == 2
    assert run(process, GETS) == "True"
    assert set(process.workers()) == workers
    run(process, f"os.unlink('{disk}/filler')")
    process.hup(2)
    assert "Booting worker" in run(process, f"open('{disk}/log').read()[-3000:]")
    assert process.stop() == 0


@needs_root
def test_no_room_for_a_file(start, port, home):
    """Neither the runtime directory nor what gunicorn keeps for each worker can be made."""
    disk = home / "disk"
    process = on_small_disk(start, port, "nr_inodes=40", "--worker-tmp-dir", disk).wait_ready()
    pids_answering(port, 2)
    fill_up = f"""
made = []
try:
    while True:
        made.append("{disk}/" + str(len(made)))
        open(made[-1], "w").close()
except OSError:
    made.pop()
"""
    run(process, fill_up)
    before = set(process.workers())
    with Others(process.socket, port) as others:
        process.signal(signal.SIGTTIN)
        process.wait_log("No space left on device")
        serve_some(process, others)
        assert before <= set(process.workers())
        assert process.log().count("Booting worker") < 20, "workers in a loop"
        run(process, f"[os.unlink('{disk}/' + name) for name in os.listdir('{disk}') if name.isdigit()]")
        wait_for(lambda: len(process.workers()) == 3, process.log)
    assert not others.failed
    assert process.stop() == 0


# --- the broker's thread ------------------------------------------------------------------------------

DEATH = """
import os
from gunicorn_passenger import configure
from gunicorn_passenger.master.loop import BrokerLoop

configure(grace_period=0.2)
turn = BrokerLoop._run_once

def die(self):
    turn(self)
    if os.path.exists("die"):
        os.unlink("die")
        raise SystemExit("injected")

BrokerLoop._run_once = die
"""


def kill_broker(process, count=1):
    (process.home / "die").touch()
    # any question wakes the thread
    run(process, GETS)
    process.wait_log(r"ERROR.*the port broker's thread has died \(SystemExit\('injected'\)\)", count=count)


def test_a_broker_whose_thread_dies_continues_with_what_is_open(start, port):
    """Noticed, logged, started again: the ports stay open, the master knows which workers use them, and new ones are opened."""
    other = free_port()
    start.write(
        "program.py",
        f"""
        server = passenger.create_server(whoami).listen({port})
        from gevent.pywsgi import WSGIServer
        WSGIServer(("127.0.0.1", {other}), whoami, log=None).start()
        """,
    )
    process = start.gunicorn("anything", "-c", conf(start, DEATH), *NO_CONTROL, workers=2).wait_ready()
    places = (process.socket, port, other)
    for place in places:
        pids_answering(place, 2)
    workers = set(process.workers())
    before = settled_descriptors(process)
    with Others(*places) as served:
        for count in range(1, 4):
            kill_broker(process, count)
            assert run(process, GETS) == "True"
        # longer than the grace period: a port that was forgotten to be wanted would be closed
        goal = {place: number + 100 for place, number in served.answered.items()}
        wait_for(lambda: all(served.answered[p] >= goal[p] for p in goal), "the others to be served")
        process.hup(2)
        for place in places:
            assert not {str(pid) for pid in workers} & pids_answering(place, 2)
    assert not served.failed
    log = process.log()
    assert log.count(f"Opened 127.0.0.1:{port}") == log.count(f"Opened 127.0.0.1:{other}") == 1
    assert f"Closed 127.0.0.1:{port}" not in log
    assert f"Closed 127.0.0.1:{other}" not in log
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert process.stop() == 0
    assert refused(port)
    assert refused(other)


def test_a_port_is_still_closed_in_the_end_when_the_thread_has_died(start, port):
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", "-c", conf(start, DEATH), workers=1).wait_ready()
    kill_broker(process)
    run(process, "server.close()")
    process.wait_log(f"Closed 127.0.0.1:{port}: no worker has wanted it")
    assert refused(port)
    assert run(process, f"passenger.listen({port}, whoami).listening") == "True"
    assert answers(port)


def test_a_worker_that_died_unseen_is_forgotten(start, port):
    """A worker is killed at the very moment at which the thread is dead."""
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", "-c", conf(start, DEATH), *NO_CONTROL, workers=2).wait_ready()
    pids_answering(port, 2)
    before = settled_descriptors(process)
    victim = process.workers()[0]
    (process.home / "die").touch()
    os.kill(victim, signal.SIGKILL)
    process.wait_log("the port broker's thread has died")
    wait_for(lambda: victim not in process.workers() and len(process.workers()) == 2, "another worker")
    assert len(pids_answering(port, 2)) == 2
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert process.stop() == 0


def test_a_log_that_fails_does_not_end_the_broker(start, port):
    """Even what tells of the failure may fail."""
    path = conf(
        start,
        DEATH
        + """
from gunicorn.glogging import Logger

class Broken(Logger):
    def exception(self, *args, **kwargs):
        raise MemoryError("injected")
    def error(self, text, *args, **kwargs):
        if "broker" in text:
            raise MemoryError("injected")
        super().error(text, *args, **kwargs)

logger_class = Broken
""",
    )
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port})")
    process = start.gunicorn("anything", "-c", path, workers=2).wait_ready()
    for _ in range(3):
        (process.home / "die").touch()
        run(process, GETS)
        wait_for(lambda: not (process.home / "die").exists(), "the thread to die")
        assert run(process, GETS) == "True"
    assert len(pids_answering(port, 2)) == 2
    assert process.stop() == 0
