"""A primary, and a second server on P1. Both answer with the worker's pid."""

import os

import gunicorn_passenger as passenger


def whoami(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


def application(environ, start_response):
    return whoami(environ, start_response)


if os.environ.get("P1"):
    address = os.environ["P1"]
    second = passenger.create_server(whoami).listen(int(address) if address.isdigit() else address)
