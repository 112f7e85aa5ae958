"""Which app is the primary: listen("passenger"), auto-install, gunicorn-passenger start."""

import json
import os
import signal

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import answers, fetch, pids_answering, refused

ANSWERS = """
    import os
    import gunicorn_passenger as passenger

    def answer(text):
        def app(environ, start_response):
            start_response("200 OK", [])
            return [text.encode()]
        return app

    application = answer("the module's")
"""


def program(start, text, *arguments, workers=2, **env):
    start.write("app.py", ANSWERS + text)
    return start.gunicorn("app", *arguments, workers=workers, env=env)


@pytest.mark.parametrize("address", ["passenger", "/passenger"])
def test_a_server_that_said_passenger_wins_over_the_module(start, address):
    process = program(
        start, f"    passenger.create_server(answer('said so')).listen({address!r})"
    ).wait_ready()
    assert fetch(process.socket)[1] == "said so"


def test_without_it_the_module_is_the_primary(start, port):
    process = program(start, f"    passenger.create_server(answer('second')).listen({port})").wait_ready()
    assert fetch(process.socket)[1] == "the module's"
    assert fetch(port)[1] == "second"


def test_said_later_it_takes_over_and_closing_gives_back(start):
    process = program(
        start,
        """
    def application(environ, start_response):
        global late
        if environ["PATH_INFO"] == "/late":
            late = passenger.create_server(later).listen("passenger")
        return answer("the module's")(environ, start_response)

    def later(environ, start_response):
        if environ["PATH_INFO"] == "/close":
            late.close()
        return answer("the late one")(environ, start_response)
        """,
        workers=1,
    ).wait_ready()
    assert fetch(process.socket)[1] == "the module's"
    fetch(process.socket, "/late")
    assert fetch(process.socket)[1] == "the late one"
    fetch(process.socket, "/close")
    assert fetch(process.socket)[1] == "the module's"


def test_address_of_the_primary(start):
    process = program(
        start,
        """
    server = passenger.create_server(lambda e, s: answer(repr(server.address))(e, s)).listen("passenger")
        """,
    ).wait_ready()
    assert fetch(process.socket)[1] == repr(f"unix:{process.socket}")


def test_twice_passenger_is_an_error(start):
    process = program(
        start,
        """
    passenger.create_server(answer("a")).listen("passenger", name="first")
    passenger.create_server(answer("b")).listen("passenger")
        """,
        workers=4,
    )
    assert process.wait_end() != 0
    text = process.log()
    assert (
        text.count(
            "listen('passenger') was called a second time, but server 'first' already has the primary socket"
        )
        == 1
    )
    assert "listen(9000)" in text
    assert "Traceback" not in text


def test_auto_install_is_off_for_a_module(start, port):
    """A metrics server opened at import must not take the primary's place."""
    process = program(start, f"    passenger.create_server(answer('metrics')).listen({port})").wait_ready()
    assert fetch(process.socket)[1] == "the module's"


@pytest.mark.parametrize("how", ["configure", "environment", "gunicorn.conf.py"])
def test_auto_install_captures_the_first_listen(start, port, how):
    conf = start.write(
        "conf.py",
        "import gunicorn_passenger as p\n" + ("p.configure(auto_install=True)" if "conf." in how else ""),
    )
    switch = "passenger.configure(auto_install=True)" if how == "configure" else "pass"
    env = {"PASSENGER_AUTO_INSTALL": "1"} if how == "environment" else {}
    process = program(
        start,
        f"""
    {switch}
    first = passenger.create_server(answer("captured")).listen({port})
    try:
        passenger.create_server(answer("b")).listen({free_port()})
    except passenger.AlreadyInstalled as error:
        print("second:", error, flush=True)
        """,
        "-c",
        conf,
        **env,
    ).wait_ready()
    assert fetch(process.socket)[1] == "captured"
    assert refused(port)
    said = process.wait_log(r"second: (.*)").group(1)
    assert "was called a second time" in said  # what happened
    assert "the first server" in said  # why
    assert f"(on 127.0.0.1:{port})" in said
    assert "passenger.configure(auto_install=False)" in said  # what to write instead
    assert "listen('passenger')" in said


def test_auto_install_captures_an_unmodified_server_under_a_module(start, port):
    process = program(
        start,
        f"""
    passenger.configure(auto_install=True)
    import gevent.pywsgi
    server = gevent.pywsgi.WSGIServer(("127.0.0.1", {port}), answer("unmodified"), log=None)
    server.start()
        """,
    ).wait_ready()
    assert fetch(process.socket)[1] == "unmodified"
    assert refused(port)


SCRIPT = """
    import os
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(str(os.getpid()).encode())

    ThreadingHTTPServer(("127.0.0.1", 5000), Answer).serve_forever()
"""


def test_start_runs_an_unmodified_script_in_every_worker(start):
    script = start.write("server.py", SCRIPT)
    process = start.start_script(script, "-w", "3").wait_ready()
    old = pids_answering(process.socket, 3)
    process.hup(3)
    assert not pids_answering(process.socket, 3) & old
    process.signal(signal.SIGUSR2)
    process.wait_log("Starting gunicorn", count=2)
    process.wait_log("Booting worker", count=9)
    process.signal(signal.SIGTERM)
    process.wait_end()
    assert len(pids_answering(process.socket, 3)) == 3
    for pid in process.session():
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not process.session(), "everything to end")


def test_start_without_bind_uses_the_runtime_directory(start, home):
    from processes import COMMAND

    script = start.write("server.py", SCRIPT)
    process = start.python(COMMAND, "start", script)
    path = f"{home}/run/server.sock"
    process.wait_ready(path)
    assert os.stat(f"{home}/run").st_mode & 0o777 == 0o700
    # a second one does not steal the socket
    second = start.python(COMMAND, "start", script)
    assert second.wait_end() == 1
    assert f"unix:{path} is in use by a running application" in second.log()
    assert answers(path)
    assert process.stop() == 0
    assert not os.path.exists(path)


def test_start_with_our_own_servers(start, port):
    script = start.write(
        "server.py",
        ANSWERS
        + f"""
    passenger.configure(auto_install=False)
    passenger.create_server(answer("primary")).listen("passenger")
    passenger.create_server(answer("second")).listen({port})
    passenger.serve_forever()
        """,
    )
    # the primary is served from the script's first listen on; the script is still on its way to the second
    process = start.start_script(script, "-w", "2").wait_ready().wait_ready(port)
    assert fetch(process.socket)[1] == "primary"
    assert fetch(port)[1] == "second"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "print('nothing')",
            "server.py ended without listening: gunicorn-passenger start needs a script that",
        ),
        ("raise SystemExit(3)", "server.py exited (status 3) before it had a server"),
    ],
)
def test_a_script_that_never_listens_is_an_error(start, text, said):
    process = start.start_script(start.write("server.py", text), "-w", "4")
    assert process.wait_end() == 4
    assert process.log().count(said) == 1
    assert "Traceback" not in process.log()
    assert not os.path.exists(process.socket)


def test_a_script_that_raises_shows_its_traceback(start):
    process = start.start_script(start.write("server.py", "import nonsense_module"))
    assert process.wait_end() != 0
    assert "No module named 'nonsense_module'" in process.log()


def test_a_script_that_listens_twice_is_taught(start):
    script = start.write(
        "server.py",
        """
        from http.server import *
        a = HTTPServer(("127.0.0.1", 5001), SimpleHTTPRequestHandler)
        b = HTTPServer(("127.0.0.1", 5002), SimpleHTTPRequestHandler)
        """,
    )
    process = start.start_script(script, "-w", "4")
    assert process.wait_end() == 4
    assert process.log().count("listen() was called a second time (on 127.0.0.1:5002)") == 1
    assert "Traceback" not in process.log()


def test_a_script_that_fails_later_is_started_again(start, home):
    script = start.write(
        "server.py",
        """
        import os, threading, time
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(str(os.getpid()).encode())

        server = ThreadingHTTPServer(("127.0.0.1", 5000), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while not os.path.exists("fail"):
            time.sleep(0.1)
        os.rename("fail", "failed")
        import gunicorn_passenger.script_runner
        gunicorn_passenger.script_runner._STARTUP_SECONDS = 0
        raise RuntimeError("the script's own trouble")
        """,
    )
    process = start.start_script(script).wait_ready()
    first = fetch(process.socket)[1]
    (home / "fail").touch()
    wait_for(lambda: answers(process.socket) and fetch(process.socket)[1] != first, "a new worker")
    assert "the script's own trouble" in process.log()
    assert "the worker exits and gunicorn starts another" in process.log()


def test_the_seeds_program(start, port):
    """The document's program, with its proxy, under four workers; and through a reload."""
    from processes import ROOT

    text = (ROOT / "examples/seed/app.py").read_text().replace("9000", str(port))
    (start.home / "app.py").write_text(text)
    process = start.gunicorn("app", workers=4, env={"PASSENGER_PORTS": port}).wait_ready()
    for where in (process.socket, port):
        status, body = fetch(where, "/any/path?x=1", x_test="yes")
        assert status == 200
        first, _, rest = body.partition("\n")
        assert first == "request successfully proxied!"
        assert json.loads(rest)["x-test"] == "yes"
    process.hup(4)
    assert answers(process.socket)
    assert process.stop() == 0


def test_the_seeds_program_with_plain_python(start, port):
    from processes import ROOT

    dev = free_port()
    text = (ROOT / "examples/seed/app.py").read_text().replace("9000", str(port))
    (start.home / "app.py").write_text(text)
    process = start.python("app.py", env={"PORT": dev}).wait_ready(dev)
    for where in (dev, port):
        assert fetch(where)[1].startswith("request successfully proxied!\n{")
    process.signal(signal.SIGINT)
    assert process.wait_end() == 0


def test_a_scripts_own_sigterm_handler_does_not_break_the_stop(start, home):
    script = start.write(
        "server.py",
        """
        import os, signal, threading, time
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/slow":
                    open("begun", "w").close()
                    while not os.path.exists("go"):
                        time.sleep(0.02)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"done")

        server = ThreadingHTTPServer(("127.0.0.1", 5000), Answer)

        def stop(*_):
            open("stopped", "w").close()
            threading.Thread(target=server.shutdown).start()

        signal.signal(signal.SIGTERM, stop)
        server.serve_forever()
        """,
    )
    import threading

    process = start.start_script(script).wait_ready()
    found = []
    asking = threading.Thread(target=lambda: found.append(fetch(process.socket, "/slow")))
    asking.start()
    wait_for((home / "begun").exists, "the request")
    process.signal(signal.SIGTERM)
    wait_for(lambda: refused(process.socket), "the socket to be gone")
    (home / "go").touch()
    asking.join()
    assert found == [(200, "done")]
    assert process.wait_end() == 0
    assert (home / "stopped").exists()
    assert "Traceback" not in process.log()


def test_start_with_chdir_survives_a_reload(start, home):
    from processes import COMMAND

    (home / "elsewhere").mkdir()
    start.write("server.py", SCRIPT)
    process = start.python(
        COMMAND, "start", "server.py", "--chdir", "elsewhere", "-b", f"unix:{home}/app.sock"
    ).wait_ready()
    process.hup(1)
    assert answers(process.socket)


def test_start_checks_a_configuration_without_running_the_script(start):
    from processes import COMMAND

    start.write("server.py", "    print('it ran')\n" + SCRIPT)
    process = start.python(COMMAND, "start", "server.py", "--check-config")
    assert process.wait_end() == 0
    assert "it ran" not in process.log()


def test_one_server_on_both_families_is_one_server(start):
    """asyncio without a host listens on IPv4 and IPv6."""
    script = start.write(
        "server.py",
        """
        import asyncio, os

        async def answer(reader, writer):
            while (await reader.readline()).strip():
                pass
            writer.write(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 2\\r\\n\\r\\nok")
            await writer.drain()
            writer.close()

        async def main():
            async with await asyncio.start_server(answer, None, 5000) as server:
                await server.serve_forever()

        asyncio.run(main())
        """,
    )
    process = start.start_script(script).wait_ready()
    assert fetch(process.socket) == (200, "ok")
