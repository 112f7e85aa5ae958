"""Programs that connect to their own port: to see that it is free, that their server works, or to use it."""

import os
import signal
import socket

import pytest
from conditions import PATIENCE, wait_for
from free_ports import free_port
from http_client import fetch, refused
from processes import require_package
from unmodified_servers import answering


@pytest.fixture
def environment(start, port):
    return {"P1": port, "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"}


SMTP = """
    import os
    from aiosmtpd.controller import Controller
    from aiosmtpd.handlers import Sink
    from answering import PORT, application

    controller = Controller(Sink(), hostname="127.0.0.1", port=PORT)
    controller.start()  # connects to its own port, and waits for its own server to accept
    print("SMTP is served in", os.getpid(), flush=True)
    if __name__ == "__main__":
        import threading
        threading.Event().wait()
    """


def banner(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(20)
        sock.connect(address)
        return sock.recv(100)


def test_a_server_that_looks_whether_it_accepts(start, port, environment):
    require_package("aiosmtpd")
    start.write("mail.py", SMTP)
    process = start.gunicorn("mail", workers=3, env=environment).wait_ready()
    process.wait_log("SMTP is served in", 3)
    assert banner(socket.AF_INET, ("127.0.0.1", port)).startswith(b"220 ")
    process.hup(3)
    process.wait_log("SMTP is served in", 6)
    assert banner(socket.AF_INET, ("127.0.0.1", port)).startswith(b"220 ")
    assert "Traceback" not in process.log()


def test_a_captured_server_that_looks_whether_it_accepts(start, environment):
    require_package("aiosmtpd")
    script = start.write("mail.py", SMTP)
    process = start.start_script(script, "-w", 2, env=environment)
    process.wait_log("SMTP is served in", 2)
    assert banner(socket.AF_UNIX, process.socket).startswith(b"220 ")
    assert "Traceback" not in process.log()


CHERRYPY = """
    import os
    import cherrypy
    from answering import PORT, application

    class Root:
        @cherrypy.expose
        def index(self):
            return str(os.getpid())

    cherrypy.config.update({
        "server.socket_host": "127.0.0.1", "server.socket_port": PORT, "engine.autoreload.on": False,
        "log.screen": False,
    })
    """


def test_cherrypy_as_a_captured_script(start, environment):
    """It looks whether its port is free, and then whether it is taken."""
    require_package("cherrypy")
    script = start.write("site.py", CHERRYPY.rstrip() + "\n    cherrypy.quickstart(Root())\n")
    process = start.start_script(script, "-w", 2, env=environment).wait_ready()
    wait_for(lambda: len(process.workers()) == 2, "two workers")
    answering(process.socket, process.workers())


def test_cherrypy_in_a_module(start, port, environment):
    require_package("cherrypy")
    start.write(
        "cherry.py", CHERRYPY.rstrip() + "\n    cherrypy.tree.mount(Root())\n    cherrypy.engine.start()\n"
    )
    process = start.gunicorn("cherry", workers=3, env=environment).wait_ready()
    wait_for(lambda: len(process.workers()) == 3, "three workers")
    answering(port, process.workers())
    process.hup(3)
    answering(port, process.workers())


def test_a_script_that_requests_its_own_url(start, environment):
    """Soon after it listens, and at any time later."""
    script = start.write(
        "own.py",
        """
        import threading
        import urllib.request
        from http.server import ThreadingHTTPServer
        from answering import PORT, Handler
        from gunicorn_passenger.interposition import self_connection

        def request():
            return urllib.request.urlopen(f"http://localhost:{PORT}/").read().decode()

        class Own(Handler):
            def do_GET(self):
                if self.path == "/own":
                    self_connection.STARTING = 0.0
                    self.path = request()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(self.path)))
                    self.end_headers()
                    self.wfile.write(self.path.encode())
                else:
                    super().do_GET()

        server = ThreadingHTTPServer(("127.0.0.1", PORT), Own)
        threading.Thread(target=server.serve_forever).start()
        print("own answer from", request(), "in", __import__("os").getpid(), flush=True)
        """,
    )
    process = start.start_script(script, "-w", 2, env=environment).wait_ready()
    found = process.wait_log(r"own answer from (\d+) in (\d+)\n", 2)
    assert found[1] == found[2]
    status, pid = fetch(process.socket, "/own")
    assert status == 200
    assert int(pid) in process.workers()


def test_a_program_that_looks_whether_its_port_is_served(start, port, environment):
    """It would find its siblings. As at the first start, the connection is refused, and the program serves."""
    start.write(
        "probe.py",
        """
        import socket
        from answering import PORT, application
        from gevent.pywsgi import WSGIServer

        try:
            socket.create_connection(("127.0.0.1", PORT)).close()
        except ConnectionRefusedError:
            WSGIServer(("127.0.0.1", PORT), application, log=None).start()
        """,
    )
    process = start.gunicorn("probe", workers=2, env=environment).wait_ready(port)
    wait_for(lambda: len(process.workers()) == 2, "two workers")
    answering(port, process.workers())
    victim, _ = process.workers()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in (now := process.workers()) and len(now) == 2, "the successor")
    answering(port, process.workers())


def test_each_client_of_a_captured_server_has_an_address_of_its_own(start, environment):
    """As over TCP: programs tell their clients apart by it."""
    script = start.write(
        "chat.py",
        """
        from answering import PORT
        from gevent.server import StreamServer

        clients = {}

        def handle(conn, address):
            assert conn.getpeername() == conn.dup().getpeername() == address, (conn.getpeername(), address)
            clients[address] = conn
            for line in conn.makefile("rb"):
                for other in clients.values():
                    other.sendall(line)

        StreamServer(("127.0.0.1", PORT), handle).serve_forever()
        """,
    )
    process = start.start_script(script, "-w", 1, env=environment)
    process.wait_log("Booting worker")
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    try:
        for client in clients:
            client.settimeout(PATIENCE)
            client.connect(process.socket)
            client.sendall(b"here\n")
            assert client.recv(5) == b"here\n"
        clients[0].sendall(b"end\n")
        for client in clients:
            read_until(client, b"end\n")
    finally:
        for client in clients:
            client.close()
    assert "Traceback" not in process.log()


def read_until(sock, text):
    found = b""
    while text not in found:
        data = sock.recv(100)
        assert data, found
        found += data
    return found


@pytest.mark.parametrize("primary", [0, 1])
def test_a_script_with_several_servers(start, environment, primary):
    """--primary names the one that the web server reaches; the other has its port."""
    ports = free_port(), free_port()
    script = start.write(
        "several.py",
        f"""
        import threading
        from http.server import ThreadingHTTPServer
        from answering import Handler

        class Named(Handler):
            def do_GET(self):
                text = str(self.server.number).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        for number, port in enumerate({ports}):
            server = ThreadingHTTPServer(("127.0.0.1", port), Named)
            server.number = number
            threading.Thread(target=server.serve_forever).start()
        """,
    )
    process = start.start_script(script, "-w", 2, "--primary", ports[primary], env=environment).wait_ready()
    assert fetch(process.socket) == (200, str(primary))
    other = ports[1 - primary]
    wait_for(lambda: not refused(other), "the other server")
    assert fetch(other) == (200, str(1 - primary))
    assert refused(ports[primary])
    assert process.stop() == 0, process.log()


def test_a_stop_while_a_script_is_being_loaded(start, environment):
    """One worker serves; the other one's script has not listened yet."""
    script = start.write(
        "slow.py",
        """
        import os
        from wsgiref.simple_server import make_server
        from answering import PORT, application

        try:
            os.close(os.open("first", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            print("loading", flush=True)
            while True:  # so that the signal meets the script
                pass
        make_server("127.0.0.1", PORT, application).serve_forever()
        """,
    )
    process = start.start_script(script, "-w", 2, env=environment).wait_ready()
    process.wait_log("loading")
    assert process.stop() == 0, process.log()
    assert "Traceback" not in process.log()
