"""Takes the time of the port broker for listen.py when a request asks for it.

The only file here that imports what is inside the package.
"""

import json
import os
import time
from urllib.parse import parse_qsl

import gevent
import plain

import gunicorn_passenger as passenger
from gunicorn_passenger.config.address import Tcp
from gunicorn_passenger.serving.registry import registry as servers


@passenger.on("ready")
def worker_ready(worker):
    with open(os.environ["BENCH_RECORDS"], "a") as file:
        file.write(f"{os.getpid()}\n")


def ask_broker(port):
    """The bare question: a descriptor from the master, and its release."""
    start = time.monotonic()
    lease = servers.broker.open_port(Tcp("127.0.0.1", port), "bench")
    grant = lease.take_initial_grant()
    answered = time.monotonic()
    os.close(grant.fd)
    servers.broker.release_port(lease.key, lease.number)
    return answered - start, time.monotonic() - start


def call_listen(port):
    """What a program calls."""
    start = time.monotonic()
    server = passenger.create_server(plain.hello).listen(port)
    answered = time.monotonic()
    assert server.listening
    server.close()
    return answered - start, time.monotonic() - start


def application(environ, start_response):
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    call = {"ask": ask_broker, "listen": call_listen}[query["call"]]
    first, calls, held = int(query["port"]), int(query["calls"]), int(query["held"])
    call(held)  # the first call of a worker belongs to its boot, which part 1 measures
    times = []
    for port in [held] * calls if query["port_is"] == "open" else range(first, first + calls):
        gevent.sleep(float(query["pace"]))
        times.append(call(port))
    return plain.respond(start_response, json.dumps(times).encode())
