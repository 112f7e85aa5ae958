"""What the replaced bind and listen do to a program's sockets, and what they leave alone."""

import errno
import os
import re
import socket
import textwrap

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch, refused
from obedient_workers import Told
from unmodified_servers import Requests, answering, pid_in

# --- what is left alone ------------------------------------------------------------------------------


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


# --- what a program can rely on ----------------------------------------------------------------------


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


# --- sockets of the standard library, threads of the system ------------------------------------------


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


# --- refusals ----------------------------------------------------------------------------------------


def test_a_port_that_is_not_allocated(obedient):
    allocated, port = free_port(), free_port()
    process, worker, _ = obedient(PASSENGER_PORTS=allocated)
    worker.do(f"""
        from http.server import BaseHTTPRequestHandler, HTTPServer
        port = {port}
        """)
    for code in (
        "HTTPServer(('127.0.0.1', port), BaseHTTPRequestHandler)",
        "s = socket.socket(); s.bind(('127.0.0.1', port)); s.listen()",
    ):
        with pytest.raises(Told) as error:
            worker.do(code)
        assert error.value.errno == errno.EACCES
        assert "OSError" in error.value.kinds
        assert f"port {port} is not allocated" in str(error.value)
        assert f"the port allocation is {allocated} (set by PASSENGER_PORTS)" in str(error.value)
        assert "add it to PASSENGER_PORTS" in str(error.value)
    worker.do(f"HTTPServer(('127.0.0.1', {allocated}), BaseHTTPRequestHandler)")
    assert refused(port)
    assert f"Opened 127.0.0.1:{port}" not in process.log()


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
