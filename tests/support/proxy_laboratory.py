"""One gunicorn in which tests make proxies, and what they say through them, byte by byte."""

from __future__ import annotations

import ast
import contextlib
import itertools
import select
import shutil
import socket
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import Process, Starter, fetch, wait_for
from upstream_sockets import PATIENCE, Upstream, Wire, connect

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
        self.sockets = itertools.count()
        self.begin = len(self.process.log())

    def run(self, code: str) -> Any:
        """Run code in the worker; the value of an expression."""
        status, text = fetch(self.process.socket, f"/{self.number}", "POST", textwrap.dedent(code).encode())
        assert status == 200, text
        return text if text.startswith("<") else ast.literal_eval(text)

    def place(self) -> str:
        """A path for a UNIX socket."""
        return f"{self.home}/{self.number}-{next(self.sockets)}"

    def serve(self, arguments: str, mode: str = "direct", where: Any = None) -> Any:
        """A proxy (``proxy`` in the scene) from the source of its arguments; where it listens."""
        where = where or self.place()
        address = f"unix:{where}" if isinstance(where, str) else where
        self.run(f"proxy = serve({address!r}, {mode!r}, {arguments})")
        return where

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
    home = Path(tempfile.mkdtemp(prefix="gp-", dir="/tmp"))
    starter = Starter(home)
    try:
        yield Lab(home, starter.gunicorn("proxy_lab_app", *arguments, workers=1).wait_ready())
    finally:
        left = [pid for process in starter.started for pid in process.end()]
        shutil.rmtree(home, ignore_errors=True)
    assert not left, f"processes had to be killed: {left}"
