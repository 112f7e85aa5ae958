"""An application that does what its path says, on the primary and on a second server (P1)."""

import gc
import os
import socket
import threading

import gevent

import gunicorn_passenger as passenger
from gunicorn_passenger.http.connection import Connection
from gunicorn_passenger.http.listener_context import ListenerContext

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
        kept[:] = [body]
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
    elif path == "/errors-counted":
        listeners = [thing for thing in gc.get_objects() if isinstance(thing, ListenerContext)]
        answer = b"%d" % sum(listener.errors for listener in listeners)
    elif path == "/keepalive":
        sock = environ["gunicorn.socket"]
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        alive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        values = [sock.getsockopt(socket.IPPROTO_TCP, o) for o in options] if alive else []
        answer = b"%d %s" % (alive, b" ".join(b"%d" % value for value in values))
    elif path == "/fork":
        # the child runs the event loop, as one that waits for its work does
        worker, child = os.getpid(), os.fork()
        if not child:
            while os.getppid() == worker:
                gevent.sleep(0.01)
            os._exit(0)
        answer = b"%d" % child
    elif path == "/interrupted":
        length = [("Content-Length", "20000000")] if environ["QUERY_STRING"] else []
        write = start_response("200 OK", length)
        try:
            with gevent.Timeout(0.1):
                write(b"x" * 20_000_000)
        except gevent.Timeout:
            kept.append(b"interrupted")
            if not length:
                kept.append(_outcome(write, b"more"))
        return []
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
        answer = getattr(local, "who", "unset").encode()
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
