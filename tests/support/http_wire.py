"""HTTP/1.1 over raw sockets: responses read by their framing, and requests cut anywhere."""

from __future__ import annotations

import fcntl
import itertools
import json
import random
import re
import select
import socket
import struct
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from http_case_table import PROBE, Case, get

#: Seconds that a server may take to end a connection.
PATIENCE = 30.0

#: The cases of which every split is tried, by name.
EVERY_SPLIT = {
    "fields ''", "two requests", "chunks, extensions", "trailers and next", "coding identity | chunked", "chunk with crlf inside",
    "empty line between", "readline of chunked lines", "mixed of lines", "fold with tabs and spaces", "line of 60", "five fields",
    "half-closed after the body", "fields 'X: \\t a \\t b \\t '", "bad trailer without a colon", "bad space before the colon",
    "bad bare LF at the end of a field", "bad bare LF in the request line", "bad chunk size 0x3",
    "chunks, zeros", "chunks, GET", "body shorter than what follows", "empty line first", "1.0 keep-alive and next",
    "connect and next", "expect, chunked", "trailers", "bad chunk size with bare LF", "bad trailer with bare LF", "bad CR first",
    "bad bare LF for the empty line", "bad bare LF in a name", "bad folded value", "bad length and chunked", "bad chunk without CRLF",
    "bad chunk size 3;;a", "answers in order", "readlines of chunked lines", "read 1 of chunked lines", "iterate of lines",
}  # fmt: skip


@dataclass
class Answer:
    """One answer as it came over the wire."""

    version: str
    status: int
    reason: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    #: whether the body came to its end as announced
    whole: bool = True
    #: the chunks, when it was chunked
    chunks: list[int] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        found = [value for key, value in self.fields if key.lower() == name.lower()]
        return ", ".join(found) if found else None

    def json(self) -> Any:
        return json.loads(self.body)


def read_head(data: bytes) -> tuple[Answer, bytes] | None:
    head, found, rest = data.partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    match = re.fullmatch(r"(HTTP/\d\.\d) (\d{3})(?: (.*))?", line)
    if not found or match is None:
        return None
    pairs = [(name, value.strip()) for name, _, value in (text.partition(":") for text in fields)]
    return Answer(match[1], int(match[2]), match[3] or "", pairs), rest


def _dechunk(answer: Answer, data: bytes) -> bytes:
    """Fill in the answer's body; returns what follows."""
    position, pieces = 0, []
    while answer.whole:
        line = re.compile(rb"([0-9A-Fa-f]+)\r\n").match(data, position)
        if line is None:
            answer.whole = False
            break
        size, start = int(line[1], 16), line.end()
        answer.chunks.append(size)
        pieces.append(data[start : start + size])
        answer.whole = data[start + size : start + size + 2] == b"\r\n"
        position = start + size + 2
        if size == 0:
            break
    answer.body = b"".join(pieces)
    return data[position:]


def parse(data: bytes, heads: Sequence[int] = ()) -> tuple[list[Answer], bytes]:
    """All responses of a connection that has ended, and the bytes that are not a response."""
    answers: list[Answer] = []
    final = 0
    while data:
        read = read_head(data)
        if read is None:
            break
        answer, data = read
        answers.append(answer)
        if answer.status < 200:
            continue
        length = (answer.get("Content-Length") or "").partition(",")[0]
        if final in heads or answer.status in (204, 304):
            pass
        elif (answer.get("Transfer-Encoding") or "").lower() == "chunked":
            data = _dechunk(answer, data)
        elif length.isdigit():
            answer.body, data = data[: int(length)], data[int(length) :]
            answer.whole = len(answer.body) == int(length)
        else:
            answer.body, data = data, b""
        final += 1
    return answers, data


def unread_bytes(sock: socket.socket) -> int:
    """What the peer has not read yet of what was sent."""
    if sock.family == socket.AF_UNIX:
        unread: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0]
        return unread
    try:
        (_, own), (_, peer) = sock.getsockname(), sock.getpeername()
    except OSError:  # reset
        return 0
    with open("/proc/net/tcp") as file:
        for line in file:
            columns = line.split()
            if columns[1].endswith(f":{peer:04X}") and columns[2].endswith(f":{own:04X}"):
                return int(columns[4].split(":")[1], 16)
    return 0


def wait_read(sock: socket.socket) -> None:
    """Wait until the peer has read what was sent, or has something to say, or does not mind us."""
    deadline = time.monotonic() + 1.0
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLHUP)
    pause = 0.0
    while unread_bytes(sock) and time.monotonic() < deadline:
        if poll.poll(pause):
            # an answer: the peer is busy with us, or has closed
            return
        pause = min(pause + 0.1, 2.0)


class Connection:
    """A client that sends what it is told and keeps what comes."""

    def __init__(self, where: str | int) -> None:
        self.where = where
        self.received = b""
        self.ended = False
        if isinstance(where, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(PATIENCE)
            self.sock.connect(where)
            self.port = 0
        else:
            self.sock = socket.create_connection(("127.0.0.1", where), PATIENCE)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.port = self.sock.getsockname()[1]

    def send(self, data: bytes) -> bool:
        """Send; false when the peer has closed."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def send_in_parts(self, parts: Sequence[bytes]) -> None:
        """Send each part when the peer has read the one before."""
        for number, part in enumerate(parts):
            if number:
                wait_read(self.sock)
            if not self.send(part):
                return

    def half_close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def receive(self) -> bool:
        """More of what comes; false at the end."""
        if self.ended:
            return False
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        except TimeoutError:
            raise AssertionError(f"the connection is still open after {self.received[-300:]!r}") from None
        self.received += data
        self.ended = not data
        return not self.ended

    def wait_for(self, pattern: bytes) -> None:
        """Receive until this has come."""
        while not re.search(pattern, self.received, re.DOTALL):
            assert self.receive(), f"closed before {pattern!r}: {self.received!r}"

    def wait_end(self) -> bytes:
        """All that came until the server closed."""
        while self.receive():
            pass
        self.close()
        return self.received

    def silent(self) -> bool:
        """Whether nothing has come, and the connection stands."""
        return not select.select([self.sock], [], [], 0)[0]

    def close(self) -> None:
        if self.ended and isinstance(self.where, int) and self.sock.fileno() >= 0:
            # no TIME_WAIT for thousands of connections
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exchange(where: str | int, parts: Sequence[bytes], eof: bool = False) -> tuple[bytes, int]:
    """Send, and receive until the server closes; what came, and the client's port."""
    with Connection(where) as connection:
        connection.send_in_parts(parts)
        if eof:
            connection.half_close()
        return connection.wait_end(), connection.port


def ask(where: str | int, data: bytes, heads: Sequence[int] = (), eof: bool = False) -> list[Answer]:
    """The answers to this, which is all answers until the server closes."""
    answers, rest = parse(exchange(where, [data], eof)[0], heads)
    assert not rest, rest
    return answers


def calls(where: str | int) -> tuple[dict[str, int], dict[str, Any]]:
    """What the program was called for, and what its applications noted."""
    (answer,) = ask(where, get("/calls", "X-App: calls", "Connection: close"))
    told = answer.json()
    return told["calls"], told["notes"]


def awkward(data: bytes) -> list[int]:
    """Where a split hurts: within line ends and names, at the border of head and body, within the body."""
    places = set()
    for match in re.finditer(rb"\r\n", data[:3000]):
        places |= {match.start(), match.start() + 1, match.end(), match.end() + 2}
    head = data.find(b"\r\n\r\n")
    places |= {1, 2, head + 3, head + 4, head + 5, (head + 4 + len(data)) // 2, len(data) // 2, len(data) - 1}
    return sorted(place for place in places if 0 < place < len(data))


def whole(case: Case) -> bytes:
    """What a client sends in a case: the probe too, unless the server has to end the connection."""
    return case.data if case.eof or case.status else case.data + PROBE


def cut(data: bytes, *places: int) -> list[bytes]:
    bounds = [0, *places, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def splits(case: Case, count: int) -> Iterator[list[bytes]]:
    """The ways in which a case is sent in parts: ``count`` of them, or every one."""
    data = whole(case)
    if case.name in EVERY_SPLIT:
        yield from (cut(data, place) for place in range(1, min(len(case.data) + 1, len(data))))
        yield cut(data, *range(1, min(len(case.data) + 1, len(data))))
        return
    places = awkward(case.data)
    chosen = random.Random(case.name).sample(places, min(count, len(places)))
    yield from (cut(data, place) for place in chosen)
    if len(chosen) > 1:
        yield cut(data, *sorted(chosen))
