"""A primary, and a second server on P1. Both respond with the worker's pid; ``two``, as the primary, says which."""

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

if os.environ.get("P1"):
    address = os.environ["P1"]
    second = passenger.create_server(which("second")).listen(int(address) if address.isdigit() else address)
