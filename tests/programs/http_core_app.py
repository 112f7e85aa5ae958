"""An application that does what its path says, on the primary and on a second server (P1)."""

import gc
import os
import threading

import gevent

import gunicorn_passenger as passenger
from gunicorn_passenger.http.connection import Connection

if os.environ.get("CONFIGURE"):
    passenger.configure(**eval(os.environ["CONFIGURE"]))

calls = []
kept = []
local = threading.local()


def _outcome(function, *arguments):
    try:
        function(*arguments)
    except BaseException as error:
        return type(error).__name__.encode()
    return b"read"


def application(environ, start_response):
    path = environ["PATH_INFO"]
    calls.append(path)
    body = environ["wsgi.input"]
    answer = b"ok"
    if path == "/read":
        answer = b"%d" % len(body.read())
    elif path == "/pieces":
        answer = b""
        while piece := body.read1(1000):
            answer += b"[%s]" % piece
    elif path == "/keep":
        kept.append(body)
    elif path == "/kept":
        try:
            answer = kept[0].read()
        except ValueError as error:
            answer = str(error).encode()
    elif path == "/calls":
        answer = b" ".join(call.encode() for call in calls)
    elif path == "/parked":
        connections = [thing for thing in gc.get_objects() if isinstance(thing, Connection)]
        answer = b"%d" % sum(connection.is_idle() for connection in connections)
    elif path == "/pid":
        answer = b"%d" % os.getpid()
    elif path == "/greenlets":
        answer = b"%d" % gevent.getcurrent().minimal_ident
    elif path == "/oserror":
        raise OSError("of the application")
    elif path == "/exit":
        raise SystemExit(3)
    elif path == "/timeout":
        raise gevent.Timeout(1)
    elif path == "/taken":
        environ["gunicorn.socket"].sendall(b"HTTP/1.1 101 Mine\r\n\r\nhello")
        raise StopIteration
    elif path == "/early":
        sock = environ["gunicorn.socket"]
        sock.sendall(b"HTTP/1.1 101 Mine\r\n\r\n" + sock.recv(100))
        raise StopIteration
    elif path == "/middle":
        start_response("200 OK", [])

        def parts():
            yield b"begun"
            raise RuntimeError("in the middle")

        return parts()
    elif path == "/big":
        start_response("200 OK", [("Content-Length", str(20_000_000))])
        return [b"x" * 10_000_000, b"y" * 10_000_000]
    elif path == "/blob":
        answer = environ["QUERY_STRING"].encode() * 3000
    elif path == "/echo":
        answer = b"echo:" + body.read()
    elif path == "/other-greenlet":
        # a program's mistake: the body is read by another greenlet while the response is over
        gevent.spawn_later(0.05, lambda: kept.append(_outcome(body.read, 4)))
    elif path == "/outcomes":
        answer = b" ".join(kept)
    elif path == "/local":
        answer = getattr(local, "who", "nobody").encode()
        local.who = environ["QUERY_STRING"]
    elif path == "/stop":
        next(iter(()))
    elif path == "/errors":
        environ["wsgi.errors"].write("to the log\n")
        environ["wsgi.errors"].close()
    elif path == "/change":
        environ["HTTP_X_WHO"] = "changed"
    elif path == "/sleep":
        threading.Event().wait(float(environ["QUERY_STRING"]))
    start_response("200 OK", [("Content-Length", str(len(answer)))])
    return [answer]


if os.environ.get("P1"):
    passenger.create_server(application).listen(int(os.environ["P1"]))
