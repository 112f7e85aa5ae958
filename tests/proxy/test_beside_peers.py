"""The same bytes through nginx, node-http-proxy and our proxy, to the same scripted upstream: what differs, and why.

Compared are the requests that the upstream received (line, fields, framing, body, trailers) and what the client
received (1xx, status, fields, framing, body, whether the connection was kept). What a proxy says by itself is compared by
its status only. The cases, and the reasons for what differs, are in ``proxy_case_table.py``; ``docs/reference/proxy-differences.md`` says the same to users.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_for
from free_ports import free_port
from peer_servers import (
    LIMIT,
    nginx,
    node_server,
    wait_listening,
)
from processes import ROOT, require, starting
from proxy_case_table import CASES, DATE, DEMANDED, DIFFERENCES, Case, answer

PEERS = ("nginx", "node", "ours")

PROBE = b"GET /the-probe HTTP/1.1\r\nHost: probe.test\r\n\r\n"
PROBED = answer("Connection: close", body=b"probe")


class Ended(Exception):
    """The other side has ended the connection, or reset it."""


class Reader:
    """Messages of a connection, as they are on the wire."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = b""
        self.reset = False

    def more(self) -> None:
        try:
            piece = self.sock.recv(65536)
        except ConnectionError as error:
            self.reset = True
            raise Ended from error
        if not piece:
            raise Ended
        self.data += piece

    def line(self) -> bytes:
        while b"\n" not in self.data:
            self.more()
        line, _, self.data = self.data.partition(b"\n")
        return line.removesuffix(b"\r")

    def exactly(self, count: int) -> bytes:
        while len(self.data) < count:
            self.more()
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def rest(self) -> bytes:
        with contextlib.suppress(Ended):
            while True:
                self.more()
        taken, self.data = self.data, b""
        return taken

    def head(self) -> tuple[str, list[tuple[str, str]]]:
        """First line, and the fields."""
        return self.line().decode("latin-1"), self.fields()

    def fields(self) -> list[tuple[str, str]]:
        fields = []
        while line := self.line().decode("latin-1"):
            name, colon, value = line.partition(":")
            assert colon, line
            fields.append((name, value.strip(" \t")))
        return fields

    def body(self, message: dict[str, Any], fields: list[tuple[str, str]], default: int | None) -> None:
        """Read a body into ``message``, by its framing; ``default`` is the length without one."""
        lengths = [value for name, value in fields if name.lower() == "content-length"]
        codings = [value for name, value in fields if name.lower() == "transfer-encoding"]
        message.update(framing="none", body="", trailers=[], extensions=[], whole=False)
        if codings:
            message["framing"] = (
                "chunked" if codings == ["chunked"] and not lengths else f"{codings} {lengths}"
            )
            while True:
                size, _, extension = self.line().partition(b";")
                if extension:
                    message["extensions"].append(extension.decode("latin-1"))
                count = int(size, 16)
                if not count:
                    break
                message["body"] += self.exactly(count).decode("latin-1")
                assert self.line() == b""
            while line := self.line().decode("latin-1"):
                name, _, value = line.partition(":")
                message["trailers"].append([name.lower(), value.strip()])
        elif lengths:
            message["framing"] = f"length {', '.join(lengths)}"
            while len(message["body"]) < int(lengths[0]):
                message["body"] += self.exactly(1).decode("latin-1")
        elif default is None:
            message["framing"] = "end of the connection"
            message["body"] = self.rest().decode("latin-1")
            if self.reset:
                return
        message["whole"] = True


FRAMING = ("content-length", "transfer-encoding", "connection")


def describe(case: Case, fields: list[tuple[str, str]]) -> dict[str, Any]:
    """The fields for a comparison: sorted, without the framing."""
    kept = [(name if case.letters else name.lower(), value) for name, value in fields]
    kept = [(name, value) for name, value in kept if name.lower() not in FRAMING]
    # a date that a proxy has made
    kept = [(n, "(now)" if n.lower() == "date" and value not in DATE else value) for n, value in kept]
    options = {
        token.strip().lower()
        for name, value in fields
        if name.lower() == "connection"
        for token in value.split(",")
    }
    found: dict[str, Any] = {
        "fields": sorted(map(list, kept)),
        # whether it is to be kept is seen by what happens
        "connection": sorted(options - {"keep-alive", "close", ""}),
    }
    if case.order:
        found["order"] = [list(pair) for pair in kept if re.match(r"x-[a-z]$", pair[0])]
    return found


class Recorder:
    """The upstream: notes what it gets, and answers as the case says."""

    def __init__(self) -> None:
        self.port = free_port()
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.case: Case | None = None
        self.seen: list[dict[str, Any]] = []
        self.socks: set[socket.socket] = set()
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.socks.add(sock)
            self.threads.append(threading.Thread(target=self.serve, args=(sock,)))
            self.threads[-1].start()

    def serve(self, sock: socket.socket) -> None:
        reader = Reader(sock)
        try:
            with contextlib.suppress(Ended, OSError):
                while self.one(sock, reader):
                    pass
        finally:
            self.socks.discard(sock)
            sock.close()

    def one(self, sock: socket.socket, reader: Reader) -> bool:
        """One request; whether another may follow."""
        while not reader.data:
            reader.more()
        try:
            first, fields = reader.head()
        except AssertionError as error:
            self.seen.append({"line": f"garbage: {error}", "fields": [], "connection": [], "framing": "none"})
            return False
        if " /the-probe " in first:
            sock.sendall(PROBED)
            return False
        case = self.case
        assert case is not None
        message: dict[str, Any] = {"line": first, **describe(case, fields)}
        self.seen.append(message)
        expects = any(name.lower() == "expect" and value == "100-continue" for name, value in fields)
        if expects and case.continues:
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if expects and not case.continues:
            message.update(framing="not read")
        else:
            reader.body(message, fields, 0)
        sock.sendall(case.answer)
        if case.answer.startswith(b"HTTP/1.1 101 "):
            while not case.then:
                if not reader.data:
                    reader.more()
                sock.sendall(reader.data)
                reader.data = b""
        if case.then == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if case.then == "close" or b"Connection: close" in case.answer:
            # an orderly end, whatever was not read
            sock.shutdown(socket.SHUT_WR)
            reader.rest()
        return not case.then and b"Connection: close" not in case.answer

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in list(self.socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()


class Peer:
    """A proxy, and the upstream behind it."""

    def __init__(self, name: str, port: int, recorder: Recorder) -> None:
        self.name = name
        self.port = port
        self.recorder = recorder

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), LIMIT)

    def drained(self) -> bool:
        """No connection to the upstream is kept: the next request is the first of its own."""
        if self.recorder.socks:
            with self.connect() as sock:
                sock.sendall(PROBE)
                with contextlib.suppress(Ended):
                    Reader(sock).head()
        return not self.recorder.socks

    def outcome(self, case: Case) -> dict[str, Any]:
        """All that is compared of a case."""
        wait_for(self.drained, "the kept connections to end")
        self.recorder.case, self.recorder.seen = case, []
        found: dict[str, Any] = {"interim": [], "responses": [], "kept": False}
        with self.connect() as sock:
            reader = Reader(sock)
            sock.sendall(case.send)
            if self.name in case.hangs:
                sock.settimeout(0.5)
            try:
                while len(found["responses"]) < case.count:
                    self.response(case, reader, found)
                if case.answer.startswith(b"HTTP/1.1 101 ") and found["responses"][-1]["status"] == 101:
                    self.switched(case, sock, reader, found["responses"][-1])
                else:
                    sock.sendall(PROBE)
                    found["kept"] = reader.head()[0].startswith("HTTP/1.1 200 ")
            except (Ended, ConnectionError):
                if len(found["responses"]) < case.count and not any(
                    one.get("status") for one in found["responses"]
                ):
                    found["responses"].append({"status": "closed"})
            except OSError:
                if self.name not in case.hangs:
                    raise
                if len(found["responses"]) < case.count:
                    found["responses"].append({"status": "hangs"})
                elif not found["responses"][-1].get("whole"):
                    found["responses"][-1]["whole"] = "hangs"
        # Node sends pipelined requests at a time, on connections of their own
        found["requests"] = sorted(self.recorder.seen, key=lambda message: message["line"])
        return found

    def response(self, case: Case, reader: Reader, found: dict[str, Any]) -> None:
        """Read an answer; one that is not final has no body."""
        number = len(found["responses"])
        first = reader.line().decode("latin-1")
        if not first.startswith("HTTP/1."):
            found["responses"].append({"status": "no HTTP"})
            raise Ended
        fields = reader.fields()
        status = int(first.split()[1])
        if status < 200 and status != 101:
            found["interim"].append([status, describe(case, fields)["fields"]])
            if status == 100 and case.after:
                reader.sock.sendall(case.after)
            return
        if not any(name.lower() == "x-upstream" for name, _ in fields):
            message: dict[str, Any] = {"status": status, "of": "the proxy"}
        else:
            message = {"status": status, "line": first, **describe(case, fields)}
        found["responses"].append(message)
        method = "GET" if number else case.send.lstrip().split(b" ")[0].decode().upper()
        empty = method == "HEAD" or status in (101, 204, 304)
        details: dict[str, Any] = {}
        try:
            if empty:
                details["framing"] = sorted(
                    f"{name.lower()}: {value}" for name, value in fields if name.lower() in FRAMING[:2]
                )
            else:
                reader.body(details, fields, None)
        finally:
            if "line" in message:
                message.update(details)

    def switched(self, case: Case, sock: socket.socket, reader: Reader, message: dict[str, Any]) -> None:
        """Behind 101: what is sent comes back, until this side ends."""
        expected = case.answer.partition(b"\r\n\r\n")[2] + case.send.partition(b"\r\n\r\n")[2] + case.after
        sock.sendall(case.after)
        message["body"] = reader.exactly(len(expected)).decode("latin-1") if not case.then else ""
        sock.shutdown(socket.SHUT_WR)
        message["body"] += reader.rest().decode("latin-1")


def gunicorn(start: Any, recorder: Recorder) -> int:
    port = free_port()
    start.write(
        "program.py",
        f"""
        import gunicorn_passenger as passenger
        from gunicorn_passenger import http_proxy
        passenger.configure(auto_install=False)
        application = http_proxy.create_server({recorder.port}, "127.0.0.1").listen("passenger")
        """,
    )
    process = start.gunicorn("program", "--keep-alive", 600, workers=1, bind=f"127.0.0.1:{port}")
    wait_listening(process, port)
    process.wait_log("Booting worker")
    return port


def nginx_proxy(start: Any, recorder: Recorder) -> int:
    port = free_port()
    nginx(
        start,
        "proxying",
        f"""
        map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
        upstream target {{ server 127.0.0.1:{recorder.port} max_fails=0; keepalive 8; }}
        server {{
            listen 127.0.0.1:{port};
            keepalive_timeout 600s;
            location / {{
                proxy_pass http://target;
                proxy_http_version 1.1;
                proxy_set_header Host $http_host;
                proxy_set_header Upgrade $http_upgrade;
                proxy_set_header Connection $connection_upgrade;
                proxy_pass_header Server;
                proxy_pass_header Date;
                proxy_request_buffering off;
                proxy_buffering off;
                proxy_buffer_size 32k; proxy_buffers 8 32k; proxy_busy_buffers_size 64k;
            }}
        }}
        """,
        port,
    )
    return port


def node_proxy(start: Any, recorder: Recorder) -> int:
    port = free_port()
    node_server(start, "proxy.js", recorder.port, port=port)
    return port


@pytest.fixture(scope="module")
def peers(node_modules):
    with starting() as start, contextlib.ExitStack() as stack:
        found = []
        every = {"nginx": nginx_proxy, "node": node_proxy, "ours": gunicorn}
        version = subprocess.check_output([require("node"), "--version"], text=True)
        if int(version[1:].partition(".")[0]) < 20:
            # the table is about the parser of Node 20 and later
            del every["node"]
        for name, begin in every.items():
            recorder = Recorder()
            stack.callback(recorder.end)
            found.append(Peer(name, begin(start, recorder), recorder))
        yield found


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two outcomes, by its name."""
    found: dict[str, tuple[Any, Any]] = {}

    def compare(name: str, a: Any, b: Any) -> None:
        if a != b and name not in found:
            found[name] = (a, b)

    compare("interim", one["interim"], other["interim"])
    for kind in ("request", "response"):
        a, b = one[f"{kind}s"], other[f"{kind}s"]
        if len(a) != len(b):
            compare(f"number of {kind}s", [m.get("line", m) for m in a], [m.get("line", m) for m in b])
            continue
        for x, y in zip(a, b, strict=True):
            if (x.get("status"), x.get("of")) != (y.get("status"), y.get("of")):
                compare("status", x.get("line", x), y.get("line", y))
                continue
            for key in x.keys() | y.keys():
                compare(f"{kind} {key}", x.get(key), y.get(key))
    if "status" not in found:
        compare("kept", one["kept"], other["kept"])
    return found


def explained(case: Case, peer: str) -> set[str]:
    return {part for one in DIFFERENCES if peer in one.peers and case.name in one.cases for part in one.what}


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 400 else f"{text[:250]} ... {text[-120:]}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w/%.,:*?+-]+", "-", case.name)[:70])
def test_proxies_differ_only_where_it_is_explained(peers, case):
    outcomes = {peer.name: peer.outcome(case) for peer in peers}
    problems = []
    for name in [peer.name for peer in peers[:-1]]:
        found = differences(outcomes[name], outcomes["ours"])
        for what, (theirs, ours) in found.items():
            if what not in explained(case, name):
                problems.append(f"{what}: {name} {short(theirs)}\n    ours {short(ours)}")
        for one in DIFFERENCES:
            if (
                name in one.peers
                and case.name in one.cases
                and not one.sometimes
                and not one.what & set(found)
            ):
                problems.append(f"{one.name!r}: {name} does not differ in {sorted(one.what)}")
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("name", DEMANDED)
def test_what_is_demanded_of_ours(peers, name):
    (case,) = [case for case in CASES if case.name == name]
    (response,) = peers[-1].outcome(case)["responses"]
    assert DEMANDED[name] in (str(response["status"]), response.get("line"))


def test_what_is_explained_is_tested():
    names = Counter(case.name for case in CASES)
    assert max(names.values()) == 1
    assert len(names) >= 60
    for one in DIFFERENCES:
        assert set(one.cases) <= set(names), one.name
        assert set(one.peers) <= {"nginx", "node"}
        assert one.cases, one.name
        assert one.why
    assert max(Counter(one.name for one in DIFFERENCES).values()) == 1


def test_the_document_names_all_differences():
    text = (ROOT / "docs" / "reference" / "proxy-differences.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    documented = {row[0]: row for row in rows}
    assert set(documented) == {one.name for one in DIFFERENCES}
    for one in DIFFERENCES:
        row = documented[one.name]
        assert row[1] == ", ".join({"node": "node-http-proxy"}.get(name, name) for name in one.peers)
        for section in re.findall(r"RFC \d+(?: section [\d.]+\d)?", one.why):
            assert section in row[2], one.name
    assert Path(__file__).name in text
