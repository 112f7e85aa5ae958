"""Servers that are not ours, with no change to their code, under several workers."""

import errno
import http.client
import json
import os
import re
import socket
import textwrap
import threading

import pytest
from conftest import PROGRAMS, Client, fetch, free_port, refused, wait_for

SERVERS = [
    "gevent_pywsgi",
    "gevent_stream",
    "wsgiref",
    "http_server",
    "http_server_threading",
    "socketserver",
    "werkzeug",
    "flask",
    "prometheus",
    "cheroot",
    "waitress",
    "waitress_create",
    "asyncio",
]


def pid_in(response):
    """The pid of the worker that sent this response."""
    text = response.read().decode()
    assert response.status == 200, text
    return int(
        re.fullmatch(r'(\d+)|(?s:.*)worker_up\{pid="(\d+)"\}(?s:.*)', text)[1 if text.isdigit() else 2]
    )


def answering(where, workers):
    """Send requests, several at a time, until each of ``workers`` has responded; no other process may."""
    workers = set(workers)
    seen = set()

    def ask():
        clients = [Client(where) for _ in range(2 * len(workers))]
        for client in clients:
            client.request("GET", "/")
        for client in clients:
            seen.add(pid_in(client.getresponse()))
            client.close()
        return seen >= workers

    wait_for(ask, lambda: f"{workers} to respond, seen {seen}")
    assert seen == workers


class Requests:
    """Asks a port again and again, on a connection each time, while the block runs."""

    def __init__(self, where, threads=2):
        self.where = where
        self.pids = []
        self.failures = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self):
        while not self._end.is_set():
            client = Client(self.where)
            try:
                client.request("GET", "/")
                self.pids.append(pid_in(client.getresponse()))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(error)
            finally:
                client.close()
            self._end.wait(0.002)  # the workers need the processor too

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.pids or self.failures, "the first response")
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()


def without_terms(log):
    """gunicorn 23 calls it an error when its second SIGTERM meets a worker that is at its end already."""
    return re.sub(r".*Worker \(pid:\d+\) was sent SIGTERM!", "", log)


@pytest.mark.parametrize("server", SERVERS)
def test_under_four_workers(start, port, server):
    process = start.gunicorn(f"serve_{server}", workers=4, env={"P1": port}).wait_ready(port)
    wait_for(lambda: len(process.workers()) == 4, "four workers")
    answering(port, process.workers())
    with Requests(port) as requests:
        process.hup(4)
        answering(port, process.workers())
    assert not requests.failures
    assert process.stop() == 0
    assert refused(port)
    assert len(re.findall(f"Opened 127.0.0.1:{port} ", process.log())) == 1
    assert not re.search("in use|EADDRINUSE|Traceback|ERROR", without_terms(process.log())), process.log()


#: Server -> what it says of a client on the UNIX socket; None where it says nothing.
PEERS = dict.fromkeys(SERVERS, "127.0.0.1 0") | {
    "wsgiref": "127.0.0.1 -",
    "cheroot": "127.0.0.1 ",  # it leaves out a port that is 0
    "prometheus": None,
    "flask_debug": "127.0.0.1 0",
}


@pytest.mark.parametrize("server", PEERS)
def test_captured_as_primary(start, port, server):
    """``gunicorn-passenger start`` on the program as it is."""
    script = PROGRAMS / f"serve_{server}.py"
    process = start.start_script(script, "-w", 3, env={"P1": port}).wait_ready()
    wait_for(lambda: len(process.workers()) == 3, "three workers")
    answering(process.socket, process.workers())
    if PEERS[server]:
        assert fetch(process.socket, "/peer") == (200, PEERS[server])
    assert refused(port)
    with Requests(process.socket) as requests:
        process.hup(3)
        answering(process.socket, process.workers())
    assert not requests.failures
    assert process.stop() == 0
    log = process.log()
    assert "Opened" not in log
    # several processes write the log: what follows on the line may be another's
    assert set(re.findall(r"listens on (\([^)]*\))", log)) <= {f"('127.0.0.1', {port})"}
    assert not re.search("in use|EADDRINUSE|Traceback|ERROR", without_terms(log)), log


def test_tcp_options_on_the_captured_primary(start, port):
    process = start.start_script(PROGRAMS / "tcp_options.py", env={"P1": port}).wait_ready()
    status, text = fetch(process.socket)
    assert status == 200
    found = json.loads(text)
    assert found["listening"]["name"] == found["accepted"]["name"] == ["127.0.0.1", port]
    assert found["peers"] == [["127.0.0.1", 0]] * 2
    for sock in found["listening"], found["accepted"]:
        assert sock["info"] == 104
        assert len(sock["options"]) == 5
        assert sock["options"][4] == 1, "SO_KEEPALIVE is any socket's"
    assert "Traceback" not in process.log()


def test_the_debugger_of_a_captured_flask_script(start, port):
    process = start.start_script(PROGRAMS / "serve_flask_debug.py", "-w", 2, env={"P1": port}).wait_ready()
    status, text = fetch(process.socket, "/fail")
    assert status == 500
    assert "shown by the debugger" in text
    assert "Werkzeug Debugger" in text
    process.wait_log("Werkzeug's reloader is disabled under gunicorn; use gunicorn's own --reload", 2)


def test_a_captured_server_that_closes_and_listens_again(start, port):
    """Such as a script that restarts its server."""
    script = start.write(
        "restarts.py",
        f"""
        from http.server import HTTPServer
        from answering import Handler

        for _ in range(3):
            with HTTPServer(("127.0.0.1", {port}), Handler) as server:
                for _ in range(4):
                    server.handle_request()
        HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
        """,
    )
    process = start.start_script(script).wait_ready()
    for _ in range(20):
        assert fetch(process.socket)[0] == 200
    assert refused(port)
    assert "ERROR" not in process.log()


def test_a_script_whose_thread_outlives_it(start, port):
    """Plain Python waits for threads that are no daemons."""
    script = start.write(
        "outlives.py",
        """
        import threading
        import time
        from wsgiref.simple_server import make_server
        from answering import PORT, application

        def serve():
            time.sleep(0.2)  # reads its configuration
            make_server("127.0.0.1", PORT, application).serve_forever()

        threading.Thread(target=serve).start()
        """,
    )
    process = start.start_script(script, env={"P1": port}).wait_ready()
    assert process.stop() == 0


# --- what is left alone ---------------------------------------------------------------------------


class Told(Exception):
    """What a worker was told to do has failed there."""

    def __init__(self, answer):
        super().__init__(answer["text"])
        self.kinds = answer["error"]
        self.errno = answer["errno"]


class Worker:
    """One worker of the program ``obedient``, on a connection that is kept open."""

    def __init__(self, where):
        self.client = Client(where, timeout=15)
        self.client.request("GET", "/")
        self.pid = pid_in(self.client.getresponse())

    def do(self, code):
        """Run Python there; its ``result``."""
        self.client.request("POST", "/", textwrap.dedent(code))
        answer = json.loads(self.client.getresponse().read())
        if "error" in answer:
            raise Told(answer)
        return answer["result"]


@pytest.fixture
def obedient(start):
    """Starts ``obedient``; the process and a connection to each of its workers."""
    workers = {}

    def begin(count=2, *arguments, **env):
        process = start.gunicorn(
            "obedient", "--keep-alive", 600, *arguments, workers=count, env=env
        ).wait_ready()

        def connect():
            worker = Worker(process.socket)
            if worker.pid in workers:
                worker.client.close()
            workers.setdefault(worker.pid, worker)
            return len(workers) == count

        wait_for(connect, "a connection to each worker")
        for worker in workers.values():
            worker.do(f"import os, socket, threading; port, home = {free_port()}, {str(start.home)!r}")
        return process, *workers.values()

    yield begin
    for worker in workers.values():
        worker.client.close()


@pytest.fixture
def target():
    """A listening socket of the test's own."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(20)
        yield sock


CONNECTORS = {
    "create_connection": "s = socket.create_connection(target, source_address=source)",
    "http.client": """
        import http.client
        client = http.client.HTTPConnection(*target, source_address=source)
        client.connect()
        s = client.sock
        """,
    "bind and connect": """
        s = socket.socket()
        s.bind(source)
        assert s.getsockname() == source
        s.connect(target)
        """,
    "bind and connect_ex": """
        s = socket.socket()
        s.bind(source)
        assert s.connect_ex(target) == 0
        """,
    "with a timeout": """
        s = socket.socket()
        s.settimeout(10)
        s.bind(source)
        s.connect(target)
        """,
    "unpatched": """
        from gevent import monkey
        s = monkey.get_original("socket", "socket")()
        s.bind(source)
        assert s.getsockname() == source
        s.connect(target)
        """,
    "asyncio": """
        import asyncio
        async def main():
            reader, writer = await asyncio.open_connection(*target, local_addr=source)
            writer.write(b"hello")
            await writer.drain()
            assert writer.get_extra_info("sockname") == source
            writer.close()
        s = asyncio.run(main())
        """,
}


def test_local_ports_of_connections_are_left_alone(obedient, target):
    process, worker, _ = obedient(PASSENGER_PORTS=free_port())
    worker.do(f"target = {target.getsockname()!r}")
    for name, code in CONNECTORS.items():
        source = ("127.0.0.1", free_port())
        worker.do(f"source = {source}\n" + textwrap.dedent(code))
        conn, peer = target.accept()
        with conn:
            assert peer == source, name
            if name != "asyncio":
                worker.do("assert s.getsockname() == source; s.sendall(b'hello'); s.close()")
            assert conn.recv(10) == b"hello", name
    # a local port that is taken is refused when the socket connects, with the kernel's own error
    with pytest.raises(Told) as error:
        worker.do("socket.create_connection(target, source_address=target)")
    assert error.value.errno == errno.EADDRINUSE
    assert "PassengerError" not in error.value.kinds
    assert "Opened" not in process.log()


def test_udp_port_0_and_unix_sockets_are_left_alone(obedient):
    process, *workers = obedient(PASSENGER_PORTS=free_port())
    datagram = free_port()
    workers[0].do(f"""
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", {datagram}))
        assert udp.getsockname() == ("127.0.0.1", {datagram})
        """)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("127.0.0.1", datagram))
    assert workers[0].do("result = udp.recv(10).decode()") == "hello"

    ports, paths = set(), set()
    for worker in workers:
        port = worker.do("""
            from answering import converse
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            name = listener.getsockname()
            assert name[1] != 0
            listener.listen()
            assert listener.getsockname() == name

            def serve(listener):
                while True:
                    conn, _ = listener.accept()
                    with conn:
                        converse(conn, ("-", 0))

            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            result = name[1]
            """)
        ports.add(port)
        assert fetch(port) == (200, str(worker.pid))
        path = worker.do("""
            path = f"{home}/{os.getpid()}.sock"
            unix = socket.socket(socket.AF_UNIX)
            unix.bind(path)
            unix.listen()
            assert unix.getsockname() == path
            threading.Thread(target=serve, args=(unix,), daemon=True).start()
            result = path
            """)
        assert fetch(path) == (200, str(worker.pid))
        paths.add(path)
        worker.do("listener.close(); unix.close()")
    assert len(ports) == 2
    # gevent closes a socket on which a greenlet waits a little later
    wait_for(lambda: all(refused(where) for where in ports | paths), "the end of all four")
    assert "Opened" not in process.log()


# --- what a program can rely on -------------------------------------------------------------------


def test_a_second_listen_in_one_worker(obedient):
    process, worker, sibling = obedient()
    worker.do("""
        from http.server import BaseHTTPRequestHandler, HTTPServer
        from gevent.pywsgi import WSGIServer
        from answering import application

        def use(port):
            global first
            first = WSGIServer(("127.0.0.1", port), application, log=None)
            first.start()

        use(port)
        """)
    for host in "127.0.0.1", "localhost", "0.0.0.0", "":
        with pytest.raises(Told) as error:
            worker.do(f"HTTPServer(({host!r}, port), BaseHTTPRequestHandler)")
        assert error.value.errno == errno.EADDRINUSE, host
        assert "PortInUse" in error.value.kinds
        assert "OSError" in error.value.kinds
    assert "has a server in this program" in str(error.value) or "application itself" in str(error.value)
    # what had been refused took nothing away, and a closed server makes room at once
    port = worker.do("result = port")
    assert fetch(port) == (200, str(worker.pid))
    worker.do("first.stop(); use(port)")
    assert fetch(port) == (200, str(worker.pid))
    sibling.do(f"""
        from gevent.pywsgi import WSGIServer
        from answering import application
        WSGIServer(("127.0.0.1", {port}), application, log=None).start()
        """)
    answering(port, [worker.pid, sibling.pid])
    assert len(re.findall("Opened", process.log())) == 1
    assert "Closed" not in process.log()


#: A gunicorn.conf.py with which a port closes soon after no worker uses it any more.
GRACE = "import gunicorn_passenger\ngunicorn_passenger.configure(grace_period=0.2)\n"

#: How servers are opened, and how their programs close them again.
CLOSERS = {
    "gevent_pywsgi": (
        """
        from gevent.pywsgi import WSGIServer
        server = WSGIServer(("127.0.0.1", port), application, log=None)
        server.start()
        """,
        "server.stop()",
    ),
    "http_server": (
        """
        from answering import Handler
        from http.server import HTTPServer
        server = HTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        """,
        "server.shutdown(); server.server_close()",
    ),
    "http_server_threading": (
        """
        from answering import Handler
        from http.server import ThreadingHTTPServer
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        """,
        "server.shutdown(); server.server_close()",
    ),
    "prometheus": (
        """
        import prometheus_client
        if not opened:
            prometheus_client.Gauge("worker_up", "", ["pid"]).labels(os.getpid()).set(1)
        server, thread = prometheus_client.start_http_server(port, "127.0.0.1")
        """,
        "server.shutdown(); server.server_close(); thread.join()",
    ),
    "werkzeug": (
        """
        from werkzeug.serving import make_server
        server = make_server("127.0.0.1", port, application)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        """,
        "server.shutdown()",
    ),
    "cheroot": (
        """
        from cheroot import wsgi
        server = wsgi.Server(("127.0.0.1", port), application, numthreads=2)
        server.prepare()
        threading.Thread(target=server.serve, daemon=True).start()
        """,
        "server.stop()",
    ),
    "waitress": (
        """
        import waitress
        server = waitress.create_server(application, host="127.0.0.1", port=port, map={})
        threading.Thread(target=server.run, daemon=True).start()
        """,
        "server.close()",
    ),
    "asyncio": (
        """
        import asyncio
        from answering import answer
        async def main():
            global loop, stop
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            async with await asyncio.start_server(answer, "127.0.0.1", port):
                await stop.wait()
        thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        thread.start()
        """,
        "loop.call_soon_threadsafe(stop.set); thread.join()",
    ),
}


@pytest.mark.parametrize("server", CLOSERS)
def test_closing_gives_the_port_back(start, obedient, server):
    conf = start.write("gunicorn.conf.py", GRACE)
    process, *workers = obedient(2, "-c", conf)
    port = free_port()
    opening, closing = CLOSERS[server]
    for round_ in 1, 2:
        for worker in workers:
            worker.do(f"from answering import application; port, opened = {port}, {round_ - 1}")
            worker.do(opening)
        wait_for(lambda: not refused(port), "the port")
        answering(port, [worker.pid for worker in workers])
        assert len(re.findall(f"Opened 127.0.0.1:{port} ", process.log())) == round_
        workers[0].do(closing)
        answering(port, [workers[1].pid])
        workers[1].do(closing)
        process.wait_log(f"Closed 127.0.0.1:{port}: no worker has wanted it for 0.2 s", round_)
        assert refused(port)
    assert not re.search("Traceback|ERROR", process.log()), process.log()


def test_a_connection_that_a_sibling_takes_first(obedient, port):
    """socketserver accepts when its selector says so; then that connection may be gone. It must not wait."""
    _, late, sibling = obedient()
    for worker in late, sibling:
        worker.do(f"""
            from http.server import HTTPServer
            from answering import Handler
            import gevent

            class Server(HTTPServer):
                lost = False

                def get_request(self):
                    if self.late:
                        gevent.sleep(0.1)
                    self.lost = True
                    request = super().get_request()
                    self.lost = False
                    return request

            server = Server(("127.0.0.1", {port}), Handler)
            server.late = {worker is late}
            serving = threading.Thread(target=server.serve_forever, daemon=True)
            serving.start()
            """)

    def lose():
        assert fetch(port)[0] == 200
        return late.do("result = server.lost")

    wait_for(lose, "the late one to find nothing")
    assert late.do("""
        threading.Thread(target=server.shutdown, daemon=True).start()
        serving.join(5)
        result = not serving.is_alive()
        """)


@pytest.mark.parametrize("kind", ["patched", "unpatched"])
@pytest.mark.parametrize(
    "closing",
    [
        "s.close()",
        "t = s.dup(); s.close(); assert t.getsockname()[1] == port; t.close()",
        "t = type(s)(fileno=s.detach()); t.close()",
        "os.close(s.detach())",
        "del s",
    ],
)
def test_closing_a_plain_socket_gives_the_port_back(start, obedient, kind, closing):
    """However the last descriptor of the socket goes."""
    conf = start.write("gunicorn.conf.py", GRACE)
    process, worker = obedient(1, "-c", conf)
    port = free_port()
    worker.do(f"""
        from gevent import monkey
        kinds = {{"patched": socket.socket, "unpatched": monkey.get_original("socket", "socket")}}
        port = {port}
        s = kinds[{kind!r}]()
        s.bind(("127.0.0.1", port))
        s.listen()
        """)
    assert not refused(port)
    worker.do(closing)
    wait_for(lambda: refused(port), "the port to be closed", 10)
    process.wait_log(f"Closed 127.0.0.1:{port}:")


def test_ipv6(obedient, port):
    process, *workers = obedient()
    for worker in workers:
        worker.do(f"""
            from http.server import ThreadingHTTPServer
            from answering import Handler
            class Server(ThreadingHTTPServer):
                address_family = socket.AF_INET6
            server = Server(("::1", {port}), Handler)
            assert server.socket.getsockname() == ("::1", {port}, 0, 0), server.socket.getsockname()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            """)
    answering(("::1", port), [worker.pid for worker in workers])
    assert refused(port), "127.0.0.1 is not ::1"
    process.wait_log(rf"Opened \[::1\]:{port} ")


OPTIONS = """
    import socket

    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 50000),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 60000),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
        (socket.IPPROTO_IP, socket.IP_TOS, 0x10),
    ]

    def listen(port, early):
        listener = socket.socket()
        if early:
            set_options(listener)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        if not early:
            set_options(listener)
        return listener

    def set_options(sock):
        for option in options:
            sock.setsockopt(*option)

    def accepted(listener):
        with listener, listener.accept()[0] as conn:
            return [conn.getsockopt(*option[:2]) for option in options]
    """


@pytest.mark.parametrize("early", [True, False])
def test_socket_options_reach_the_masters_socket(obedient, early):
    """Set before or after listen(), they are in effect on accepted connections as under plain Python."""
    _, worker, _ = obedient()
    ours, plain = free_port(), free_port()
    here = {}
    exec(textwrap.dedent(OPTIONS), here)
    worker.do(textwrap.dedent(OPTIONS) + f"listener = listen({ours}, {early})")
    listener = here["listen"](plain, early)
    with socket.create_connection(("127.0.0.1", ours)), socket.create_connection(("127.0.0.1", plain)):
        found = worker.do("result = accepted(listener)")
        assert found == here["accepted"](listener)
    assert found[0] == found[3] == 1
    assert found[4] == 77


# --- sockets of the standard library, threads of the system ---------------------------------------


def test_blocking_accept_in_threads_of_the_system(start, port):
    process = start.gunicorn("native_accept", workers=4, env={"P1": port}).wait_ready(port)
    wait_for(lambda: len(process.workers()) == 4, "four workers")
    answering(port, process.workers())
    answering(process.socket, process.workers())
    with Requests(port) as requests, Requests(process.socket) as primary:
        process.hup(4)
        answering(port, process.workers())
    assert not requests.failures
    assert not primary.failures
    assert process.stop() == 0
    assert refused(port)


def test_a_blocking_socket_beside_a_gevent_server(obedient, port):
    """The open file description is shared, and with it whether it blocks: neither may wedge the other."""
    _, native, sibling = obedient()
    sibling.do(f"""
        from gevent.pywsgi import WSGIServer
        from answering import application
        WSGIServer(("127.0.0.1", {port}), application, log=None).start()
        """)
    native.do(f"""
        import gevent
        from answering import converse
        Socket = __import__("gevent.monkey").monkey.get_original("socket", "socket")
        s = Socket()
        s.setblocking(True)
        s.bind(("127.0.0.1", {port}))

        def serve():
            s.listen()
            s.settimeout(None)
            s.setblocking(True)
            while True:
                conn, peer = s.accept()
                with conn:
                    converse(conn, peer)

        accepting = gevent.get_hub().threadpool.spawn(serve)
        """)
    answering(port, [native.pid, sibling.pid])
    for _ in range(5):
        # each connection wakes both, and one of them finds that it was too late
        answering(port, [native.pid, sibling.pid])
        assert sibling.do("result = os.getpid()") == sibling.pid
        assert native.do("result = os.getpid()") == native.pid
    native.do("assert not accepting.ready()")
    with pytest.raises(Told) as error:
        native.do(f"""
            def again():
                t = Socket()
                t.bind(("127.0.0.1", {port}))
                t.listen()

            gevent.get_hub().threadpool.apply(again)
            """)
    assert error.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("copy", ["s.dup()", "Socket(fileno=os.dup(s.fileno()))"])
def test_a_copy_of_a_blocking_socket_beside_a_gevent_server(obedient, port, copy):
    """An object that did not exist at listen() blocks no worker either."""
    _, native, sibling = obedient()
    sibling.do(f"""
        from gevent.pywsgi import WSGIServer
        from answering import application
        WSGIServer(("127.0.0.1", {port}), application, log=None).start()
        """)
    native.do(f"""
        import gevent
        from answering import converse
        Socket = __import__("gevent.monkey").monkey.get_original("socket", "socket")
        s = Socket()
        s.bind(("127.0.0.1", {port}))
        s.listen()
        copy = {copy}

        def serve():
            while True:
                conn, peer = copy.accept()
                with conn:
                    converse(conn, peer)

        accepting = gevent.get_hub().threadpool.spawn(serve)
        """)
    answering(port, [native.pid, sibling.pid])
    native.do("copy.setblocking(True)")
    answering(port, [native.pid, sibling.pid])
    assert sibling.do("result = os.getpid()") == sibling.pid
    native.do("assert not accepting.ready()")


def test_a_copy_of_a_socket_is_drained(obedient, port):
    """A connection that a worker has accepted from a dup() of the listening socket is finished too."""
    process, worker, _ = obedient()
    worker.do(f"""
        import gevent
        from answering import converse
        from gevent.server import StreamServer

        def slowly(conn, peer):
            asked.set()
            told.wait()
            converse(conn, peer)

        asked, told = threading.Event(), threading.Event()
        s = socket.socket()
        s.bind(("127.0.0.1", {port}))
        s.listen()
        server = StreamServer(s.dup(), slowly)
        server.start()
        """)
    client = Client(port)
    client.request("GET", "/")
    # the worker begins to drain while it handles the request, and responds while it drains
    worker.do("""
        import signal
        assert asked.wait(20)

        def leave():
            os.kill(os.getpid(), signal.SIGTERM)
            gevent.sleep(1)
            told.set()

        gevent.spawn(leave)
        """)
    worker.client.close()
    assert pid_in(client.getresponse()) == worker.pid
    client.close()
    wait_for(lambda: worker.pid not in process.workers(), "the worker to leave")


def test_our_listen_in_a_thread_of_the_system(obedient, port):
    _, worker = obedient(1)
    worker.do(f"""
        import gevent
        import gunicorn_passenger as passenger
        from answering import application
        gevent.get_hub().threadpool.apply(passenger.listen, ({port}, application))
        """)
    client = Client(port, timeout=5)
    client.request("GET", "/")
    assert pid_in(client.getresponse()) == worker.pid


# --- refusals -------------------------------------------------------------------------------------


def test_a_port_that_is_not_allocated(obedient):
    allocated, port = free_port(), free_port()
    process, worker, _ = obedient(PASSENGER_PORTS=allocated)
    worker.do(f"""
        from http.server import BaseHTTPRequestHandler, HTTPServer
        port = {port}
        s = socket.socket()
        s.bind(("127.0.0.1", port))
        """)
    for code in "HTTPServer(('127.0.0.1', port), BaseHTTPRequestHandler)", "s.listen()":
        with pytest.raises(Told) as error:
            worker.do(code)
        assert error.value.errno == errno.EACCES
        assert "OSError" in error.value.kinds
        assert f"port {port} is not allocated" in str(error.value)
        assert f"the port allocation is {allocated} (set by PASSENGER_PORTS)" in str(error.value)
        assert "add it to PASSENGER_PORTS" in str(error.value)
    worker.do(f"HTTPServer(('127.0.0.1', {allocated}), BaseHTTPRequestHandler)")
    assert refused(port)
    assert f":{port}" not in process.log()


def test_a_port_that_a_foreign_process_holds(obedient, target):
    _, worker, _ = obedient()
    host, port = target.getsockname()
    with pytest.raises(Told) as error:
        worker.do(f"import socketserver; socketserver.TCPServer({(host, port)}, None)")
    assert error.value.errno == errno.EADDRINUSE
    assert "OSError" in error.value.kinds
    assert re.search(rf"{host}:{port} is in use by .* \(pid {os.getpid()}, user \w+\)", str(error.value))
    target.close()
    worker.do(f"socketserver.TCPServer({(host, port)}, None)")


# --- listeners without the master -----------------------------------------------------------------------


def test_a_server_that_binds_by_itself_in_every_worker(start, port):
    process = start.gunicorn("c_server", workers=2, env={"P1": port})
    process.wait_log(
        r"\[ERROR\] A server of the program opens its port without Python's socket module, so the master "
        r"cannot share the port among the workers \(.*in use\): run gunicorn with --workers 1, or pass the "
        "server a listening socket made with Python's socket module"
    )
    assert process.wait_end() != 0
    assert refused(port)


def test_a_server_that_binds_by_itself_in_one_worker(start, home, port):
    process = start.gunicorn("c_server", workers=2, env={"P1": port, "FIRST": home / "first"}).wait_ready()
    pid = process.wait_log(
        rf"\[WARNING\] 127.0.0.1:{port} was opened without Python's socket module, so the master cannot share "
        r"it: only this worker accepts there \(pid:(\d+)\)"
    )[1]
    assert int(pid) in process.workers()
    wait_for(lambda: len(process.workers()) == 2, "two workers")
    answering(process.socket, process.workers())
    assert process.log().count("was opened without Python") == 1
    assert process.stop() == 0


def test_a_server_that_binds_by_itself_under_one_worker(start, port):
    """It works, and nothing is said."""
    process = start.gunicorn("c_server", workers=1, env={"P1": port}).wait_ready()
    assert not refused(port)
    assert process.stop() == 0
    assert "Python's socket module" not in process.log()
