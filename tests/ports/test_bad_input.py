"""Bad input: one clear line, no traceback, a non-zero exit where it stops the start, nothing left behind."""

import ast
import os
import re
import socket
import stat

import pytest
from conditions import wait_for
from free_ports import free_port, free_range
from http_client import fetch, refused
from processes import GUNICORN, starting

LONG = "/tmp/" + "x" * 120


def error_lines(process):
    """The lines that are not gunicorn's own report of a start and its end."""
    usual = r"\[INFO\]|exited with code|Shutting down: Master|Reason: App failed to load|^\s*$"
    return [line for line in process.log().splitlines() if not re.search(usual, line)]


def fails(process, pattern, lines=1):
    """The start fails with one line that matches, and leaves nothing behind."""
    assert process.wait_end() != 0
    assert "Traceback" not in process.log(), process.log()
    found = error_lines(process)
    assert len(found) == lines, process.log()
    assert re.search(pattern, found[0]), found[0]
    # no worker takes the place of one on whose status gunicorn is about to halt
    command = process.popen.args
    if "-w" in command:
        assert process.log().count("Booting worker") <= int(command[command.index("-w") + 1]), process.log()
    assert not os.path.exists(process.socket)
    wait_for(lambda: not process.session(), "no process to be left")


IMPOSSIBLE = [
    ("passenger.create_server(whoami).listen(0)", "port 0 is not a number from 1 to 65535"),
    ("passenger.create_server(whoami).listen(65536)", "port 65536 is not a number from 1 to 65535"),
    ("passenger.create_server(whoami).listen(-1)", "port -1 is not a number from 1 to 65535"),
    ("passenger.create_server(whoami).listen('127.0.0.1:http')", "port 'http' in '127.0.0.1:http' is not a"),
    ("passenger.create_server(whoami).listen(True)", "cannot listen on True: it is neither a number nor"),
    ("passenger.create_server(whoami).listen(None)", "cannot listen on None: it is neither a number nor"),
    ("passenger.create_server(whoami).listen('nonsense')", "cannot listen on 'nonsense': it has no port"),
    ("passenger.create_server(whoami).listen('::1:9000')", r"an IPv6 address with a port is written \[::1\]:9000"),
    ("passenger.create_server(whoami).listen('[::1]9000')", r"written \[::1\]:9000"),
    ("passenger.create_server(whoami).listen('unix:')", "the path of the UNIX socket is empty"),
    (f"passenger.create_server(whoami).listen('unix:{LONG}')", "has 125 bytes, but the system allows 107"),
    ("passenger.create_server(whoami).listen('unix:program.py')", "program.py' exists and is not a socket"),
    ("passenger.create_server(whoami).listen('unix:/no/where/x.sock')", "No such file.*create the directory"),
    ("passenger.create_server(whoami).listen('no.such.host.invalid:9000')", "'no.such.host.invalid' does not res"),
    ("passenger.create_server(whoami).listen('192.0.2.1:9000')", "cannot listen on 192.0.2.1:9000: .*does not have that address"),
    (
        "passenger.create_server(whoami).listen('passenger', placement='one')",
        "placement 'one' is not for the primary, which all workers serve",
    ),
    (
        "passenger.create_server(whoami).listen('unix:/tmp/x', placement='each')",
        "placement 'each' needs a port for each worker, but unix:/tmp/x is a single socket",
    ),
    ("passenger.create_server(whoami).listen(9000, placement='x')", "placement 'x' is unknown"),
    ("passenger.create_server(whoami).listen(9000, name='')", "a server's name must be a string of 1 to 200"),
    ("passenger.create_server(whoami).listen(80)", "port 80 is privileged .* account root; .*PASSENGER_PORTS=80"),
    ("s = passenger.create_server(whoami)\ns.close()\ns.listen(9000)", "is closed and cannot listen again"),
    ("s = passenger.create_server(whoami).listen('auto')\ns.listen(9000)", "already listens on 127.0.0.1"),
    ("passenger.listen('9' * 5000, whoami)", "port '99999999999999999999' .*is not a number from 1 to 65535"),
    (f"passenger.listen('{'a' * 64}.x:9000', whoami)", "a label has more than 63 characters"),
    ("from gunicorn_passenger import http_proxy\nhttp_proxy.create_server('ftp://x')", "target='ftp://x': a URL for a target begins with http:// or https://"),
    ("from gunicorn_passenger import http_proxy\nhttp_proxy.create_server(9000, zz=1)", "has no option 'zz'"),
    (
        "from gunicorn_passenger import http_proxy\nhttp_proxy.create_server(9000, changeOrigin=True)",
        "has no option 'changeOrigin'; did you mean 'change_origin'",
    ),
    (
        "from gunicorn_passenger import http_proxy\nhttp_proxy.create_server(9000).on('proxyReq', print)",
        "unknown event 'proxyReq'; did you mean 'proxy_req'",
    ),
    ("passenger.configure(placment={9000: 'one'})", "no setting 'placment'; did you mean 'placement'"),
    ("passenger.configure(placement='one')", "name the port, too, such as .9000: 'one'."),
    ("passenger.create_server(whoami, zz=1)", "create_server.. has no option 'zz'"),
    ("passenger.configure(ports='9000-')", r"configure\(ports=...\): cannot read '9000-' \(item 1 of '9000-'\)"),
    ("passenger.configure(ports='1,70000')", r"'70000' \(item 2 of '1,70000'\) is outside 1-65535"),
    ("passenger.configure(ports='20-10')", "'20-10' .*runs backwards"),
    ("passenger.configure(auto_install='maybe')", "'maybe' is neither true nor false"),
    ("passenger.configure(grace_period=3)", "is for gunicorn.conf.py"),
    ("passenger.configure(placement={9000: 'two'})", "port 9000: placement 'two' is unknown"),
    ("passenger.configure(placement='x')", "placement"),
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals():
    """What each of these calls raises, in a worker that catches it and continues."""
    with starting() as start:
        start.write(
            "program.py",
            f"""
            refusals = []
            for call in {[call for call, _ in IMPOSSIBLE]!r}:
                try:
                    exec(call)
                    refusals.append("nothing was raised")
                except Exception as error:
                    refusals.append(str(error))
            """,
        )
        process = start.gunicorn("anything", workers=1).wait_ready()
        yield ast.literal_eval(fetch(process.socket, "/eval", "POST", "refusals")[1])


@pytest.mark.parametrize("which", range(len(IMPOSSIBLE)), ids=[pattern for _, pattern in IMPOSSIBLE])
def test_a_call_that_asks_for_the_impossible(refusals, which):
    assert re.search(IMPOSSIBLE[which][1], refusals[which]), refusals[which]
    assert "\n" not in refusals[which]


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        entry
        for entry in IMPOSSIBLE
        if any(text in entry[0] for text in ("(0)", "192.0.2.1", "zz=1", "grace_period"))
    ],
)
def test_program_that_asks_for_the_impossible(start, call, pattern):
    """One of each kind: refused in the worker, by the master, for its type, and at the wrong place."""
    start.write("program.py", call)
    fails(start.gunicorn("anything", workers=4), pattern)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            "passenger.configure(nonsense=1)",
            "TypeError",
            "configure() has no setting 'nonsense'; known settings: auto_ins",
        ),
        (
            "passenger.create_server(3)",
            "TypeError",
            "create_server() takes a WSGI or an ASGI application, which is callable; 3",
        ),
        (
            "passenger.on('nothing', print)",
            "ValueError",
            "unknown event 'nothing'; the events are ready, listening",
        ),
        ("passenger.on('ready', 3)", "TypeError", "must be callable"),
    ],
)
def test_misuse_is_pythons_own_error(start, call, error, text):
    start.write("program.py", f"try:\n    {call}\nexcept {error} as e:\n    caught = str(e)")
    process = start.gunicorn("anything").wait_ready()
    assert text in fetch(process.socket, "/eval", "POST", "caught")[1]


def test_unknown_setting_stops_the_start_in_one_line(start):
    start.write("program.py", "passenger.configure(nonsense=1)")
    fails(start.gunicorn("anything", workers=3), "configure.. has no setting 'nonsense'")


def test_app_that_is_not_callable_stops_the_start_in_one_line(start):
    start.write("program.py", "passenger.create_server(3)")
    fails(start.gunicorn("anything", workers=3), "create_server.. takes a WSGI or an ASGI application")


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        ("configure(nonsense=1)", "gunicorn.conf.py, line 2: configure.. has no setting 'nonsense'"),
        (
            "configure(ports='9000,90x')",
            "gunicorn.conf.py, line 2: .*cannot read '90x' .item 2 of '9000,90x'",
        ),
        ("configure(grace_period='soon')", "gunicorn.conf.py, line 2: .*'soon' is not a number of seconds"),
        ("configure(grace_period=-1)", "is out of range; use 0 to 86400 seconds"),
        ("configure(status_hosts=['http://x'])", "gunicorn.conf.py, line 2: .*'http://x' is not a host name"),
        (
            "status.spawn(9100, hosts=['x:80'])",
            "gunicorn.conf.py, line 2: status.spawn.hosts=.*'x:80' is not a host",
        ),
        ("status.spawn(None)", "gunicorn.conf.py, line 2: status.spawn.. needs to know where to listen"),
    ],
)
def test_bad_settings_in_gunicorn_conf(start, call, pattern):
    conf = start.write("gunicorn.conf.py", f"import gunicorn_passenger as passenger\npassenger.{call}\n")
    fails(start.gunicorn("anything", "-c", conf), pattern)


@pytest.mark.parametrize(
    ("hook", "text", "pattern"),
    [
        ("on_starting", "configure(ports='x')", r"^Error: .*cannot read 'x'.* \(gunicorn.conf.py:3\)"),
        (
            "when_ready",
            "spawn('nowhere', kill_mode='x')",
            r"^Error: spawn\(kill_mode='x'.* \(gunicorn.conf.py:3\)",
        ),
        ("post_worker_init", "configure(ports='x')", r"cannot read 'x'.* \(gunicorn.conf.py:3\)"),
        (None, "spawn('nowhere', kill_mode='x')", r"^Error: spawn\(kill_mode='x'.* \(program.py:1\)"),
    ],
)
def test_an_error_in_a_hook_or_a_preloaded_program(start, hook, text, pattern):
    start.write("program.py", f"passenger.{text}" if hook is None else "")
    conf = f"import gunicorn_passenger as passenger\ndef {hook}(server):\n    passenger.{text}\n"
    conf = start.write("gunicorn.conf.py", conf if hook else "preload_app = True")
    process = start.gunicorn("anything", "-c", conf, workers=1)
    assert process.wait_end() != 0
    assert "Traceback" not in process.log(), process.log()
    assert len(re.findall(pattern, process.log(), re.MULTILINE)) == 1, process.log()


@pytest.mark.parametrize(
    ("variable", "value", "pattern"),
    [
        ("PASSENGER_PORTS", "9000-x", "PASSENGER_PORTS: cannot read '9000-x' .item 1 of '9000-x'"),
        ("PASSENGER_GRACE_PERIOD", "long", "PASSENGER_GRACE_PERIOD: 'long' is not a number of seconds"),
        ("PASSENGER_AUTO_INSTALL", "2", "PASSENGER_AUTO_INSTALL: '2' is neither true nor false"),
        (
            "PASSENGER_PLACEMENT",
            "9000=two",
            "PASSENGER_PLACEMENT: port 9000: placement 'two' is unknown; use 'shared'",
        ),
        ("PASSENGER_STATUS_HOSTS", "a/b", "PASSENGER_STATUS_HOSTS: 'a/b' is not a host name"),
    ],
)
def test_bad_environment(start, variable, value, pattern):
    process = start.gunicorn("anything", workers=4, env={variable: value})
    assert process.wait_end() == 1
    assert "Traceback" not in process.log()
    assert re.search(rf"\[ERROR\] Reason: {pattern}", process.log()), process.log()
    assert "Booting worker" not in process.log()
    assert not os.path.exists(process.socket)


def test_port_not_allocated(start):
    start.write("program.py", "passenger.create_server(whoami).listen(9500)")
    pattern = (
        "port 9500 is not allocated to account root: the port allocation is 9000-9019,9100 .set by PASSENGER_PORTS.; "
        "listen on one of those ports, or add it to PASSENGER_PORTS and restart"
    )
    fails(start.gunicorn("anything", workers=4, env={"PASSENGER_PORTS": "9000-9019,9100"}), pattern)


def test_errno_for_programs_that_catch_os_error(start):
    taken = free_port()
    start.write(
        "program.py",
        f"""
        caught = []
        for port in (9500, {taken}):
            try:
                passenger.create_server(whoami).listen(port)
            except OSError as e:
                caught.append((type(e).__name__, e.errno, e.strerror == str(e), isinstance(e, passenger.ListenError)))
        """,
    )
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", taken))
        holder.listen()
        process = start.gunicorn("anything", env={"PASSENGER_PORTS": taken}).wait_ready()
    assert fetch(process.socket, "/eval", "POST", "caught")[1] == str(
        [("PortNotAllocated", 13, True, True), ("PortInUse", 98, True, True)]
    )


def test_port_held_by_another_program(start, port):
    start.write("program.py", f"passenger.create_server(whoami).listen({port})")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        pattern = (
            rf"127.0.0.1:{port} is in use by .* \(pid {os.getpid()}, user root\); stop that program or listen"
        )
        fails(start.gunicorn("anything", workers=4), pattern)


def test_unix_path_held_by_another_program(start, home):
    start.write("program.py", f"passenger.create_server(whoami).listen('unix:{home}/held.sock')")
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(f"{home}/held.sock")
        holder.listen()
        fails(start.gunicorn("anything", workers=2), f"unix:{home}/held.sock is in use by another program")
    assert stat.S_ISSOCK(os.stat(f"{home}/held.sock").st_mode)


def test_no_port_is_left_for_auto(start):
    first = free_range(1)
    start.write("program.py", "a = passenger.listen('auto', whoami)\nb = passenger.listen('auto', whoami)")
    pattern = (
        rf"listen\('auto'\) found no free port in the port allocation {first} \(set by PASSENGER_PORTS\)"
    )
    fails(start.gunicorn("anything", workers=2, env={"PASSENGER_PORTS": first}), pattern)
    assert refused(first)


def test_post_worker_init_that_asks_for_the_impossible(start):
    conf = start.write(
        "gunicorn.conf.py",
        """
        import gunicorn_passenger as passenger
        passenger.configure(ports="9000")
        def post_worker_init(worker):
            passenger.create_server(lambda e, s: []).listen(9001)
        """,
    )
    fails(
        start.gunicorn("anything", "-c", conf, workers=4),
        "port 9001 is not allocated .*set by configure.. in gunicorn.conf.py.*add it to configure.ports=....* reload",
    )


def test_preloaded_server_that_cannot_be_opened(start):
    start.write("program.py", "passenger.create_server(whoami).listen(9500)")
    start.write("gunicorn.conf.py", "from gevent import monkey; monkey.patch_all()")
    process = start.gunicorn("anything", "--preload", workers=4, env={"PASSENGER_PORTS": "9000"})
    fails(process, "port 9500 is not allocated")


def test_preload_that_asks_for_the_impossible(start):
    start.write("gunicorn.conf.py", "from gevent import monkey; monkey.patch_all()")
    start.write("program.py", "passenger.create_server(whoami).listen('nonsense')")
    fails(start.gunicorn("anything", "--preload", workers=4), "cannot listen on 'nonsense': it has no port")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((), "needs the script first"),
        (("-w", "2", "x.py"), "needs the script first"),
        (("nowhere.py",), "the script 'nowhere.py' does not exist"),
        (("script_runner.py", "--preload"), "--preload does not work with gunicorn-passenger start"),
        (("script_runner.py", "-k", "sync"), "needs its own worker class instead of 'sync'"),
        (("script_runner.py", "more.py"), "name one script"),
    ],
)
def test_start_that_cannot_start(start, arguments, pattern):
    from processes import COMMAND

    start.write("script_runner.py", "")
    process = start.python(COMMAND, "start", *arguments)
    assert process.wait_end() != 0
    lines = [line for line in process.log().splitlines() if line.strip()]
    assert len(lines) == 1, process.log()
    assert re.search(pattern, lines[0])


def test_unknown_command(start):
    from processes import COMMAND

    process = start.python(COMMAND, "dance")
    assert process.wait_end() == 2
    assert process.log().startswith("Error: unknown command 'dance'\nusage:")


def test_plain_python_bad_port_variable(start):
    start.write(
        "app.py",
        "import gunicorn_passenger as p\n"
        "try:\n    p.listen('passenger', lambda e, s: [])\nexcept p.SettingError as e:\n    print(e)\n",
    )
    process = start.python("app.py", env={"PORT": "none"})
    process.wait_end()
    assert process.log() == "PORT='none' is not a number from 1 to 65535\n"


def test_plain_python_shows_one_line_too(start):
    start.write("app.py", "import gunicorn_passenger as p\np.listen('nonsense', lambda e, s: [])\n")
    process = start.python("app.py")
    assert process.wait_end() == 1
    assert process.log().startswith("Error: cannot listen on 'nonsense': it has no port")
    assert process.log().count("\n") == 1


@pytest.mark.parametrize(
    "code", ["passenger.create_server(application).listen(9001)", "application.listen()"]
)
def test_another_worker_class(start, code):
    """The error says which worker class runs and which line is missing, and no development server starts."""
    start.write(
        "forgot.py",
        f"""
        import gunicorn_passenger as passenger
        from answering import application as answer
        application = passenger.create_server(answer)
        {code.replace("application.listen()", 'application.listen("passenger")')}
        """,
    )
    process = start.python(
        GUNICORN, "-k", "gthread", "-b", f"unix:{start.home}/app.sock", "forgot",
        env={"PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"},
    )  # fmt: skip
    process.wait_log(
        "this gunicorn runs the worker class 'gthread' without the hooks that listen.. needs: add the line "
        "'from gunicorn_passenger.hooks import .' to gunicorn.conf.py"
    )
    assert process.wait_end() != 0
    assert "Serving on" not in process.log()


def test_an_error_names_the_line_of_the_program(start, port):
    start.write(
        "denied.py",
        """
        import gunicorn_passenger as passenger
        from answering import PORT, application

        passenger.listen(PORT, application)
        """,
    )
    env = {
        "P1": port,
        "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}",
        "PASSENGER_PORTS": port + 1,
    }
    process = start.gunicorn("denied", env=env)
    process.wait_log(rf"port {port} is not allocated .*\(denied.py:5\)")
    assert process.wait_end() != 0


def test_a_module_whose_last_line_blocks(start, port):
    start.write(
        "endless.py",
        """
        from http.server import HTTPServer
        from answering import PORT, Handler

        HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
        """,
    )
    env = {"P1": port, "PYTHONPATH": f"{start.home}:{start.environment['PYTHONPATH']}"}
    process = start.gunicorn("endless", "--graceful-timeout", 1, workers=1, env=env)
    process.wait_log(r"\[WARNING\] The program is not loaded after 10 s, .*: gunicorn-passenger start SCRIPT")


@pytest.mark.parametrize("frozen", ["", "\ndef pre_fork(server, worker): __import__('gc').freeze()"])
def test_a_wrong_module_name_and_modules_imported_too_early(start, frozen):
    """gevent finds those modules among the objects of the garbage collector, also if the program has frozen them."""
    start.write("gunicorn.conf.py", f"import requests{frozen}")
    process = start.gunicorn("no_such_module", workers=1)
    assert process.wait_end() != 0
    log = process.log()
    assert re.search(
        r"\[WARNING\] gunicorn.conf.py has imported modules before gevent patched .*urllib3", log
    )
    assert f"The module 'no_such_module' was not found in {start.home}: correct the name" in log
    assert "Traceback" not in log


def test_no_directory_for_heartbeats(start):
    process = start.gunicorn("anything", "--worker-tmp-dir", f"{start.home}/none", workers=1)
    fails(process, f"Error: the directory {start.home}/none of --worker-tmp-dir does not exist; mount it")
