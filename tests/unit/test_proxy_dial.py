"""How targets are connected to: host names, several addresses, and what is remembered of both."""

from __future__ import annotations

import _socket
import contextlib
import socket
import threading

import gevent
import pytest
from free_ports import free_port

from gunicorn_passenger.errors import UpstreamRefused, UpstreamTimeout
from gunicorn_passenger.proxy import dial, resolver
from gunicorn_passenger.proxy.dial import Dialer, DialSettings
from gunicorn_passenger.proxy.resolver import Address, Resolver
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.upstream_io import GeventRuntime, ThreadRuntime

getaddrinfo = _socket.getaddrinfo


class NameServer:
    """In place of the system's resolver: what it finds under each name, and which names it does not answer."""

    def __init__(self):
        self.addresses = {}
        self.asked = []
        self.silent = {}

    def getaddrinfo(self, host, port, family=0, kind=0, protocol=0, flags=0):
        if flags & socket.AI_NUMERICHOST:
            return getaddrinfo(host, port, family, kind, protocol, flags)
        self.asked.append(host)
        if host in self.silent:
            self.silent[host].acquire()
        if host not in self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, kind, 6, "", (address, port)) for address in self.addresses[host]]

    def silence(self, *names):
        """These names are not answered until the returned function is called for one of them."""
        for name in names:
            self.silent[name] = threading.Lock()
            self.silent[name].acquire()

    def answer(self, name):
        self.silent.pop(name).release()


@pytest.fixture(autouse=True)
def no_waiting_for_ever():
    with gevent.Timeout(60):
        yield


@pytest.fixture
def names(monkeypatch):
    server = NameServer()
    monkeypatch.setattr(_socket, "getaddrinfo", server.getaddrinfo)
    yield server
    for name in list(server.silent):
        server.answer(name)


@pytest.fixture(params=["greenlets", "threads"])
def runtime(request):
    return GeventRuntime(gevent.get_hub()) if request.param == "greenlets" else ThreadRuntime()


def beside(runtime, function, *arguments):
    """Call a function in a greenlet or thread; what it returns or raises is in the list at its end."""
    outcome = []

    def run():
        try:
            outcome.append(function(*arguments))
        except Exception as error:
            outcome.append(error)

    runtime.spawn(run)
    return outcome


def until(condition):
    """Wait for a condition, and let greenlets run meanwhile."""
    while not condition():
        gevent.sleep(0.005)


# --- host names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%lo"])
def test_an_address_needs_no_look_up(names, runtime, host):
    ((_, sockaddr),) = Resolver(runtime).addresses(host, 80, 5)
    assert sockaddr[:2] == (host.partition("%")[0], 80)
    assert names.asked == []


def test_callers_share_one_look_up_of_a_name(names, runtime):
    known = Resolver(runtime)
    names.silence("slow.test")
    names.addresses["slow.test"] = ["127.0.0.9"]
    waiting = [beside(runtime, known.addresses, "slow.test", port, 30) for port in range(1, 21)]
    until(lambda: names.asked)
    gevent.sleep(0)
    names.answer("slow.test")
    until(lambda: all(waiting))
    assert [one[0] for one in waiting] == [
        [Address(socket.AF_INET, ("127.0.0.9", port))] for port in range(1, 21)
    ]
    assert names.asked == ["slow.test"]


def test_names_that_are_not_answered_do_not_delay_another(names, runtime):
    known = Resolver(runtime)
    dead = [f"dead{number}.test" for number in range(40)]
    names.silence(*dead)
    names.addresses["good.test"] = ["127.0.0.9"]
    waiting = [beside(runtime, known.addresses, name, 80, 30) for name in dead]
    until(lambda: len(names.asked) == 40)
    assert known.addresses("good.test", 80, 30) == [Address(socket.AF_INET, ("127.0.0.9", 80))]
    assert not any(waiting)
    for name in dead:
        names.answer(name)
    until(lambda: all(waiting))


def test_a_caller_waits_no_longer_than_it_wants(names, runtime):
    names.silence("dead.test")
    with pytest.raises(TimeoutError):
        Resolver(runtime).addresses("dead.test", 80, 0.01)


def test_the_number_of_look_ups_is_bounded(names, runtime, monkeypatch):
    monkeypatch.setattr(resolver, "_MAX_LOOKUPS", 2)
    known = Resolver(runtime)
    names.silence("a.test", "b.test")
    waiting = [beside(runtime, known.addresses, name, 80, 30) for name in ("a.test", "b.test")]
    until(lambda: len(names.asked) == 2)
    with pytest.raises(UpstreamRefused, match="2 look-ups of other names are under way"):
        known.addresses("c.test", 80, 30)
    names.answer("a.test")
    until(lambda: waiting[0])
    names.addresses["c.test"] = ["127.0.0.9"]
    assert known.addresses("c.test", 80, 30)


def test_known_addresses_are_used_while_they_are_looked_up_again(names, runtime, monkeypatch):
    known = Resolver(runtime)
    # of this run alone: a look-up that another run has left behind is counted, too
    name = f"renewed-{type(runtime).__name__.lower()}.test"
    monkeypatch.setattr(resolver, "_FRESH", 600.0)
    names.addresses[name] = ["127.0.0.8"]
    old = known.addresses(name, 80, 30)
    assert known.addresses(name, 80, 30) == old
    assert names.asked.count(name) == 1

    monkeypatch.setattr(resolver, "_FRESH", -1.0)
    names.silence(name)
    names.addresses[name] = ["127.0.0.9"]
    assert known.addresses(name, 80, 30) == old
    names.answer(name)
    until(lambda: known.addresses(name, 80, 30) != old)
    assert known.addresses(name, 80, 30) == [Address(socket.AF_INET, ("127.0.0.9", 80))]


def test_known_addresses_outlive_a_look_up_that_fails(names, runtime, monkeypatch):
    known = Resolver(runtime)
    names.addresses["name.test"] = ["127.0.0.8"]
    old = known.addresses("name.test", 80, 30)
    known.expire("name.test")
    del names.addresses["name.test"]
    until(lambda: known.addresses("name.test", 80, 30) == old and len(names.asked) > 1)
    assert known.addresses("name.test", 80, 30) == old

    monkeypatch.setattr(resolver, "_FRESH", -1.0)
    monkeypatch.setattr(resolver, "_USABLE", -1.0)
    with pytest.raises(socket.gaierror, match="not known"):
        known.addresses("name.test", 80, 30)


def test_a_name_that_cannot_be_encoded_is_an_unknown_name(runtime):
    with pytest.raises(socket.gaierror):
        Resolver(runtime).addresses("ä" * 70, 80, 30)


def test_the_names_that_are_remembered_are_bounded(names, runtime, monkeypatch):
    monkeypatch.setattr(resolver, "_MAX_NAMES", 3)
    known = Resolver(runtime)
    for number in range(10):
        names.addresses[f"n{number}.test"] = ["127.0.0.9"]
        known.addresses(f"n{number}.test", 80, 30)
    assert len(known._names) <= 3


# --- several addresses -------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(host, port, silent=False):
    """A listener; a silent one does not complete a handshake, because its backlog is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server((host, port), backlog=0 if silent else 100))
        while silent:
            client = stack.enter_context(socket.socket())
            client.settimeout(0.2)
            try:
                client.connect((host, port))
            except TimeoutError:
                break
        yield server


def dialer(runtime, **settings):
    return Dialer(Target("name.test", free_port()), runtime, DialSettings(**settings), None)


def peer(stream):
    with contextlib.closing(stream):
        return stream.sock.getpeername()[0]


def test_a_silent_address_delays_one_connection_by_a_moment(names, runtime, monkeypatch):
    names.addresses["name.test"] = ["127.0.0.2", "127.0.0.3"]
    one = dialer(runtime)
    with listening("127.0.0.2", one.target.port, silent=True), listening("127.0.0.3", one.target.port):
        assert peer(one.connect(30)) == "127.0.0.3"
        # it is not waited for again, as it would be for an hour now
        monkeypatch.setattr(dial, "_ATTEMPT_DELAY", 3600)
        assert peer(one.connect(30)) == "127.0.0.3"


def test_a_silent_address_is_tried_again_after_the_fail_timeout(names, runtime):
    names.addresses["name.test"] = ["127.0.0.2", "127.0.0.3"]
    one = dialer(runtime, fail_timeout=0.001)
    with listening("127.0.0.3", one.target.port):
        with listening("127.0.0.2", one.target.port, silent=True):
            assert peer(one.connect(30)) == "127.0.0.3"
        with listening("127.0.0.2", one.target.port):
            gevent.sleep(0.002)
            assert peer(one.connect(30)) == "127.0.0.2"


def test_an_address_that_refuses_gives_way_at_once(names, runtime, monkeypatch):
    monkeypatch.setattr(dial, "_ATTEMPT_DELAY", 3600)
    names.addresses["name.test"] = ["127.0.0.2", "127.0.0.3"]
    one = dialer(runtime)
    with listening("127.0.0.3", one.target.port):
        assert peer(one.connect(30)) == "127.0.0.3"
        with listening("127.0.0.2", one.target.port):
            assert peer(one.connect(30)) == "127.0.0.3"  # the other has failed a moment ago
    with listening("127.0.0.2", one.target.port):
        assert peer(one.connect(30)) == "127.0.0.2"  # what has failed is still better than nothing


def test_a_target_without_a_working_address(names, runtime):
    names.addresses["name.test"] = ["127.0.0.2", "127.0.0.3"]
    one = dialer(runtime)
    with pytest.raises(UpstreamRefused, match="connection refused"):
        one.connect(30)
    silent = listening("127.0.0.2", one.target.port, silent=True)
    with silent, pytest.raises(UpstreamTimeout, match="no connection was made in time"):
        one.connect(0.01)
    with pytest.raises(UpstreamRefused, match=r"no address of name\.test fits local_address"):
        dialer(runtime, local_address="::1").connect(30)


def test_after_a_failure_the_name_is_looked_up_again(names, runtime):
    names.addresses["name.test"] = ["127.0.0.2"]
    one = dialer(runtime)
    with pytest.raises(UpstreamRefused):
        one.connect(30)
    names.addresses["name.test"] = ["127.0.0.3"]
    with listening("127.0.0.3", one.target.port):

        def connects():
            try:
                return peer(one.connect(30)) == "127.0.0.3"
            except UpstreamRefused:
                return False

        until(connects)


def test_a_thread_that_cannot_start_costs_one_look_up(names, runtime, monkeypatch):
    names.addresses["name.test"] = ["127.0.0.3"]
    known = Resolver(runtime)

    def refuse(function):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(resolver.unpatched, "start_thread", refuse)
        with pytest.raises(UpstreamRefused, match="was not looked up: can't start new thread"):
            known.addresses("name.test", 80, 30)
    assert known.addresses("name.test", 80, 30) == [Address(socket.AF_INET, ("127.0.0.3", 80))]


def test_the_families_take_turns(runtime):
    four = [Address(socket.AF_INET, (f"127.0.0.{n}", 80)) for n in (1, 2, 3)]
    six = [Address(socket.AF_INET6, (f"::{n}", 80, 0, 0)) for n in (1, 2)]
    order = dialer(runtime)._in_order([*six, *four])
    assert order == [six[0], four[0], six[1], four[1], four[2]]


def test_a_host_that_vanishes_is_noticed(names, runtime):
    names.addresses["name.test"] = ["127.0.0.3"]
    one = dialer(runtime)
    with listening("127.0.0.3", one.target.port), contextlib.closing(one.connect(30)) as stream:
        assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, pause, probes = (
            stream.sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + pause * probes <= 120


def test_attempts_leave_no_socket(names, runtime):
    names.addresses["name.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    one = dialer(runtime)
    silent = listening("127.0.0.2", one.target.port, silent=True)
    with silent, pytest.raises(UpstreamTimeout):
        one.connect(0.3)
    with listening("127.0.0.2", one.target.port, silent=True), listening("127.0.0.4", one.target.port):
        assert peer(one.connect(30)) == "127.0.0.4"
    # an unclosed socket is a ResourceWarning, which fails the test
