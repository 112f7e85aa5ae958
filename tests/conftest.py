"""What the tests start: real gunicorn processes on free ports, ended by pid, with nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import KNOWN_SETTINGS

KNOWN_NAMES = {setting.name for setting in KNOWN_SETTINGS}

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parent.parent

#: The console scripts beside the Python that runs the tests (USR2 starts argv[0] again, so no ``-m``).
GUNICORN = Path(sys.executable).parent / "gunicorn"
COMMAND = Path(sys.executable).parent / "gunicorn-passenger"

#: gunicorn's control socket (a thread and descriptors of its own in the master), for tests that count.
NO_CONTROL = ["--no-control-socket"] if "control_socket_disable" in KNOWN_NAMES else []

#: Seconds that any condition may take to come true on a loaded machine.
PATIENCE = 60.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the combinations of parameters that ``@pytest.mark.leave_out(predicate)`` says make no sense."""
    gone = []
    for item in items:
        for mark in item.iter_markers("leave_out"):
            params = item.callspec.params  # type: ignore[attr-defined]
            if mark.args[0](**{name: params[name] for name in inspect.signature(mark.args[0]).parameters}):
                gone.append(item)
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


def wait_for(condition: Callable[[], Any], what: object = "the condition", timeout: float = PATIENCE) -> Any:
    """Call ``condition`` until it returns something true, and return that; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s for {what() if callable(what) else what}")
        time.sleep(0.02)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job ignores it, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Abstract UNIX sockets that reserve the ports this test process was given: other test processes of the
#: machine see them, and they are gone with the process.
_reserved: dict[int, socket.socket] = {}
#: How many ports a test process keeps for itself: each costs it a descriptor.
_RESERVED = 300


def _reserve(port: int) -> bool:
    """Take a port for this test process, if no other process holds it on any address."""
    if port in _reserved:
        return False
    token = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        token.bind(f"\0gunicorn-passenger-test-port-{port}")
        with socket.socket(socket.AF_INET6) as probe:
            # without SO_REUSEADDR, so that a port on which connections are in TIME_WAIT is not given out:
            # tests bind these ports without it, too
            probe.bind(("::", port))
    except OSError:
        token.close()
        return False
    _reserved[port] = token
    if len(_reserved) > _RESERVED:
        # it has long been used: a server listens there, or its test is over, or another process keeps the token
        _reserved.pop(next(iter(_reserved)))
    return True


def kept(port: int) -> socket.socket:
    """What reserves a port that was given out just now, for as long as it is kept."""
    return _reserved[port]


def free_port() -> int:
    """A TCP port that no process holds, below the range that the kernel gives to clients."""
    return free_range(1)


def free_range(count: int) -> int:
    """The first of ``count`` such ports in a row."""
    while True:
        first = 10240 + int.from_bytes(os.urandom(2), "big") % 20000
        if all(_reserve(port) for port in range(first, first + count)):
            return first


def require(program: str) -> str:
    """The path of a further program that a test needs; without it the test says so, and in CI it fails."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        assert "CI" not in os.environ, f"{program} is missing"
        pytest.skip(f"{program} is not installed")
    return path


class Client(http.client.HTTPConnection):
    """One HTTP connection to a port, ``(host, port)``, or the path of a UNIX socket."""

    def __init__(self, where: Any, timeout: float = 30.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self.where = where

    def connect(self) -> None:
        if isinstance(self.where, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self.where)
        else:
            address = ("127.0.0.1", self.where) if isinstance(self.where, int) else self.where
            self.sock = socket.create_connection(address, self.timeout)


def fetch(
    where: Any, path: str = "/", method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, str]:
    """One request on a connection of its own; status and body."""
    client = Client(where)
    try:
        client.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = client.getresponse()
        return response.status, response.read().decode()
    finally:
        client.close()


def refused(where: Any) -> bool:
    """Whether no process listens there."""
    try:
        with contextlib.suppress(ConnectionResetError):  # it is closed as we come
            Client(where, timeout=5).connect()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return False


def answers(where: Any) -> bool:
    """Whether a request is answered there now."""
    try:
        return fetch(where)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def pids_answering(where: Any, wanted: int, path: str = "/") -> set[str]:
    """Ask until ``wanted`` different bodies (the programs answer with their pid) have come."""
    seen: set[str] = set()

    def ask() -> bool:
        status, body = fetch(where, path)
        assert status == 200, body
        seen.add(body)
        return len(seen) >= wanted

    wait_for(ask, lambda: f"{wanted} workers to answer, seen {seen}")
    return seen


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process point to."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


class Process:
    """A program under test, its log, and its end."""

    def __init__(
        self, arguments: list[str], home: Path, env: dict[str, str], cwd: Path, **options: Any
    ) -> None:
        self.home = home
        self.logfile = home / f"log-{time.monotonic_ns()}"
        self.socket = str(home / "app.sock")
        with self.logfile.open("wb") as log:
            self.popen = subprocess.Popen(
                arguments,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self.pid = self.popen.pid

    def log(self) -> str:
        return self.logfile.read_text(errors="replace")

    def wait_log(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait until the log has ``count`` matches; returns the last."""

        def look() -> re.Match[str] | None:
            found = list(re.finditer(pattern, self.log()))
            if len(found) >= count:
                return found[-1]
            if self.popen.poll() is not None and len(found) < count:
                # one more look: it may have been written since
                found = list(re.finditer(pattern, self.log()))
                assert len(found) >= count, f"ended without {pattern!r}:\n{self.log()}"
            return None

        result: re.Match[str] = wait_for(look, lambda: f"{pattern!r} x {count} in\n{self.log()}")
        return result

    def wait_ready(self, where: Any = None) -> Process:
        """Wait until the program answers on ``where`` (its UNIX socket)."""
        where = where or self.socket

        def ready() -> bool:
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.log()}"
            return answers(where)

        wait_for(ready, lambda: f"an answer on {where}:\n{self.log()}")
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def hup(self, workers: int, where: Any = None) -> None:
        """Reload, and wait until the old workers are gone."""
        before = set(self.workers())
        self.signal(signal.SIGHUP)
        wait_for(
            lambda: len(self.workers()) == workers and not before & set(self.workers()),
            lambda: f"the reload; log:\n{self.log()[-3000:]}",
        )

    def workers(self) -> list[int]:
        """The pids of the master's children."""
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
                return [int(pid) for pid in file.read().split()]
        except FileNotFoundError:
            return []

    def session(self) -> list[int]:
        """All processes that this one has started, by their session."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/stat") as file:
                        fields = file.read().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(int(name))
        return found

    def wait_end(self) -> int:
        """Wait for the end of the process; its exit status."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end:\n{self.log()[-6000:]}") from None

    def stop(self) -> int:
        """SIGTERM; the exit status. Fails when a process is left over."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGTERM)
        status = self.wait_end()
        wait_for(lambda: not self.session(), lambda: f"processes left over: {self.session()}", 10)
        return status

    def end(self) -> list[int]:
        """Clean up, whatever state the test left; what had to be killed."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(20)
        left = self.session()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.popen.kill()
        self.popen.wait()
        return left


class Starter:
    """Starts programs for one test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[Process] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PASSENGER_", "GUNICORN_"))},
            "HOME": str(home),
            "PASSENGER_RUNTIME_DIR": str(home / "run"),
            "PYTHONPATH": str(PROGRAMS),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("PORT", None)
        self.environment.pop("XDG_RUNTIME_DIR", None)

    def write(self, name: str, text: str) -> Path:
        """A file of this test's own, such as a program or a ``gunicorn.conf.py``."""
        path = self.home / name
        path.write_text(textwrap.dedent(text))
        return path

    def run(self, *arguments: object, cwd: Path | None = None, **options: Any) -> Process:
        """Start any program; ``env`` adds to the environment."""
        env = {**self.environment, **{k: str(v) for k, v in options.pop("env", {}).items()}}
        process = Process([str(a) for a in arguments], self.home, env, cwd or self.home, **options)
        self.started.append(process)
        return process

    def python(self, *arguments: object, **options: Any) -> Process:
        """Start the Python that runs the tests."""
        return self.run(sys.executable, *arguments, **options)

    def gunicorn(
        self, app: str, *arguments: object, workers: int = 2, bind: str = "", **options: Any
    ) -> Process:
        """Start gunicorn with our worker on a UNIX socket (or ``bind``)."""
        default = ["-b", bind or f"unix:{self.home}/app.sock"]
        return self.python(
            GUNICORN, "-k", "gunicorn_passenger.Worker", "-w", workers,
            "--umask", "007", *default, *arguments, app, **options,
        )  # fmt: skip

    def start_script(self, script: object, *arguments: object, **options: Any) -> Process:
        """``gunicorn-passenger start`` on the home's UNIX socket."""
        return self.python(
            COMMAND, "start", script, "-b", f"unix:{self.home}/app.sock",
            "--umask", "007", *arguments, **options,
        )  # fmt: skip


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory with a short path (UNIX sockets have 107 bytes), removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="gp-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start(home: Path) -> Iterator[Starter]:
    """Starts programs and ends them, also when the test fails."""
    starter = Starter(home)
    yield starter
    left = {process.pid: process.end() for process in starter.started}
    left = {pid: pids for pid, pids in left.items() if pids}
    assert not left, f"processes had to be killed: {left}"


@pytest.fixture
def port() -> int:
    return free_port()
