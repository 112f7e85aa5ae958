"""What a storm asks: small answers, slow downloads and slow uploads, on up to three servers at once.

The primary; on ``STORM_OURS`` a server of ours; on ``STORM_UNMODIFIED`` a gevent.pywsgi.WSGIServer as it is, or under
a worker class that is not gevent's an http.server, or on ``STORM_ASGI`` an ASGI application. Every answer's head names the worker.

- ``/``: a small answer, which echoes the query;
- ``/down?pause=S&framing=sized|chunked``: ``CONTENT`` in ``PIECES`` pieces, with pauses of so many seconds;
- ``/up``: the SHA-256 of the request's body;
- ``/held``: half of ``CONTENT``, and the rest once the file ``go`` exists; ``/held-up``: reads the body, then waits.
"""

import hashlib
import json
import os
import random
import time
from urllib.parse import parse_qsl

#: the same bytes as in load_clients.py, which checks that all of them arrive
CONTENT = random.Random(1).randbytes(1 << 20)
PIECES = 32

# a large program takes its time to import
time.sleep(float(os.environ.get("STORM_IMPORT", "0")))


def pieces(pause):
    size = len(CONTENT) // PIECES
    for start in range(0, len(CONTENT), size):
        yield CONTENT[start : start + size]
        time.sleep(pause)


def held():
    half = len(CONTENT) // 2
    yield CONTENT[:half]
    wait_for_go()
    yield CONTENT[half:]


def wait_for_go():
    while not os.path.exists("go"):
        time.sleep(0.02)


def digest(body):
    count, found = 0, hashlib.sha256()
    while data := body.read(16384):
        count += len(data)
        found.update(data)
    return json.dumps({"length": count, "sha256": found.hexdigest()}).encode()


def application(environ, start_response):
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    head = [("X-Worker", str(os.getpid())), ("Content-Type", "application/octet-stream")]
    path = environ["PATH_INFO"]
    if path in ("/down", "/held"):
        if query.get("framing") != "chunked":
            head.append(("Content-Length", str(len(CONTENT))))
        start_response("200 OK", head)
        return pieces(float(query.get("pause", "0"))) if path == "/down" else held()
    if path in ("/up", "/held-up"):
        answer = digest(environ["wsgi.input"])
        if path == "/held-up":
            wait_for_go()
    else:
        answer = environ["QUERY_STRING"].encode()
    head.append(("Content-Length", str(len(answer))))
    start_response("200 OK", head)
    return [answer]


async def asgi(scope, receive, send):
    """The primary under an ASGI worker class: small answers alone."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})
        return
    answer = scope["query_string"]
    head = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": answer})


if os.environ.get("STORM_OURS"):
    import gunicorn_passenger as passenger

    passenger.create_server(application, threads=16).listen(int(os.environ["STORM_OURS"]))

if os.environ.get("STORM_ASGI"):
    import storm_asgi

    asgi_server = passenger.create_server(storm_asgi.application(CONTENT, PIECES))
    asgi_server.listen(int(os.environ["STORM_ASGI"]))
elif os.environ.get("STORM_THREADS"):
    import storm_http_server

    storm_http_server.start(int(os.environ["STORM_UNMODIFIED"]), application)
elif os.environ.get("STORM_UNMODIFIED"):
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", int(os.environ["STORM_UNMODIFIED"])), application, log=None).start()
