"""A WSGI primary, and a FastAPI application as a second server on port ``P1``. With ``EACH``, every worker has a
further one on a port of its own.

``/stream`` sends its second half, and ``/block`` responds, when the file ``GO`` exists. The lifespan adds lines
to the file ``LIFE``.
"""

import asyncio
import os
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse

import gunicorn_passenger as passenger

GO = Path(os.environ["GO"])


def say(text):
    with open(os.environ["LIFE"], "a") as file:
        file.write(f"{text} {os.getpid()}\n")


@asynccontextmanager
async def lifespan(app):
    if os.environ.get("FAIL"):
        raise RuntimeError("no database")
    say("up")
    app.state.stored = os.getpid()
    yield {"started": os.getpid()}
    if "STAY" in os.environ:
        await asyncio.sleep(60)
    say("down")


api = FastAPI(lifespan=lifespan)


@api.get("/", response_class=PlainTextResponse)
async def pid(request: Request):
    assert request.state.started == request.app.state.stored == os.getpid()
    return str(os.getpid())


@api.get("/threads")
def in_a_thread():
    """FastAPI calls it in a thread, where code that needs a loop makes its own."""

    async def sleep():
        await asyncio.sleep(0.001)
        return "slept"

    time.sleep(0.001)
    return {"result": asyncio.run(sleep())}


@api.get("/block", response_class=PlainTextResponse)
async def block():
    """Wrong in an asyncio loop, and yet the primary must respond."""
    GO.with_name("blocked").touch()
    while not GO.exists():
        time.sleep(0.01)
    return "unblocked"


@api.get("/stream")
async def stream():
    async def halves():
        yield b"first "
        while not GO.exists():
            await asyncio.sleep(0.01)
        yield b"second"

    return StreamingResponse(halves(), media_type="text/plain")


@api.get("/die", response_class=PlainTextResponse)
async def die():
    asyncio.get_running_loop().call_soon(sys.exit)
    await asyncio.sleep(60)


@api.get("/fail")
async def fail():
    raise ValueError("the program's own error")


@api.websocket("/ws")
async def echo(socket: WebSocket):
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(f"{text} {os.getpid()}")


def application(_environ, start_response):
    start_response("200 OK", [("Content-Length", "7")])
    return [b"primary"]


@passenger.on("listening")
def on_listening(server):
    if server.name == "api":
        say("listening")


if "PRIMARY" not in os.environ:
    passenger.create_server(application).listen("passenger")
passenger.create_server(api).listen(
    int(os.environ["P1"]), name="api", placement=os.environ.get("PLACEMENT", "shared")
)
if "EACH" in os.environ:
    passenger.create_server(api).listen("auto", name="each", placement="each")
if "WS_STOP" in os.environ:
    passenger.configure(ws_stop=os.environ["WS_STOP"])
if __name__ == "__main__":
    passenger.serve_forever()
