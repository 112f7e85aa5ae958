"""A program with a channel: each worker hears it, /stream sends it on, /publish says something; a daemon echoes."""

import json
import os
import subprocess
import sys
from urllib.parse import parse_qs

import gunicorn_passenger as passenger

news = passenger.channel("news")
heard = []
news.on(heard.append)
slow = []


def echo():
    """The daemon."""
    for message in passenger.channel("news").subscribe():
        if message.startswith("question"):
            passenger.channel("news").publish(f"answer to {message}")


def stream():
    with news.subscribe(timeout=0.5) as messages:
        yield b"begun\n"
        for message in messages:
            yield b"\n" if message is None else f"{message}\n".encode()


def application(environ, start_response):
    path, query = environ["PATH_INFO"], parse_qs(environ["QUERY_STRING"])
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return stream()
    if path == "/publish":
        for message in query["m"]:
            news.publish(message)
    elif path == "/slow":
        slow.append(news.subscribe(max_pending=1))
    elif path == "/child":
        program = f"import gunicorn_passenger as p; p.channel('news').publish({query['m'][0]!r})"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    body = json.dumps({"pid": os.getpid(), "heard": heard, "dropped": [one.dropped for one in slow]}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


passenger.spawn(echo, name="echo")
if "P1" in os.environ:
    passenger.create_server(application).listen(int(os.environ["P1"]))
