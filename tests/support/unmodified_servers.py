"""Requests to servers that know nothing of this package."""

import http.client
import re
import threading

from conditions import wait_for
from http_client import Client


def pid_in(response):
    """The pid of the worker that sent this response."""
    text = response.read().decode()
    assert response.status == 200, text
    match = re.fullmatch(r'(\d+)|(?s:.*)worker_up\{pid="(\d+)"\}(?s:.*)', text)
    assert match, text
    return int(match[1] or match[2])


def answering(where, workers):
    """Send requests, several at a time, until each of ``workers`` has responded; no other process may."""
    workers = set(workers)
    seen = set()

    def ask():
        clients = [Client(where) for _ in range(2 * len(workers))]
        for client in clients:
            client.request("GET", "/")
        for client in clients:
            seen.add(pid_in(client.getresponse()))
            client.close()
        return seen >= workers

    wait_for(ask, lambda: f"{workers} to respond, seen {seen}")
    assert seen == workers


class Requests:
    """Asks a port again and again, on a connection each time, while the block runs."""

    def __init__(self, where, threads=2):
        self.where = where
        self.pids = []
        self.failures = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self):
        while not self._end.is_set():
            client = Client(self.where)
            try:
                client.request("GET", "/")
                self.pids.append(pid_in(client.getresponse()))
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.failures.append(error)
            finally:
                client.close()
            self._end.wait(0.002)  # the workers need the processor too

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.pids or self.failures, "the first response")
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()
