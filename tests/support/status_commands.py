"""The command gunicorn-passenger status, and the control socket behind it."""

import contextlib
import json
import socket
import subprocess
import sys

from conditions import wait_for
from processes import COMMAND


def command(start, *arguments, **env):
    """The command line in the environment of the test's programs."""
    return subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)],
        env=start.environment | env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def status(start, **env):
    done = command(start, "status", "--json", **env)
    return json.loads(done.stdout)["applications"]


def only(start):
    (application,) = status(start)
    return application


def wait_workers_ready(start, count):
    """Wait until the master knows that so many workers serve; their clients may know it a moment before."""
    wait_for(
        lambda: [worker["state"] for worker in only(start)["workers"]] == ["ready"] * count, "the workers"
    )


def control_socket(start, process):
    return start.home / "run" / f"{process.pid}.sock"


def ask(path, data, wait=True):
    """Send raw bytes to a control socket; all that it answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while wait and (more := sock.recv(65536)):
                received += more
        return received
