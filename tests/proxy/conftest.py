"""The fixtures of the proxy's tests: gunicorns with proxies that many tests share, and targets."""

from __future__ import annotations

import contextlib
import ssl

import pytest
import trustme
from free_ports import free_port
from http_client import fetch
from peer_site import Peers, serve
from processes import starting
from proxy_harness import proxied
from proxy_laboratory import Origin, laboratory
from upstream_sockets import Upstream
from wsgi_calls import call

from gunicorn_passenger import http_proxy


@pytest.fixture(scope="session")
def gunicorn():
    """The laboratory in which the tests make their proxies; a module that needs other settings has its own."""
    with laboratory("--keep-alive", 30) as lab:
        yield lab


@pytest.fixture
def lab(gunicorn):
    """One test's part of the laboratory."""
    return gunicorn.scene()


@pytest.fixture(scope="module")
def shared(request):
    """A gunicorn with the proxies that a module names in SERVERS, and the handlers of its HANDLERS."""
    with proxied(request.module.SERVERS, after=getattr(request.module, "HANDLERS", "")) as px:
        yield px


@pytest.fixture
def px(shared):
    """The proxies of the module; nothing may have gone wrong in the test."""
    yield shared
    fetch(shared.status)
    shared.quiet()


@pytest.fixture
def upstream(port):
    """A target that the test speaks for."""
    with Upstream(port) as upstream:
        yield upstream


@pytest.fixture
def origins():
    """Makes targets that answer by themselves, and ends them."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Origin(*arguments, **options))


@pytest.fixture(scope="module")
def tls():
    """A server's TLS context, of an authority that no client trusts."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def pair(origins):
    """Two targets, by their labels."""
    ports = [free_port() for _ in range(2)]
    return ports, [origins(port, str(port).encode()) for port in ports]


@pytest.fixture
def foreign():
    """A proxy under another WSGI server, and the requests that its target has got."""
    number = free_port()
    with Origin(number) as origin:

        def run(environ, target=number, wrap=lambda app: app, **options):
            before = len(origin.requests)
            proxy = http_proxy.create_server(target, "127.0.0.1", **options)
            try:
                came = call(wrap(proxy.web), environ)
            finally:
                proxy.proxy.close()
            return came, [message for _, message in origin.requests[before:]]

        yield run


@pytest.fixture(scope="session")
def peers(node_modules):
    """nginx, Node and websockets as upstreams."""
    with starting() as start, contextlib.ExitStack() as stack:
        peers = Peers(start)
        stack.callback(peers.websockets.end)
        yield peers


@pytest.fixture(scope="session")
def one_worker(peers):
    yield from serve(peers, 1)


@pytest.fixture(scope="session")
def four_workers(peers):
    yield from serve(peers, 4)


@pytest.fixture(params=["one_worker", "four_workers"])
def site(request):
    site = request.getfixturevalue(request.param)
    since = len(site.process.log())
    yield site
    site.assert_quiet(since)


@pytest.fixture
def single(one_worker):
    since = len(one_worker.process.log())
    yield one_worker
    one_worker.assert_quiet(since)
