"""What becomes of a bind: a server, a client, a lock, a socket that something other than Python listens on."""

import os
import re
import signal
import socket

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import pids_answering, refused
from obedient_workers import Told
from processes import require_package
from unmodified_servers import answering

LOCK = """
    import os
    import socket
    from answering import PORT, application

    family = socket.AF_INET6 if ":" in {host!r} else socket.AF_INET
    lock = socket.socket(family)
    try:
        lock.bind(({host!r}, PORT))
        print(f"the scheduler runs in {{os.getpid()}}\\n", end="", flush=True)
    except OSError as error:
        # in one write: another worker prints at the same time
        print(f"no scheduler here: {{error}}\\n", end="", flush=True)
    """


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", ""])
def test_a_port_as_a_lock(start, port, host):
    """As APScheduler's users do it: the scheduler runs in the worker that can bind the port."""
    start.write("locked.py", LOCK.format(host=host))
    process = start.gunicorn(
        "locked", workers=3, env={"P1": port, "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"}
    )
    pid = int(process.wait_log(r"the scheduler runs in (\d+)")[1])
    denied = process.wait_log(r"no scheduler here: (.*)", 2)[1]
    assert f":{port} is bound by worker {pid} of this application, which does not listen there" in denied
    process.wait_log(rf":{port} is bound by this worker, which does not listen there: .*\(pid:{pid}\)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
        other.bind((host, port))
    os.kill(pid, signal.SIGKILL)
    successor = int(process.wait_log(r"the scheduler runs in (\d+)", 2)[1])
    assert successor != pid
    assert process.log().count("the scheduler runs in") == 2


def test_a_port_that_is_left_to_the_kernel(obedient, port):
    """``placement={port: "off"}``: the worker that listens first has the port, as without the package."""
    process, first, second = obedient(2, PASSENGER_PLACEMENT=f"{port}=off")
    code = f"s = socket.create_server(('127.0.0.1', {port}))"
    first.do(code)
    with pytest.raises(Told) as error:
        second.do(code)
    assert "PassengerError" not in error.value.kinds
    first.do("s.close()")
    second.do(code)
    assert "Opened" not in process.log()


def test_a_lock_that_listens_is_explained(obedient, port):
    """Every worker has such a lock: the log says so once in each, and what to do."""
    process, *workers = obedient(2)
    waiting, one_request = free_port(), free_port()
    for worker in workers:
        # these have no request either, but wait for one
        worker.do(
            f"""
            import http.server, threading
            handler = http.server.BaseHTTPRequestHandler
            one, two = (http.server.HTTPServer(("127.0.0.1", p), handler) for p in ({waiting}, {one_request}))
            for wait in (one.serve_forever, two.handle_request):
                threading.Thread(target=wait, daemon=True).start()
            """
        )
        worker.do(f"s = socket.create_server(('127.0.0.1', {port}))")
    for worker in workers:
        process.wait_log(
            rf"\[WARNING\] The program listens on 127.0.0.1:{port}, but has not accepted .*\(pid:{worker.pid}\).*"
            rf"PASSENGER_PLACEMENT={port}=off"
        )
    assert process.log().count("has not accepted") == 2


CHILD = """
    import socket, sys
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(True)
    sock.listen()
    print("listens on", *sock.getsockname(), flush=True)
    conn, _ = sock.accept()
    conn.sendall(b"the child")
    """


def test_a_child_that_gets_a_bound_socket(start, obedient, port):
    """It listens where its parent has bound the socket."""
    script = start.write("child.py", CHILD)
    process, worker, _ = obedient()
    worker.do(f"""
        import subprocess, sys
        s = socket.socket()
        s.bind(("127.0.0.1", {port}))
        child = subprocess.Popen([sys.executable, {str(script)!r}, str(s.fileno())], pass_fds=[s.fileno()])
        """)
    process.wait_log(rf"listens on 127.0.0.1 {port}\b")
    with socket.create_connection(("127.0.0.1", port)) as sock:
        assert sock.makefile("rb").read() == b"the child"
    assert worker.do("result = child.wait()") == 0


def test_a_child_that_is_forked_and_listens(obedient, port):
    process, worker, _ = obedient()
    worker.do(f"""
        s = socket.socket()
        s.bind(("127.0.0.1", {port}))
        child = os.fork()
        if child == 0:
            try:
                s.listen()
                print("listens on", *s.getsockname(), flush=True)
            finally:
                signal = __import__("signal").pause()
        """)
    try:
        process.wait_log(rf"listens on 127.0.0.1 {port}\b")
        assert not refused(port)
    finally:
        worker.do("os.kill(child, 9); os.waitpid(child, 0)")
    assert "Traceback" not in process.log()


UVLOOP = """
    import asyncio
    import gevent
    import uvloop
    from answering import PORT, answer, application

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", PORT)
        print("listens on", *server.sockets[0].getsockname(), flush=True)
        await server.serve_forever()

    def serve():
        loop = uvloop.new_event_loop()
        loop.run_until_complete(main())

    gevent.get_hub().threadpool.spawn(serve)
    """


def test_a_server_that_binds_in_python_and_listens_in_c(start, port):
    """uvloop, in a thread of the system: all workers share the port that the program named."""
    require_package("uvloop")
    start.write("serve_uvloop.py", UVLOOP)
    path = f"{start.home}:{start.environment['PYTHONPATH']}"
    process = start.gunicorn("serve_uvloop", workers=3, env={"P1": port, "PYTHONPATH": path}).wait_ready(port)
    process.wait_log(rf"listens on 127.0.0.1 {port}\b", 3)
    wait_for(lambda: len(process.workers()) == 3, "three workers")
    answering(port, process.workers())
    process.wait_log(f"127.0.0.1:{port}: the program listens there without Python's socket module")
    process.hup(3)
    answering(port, process.workers())
    assert set(re.findall(r"listens on (.*)", process.log())) == {f"127.0.0.1 {port}"}


def test_a_port_that_is_not_allocated_and_listens_in_c(obedient):
    """It gets no connections, and the log says why."""
    port = free_port()
    process, worker, _ = obedient(2, PASSENGER_PORTS=free_port())
    worker.do(f"""
        import ctypes
        s = socket.socket()
        s.bind(("127.0.0.1", {port}))
        ctypes.CDLL(None).listen(s.fileno(), 5)
        """)
    process.wait_log(rf"\[ERROR\] port {port} is not allocated .*; the server gets no connections")
    assert refused(port)


SERVERS = {
    "socket": (
        """
        from answering import converse
        s = socket.create_server(("127.0.0.1", port))
        def serve():
            try:
                while True:
                    conn, peer = s.accept()
                    with conn:
                        converse(conn, peer)
            except OSError as error:
                ended.append(error.errno)
        ended = []
        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        """,
        "s.shutdown(socket.SHUT_RDWR); s.close(); serving.join(10); assert not serving.is_alive()",
    ),
    "rpyc": (
        """
        import rpyc
        from rpyc.utils.server import ThreadedServer
        from answering import converse
        class Server(ThreadedServer):
            def _accept_method(self, sock):
                with sock:
                    converse(sock, ("-", 0))
        server = Server(rpyc.Service, hostname="127.0.0.1", port=port)
        threading.Thread(target=server.start, daemon=True).start()
        """,
        "server.close()",
    ),
    "twisted": (
        """
        import gevent
        from twisted.internet import protocol, selectreactor
        reactor = selectreactor.SelectReactor()
        class Web(protocol.Protocol):
            def dataReceived(self, data):
                text = str(os.getpid()).encode()
                self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(text), text))
                self.transport.loseConnection()
        factory = protocol.Factory.forProtocol(Web)
        factory.noisy = False
        listening = reactor.listenTCP(port, factory, interface="127.0.0.1")
        threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False}, daemon=True).start()
        """,
        "reactor.callFromThread(listening.stopListening); gevent.sleep(0.2)",
    ),
}


@pytest.mark.parametrize("server", SERVERS)
def test_shutdown_ends_the_accepting_of_one_worker(obedient, port, server):
    if server != "socket":
        require_package(server)
    process, first, second = obedient()
    opening, closing = SERVERS[server]
    for worker in first, second:
        worker.do(f"port = {port}")
        worker.do(opening)
    answering(port, [first.pid, second.pid])
    first.do(closing)
    for _ in range(20):
        answering(port, [second.pid])
    first.do(opening)
    answering(port, [first.pid, second.pid])
    assert "Traceback" not in process.log()


def test_shutdown_in_a_child_leaves_the_workers_alone(obedient, port):
    process, worker, _ = obedient()
    worker.do(f"""
        from gevent.pywsgi import WSGIServer
        from answering import application
        server = WSGIServer(("127.0.0.1", {port}), application, log=None)
        server.start()
        child = os.fork()
        if child == 0:
            try:
                server.socket.shutdown(socket.SHUT_RDWR)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """)
    answering(port, [worker.pid])
    assert pids_answering(process.socket, 2)


LATE = """
    import ctypes, struct
    libc = ctypes.CDLL(None)
    fd = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    one = ctypes.c_int(1)
    if shared:
        libc.setsockopt(fd, socket.SOL_SOCKET, socket.SO_REUSEPORT, ctypes.byref(one), 4)
    address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, socket.inet_aton("127.0.0.1"))
    assert libc.bind(fd, address, len(address)) == libc.listen(fd, 5) == 0
    """


@pytest.mark.parametrize("shared", [False, True])
def test_a_server_that_binds_by_itself_later(obedient, port, shared):
    process, worker, _ = obedient()
    worker.do(f"shared, port = {shared}, {port}")
    worker.do(LATE)
    text = (
        r"each worker has its own queue there \(SO_REUSEPORT\)"
        if shared
        else "only this worker accepts there"
    )
    process.wait_log(
        rf"\[WARNING\] 127.0.0.1:{port} was opened without Python's socket module, .*: {text}.*\(pid:{worker.pid}\)"
    )
