"""A primary, and a second server on P1. Both respond with the worker's pid; ``two`` and, for ASGI,
``two_asgi``, as the primary, say which."""

import os

import gunicorn_passenger as passenger


def whoami(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


def application(environ, start_response):
    return whoami(environ, start_response)


def which(name):
    def respond(environ, start_response):
        if environ["PATH_INFO"] != "/which":
            return whoami(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [name.encode()]

    return respond


two = which("primary")


async def two_asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})
        return
    body = b"primary" if scope["path"] == "/which" else str(os.getpid()).encode()
    head = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


if os.environ.get("P1"):
    address = os.environ["P1"]
    second = passenger.create_server(which("second")).listen(int(address) if address.isdigit() else address)
