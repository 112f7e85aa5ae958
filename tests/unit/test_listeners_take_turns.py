"""Listeners of one worker take turns, however many clients connect to one of them, and make room for new clients."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.local
import http_model
import pytest
from gevent import monkey
from gevent import socket as gsocket
from gunicorn.config import Config

from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.client_socket import adopt

#: the kernel's own sockets: a client that connects must not let other greenlets run
blocking_socket = monkey.get_original("socket", "socket")
#: how many connections an acceptor accepts at a time
TURN = 16
REQUEST = b"GET / HTTP/1.0\r\nHost: a\r\n\r\n"


class Listener:
    """Serves an application that is called before each response."""

    def __init__(self, path: Path, limit: int = 1000) -> None:
        self.requests = 0
        self.before: Callable[[], object] = lambda: None
        self._path = str(path)
        self._clients: list[Any] = []
        sock = gsocket.socket(socket.AF_UNIX)
        sock.bind(self._path)
        sock.listen(512)
        context = http_model.gateway(Config(), self._serve, self._path)
        self.acceptor = Acceptor(sock, context, limit)
        self.acceptor.start()

    def _serve(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        self.requests += 1
        self.before()
        start_response("200 OK", [("Content-Length", "0")])
        return []

    def connect(self, request: bytes = REQUEST) -> Any:
        """A client connects and sends its request."""
        client = blocking_socket(socket.AF_UNIX)
        client.connect(self._path)
        client.send(request)
        self._clients.append(client)
        return client

    def close(self) -> None:
        self.acceptor.stop_accepting()
        self.acceptor.kill(5)
        for client in self._clients:
            client.close()


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[tuple[Listener, Listener]]:
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(contextlib.closing(Listener(tmp_path / n))) for n in "ab")
        yield first, second


def wait_for(condition: Callable[[], bool]) -> None:
    with gevent.Timeout(60):
        while not condition():
            gevent.sleep(0.001)


def test_a_flood_on_both_is_served_evenly(listeners: tuple[Listener, Listener]) -> None:
    """For each client that is served, another one connects: both listeners always have some that wait."""
    first, second = listeners
    total = 20 * TURN
    seen: list[tuple[int, int]] = []

    def count() -> None:
        if first.requests + second.requests == total:
            seen.append((first.requests, second.requests))

    for listener in listeners:
        listener.before = lambda listener=listener: (seen or listener.connect(), count())
        for _ in range(4 * TURN):
            listener.connect()
    wait_for(lambda: bool(seen))
    assert min(seen[0]) >= 0.45 * total


def test_one_client_is_served_within_a_turn_of_a_flood(listeners: tuple[Listener, Listener]) -> None:
    flooded, quiet = listeners
    done: list[int] = []
    begins = 5 * TURN

    def go_on() -> None:
        if not done and flooded.requests < 100 * TURN:
            flooded.connect()
        if flooded.requests == begins:
            quiet.connect()

    flooded.before = go_on
    quiet.before = lambda: done.append(flooded.requests - begins)
    for _ in range(2 * TURN):
        flooded.connect()
    wait_for(lambda: bool(done))
    assert done[0] <= 2 * TURN


def test_an_idle_connection_makes_room_for_a_client_while_another_response_has_just_ended(
    tmp_path: Path,
) -> None:
    """The greenlet that has served that response does not wake the idle connection's, which would not return."""
    with contextlib.closing(Listener(tmp_path / "a", limit=2)) as listener:
        local = gevent.local.local()
        listener.before = lambda: setattr(local, "kept", True)
        idle = listener.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_for(lambda: listener.requests == 1 and listener.acceptor._longest_idle() is not None)
        others = socket.socketpair()
        with others[1]:

            def fill() -> None:
                if listener.requests == 2:
                    # as when a sibling passes a connection: the limit is reached when this response has ended
                    listener.acceptor.attach(adopt(others[0].detach())[0], "", begun=True)

            listener.before = fill
            clients = [listener.connect() for _ in range(2)]
            wait_for(lambda: listener.requests == 3)
        for client in clients:
            assert client.recv(4096).startswith(b"HTTP/1.0 200 OK")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200 OK")
        wait_for(lambda: not listener.acceptor.listener.idle.longest())
        assert idle.recv(4096) == b""
