"""WebSockets by three libraries, and by hand; plain HTTP beside. All of it on the primary, and on P1."""

import json
import os
import sys
from collections import Counter

import flask
import flask_sock
import flask_socketio
import simple_websocket
from gunicorn.workers.base_async import ALREADY_HANDLED

import gunicorn_passenger as passenger

#: how many conversations of each kind are open in this worker
open_now = Counter()

flask_app = flask.Flask(__name__)
flask_app.config["SOCK_SERVER_OPTIONS"] = json.loads(os.environ.get("SOCK_OPTIONS", "{}"))
sock = flask_sock.Sock(flask_app)
socketio = flask_socketio.SocketIO(
    flask_app, async_mode="gevent", max_http_buffer_size=8_000_000, cors_allowed_origins="*"
)


def converse(ws, kind):
    """Echo what comes; ``pid`` and ``close CODE`` are commands."""
    open_now[kind] += 1
    try:
        while True:
            message = ws.receive()
            if message == "pid":
                ws.send(str(os.getpid()))
            elif isinstance(message, str) and message.startswith("close "):
                ws.close(int(message.split()[1]), "as asked")
                return
            else:
                ws.send(message)
    finally:
        open_now[kind] -= 1


@sock.route("/sock")
def flask_sock_route(ws):
    converse(ws, "sock")


@flask_app.get("/pid")
def pid():
    return str(os.getpid())


@flask_app.post("/length")
def length():
    return str(len(flask.request.get_data()))


@flask_app.get("/open")
def opened():
    return {kind: count for kind, count in open_now.items() if count}


@socketio.on("connect")
def socketio_connect():
    open_now["socketio"] += 1


@socketio.on("disconnect")
def socketio_disconnect(reason=None):
    open_now["socketio"] -= 1


@socketio.on("echo")
def socketio_echo(data):
    flask_socketio.emit("echoed", data)


@socketio.on("ask")
def socketio_ask(data=None):
    """The return value is the acknowledgement."""
    return {"pid": os.getpid(), "transport": socketio.server.transport(flask.request.sid), "data": data}


@socketio.on("all")
def socketio_all(data):
    flask_socketio.emit("told", data, broadcast=True)


@socketio.on("leave")
def socketio_leave():
    flask_socketio.disconnect()


def raw(environ, start_response):
    """simple-websocket without a framework, ended as its documentation says for gunicorn."""
    ws = simple_websocket.Server.accept(environ, **flask_app.config["SOCK_SERVER_OPTIONS"])
    try:
        converse(ws, "raw")
    except simple_websocket.ConnectionClosed:
        pass
    finally:
        if ws.connected:
            ws.close()
    raise StopIteration


def taken(environ, start_response):
    """The connection taken over by hand, and given up as gunicorn's own example does it."""
    conn = environ["gunicorn.socket"]
    open_now["taken"] += 1
    try:
        conn.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
        while data := conn.recv(4096):
            conn.sendall(data)
    finally:
        open_now["taken"] -= 1
    return ALREADY_HANDLED


def application(environ, start_response):
    handler = {"/raw": raw, "/taken": taken}.get(environ["PATH_INFO"], flask_app)
    return handler(environ, start_response)


@flask_app.get("/")
def root():
    return "plain"


if os.environ.get("P1"):
    passenger.create_server(application).listen(int(os.environ["P1"]))

if "geventwebsocket" in sys.modules:
    raise RuntimeError("the tests are about a worker without gevent-websocket")
