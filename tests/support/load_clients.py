"""The clients of a storm: steady traffic on a program's servers, and a record of every request that fails.

Runs in: a process of its own (``python load_clients.py PLACES``), started by :mod:`storm_site`. Tests that need one such connection
use :class:`Connection` by itself.

What counts as a failure, on every request of every client:

- ``refused``: no process listens;
- ``reset``: the connection was reset, or closed before any byte of the answer to its first request;
- ``truncated``: the response ended too early, in its head or its body;
- ``timeout``: nothing came for ``SILENCE`` seconds;
- ``wrong``: another status than 200, other framing than HTTP's, or other bytes than those that were asked for.

A request on a *reused* connection that meets a clean close before any byte of its response is not one: HTTP lets a server
close an idle connection at any time (RFC 9112 section 9.5), and the client asks again on another. It is counted by itself.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Seconds after which a silent server counts as a failure.
SILENCE = 45.0

KINDS = ("refused", "reset", "truncated", "timeout", "wrong")

#: The parts of an answer.
HEAD, BODY = "head", "body"

#: The same bytes as in programs/storm_app.py.
CONTENT = random.Random(1).randbytes(1 << 20)
UPLOAD = CONTENT[: 1 << 18]

Address = Any  # the path of a UNIX socket, or a port of 127.0.0.1


class ClosedIdle(Exception):
    """A reused connection was closed cleanly before any byte of the answer."""


class Lost(Exception):
    """A request failed; ``args`` are the kind and what was seen."""


@dataclass
class Failure:
    """A request that failed, by the monotonic clock of the machine."""

    kind: str
    place: str
    what: str
    text: str
    #: when its connection was opened, when it was asked, and when it failed
    opened: float
    begun: float
    ended: float
    #: the worker that had answered on the connection, 0 if none had; the client's port, 0 on a UNIX socket
    worker: int = 0
    port: int = 0

    def __str__(self) -> str:
        took = self.ended - self.begun
        return (
            f"{self.kind}: {self.what} on {self.place} after {took:.3f} s, worker {self.worker}: {self.text}"
        )


class Connection:
    """A client's connection, on a socket of gevent's, with as little as possible between it and the system."""

    def __init__(self, address: Address, timeout: float = SILENCE, receive_buffer: int = 0) -> None:
        from gevent import socket as gsocket

        self.opened = time.monotonic()
        self.port = self.worker = 0
        #: answers that came whole, and whether any byte has come from the server
        self.answers = 0
        self.met = False
        self.must_close = False
        self._buffer = b""
        self._sock = gsocket.socket(gsocket.AF_UNIX if isinstance(address, str) else gsocket.AF_INET)
        self._sock.settimeout(timeout)
        if receive_buffer:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self._sock.connect(address if isinstance(address, str) else ("127.0.0.1", address))
            if not isinstance(address, str):
                self.port = self._sock.getsockname()[1]
        except (ConnectionRefusedError, FileNotFoundError) as error:
            self.close()
            raise Lost("refused", str(error)) from None
        except TimeoutError:
            self.close()
            raise Lost("timeout", "no connection") from None
        except OSError as error:
            self.close()
            raise Lost("reset", f"while connecting: {error}") from None

    def close(self) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except TimeoutError:
            raise Lost("timeout", "while sending") from None
        except OSError as error:
            # what the server said before it closed decides what this was
            self._fill(HEAD, f"while sending, {error}")

    def _fill(self, part: str, where: str = "") -> None:
        """Read some more of an answer, of its head or its body."""
        where = where or f"in the {part}"
        try:
            data = self._sock.recv(65536)
        except TimeoutError:
            raise Lost("timeout", where) from None
        except OSError as error:
            raise Lost("reset", f"{where}: {error}") from None
        if not data:
            if self._buffer or part == BODY:
                raise Lost("truncated", f"closed {where}")
            if self.answers:
                raise ClosedIdle
            raise Lost("reset", f"closed before any answer, {where}")
        self.met = True
        self._buffer += data

    def head(self) -> dict[str, str]:
        """The head of the next answer: its fields, by name in lower case, and ``status``."""
        while b"\r\n\r\n" not in self._buffer:
            self._fill(HEAD)
        text, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = text.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        fields["status"] = first.split()[1] if len(first.split()) > 1 else first
        if fields["status"] == "100":
            return self.head()
        self.worker = int(fields.get("x-worker", "0"))
        self.must_close = fields.get("connection", "").lower() == "close"
        if fields["status"] != "200":
            raise Lost("wrong", first)
        return fields

    def wait_continue(self) -> None:
        """Wait for ``100 Continue``."""
        while b"\r\n\r\n" not in self._buffer:
            self._fill(HEAD)
        if not self._buffer.startswith(b"HTTP/1.1 100 "):
            raise Lost("wrong", f"no 100 Continue: {self._buffer[:40]!r}")
        self._buffer = self._buffer.partition(b"\r\n\r\n")[2]

    def body(self, fields: dict[str, str], pause: float = 0.0) -> bytes:
        """The body of an answer; with a pause after each read of it."""
        import gevent

        data = bytearray()
        if "content-length" in fields:
            wanted = int(fields["content-length"])
            while len(self._buffer) < wanted:
                gevent.sleep(pause)
                self._fill(BODY)
            data += self._buffer[:wanted]
            self._buffer = self._buffer[wanted:]
        elif fields.get("transfer-encoding") == "chunked":
            while chunk := self._chunk(pause):
                data += chunk
        else:
            raise Lost("wrong", "neither Content-Length nor chunks")
        if self._buffer:
            raise Lost("wrong", f"{len(self._buffer)} bytes behind the answer")
        self.answers += 1
        return bytes(data)

    def _chunk(self, pause: float) -> bytes:
        import gevent

        while b"\r\n" not in self._buffer:
            self._fill(BODY)
        line, _, rest = self._buffer.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        while len(rest) < size + 2:
            gevent.sleep(pause)
            self._buffer = line + b"\r\n" + rest
            self._fill(BODY)
            rest = self._buffer.partition(b"\r\n")[2]
        if rest[size : size + 2] != b"\r\n":
            raise Lost("wrong", "a chunk that does not end where it says")
        self._buffer = rest[size + 2 :]
        return rest[:size]


def request(path: str, *fields: str, method: str = "GET") -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: storm", *fields, "", ""]).encode()


class Clients:
    """All clients of the traffic. Each is a greenlet that asks again and again."""

    def __init__(self, places: dict[str, Address]) -> None:
        self.places = places
        #: (place, what) -> answers that were right; and which worker sent them
        self.answered: Counter[tuple[str, str]] = Counter()
        self.workers: dict[str, set[int]] = {place: set() for place in places}
        self.requests = self.closed_idle = 0
        #: seconds of the slowest small answer
        self.slowest = 0.0
        self.failures: list[Failure] = []
        self._draining = False
        self._connections: set[Connection] = set()
        self._connecting = 0
        self._greenlets: list[Any] = []
        self._dice = random.Random(2)
        self._numbers = iter(range(1 << 60))

    def start(self) -> None:
        import gevent

        for place in self.places:
            clients: list[Callable[[str], None]] = [self._new] * 3 + [self._busy] * 3 + [self._idling] * 2
            for framing in ("sized", "chunked"):
                clients.append(lambda p, f=framing: self._download(p, f, slow_server=True))  # type: ignore[misc]
                clients.append(lambda p, f=framing: self._download(p, f, slow_server=False))  # type: ignore[misc]
                clients.append(lambda p, f=framing: self._upload(p, f, expect=False))  # type: ignore[misc]
                clients.append(lambda p, f=framing: self._upload(p, f, expect=True))  # type: ignore[misc]
            self._greenlets += [gevent.spawn(self._loop, client, place) for client in clients]

    def _loop(self, client: Callable[[str], None], place: str) -> None:
        import gevent

        gevent.sleep(self._dice.random())
        while not self._draining:
            client(place)

    def _pause(self, most: float) -> None:
        import gevent

        gevent.sleep(self._dice.random() * most)

    # --- the kinds of clients --------------------------------------------------------------------

    def _new(self, place: str) -> None:
        """A connection with one request."""
        self._converse(place, "new", lambda c: self._small(c, "Connection: close"), 1)
        self._pause(0.06)

    def _busy(self, place: str) -> None:
        """Many requests on a connection, with short pauses."""
        self._converse(place, "kept", self._small, self._dice.randrange(20, 200), 0.05)

    def _idling(self, place: str) -> None:
        """A connection that mostly idles."""
        self._converse(place, "idle", self._small, self._dice.randrange(2, 12), 0.8)

    def _small(self, connection: Connection, *fields: str) -> None:
        token = f"n={next(self._numbers)}"
        begun = time.monotonic()
        connection.send(request(f"/?{token}", *fields))
        self._check(connection.body(connection.head()), token.encode())
        self.slowest = max(self.slowest, time.monotonic() - begun)

    def _download(self, place: str, framing: str, slow_server: bool) -> None:
        """1 MB that takes one or two seconds: the server takes its time, or the client does."""
        pause = 0.0 if slow_server else 0.025
        path = f"/down?framing={framing}&pause={self._dice.uniform(0.03, 0.05) if slow_server else 0}"

        def ask(connection: Connection) -> None:
            connection.send(request(path))
            self._check(connection.body(connection.head(), pause), CONTENT)

        self._converse(place, f"down {framing}", ask, 1, receive_buffer=0 if slow_server else 16384)

    def _upload(self, place: str, framing: str, expect: bool) -> None:
        """256 kB that take a second or two."""
        import gevent

        fields = [f"Content-Length: {len(UPLOAD)}" if framing == "sized" else "Transfer-Encoding: chunked"]
        size = len(UPLOAD) // 16
        pause = self._dice.uniform(0.06, 0.12)

        def ask(connection: Connection) -> None:
            connection.send(request("/up", *fields, *["Expect: 100-continue"] * expect, method="POST"))
            if expect:
                connection.wait_continue()
            for start in range(0, len(UPLOAD), size):
                gevent.sleep(pause)
                piece = UPLOAD[start : start + size]
                connection.send(b"%x\r\n%s\r\n" % (size, piece) if framing == "chunked" else piece)
            if framing == "chunked":
                connection.send(b"0\r\n\r\n")
            wanted = {"length": len(UPLOAD), "sha256": hashlib.sha256(UPLOAD).hexdigest()}
            self._check(connection.body(connection.head()), json.dumps(wanted).encode())

        self._converse(place, f"up {framing}", ask, 1)

    @staticmethod
    def _check(came: bytes, wanted: bytes) -> None:
        if came != wanted:
            raise Lost("wrong", f"{len(came)} bytes that are not the {len(wanted)} that were asked for")

    # --- what all of them do ---------------------------------------------------------------------

    def _converse(
        self,
        place: str,
        what: str,
        ask: Callable[[Connection], None],
        times: int,
        pause: float = 0.0,
        receive_buffer: int = 0,
    ) -> None:
        """Ask so many times on one connection. Once the clients are draining, until the server has closed it."""
        begun = time.monotonic()
        connection: Connection | None = None
        try:
            self._connecting += 1
            try:
                connection = Connection(self.places[place], receive_buffer=receive_buffer)
                self._connections.add(connection)
            finally:
                self._connecting -= 1
            while times > 0 or (self._draining and pause):
                begun = time.monotonic()
                self.requests += 1
                ask(connection)
                times -= 1
                self.answered[place, what] += 1
                self.workers[place].add(connection.worker)
                if connection.must_close:
                    connection.close()
                self._pause(pause)
                if connection.must_close:
                    return
        except ClosedIdle:
            self.closed_idle += 1
            self.requests -= 1  # it is asked again
        except Lost as loss:
            kind, text = loss.args
            opened = connection.opened if connection else begun
            worker, port = (connection.worker, connection.port) if connection else (0, 0)
            self.failures.append(
                Failure(kind, place, what, text, opened, begun, time.monotonic(), worker, port)
            )
            self._pause(0.1)
        finally:
            if connection is not None:
                connection.close()
                self._connections.discard(connection)

    def drain(self) -> None:
        """From now on no client connects; returns when the server has met every client that is connected.

        What happens after that happens to clients that were let in.
        """
        import gevent

        self._draining = True
        while self._connecting or not all(connection.met for connection in self._connections):
            gevent.sleep(0.01)

    def finish(self) -> None:
        """Wait until every client has had its answer, and its connection is closed."""
        import gevent

        self._draining = True
        gevent.joinall(self._greenlets, raise_error=True)

    def counts(self) -> dict[str, Any]:
        return {
            "answered": {f"{place}/{what}": count for (place, what), count in self.answered.items()},
            "workers": {place: sorted(pids) for place, pids in self.workers.items()},
            "failed": Counter(f"{failure.place}/{failure.kind}" for failure in self.failures),
        }

    def result(self) -> dict[str, Any]:
        return {
            **self.counts(),
            "requests": self.requests,
            "closed_idle": self.closed_idle,
            "slowest": self.slowest,
            "failures": [vars(failure) for failure in self.failures],
        }


def client_process() -> None:
    """Make traffic until told to finish: a command on each line of the input, an answer on each of the output."""
    import gevent
    from gevent.fileobject import FileObject

    clients = Clients(json.loads(sys.argv[1]))
    clients.start()
    commands = FileObject(sys.stdin.fileno(), "r", close=False)
    for line in commands:
        command = line.strip()
        if command == "drain":
            clients.drain()
        if command == "finish":
            clients.finish()
        answer = clients.result() if command == "finish" else clients.counts()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if command == "finish":
            return
        gevent.sleep(0)


if __name__ == "__main__":
    client_process()
