"""gunicorn with programs/placed.py, and which of its workers accept on a port."""

import contextlib
import json
import os
import re
import signal

from conditions import wait_for
from http_client import pids_answering
from processes import COMMAND, PROGRAMS


def placed(start, where, placement, workers=3, **env):
    process = start.gunicorn(
        "placed", workers=workers, env={"P1": where, "PLACEMENT": placement, "PYTHONPATH": PATH, **env}
    )
    process.wait_ready()
    pids_answering(process.socket, workers)
    return process


PATH = str(PROGRAMS)


def sockets_of(port, state):
    """The inodes of this machine's sockets on a local port, in a state of /proc/net/tcp."""
    with open("/proc/net/tcp") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    return [line[9] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == state]


def accepting(inode, masters):
    """The workers that wait for connections on a listening socket: it is in their epoll set."""
    return [pid for master in masters for pid in children(master) if pid not in masters and polls(pid, inode)]


def polls(pid, inode):
    with contextlib.suppress(OSError):
        named = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        mine = {name for name, what in named.items() if what == f"socket:[{inode}]"}
        for name, what in named.items():
            if mine and what == "anon_inode:[eventpoll]":
                with open(f"/proc/{pid}/fdinfo/{name}") as file:
                    if mine & set(re.findall(r"tfd:\s+(\d+)", file.read())):
                        return True
    return False


def report(start):
    done = start.python(COMMAND, "status", "--json")
    assert done.wait_end() == 0, done.log()
    (found,) = json.loads(done.log())["applications"]
    return found


def upgrade(process, masters):
    """USR2; the next master's pid, once its three workers serve."""
    before, booted = set(process.workers()), process.log().count("Booting worker")
    process.signal(signal.SIGUSR2)
    (second,) = wait_for(lambda: set(process.workers()) - before, "the next master")
    masters.append(second)
    wait_for(lambda: process.log().count("Booting worker") == booted + 3, "its workers to boot")
    wait_for(
        lambda: len({str(c) for c in children(second)} & pids_answering(process.socket, 6)) == 3,
        "them to answer",
    )
    return second


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []
