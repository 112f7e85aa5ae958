"""A socketio.AsyncServer on P1, unmodified but for one line, and a proxy to it on P2."""

import os

import socketio

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy
from gunicorn_passenger.socketio import attach

io = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*", max_http_buffer_size=10_000_000)
attach(io)


async def pid(scope, receive, send):
    """What is not Socket.IO."""
    if scope["type"] == "http":
        body = str(os.getpid()).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@io.on("whoami")
async def on_whoami(sid):
    return os.getpid(), sid


@io.on("disconnect")
async def on_disconnect(sid, reason):
    print(os.getpid(), "disconnected:", reason, flush=True)


@io.on("join")
async def on_join(sid, room):
    await io.enter_room(sid, room)


@io.on("all")
async def on_all(sid, data):
    await io.emit("news", data)


@io.on("room")
async def on_room(sid, room, data):
    await io.emit("news", data, to=room)


@io.on("ask")
async def on_ask(sid, target, question):
    """Asks a client of any worker, and answers what it has answered."""
    return await io.call("question", question, to=target, timeout=20)


@io.on("throw_out")
async def on_throw_out(sid, target):
    await io.disconnect(target)


@io.on("close")
async def on_close(sid, room):
    await io.close_room(room)


class ForNode(socketio.AsyncNamespace):
    """What tests/node/io_client.js asks for."""

    async def on_echo(self, sid, data):
        await self.emit("echoed", data, to=sid)

    async def on_all(self, sid, data):
        await self.emit("told", data)

    async def on_ask(self, sid, data):
        return {"data": data, "transport": io.transport(sid, self.namespace)}

    async def on_leave(self, sid):
        await self.disconnect(sid)


io.register_namespace(ForNode("/node"))


def application(environ, start_response):
    start_response("200 OK", [])
    return [b"the primary"]


passenger.create_server(socketio.ASGIApp(io, other_asgi_app=pid)).listen(int(os.environ["P1"]), name="chat")
http_proxy.create_server("chat").listen(int(os.environ["P2"]))
