"""The application of takeover.py: a server of the placement "one", which tells the pid of its worker."""

import os

from plain import respond

import gunicorn_passenger as passenger


def tell_pid(environ, start_response):
    return respond(start_response, b"%d" % os.getpid())


application = tell_pid
passenger.create_server(tell_pid).listen(int(os.environ["BENCH_PORT"]), name="one", placement="one")
