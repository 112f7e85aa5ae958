"""gunicorn with proxies before one scripted upstream, shared by the tests of a module; and strict readers of HTTP."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_for
from free_ports import free_port, reservation_of
from http_client import fetch, refused
from processes import Process, Starter, descriptors, starting
from upstream_sockets import Upstream, Wire, connect

PROGRAM = """
import os
import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

UP, HOST, HOME = {up}, "127.0.0.1", {home!r}
UNIX = "unix:" + HOME + "/up.sock"

def status(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]

passenger.create_server(status).listen({status})
P = {{}}
"""

#: The three places of a proxy: the primary on its UNIX socket, a second server on TCP, inside an app on TCP.
PLACES = {"primary": "UP, HOST", "second": "UP, HOST", "inside": "UP, HOST"}
ALL = pytest.mark.parametrize("where", list(PLACES))
#: The same, and a proxy whose upstream listens on a UNIX socket.
EVERYWHERE = pytest.mark.parametrize("where", [*PLACES, "to_unix"])

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

_numbers = itertools.count(1)


def path() -> str:
    """A path that no other test asks for, to find its lines in the log."""
    return f"/n{next(_numbers)}n"


def get(target: str = "/", *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    """A request's head."""
    lines = [f"{method} {target} HTTP/{version}", "Host: client.example", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Message:
    """A message, read by its framing and nothing guessed."""

    def __init__(self, raw: bytes) -> None:
        assert raw.endswith(b"\r\n\r\n"), raw
        self.raw = raw
        self.line, *lines = raw[:-4].decode("latin-1").split("\r\n")
        self.fields = parse_fields(lines)
        self.body = b""
        self.wire_body = b""
        self.trailers: list[tuple[str, str]] = []

    @property
    def status(self) -> int:
        return int(self.line.split(" ")[1])

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.line.split(" ")[1]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        """The one value."""
        values = self.all(name)
        assert len(values) < 2, (name, values)
        return values[0] if values else None

    def names(self) -> list[str]:
        return [name.lower() for name, _ in self.fields]

    def __repr__(self) -> str:
        return f"<{self.line} {self.fields} {self.body[:80]!r}>"


def parse_fields(lines: list[str]) -> list[tuple[str, str]]:
    fields = []
    for line in lines:
        match = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*", line)
        assert match, line
        fields.append((match[1], match[2]))
    return fields


def read_body(wire: Wire, message: Message, close_delimited: bool) -> Message:
    codings, lengths = message.all("transfer-encoding"), message.all("content-length")
    assert not (codings and lengths), message
    if codings:
        assert [c.lower() for c in codings] == ["chunked"], codings
        message.wire_body = wire.chunked()
        message.body, message.trailers = dechunk(message.wire_body)
    elif lengths:
        assert len(lengths) == 1, message
        assert re.fullmatch("[0-9]+", lengths[0]), message
        message.body = wire.exactly(int(lengths[0]))
    elif close_delimited:
        message.body = wire.rest()
    return message


def dechunk(raw: bytes) -> tuple[bytes, list[tuple[str, str]]]:
    """Data and trailers of a chunked body."""
    pieces = []
    while True:
        line, _, raw = raw.partition(b"\r\n")
        assert re.fullmatch(rb"[0-9A-Fa-f]+(;.*)?", line), line
        size = int(line.partition(b";")[0], 16)
        if not size:
            *lines, last, rest = raw.decode("latin-1").split("\r\n")
            assert (last, rest) == ("", ""), raw
            return b"".join(pieces), parse_fields(lines)
        pieces.append(raw[:size])
        assert raw[size : size + 2] == b"\r\n", raw[:100]
        raw = raw[size + 2 :]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def request_of(wire: Wire) -> Message:
    """The next request, whole."""
    return read_body(wire, Message(wire.head()), False)


def response_of(wire: Wire, method: str = "GET") -> Message:
    """The next response, whole; interim ones are messages of their own."""
    message = Message(wire.head())
    if method == "HEAD" or message.status in (204, 304) or message.status < 200:
        return message
    return read_body(wire, message, True)


def final_of(wire: Wire, method: str = "GET") -> Message:
    """The response behind all interim ones."""
    while (message := response_of(wire, method)).status < 200:
        assert message.status != 101, message
    return message


def cut_off(wire: Wire) -> bytes:
    """All until the connection ends, however it ends."""
    data, wire.data = wire.data, b""
    with contextlib.suppress(ConnectionError):
        while piece := wire.sock.recv(65536):
            data += piece
    return data


def came(wire: Wire, seconds: float = 0.2) -> bytes:
    """What comes within a short time; empty if nothing does. Only to show that nothing comes."""
    data, wire.data = wire.data, b""
    if data:
        return data
    before = wire.sock.gettimeout()
    wire.sock.settimeout(seconds)
    try:
        return wire.sock.recv(65536)
    except TimeoutError:
        return b""
    finally:
        wire.sock.settimeout(before)


class Settling(Upstream):
    """At its end the proxy has seen that its connections are gone before the next test listens on the port.

    The proxy sends a request once more that a test has left unanswered; the next test must not get it.
    """

    def __init__(self, where: int | str, status: int) -> None:
        super().__init__(where)
        self.status = status

    def __exit__(self, *_: Any) -> None:
        for wire in self.wires:
            self._end(wire.sock)
        with contextlib.suppress(OSError):
            for _turn in range(3):
                fetch(self.status)
        super().__exit__()

    @staticmethod
    def _end(sock: socket.socket) -> None:
        """End a connection, and see the proxy end it too: on a busy machine the news takes its time."""
        with sock, contextlib.suppress(OSError):
            sock.settimeout(1.0)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass


class Proxied:
    """gunicorn with a proxy in each place of ``servers`` (name to arguments of ``create_server``)."""

    def __init__(
        self, starter: Starter, servers: dict[str, str], before: str, after: str, arguments: tuple[Any, ...]
    ) -> None:
        self.up, self.status = free_port(), free_port()
        # between two tests no process listens on the first, and other test processes look for free ports
        self.reservations = [reservation_of(self.up), reservation_of(self.status)]
        self.home = starter.home
        self.unix = f"{self.home}/up.sock"
        self.ports = {name: free_port() for name in servers if name != "primary"}
        text = PROGRAM.format(up=self.up, home=str(self.home), status=self.status) + before
        for name, made in servers.items():
            text += f"\nP[{name!r}] = http_proxy.create_server({made})\n"
            if name == "primary":
                text += "application = P['primary'].listen('passenger')\n"
            elif name.startswith("inside"):
                text += (
                    f"def {name}(environ, start_response):\n"
                    f"    return P[{name!r}].{'ws' if name.endswith('_ws') and 'no' not in name else 'web'}"
                    "(environ, start_response)\n"
                    f"passenger.create_server({name}).listen({self.ports[name]})\n"
                )
            else:
                text += f"P[{name!r}].listen({self.ports[name]})\n"
        starter.write("program.py", "")
        (self.home / "program.py").write_text(text + after)
        self.process: Process = starter.gunicorn("program", "--keep-alive", 30, *arguments, workers=1)
        self.process.wait_ready(self.status)
        wait_for(
            lambda: not refused(self.process.socket) and not any(refused(p) for p in self.ports.values()),
            "the ports",
        )
        self.mark = 0

    @property
    def worker(self) -> int:
        (pid,) = self.process.workers()
        return pid

    def __getitem__(self, where: str) -> Any:
        """The address of a proxy."""
        return self.process.socket if where == "primary" else self.ports[where]

    def upstream(self) -> Upstream:
        return Settling(self.up, self.status)

    def unix_upstream(self) -> Upstream:
        Path(self.unix).unlink(missing_ok=True)
        return Settling(self.unix, self.status)

    def exchange(
        self, request: bytes, answer: bytes = OK, where: str = "primary", method: str | None = None
    ) -> tuple[Message, Message]:
        """One request and its answer: what the upstream got, and what the client."""
        method = method or request.split(b" ")[0].decode()
        with self.upstream() as upstream, connect(self[where]) as client:
            client.send(request)
            wire = upstream.accept()
            got = request_of(wire)
            wire.send(answer)
            return got, final_of(client, method)

    def lines(self, part: str) -> list[str]:
        """The proxy's lines in the log that have ``part``."""
        return [line for line in self.process.log().splitlines() if "proxy: " in line and part in line]

    def one_line(self, target: str, pattern: str) -> str:
        """Wait for the line about a request, and show that it is the only one."""
        wait_for(lambda: self.lines(target), lambda: f"a line with {target} in\n{self.process.log()[-3000:]}")
        fetch(self.status)  # the worker has had another turn
        (line,) = self.lines(target)
        assert re.search(pattern, line), line
        return line

    def quiet(self) -> None:
        """Nothing but the proxy's own lines went wrong since the last look."""
        text = self.process.log()[self.mark :]
        self.mark += len(text)
        for word in ("Traceback", "[CRITICAL]", "Worker exiting", "WORKER TIMEOUT"):
            assert word not in text, text

    def sockets(self) -> int:
        return sum(name.startswith("socket:") for name in descriptors(self.worker))

    def pipes(self) -> int:
        return sum(name.startswith("pipe:") for name in descriptors(self.worker))

    def rss(self) -> int:
        """The worker's memory, in bytes."""
        text = Path(f"/proc/{self.worker}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) * 1024


@contextlib.contextmanager
def proxied(servers: dict[str, str], *arguments: Any, before: str = "", after: str = "") -> Iterator[Proxied]:
    """Start one, and end it whatever happens."""
    with starting() as starter:
        yield Proxied(starter, servers, before, after, arguments)


@contextlib.contextmanager
def background(function: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """Run beside the test; what it raises fails the test, unless that has failed itself."""
    outcome: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield outcome
    thread.join(60)
    assert not thread.is_alive(), "the other side has not ended"
    if errors:
        raise errors[0]


def fill(sock: socket.socket, data: bytes, bound: int) -> int:
    """Send until nothing more is taken; how much it was. Fails beyond the bound."""
    before = sock.gettimeout()
    sock.settimeout(0.5)
    sent = 0
    view = memoryview(data)
    try:
        while True:
            sent += sock.send(view[sent % len(data) :])
            assert sent <= bound, f"{sent} bytes were taken, and none of them was read"
    except TimeoutError:
        return sent
    finally:
        sock.settimeout(before)


def buffers() -> int:
    """What the kernel may hold of one TCP connection, both ends."""
    total = 0
    for name in ("tcp_rmem", "tcp_wmem"):
        total += int(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()[2])
    return total


def elapsed(since: float) -> float:
    return time.monotonic() - since


def wait_read(wire: Wire) -> None:
    """Wait until the other end of a TCP connection has read all that was sent to it."""

    def address(pair: tuple[str, int]) -> str:
        return f"{socket.inet_aton(pair[0])[::-1].hex().upper()}:{pair[1]:04X}"

    theirs, ours = address(wire.sock.getpeername()), address(wire.sock.getsockname())

    def unread() -> int:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            if (local, remote) == (theirs, ours):
                return int(queues.partition(":")[2], 16)
        return 0

    wait_for(lambda: not unread(), "the other side to read")


def cpu(pid: int) -> float:
    """Seconds of a processor that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def upstream_for(px, where):
    return px.unix_upstream() if where == "to_unix" else px.upstream()


def name_of(px, where="primary"):
    return f"unix:{px.unix}" if where == "to_unix" else f"http://127.0.0.1:{px.up}"


def asked(client, upstream, request=None, answer=OK):
    """One exchange on a connection that the proxy makes for it."""
    client.send(request or get())
    wire = upstream.accept()
    request_of(wire)
    wire.send(answer)
    assert final_of(client).status == int(answer.split(b" ")[1])
    return wire
