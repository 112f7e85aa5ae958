"""Mailboxes without processes: what fits in, which worker gets what, and what the master does with those of dead workers."""

import os
import socket
from types import SimpleNamespace

import pytest
from open_descriptors import open_descriptors

from gunicorn_passenger.ipc import channel, mailbox, messages
from gunicorn_passenger.master import descriptors, mailbox_exchange
from gunicorn_passenger.master.mailbox_exchange import MailboxExchange
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels


@pytest.fixture
def ends():
    receiving, sending = mailbox.pair()
    receiving.setblocking(False)
    yield receiving, sending
    receiving.close()
    sending.close()


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    yield ours
    ours.close()
    theirs.close()


def received(receiving):
    return mailbox.unpack(*mailbox.take(receiving))


@pytest.mark.parametrize("size", [0, 1, mailbox.MAX_INLINE, mailbox.MAX_INLINE + 1, 3 << 20])
def test_data_of_every_size_arrives(ends, size):
    before = open_descriptors()
    data = os.urandom(size)
    mailbox.post(ends[1], mailbox.MESSAGE, "a topic", data)
    assert received(ends[0]) == ("m", "a topic", data, [])
    assert open_descriptors() <= before
    with pytest.raises(BlockingIOError):
        mailbox.take(ends[0])


@pytest.mark.parametrize(
    ("name", "size"), [("x" * (mailbox.MAX_NAME + 1), 0), ("a\0b", 0), ("a", mailbox.MAX_DATA + 1)]
)
def test_what_is_too_long_is_refused(ends, name, size):
    with pytest.raises(ValueError, match="bytes"):
        mailbox.post(ends[1], mailbox.MESSAGE, name, bytes(size))


def test_a_full_mailbox_does_not_wait_and_loses_nothing(ends):
    posted = 0
    with pytest.raises(mailbox.MailboxFull):
        while posted < 100_000:
            mailbox.post(ends[1], mailbox.MESSAGE, "t", b"%d" % posted)
            posted += 1
    assert [received(ends[0]).data for _ in range(posted)] == [b"%d" % n for n in range(posted)]


def test_a_closed_mailbox_takes_nothing_and_keeps_what_it_has(ends):
    mailbox.post(ends[1], mailbox.MESSAGE, "t", b"kept")
    ends[0].shutdown(socket.SHUT_RD)
    with pytest.raises(mailbox.MailboxGone):
        mailbox.post(ends[1], mailbox.MESSAGE, "t", b"late")
    assert received(ends[0]).data == b"kept"
    assert mailbox.take(ends[0]) is None


def test_a_connection_is_claimed_once(ends, connection):
    claim = mailbox.make_claim()
    mailbox.post(ends[1], mailbox.CONNECTION, "key", b"GET", (connection.fileno(), claim))
    packet = received(ends[0])
    assert packet[:3] == ("c", "key", b"GET")
    assert mailbox.claim(packet.fds[1])
    assert not mailbox.claim(claim)
    for fd in (claim, *packet.fds):
        os.close(fd)


@pytest.mark.parametrize(
    "packet", [b"x", b"c", b"m", b"z\0", b"c\0data", b"C\0", b"M\0", b"m\xff\0", b"\xff\0"]
)
def test_a_malformed_packet_is_ignored_and_its_descriptors_closed(ends, packet):
    before = open_descriptors()
    with open(os.devnull) as file:
        mailbox.forward(ends[1], packet, [file.fileno()])
        assert received(ends[0]) is None
    assert open_descriptors() <= before


def test_a_mailbox_has_one_direction(ends):
    with pytest.raises(BrokenPipeError):
        ends[0].sendmsg([b"back"], [], socket.MSG_NOSIGNAL)
    ends[0].setblocking(True)
    with pytest.raises(BlockingIOError):
        mailbox.take(ends[0])


def test_an_empty_packet_does_not_leave_its_descriptors(ends):
    before = open_descriptors()
    with open(os.devnull) as file:
        mailbox.forward(ends[1], b"", [file.fileno()])
        mailbox.post(ends[1], mailbox.MESSAGE, "t", b"next")
        assert received(ends[0]).data == b"next"
    assert open_descriptors() <= before


def test_a_file_that_can_change_is_not_read(ends):
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    mailbox.forward(ends[1], b"Mtopic\0", [fd])
    assert received(ends[0]) is None
    os.close(fd)


class Site:
    """An exchange, and the far ends of its workers' channels by age."""

    def __init__(self):
        self.workers = WorkerChannels()
        self.workers.arbiter = SimpleNamespace(num_workers=3, WORKERS={})
        self.exchange = MailboxExchange(self.reply)
        self.ends = {}
        #: what each worker has got
        self.tags = {}
        self.receiving = {}

    def reply(self, worker, message, fd):
        channel.send(worker.sock, message, *(() if fd is None else (fd,)))
        return True

    def add(self, age, **state):
        ours, theirs = channel.pair()
        ours.setblocking(False)
        theirs.setblocking(False)
        worker = WorkerChannel(age, ours, **state)
        self.workers.add(worker)
        self.ends[age] = theirs
        self.exchange.open(worker, messages.OpenMailbox(5), None)
        heard = self.heard(age)
        opened, fds = next(one for one in heard if isinstance(one[0], messages.MailboxOpened))
        heard.remove((opened, fds))
        self.tags[age] = opened.tag
        self.receiving[age] = socket.socket(fileno=fds[0])
        return worker, heard

    def heard(self, age):
        found = []
        while True:
            try:
                found.append(channel.receive(self.ends[age]))
            except BlockingIOError:
                return found

    def close(self):
        self.exchange.after_fork_in_child()
        for worker in self.workers:
            worker.sock.close()
        for sock in (*self.ends.values(), *self.receiving.values()):
            sock.close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def test_each_worker_hears_of_the_others(site):
    first, heard = site.add(1, ready=True)
    assert heard == []
    second, [(joined, fds)] = site.add(2)
    assert joined == messages.SiblingJoined(0, site.tags[1], True)
    with socket.socket(fileno=fds[0]) as sending:
        mailbox.post(sending, mailbox.MESSAGE, "t", b"to the first")
    assert received(site.receiving[1]).data == b"to the first"
    [(joined, fds)] = site.heard(1)
    assert joined == messages.SiblingJoined(0, site.tags[2], False)
    os.close(fds[0])
    second.ready = True
    site.exchange.on_worker_changed(second)
    first.draining = True
    site.exchange.on_worker_changed(first)
    assert site.heard(1) == [(messages.SiblingChanged(0, site.tags[2], True), [])]
    assert site.heard(2) == [(messages.SiblingChanged(0, site.tags[1], False), [])]
    assert len(set(site.tags.values())) == 2
    assert all(len(tag) == 16 for tag in site.tags.values())


def test_a_second_mailbox_is_refused(site):
    worker, _ = site.add(1)
    site.exchange.open(worker, messages.OpenMailbox(6), None)
    [(answer, fds)] = site.heard(1)
    assert isinstance(answer, messages.RequestDenied)
    assert (answer.id, fds) == (6, [])


def test_a_worker_that_dies_while_it_asks_costs_no_sibling_its_channel(site):
    for age in (1, 2, 3):
        site.add(age, ready=True)
    ours, theirs = channel.pair()
    theirs.close()
    dying = WorkerChannel(4, ours)
    site.workers.add(dying)
    closed = []

    def reply(worker, message, fd):
        try:
            return Site.reply(site, worker, message, fd)
        except (channel.ChannelClosed, OSError):
            closed.append(worker.age)
            site.workers.remove(worker)
            site.exchange.on_worker_gone(worker)
            return False

    site.exchange._reply = reply
    site.exchange.open(dying, messages.OpenMailbox(6), None)
    ours.close()
    assert closed == [4]
    for age in (1, 2, 3):
        for _, fds in site.heard(age):
            for fd in fds:
                os.close(fd)


@pytest.mark.parametrize("room", [descriptors.MAX_WAITING, 0])
def test_the_connections_of_a_dead_worker_go_to_a_sibling(site, connection, monkeypatch, room):
    """Also while the master has not closed yet what the worker has sent before."""
    monkeypatch.setattr(descriptors, "MAX_WAITING", room)
    dead, _ = site.add(1, ready=True)
    site.add(2, ready=True, draining=True)
    _, heard = site.add(3, ready=True)
    for _, fds in (*heard, *site.heard(1), *site.heard(2)):
        os.close(fds[0])
    claim = mailbox.make_claim()
    own = site.exchange._by_age[1]
    mailbox.post(own.sending, mailbox.MESSAGE, "t", b"for the dead worker alone")
    mailbox.post(own.sending, mailbox.CONNECTION, "key", b"x" * 100_000, (connection.fileno(), claim))
    site.receiving[1].close()
    site.workers.remove(dead)
    site.exchange.on_worker_gone(dead)
    gone = messages.SiblingChanged(0, site.tags[1], False, True)
    assert site.heard(3) == [(gone, [])]
    assert site.heard(2) == [(gone, [])]
    packet = received(site.receiving[3])
    assert packet[:3] == ("c", "key", b"x" * 100_000)
    with socket.socket(fileno=packet.fds[0]) as passed:
        assert passed.type == socket.SOCK_STREAM
    assert mailbox.claim(packet.fds[1])
    assert not mailbox.claim(claim)
    os.close(packet.fds[1])
    os.close(claim)
    for age in (2, 3):
        with pytest.raises(BlockingIOError):
            mailbox.take(site.receiving[age])
    site.exchange.on_worker_gone(dead)
    assert site.heard(3) == []


def test_the_news_of_many_siblings_leaves_room_in_the_channel(site):
    """Of a worker that does not read, since it imports the program for long."""
    worker, _ = site.add(1)
    opened = [site.exchange.open_outside() for _ in range(300)]
    for tag, receiving in opened[200:]:
        site.exchange.close_outside(tag)
        receiving.close()
    other, heard = site.add(2)
    for _, fds in heard:
        os.close(fds[0])
    other.ready = True
    site.exchange.on_worker_changed(other)
    for _ in range(20):
        assert site.reply(worker, messages.SuccessorReady(0), None)
    known = {}
    while True:
        more = site.exchange.tick(0.0) is not None
        for message, fds in site.heard(1):
            for fd in fds:
                os.close(fd)
            if not isinstance(message, messages.SuccessorReady):
                known[message.tag] = message.serving
                if getattr(message, "gone", False):
                    del known[message.tag]
        if not more:
            break
    assert known == {**{tag: False for tag, _ in opened[:200]}, site.tags[2]: True}
    for _, receiving in opened[:200]:
        receiving.close()


def test_another_process_has_a_mailbox_for_messages(site):
    site.add(1, ready=True)
    tag, receiving = site.exchange.open_outside()
    [(joined, fds)] = site.heard(1)
    assert joined == messages.SiblingJoined(0, tag, False)
    _, heard = site.add(2, ready=True)
    for fd in (*fds, *(fd for _, fds in (*heard, *site.heard(1)) for fd in fds)):
        os.close(fd)
    assert site.exchange.publish("t", b"x" * 100_000) == 3
    for end in (receiving, site.receiving[1], site.receiving[2]):
        assert received(end).data == b"x" * 100_000
    assert site.exchange.counts()[2:4] == (1, 0)
    site.exchange.close_outside(tag)
    site.exchange.close_outside(tag)
    for age in (1, 2):
        assert site.heard(age) == [(messages.SiblingChanged(0, tag, False, True), [])]
    assert mailbox.take(receiving) is None
    receiving.close()


def test_the_messages_that_a_full_mailbox_misses_are_counted(site):
    site.add(1, ready=True)
    while site.exchange.publish("t", b""):
        pass
    published, dropped = site.exchange.counts()[2:4]
    assert dropped == 1
    assert published > 1


def test_a_worker_that_cannot_use_its_mailbox_gives_it_back(site):
    """Without it the siblings would wait for that worker at each connection of a key."""
    worker, _ = site.add(1, ready=True)
    site.add(2, ready=True)
    site.exchange.release(worker, messages.ReleaseMailbox(0), None)
    gone = messages.SiblingChanged(0, site.tags[1], False, True)
    assert site.heard(2) == [(gone, [])]
    assert mailbox.take(site.receiving[1]) is None


def test_what_a_sibling_has_sent_without_end_is_not_taken_out(site, monkeypatch):
    dead, _ = site.add(1, ready=True)
    monkeypatch.setattr(mailbox_exchange, "_MOST_TAKEN", 3)
    monkeypatch.setattr(dead.closer, "_start", lambda: None)
    own = site.exchange._by_age[1]
    with socket.socket() as sock:
        for _ in range(40):
            mailbox.forward(own.sending, b"x", [sock.fileno()])
        before = open_descriptors()
        site.exchange.on_worker_gone(dead)
        assert len(open_descriptors() - before) <= 3
    for fd, _ in dead.closer._waiting:
        os.close(fd)
    dead.closer._waiting.clear()
