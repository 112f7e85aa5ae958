"""Requests to the programs under test."""

from __future__ import annotations

import contextlib
import http.client
import socket
from typing import Any

from conditions import wait_for


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


def accepted(client: Client | socket.socket) -> bool:
    """Whether a process has accepted this connection; until then the kernel says inode 0."""
    sock = client if isinstance(client, socket.socket) else client.sock
    port = sock.getsockname()[1]
    with open("/proc/net/tcp") as file:
        lines = [line.split() for line in list(file)[1:]]
    return any(fields[2].endswith(f":{port:04X}") and fields[9] != "0" for fields in lines)


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
