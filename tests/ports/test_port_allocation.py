"""The port allocation: parsing, layers, the system's file, and what a worker can obtain."""

import errno
import json
import os
import pwd
import socket
import sys

import pytest
from free_ports import free_port, free_range
from http_client import answers, fetch, pids_answering, refused
from processes import COMMAND, GUNICORN, require

from gunicorn_passenger.config.port_allocation import (
    AllocationSource,
    PortAllocation,
    format_ports,
    parse_ports,
    system_layer,
)
from gunicorn_passenger.config.settings import _CHECKS, Settings
from gunicorn_passenger.errors import PortNotAllocated, SettingError

IS_ROOT = os.geteuid() == 0


# --- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ports"),
    [
        ("9000-9002,9100", {9000, 9001, 9002, 9100}),
        (" 9000 - 9001 , 9100 ", {9000, 9001, 9100}),
        ("1-3,2-4", {1, 2, 3, 4}),
        (9000, {9000}),
        ([9000, "9002-9003"], {9000, 9002, 9003}),
        (range(5, 8), {5, 6, 7}),
        ("", set()),
        ("65535", {65535}),
    ],
)
def test_parse(value, ports):
    assert parse_ports(value, "here") == ports


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("90x0", "here: cannot read '90x0' (item 1 of '90x0')"),
        ("9000,,9001", "here: cannot read '' (item 2 of '9000,,9001')"),
        ("9000,9-", "cannot read '9-' (item 2"),
        ("-9", "cannot read '-9'"),
        ("0", "'0' (item 1 of '0') is outside 1-65535"),
        ("9000-70000", "is outside 1-65535"),
        ("20-10", "runs backwards"),
        ("\u0669", "cannot read"),
        (True, "here: True is not a set of ports"),
        (None, "here: None is not a set of ports"),
        ({9000: 1}, "is not a set of ports"),
        (b"9000", "is not a set of ports"),
    ],
)
def test_parse_says_where(value, said):
    with pytest.raises(SettingError) as caught:
        parse_ports(value, "here")
    assert said in str(caught.value)


def test_format():
    assert format_ports({9000, 9001, 9002, 9100, 1}) == "1,9000-9002,9100"
    assert format_ports(()) == "none"


def layer(text, source):
    return AllocationSource(parse_ports(text, source), source, f"change {source}")


def test_each_source_narrows_and_none_widens():
    allocation = PortAllocation(
        "web", (layer("10-20", "system"), layer("15-30", "environment"), layer("1-18", "app"))
    )
    assert format_ports(allocation.ports) == "15-18"
    allocation.check(17)
    for port, source in ((9, "system"), (25, "system"), (12, "environment"), (19, "app")):
        with pytest.raises(PortNotAllocated) as caught:
            allocation.check(port)
        assert (
            f"port {port} is not allocated to account web: the port allocation is 15-18 (set by {source})"
            in str(caught.value)
        )
        assert f"change {source}" in str(caught.value)
    assert allocation.ineffective_ports() == [
        "environment names ports 21-30, which system does not allocate to account web; these ports are refused",
        "app names ports 1-14, which system does not allocate to account web; these ports are refused",
    ]


def test_without_an_allocation_no_privileged_port():
    PortAllocation("web").check(8080)
    with pytest.raises(PortNotAllocated):
        PortAllocation("web").check(80)
    PortAllocation("web", (layer("80", "system"),)).check(80)


@pytest.fixture
def system_file(tmp_path):
    if not IS_ROOT:
        assert "CI" not in os.environ
        pytest.skip("only root can make a file that root owns")
    path = tmp_path / "ports.toml"
    path.touch(mode=0o644)
    path.chmod(0o644)
    return path


def test_system_file(system_file):
    system_file.write_text('alice = "9000-9001,9100"\nbob = ["9200-9201", 9300]\n"1234" = 9400\n')
    read = lambda account, uid: format_ports(system_layer(account, uid, str(system_file)).ports)  # noqa: E731
    assert read("alice", 1) == "9000-9001,9100"
    assert read("bob", 2) == "9200-9201,9300"
    assert read("1234", 1234) == "9400"
    assert read("no-name", 1234) == "9400"
    assert read("mallory", 3) == "none"


def test_system_file_with_a_table_of_accounts(system_file):
    system_file.write_text('[accounts]\nalice = "9000"\n')
    assert system_layer("alice", 1, str(system_file)).ports == {9000}


def test_no_system_file(tmp_path):
    assert system_layer("alice", 1, str(tmp_path / "none.toml")) is None


def test_system_file_that_cannot_be_trusted(system_file, tmp_path):
    def said():
        with pytest.raises(SettingError) as caught:
            system_layer("alice", 1, str(system_file))
        return str(caught.value)

    system_file.write_text('alice = "9000"')
    system_file.chmod(0o664)
    assert "has mode 0664, but only root may write it (chmod go-w" in said()
    system_file.chmod(0o646)
    assert "has mode 0646" in said()
    system_file.chmod(0o644)
    os.chown(system_file, 65534, 0)
    assert "is owned by nobody, but must be owned by root (chown root" in said()
    os.chown(system_file, 0, 0)
    system_file.write_text("alice = 9000 9001")
    assert "ports.toml: not valid TOML: " in said()
    system_file.write_text('bob = "9000-x"')
    assert "ports.toml, account bob: cannot read '9000-x'" in said()
    system_file.write_bytes(b"\xff")
    assert "not valid UTF-8" in said()
    system_file.unlink()
    system_file.symlink_to(tmp_path / "elsewhere")
    assert (
        f"is a symbolic link, which is not followed; put the file itself there (cp --remove-destination {tmp_path}/elsewhere "
        in said()
    )
    system_file.unlink()
    system_file.mkdir()
    assert "is not a regular file" in said()


@pytest.mark.parametrize("kind", ["file in place of the directory", "dangling directory", "dangling file"])
def test_a_system_file_that_leads_nowhere_allows_nothing(tmp_path, kind):
    directory = tmp_path / "etc"
    if kind == "file in place of the directory":
        directory.write_text("")
    elif kind == "dangling directory":
        directory.symlink_to(tmp_path / "none")
    else:
        directory.mkdir()
        (directory / "ports.toml").symlink_to(tmp_path / "none")
    with pytest.raises(SettingError):
        system_layer("alice", 1000, str(directory / "ports.toml"))


def test_which_source_a_call_belongs_to(monkeypatch):
    """gunicorn.conf.py is the operator's, the application is the program's; a reload starts afresh."""
    monkeypatch.delenv("PASSENGER_PORTS", raising=False)
    monkeypatch.delenv("PASSENGER_AUTO_INSTALL", raising=False)
    settings = Settings()
    settings.configure(ports="1-5", grace_period=3)
    settings.config_file_loaded()
    settings.configure(ports="2-9", auto_install=True)  # --preload: the program
    assert settings.operator["ports"] == {1, 2, 3, 4, 5}
    assert settings.grace_period() == 3
    assert settings.program_layer().ports == set(range(2, 10))
    assert settings.auto_install(False) is True
    settings.leave_program_scope()
    settings.configure(ports="4")  # the operator's file, read again
    settings.config_file_loaded()
    assert settings.operator == {"ports": {4}}
    settings.leave_program_scope()
    settings.config_file_loaded()  # a configuration module that a reload does not run again
    assert settings.operator == {"ports": {4}}


def test_environment_overrides_the_operators_file_and_the_program_both(monkeypatch):
    settings = Settings()
    settings.configure(auto_install=False)
    settings.config_file_loaded()
    assert settings.auto_install(True) is False
    monkeypatch.setenv("PASSENGER_AUTO_INSTALL", "yes")
    assert settings.auto_install(False) is True
    settings.configure(auto_install=False)
    assert settings.auto_install(True) is False


# --- what a worker can obtain -----------------------------------------------------------------------


def outcomes(process, *ports):
    found = []
    for port in ports:
        status, text = fetch(
            process.socket, "/eval", "POST", f"passenger.create_server(whoami).listen({port}).close()"
        )
        found.append(
            "had" if status == 200 else text.strip().splitlines()[-1].partition(": ")[0].split(".")[-1]
        )
    return found


def test_configuration_and_environment_bound_the_program(start):
    first = free_range(5)
    a, b, c, d, e = range(first, first + 5)
    conf = start.write("gunicorn.conf.py", f"import gunicorn_passenger as p\np.configure(ports='{a}-{c}')\n")
    start.write("program.py", f"passenger.configure(ports='{b}-{e}')")
    process = start.gunicorn(
        "anything", "-c", conf, workers=1, env={"PASSENGER_PORTS": f"{a}-{b},{d}"}
    ).wait_ready()
    assert outcomes(process, a, b, c, d, e) == [
        "PortNotAllocated", "had", "PortNotAllocated", "PortNotAllocated", "PortNotAllocated",
    ]  # fmt: skip
    process.wait_log(
        rf"configure\(\) in gunicorn.conf.py names ports {c}, which PASSENGER_PORTS does not allocate"
    )
    # the program cannot get around the master
    status, text = fetch(
        process.socket,
        "/eval",
        "POST",
        f"__import__('gunicorn_passenger.serving.registry').serving.registry.registry.broker.open_port("
        f"__import__('gunicorn_passenger.config.address').config.address.Tcp('127.0.0.1', {c}), 'x')",
    )
    assert status == 500
    assert f"PortNotAllocated: port {c} is not allocated" in text


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_a_variable_that_is_set_but_empty_allocates_no_port(monkeypatch, text):
    """PASSENGER_PORTS=$PORTS with PORTS unset must not allow every port."""
    monkeypatch.setenv("PASSENGER_PORTS", text)
    allocation = Settings().operator_allocation(os.geteuid())
    assert allocation.limited
    assert allocation.ports == frozenset()
    with pytest.raises(PortNotAllocated, match="no port is allocated to it"):
        allocation.check(9000)


@pytest.mark.parametrize("name", [name for name in _CHECKS if name != "ports"])
def test_no_other_variable_that_is_set_but_empty_changes_a_setting(monkeypatch, name):
    settings = Settings()
    with monkeypatch.context() as patch:
        patch.delenv(f"PASSENGER_{name.upper()}", raising=False)
        unset = settings._effective(name)
    monkeypatch.setenv(f"PASSENGER_{name.upper()}", " ")
    assert settings._effective(name) == unset
    settings.check_environment()


def test_a_program_that_listens_without_a_port_allocation(start):
    """One line at the first port says that there is no limit, and names the page; with a limit there is none."""
    start.write(
        "two.py",
        """
        import os
        import gunicorn_passenger as passenger
        from answering import application

        for name in ("P1", "P2"):
            passenger.create_server(application).listen(int(os.environ[name]))
        """,
    )
    path = f"{start.home}:{start.environment['PYTHONPATH']}"
    first, second = free_port(), free_port()
    said = "No port allocation is set, so the program may open any unprivileged port"
    for ports in ({}, {"PASSENGER_PORTS": f"{first},{second}"}):
        process = start.gunicorn(
            "two", env={"P1": first, "P2": second, "PYTHONPATH": path, **ports}
        ).wait_ready()
        process.wait_log(rf"Opened 127.0.0.1:{second} ")
        process.stop()
        assert process.log().count(said) == (not ports)
        assert process.log().count("docs/reference/ports.md") == (not ports)


def test_an_empty_allocation_opens_nothing(start, port):
    start.write(
        "program.py",
        f"""
        for place in ({port}, "auto"):
            try:
                passenger.create_server(whoami).listen(place)
            except OSError as error:
                print("refused:", error.errno, error, flush=True)
        """,
    )
    process = start.gunicorn("anything", workers=1, env={"PASSENGER_PORTS": ""}).wait_ready()
    process.wait_log(
        rf"refused: {errno.EACCES} port {port} is not allocated to account \S+: no port is allocated to it "
        r"\(set by PASSENGER_PORTS\); to allow this one, add it to PASSENGER_PORTS and restart"
    )
    process.wait_log(r"refused: \d+ listen\('auto'\) found no free port in the port allocation none")
    assert outcomes(process, port) == ["PortNotAllocated"]
    process = start.python(COMMAND, "ports", env={"PASSENGER_PORTS": ""})
    assert process.wait_end() == 0
    assert "allocated  none  (set by PASSENGER_PORTS)" in process.log()


def test_a_reload_takes_a_new_allocation(start):
    first = free_range(2)
    text = "import gunicorn_passenger as p\np.configure(ports='{}')\n"
    conf = start.write("gunicorn.conf.py", text.format(first))
    process = start.gunicorn("anything", "-c", conf, workers=1).wait_ready()
    assert outcomes(process, first, first + 1) == ["had", "PortNotAllocated"]
    start.write("gunicorn.conf.py", text.format(first + 1))
    process.hup(1)
    assert outcomes(process, first, first + 1) == ["PortNotAllocated", "had"]
    # a bad value is reported, and the previous one stays in force
    start.write("gunicorn.conf.py", "raw_env = ['PASSENGER_GRACE_PERIOD=soon']\n" + text.format(first))
    process.hup(1)
    process.wait_log(
        "PASSENGER_GRACE_PERIOD: 'soon' is not a number of seconds; the previous settings stay in force"
    )
    assert outcomes(process, first, first + 1) == ["PortNotAllocated", "had"]


needs_root = pytest.mark.skipif(
    not IS_ROOT and "CI" not in os.environ, reason="a master that runs as root needs root"
)


def nobodys_home(home):
    """A home that the account nobody may use, with the modules that an unprivileged worker has to read."""
    home.chmod(0o1777)


@needs_root
def test_root_master_with_workers_of_nobody(start, home):
    """An allocated port below 1024, and nothing else."""
    low = next(p for p in range(700, 1000) if refused(p))
    nobodys_home(home)
    process = start.gunicorn(
        "anything",
        "-u",
        "nobody",
        "-g",
        "nogroup",
        workers=2,
        env={"PASSENGER_PORTS": f"{low},{free_port()}"},
    )
    start.write("program.py", f"passenger.create_server(whoami).listen({low})")
    process.wait_ready()
    assert len(pids_answering(low, 2)) == 2
    nobody = pwd.getpwnam("nobody").pw_uid
    for worker in process.workers():
        assert os.stat(f"/proc/{worker}").st_uid == nobody
    assert outcomes(process, low + 1, 22, 8080) == ["PortNotAllocated"] * 3
    status, text = fetch(process.socket, "/eval", "POST", f"passenger.listen('unix:{home}/x.sock', whoami)")
    assert status == 500
    assert "cannot be opened: the workers run as nobody, but the master runs as another user" in text
    assert "account nobody" in fetch(process.socket, "/eval", "POST", "passenger.listen(22, whoami)")[1]
    process.hup(2)
    assert len(pids_answering(low, 2)) == 2


@needs_root
def test_root_master_without_an_allocation_gives_no_privileged_port(start, home):
    nobodys_home(home)
    high = free_port()
    process = start.gunicorn("anything", "-u", "nobody", workers=1).wait_ready()
    assert outcomes(process, 80, high) == ["PortNotAllocated", "had"]


@needs_root
def test_a_master_without_the_right_to_bind_low_says_so(start, home):
    process = start.run(
        require("setpriv"), "--bounding-set=-net_bind_service", sys.executable, GUNICORN, "-k", "gunicorn_passenger.Worker",
        "--umask", "007", "-b", f"unix:{home}/app.sock", "anything", env={"PASSENGER_PORTS": "81"},
    ).wait_ready()  # fmt: skip
    status, text = fetch(process.socket, "/eval", "POST", "passenger.listen(81, whoami)")
    assert status == 500
    assert "cannot listen on 127.0.0.1:81: Permission denied; the master has no permission to bind it" in text


@needs_root
def test_system_file_bounds_all_others(start, home):
    """In a mount namespace of its own, so that the machine's file is not touched."""
    first = free_range(3)
    (home / "etc").mkdir()
    (home / "etc/ports.toml").write_text(f'root = "{first}-{first + 1}"\n')
    (home / "etc/ports.toml").chmod(0o644)
    private = start.write(
        "private.sh",
        f"""\
        set -e
        mkdir -p /etc/gunicorn-passenger
        mount --bind {home}/etc /etc/gunicorn-passenger
        exec "$@"
        """,
    )
    made = not os.path.exists("/etc/gunicorn-passenger")
    try:
        process = start.run(
            require("unshare"), "-m", "sh", private, sys.executable, GUNICORN, "-k", "gunicorn_passenger.Worker",
            "-w", 1, "--umask", "007", "-b", f"unix:{home}/app.sock", "anything",
            env={"PASSENGER_PORTS": f"{first + 1}-{first + 2}"},
        ).wait_ready()  # fmt: skip
        assert outcomes(process, first, first + 1, first + 2) == [
            "PortNotAllocated",
            "had",
            "PortNotAllocated",
        ]
        text = fetch(process.socket, "/eval", "POST", f"passenger.listen({first + 2}, whoami)")[1]
        assert "(set by /etc/gunicorn-passenger/ports.toml)" in text
        assert "ask root to add it to /etc/gunicorn-passenger/ports.toml" in text
        process.wait_log(
            rf"PASSENGER_PORTS names ports {first + 2}, which /etc/gunicorn-passenger/ports.toml does"
        )

        listed = start.run(
            require("unshare"), "-m", "sh", private, sys.executable, COMMAND, "ports", "--json"
        )
        assert listed.wait_end() == 0
        report = json.loads(listed.log())
        assert report["account"] == "root"
        assert report["allocated"] == f"{first}-{first + 1}"
        assert report["set_by"] == ["/etc/gunicorn-passenger/ports.toml"]

        (home / "etc/ports.toml").chmod(0o666)
        broken = start.run(
            require("unshare"), "-m", "sh", private, sys.executable, GUNICORN, "-k", "gunicorn_passenger.Worker",
            "-b", f"unix:{home}/broken.sock", "anything",
        )  # fmt: skip
        assert broken.wait_end() == 1
        assert "Reason: /etc/gunicorn-passenger/ports.toml: has mode 0666" in broken.log()
        assert "Traceback" not in broken.log()
        assert not os.path.exists(f"{home}/broken.sock")
    finally:
        if made and os.path.isdir("/etc/gunicorn-passenger") and not os.listdir("/etc/gunicorn-passenger"):
            os.rmdir("/etc/gunicorn-passenger")


def test_ports_command(start):
    first = free_range(3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        process = start.python(COMMAND, "ports", "--json", env={"PASSENGER_PORTS": f"{first}-{first + 2}"})
        assert process.wait_end() == 0
        report = json.loads(process.log())
        user = pwd.getpwuid(os.geteuid()).pw_name
        with open(f"/proc/{os.getpid()}/comm") as file:
            name = file.read().strip()
        assert report == {
            "account": user,
            "limited": True,
            "allocated": f"{first}-{first + 2}",
            "set_by": ["PASSENGER_PORTS"],
            "free": f"{first},{first + 2}",
            "taken": [
                {
                    "port": first + 1,
                    "by": name,
                    "pid": os.getpid(),
                    "user": user,
                    "application": None,
                    "server": None,
                    "daemon": None,
                }
            ],
        }
        process = start.python(COMMAND, "ports", env={"PASSENGER_PORTS": f"{first}-{first + 2}"})
        assert process.wait_end() == 0
        assert process.log().splitlines() == [
            f"account    {user}",
            f"allocated  {first}-{first + 2}  (set by PASSENGER_PORTS)",
            f"free       {first},{first + 2}",
            f"taken      {first + 1}  by {name} (pid {os.getpid()}, user {user})",
        ]


def test_ports_command_without_an_allocation(start):
    process = start.python(COMMAND, "ports")
    assert process.wait_end() == 0
    assert "no port allocation is set: any unprivileged port is allowed" in process.log()


def test_ports_command_with_a_bad_environment(start):
    process = start.python(COMMAND, "ports", env={"PASSENGER_PORTS": "x"})
    assert process.wait_end() == 1
    assert process.log().startswith("Error: PASSENGER_PORTS: cannot read 'x'")
    assert process.log().count("\n") == 1


def test_bound_ports_need_no_allocation(start):
    """What the operator names in ``bind`` he has allocated; the host is his word too."""
    port = free_port()
    process = start.gunicorn(
        "two_servers", "-b", f"0.0.0.0:{port}", env={"P1": port, "PASSENGER_PORTS": "9"}
    ).wait_ready()
    assert answers(port)
    assert process.stop() == 0
