"""A child that a request forks, as multiprocessing does, takes nothing from the worker's proxied requests."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from proxy_laboratory import answer, laboratory, read_request, request
from upgraded_connections import switching, upgrading
from upstream_sockets import Upstream, connect

FORK = """
import os, gevent
def fork():
    worker, child = os.getpid(), os.fork()
    if not child:
        # its event loop runs, as it does while a child waits for its work
        while os.getppid() == worker:
            gevent.sleep(0.01)
        os._exit(0)
    return child
"""


@pytest.fixture(scope="module")
def gunicorn():
    with laboratory("--keep-alive", 600) as lab:
        yield lab


@pytest.fixture
def forking(gunicorn):
    lab = gunicorn.scene()
    lab.run(FORK)
    return lab


@contextlib.contextmanager
def forked(lab):
    child = int(lab.run("fork()"))
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)


def test_requests_that_wait_for_their_target(forking, port):
    where = forking.serve(f"'http://127.0.0.1:{port}'")
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(Upstream(port))
        clients, targets = {}, {}
        for number in range(20):
            client = clients[number] = stack.enter_context(connect(where))
            client.send(request(f"/{number}"))
            targets[number] = stack.enter_context(upstream.accept())
            read_request(targets[number])
        with forked(forking):
            for number, target in targets.items():
                target.send(answer("200 OK", body=b"%d " % number * 1000))
            for number, client in clients.items():
                assert client.response()[1] == b"%d " % number * 1000


def test_a_tunnel(forking, port):
    where = forking.serve(f"'http://127.0.0.1:{port}'")
    with Upstream(port) as upstream, connect(where) as client:
        client.send(upgrading())
        with upstream.accept() as target:
            read_request(target)
            target.send(switching())
            assert b" 101 " in client.head()
            with forked(forking):
                for number in range(100):
                    data = b"message %d" % number
                    client.send(data)
                    assert target.exactly(len(data)) == data
                    target.send(data.upper())
                    assert client.exactly(len(data)) == data.upper()
