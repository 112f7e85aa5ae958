"""A program that opens no port, and says so; ``/listen`` then asks for a server of the package."""

import json
import os
import sys

import gunicorn_passenger as passenger


def application(environ, start_response):
    found = {"gevent": "gevent" in sys.modules, "threads": len(os.listdir("/proc/self/task"))}
    if environ["PATH_INFO"] == "/listen":
        try:
            passenger.create_server(application).listen(9000)
        except passenger.ListenError as error:
            found["error"] = str(error)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(found).encode()]
