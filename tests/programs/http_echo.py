"""Answers with what it was given, as JSON; the field ``X-App`` of a request asks for something else.

Runs under any gunicorn worker. With ``ECHO_PORT`` a second server of ours answers alike on that port.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Environ = dict[str, Any]
Start = Callable[..., Callable[[bytes], object]]

#: How often each request target was called, and each answer's ``close()``.
calls: Counter[str] = Counter()

#: What applications noted about their own input, by request target.
notes: dict[str, Any] = {}

APPS: dict[str, Callable[[Environ, Start], Iterable[bytes]]] = {}

PLAIN = [("Content-Type", "text/plain")]


class Unwind(BaseException):
    """As gevent.Timeout is: no Exception."""


def app(name: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        APPS[name] = function
        return function

    return register


def shown(key: str, value: Any) -> Any:
    """A value of the environ as JSON."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple | list):
        return [shown(key, item) for item in value]
    if key == "wsgi.input":
        return [
            name for name in ("read", "readline", "readlines", "__iter__", "close") if hasattr(value, name)
        ]
    if key == "wsgi.errors":
        return [name for name in ("write", "writelines", "flush") if hasattr(value, name)]
    if callable(value):
        return "callable"
    if isinstance(value, socket.socket):
        return "socket"
    return type(value).__name__


def as_json(start: Start, environ: Environ, **more: Any) -> list[bytes]:
    seen = {key: shown(key, value) for key, value in environ.items()}
    body = json.dumps({"environ": seen, **more}).encode()
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


class Closing:
    """An answer that counts its ``close()``."""

    def __init__(self, uri: str, parts: Iterable[bytes]) -> None:
        self.uri = uri
        self.parts = iter(parts)

    def __iter__(self) -> Iterator[bytes]:
        return self.parts

    def close(self) -> None:
        calls[f"close {self.uri}"] += 1


def application(environ: Environ, start: Start) -> Iterable[bytes]:
    name = environ.get("HTTP_X_APP", "echo")
    if name != "calls":
        calls[environ.get("RAW_URI", "?")] += 1
    return APPS[name](environ, start)


# --- reading ---------------------------------------------------------------------------------------


@app("calls")
def _calls(environ: Environ, start: Start) -> Iterable[bytes]:
    body = json.dumps({"calls": calls, "notes": notes}).encode()
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _reader(name: str, read: Callable[[Any], Any]) -> None:
    def reads(environ: Environ, start: Start) -> Iterable[bytes]:
        got = read(environ["wsgi.input"])
        got = [part.decode("latin-1") for part in got] if isinstance(got, list) else got.decode("latin-1")
        return as_json(start, environ, got=got)

    APPS[name] = reads


def _until_empty(read: Callable[[], bytes]) -> list[bytes]:
    return list(iter(read, b""))


_reader("echo", lambda i: i.read())
_reader("ignore", lambda i: b"")
_reader("part", lambda i: i.read(3))
_reader("part line", lambda i: i.readline())
_reader("read 1", lambda i: _until_empty(lambda: i.read(1)))
_reader("read 7", lambda i: _until_empty(lambda: i.read(7)))
_reader("read 100000", lambda i: _until_empty(lambda: i.read(100000)))
_reader("read none", lambda i: [i.read(None), i.read(None)])
_reader("read all", lambda i: [i.read(-1), i.read(-1), i.read(5), i.readline()])
_reader("read 0", lambda i: [i.read(0), i.readline(0), i.read()])
_reader("readline", lambda i: _until_empty(i.readline))
_reader("readline 4", lambda i: _until_empty(lambda: i.readline(4)))
_reader("readline none", lambda i: _until_empty(lambda: i.readline(-1)))
_reader("readlines", lambda i: i.readlines())
_reader("readlines 3", lambda i: b"".join(i.readlines(3)) + i.read())
_reader("iterate", list)
_reader("mixed", lambda i: [i.read(2), i.readline(), next(i), i.readline(2), i.read(1), *i.readlines()])
_reader("wrapped", lambda i: io.BufferedReader(_Raw(i)).read())


class _Raw(io.RawIOBase):
    """wsgi.input as a raw stream, as applications put it under TextIOWrapper."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@app("careful")
def _careful(environ: Environ, start: Start) -> Iterable[bytes]:
    """Reads all, and notes what the reading raised."""
    got, failed, aborted = b"", False, False
    try:
        for piece in iter(lambda: environ["wsgi.input"].read(4), b""):
            got += piece
    except OSError as error:
        failed, aborted = True, isinstance(error, ConnectionError)
    except Exception:
        failed = True
    note = {"got": got.decode("latin-1"), "failed": failed, "aborted": aborted}
    notes[environ["RAW_URI"]] = note
    return as_json(start, environ, got=note["got"], failed=failed)


# --- answering -------------------------------------------------------------------------------------


def _answer(name: str, status: Any, headers: Any, parts: Any, closing: bool = True) -> None:
    def answers(environ: Environ, start: Start) -> Iterable[bytes]:
        environ["wsgi.input"].read()
        start(status, list(headers))
        return Closing(environ["RAW_URI"], parts) if closing else parts

    APPS[name] = answers


def _length(length: object) -> list[tuple[str, str]]:
    return [*PLAIN, ("Content-Length", str(length))]


_answer("chunks", "200 OK", PLAIN, [b"one\n", b"", b"two\n", b"three"])
_answer("list", "200 OK", PLAIN, [b"one\n", b"two"], closing=False)
_answer("no chunk", "200 OK", PLAIN, [])
_answer("empty chunks", "200 OK", PLAIN, [b"", b""])
_answer("large", "200 OK", PLAIN, [b"0123456789" * 1000] * 40)
_answer("large length", "200 OK", _length(400000), [b"0123456789" * 1000] * 40)
_answer("exact", "200 OK", _length(6), [b"abc", b"def"])
_answer("zero", "200 OK", _length(0), [])
_answer("zero too much", "200 OK", _length(0), [b"abc"])
_answer("too much", "200 OK", _length(4), [b"abc", b"def", b"ghi"])
_answer("too little", "200 OK", _length(10), [b"abc"])
_answer("nothing of 5", "200 OK", _length(5), [])
_answer("length abc", "200 OK", _length("abc"), [b"abc"])
_answer("length -1", "200 OK", _length(-1), [b"abc"])
_answer("lengths differ", "200 OK", [*_length(3), ("Content-Length", "5")], [b"abc"])
_answer("length twice", "200 OK", [*_length(3), ("content-length", "3")], [b"abc"])
_answer("204", "204 No Content", [], [])
_answer("204 with body", "204 No Content", _length(3), [b"abc"])
_answer("304", "304 Not Modified", [("ETag", '"x"')], [])
_answer("304 with length", "304 Not Modified", _length(3), [b"abc"])
_answer("205", "205 Reset Content", [], [])
_answer("404", "404 Not Found", PLAIN, [b"no"])
_answer("status alone", "299", PLAIN, [b"x"])
_answer("status with space", "299 ", PLAIN, [b"x"])
_answer("status obs-text", "299 caf\xe9", PLAIN, [b"x"])
_answer("status crlf", "200 OK\r\nX-Injected: 1", PLAIN, [b"x"])
_answer("status two digits", "20 OK", PLAIN, [b"x"])
_answer("status word", "OK", PLAIN, [b"x"])
_answer("status empty", "", PLAIN, [b"x"])
_answer("status bytes", b"200 OK", PLAIN, [b"x"])
_answer("value crlf", "200 OK", [("X-A", "1\r\nX-Injected: 1")], [b"x"])
_answer("value lf", "200 OK", [("X-A", "1\nX-Injected: 1")], [b"x"])
_answer("value cr", "200 OK", [("X-A", "1\rX-Injected: 1")], [b"x"])
_answer("value nul", "200 OK", [("X-A", "1\x00")], [b"x"])
_answer("value unicode", "200 OK", [("X-A", "\u20ac")], [b"x"])
_answer("value latin-1", "200 OK", [("X-A", "caf\xe9")], [b"x"])
_answer("value padded", "200 OK", [("X-A", " \t a b \t"), ("X-B", "")], [b"x"])
_answer("value int", "200 OK", [("X-A", 1)], [b"x"])
_answer("value bytes", "200 OK", [("X-A", b"1")], [b"x"])
_answer("name crlf", "200 OK", [("X-A: 1\r\nX-Injected", "1")], [b"x"])
_answer("name colon", "200 OK", [("X-A:", "1")], [b"x"])
_answer("name space", "200 OK", [("X A", "1")], [b"x"])
_answer("name empty", "200 OK", [("", "1")], [b"x"])
_answer("name latin-1", "200 OK", [("X-\xe9", "1")], [b"x"])
_answer("name bytes", "200 OK", [(b"X-A", "1")], [b"x"])
_answer("cookies", "200 OK", [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("set-cookie", "c=3")], [b"x"])
_answer("own server and date", "200 OK", [("Server", "mine"), ("Date", "then")], [b"x"])
_answer("hop by hop", "200 OK", [("Keep-Alive", "5"), ("TE", "x"), ("Trailer", "X"), ("X-A", "1")], [b"x"])
_answer("connection close", "200 OK", [("Connection", "close"), *_length(1)], [b"x"])
_answer("connection keep-alive", "200 OK", [("Connection", "keep-alive"), *_length(1)], [b"x"])
_answer("own chunked", "200 OK", [("Transfer-Encoding", "chunked")], [b"1\r\nx\r\n0\r\n\r\n"])
_answer("upgrade", "200 OK", [("Connection", "Upgrade"), ("Upgrade", "WebSocket"), *_length(1)], [b"x"])
_answer("upgrade other", "200 OK", [("Connection", "upgrade"), ("Upgrade", "irc"), *_length(1)], [b"x"])
_answer("part str", "200 OK", PLAIN, ["text"])
_answer("later part str", "200 OK", PLAIN, [b"abc", "text"])
_answer("part bytearray", "200 OK", PLAIN, [bytearray(b"text")])
_answer("parts none", "200 OK", PLAIN, None, closing=False)
_answer("string", "200 OK", PLAIN, b"abc", closing=False)


@app("headers tuple")
def _headers_tuple(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", (("X-A", "1"),))
    return [b"x"]


@app("write")
def _write(environ: Environ, start: Start) -> Iterable[bytes]:
    write = start("200 OK", PLAIN)
    write(b"one\n")
    write(b"")
    write(b"two\n")
    return [b"three"]


@app("write length")
def _write_length(environ: Environ, start: Start) -> Iterable[bytes]:
    write = start("200 OK", _length(5))
    write(b"one")
    write(b"two")
    return [b"three"]


@app("write first")
def _write_first(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", PLAIN)(b"first\n")
    return [environ["wsgi.input"].read()]


@app("write str")
def _write_str(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", PLAIN)("text")  # type: ignore[arg-type]
    return []


@app("late start")
def _late_start(environ: Environ, start: Start) -> Iterator[bytes]:
    yield from _begin(start)


def _begin(start: Start) -> Iterator[bytes]:
    start("200 OK", PLAIN)
    yield b"one\n"
    yield b"two"


@app("no start")
def _no_start(environ: Environ, start: Start) -> Iterable[bytes]:
    return [b"x"]


@app("no start, no part")
def _no_start_no_part(environ: Environ, start: Start) -> Iterable[bytes]:
    return []


@app("start twice")
def _start_twice(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", PLAIN)
    start("200 OK", PLAIN)
    return [b"x"]


@app("start again")
def _start_again(environ: Environ, start: Start) -> Iterable[bytes]:
    """A second head, in time, because of an error."""
    start("200 OK", [("X-First", "1"), ("Content-Length", "100")])
    try:
        raise ValueError("app")
    except ValueError:
        start("503 Sorry", [("X-Second", "1"), ("Content-Length", "5")], sys.exc_info())
    return [b"sorry"]


@app("start again late")
def _start_again_late(environ: Environ, start: Start) -> Iterator[bytes]:
    start("200 OK", PLAIN)
    yield b"one"
    try:
        raise ValueError("app")
    except ValueError:
        start("503 Sorry", PLAIN, sys.exc_info())
    yield b"two"


def _raiser(name: str, error: BaseException, when: str) -> None:
    def raises(environ: Environ, start: Start) -> Iterable[bytes]:
        if when == "at once":
            raise error
        start("200 OK", _length(6) if "length" in when else PLAIN)
        if when == "started":
            raise error
        return Closing(environ["RAW_URI"], iterate())

    def iterate() -> Iterator[bytes]:
        if when != "first part":
            yield b"one"
        raise error

    APPS[name] = raises


_raiser("raise", ValueError("app"), "at once")
_raiser("raise started", ValueError("app"), "started")
_raiser("raise first part", ValueError("app"), "first part")
_raiser("raise later", ValueError("app"), "later")
_raiser("raise later length", ValueError("app"), "later length")
_raiser("oserror", OSError(2, "app"), "at once")
_raiser("oserror started", OSError(2, "app"), "started")
_raiser("oserror later", OSError(2, "app"), "later")
_raiser("stop iteration later", RuntimeError("generator raised StopIteration"), "later")
_raiser("unwind", Unwind("app"), "at once")
_raiser("exit", SystemExit(3), "at once")
_raiser("unwind later", Unwind("app"), "later")


@app("raise in close")
def _raise_in_close(environ: Environ, start: Start) -> Iterable[bytes]:
    class Failing(Closing):
        def close(self) -> None:
            super().close()
            raise ValueError("app")

    start("200 OK", _length(3))
    return Failing(environ["RAW_URI"], [b"abc"])


@app("hints")
def _hints(environ: Environ, start: Start) -> Iterable[bytes]:
    hint = environ["wsgi.early_hints"]
    hint([("Link", "</a.css>; rel=preload"), ("Link", "</b.css>; rel=preload")])
    hint([(b"Link", b" </c.css> ")])
    hint([])
    start("200 OK", PLAIN)(b"one")
    hint([("Link", "</late.css>")])
    return [b"two"]


@app("hints crlf")
def _hints_crlf(environ: Environ, start: Start) -> Iterable[bytes]:
    environ["wsgi.early_hints"]([("Link", "a\r\nX-Injected: 1")])
    start("200 OK", PLAIN)
    return [b"x"]


@app("hints name crlf")
def _hints_name_crlf(environ: Environ, start: Start) -> Iterable[bytes]:
    environ["wsgi.early_hints"]([("Link: a\r\nX-Injected", "1")])
    start("200 OK", PLAIN)
    return [b"x"]


def _file(name: str, content: bytes, length: int | None, offset: int = 0, real: bool = True) -> None:
    def answers(environ: Environ, start: Start) -> Iterable[bytes]:
        file: Any = io.BytesIO(content)
        if real:
            with tempfile.NamedTemporaryFile() as written:
                written.write(content)
                written.flush()
                file = open(written.name, "rb")  # noqa: SIM115
        file.seek(offset)
        start("200 OK", PLAIN if length is None else _length(length))
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](file, 4 if len(content) < 100 else 4096)
        return wrapped

    APPS[name] = answers


for _kind, _real in (("file", True), ("memory", False)):
    _file(_kind, b"0123456789", None, real=_real)
    _file(f"{_kind} length", b"0123456789", 10, real=_real)
    _file(f"{_kind} part", b"0123456789", 4, real=_real)
    _file(f"{_kind} offset", b"0123456789", None, offset=3, real=_real)
    _file(f"{_kind} offset length", b"0123456789", 5, offset=3, real=_real)
    _file(f"{_kind} empty", b"", None, real=_real)
    _file(f"{_kind} empty length", b"", 0, real=_real)
    _file(f"{_kind} large", b"0123456789" * 30000, None, real=_real)
    _file(f"{_kind} too little", b"0123456789", 20, real=_real)


if "ECHO_PORT" in os.environ:
    import gunicorn_passenger as passenger

    if passenger.active():
        passenger.create_server(application).listen(int(os.environ["ECHO_PORT"]))
