"""Scripted upstreams: raw sockets that a test speaks for, and clients that say what they like."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

PATIENCE = 30.0


class Wire:
    """One end of a connection, byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)
        self.data = b""

    def more(self) -> bytes:
        """What comes next, at least a byte; fails at the end."""
        piece = self.sock.recv(65536)
        assert piece, f"the connection ended after {self.data!r}"
        self.data += piece
        return piece

    def until(self, end: bytes) -> bytes:
        """All up to and with ``end``; what follows is kept."""
        while end not in self.data:
            self.more()
        at = self.data.index(end) + len(end)
        taken, self.data = self.data[:at], self.data[at:]
        return taken

    def head(self) -> bytes:
        """A message's head."""
        return self.until(b"\r\n\r\n")

    def exactly(self, count: int) -> bytes:
        while len(self.data) < count:
            self.more()
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def chunked(self) -> bytes:
        """A chunked body as it is on the wire, trailers included."""
        came = b""
        while True:
            line = self.until(b"\r\n")
            came += line
            size = int(line.split(b";")[0], 16)
            if not size:
                while line != b"\r\n":
                    line = self.until(b"\r\n")
                    came += line
                return came
            came += self.exactly(size + 2)

    def response(self, method: str = "GET") -> tuple[bytes, bytes]:
        """A whole response, by its framing: head, and body as it is on the wire."""
        head = self.head()
        status = int(head.split(b" ", 2)[1])
        if method == "HEAD" or status in (204, 304) or status < 200:
            return head, b""
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
        }
        if b"chunked" in fields.get(b"transfer-encoding", b"").lower():
            return head, self.chunked()
        if b"content-length" in fields:
            return head, self.exactly(int(fields[b"content-length"]))
        return head, self.rest()

    def rest(self) -> bytes:
        """All until the other side ends; a reset raises ConnectionResetError."""
        while piece := self.sock.recv(65536):
            self.data += piece
        taken, self.data = self.data, b""
        return taken

    def ended(self) -> bool:
        """Wait for the end of the connection: clean, or by a reset. Nothing may come before it."""
        try:
            piece = self.sock.recv(1)
        except ConnectionError:
            return True
        assert not piece, piece
        return True

    def send(self, data: bytes) -> Wire:
        self.sock.sendall(data)
        return self

    def finish(self) -> None:
        """Send no more (a half-close)."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection with a reset (TCP)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: Any) -> None:
        self.sock.close()


class Upstream:
    """A target that the test speaks for: ``with Upstream(port) as upstream: wire = upstream.accept()``."""

    def __init__(self, where: int | str, host: str = "127.0.0.1") -> None:
        if isinstance(where, int):
            self.listener = socket.create_server((host, where))
        else:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(where)
            self.listener.listen()
        self.listener.settimeout(PATIENCE)
        self.wires: list[Wire] = []

    def accept(self) -> Wire:
        sock, _ = self.listener.accept()
        wire = Wire(sock)
        self.wires.append(wire)
        return wire

    def connects_within(self, seconds: float) -> bool:
        """Whether a client connects in this time (to show that none does)."""
        self.listener.settimeout(seconds)
        try:
            self.accept()
        except TimeoutError:
            return False
        finally:
            self.listener.settimeout(PATIENCE)
        return True

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.listener.close()
        for wire in self.wires:
            wire.sock.close()


def connect(where: Any) -> Wire:
    """A client: ``where`` is the path of a UNIX socket, or a port of this machine."""
    if isinstance(where, int):
        return Wire(socket.create_connection(("127.0.0.1", where), PATIENCE))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(where)
    return Wire(sock)
