"""The program of programs/http_settings_app.py, and requests to it."""

import contextlib
import http.client
import json

from free_ports import free_port
from http_client import Client

#: Seconds that a client of the tests waits for any one thing.
LIMIT = 30


class Answer:
    """One answer, read to its end."""

    def __init__(self, sock, method="GET"):
        response = http.client.HTTPResponse(sock, method=method)
        try:
            response.begin()
            self.status = response.status
            self.reason = response.reason
            self.headers = response.headers
            self.body = response.read()
        finally:
            response.close()

    def json(self):
        return json.loads(self.body)


def dial(address):
    client = Client(address, timeout=LIMIT)
    client.connect()
    return client.sock


def request(target="/show", *lines, method="GET", version="HTTP/1.1", body=b"", close=True):
    """The bytes of a request; ``lines`` stand behind the Host."""
    head = [f"{method} {target} {version}", "Host: localhost", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    if close:
        head.append("Connection: close")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def ask(address, data, method="GET"):
    """Send bytes on a connection of their own."""
    with contextlib.closing(dial(address)) as sock:
        # the server may have refused it and closed before all of it is sent
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return Answer(sock, method)


def ended(sock):
    """Whether the server has ended the connection, by whatever means; waits for it."""
    with contextlib.suppress(ConnectionError):
        return sock.recv(100) == b""
    return True


class Served:
    """The program of these tests, running on its primary and on a second server."""

    def __init__(self, start, *arguments, workers=1, bind="", ready=True, env=None):
        self.second = free_port()
        self.process = start.gunicorn(
            "http_settings_app:application", *arguments, workers=workers, bind=bind,
            env={"P1": self.second, **(env or {})},
        )  # fmt: skip
        self.primary = int(bind.rpartition(":")[2]) if bind else self.process.socket
        if ready:
            self.process.wait_ready(self.primary)
        else:
            self.process.wait_log("Booting worker")

    @property
    def both(self):
        return (self.primary, self.second)

    def show(self, address, *lines, **options):
        answer = ask(address, request("/show", *lines, **options))
        assert answer.status == 200, answer.body
        return answer.json()
