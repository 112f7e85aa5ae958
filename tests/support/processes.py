"""Starts the programs under test, and ends them by pid with nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conditions import PATIENCE, wait_for
from gunicorn.config import KNOWN_SETTINGS
from http_client import answers

KNOWN_NAMES = {setting.name for setting in KNOWN_SETTINGS}

PROGRAMS = Path(__file__).parent.parent / "programs"

ROOT = Path(__file__).parent.parent.parent

#: The console scripts beside the Python that runs the tests (USR2 starts argv[0] again, so no ``-m``).
GUNICORN = Path(sys.executable).parent / "gunicorn"

COMMAND = Path(sys.executable).parent / "gunicorn-passenger"

#: gunicorn's control socket (a thread and descriptors of its own in the master), for tests that count.
NO_CONTROL = ["--no-control-socket"] if "control_socket_disable" in KNOWN_NAMES else []

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job ignores it, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


def require(program: str) -> str:
    """The path of a further program that a test needs; without it the test says so, and in CI it fails."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        assert "CI" not in os.environ, f"{program} is missing"
        pytest.skip(f"{program} is not installed")
    return path


def require_package(name: str) -> None:
    """Say that a Python package is missing that a test needs; in CI that is a failure."""
    if importlib.util.find_spec(name) is None:
        assert "CI" not in os.environ, f"the package {name} is missing"
        pytest.skip(f"the package {name} is not installed")


#: The modules of the worker classes that gunicorn's oldest version, or a new Python, does not have.
WORKER_MODULES = {
    "tornado": "tornado",
    "asgi": "gunicorn.workers.gasgi",
    "uvicorn_worker.UvicornWorker": "uvicorn_worker",
}


def require_worker_class(name: str) -> None:
    """Skip the test where that worker class is not installed."""
    module = WORKER_MODULES.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def check_reachable_for_others() -> None:
    """Fail where another user cannot reach the checkout: its workers could not import their program."""
    for path in (ROOT, *ROOT.parents):
        assert path.stat().st_mode & 0o011 == 0o011, f"others cannot reach {ROOT}: chmod go+x {path}"


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process point to."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def listens(pid: int, port: int) -> bool:
    """Whether a process has a socket open that listens on the port; one that has ended has none."""
    inodes = set()
    with open("/proc/net/tcp") as file:
        for line in list(file)[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):
                inodes.add(f"socket:[{fields[9]}]")
    try:
        return bool(inodes & set(descriptors(pid)))
    except OSError:
        return False


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
        self.log_begin = 0

    def log(self) -> str:
        """What was logged since the start, or since the last :meth:`begin_log`."""
        return self.logfile.read_text(errors="replace")[self.log_begin :]

    def begin_log(self) -> Process:
        """A test begins that shares the program with others: the log begins here."""
        self.log_begin += len(self.log())
        return self

    def wait_log(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait until the log has ``count`` matches; returns the last."""
        searched = -1

        def look() -> re.Match[str] | None:
            nonlocal searched
            size = self.logfile.stat().st_size
            if size != searched:
                searched = size
                found = list(re.finditer(pattern, self.log()))
                if len(found) >= count:
                    return found[-1]
            if self.popen.poll() is not None:
                # one more look: it may have been written since
                found = list(re.finditer(pattern, self.log()))
                assert len(found) >= count, f"ended without {pattern!r}:\n{self.log()}"
                return found[-1]
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
        self.kill()
        return left

    def kill(self) -> None:
        """End all processes at once. Those of Python first write the stacks of their threads into the log."""
        # faulthandler is on, and neither gunicorn nor a program handles this signal
        for number in (signal.SIGBUS, signal.SIGKILL):
            for pid in self.session():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.session(), timeout=5)
        with contextlib.suppress(ProcessLookupError):
            self.popen.kill()
        self.popen.wait()

    def log_end(self, most: int = 150) -> str:
        """The last lines of the log, for the report of a test that failed."""
        try:
            lines = self.logfile.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return f"{self.logfile} is gone"
        return "\n".join([f"--- the log of {self.pid}, {len(lines)} lines, ends with:", *lines[-most:]])


class Starter:
    """Starts programs for one test."""

    #: Those that have not ended, the ones of whole modules first.
    open: ClassVar[list[Starter]] = []

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[Process] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PASSENGER_", "GUNICORN_"))},
            "HOME": str(home),
            "PASSENGER_RUNTIME_DIR": str(home / "run"),
            "PYTHONPATH": str(PROGRAMS),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONFAULTHANDLER": "1",
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
        if {"-u", "--user"} & set(map(str, arguments)):
            check_reachable_for_others()
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


@contextlib.contextmanager
def starting() -> Iterator[Starter]:
    """A Starter with a directory of its own. At the end all that it started is ended.

    The directory has a short path, because the path of a UNIX socket has at most 107 bytes.
    """
    home = Path(tempfile.mkdtemp(prefix="gp-", dir="/tmp"))
    home.chmod(0o755)
    starter = Starter(home)
    Starter.open.append(starter)
    try:
        yield starter
    finally:
        Starter.open.remove(starter)
        for process in starter.started:
            with contextlib.suppress(ProcessLookupError):
                process.popen.terminate()
        left = {process: pids for process in reversed(starter.started) if (pids := process.end())}
        logs = "\n".join(process.log_end() for process in left)
        shutil.rmtree(home, ignore_errors=True)
    assert not left, f"processes had to be killed: {list(left.values())}\n{logs}"
