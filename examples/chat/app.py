"""A chat for any number of workers: Flask-SocketIO on a port of its own, and a proxy to it as the primary."""

from pathlib import Path

from flask import Flask, request
from flask_socketio import SocketIO

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy
from gunicorn_passenger.socketio import attach

chat = Flask(__name__)
io = SocketIO(chat)
attach(io)  # the one line that four workers need

names: dict[str, str] = {}


@chat.route("/")
def page() -> str:
    return Path(__file__).with_name("page.html").read_text()


@io.on("enter")
def enter(name: str) -> None:
    names[request.sid] = name  # type: ignore[attr-defined]
    io.emit("line", {"name": "", "text": f"{name} is here"})


@io.on("say")
def say(text: str) -> None:
    io.emit("line", {"name": names.get(request.sid, "?"), "text": text[:500]})  # type: ignore[attr-defined]


@io.on("disconnect")
def leave() -> None:
    if name := names.pop(request.sid, ""):  # type: ignore[attr-defined]
        io.emit("line", {"name": "", "text": f"{name} has left"})


passenger.configure(ports="9000-9009")
passenger.create_server(chat).listen(9000, name="chat")
application = http_proxy.create_server("chat").listen("passenger")
