"""The worker's client of the broker, the table of acceptors and the drain, without a process."""

import functools
import logging
import os
import socket

import gevent
import gevent.event
import pytest
from free_ports import free_port
from gevent import socket as gsocket

import gunicorn_passenger as passenger
from gunicorn_passenger import errors
from gunicorn_passenger.config.address import Tcp
from gunicorn_passenger.ipc import channel, messages
from gunicorn_passenger.ipc.scoreboard import Counters
from gunicorn_passenger.serving import broker_client, finish
from gunicorn_passenger.serving.asgi_server import AsgiServer
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.serving.counters import AcceptorCounters
from gunicorn_passenger.serving.discovery import ServerDiscovery
from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler
from gunicorn_passenger.serving.interface import check_interface
from gunicorn_passenger.serving.port_lease import AcceptGrant
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.serving.server import ListenAddress, Server

LOG = logging.getLogger("test_serving_units")


class Master:
    """The other end of a worker's channel, played by the test."""

    def __init__(self):
        ours, theirs = channel.pair()
        self.sock = gsocket.socket(ours.family, ours.type, ours.proto, fileno=ours.detach())
        self.client = BrokerClient(theirs, LOG, GeventScheduler())
        self.client.start_reading()

    def receive(self):
        message, fds = channel.receive(self.sock)
        assert not fds
        return message

    def open_port(self):
        """A worker's request for a port, granted without its descriptor yet."""
        request = gevent.spawn(self.client.open_port, Tcp("127.0.0.1", 9000), "x")
        message = self.receive()
        assert isinstance(message, messages.OpenPort)
        channel.send(self.sock, messages.PortOpened(message.id, "127.0.0.1:9000", "127.0.0.1", 9000))
        return request, messages.AcceptGranted(message.id, "127.0.0.1:9000", "127.0.0.1", 9000)


@pytest.fixture
def master():
    played = Master()
    lost = gevent.event.Event()
    played.client.on_lost = lost.set
    yield played
    played.sock.close()
    assert lost.wait(timeout=30)


def test_a_pause_that_comes_before_the_server_knows_its_port_is_confirmed(master):
    """The master closes a stopped port only when each worker has confirmed."""
    request, granted = master.open_port()
    channel.send(master.sock, granted, 0)
    lease = request.get(timeout=30)
    channel.send(master.sock, messages.PauseAccept(0, lease.key))
    while not lease._pause_due:
        gevent.sleep(0)
    paused = gevent.event.Event()
    granted_first = []
    lease.subscribe(granted_first.append, paused.set)
    assert paused.wait(timeout=30)
    (grant,) = granted_first
    os.close(grant.fd)


def test_a_grant_brings_the_listening_socket(master):
    request, granted = master.open_port()
    with socket.socket() as listener:
        channel.send(master.sock, granted, listener.fileno())
        grant = request.get(timeout=30).take_initial_grant()
        assert isinstance(grant, AcceptGrant)
        assert os.fstat(grant.fd).st_ino == os.fstat(listener.fileno()).st_ino
        os.close(grant.fd)


def test_a_grant_without_its_descriptor_is_explained_at_once(master):
    """The kernel drops a descriptor for which the worker has no room; the master has responded all the same."""
    request, granted = master.open_port()
    channel.send(master.sock, granted)
    with pytest.raises(
        errors.BrokerUnavailable, match=r"no file descriptor left; raise the limit on open files"
    ):
        request.get(timeout=30)
    assert isinstance(master.receive(), messages.ReleasePort)


def test_a_grant_for_a_port_that_was_released_is_returned(master):
    with socket.socket() as listener:
        channel.send(master.sock, messages.AcceptGranted(77, "127.0.0.1:9000"), listener.fileno())
        assert master.receive() == messages.ReleasePort(77, "127.0.0.1:9000")


def test_a_silent_master_is_an_error(master, monkeypatch):
    monkeypatch.setattr(broker_client, "RESPONSE_TIMEOUT", 0.01)
    with pytest.raises(errors.BrokerUnavailable, match=r"did not respond within 0\.01 s"):
        master.client.report()


def test_a_message_of_another_version_is_ignored_and_logged(master, caplog):
    master.sock.send(b'{"v":2,"type":"PauseAccept","id":0,"key":"x"}')
    channel.send(master.sock, messages.SuccessorReady(0))
    with gevent.Timeout(30):
        while not master.client.successor_ready:
            gevent.sleep(0)
    assert "ignores a malformed message from the master" in caplog.text


class FakeAcceptor:
    """An acceptor with counters, which is done when the test says so."""

    def __init__(self, requests):
        self.requests = requests
        self.finished = False

    def is_drained(self):
        return self.finished

    def counts(self):
        return Counters(0, 0, self.requests)


def test_the_counts_of_an_acceptor_that_is_done_are_kept():
    class Page(dict):
        def write(self, slot, counts):
            self[slot] = counts.requests

    counters, page = AcceptorCounters(), Page()
    first, second = FakeAcceptor(3), FakeAcceptor(4)
    counters.register(1, first)
    counters.register(1, second)
    first.finished = True
    for _ in range(2):
        counters.write(page)
        assert page == {1: 7}


class FakeServers:
    """Servers that are idle after some looks at them."""

    def __init__(self, looks, shutdown=0.0):
        self.looks = looks
        self.shutdown = shutdown
        self.killed = False

    def idle(self):
        self.looks -= 1
        return self.looks < 0

    def shutdown_seconds(self, graceful_timeout):
        return min(self.shutdown, graceful_timeout)

    def kill(self, timeout):
        self.killed = True


def test_a_drain_waits_until_no_connection_is_open(monkeypatch):
    monkeypatch.setattr(finish, "_POLL_INTERVAL", 0)
    servers, ticks = FakeServers(3), []
    finish.finish_connections(servers, 600, LOG, gevent.sleep, lambda: ticks.append(1))
    assert len(ticks) == 3
    assert not servers.killed


def test_a_connection_that_comes_at_the_end_of_a_drain_is_finished(monkeypatch):
    """A sibling passes one that belongs to this worker when it has no other."""
    monkeypatch.setattr(finish, "_POLL_INTERVAL", 0)
    servers, called = FakeServers(0), []

    def one_more():
        called.append(1)
        servers.looks = 3

    finish.finish_connections(servers, 600, LOG, gevent.sleep, on_idle=one_more)
    assert called == [1]
    assert servers.looks < 0


@pytest.mark.parametrize(("seconds", "shutdown"), [(0, 0), (600, 600)])
def test_a_drain_ends_at_the_graceful_timeout_and_says_so(caplog, seconds, shutdown):
    """Or so much earlier that ASGI applications can shut down."""
    servers = FakeServers(1000, shutdown)
    finish.finish_connections(servers, seconds, LOG, gevent.sleep)
    assert servers.killed
    assert "raise --graceful-timeout" in caplog.text


def test_a_name_is_resolved_in_turn_and_the_master_is_asked_once():
    asked = []

    def report():
        asked.append(1)
        return {
            "servers": [
                {
                    "name": f"jobs.{n}",
                    "placement": "each",
                    "state": "listening",
                    "workers": [n],
                    "address": address,
                }
                for n, address in [(1, "127.0.0.1:9001"), (2, "[::1]:9002")]
            ]
        }

    discovery = ServerDiscovery([], report)
    found = [discovery.resolve_server("jobs") for _ in range(3)]
    assert found == [("127.0.0.1", 9001), ("::1", 9002), ("127.0.0.1", 9001)]
    assert asked == [1]
    with pytest.raises(LookupError):
        discovery.resolve_server("others")


def application(environ, start_response):
    start_response("200 OK", [])
    return []


async def asgi(scope, receive, send):
    pass


class Asgi:
    async def __call__(self, scope, receive, send):
        pass


class OldAsgi:
    def __init__(self, scope):
        pass

    async def __call__(self, receive, send):
        pass


def old_asgi(scope):
    return OldAsgi(scope)


async def handler(request):
    pass


class ClassWsgi:
    """PEP 3333 allows a class whose instances are the response."""

    def __init__(self, environ, start_response):
        pass

    def __iter__(self):
        return iter(())


def framework_applications():
    import fastapi
    import flask
    import quart
    import starlette.applications
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler

    return {
        fastapi.FastAPI(): "asgi",
        starlette.applications.Starlette(): "asgi",
        quart.Quart("x"): "asgi",
        # the handlers of get_asgi_application() and get_wsgi_application(), which load the settings
        ASGIHandler.__new__(ASGIHandler): "asgi",
        WSGIHandler.__new__(WSGIHandler): "wsgi",
        flask.Flask("x"): "wsgi",
    }


def test_the_interface_of_an_application_is_recognized():
    def wrapped(scope, receive, send):
        return asgi(scope, receive, send)

    def anything(*args):
        return application(*args)

    applications = {
        asgi: "asgi",
        Asgi(): "asgi",
        functools.partial(asgi): "asgi",
        functools.partial(lambda prefix, scope, receive, send: asgi(scope, receive, send), "x"): "asgi",
        wrapped: "asgi",
        application: "wsgi",
        ClassWsgi: "wsgi",
        anything: "wsgi",
        **framework_applications(),
    }
    for app, interface in applications.items():
        assert check_interface(app, "auto") == interface, app
        assert check_interface(app, interface) == interface, app
    assert check_interface(anything, "asgi") == "asgi"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: passenger.create_server(application).listen("http://localhost:9000"), "not on a URL"),
        (
            lambda: passenger.create_server(application).listen(9000, placment="one"),
            "did you mean 'placement'",
        ),
        (
            lambda: passenger.create_server(application).listen(9000, backlog=5),
            "known options: host, name, placement",
        ),
        (lambda: passenger.listen(9000, application, nam="x"), "did you mean 'name'"),
        (
            lambda: passenger.listen(9000, application, sticky="cookie", placement="one"),
            "sticky='cookie'.* leave sticky out, or placement",
        ),
        (
            lambda: passenger.create_server(asgi, interface="wsgi"),
            "is an application for ASGI; leave interface out, or say interface='asgi'",
        ),
        (
            lambda: passenger.create_server(application, interface="asgi"),
            "is an application for WSGI; leave interface out, or say interface='wsgi'",
        ),
        (
            lambda: passenger.create_server(asgi, interface="ASGI"),
            "interface is one of 'auto', 'asgi', 'wsgi'",
        ),
        (lambda: passenger.create_server(Asgi), r"is a class of ASGI applications: pass an instance"),
        (lambda: passenger.create_server(OldAsgi), "is one of ASGI version 2"),
        (lambda: passenger.create_server(old_asgi), "is one of ASGI version 2"),
        (lambda: passenger.create_server(handler), "takes other arguments"),
        (lambda: passenger.create_server(asgi).listen("passenger"), "cannot be the primary, which is WSGI"),
        (lambda: passenger.create_server(asgi)({}, None), "gunicorn calls it as a WSGI application"),
    ],
)
def test_a_mistake_has_an_error_that_says_what_to_write(call, text):
    with pytest.raises(errors.PassengerError, match=text):
        call()


def test_the_host_may_follow_the_port_as_in_node():
    server = passenger.create_server(application).listen(free_port(), "127.0.0.2")
    try:
        assert server.address[0] == "127.0.0.2"
    finally:
        server.close()


def test_a_server_that_is_opened_during_the_drain_does_not_accept(tmp_path):
    servers = ServerRegistry()
    servers.start()
    servers.stop_accepting()
    server = Server(lambda environ, start_response: [], servers).listen(f"unix:{tmp_path}/s")
    assert server not in servers.acceptors
    server.close()


def test_a_grant_that_comes_while_an_asgi_application_starts_is_used_afterwards():
    server = AsgiServer(lambda scope, receive, send: None, None)
    server.set_socket(ListenAddress(socket.create_server(("127.0.0.1", 0)), ("127.0.0.1", 1)), "listening")
    servers = ServerRegistry()
    servers._begin(server)
    assert server not in servers.acceptors
    server.socket.sock.close()
