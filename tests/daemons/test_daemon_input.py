"""What spawn() refuses, and how it says so."""

import ast
import os
import re

import pytest
from daemon_site import HEAD, Site, job, pid_of
from free_ports import free_port, free_range
from http_client import fetch
from processes import NO_CONTROL, descriptors, starting

BAD = [
    ("'/no/such/thing'", "the command '/no/such/thing' does not exist; give its path, or install it"),
    ("'no-such-command-at-all'", "the command 'no-such-command-at-all' does not exist"),
    ("'/etc/passwd'", "the command '/etc/passwd' is not executable (chmod +x)"),
    ("''", "the command is empty"),
    ("'sh \"'", "no closing quotation"),
    ("'sleep 9 > log && true'", "only a shell understands '>'; use ['sh', '-c', '...']"),
    ("'sleep $SECONDS'", "only a shell understands '$SECONDS'"),
    ("3", "use a command line, a list of strings or a function"),
    ("lambda: 1", "it is a lambda"),
    ("(lambda: [f for f in [lambda: 1]])()[0]", "it is a lambda"),
    ("__import__('functools').partial(print, 1)", "it has no name"),
    ("daemon_jobs.sleep, args=[object()]", "use JSON values for a function"),
    ("'sleep 9', name='a:b'", "printable characters without a colon"),
    ("'sleep 9', name=7", "it is not a str"),
    ("'sleep 9', on_reload='sometimes'", "use 'keep' or 'restart'"),
    ("'sleep 9', stop_timeout=-1", "use 0 to 3600 seconds"),
    ("'sleep 9', stop_timeout='x'", "it is not a number of seconds"),
    ("'sleep 9', give_up_after=-1", "use a number of exits in a row"),
    ("'sleep 9', env={'A': 1}", "use a mapping of names to strings"),
    ("'sleep 9', env={'A=B': 'c'}", "is empty or contains ="),
    ("'sleep 9', user='no-such-user'", "this machine has no user 'no-such-user'"),
    ("'sleep 9', group='no-such-group'", "this machine has no group 'no-such-group'"),
]

#: What gunicorn.conf.py asks for is opened at the start, and refused then.
BAD_LISTEN = [
    ("'sleep 9', listen=1", "port 1 is not allocated to account"),
    ("'sleep 9', listen='passenger'", "the primary socket belongs to the workers"),
    ("'sleep 9', listen='nowhere'", "cannot listen on 'nowhere': it has no port"),
]


CATCH = f"""
import daemon_jobs

__name__ = "program"
refused = []
for arguments in {[arguments for arguments, _ in BAD]!r}:
    try:
        eval("passenger.spawn(" + arguments + ")")
        refused.append("nothing was raised")
    except Exception as error:
        refused.append(str(error))
"""


@pytest.fixture(scope="module")
def refusals():
    """What each of these calls raises in an application that catches it and continues."""
    with starting() as start:
        start.write("program.py", CATCH)
        process = start.gunicorn("anything", workers=1, env={"PASSENGER_PORTS": free_port()}).wait_ready()
        yield ast.literal_eval(fetch(process.socket, "/eval", "POST", "refused")[1])


@pytest.mark.parametrize("which", range(len(BAD)), ids=[text for text, _ in BAD])
def test_bad_input_is_one_clear_error(refusals, which):
    assert BAD[which][1] in refusals[which]
    assert "\n" not in refusals[which]


@pytest.mark.parametrize(("arguments", "text"), [BAD[0], BAD[3], BAD[8], BAD[12], *BAD_LISTEN])
@pytest.mark.parametrize("where", ["conf", "app"])
def test_bad_input_stops_the_start_with_one_line(start, arguments, text, where):
    env = {"PASSENGER_PORTS": free_port()}
    if where == "conf":
        process = Site(start).run(f"passenger.spawn({arguments})", env=env)
    else:
        process = start.gunicorn("daemon_app", env={**env, "SPAWN": f"spawn({arguments})"})
    assert process.wait_end() != 0
    log = process.log()
    assert "Traceback" not in log
    assert sum(text in line for line in log.splitlines()) == 1, log
    assert not process.session()


def test_a_name_used_twice(start):
    twice = "spawn('sleep 8', name='it')\n{}spawn('sleep 9', name='it')\n"
    process = Site(start).run("passenger." + twice.format("passenger."))
    assert process.wait_end() == 1
    assert re.search(
        r"Error: .*gunicorn.conf.py, line 5: spawn\(name='it'\): the name is used twice", process.log()
    )
    process = start.gunicorn("daemon_app", env={"SPAWN": twice.format("")})
    assert process.wait_end() != 0
    assert process.log().count("the name is used twice") == 1
    conf = start.write(
        "other.py", "import gunicorn_passenger\ngunicorn_passenger.spawn('sleep 7', name='it')\n"
    )
    process = start.gunicorn("daemon_app", "-c", conf, env={"SPAWN": "spawn('sleep 8', name='it')"})
    assert process.wait_end() != 0
    assert process.log().count("the name is used twice") == 1


def test_a_port_that_is_not_allocated_is_not_opened(site, port):
    other = free_port()
    process = site.run(f"passenger.spawn('sleep 9', listen={other})", env={"PASSENGER_PORTS": port})
    assert process.wait_end() == 1
    assert f"port {other} is not allocated" in process.log()
    assert "Opened" not in process.log()


def test_the_programs_own_narrowing_holds_for_its_daemons(start):
    first = free_range(3)
    narrow = f"passenger.configure(ports={first + 1})\n"
    env = {"PASSENGER_PORTS": f"{first}-{first + 2}"}
    process = start.gunicorn("daemon_app", env={**env, "SPAWN": narrow + f"spawn('sleep 9', listen={first})"})
    assert process.wait_end() != 0
    assert f"port {first} is not allocated" in process.log()
    process = start.gunicorn(
        "daemon_app", env={**env, "SPAWN": narrow + "jobs = spawn(daemon_jobs.service, listen='auto')"}
    ).wait_ready()
    assert fetch(process.socket, "/jobs")[1] == f"<Daemon 'service' ('127.0.0.1', {first + 1})>"


def test_a_port_that_the_application_has_itself(start, port):
    text = f"spawn('sleep 9', name='a', listen={port}); spawn('sleep 9', name='b', listen={port})"
    process = start.gunicorn("daemon_app", env={"SPAWN": text})
    assert process.wait_end() != 0
    assert f"127.0.0.1:{port} is in use by this application itself (its daemon 'a')" in process.log()


def test_a_worker_cannot_use_up_the_masters_descriptors(start):
    """Too many sockets and too many daemons are refused; the others still run."""
    text = (
        "refused = []\n"
        "for number in range(80):\n"
        "    try: spawn('sleep 1000', name=f'd{number}', listen=['auto'] * 16)\n"
        "    except passenger.PassengerError as error: refused.append(str(error))\n"
        "first = refused[0]\n"
    )
    conf = start.write(
        "limits.py", "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
    )
    process = start.gunicorn("daemon_app", "-c", conf, workers=1, env={"SPAWN": text}).wait_ready()
    assert "already holds 128 ports, which is the limit" in fetch(process.socket, "/first")[1]
    assert len(descriptors(process.pid)) < 256
    process.wait_log(r"Daemon d\d runs as pid", 8)
    text = text.replace("listen=['auto'] * 16", "args=[number]")
    process.stop()
    process = start.gunicorn("daemon_app", workers=1, env={"SPAWN": text}).wait_ready()
    assert "already has 64 daemons, which is the limit" in fetch(process.socket, "/first")[1]
    assert process.stop() == 0


def test_what_a_worker_sends_is_not_trusted_to_be_a_daemon(start):
    """The master denies a malformed request of a worker, and continues."""
    text = (
        "from gunicorn_passenger.ipc.messages import SpawnDaemon\n"
        "from gunicorn_passenger.daemons.spec import build_spec\n"
        "from gunicorn_passenger.serving.registry import registry\n"
        "import dataclasses, json\n"
        "given = build_spec(['sleep', '1'], listen='auto', stop_timeout=1, give_up_after=1)\n"
        "good = json.loads(given.pack())\n"
        "bad = ['', '[]', '{', '[' * 4000, 'null', '{}']\n"
        "for name, value in [('name', 1), ('name', 'a\\nb'), ('listen', [{}]), ('listen', 7), ('env', [1]), ('command', []),\n"
        "    ('command', [1]), ('user', 0), ('user', 'root'), ('stop_timeout', 1e9), ('cwd', 'here'), ('extra', 1),\n"
        "    ('within', 'x'), ('give_up_after', True), ('env', [['A', 'b\\0c']]), ('group', '0'),\n"
        "    ('listen', [{'kind': 'tcp', 'host': '127.0.0.1', 'port': 1}]),\n"
        "    ('listen', [{'kind': 'tcp', 'host': 'localhost', 'port': 19999}]),\n"
        "    ('listen', [{'kind': 'unix', 'path': 'relative'}])]:\n"
        "    bad.append(json.dumps({**good, name: value}))\n"
        "answers = sorted({type(registry.broker.request(SpawnDaemon(0, text), 'it')).__name__ for text in bad})\n"
    )
    start.home.chmod(0o1777)
    user = ["--user", "nobody", "--group", "nogroup"] if os.geteuid() == 0 else []
    process = start.gunicorn("daemon_app", *user, workers=1, env={"SPAWN": text}).wait_ready()
    assert fetch(process.socket, "/answers")[1] == "['RequestDenied']"
    assert "runs as pid" not in process.log()
    assert "Traceback" not in process.log()


def test_an_interpreter_that_does_not_exist_is_said_when_it_is_run(site):
    script = site.start.write("script.sh", "#!/no/such/interpreter\n")
    script.chmod(0o755)
    process = site.run(f"passenger.spawn('{script}', give_up_after=2)").wait_ready()
    process.wait_log(
        r"Daemon script.sh cannot run .*script.sh: No such file or directory; it is started again"
    )
    process.wait_log("Daemon script.sh is not started again")


def test_a_directory_that_is_gone_is_said(site):
    process = site.run("passenger.spawn('sleep 9', cwd='/no/such/place', give_up_after=1)").wait_ready()
    process.wait_log("Daemon sleep cannot enter its directory /no/such/place: No such file or directory")


def test_other_options_than_gunicorns_reach_a_master_with_patched_modules(start, port):
    """A gunicorn.conf.py that patches the master: the broker's thread and the supervisor are the system's."""
    site = Site(start, "gevent", head="from gevent import monkey\nmonkey.patch_all()\n" + HEAD)
    process = site.run(f"passenger.spawn(daemon_jobs.service, listen={port})", *NO_CONTROL).wait_ready()
    assert job(port) == f"done work {pid_of(process, 'service')}"
    assert process.stop() == 0, process.log()
