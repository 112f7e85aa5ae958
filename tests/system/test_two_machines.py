"""Socket.IO on two machines, which are network namespaces, with one Redis, and nginx of the documentation in front."""

import itertools
import os
import re
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest
import requests
import socketio
from chatters import Chatter
from conditions import wait_for
from free_ports import free_port
from http_client import answers
from peer_servers import nginx, wait_listening
from processes import GUNICORN, ROOT, require, starting
from status_commands import status

MACHINES = ("web1", "web2")
needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")


class Machine:
    """A network namespace, behind a link to this one, which a test can cut."""

    def __init__(self, name, number):
        self.name = name
        self.space = f"gp{os.getpid()}{name}"
        self.link = f"gp{number}x{os.getpid()}"
        net = f"10.{213 + number}.{os.getpid() % 256}"
        self.here, self.address = f"{net}.1", f"{net}.2"

    def __enter__(self):
        ip("netns", "add", self.space)
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self):
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("address", "add", f"{self.here}/24", "dev", self.link)
        ip("link", "set", self.link, "up")
        self.ip("address", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", "eth0", "up")

    def __exit__(self, *_):
        with suppress(subprocess.CalledProcessError):
            ip("link", "delete", self.link)
        ip("netns", "delete", self.space)

    def ip(self, *words):
        ip("-n", self.space, *words)


def ip(*words):
    subprocess.run([require("ip"), *words], check=True, timeout=30)


class Site:
    def __init__(self, start, machines):
        redis, self.front = free_port(), free_port()
        self.start, self.machines = start, machines
        words = [require("redis-server"), "--port", redis, "--save", "", "--protected-mode", "no"]
        wait_listening(
            start.run(*words, "--bind", *(one.here for one in machines)), (machines[0].here, redis)
        )
        for one in machines:
            start.run(
                require("ip"), "netns", "exec", one.space, sys.executable, GUNICORN,
                "-k", "gunicorn_passenger.Worker", "-w", 2, "-b", "0.0.0.0:8000", "two_machines_app",
                env={"MACHINE": one.name, "REDIS_URL": f"redis://{one.here}:{redis}/0"},
            )  # fmt: skip
        for one in machines:
            wait_for(lambda one=one: answers((one.address, 8000)), lambda: start.started[-1].log())
        page = (ROOT / "docs/how-to/socketio.md").read_text()
        block = re.search(r"```nginx\n(.*?)```", page, re.DOTALL)[1]
        for number, one in enumerate(machines, 1):
            # how long nginx waits until it tries a machine again is not what this is about
            block = block.replace(f"10.0.0.1{number}:8000", f"{one.address}:8000 fail_timeout=1s")
        block = block.replace("listen 80;", f"listen 127.0.0.1:{self.front};")
        nginx(start, "front", block, self.front)
        self.count = itertools.count()
        self.chatters = []

    def join(self, transport):
        self.chatters.append(Chatter(self.front, [transport]))

    def reaches(self, machine):
        """Whether the machine gets the next new session; no client uses that."""
        url = f"http://127.0.0.1:{self.front}/socket.io/?EIO=4&transport=polling"
        return f".{machine}." in requests.get(url, timeout=30).text

    def sessions(self):
        """Of each client the worker's pid and the session's id; false while one has none."""
        found = [chatter.whoami() for chatter in self.chatters]
        return all(found) and found

    def hosts(self):
        """The machine of each client; empty while one has none."""
        return [sid.split(".")[1] for _, sid in self.sessions() or ()]

    def broadcast(self):
        """Each client in turn speaks to all, and every client hears everything once."""
        while not self.heard_by_all([next(self.count) for _ in self.chatters]):
            pass  # a client had to connect again: this machine was too busy for its pings

    def heard_by_all(self, said):
        """False when a client got another session meanwhile."""
        before = wait_for(self.sessions)
        for chatter in self.chatters:
            chatter.news.clear()
        with suppress(socketio.exceptions.SocketIOError):
            for number, chatter in zip(said, self.chatters, strict=True):
                chatter.call("all", number)
        wait_for(
            lambda: all({*said} <= {*one.news} for one in self.chatters) or self.sessions() != before,
            lambda: f"{said}, heard {[one.news for one in self.chatters]}",
        )
        if self.sessions() != before:
            return False
        # without what Redis has kept for a machine that was away
        heard = [sorted(number for number in one.news if number in said) for one in self.chatters]
        assert heard == [said] * len(self.chatters)
        return True

    def unknown(self):
        return sum(application["mailboxes"]["unknown"] for application in status(self.start))


@needs_root
def test_clients_of_two_machines_hear_each_other_and_outlive_one():
    with ExitStack() as stack:
        machines = [stack.enter_context(Machine(name, n)) for n, name in enumerate(MACHINES)]
        site = Site(stack.enter_context(starting()), machines)
        stack.callback(lambda: [chatter.client.disconnect() for chatter in site.chatters])
        for transport in ["polling", "websocket"] * 2:
            site.join(transport)
        assert set(wait_for(site.hosts)) == set(MACHINES)
        site.broadcast()
        assert site.unknown() == 0
        # its sessions are lost, and the clients have new ones on the other machine
        machines[0].ip("link", "set", "eth0", "down")
        wait_for(lambda: set(site.hosts()) == {"web2"}, site.hosts)
        site.broadcast()
        machines[0].ip("link", "set", "eth0", "up")
        wait_for(lambda: answers((machines[0].address, 8000)))
        # nginx tries it again after a second
        wait_for(lambda: site.reaches("web1"))
        while "web1" not in wait_for(site.hosts):
            assert len(site.chatters) < 20
            site.join("polling")
        site.broadcast()
        # what a web server does that does not look at the ids
        sids = [chatter.client.eio.sid for chatter in site.chatters]
        sid, other = next(sid for sid in sids if ".web1." in sid), machines[1]
        before = site.unknown()
        url = f"http://{other.address}:8000/socket.io/?EIO=4&transport=polling&sid={sid}"
        response = requests.get(url, timeout=30)
        assert (response.status_code, "Invalid session" in response.text) == (400, True)
        wait_for(lambda: site.unknown() > before)
