"""A program that opens servers of the package when it is asked to, under any worker class.

Its primary does what the path says. ``OURS``, ``PROXY`` and ``HUB`` are the ports of the servers.
"""

import io
import json
import os
import sys
import threading
import time

import gunicorn_passenger as passenger

#: what the program was told, by event
told = {"ready": 0, "listening": [], "exit": 0}
#: streams that were closed
closed = []
#: the threads in which requests wait for the file GO
waiting = []
targets = {}


@passenger.on("ready")
def ready(worker):
    told["ready"] += type(worker).__module__.startswith("gunicorn.workers")


@passenger.on("listening")
def listening(server):
    told["listening"].append(server.name)


@passenger.on("exit")
def leave(worker):
    print("exit of", worker.pid, flush=True)


def work(started, stopping):
    print("once runs in", os.getpid(), flush=True)
    started.set()
    stopping.wait()
    print("once ends in", os.getpid(), flush=True)


def run_once():
    started, stopping = threading.Event(), threading.Event()
    passenger.once("worker", lambda: work(started, stopping), stopping.set)


def opened():
    """Listen, in the midst of a request."""
    import flask
    import flask_sock

    from gunicorn_passenger import http_proxy

    app = flask.Flask("ours")

    @flask_sock.Sock(app).route("/ws")
    def echo(ws):
        while True:
            ws.send(ws.receive())

    def ours(environ, start_response):
        return (
            app(environ, start_response) if environ["PATH_INFO"] == "/ws" else plain(environ, start_response)
        )

    passenger.create_server(ours, threads=3).listen(int(os.environ["OURS"]), name="ours")
    http_proxy.create_server("ours").listen(int(os.environ["PROXY"]), name="proxy")
    passenger.create_server(thread_of, threads=0).listen(int(os.environ["HUB"]), name="hub")
    targets["via"] = http_proxy.create_server("ours")
    run_once()


def thread_of(environ, start_response):
    return text(start_response, threading.get_ident())


def text(start_response, what):
    body = str(what).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def stream(path):
    """Chunks without an end that say which thread they come from."""
    try:
        while True:
            yield f"{threading.get_ident()}\n".encode()
            time.sleep(0.02)
    finally:
        closed.append(path)


def plain(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/wait":
        waiting.append(threading.get_ident())
        while not os.path.exists(os.environ["GO"]):
            time.sleep(0.02)
    elif path == "/length":
        return text(start_response, sum(map(len, environ["wsgi.input"])))
    elif path == "/stream":
        start_response("200 OK", [])
        return stream(path)
    elif path == "/file":
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"from a file"))
    elif path == "/write":
        write = start_response("200 OK", [])
        write(b"written, ")
        return [b"returned"]
    elif path == "/error":
        raise ValueError("as asked")
    elif path == "/late":
        start_response("200 OK", [("Content-Length", "100")])
        return iter((b"too little",))
    return text(start_response, os.getpid())


def refused_primary():
    try:
        passenger.create_server(plain).listen("passenger")
    except passenger.ListenError as error:
        return str(error)
    return "accepted"


def application(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/block":
        time.sleep(1000)
    if path == "/open":
        opened()
    elif path == "/primary":
        return text(start_response, refused_primary())
    elif path.startswith("/via"):
        environ["PATH_INFO"] = path.removeprefix("/via")
        environ["RAW_URI"] = environ["PATH_INFO"]
        return targets["via"](environ, start_response)
    found = {
        "gevent": "gevent" in sys.modules,
        "threads": len(os.listdir("/proc/self/task")),
        "active": passenger.active(),
        "servers": [server[:] for server in passenger.servers()],
        "told": told,
        "closed": closed,
        "waiting": waiting,
    }
    return text(start_response, json.dumps(found))
