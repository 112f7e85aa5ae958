"""A primary with a cookie, a server on P1 with session ids, and one on P2 with keys: each answers what it got."""

import json
import os

import gevent.monkey

import gunicorn_passenger as passenger
from gunicorn_passenger.serving.registry import registry

sleep = gevent.monkey.get_original("time", "sleep")


def application(environ, start_response):
    body = environ["wsgi.input"].read()
    if environ["PATH_INFO"] == "/block":
        open(f"blocked-{os.getpid()}", "w").close()
        while not os.path.exists("go"):
            sleep(0.02)
    answer = {
        "pid": os.getpid(),
        "tag": registry.acceptors.mailboxes.tag,
        "path": environ["PATH_INFO"],
        "port": environ.get("REMOTE_PORT"),
        "body": len(body),
        "long": len(environ.get("HTTP_X_LONG", "")),
    }
    data = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]


def key(request):
    if request.args.get("user") == "error":
        raise ValueError("no key")
    return request.args.get("user")


passenger.configure(sticky="cookie:worker")
passenger.create_server(application).listen(int(os.environ["P1"]), sticky="socketio", name="sessions")
passenger.create_server(application).listen(int(os.environ["P2"]), sticky=key, name="keys")
