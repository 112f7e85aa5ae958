"""Connections that stay open are spread evenly over the workers."""

import contextlib
from collections import Counter

from http_client import Client, pids_answering

#: The app's workers wait long for each other: on a busy machine a sibling may not run for some time.
APP = """
    import os
    import gunicorn_passenger as passenger
    from gunicorn_passenger.http import acceptor

    acceptor._PATIENCE = 0.05

    def application(environ, start_response):
        start_response("200 OK", [("Content-Length", str(len(str(os.getpid()))))])
        return [str(os.getpid()).encode()]

    passenger.create_server(application).listen(int(os.environ["P1"]))
"""


def spread(where):
    """64 connections, one after the other: how many each worker has."""
    with contextlib.ExitStack() as stack:
        found = Counter()
        for _ in range(64):
            client = stack.enter_context(contextlib.closing(Client(where)))
            client.request("GET", "/")
            found[client.getresponse().read()] += 1
    return sorted(found.values())


def test_connections_are_spread_on_all_servers_and_after_a_reload(start, port):
    start.write("spread_app.py", APP)
    process = start.gunicorn("spread_app", "--keep-alive", 600, workers=4, env={"P1": port})
    for where in (process.wait_ready().socket, port):
        pids_answering(where, 4)
        counts = spread(where)
        assert len(counts) == 4
        assert counts[-1] <= 1.25 * counts[0], counts
    process.hup(4)
    pids_answering(port, 4)
    counts = spread(port)
    assert len(counts) == 4
    assert counts[-1] <= 1.25 * counts[0], counts
