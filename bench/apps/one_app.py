"""The application of takeover.py: a server of the placement "one", which tells the pid of its worker."""

import os

from plain import respond

import gunicorn_passenger as passenger


def application(environ, start_response):
    return respond(start_response, b"%d" % os.getpid())


passenger.create_server(application).listen(int(os.environ["BENCH_PORT"]), name="one", placement="one")
