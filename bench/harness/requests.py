"""Requests to a server's UNIX socket, the first of which tells that it serves."""

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

from . import PATIENCE, Failed
from .processes import Command, running, wait_for
from .site import Site
from .usage import family

#: The response of every contestant to the smallest request.
HELLO = b"Hello World!"


class UnixConnection(http.client.HTTPConnection):
    """A connection to a server's UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=2 * PATIENCE)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def connection_to(site: Site) -> http.client.HTTPConnection:
    if site.port:
        return http.client.HTTPConnection("127.0.0.1", site.port, timeout=2 * PATIENCE)
    return UnixConnection(site.socket)


def fetch(
    connection: http.client.HTTPConnection, path: str = "/", wanted: bytes | None = None,
    body: bytes | None = None, closing: bool = False,
) -> bytes:  # fmt: skip
    """Make one request, a POST if it has a body; the body of the response.

    :param closing: whether the server is to close the connection.
    :raises Failed: if the response is not a 200, or its body is not the one that is wanted.
    """
    method = "POST" if body else "GET"
    try:
        connection.request(method, path, body, {"Connection": "close"} if closing else {})
        response = connection.getresponse()
        content = response.read()
    except http.client.HTTPException as error:
        raise Failed(f"{method} {path}: no response: {error!r}") from error
    if response.status != 200 or wanted not in (None, content):
        raise Failed(f"{method} {path}: a wrong response, with status {response.status}")
    return content


@contextlib.contextmanager
def serving(
    command: Command, site: Site, cwd: Path, path: str, wanted: bytes, body: bytes | None = None,
    closing: bool = False, **variables: object,
) -> Iterator[list[int]]:  # fmt: skip
    """Start a server on its core and end it again; in between, it answers. Its processes, the worker last."""
    with running(command, site.home, cwd, site.core, **variables) as process:
        with contextlib.closing(connection_to(site)) as connection:
            wait_for(process, connection.connect, "it accepted connections")
            fetch(connection, path, wanted, body, closing)
            if connection.sock is None and not closing:
                raise Failed("the server closes the connection")
        yield family(process.pid)
