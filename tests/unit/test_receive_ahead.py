"""On a UNIX socket, the hub receives from all readable connections before it serves the first.

A server, its loop and its clients are in this process, so that a test sees what has been received while an
application runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import gevent
import gevent.local
import http_model
import pytest
from gevent import monkey
from gevent import socket as gsocket
from gunicorn.config import Config

from gunicorn_passenger.http import listener_context, write_coalescing
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.connection_state import ConnectionState

#: the kernel's own sockets: a client that connects must not let other greenlets run
blocking_socket = monkey.get_original("socket", "socket")
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
OK = b"HTTP/1.1 200 OK"
KEPT = gevent.local.local()


class Server:
    """A server that calls ``act`` in each request."""

    def __init__(self, family: int, address: Any) -> None:
        sock = gsocket.socket(family)
        sock.bind(address)
        sock.listen(64)
        self.address = sock.getsockname()
        self.listener = http_model.gateway(Config(), self._app, self.address)
        self.acceptor = Acceptor(sock, self.listener, 1000)
        self.acceptor.start()
        self.act: Callable[[], object] = lambda: None
        self.calls = 0
        self.clients: list[Any] = []

    def _app(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        self.calls += 1
        self.act()
        start_response("200 OK", [("Content-Length", "0")])
        return []

    def connect(self, request: bytes = GET) -> Any:
        client = blocking_socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET)
        client.connect(self.address)
        client.send(request)
        client.setblocking(False)
        self.clients.append(client)
        return client

    def kept(self, count: int) -> list[Any]:
        """Connections that have had a response, and wait for their next request in a greenlet."""
        clients = [self.connect() for _ in range(count)]
        for client in clients:
            wait_for(lambda client=client: response(client))
        self.calls = 0
        return clients

    def received(self) -> list[bool]:
        """Whether the server has received all that each client has sent."""
        return [ioctl(client, termios.TIOCOUTQ, b"\0" * 4) == struct.pack("i", 0) for client in self.clients]

    def close(self) -> None:
        self.acceptor.stop_accepting()
        self.acceptor.kill(5)
        for client in self.clients:
            client.close()


def wait_for(condition: Callable[[], Any]) -> Any:
    with gevent.Timeout(60):
        while not (result := condition()):
            gevent.sleep(0.001)
    return result


def response(client: Any) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return bytes(client.recv(65536))
    return b""


def in_hub(*functions: Callable[[], object]) -> None:
    gevent.get_hub().loop.run_callback(lambda: [function() for function in functions])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(write_coalescing, "_coalescers", {})
    monkeypatch.setattr(listener_context, "_TICK", 600.0)  # no connection is parked
    monkeypatch.setattr(write_coalescing, "_SAMPLE", 1)
    monkeypatch.setattr(write_coalescing, "_QUICKEST", 0.0)
    with contextlib.closing(Server(socket.AF_UNIX, str(tmp_path / "s"))) as made:
        yield made


@pytest.fixture
def quick(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests have been quick for a while."""
    monkeypatch.setattr(write_coalescing, "_SLOWEST", 600.0)
    server.listener.coalescer.quick = write_coalescing._REQUIRED
    server.listener.coalescer.active = server.listener.coalescer.clients_sleep = True


def test_kept_connections_are_received_from_before_the_first_is_served(server: Server) -> None:
    seen = []
    server.act = lambda: seen.append(server.received())
    for client in server.kept(5):
        client.send(GET)
    seen.clear()
    for client in server.clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    assert seen == [[True] * 5] * 5


def test_a_client_that_has_no_time_to_fall_asleep_is_received_from_when_it_is_served(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_coalescing, "_QUICKEST", 600.0)
    seen = []
    server.act = lambda: seen.append(sum(server.received()))
    for client in server.kept(3):
        client.send(GET)
    seen.clear()
    for client in server.clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    assert seen == [1, 2, 3]


def test_a_tcp_connection_is_received_from_when_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_coalescing, "_QUICKEST", 0.0)
    monkeypatch.setattr(write_coalescing, "_SAMPLE", 1)
    with contextlib.closing(Server(socket.AF_INET, ("127.0.0.1", 0))) as server:
        server.kept(1)
        assert server.listener.coalescer.clients_sleep
        assert not server.listener.receives_ahead()


def test_a_proxy_receives_when_it_serves(server: Server) -> None:
    server.kept(1)
    assert server.listener.receives_ahead()
    server.listener.is_proxy = True
    assert not server.listener.receives_ahead()


@pytest.mark.usefixtures("quick")
def test_a_worker_whose_requests_are_quick_accepts_all_clients_before_it_serves_the_first(
    server: Server,
) -> None:
    seen = []
    server.act = lambda: seen.append(server.received())
    clients = [server.connect() for _ in range(5)]
    for client in clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    assert seen == [[True] * 5] * 5


def test_other_clients_are_left_to_the_siblings_until_they_are_served(server: Server) -> None:
    seen = []
    server.act = lambda: seen.append(sum(server.received()))
    clients = [server.connect() for _ in range(3)]
    for client in clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    assert seen == [1, 2, 3]


@pytest.mark.usefixtures("quick")
def test_a_client_that_has_sent_nothing_yet_or_disconnects_delays_no_other(server: Server) -> None:
    late = server.connect(b"")
    gone = server.connect(b"")
    gone.close()
    server.clients.remove(gone)
    half = server.connect(GET[:10])
    client = server.connect()
    assert wait_for(lambda: response(client)).startswith(OK)
    late.send(GET)
    assert wait_for(lambda: response(late)).startswith(OK)
    half.send(GET[10:])
    assert wait_for(lambda: response(half)).startswith(OK)
    wait_for(lambda: len(server.acceptor._connections) == 3)


def test_a_client_that_disconnects_between_two_requests(server: Server) -> None:
    one, other = server.kept(2)
    one.close()
    other.send(GET)
    server.clients.remove(one)
    assert wait_for(lambda: response(other)).startswith(OK)
    wait_for(lambda: len(server.acceptor._connections) == 1)
    assert server.calls == 1


def test_what_happens_before_a_received_request_is_served_does_not_lose_it(server: Server) -> None:
    """The connection becomes too old, has to make room, and the worker drains."""
    first, second = server.kept(2)

    def act() -> None:
        server.act = lambda: None
        (waiting,) = [c for c in server.acceptor._connections if c.buf]
        assert waiting.state is ConnectionState.ACTIVE
        assert waiting.has_input()
        waiting.expire()
        assert server.acceptor.pop_idle_connections(10) == []
        server.acceptor.stop_accepting()

    server.act = act
    for client in (first, second):
        client.send(GET)
    for client in (first, second):
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    assert server.calls == 2
    wait_for(server.acceptor.idle)


def test_a_hub_that_cannot_receive_leaves_it_to_the_greenlet(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []

    class Socket:
        """Fails in the hub, as a system without memory does."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def recv(self, most: int) -> bytes:
            if gevent.getcurrent() is gevent.get_hub():
                failed.append(most)
                raise MemoryError
            return bytes(self.real.recv(most))

    (client,) = server.kept(1)
    (connection,) = server.acceptor._connections
    monkeypatch.setattr(connection, "_raw", Socket(connection._raw))
    client.send(GET)
    assert wait_for(lambda: response(client)).startswith(OK)
    assert len(failed) == 1


def test_a_fault_between_two_connections_leaves_none_of_them_unserved(
    server: Server, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, calls = server.acceptor._next_connection, []

    def fail_once() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a fault")
        return accept()

    monkeypatch.setattr(server.acceptor, "_next_connection", fail_once)
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *error: None)
    clients = [server.connect() for _ in range(2)]
    third = server.connect()
    for client in clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    server.acceptor._resume()
    assert wait_for(lambda: response(third)).startswith(OK)


@pytest.mark.usefixtures("quick")
def test_a_client_that_was_accepted_ahead_and_sends_nothing_does_not_hold_the_drain(server: Server) -> None:
    server.act = server.acceptor.stop_accepting
    client = server.connect()
    server.connect(b"")
    assert wait_for(lambda: response(client)).startswith(OK)
    (silent,) = wait_for(
        lambda: [c for c in server.acceptor._connections if c.state is ConnectionState.PARKED]
    )
    assert len(server.listener.new) == 0
    assert silent.is_new


def test_a_connection_that_ends_makes_room_once(server: Server) -> None:
    """It has kept its greenlet, because its application has kept something in a local."""
    server.act = lambda: setattr(KEPT, "value", 1)
    (leaving,) = server.kept(1)
    (connection,) = server.acceptor._connections
    in_hub(connection.expire)
    wait_for(lambda: len(server.listener.idle) == 1)
    server.acceptor._limit = 1
    leaving.close()
    server.clients.remove(leaving)
    clients = [server.connect() for _ in range(3)]
    most = []
    server.act = lambda: most.append(len(server.acceptor._connections))
    # it is readable before the new clients are accepted, in the same iteration
    in_hub(connection._arrive, server.acceptor._accept)
    for client in clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
        client.close()
        server.clients.remove(client)
    assert most == [1, 1, 1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("new", [True, False], ids=["new", "kept"])
def test_a_forked_child_serves_no_request_that_its_parent_has_received(server: Server, new: bool) -> None:
    clients = [] if new else server.kept(3)
    children: list[int] = []

    def act() -> None:
        if children:
            return
        pid = os.fork()
        if not pid:
            server.acceptor.leave_to_parent()
            server.act = lambda: os._exit(1)
            # after what the hub has to do in this iteration
            gevent.spawn_later(0.05, os._exit, 0)
            gevent.sleep(60)
        children.append(pid)

    server.act = act
    if new:
        clients = [server.connect() for _ in range(3)]
    else:
        for client in clients:
            client.send(GET)
    for client in clients:
        assert wait_for(lambda client=client: response(client)).startswith(OK)
    assert server.calls == 3
    assert os.waitpid(children[0], 0)[1] == 0
