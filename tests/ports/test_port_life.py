"""The life of a port: reloads, deaths, upgrades, the grace period, and what the master keeps of it all."""

import contextlib
import os
import resource
import signal
import socket
import threading

import pytest
from broker_access import run
from conditions import wait_for
from free_ports import free_port
from http_client import Client, answers, fetch, pids_answering, refused
from placement_site import sockets_of
from processes import COMMAND, GUNICORN, descriptors
from status_commands import only


class Knocking:
    """Connects to a port all the time, in a thread, and counts refusals."""

    def __init__(self, port):
        self.port, self.refused, self.asked = port, 0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._end.is_set():
            self.asked += 1
            try:
                socket.create_connection(("127.0.0.1", self.port), 20).close()
            except ConnectionRefusedError:
                self.refused += 1
            self._end.wait(0.002)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def rss(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_many_reloads_leave_the_master_flat_and_never_close_the_port(start, port):
    conf = start.write(
        "gunicorn.conf.py", "import gunicorn_passenger\ngunicorn_passenger.configure(grace_period=0)\n"
    )
    process = start.gunicorn("two_servers", "-c", conf, workers=1, env={"P1": port}).wait_ready()
    for _ in range(5):
        process.hup(1)
    pids_answering(port, 1)
    wait_for(lambda: answers(port), "a response")
    before, memory = len(descriptors(process.pid)), rss(process.pid)
    with Knocking(port) as knocking:
        for _ in range(25):
            process.hup(1)
        pids_answering(port, 1)
    assert knocking.asked > 100
    assert knocking.refused == 0
    # at most: one of the old worker's may still have been open before
    wait_for(lambda: len(descriptors(process.pid)) <= before, lambda: f"{before}: {descriptors(process.pid)}")
    assert rss(process.pid) - memory < 3072, "kB more in the master"
    assert process.log().count(f"Opened 127.0.0.1:{port}") == 1
    assert f"Closed 127.0.0.1:{port}" not in process.log()


def test_descriptors_of_a_worker_are_its_own(start, port):
    """One channel per worker, no sibling's end, and of the ports just the one that it asked for."""
    process = start.gunicorn("two_servers", workers=3, env={"P1": port}).wait_ready()
    process.hup(3)  # the workers of now were forked while the master held the port
    pids_answering(port, 3)
    unix = {}
    with open("/proc/net/unix") as file:
        for line in file.read().splitlines()[1:]:
            fields = line.split()
            unix[fields[6]] = (fields[4], fields[7] if len(fields) > 7 else "")

    def seqpackets(pid):
        inodes = [d[8:-1] for d in descriptors(pid) if d.startswith("socket:[")]
        return sum(1 for inode in inodes if unix.get(inode, ("", ""))[0] == "0005")

    for worker in process.workers():
        assert seqpackets(worker) == 1
        assert descriptors(worker).count(_listening_inode(port)) == 1
    assert seqpackets(process.pid) == 3
    assert descriptors(process.pid).count(_listening_inode(port)) == 1


def _listening_inode(port):
    with open("/proc/net/tcp") as file:
        for line in file.read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
                return f"socket:[{fields[9]}]"
    raise AssertionError(f"no process listens on {port}")


def test_killed_workers_do_not_close_the_door(start, port):
    process = start.gunicorn("two_servers", workers=2, env={"P1": port}).wait_ready()
    with Knocking(port) as knocking:
        for _ in range(10):
            victim = wait_for(process.workers, "a worker")[0]
            os.kill(victim, signal.SIGKILL)
            wait_for(
                lambda v=victim: len(process.workers()) == 2 and v not in process.workers(), "a new worker"
            )
        wait_for(lambda: answers(port), "a response")
    assert knocking.refused == 0


CLOSING = """
    import os, gunicorn_passenger as passenger
    passenger.configure(auto_install=False)

    def whoami(environ, start_response):
        start_response("200 OK", [])
        return [str(os.getpid()).encode()]

    server = passenger.create_server(whoami).listen(int(os.environ["P1"]))

    def application(environ, start_response):
        global server
        if environ["PATH_INFO"] == "/close":
            server.close()
        if environ["PATH_INFO"] == "/open":
            server = passenger.create_server(whoami).listen(int(os.environ["P1"]))
        return whoami(environ, start_response)
"""


def grace_conf(start, seconds):
    return start.write(
        "gunicorn.conf.py", f"import gunicorn_passenger as p\np.configure(grace_period={seconds})\n"
    )


def test_a_port_closes_after_no_worker_has_used_it_for_the_grace_period(start, port):
    start.write("closing.py", CLOSING)
    process = start.gunicorn(
        "closing", "-c", grace_conf(start, 0.5), workers=2, env={"P1": port}
    ).wait_ready()
    pids_answering(port, 2)
    closed = set()
    while len(closed) < 2:
        closed.add(fetch(process.socket, "/close")[1])
        if len(closed) == 1:
            assert not refused(port), "one worker still wants it"
    process.wait_log(f"Closed 127.0.0.1:{port}: no worker has wanted it for 0.5 s")
    assert refused(port)
    fetch(process.socket, "/open")
    assert answers(port)


def test_default_grace_period_is_ten_seconds(start):
    start.write(
        "program.py",
        "from gunicorn_passenger.config.settings import settings\nprint(settings.grace_period())",
    )
    process = start.python("program.py")
    assert process.wait_end() == 0
    assert process.log().strip() == "10.0"


def test_port_stays_while_a_slow_program_boots(start, port, home):
    """A lone worker is killed and its successor loads slowly: the grace period does not run meanwhile."""
    path = start.write("slow.py", CLOSING)
    gate = "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.05)\n"
    path.write_text(gate + path.read_text())
    (home / "go").touch()
    process = start.gunicorn("slow", "-c", grace_conf(start, 0.2), workers=1, env={"P1": port}).wait_ready()
    (home / "go").unlink()
    (worker,) = process.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: process.workers() and worker not in process.workers(), "the successor")
    with Knocking(port) as knocking:
        wait_for(lambda: knocking.asked > 500, "more than the grace period to pass")
    (home / "go").touch()
    wait_for(lambda: answers(port), "the successor to serve")
    assert knocking.refused == 0
    assert "Closed" not in process.log()


LEAVING = """
    import os
    import time
    import gunicorn_passenger as passenger

    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        if environ["PATH_INFO"] == "/slow":
            yield b"begun"
            while not os.path.exists("go"):
                time.sleep(0.05)
        yield str(os.getpid()).encode()

    passenger.create_server(application).listen({port}, placement="{placement}")
    """


@pytest.mark.parametrize("placement", ["shared", "one", "each"])
def test_port_stays_while_its_only_worker_leaves_slowly(start, port, home, placement):
    """gunicorn starts the successor when the old worker has exited, and a long response may delay that."""
    start.write("leaving.py", LEAVING.format(port=port, placement=placement))
    process = start.gunicorn(
        "leaving", "-c", grace_conf(start, 0.2), "--graceful-timeout", 600, "--timeout", 600, workers=1
    ).wait_ready()
    wait_for(lambda: answers(port), "the second server")
    slow = Client(process.socket)
    slow.request("GET", "/slow")
    response = slow.getresponse()
    assert response.read(5) == b"begun"
    (worker,) = process.workers()
    os.kill(worker, signal.SIGTERM)
    with Knocking(port) as knocking:
        wait_for(lambda: knocking.asked > 500, "more than the grace period to pass")
    (home / "go").touch()
    assert response.read() == str(worker).encode()
    slow.close()
    wait_for(lambda: worker not in process.workers() and answers(port), "the successor to serve")
    assert knocking.refused == 0
    assert "Closed" not in process.log()


FORKING_HOOK = """
    import os

    def on_reload(server):
        # as gunicorn's dirty workers and multiprocessing do
        if os.fork() == 0:
            with open("child", "w") as file:
                file.write(str(os.getpid()))
            read, write = os.pipe()
            os.read(read, 1)
    """


def test_a_child_that_a_hook_forks_keeps_no_port_open(start, port, home):
    """Neither a stop nor a later start of the port may depend on such a child."""
    start.write("gunicorn.conf.py", FORKING_HOOK)
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port}, name='jobs')")
    process = start.gunicorn("anything", "-c", home / "gunicorn.conf.py").wait_ready()
    wait_for(lambda: answers(port), "the server")
    process.signal(signal.SIGHUP)
    wait_for(lambda: (home / "child").exists() and (home / "child").read_text(), "the child")
    child = int((home / "child").read_text())
    try:
        wait_for(lambda: answers(port), "the server")
        (inode,) = sockets_of(port, "0A")
        assert f"socket:[{inode}]" in descriptors(process.pid)
        assert f"socket:[{inode}]" not in descriptors(child)
        assert start.python(COMMAND, "stop", "jobs").wait_end() == 0
        wait_for(lambda: refused(port), "the port to be closed")
        assert start.python(COMMAND, "restart", "jobs").wait_end() == 0
        wait_for(lambda: answers(port), "the server to be back")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_stopped_port_is_closed_for_every_process_that_has_a_copy(start, port):
    start.write("program.py", f"server = passenger.create_server(whoami).listen({port}, name='jobs')")
    process = start.gunicorn("anything", workers=1).wait_ready()
    wait_for(lambda: answers(port), "the server")
    run(process, "from gunicorn_passenger.serving.registry import registry")
    run(process, "kept = os.dup(registry.acceptors._by_server[server]._sock.fileno())")
    assert start.python(COMMAND, "stop", "jobs").wait_end() == 0
    wait_for(lambda: refused(port), "the port to be closed")


def test_usr2_hands_the_port_to_the_next_master_and_back(start, port):
    process = start.gunicorn("two_servers", workers=2, env={"P1": port}).wait_ready()
    old = pids_answering(port, 2)
    with Knocking(port) as knocking:
        process.signal(signal.SIGUSR2)
        master = int(process.wait_log(r"\[(\d+)\] \[INFO\] Starting gunicorn", count=2).group(1))
        assert master != process.pid
        process.wait_log(r"Booting worker", count=4)
        assert len(pids_answering(port, 4)) == 4
        # roll back: the new master goes, the old workers serve on
        os.kill(master, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{master}"), "the new master to leave")
        assert pids_answering(port, 2) == old
        # and again, to stay: the old master goes
        process.signal(signal.SIGUSR2)
        successor = int(process.wait_log(r"\[(\d+)\] \[INFO\] Starting gunicorn", count=3).group(1))
        process.wait_log(r"Booting worker", count=6)
        pids_answering(port, 4)
        process.signal(signal.SIGTERM)
        process.wait_end()
        new = pids_answering(port, 2)
        assert not new & old
    assert knocking.refused == 0
    assert process.log().count(f"Opened 127.0.0.1:{port}") == 1
    assert "Address already in use" not in process.log()
    # the next master must take a run-time port neither for the primary nor for an unused bind
    assert "no server of the program listens" not in process.log()
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: not process.session(), "everything to end")
    assert refused(port)


def test_a_port_that_no_worker_uses_after_usr2_is_closed(start, port, home):
    """The next master takes the port over, and lets it go when its program no longer listens."""
    process = start.gunicorn(
        "two_servers", "-c", grace_conf(start, 0.2), workers=1, env={"P1": port}
    ).wait_ready()
    start.write("two_servers.py", "def application(e, s):\n    s('200 OK', [])\n    return [b'new']\n")
    process.signal(signal.SIGUSR2)
    successor = int(process.wait_log(r"\[(\d+)\] \[INFO\] Starting gunicorn", count=2).group(1))
    process.wait_log("Booting worker", count=2)
    wait_for(lambda: fetch(process.socket)[1] == "new", "the new program")
    process.signal(signal.SIGTERM)
    process.wait_end()
    process.wait_log(f"Closed 127.0.0.1:{port}")
    assert refused(port)
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: not process.session(), "everything to end")


def test_reload_that_changes_bind_keeps_the_port(start, port, home):
    """gunicorn closes all its listeners then; the program's port is not gunicorn's to close."""
    conf = start.write("gunicorn.conf.py", f"bind = ['unix:{home}/app.sock']\n")
    process = start.python(
        GUNICORN, "-k", "gunicorn_passenger.Worker", "-w", 2, "-c", conf, "two_servers", env={"P1": port}
    ).wait_ready()  # fmt: skip
    old = pids_answering(port, 2)
    with Knocking(port) as knocking:
        start.write("gunicorn.conf.py", f"bind = ['unix:{home}/other.sock']\n")
        process.hup(2)
        new = pids_answering(port, 2)
    assert not old & new
    assert knocking.refused == 0
    assert pids_answering(f"{home}/other.sock", 2) == new
    process.hup(2)
    pids_answering(port, 2)
    assert process.stop() == 0
    assert refused(port)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_stopping_closes_the_port(start, port, how):
    process = start.gunicorn("two_servers", env={"P1": port}).wait_ready()
    process.signal(how)
    assert process.wait_end() == 0
    assert refused(port)
    wait_for(lambda: not process.session(), "no process to be left")


def test_a_stop_right_after_the_start_is_not_lost(start, port):
    for _ in range(3):
        process = start.gunicorn("two_servers", workers=4, env={"P1": port})
        process.wait_log("Booting worker")
        assert process.stop() == 0


def test_requests_in_hand_are_finished_on_a_stop(start, port, home):
    start.write(
        "slow.py",
        """
        import os, time, gunicorn_passenger as passenger

        def slow(environ, start_response):
            if environ["PATH_INFO"] == "/slow":
                open("begun", "w").close()
                while not os.path.exists("go"):
                    time.sleep(0.02)
            start_response("200 OK", [])
            return [b"done"]

        application = slow
        passenger.create_server(slow).listen(int(os.environ["P1"]))
        """,
    )
    process = start.gunicorn("slow", workers=1, env={"P1": port}).wait_ready()
    result = []
    asking = threading.Thread(target=lambda: result.append(fetch(port, "/slow")))
    asking.start()
    wait_for((home / "begun").exists, "the request to reach the program")
    process.signal(signal.SIGTERM)
    wait_for(lambda: refused(port), "the worker to stop accepting")
    (home / "go").touch()
    asking.join()
    assert result == [(200, "done")]
    assert process.wait_end() == 0


@pytest.mark.parametrize(
    "arguments", [["-k", "gunicorn_passenger.Worker"], ["-c", "python:gunicorn_passenger.hooks"]]
)
def test_systemd_hands_ports_over(start, port, home, arguments):
    """LISTEN_FDS: the UNIX socket is the primary's, the TCP one a server's that listens on it."""
    unix, tcp = socket.socket(socket.AF_UNIX), socket.socket()
    unix.bind(f"{home}/app.sock")
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind(("127.0.0.1", port))
    unix.listen()
    tcp.listen()
    start.write(
        "launch.py",
        """
        import os, sys
        fds = [int(a) for a in sys.argv[1:3]]
        spare = [os.dup(fd) for fd in fds]
        high = [os.dup2(fd, 50 + i) for i, fd in enumerate(spare)]
        for i, fd in enumerate(high):
            os.dup2(fd, 3 + i, inheritable=True)
        os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
        os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
        """,
    )
    with contextlib.closing(unix), contextlib.closing(tcp):
        process = start.python(
            "launch.py", unix.fileno(), tcp.fileno(), GUNICORN, *arguments, "-w", "2", "two_servers:two",
            env={"P1": port}, pass_fds=(unix.fileno(), tcp.fileno()),
        ).wait_ready()  # fmt: skip
        both = pids_answering(process.socket, 2)
        assert pids_answering(port, 2) == both
        assert {fetch(port, "/which")[1] for _ in range(8)} == {"second"}
        assert {fetch(process.socket, "/which")[1] for _ in range(8)} == {"primary"}
        process.signal(signal.SIGUSR2)
        process.wait_log(r"\[(\d+)\] \[INFO\] Starting gunicorn", count=2)
        process.wait_log(r"Booting worker", count=4)
        assert pids_answering(port, 4) == pids_answering(process.socket, 4)
        process.signal(signal.SIGTERM)
        process.wait_end()
        new = pids_answering(port, 2)
        assert not new & both
        assert {fetch(port, "/which")[1] for _ in range(8)} == {"second"}
        for pid in process.session():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not process.session(), "everything to end")


def test_a_bind_that_the_primary_serves_is_not_given_away_later(start, port):
    """Under another worker class gunicorn's loop accepts there as soon as it runs."""
    conf = start.write(
        "gunicorn.conf.py",
        f"""
        from gunicorn_passenger.hooks import *
        import gunicorn_passenger as passenger
        def late(worker):
            try:
                passenger.create_server(worker.wsgi).listen({port})
            except OSError as error:
                worker.log.error("%s", error)
        passenger.on("ready", late)
        """,
    )
    process = start.python(
        GUNICORN, "-c", conf, "-b", f"unix:{start.home}/app.sock", "-b", f"127.0.0.1:{port}", "two_servers"
    ).wait_ready()
    process.wait_log(rf"127.0.0.1:{port} is in gunicorn's bind, and this worker serves the primary there")
    assert answers(port)
    assert process.stop() == 0


@pytest.mark.parametrize(
    "arguments", [["-k", "gunicorn_passenger.Worker"], ["-c", "python:gunicorn_passenger.hooks"]]
)
def test_a_bind_whose_server_was_closed_while_the_program_loaded(start, port, arguments):
    """The primary is served there again. The number of its own port goes to no server, whatever the address."""
    main = free_port()
    start.write(
        "closing.py",
        f"""
        import http.server
        import gunicorn_passenger as passenger
        from two_servers import two

        http.server.ThreadingHTTPServer(("127.0.0.1", {port}), http.server.BaseHTTPRequestHandler).server_close()
        passenger.create_server(two).listen({port}).close()
        try:
            passenger.create_server(two).listen({main})
        except OSError as error:
            print(error, flush=True)
        """,
    )
    binds = [f"127.0.0.1:{main}", f"127.0.0.1:{port}", f"[::1]:{main}"]
    process = start.python(
        GUNICORN, *arguments, *(word for bind in binds for word in ("-b", bind)), "closing:two"
    )
    process.wait_log(rf"127.0.0.1:{main} is in use by this application itself, whose primary it is")
    wait_for(lambda: answers(main), "the primary")
    assert {fetch(port, "/which")[1] for _ in range(4)} == {"primary"}
    (server,) = only(start)["servers"]
    assert set(server["address"].split(", ")) == set(binds)
    assert process.stop() == 0


def test_a_reload_may_name_an_open_port_in_bind(start, port, home):
    """The previous workers hold it, so gunicorn could not open it again."""
    conf = start.write("gunicorn.conf.py", f"bind = ['unix:{home}/app.sock']\n")
    process = start.python(
        GUNICORN, "-k", "gunicorn_passenger.Worker", "-w", 2, "-c", conf, "two_servers", env={"P1": port}
    ).wait_ready()  # fmt: skip
    pids_answering(port, 2)
    with Knocking(port) as knocking:
        start.write("gunicorn.conf.py", f"bind = ['unix:{home}/app.sock', '127.0.0.1:{port}']\n")
        for _ in range(2):
            process.hup(2)
            assert pids_answering(port, 2) == pids_answering(process.socket, 2)
    assert knocking.refused == 0
    assert "in use" not in process.log().lower()
    assert process.stop() == 0
    assert refused(port)


def test_auto_keeps_its_port_through_usr2(start):
    port = free_port()
    start.write("program.py", "server = passenger.create_server(whoami).listen('auto')")
    process = start.gunicorn("anything", workers=1, env={"PASSENGER_PORTS": port}).wait_ready()
    assert answers(port)
    process.signal(signal.SIGUSR2)
    successor = int(process.wait_log(r"\[(\d+)\] \[INFO\] Starting gunicorn", count=2).group(1))
    process.wait_log("Booting worker", count=2)
    assert len(pids_answering(port, 2)) == 2
    process.signal(signal.SIGTERM)
    process.wait_end()
    assert answers(port)
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: not process.session(), "everything to end")


def test_a_removed_socket_file_does_not_spoil_the_stop(start, home):
    start.write("program.py", f"passenger.listen('unix:{home}/second.sock', whoami)")
    process = start.gunicorn("anything").wait_ready()
    os.unlink(f"{home}/second.sock")
    assert process.stop() == 0
    assert "Traceback" not in process.log()


def test_abstract_unix_socket(start, home):
    name = f"\0gunicorn-passenger-{home.name}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        process = start.gunicorn(
            "two_servers", bind=f"fd://{listener.fileno()}", pass_fds=(listener.fileno(),)
        ).wait_ready(name)
        assert len(pids_answering(name, 2)) == 2
        assert "Traceback" not in process.log()
        # gunicorn itself does not stop cleanly here: it would remove a file that does not exist
        process.signal(signal.SIGTERM)
        process.wait_end()
        wait_for(lambda: not process.session(), "the workers to leave")


def test_an_upgrade_with_many_servers_and_long_names(start):
    """What the next master must know has no place in an environment: execve would fail with E2BIG."""
    start.write(
        "program.py",
        """
        for number in range(600):
            passenger.create_server(whoami).listen("auto", name=f"{number} " + "\N{GRINNING FACE}" * 190)
        """,
    )
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def with_room():
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limit), limit))

    process = start.gunicorn("anything", workers=1, preexec_fn=with_room).wait_ready()
    code = "sorted(s.address[1] for s in passenger.servers() if isinstance(s.address, tuple))"
    ports = eval(fetch(process.socket, "/eval", "POST", code)[1])
    assert len(ports) == 600
    before = set(process.workers())
    process.signal(signal.SIGUSR2)
    (second,) = wait_for(lambda: set(process.workers()) - before, "the next master")
    process.wait_log("Booting worker", count=2)
    process.signal(signal.SIGTERM)
    assert process.wait_end() == 0
    # the next master has the same ports under the same names
    assert eval(fetch(process.socket, "/eval", "POST", code)[1]) == ports
    assert not any(
        name in entry for entry in environment(second) for name in ("PASSENGER_UPGRADE", "GRINNING")
    )
    assert all(len(entry) < 20000 for entry in environment(second))
    os.kill(second, signal.SIGTERM)
    wait_for(lambda: not process.session(), "the end of all")


def environment(pid):
    """The environment that a process was started with, but for what it must have."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        entries = file.read().decode(errors="replace").split("\0")
    return [entry for entry in entries if not entry.startswith("PASSENGER_UPGRADE=")]
