"""One gunicorn in which tests make proxies, and what they say through them, byte by byte."""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
import select
import socket
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import fetch
from processes import Process, descriptors, starting
from upstream_sockets import PATIENCE, Upstream, Wire, connect

MB = 1 << 20

#: The options are given when the proxy is made, or with each request: the same must come of it.
MODES = pytest.mark.parametrize("mode", ["direct", "routed"])
#: The proxy listens on a UNIX socket or a TCP port: :func:`listening_place`.
WAYS = pytest.mark.parametrize("way", ["unix", "tcp"])

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Message:
    """The head of a request or response as it was on the wire, and its body."""

    def __init__(self, head: bytes, body: bytes = b"") -> None:
        self.head = head
        self.body = body
        self.start, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        self.fields = [(name, value.strip(" ")) for name, _, value in (line.partition(":") for line in lines)]

    def get(self, name: str) -> list[str]:
        """The values of all fields of this name."""
        return [value for field, value in self.fields if field.lower() == name.lower()]

    @property
    def status(self) -> int:
        return int(self.start.split(" ")[1])

    @property
    def path(self) -> str:
        """A request's target."""
        return self.start.split(" ")[1]

    @property
    def text(self) -> bytes:
        """The body without its chunks."""
        if "chunked" not in self.get("transfer-encoding"):
            return self.body
        rest, text = self.body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if not int(size, 16):
                break
            text += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return text

    def __repr__(self) -> str:
        return f"<{self.head!r} {self.body[:200]!r}>"


class Origin:
    """A target that answers every request with its label, and notes what came on which connection."""

    def __init__(
        self, where: int | str, label: bytes = b"ok", host: str = "127.0.0.1", tls: Any = None
    ) -> None:
        self.label = label
        self.tls = tls
        self.requests: list[tuple[int, Message]] = []
        self.peers: list[Any] = []
        self.upstream = Upstream(where, host)
        self.upstream.listener.settimeout(None)
        self.wires: list[Wire] = []
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self.upstream.listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            wire = Wire(sock)
            self.wires.append(wire)
            self.threads.append(
                threading.Thread(target=self._serve, args=[len(self.wires), wire], daemon=True)
            )
            self.threads[-1].start()

    def _serve(self, number: int, wire: Wire) -> None:
        with contextlib.suppress(OSError, AssertionError):
            if self.tls is not None:
                wire.sock = self.tls.wrap_socket(wire.sock, server_side=True)
            wire.sock.settimeout(None)
            while True:
                message = read_request(wire)
                self.requests.append((number, message))
                wire.send(self.reply(message))
        wire.close()

    def reply(self, message: Message) -> bytes:
        """An answer to this request; subclasses say others."""
        body = b"" if message.start.startswith("HEAD ") else self.label
        return answer(body=body)

    @property
    def paths(self) -> list[str]:
        return [message.path for _, message in self.requests]

    def __enter__(self) -> Origin:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self.upstream.listener.shutdown(socket.SHUT_RDWR)
        self.upstream.listener.close()
        for wire in self.wires:
            wire.close()
        for thread in self.threads:
            thread.join(PATIENCE)


def get(where: Any, sent: bytes | None = None) -> Message:
    """One request on a connection of its own, of a target that answers by itself."""
    return refuse(where, sent)


def request(path: str = "/x", *fields: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request of a client; a Host and the length are written unless given."""
    names = [field.split(":")[0].lower() for field in fields]
    lines = [f"{method} {path} HTTP/1.1"]
    if "host" not in names:
        lines.append("Host: example.org")
    lines += fields
    if body and "transfer-encoding" not in names:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def answer(status: str = "200 OK", *fields: str, body: bytes = b"ok") -> bytes:
    """An answer of a target, with its length."""
    return (
        "\r\n".join([f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]).encode("latin-1")
        + body
    )


def read_request(wire: Wire) -> Message:
    """A whole request as a target gets it, by its framing."""
    message = Message(wire.head())
    if message.get("transfer-encoding"):
        message.body = wire.chunked()
    elif message.get("content-length"):
        message.body = wire.exactly(int(message.get("content-length")[0]))
    return message


def read_response(wire: Wire, method: str = "GET") -> Message:
    """A whole response as a client gets it."""
    return Message(*wire.response(method))


def accept(upstream: Upstream, client: Wire) -> Wire:
    """The connection that the proxy makes for what ``client`` asked; fails at once when it answers instead."""
    ready, _, _ = select.select([upstream.listener, client.sock], [], [], PATIENCE)
    assert ready, "the proxy neither asks the target nor answers"
    if upstream.listener not in ready:
        with contextlib.suppress(OSError, AssertionError):
            client.more()
        raise AssertionError(f"answered without the target: {client.data!r}")
    return upstream.accept()


def ask(
    where: Any, upstream: Upstream, sent: bytes | None = None, reply: bytes = OK
) -> tuple[Message, Message]:
    """One request on new connections: what the target got, and what the client got."""
    sent = request() if sent is None else sent
    with connect(where) as client:
        client.send(sent)
        wire = accept(upstream, client)
        got = read_request(wire)
        wire.send(reply)
        return got, read_response(client, sent.split(b" ")[0].decode())


def refuse(where: Any, sent: bytes | None = None) -> Message:
    """One request that is answered without a target's help: what the client got."""
    sent = request() if sent is None else sent
    with connect(where) as client:
        client.send(sent)
        return read_response(client, sent.split(b" ")[0].decode())


def labels(where: Any, count: int, sent: bytes | None = None) -> list[bytes]:
    """The bodies of so many responses, each on a connection of its own."""
    found = []
    for _ in range(count):
        message = get(where, sent)
        assert message.status == 200, message
        found.append(message.text)
    return found


def silent(wire: Wire, seconds: float = 0.3) -> bool:
    """Whether nothing arrives in this time, not even the end of the connection."""
    return not select.select([wire.sock], [], [], seconds)[0]


def listening_place(way: str) -> int | None:
    """Where a proxy listens: a port, or ``None`` for a UNIX socket of the scene's own."""
    return free_port() if way == "tcp" else None


def has_ipv6() -> bool:
    """Whether this machine can listen on ::1."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


class Scene:
    """What one test does in the lab: its variables there, its proxies, its part of the log."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.home = lab.home
        self.process = lab.process
        self.number = number
        self.places = itertools.count()
        self.begin = len(self.process.log())

    def run(self, code: str) -> Any:
        """Run code in the worker; the value of an expression."""
        status, text = fetch(self.process.socket, f"/{self.number}", "POST", textwrap.dedent(code).encode())
        assert status == 200, text
        return text if text.startswith("<") else ast.literal_eval(text)

    def place(self) -> str:
        """A path for a UNIX socket."""
        return f"{self.home}/{self.number}-{next(self.places)}"

    def serve(self, arguments: str, mode: str = "direct", where: Any = None) -> Any:
        """A proxy (``proxy`` in the scene) from the source of its arguments; where it listens."""
        where = where or self.place()
        address = f"unix:{where}" if isinstance(where, str) else where
        self.run(f"proxy = serve({address!r}, {mode!r}, {arguments})")
        return where

    def route(self, create: str, code: str = "") -> str:
        """An app that runs ``code`` (it has ``environ``) and then calls ``proxy``; where it listens."""
        where = self.place()
        self.run(f"""
proxy = http_proxy.create_server({create})
def app(environ, start_response):
    {code or "pass"}
    return proxy.web(environ, start_response)
passenger.create_server(app).listen("unix:{where}")
""")
        return where

    def note_errors(self) -> None:
        """Note the class of each error of ``proxy``, and its target, in ``seen``."""
        self.run(
            "proxy.on('error', lambda error, request, target: seen.append((type(error).__name__, str(target))))"
        )

    def seen(self) -> list[Any]:
        """What the handlers of this test have noted."""
        result: list[Any] = self.run("seen")
        return result

    def wait_seen(self, count: int = 1) -> list[Any]:
        """Wait until the handlers have noted so many things."""
        wait_for(lambda: len(self.seen()) >= count, lambda: f"{count} notes; there are {self.seen()}")
        return self.seen()

    def log(self) -> str:
        """What was logged since the test began."""
        return self.process.log()[self.begin :]

    def wait_log(self, text: str) -> str:
        wait_for(lambda: text in self.log(), lambda: f"{text!r} in\n{self.log()}")
        return self.log()

    def proxy_lines(self, part: str) -> list[str]:
        """The proxy's lines in the log that have ``part``."""
        return [line for line in self.log().splitlines() if "proxy: " in line and part in line]

    def one_line(self, part: str, pattern: str) -> None:
        """Wait for the line about a request. It is the only one, and nothing else went wrong."""
        wait_for(lambda: self.proxy_lines(part), lambda: f"a line with {part} in\n{self.log()}")
        fetch(self.process.socket)  # the worker's loop has turned once more
        (line,) = self.proxy_lines(part)
        assert re.search(pattern, line), line
        self.assert_calm()

    def assert_calm(self) -> None:
        """Nothing raised in the worker."""
        for word in ("Traceback", "RecursionError", "Error handling request"):
            assert word not in self.log(), self.log()

    def open_sockets(self) -> int:
        """How many sockets the worker has open."""
        (pid,) = self.process.workers()
        return sum(name.startswith("socket:") for name in descriptors(pid))

    def settled_sockets(self) -> int:
        """How many sockets the worker has open, when those of the previous tests are closed."""

        def same() -> int:
            before = self.open_sockets()
            time.sleep(0.1)
            return before if self.open_sockets() == before else 0

        return int(wait_for(same, "the descriptors to settle"))

    def wait_sockets(self, most: int) -> None:
        """Wait until the worker has at most so many sockets open."""
        wait_for(
            lambda: self.open_sockets() <= most,
            lambda: f"{most} sockets; there are {self.open_sockets()}",
            15,
        )


class Lab:
    """A gunicorn with one worker that runs ``programs/proxy_lab_app.py``."""

    def __init__(self, home: Path, process: Process) -> None:
        self.home = home
        self.process = process
        self.numbers = itertools.count()

    def scene(self) -> Scene:
        return Scene(self, next(self.numbers))


@contextlib.contextmanager
def laboratory(*arguments: object) -> Iterator[Lab]:
    """The lab, and its end."""
    with starting() as starter:
        yield Lab(starter.home, starter.gunicorn("proxy_lab_app", *arguments, workers=1).wait_ready())


def kept(wire, upstream, client):
    """Whether the next request comes on the same connection."""
    if wire.data:
        return True
    ready, _, _ = select.select([wire.sock, upstream.listener, client.sock], [], [], 30)
    assert ready, "no next request"
    assert client.sock not in ready, f"answered: {client.sock.recv(1000)!r}"
    if wire.sock in ready:
        try:
            wire.data += wire.sock.recv(65536)
        except ConnectionError:
            return False
        return bool(wire.data)
    return False


#: notes the name of each event in ``seen``
NOTE_ALL = """
for name in ("start", "proxy_req", "proxy_req_ws", "proxy_res", "end", "open", "close", "error", "econnreset"):
    proxy.on(name, lambda *arguments, name=name: seen.append(name))
"""


def handle(lab, event, body, arguments="upstream_request, request, options"):
    """Add a handler, from the source of its body."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    lab.run(f"\n@proxy.on({event!r})\ndef handler({arguments}):\n{lines}\n")


def on_answer(lab, body):
    handle(lab, "proxy_res", body, "upstream_response, request")


def ask_again(where, upstream, sent=None, reply=OK):
    """One more request, on the connection that was kept, or a new one."""
    upstream.wires[-1].close()
    return ask(where, upstream, sent, reply)
