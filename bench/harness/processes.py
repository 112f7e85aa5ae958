"""Servers and other processes: how they start and end."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from . import PATIENCE, Failed, PortTaken
from .site import clean_environment
from .usage import all_processes

#: Seconds that a server has to stop.
STOPPING = 10.0

Command = Sequence[object]


def gunicorn_command(
    worker: str, app: str, address: int | Path, *options: object, python: object = sys.executable,
    workers: int = 1,
) -> Command:  # fmt: skip
    """:param address: a port of 127.0.0.1, or the path of a UNIX socket."""
    bind = f"127.0.0.1:{address}" if isinstance(address, int) else f"unix:{address}"
    return [
        python, "-m", "gunicorn", "-k", worker, "-w", workers, "-b", bind, "--umask", "0077",
        "--no-control-socket", *options, app,
    ]  # fmt: skip


def pinned(core: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, [core])


@contextlib.contextmanager
def running(
    command: Command,
    home: Path,
    cwd: Path,
    core: int | None = None,
    stdout: int | None = None,
    **variables: object,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, on one core if it is given; at the end of the block it is gone, with all that it started.

    What fails in the block is reported with the end of the server's log, which is in ``home``.

    :param variables: of its environment.
    :raises PortTaken: if the block failed and the log says that a port is in use.
    """

    def in_child() -> None:
        if core is not None:
            os.sched_setaffinity(0, [core])
        # it ends when the benchmark ends, however that ends (prctl(2), PR_SET_PDEATHSIG)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    log = home / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=stdout or file, stderr=file,
            cwd=cwd, env=clean_environment(home, **variables), start_new_session=True, preexec_fn=in_child,
        )  # fmt: skip
    try:
        yield process
    except (Failed, OSError) as error:
        text = log.read_text(errors="replace")
        lines = [line[:200] for line in text.splitlines() if line.strip()]
        taken = re.search(r"EADDRINUSE|[Aa]ddress already in use|is in use by", text)
        kind = PortTaken if taken else Failed
        raise kind("\n    ".join([str(error), *lines[-5:]])) from error
    finally:
        stop_session(process)


def stop_session(process: subprocess.Popen[bytes]) -> None:
    """End a server with all that it started: its session, which tells them from others."""
    process.terminate()
    try:
        process.wait(STOPPING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid, fields in all_processes():
        if int(fields[3]) == process.pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    if process.stdout:
        process.stdout.close()


def wait_for(process: subprocess.Popen[Any], condition: Callable[[], object], what: str) -> None:
    """Wait while a condition is ``False`` or raises an :class:`OSError`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if condition() is not False:
                return
        if process.poll() is not None:
            raise Failed(f"the server ended with status {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise Failed(f"waited {PATIENCE:g} s until {what}")
        time.sleep(0.01)


def spoken_line(output: IO[bytes] | None, what: str, wanted: str = "") -> str:
    """The next line of a program's standard output, which has to be the one that is wanted."""
    line = output.readline().decode().strip() if output else ""
    if line != (wanted or line) or not line:
        raise Failed(f"{what}: {line or 'no report'}")
    return line
