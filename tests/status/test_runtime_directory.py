"""The runtime directory: which users may ask, and what another user may have put there."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import traceback

import pytest
from conditions import stopped, wait_for
from http_client import fetch, pids_answering
from processes import COMMAND, require
from status_commands import ask, command, control_socket, only, status

from gunicorn_passenger import cli
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.status import control_client
from gunicorn_passenger.system import listening_sockets, runtime_dir

needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")


# --- which users may ask, and which masters are believed ---------------------------------------------


def as_nobody(function):
    """Call a function as another user, in a child; what it returns as text, or ``error <type>``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                said = str(function())
            except Exception as error:
                said = f"error {type(error).__name__}"
            os.write(write, said.encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@needs_root
def test_another_user_gets_nothing(start, home, monkeypatch):
    home.chmod(0o755)
    process = start.gunicorn("status_app", workers=1).wait_ready()
    path = control_socket(start, process)
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(home / "run"))
    assert len(control_client.find()) == 1
    assert as_nobody(control_client.find) == "[]"
    assert as_nobody(lambda: ask(path, b'{"command": "report"}\n')) == "error PermissionError"
    assert as_nobody(lambda: os.listdir(path.parent)) == "error PermissionError"
    # and even where the directory and the file let them: the kernel says which user it is
    path.parent.chmod(0o755)
    path.chmod(0o666)
    assert as_nobody(lambda: ask(path, b'{"command": "report"}\n')) in ("b''", "error BrokenPipeError")
    assert as_nobody(lambda: ask(path, b'{"command": "stop", "name": "x"}\n')) in (
        "b''",
        "error BrokenPipeError",
    )
    done = subprocess.run(
        [require("setpriv"), "--reuid", "65534", "--clear-groups", require("curl"), "-s", "--max-time", "10",
         "--unix-socket", str(path), "http://x/"], capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == b""
    assert done.returncode != 0


@needs_root
def test_a_directory_of_another_user_is_not_trusted(home, monkeypatch):
    """An attacker has made the directory in /tmp before, with a socket that lies."""
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(home / "run"))
    (home / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(home / "run" / f"{os.getpid()}.sock"))
        sock.listen()
        assert runtime_dir.directories() == [str(home / "run")]
        os.chown(home / "run", 65534, 65534)
        assert runtime_dir.directories() == []
        assert control_client.find() == []
        os.chown(home / "run", 0, 0)
        (home / "run").chmod(0o777)
        assert control_client.find() == []


@needs_root
@pytest.mark.parametrize("what", ["directory", "writable", "socket"])
def test_a_status_socket_of_another_user_is_not_trusted(start, home, what):
    run = home / "run"
    run.mkdir(mode=0o700)
    if what == "directory":
        os.chown(run, 65534, 65534)
    elif what == "writable":
        run.chmod(0o777)
    else:
        run.rmdir()
        run.write_text("a file")
    process = start.gunicorn("status_app", workers=2).wait_ready()
    pids_answering(process.socket, 2)
    lines = [
        line for line in process.log().splitlines() if "'gunicorn-passenger status' will not find" in line
    ]
    assert len(lines) == 1
    assert "set PASSENGER_RUNTIME_DIR" in lines[0]
    assert status(start) == []
    process.hup(2)
    assert fetch(process.socket)[0] == 200
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@needs_root
def test_read_only_runtime_directory(start, home):
    """The log says so and the application runs; a reload tries again."""
    run = home / "run"
    run.mkdir(mode=0o700)
    script = f'mount -t tmpfs -o ro,mode=700 tmpfs {run} && exec "$@"'
    process = start.run(
        require("unshare"), "-m", "sh", "-c", script, "sh", sys.executable,
        os.path.join(os.path.dirname(sys.executable), "gunicorn"), "-k", "gunicorn_passenger.Worker", "-w", "2",
        "--umask", "007", "-b", f"unix:{home}/app.sock", "status_app",
    ).wait_ready()  # fmt: skip
    process.wait_log("'gunicorn-passenger status' will not find this application.*Read-only file system")
    process.hup(2)
    process.wait_log("'gunicorn-passenger status' will not find this application.*Read-only file system", 2)
    assert fetch(process.socket)[0] == 200
    subprocess.run(
        [require("nsenter"), "-m", "-t", str(process.pid), "mount", "-o", "remount,rw", str(run)],
        check=True, timeout=30,
    )  # fmt: skip
    process.hup(2)
    found = subprocess.run(
        [require("nsenter"), "-m", "-t", str(process.pid), sys.executable, COMMAND, "status", "--json"],
        env=start.environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(found.stdout)["applications"][0]["pid"] == process.pid
    assert process.stop() == 0


def test_a_directory_that_cannot_be_made(start, home):
    process = start.gunicorn(
        "status_app", workers=1, env={"PASSENGER_RUNTIME_DIR": "/proc/nowhere/run"}
    ).wait_ready()
    process.wait_log("will not find this application, which otherwise runs normally: .*cannot be created")
    assert process.stop() == 0


def test_a_path_that_is_too_long(start, home):
    process = start.gunicorn(
        "status_app", workers=1, env={"PASSENGER_RUNTIME_DIR": f"{home}/{'x' * 100}"}
    ).wait_ready()
    process.wait_log("will not find this application.*AF_UNIX path too long")
    assert process.stop() == 0


def test_found_by_itself_wherever_the_service_has_put_it(start, home):
    """The command line's environment is not that of the service."""
    process = start.gunicorn("status_app", workers=1).wait_ready()
    env = {k: v for k, v in start.environment.items() if k != "PASSENGER_RUNTIME_DIR"}
    done = subprocess.run(
        [sys.executable, COMMAND, "status", "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.pid in [application["pid"] for application in json.loads(done.stdout)["applications"]]


def test_a_master_that_does_not_answer(start):
    """It is shown, and does not keep the others from being shown."""
    process = start.gunicorn("status_app", workers=1).wait_ready()
    with stopped(process.pid):
        done = command(start, "status")
        assert f"pid {process.pid}: does not respond (no response within 10 s)" in done.stdout
        assert done.returncode == 0
        done = command(start, "stop", "x")
        assert done.returncode == 1
        assert f"the master with pid {process.pid} did not respond" in done.stderr
    assert only(start)["pid"] == process.pid


# --- directories that other users have made ----------------------------------------------------------


SCRIPT = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *_): pass

HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


@needs_root
def test_a_script_starts_although_another_user_has_the_runtime_directory(start, home):
    """gunicorn-passenger start with -b needs no such directory; without -b it says so."""
    (home / "run").mkdir(mode=0o755)
    os.chown(home / "run", 65534, 65534)
    script = start.write("server.py", SCRIPT)
    process = start.start_script(script, "-w", "1").wait_ready()
    process.wait_log("WARNING.*will not find this application.*must belong to you.*set PASSENGER_RUNTIME_DIR")
    assert process.stop() == 0
    without = start.python(COMMAND, "start", script)
    assert without.wait_end() != 0
    assert "must belong to you, and only you may write to it" in without.log()
    assert "or name another address with -b" in without.log()
    assert "Traceback" not in without.log()
    assert os.listdir(home / "run") == []


@pytest.fixture
def squatted(home, monkeypatch):
    """What another user has made where this one's runtime directory would be in /tmp."""
    path = home / f"gunicorn-passenger-{os.geteuid()}"
    monkeypatch.setattr(runtime_dir, "_in_tmp", lambda: str(path))
    monkeypatch.setattr(runtime_dir.os, "access", lambda *_: False)
    for name in ("PASSENGER_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    return path


def make_another_users(path, what):
    if what == "directory":
        path.mkdir(mode=0o755)
    elif what == "closed":
        path.mkdir(mode=0o700)
    elif what == "file":
        path.write_text("")
    elif what == "dangling":
        path.symlink_to("/nowhere")
    else:
        path.symlink_to(path.parent)
    os.chown(path, 65534, 65534, follow_symlinks=False)


@needs_root
@pytest.mark.parametrize("what", ["directory", "closed", "file", "dangling", "link"])
def test_a_directory_with_a_name_that_cannot_be_foreseen_stands_in(squatted, what):
    make_another_users(squatted, what)
    said = []
    path = runtime_dir.ensure(said.append)
    assert re.fullmatch(rf"{re.escape(str(squatted))}-[a-z0-9_]{{8}}", path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert len(said) == 1
    assert f"the runtime directory {squatted} belongs to nobody and cannot be trusted" in said[0]
    # the same one again, and the command line finds it
    assert runtime_dir.ensure() == path
    assert path in runtime_dir.directories()
    assert str(squatted) not in runtime_dir.directories()


@needs_root
def test_another_user_cannot_prepare_the_directory_that_stands_in(squatted):
    make_another_users(squatted, "directory")
    evil = squatted.with_name(f"{squatted.name}-aaaaaaaa")
    make_another_users(evil, "directory")
    open_to_all = squatted.with_name(f"{squatted.name}-bbbbbbbb")
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link = squatted.with_name(f"{squatted.name}-cccccccc")
    link.symlink_to(squatted.parent)
    assert runtime_dir.ensure() not in {str(evil), str(open_to_all), str(link)}


def test_the_directory_for_temporary_files_is_the_one_of_the_environment(start, home, monkeypatch):
    """The command line finds it, although its own environment names none."""
    monkeypatch.setattr(runtime_dir.os, "access", lambda *_: False)
    for name in ("PASSENGER_RUNTIME_DIR", "XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    path = home / f"gunicorn-passenger-{os.geteuid()}"
    path.mkdir(mode=0o700)
    process = start.python("-c", "import signal; signal.pause()", env={"TMPDIR": home})
    wait_for(lambda: str(path) in runtime_dir.directories(), "the environment of the process")
    process.signal(signal.SIGKILL)
    process.wait_end()
    assert str(path) not in runtime_dir.directories()
    monkeypatch.setenv("TMPDIR", "relative")
    assert runtime_dir.directory() == f"/tmp/gunicorn-passenger-{os.geteuid()}"
    monkeypatch.setenv("TMPDIR", f"{home}/")
    assert runtime_dir.directory() == runtime_dir.ensure() == str(path)


@needs_root
def test_a_runtime_directory_below_one_of_another_users(home, monkeypatch):
    """Its owner could put another in its place while root works in it."""
    theirs = home / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    monkeypatch.delenv("PASSENGER_RUNTIME_DIR", raising=False)
    assert not runtime_dir.directory().startswith(str(theirs))
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(theirs / "run"))
    with pytest.raises(PassengerError, match=r"theirs belongs to another user, or others may write to it"):
        runtime_dir.ensure()


# --- a socket whose file another user has replaced ---------------------------------------------------


@pytest.mark.parametrize("what", ["symbolic link", "hard link", "file", "another socket"])
def test_the_file_of_a_socket_that_was_replaced_is_left_alone(home, what):
    target = home / "roots"
    target.write_text("precious")
    target.chmod(0o640)
    path = str(home / "s.sock")
    with contextlib.closing(listening_sockets.open_unix(path, 0o600, 1)):
        file = listening_sockets.inode_id(path)
        os.unlink(path)
        if what == "symbolic link":
            os.symlink(target, path)
        elif what == "hard link":
            os.link(target, path)
        elif what == "file":
            os.rename(target, path)
            target = home / "s.sock"
        else:
            other = socket.socket(socket.AF_UNIX)
            other.bind(str(target) + ".sock")
            os.link(str(target) + ".sock", path)
            other.close()
        with pytest.raises(OSError):
            listening_sockets.give(path, 65534, 65534)
        with pytest.raises(OSError), listening_sockets._own_file(path):
            pass
        listening_sockets.remove(path, file)
        assert os.path.lexists(path)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o640
    assert os.stat(target).st_uid == os.geteuid()


def test_the_file_of_a_socket_is_removed(home):
    path = str(home / "s.sock")
    with contextlib.closing(listening_sockets.open_unix(path, 0o600, 1)):
        file = listening_sockets.inode_id(path)
        listening_sockets.remove(path, None)
        listening_sockets.remove(path, (file[0], file[1] + 1))
        assert os.path.lexists(path)
        listening_sockets.remove(path, file)
        assert not os.path.lexists(path)
        listening_sockets.remove(path, file)
        listening_sockets.remove("nowhere/\0", file)


def test_the_ports_that_other_users_processes_hold_are_printed_without_control_characters(
    monkeypatch, capsys
):
    taken = {"port": 9000, "by": "evil\x1b]0;title\x07\u202e", "pid": 7, "user": "mallory"}
    taken |= {"application": "shop\n", "server": "jobs\x1b", "daemon": None}
    found = {"account": "me", "limited": False, "taken": [taken]}
    monkeypatch.setattr(cli, "port_report", lambda: found)
    assert cli.main(["ports"]) == 0
    printed = capsys.readouterr().out
    assert r"evil\x1b]0;title\x07\u202e" in printed
    assert all(line.isprintable() for line in printed.splitlines())
