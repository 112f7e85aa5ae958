"""The application of socket_io.py and reconnect.py: Socket.IO, with the manager that BENCH_MANAGER names."""

import os
import time

import gevent.monkey

gevent.monkey.patch_all()

import socketio  # noqa: E402
from plain import respond  # noqa: E402

MANAGER = os.environ["BENCH_MANAGER"]
time.sleep(float(os.environ.get("BENCH_IMPORT", "0")))
redis = socketio.RedisManager(MANAGER) if MANAGER.startswith("redis:") else None
sio = socketio.Server(
    async_mode="gevent", cors_allowed_origins="*", client_manager=redis, ping_interval=300, ping_timeout=300
)
if MANAGER == "ours":
    from gunicorn_passenger.socketio import attach

    attach(sio)

received = 0
handle_emit = getattr(sio.manager, "_handle_emit", None)


def count_emit(message):
    global received
    received += 1
    handle_emit(message)


if handle_emit is not None:
    sio.manager._handle_emit = count_emit


@sio.on("connect")
def admit(sid, environ):
    sio.enter_room(sid, "all")


@sio.event
def echo(sid, data):
    return data


@sio.event
def whoami(sid):
    return os.getpid(), sid


@sio.event
def say(sid, number):
    """A message to all clients."""
    sio.emit("news", number, room="all")
    return True


@sio.event
def flood(sid, count):
    """So many messages to all clients."""
    for number in range(count):
        sio.emit("news", number, room="all")
        sio.sleep(0)


def other_paths(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/received":
        return respond(start_response, b"%d %d" % (os.getpid(), received))
    if path.startswith("/pump/"):
        # the manager is initialized with the first client
        if not sio.manager_initialized:
            sio.manager_initialized = True
            sio.manager.initialize()
        before = received
        for number in range(int(path[6:])):
            sio.emit("news", number, room="empty")
        return respond(start_response, b"%d %d" % (os.getpid(), received - before))
    return respond(start_response, b"hello")


application = socketio.WSGIApp(sio, other_paths)
