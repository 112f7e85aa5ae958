"""Workers that do what a test tells them: the program ``obedient``."""

import json
import textwrap

from conditions import wait_for
from free_ports import free_port
from http_client import Client
from unmodified_servers import pid_in


class Told(Exception):
    """What a worker was told to do has failed there."""

    def __init__(self, answer):
        super().__init__(answer["text"])
        self.kinds = answer["error"]
        self.errno = answer["errno"]


class Worker:
    """One worker of the program ``obedient``, on a connection that is kept open."""

    def __init__(self, where):
        self.client = Client(where, timeout=15)
        self.client.request("GET", "/")
        self.pid = pid_in(self.client.getresponse())

    def do(self, code):
        """Run Python there; its ``result``."""
        self.client.request("POST", "/", textwrap.dedent(code))
        answer = json.loads(self.client.getresponse().read())
        if "error" in answer:
            raise Told(answer)
        return answer["result"]


class ObedientWorkers:
    """Starts ``obedient``, with a connection to each of its workers."""

    def __init__(self, start):
        self._start = start
        self._workers = {}

    def __call__(self, count=2, *arguments, **env):
        """The process and its workers."""
        process = self._start.gunicorn(
            "obedient", "--keep-alive", 600, *arguments, workers=count, env=env
        ).wait_ready()
        home = str(self._start.home)

        def connect():
            worker = Worker(process.socket)
            if worker.pid in self._workers:
                worker.client.close()
            self._workers.setdefault(worker.pid, worker)
            return len(self._workers) == count

        wait_for(connect, "a connection to each worker")
        for worker in self._workers.values():
            worker.do(f"import os, socket, threading; port, home = {free_port()}, {home!r}")
        return process, *self._workers.values()

    def close(self):
        for worker in self._workers.values():
            worker.client.close()
