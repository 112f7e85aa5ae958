"""A program with two unmodified servers in threads of their own and two of the package, for any worker class.

``METRICS``, ``PAGES``, ``OURS`` (WSGI) and ``ASGI`` are their ports. ``/wait`` of the last three responds when the
file ``GO`` exists.
"""

import asyncio
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prometheus_client

import gunicorn_passenger as passenger


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        while self.path == "/wait" and not os.path.exists(os.environ["GO"]):
            time.sleep(0.02)
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def start():
    registry = prometheus_client.CollectorRegistry()
    up = prometheus_client.Gauge("worker_up", "A worker", ["pid"], registry=registry)
    up.labels(os.getpid()).set(1)
    prometheus_client.start_http_server(int(os.environ["METRICS"]), "127.0.0.1", registry)
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PAGES"])), Handler)
    # not a daemon: Python would wait for it when the worker exits
    threading.Thread(target=server.serve_forever).start()


def ours(environ, start_response):
    while environ["PATH_INFO"] == "/wait" and not os.path.exists(os.environ["GO"]):
        time.sleep(0.02)
    return wsgi(environ, start_response)


def wsgi(environ, start_response):
    while environ["PATH_INFO"] == "/block":
        time.sleep(0.1)
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        for _ in range(2):
            message = await receive()
            await send({"type": message["type"] + ".complete"})
        return
    body = str(os.getpid()).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})


async def ours_asgi(scope, receive, send):
    while scope.get("path") == "/wait" and not os.path.exists(os.environ["GO"]):
        await asyncio.sleep(0.02)
    await asgi(scope, receive, send)


if "ASGI" in os.environ:
    passenger.create_server(ours_asgi).listen(int(os.environ["ASGI"]))
if "OURS" in os.environ:
    # with --preload in the master, where it waits for the fork
    passenger.create_server(ours).listen(int(os.environ["OURS"]))
if "START_IN_HOOK" not in os.environ:
    start()
