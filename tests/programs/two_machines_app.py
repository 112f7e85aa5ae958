"""A Flask-SocketIO program on two machines with one Redis; its clients notice soon that a machine is cut off."""

import os

from flask import Flask, request
from flask_socketio import SocketIO

from gunicorn_passenger.socketio import attach

application = Flask(__name__)
io = SocketIO(
    application,
    async_mode="gevent",
    message_queue=os.environ["REDIS_URL"],
    ping_interval=2,
    ping_timeout=4,
)
attach(io, host=os.environ["MACHINE"])


@application.route("/")
def machine():
    return os.environ["MACHINE"]


@io.on("whoami")
def on_whoami():
    return os.getpid(), request.sid


@io.on("all")
def on_all(data):
    io.emit("news", data)
