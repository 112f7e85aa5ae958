"""Clients of the UNIX socket that bind their own end to a name of their choosing: it is not an address."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import fetch
from processes import Starter

FORGED = "x\r\n\r\nGET /evil HTTP/1.1\r\nHost: a\r\nX-Role: admin\r\nX: y"

#: a file name below the test's directory, an abstract name, or (empty) a name that the kernel chooses
NAMES: dict[str, Callable[[Path], bytes | str]] = {
    "not utf-8": lambda home: b"\0\xff",
    "every byte": lambda home: b"\0" + bytes(range(100)),
    "autobound": lambda home: "",
    "a request": lambda home: os.fsencode(home / FORGED.replace("/", "\\")),
    "a log line": lambda home: os.fsencode(home / '1.2.3.4 - - "GET _ HTTP_1.1" 200\n9.9.9.9'),
    "an address": lambda home: b"\x00127.0.0.1",
}

APP = """
    import gunicorn_passenger as passenger
    from gunicorn_passenger import http_proxy

    seen = []

    def target(environ, start_response):
        body = repr(sorted((k, v) for k, v in environ.items() if k.startswith(("HTTP_", "REMOTE_ADDR", "PATH_"))))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [body.encode()]

    passenger.create_server(target).listen({port})
    proxy = http_proxy.create_server({port}, xfwd=True, forwarded=True)

    def application(environ, start_response):
        if environ["PATH_INFO"].startswith("/proxy"):
            return proxy(environ, start_response)
        return target(environ, start_response)
"""


def ask(where: str, name: bytes | str, path: str) -> bytes:
    """Two requests over one connection of a client with a name; all that it is sent."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.bind(name)
        client.connect(where)
        for last in (b"", b"Connection: close\r\n"):
            client.sendall(b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path.encode(), last))
        received = b""
        while data := client.recv(65536):
            received += data
        return received


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_with_any_name_is_served_and_does_no_harm(start: Starter, home: Path, workers: int) -> None:
    port = free_port()
    start.write("app.py", APP.format(port=port))
    log = home / "access.log"
    process = start.gunicorn(
        "app", "--access-logfile", log, "--access-logformat", "line %(h)s %(r)s", workers=workers
    ).wait_ready()
    for make in NAMES.values():
        for path in ("/direct", "/proxy"):
            name = make(home)
            received = ask(process.socket, name, path)
            assert received.count(b"HTTP/1.1 200 OK") == 2, received
            assert b"evil" not in received
            assert b"admin" not in received
            if path == "/proxy":
                assert received.count(b"('HTTP_X_FORWARDED_FOR', '127.0.0.1')") == 2, received
            else:
                assert received.count(b"('REMOTE_ADDR', '')") == 2
            if isinstance(name, bytes) and name[:1] != b"\0":
                os.unlink(name)
            # the next clients are answered, by every worker
            for _ in range(3 * workers):
                assert fetch(process.socket)[0] == 200
    wait_for(lambda: log.read_text().count("line  GET /proxy") == 2 * len(NAMES), "the access log")
    # the second server's client is the proxy
    assert all(
        line.startswith(("line  GET /", "line 127.0.0.1 GET /")) for line in log.read_text().splitlines()
    )
    assert "Traceback" not in process.log()
    assert process.stop() == 0


def test_an_idle_client_with_a_name_is_handed_to_the_next_worker(start: Starter, port: int) -> None:
    """The name must not keep the other connections from being handed over, either."""
    start.write("app.py", APP.format(port=port))
    process = start.gunicorn("app", "--keep-alive", "60", "--graceful-timeout", "60").wait_ready()
    clients = []
    try:
        for number in range(12):
            client = socket.socket(socket.AF_UNIX)
            clients.append(client)
            client.settimeout(60)
            if number % 2:
                client.bind("" if number % 4 == 1 else b"\0\xfe%d" % number)
            client.connect(process.socket)
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        process.hup(2)
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for client in clients:
            client.close()
    assert process.stop() == 0
