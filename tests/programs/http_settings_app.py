"""Shows what a request has become, and answers in every way that gunicorn's settings and logs speak of.

On the primary; with P1 also on a second server. Without P1 it needs nothing but gunicorn.
"""

import io
import json
import os
import sys

import gevent

FILE = os.environ.get("FILE", "")
TEXT = ("Content-Type", "text/plain")
inside = 0


def show(environ, start_response):
    """The environ's texts, and the body."""
    shown = {key: value for key, value in environ.items() if isinstance(value, str)}
    shown["body"] = environ["wsgi.input"].read().decode("latin-1")
    shown["pid"] = os.getpid()
    text = json.dumps(shown).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(text)))])
    return [text]


def pid(environ, start_response):
    text = str(os.getpid()).rjust(10).encode()
    start_response("200 OK", [TEXT, ("Content-Length", str(len(text))), ("X-Answer", "some value")])
    return [text]


def read(environ, start_response):
    """How long the body was."""
    text = str(len(environ["wsgi.input"].read())).encode()
    start_response("200 OK", [TEXT, ("Content-Length", str(len(text))), ("X-Twice", "1"), ("X-Twice", "2")])
    return [text]


def missing(environ, start_response):
    start_response("404 Not Found", [TEXT, ("Content-Length", "7")])
    return [b"nothing"]


def nothing(environ, start_response):
    start_response("204 No Content", [("X-Answer", "none")])
    return []


def unchanged(environ, start_response):
    start_response("304 Not Modified", [("ETag", '"1"')])
    return []


def unmeasured(environ, start_response):
    start_response("200 OK", [TEXT])
    yield b"one "
    yield b""
    yield b"two"


def longer(environ, start_response):
    """More than was announced."""
    start_response("200 OK", [TEXT, ("Content-Length", "3")])
    return [b"four"]


def written(environ, start_response):
    write = start_response("200 OK", [TEXT, ("Content-Length", "8")])
    write(b"one ")
    return [b"more"]


def broken(environ, start_response):
    raise ValueError("broken before the answer")


def broken_later(environ, start_response):
    start_response("200 OK", [TEXT, ("Content-Length", "100")])
    yield b"some of it"
    raise ValueError("broken within the answer")


def unfinished_body(environ, start_response):
    """Answers without reading what was sent."""
    start_response("200 OK", [TEXT, ("Content-Length", "2")])
    return [b"ok"]


def errors(environ, start_response):
    stream = environ["wsgi.errors"]
    word = environ["QUERY_STRING"]
    stream.write(f"written {word} žluť\n")
    stream.writelines([f"lines {word}\n", f"more {word}\n"])
    print("printed", word, file=stream)
    stream.flush()
    return pid(environ, start_response)


def file(environ, start_response):
    """``/file?OFFSET,LENGTH,KIND``: LENGTH is what Content-Length says, or nothing for none."""
    offset, length, kind = environ["QUERY_STRING"].split(",")
    name = FILE + (".empty" if kind == "empty" else "")
    stream = open(name, "rb")  # noqa: SIM115
    if kind == "memory":
        with stream:
            stream = io.BytesIO(stream.read())
    elif kind == "reader":
        stream = Reader(stream)
    stream.seek(int(offset))
    headers = [("Content-Type", "application/octet-stream")]
    if length:
        headers.append(("Content-Length", length))
    start_response("200 OK", headers)
    return environ["wsgi.file_wrapper"](stream, 4096)


class Reader:
    """All that a file wrapper may ask for: ``read``, and ``close`` where there is one."""

    def __init__(self, stream):
        self.stream = stream
        self.seek = stream.seek

    def read(self, size=-1):
        return self.stream.read(size)

    def close(self):
        self.stream.close()


def hold(environ, start_response):
    """``/hold?NAME``: stays until the file NAME is there, and some turns longer."""
    global inside
    name = environ["QUERY_STRING"]
    inside += 1
    print(f"enters {name}, inside {inside}", flush=True)
    while not os.path.exists(name):
        gevent.sleep(0.01)
    for _ in range(20):
        gevent.sleep(0.01)
    print(f"leaves {name}", flush=True)
    inside -= 1
    return pid(environ, start_response)


ROUTES = {
    "/pid": pid,
    "/": pid,
    "/read": read,
    "/missing": missing,
    "/nothing": nothing,
    "/unchanged": unchanged,
    "/unmeasured": unmeasured,
    "/longer": longer,
    "/written": written,
    "/broken": broken,
    "/broken-later": broken_later,
    "/unfinished-body": unfinished_body,
    "/errors": errors,
    "/file": file,
    "/hold": hold,
}


def application(environ, start_response):
    return ROUTES.get(environ["PATH_INFO"], show)(environ, start_response)


if os.environ.get("P1") and "gunicorn_passenger" in sys.modules:
    import gunicorn_passenger as passenger

    passenger.create_server(application).listen(int(os.environ["P1"]))
