"""gunicorn with daemons, and what the tests ask of both."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess

from conditions import wait_for
from processes import COMMAND, GUNICORN

HEAD = "from gunicorn_passenger.hooks import *\nimport gunicorn_passenger as passenger\nimport daemon_jobs\n"


def lives(pid):
    """Whether a process is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(*pids):
    wait_for(lambda: not any(lives(pid) for pid in pids), lambda: [pid for pid in pids if lives(pid)])


def pid_of(process, name, count=1):
    """The pid of a daemon when it has been started for the ``count``-th time."""
    return int(process.wait_log(rf"Daemon {name} runs as pid (\d+)", count).group(1))


def starts(process, name):
    return len(re.findall(rf"Daemon {name} runs as pid", process.log()))


def children(process):
    """The children of a master, whichever of its threads has started them."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/task/{thread}/children") as file:
                found += [int(pid) for pid in file.read().split()]
    return found


def supervisor_of(process):
    def find():
        for pid in children(process):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"daemons/supervisor.py" in file.read():
                    return pid
        return None

    return wait_for(find, "a supervisor")


def workers_of(process):
    found = []
    for pid in children(process):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"daemons/supervisor.py" not in file.read():
                found.append(pid)
    return found


def hup(process, workers=2):
    before = set(workers_of(process))
    process.signal(signal.SIGHUP)
    wait_for(
        lambda: len(workers_of(process)) == workers and not before & set(workers_of(process)),
        lambda: f"the reload; log:\n{process.log()[-3000:]}",
    )


def job(port, text="work"):
    with socket.create_connection(("127.0.0.1", port), 30) as client, client.makefile("rw") as stream:
        stream.write(text + "\n")
        stream.flush()
        return stream.readline().strip()


def daemons(start, process):
    """What ``gunicorn-passenger status`` tells, by name."""
    env = {**start.environment, "PASSENGER_RUNTIME_DIR": str(start.home / "run")}
    done = subprocess.run([COMMAND, "status", "--json"], env=env, capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    found = report if isinstance(report, dict) and "daemons" in report else None
    if found is None:
        listed = report["applications"] if isinstance(report, dict) else report
        found = next(app for app in listed if app["pid"] == process.pid)
    return {daemon["name"]: daemon for daemon in found["daemons"]}


class Site:
    """gunicorn with a configuration file that spawns, and any worker class."""

    def __init__(self, start, worker="sync", workers=2, app="daemon_app", head=HEAD):
        self.start, self.worker, self.workers, self.app, self.head = start, worker, workers, app, head

    def configure(self, text):
        return self.start.write("gunicorn.conf.py", self.head + text)

    def run(self, text, *arguments, **options):
        conf = self.configure(text)
        return self.start.python(
            GUNICORN, "-k", self.worker, "-w", self.workers, "-c", conf, "-b", f"unix:{self.start.home}/app.sock",
            *arguments, self.app, **options,
        )  # fmt: skip
