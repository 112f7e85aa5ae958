"""A Flask-SocketIO program on P1, unmodified but for one line, and a proxy to it on P2."""

import os

from flask import Flask, request
from flask_socketio import Namespace, SocketIO, disconnect, join_room

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy
from gunicorn_passenger.socketio import attach

application = Flask(__name__)
io = SocketIO(application, async_mode="gevent", cors_allowed_origins="*", max_http_buffer_size=10_000_000)
attach(io)


@application.route("/")
def whoami():
    return str(os.getpid())


@io.on("whoami")
def on_whoami():
    return os.getpid(), request.sid


@io.on("disconnect")
def on_disconnect(reason):
    print(os.getpid(), "disconnected:", reason, flush=True)


@io.on("join")
def on_join(room):
    join_room(room)


@io.on("all")
def on_all(data):
    io.emit("news", data)


@io.on("room")
def on_room(room, data):
    io.emit("news", data, to=room)


@io.on("ask")
def on_ask(target, question):
    """Asks a client of any worker, and answers what it has answered."""
    return io.call("question", question, to=target, timeout=20)


@io.on("throw_out")
def on_throw_out(target):
    io.server.disconnect(target)


@io.on("close")
def on_close(room):
    io.close_room(room)


class ForNode(Namespace):
    """What tests/node/io_client.js asks for."""

    def on_echo(self, data):
        self.emit("echoed", data, room=request.sid)

    def on_all(self, data):
        self.emit("told", data)

    def on_ask(self, data):
        return {"data": data, "transport": io.server.transport(request.sid, self.namespace)}

    def on_leave(self):
        disconnect()


io.on_namespace(ForNode("/node"))
passenger.create_server(application).listen(int(os.environ["P1"]), name="chat")
http_proxy.create_server("chat").listen(int(os.environ["P2"]))
