"""A worker's side of the mailboxes, with a broker and siblings that the test plays."""

import os
import socket
from types import SimpleNamespace

import gevent
import pytest

from gunicorn_passenger import errors
from gunicorn_passenger.config.settings import check_sticky
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.ipc import mailbox
from gunicorn_passenger.ipc.messages import MailboxOpened, SiblingChanged, SiblingJoined
from gunicorn_passenger.serving import mailboxes as module
from gunicorn_passenger.serving.mailboxes import Mailboxes, Sibling
from gunicorn_passenger.serving.stickiness import ByCookie, ByKey, BySessionId, install


class Broker:
    """The worker's end of the channel to a master that the test plays."""

    def __init__(self):
        self.logged = []
        self.log = SimpleNamespace(warning=self.note, error=self.note)
        self.asked = 0
        self.available = True
        self.exit_announced = False

    def note(self, *arguments):
        self.logged.append(arguments)

    def open_mailbox(self):
        self.asked += 1
        gevent.sleep(0.01)
        if not self.available:
            raise errors.BrokerUnavailable(24, "no descriptor is free")
        receiving, self.sending = mailbox.pair()
        return MailboxOpened(1, "own-tag", "key"), receiving.detach()


class Site:
    def __init__(self):
        self.broker = Broker()
        self.mailboxes = Mailboxes(self.broker, lambda: [])
        self.ends = []

    def join(self, tag, serving=True):
        """A sibling; the receiving end of its mailbox."""
        receiving, sending = mailbox.pair()
        receiving.setblocking(False)
        self.ends.append(receiving)
        self.broker.on_sibling(SiblingJoined(0, tag, serving), sending.detach())
        return receiving

    def leave(self, tag):
        self.broker.on_sibling(SiblingChanged(0, tag, False, True), None)


@pytest.fixture
def site():
    site = Site()
    assert site.mailboxes.open()
    yield site
    site.mailboxes.close()
    site.broker.sending.close()
    for end in site.ends:
        end.close()


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    yield ours
    ours.close()
    theirs.close()


def fill(sibling):
    with pytest.raises(mailbox.MailboxFull):
        while True:
            mailbox.post(sibling.sending, mailbox.MESSAGE, "filler", b"")


def heard(receiving):
    """The messages of the topic ``t`` in a mailbox."""
    found = []
    while True:
        try:
            packet = mailbox.unpack(*mailbox.take(receiving))
        except BlockingIOError:
            return found
        if packet.name == "t":
            found.append(packet.data)


def test_a_mailbox_is_asked_for_once():
    site = Site()
    opened = [gevent.spawn(site.mailboxes.open) for _ in range(3)]
    gevent.joinall(opened)
    assert [one.value for one in opened] == [True] * 3
    assert site.broker.asked == 1
    site.mailboxes.close()
    site.broker.sending.close()


def test_without_a_mailbox_the_worker_serves_alone_and_says_so_once():
    site = Site()
    site.broker.available = False
    assert not site.mailboxes.open()
    assert not site.mailboxes.open()
    assert len(site.broker.logged) == site.broker.asked == 1
    site.mailboxes.publish("t", b"", False)


def test_messages_wait_for_room_and_keep_their_order(site, monkeypatch):
    monkeypatch.setattr(module, "_MAX_WAITING", 50)
    receiving = site.join("a")
    fill(site.mailboxes.sibling("a"))
    for number in range(60):
        site.mailboxes.publish("t", b"%d" % number, False)
    found = []
    with gevent.Timeout(30):
        while len(found) < 50:
            found += heard(receiving)
            gevent.sleep(0.001)
    site.mailboxes.publish("t", b"next", False)
    assert [*found, *heard(receiving)] == [*(b"%d" % n for n in range(50)), b"next"]
    assert site.mailboxes.counts()[:4] == (0, 0, 61, 10)
    assert len(site.broker.logged) == 1


def test_a_message_for_which_the_system_has_no_room_keeps_the_hub_free(site, monkeypatch):
    receiving = site.join("a")
    tried = []

    def refuse(*_arguments):
        tried.append(1)
        raise mailbox.MailboxFull("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module.mailbox, "forward", refuse)
        site.mailboxes.publish("t", b"first", False)
        gevent.sleep(0.02)
        site.mailboxes.publish("t", b"second", False)
        gevent.sleep(0.02)
        assert len(tried) < 5
    found = []
    with gevent.Timeout(30):
        while len(found) < 2:
            found += heard(receiving)
            gevent.sleep(0.001)
    assert found == [b"first", b"second"]


def test_the_bytes_that_wait_are_limited(site, monkeypatch):
    monkeypatch.setattr(module, "_MAX_WAITING_BYTES", 1000)
    site.join("a")
    fill(site.mailboxes.sibling("a"))
    for _ in range(3):
        site.mailboxes.publish("t", b"x" * 400, False)
    assert site.mailboxes.counts().dropped == 1


def test_a_sibling_that_goes_while_messages_wait_is_forgotten(site):
    site.join("a")
    fill(site.mailboxes.sibling("a"))
    site.mailboxes.publish("t", b"x", False)
    site.leave("a")
    assert site.mailboxes.sibling("a") is None
    site.mailboxes.publish("t", b"x", False)
    gevent.sleep(0)


def test_a_claimed_connection_is_the_siblings(site, connection):
    receiving = site.join("a")

    def claim():
        packet = mailbox.unpack(*mailbox.take(receiving))
        assert (packet.name, packet.data) == ("key", b"GET")
        assert mailbox.claim(packet.fds[1])
        for fd in packet.fds:
            os.close(fd)

    gevent.spawn_later(0.01, claim)
    assert site.mailboxes.pass_connection(site.mailboxes.sibling("a"), "key", connection.fileno(), b"GET")
    assert site.mailboxes.counts()[:2] == (1, 0)


def test_a_connection_that_is_not_claimed_in_time_stays(site, connection, monkeypatch):
    monkeypatch.setattr(module, "CLAIM_TIME", 0.02)
    receiving = site.join("a")
    sibling = site.mailboxes.sibling("a")
    assert not site.mailboxes.pass_connection(sibling, "key", connection.fileno(), b"GET")
    packet = mailbox.unpack(*mailbox.take(receiving))
    assert not mailbox.claim(packet.fds[1])
    for fd in packet.fds:
        os.close(fd)
    fill(sibling)
    assert not site.mailboxes.pass_connection(sibling, "key", connection.fileno(), b"GET")
    receiving.close()
    assert not site.mailboxes.pass_connection(sibling, "key", connection.fileno(), b"GET")
    assert site.mailboxes.counts()[:2] == (0, 3)


class FullAcceptor(Acceptor):
    def __init__(self):
        self.attached = []

    def make_room(self):
        return False


def test_a_connection_for_which_there_is_no_room_goes_back_at_once(site, connection, monkeypatch):
    monkeypatch.setattr(module, "CLAIM_TIME", 60)
    site.mailboxes._acceptors = lambda: [("key", FullAcceptor())]
    myself = Sibling("myself", os.dup(site.broker.sending.fileno()), True)
    with gevent.Timeout(30):
        assert not site.mailboxes.pass_connection(myself, "key", connection.fileno(), b"GET")
        assert not site.mailboxes.pass_connection(myself, "no server", connection.fileno(), b"GET")
    assert site.mailboxes.counts()[:2] == (0, 2)
    myself.close()


def test_a_worker_that_leaves_takes_what_was_sent_and_no_more(site, connection):
    """Otherwise it would claim a connection and exit."""
    attached = []

    class OpenAcceptor(FullAcceptor):
        def make_room(self):
            return True

        def attach(self, sock, addr, begun, data):
            attached.append(data)
            sock.release()

    site.mailboxes._acceptors = lambda: [("key", OpenAcceptor())]
    claims = [mailbox.make_claim() for _ in range(40)]  # more than are taken at a time
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            for number, claim in enumerate(claims):
                mailbox.post(
                    site.broker.sending, mailbox.CONNECTION, "key", b"%d" % number, (accepted.fileno(), claim)
                )
            site.mailboxes.leave()
            assert attached == [b"%d" % number for number in range(40)]
            with pytest.raises(mailbox.MailboxGone):
                mailbox.post(site.broker.sending, mailbox.MESSAGE, "t", b"late")
    assert [mailbox.take_back(claim) for claim in claims] == [False] * 40
    for claim in claims:
        os.close(claim)
    site.mailboxes.leave()


def test_a_claim_has_one_outcome():
    for settle, theirs in ((mailbox.claim, False), (mailbox.refuse, True)):
        claim = mailbox.make_claim()
        settle(claim)
        assert mailbox.take_back(claim) is theirs
        assert mailbox.take_back(claim) is None
        assert not mailbox.claim(claim)
        os.close(claim)


def test_a_worker_that_dies_while_it_claims_has_the_connection(site, connection, monkeypatch):
    """Between its two steps: the sender must not serve a connection that the other one may have served."""
    monkeypatch.setattr(module, "CLAIM_TIME", 0.02)
    receiving = site.join("a")

    def begin_to_claim():
        packet = mailbox.unpack(*mailbox.take(receiving))
        assert os.eventfd_read(packet.fds[1])
        for fd in packet.fds:
            os.close(fd)

    gevent.spawn_later(0.001, begin_to_claim)
    assert site.mailboxes.pass_connection(site.mailboxes.sibling("a"), "key", connection.fileno(), b"GET")


def test_room_for_a_passed_connection_is_made_by_an_idle_one():
    busy, idle = (
        SimpleNamespace(has_input=lambda value=value: value, expire=lambda: gone.append(1))
        for value in (True, False)
    )
    gone = []
    waiting = SimpleNamespace(longest=lambda: None)
    listener = SimpleNamespace(silent=SimpleNamespace(longest=lambda: None), idle=waiting)
    acceptor = Acceptor(SimpleNamespace(_sock=SimpleNamespace(family=1, proto=0)), listener, 1)
    assert acceptor.make_room()
    acceptor._connections.add(1)
    assert not acceptor.make_room()
    waiting.longest = lambda: busy
    assert not acceptor.make_room()
    assert not gone
    waiting.longest = lambda: idle
    assert acceptor.make_room()
    assert gone


def test_a_sibling_without_a_descriptor_is_reported_once(site):
    for tag in "ab":
        site.broker.on_sibling(SiblingJoined(0, tag, True), None)
    assert len(site.broker.logged) == 1
    assert site.mailboxes.sibling("a") is None


def test_what_a_sibling_sends_wrongly_does_no_harm(site, connection):
    received = []
    site.mailboxes.subscribers.add("t", received.append)
    mailbox.forward(site.broker.sending, b"nonsense", ())
    claims = mailbox.make_claim(), mailbox.make_claim()
    with open(os.devnull) as file:
        mailbox.post(site.broker.sending, mailbox.CONNECTION, "key", b"", (file.fileno(), claims[0]))
    mailbox.post(site.broker.sending, mailbox.CONNECTION, "no server", b"", (connection.fileno(), claims[1]))
    mailbox.post(site.broker.sending, mailbox.MESSAGE, "not subscribed", b"")
    mailbox.post(site.broker.sending, mailbox.MESSAGE, "t", b"heard")
    with gevent.Timeout(30):
        while not received:
            gevent.sleep(0.001)
    assert received == [b"heard"]
    for claim in claims:
        assert mailbox.take_back(claim)
        os.close(claim)


def test_a_key_moves_only_with_its_worker(site):
    for tag in "abc":
        site.join(tag)
    site.join("not ready", serving=False)
    reader = SimpleNamespace(read=lambda head, context, last: ({"QUERY_STRING": head.decode()}, None, None))
    by_key = ByKey(site.mailboxes, "key", lambda request: request.args["k"], reader)
    connection = SimpleNamespace(context=None)

    def owners():
        found = []
        for number in range(200):
            give = by_key(connection, b"k=%d" % number)
            found.append(None if give is None else give.args[0].tag)
        return found

    before = owners()
    assert set(before) == {None, "a", "b", "c"}
    site.leave("b")
    assert [now for now, then in zip(owners(), before, strict=True) if then != "b"] == [
        then for then in before if then != "b"
    ]
    site.mailboxes._broker.exit_announced = True
    assert set(owners()) == {"a", "c"}


def test_only_the_query_names_the_session(site):
    site.mailboxes.tag = "o" * 16
    site.join("s" * 16)
    by_id = BySessionId(site.mailboxes, "key")
    of_sibling = by_id(
        None, b"GET /?EIO=4&sid=%b1 HTTP/1.1\r\nCookie: sid=%b2\r\n\r\n" % (b"s" * 16, b"o" * 16)
    )
    assert of_sibling is not None
    assert of_sibling.args[0].tag == "s" * 16
    assert by_id(None, b"GET /?sid=%b1 HTTP/1.1\r\nCookie: sid=%b2\r\n\r\n" % (b"o" * 16, b"s" * 16)) is None
    assert by_id(None, b"GET / HTTP/1.1\r\nReferer: /?sid=%b1\r\n\r\n" % (b"s" * 16)) is None
    assert site.mailboxes.counts().unknown == 0
    # of another machine
    assert by_id(None, b"GET /?sid=%b.web2.1 HTTP/1.1\r\n\r\n" % (b"x" * 16)) is None
    assert site.mailboxes.counts().unknown == 1


def test_a_worker_that_drains_begins_no_session(site):
    site.mailboxes.tag = "o" * 16
    for tag in ("s", "t"):
        site.join(tag * 16)
    by_id = BySessionId(site.mailboxes, "key")
    begins = b"GET /socket.io/?transport=polling&EIO=4 HTTP/1.1\r\n\r\n"
    others = (
        b"GET /?sid=%b1&EIO=4 HTTP/1.1\r\n\r\n" % (b"o" * 16),
        b"GET / HTTP/1.1\r\nReferer: /?EIO=4\r\n\r\n",
    )
    assert [by_id(None, head) for head in (begins, *others)] == [None] * 3
    site.mailboxes._broker.exit_announced = True
    assert [by_id(None, head) for head in others] == [None] * 2
    # in turns
    assert {by_id(None, begins).args[0].tag for _ in range(2)} == {"s" * 16, "t" * 16}
    for sibling in site.mailboxes._siblings.values():
        sibling.serving = False
    assert by_id(None, begins) is None


@pytest.mark.parametrize("name", ["plain", "*a", "a+b", "a|b", "$a^", "a.b"])
def test_the_name_of_a_cookie_is_not_a_pattern(site, name):
    site.mailboxes.tag, site.mailboxes.key = "o" * 16, b"key"
    site.join("s" * 16)
    by_cookie = ByCookie(site.mailboxes, "key", name)
    connection = SimpleNamespace()
    head = b"GET / HTTP/1.1\r\nCookie: x=y; %b=%b\r\n\r\n"
    of_sibling = value_of_cookie(site, "s" * 16, name)
    give = by_cookie(connection, head % (name.encode(), of_sibling))
    assert give is not None
    assert give.args[0].tag == "s" * 16
    assert connection.extra_headers == b""
    assert by_cookie(connection, head % (b"b", of_sibling)) is None
    assert connection.extra_headers.startswith(b"Set-Cookie: %b=" % name.encode())


def value_of_cookie(site, tag, name):
    """The cookie that the worker with that tag sets."""
    own, site.mailboxes.tag = site.mailboxes.tag, tag
    connection = SimpleNamespace()
    ByCookie(site.mailboxes, "key", name)(connection, b"GET / HTTP/1.1\r\n\r\n")
    site.mailboxes.tag = own
    return connection.extra_headers.split(b"=", 1)[1].split(b";")[0]


def test_a_cookie_of_a_sibling_is_signed_with_the_key_of_the_master(site):
    """The tags of live workers are not secret: session ids begin with them."""
    site.mailboxes.tag, site.mailboxes.key = "o" * 16, b"the master's key"
    site.join("s" * 16)
    signed = value_of_cookie(site, "s" * 16, "worker")
    assert signed[:17] == b"s" * 16 + b"."
    site.mailboxes.key = b"another key"
    foreign = value_of_cookie(site, "s" * 16, "worker")
    site.mailboxes.key = b"the master's key"
    by_cookie = ByCookie(site.mailboxes, "key", "worker")
    other_name = value_of_cookie(site, "s" * 16, "cookie")
    for forged in (signed[:16], signed[:-1], signed[:17] + b"A" * 24, signed + b"A", foreign, other_name):
        connection = SimpleNamespace()
        assert by_cookie(connection, b"GET / HTTP/1.1\r\nCookie: worker=%b\r\n\r\n" % forged) is None
        assert connection.extra_headers.startswith(b"Set-Cookie: worker=%b." % (b"o" * 16))
    assert by_cookie(connection, b"GET / HTTP/1.1\r\nCookie: worker=%b\r\n\r\n" % signed) is not None


@pytest.mark.parametrize("value", ["off", "socketio", "cookie", "cookie:my-name", len])
def test_the_values_of_sticky(value):
    assert check_sticky(value, "here") == value


@pytest.mark.parametrize(
    "value", ["", "cookies", "cookie:", "cookie:a b", "cookie:a;b", "socketio:x", 5, True, b"off"]
)
def test_other_values_of_sticky_are_refused(value):
    with pytest.raises(errors.SettingError, match=r"here: .* cannot be used; use 'socketio'"):
        check_sticky(value, "here")


def test_gunicorns_own_handler_passes_no_connections_and_the_log_says_so(site):
    acceptor = SimpleNamespace(sockname=("127.0.0.1", 8443))
    install(acceptor, "cookie", site.mailboxes, "key", None, site.broker.log)
    [(text, where, sticky)] = site.broker.logged
    assert "has no effect" in text
    assert (where, sticky) == ("127.0.0.1:8443", "cookie")
