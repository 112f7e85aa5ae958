"""The channel's messages, without processes: packing, refusing, carrying descriptors."""

import json
import os

import pytest
from open_descriptors import open_descriptors

from gunicorn_passenger.ipc import channel, messages
from gunicorn_passenger.ipc.channel import ChannelClosed, MalformedPacket, pack, receive, send, unpack
from gunicorn_passenger.ipc.messages import (
    AcceptGranted,
    AcceptPaused,
    Acknowledged,
    AssignConnections,
    AssignResult,
    AssignSettled,
    BindClaimed,
    BootFailure,
    BootVerdict,
    DaemonSpawned,
    GetReport,
    KeepBind,
    MailboxOpened,
    Message,
    OfferConnections,
    OfferSettled,
    OpenMailbox,
    OpenPort,
    PacketRejected,
    PauseAccept,
    PortOpened,
    ReleaseMailbox,
    ReleasePort,
    ReportSent,
    RequestDenied,
    RequestSuccessor,
    SiblingChanged,
    SiblingJoined,
    SpawnDaemon,
    SuccessorReady,
    WorkerLeaving,
    WorkerReady,
)

EXAMPLES = [
    OpenPort(1, "tcp", "127.0.0.1", 9000, "", "name", 5, True, "1-2"),
    OpenPort(2, "unix", path="/x"),
    ReleasePort(0, "127.0.0.1:9000"),
    ReleasePort(3, ""),
    AcceptPaused(0, "127.0.0.1:9000"),
    WorkerReady(0, "app.application", False),
    BindClaimed(0, "127.0.0.1:9000"),
    KeepBind(1, "127.0.0.1:9000", True),
    WorkerLeaving(0),
    GetReport(4),
    ReleaseMailbox(0),
    OfferConnections(6, "127.0.0.1:9000", '[["127.0.0.1", 5]]'),
    SuccessorReady(0),
    AssignResult(7, 32),
    AssignSettled(7, True),
    OfferSettled(6, 1 << 31),
    AssignConnections(7, "primary unix:/a", '[""]'),
    SpawnDaemon(5, "{}"),
    BootFailure(3, "text"),
    Acknowledged(3),
    BootVerdict(3, "exit", True),
    RequestSuccessor(0),
    PortOpened(1, "127.0.0.1:9000", "127.0.0.1", 9000),
    PortOpened(1, "", granted=False),
    AcceptGranted(1, "127.0.0.1:9000", "127.0.0.1", 9000, "", 3, 2),
    PauseAccept(0, "127.0.0.1:9000"),
    ReportSent(4),
    DaemonSpawned(5, "jobs", "127.0.0.1", 9000),
    RequestDenied(1, "in_use", 98, "text"),
    PacketRejected(0, "text"),
    OpenMailbox(8),
    MailboxOpened(8, "tag", "key"),
    SiblingJoined(0, "tag", True),
    SiblingChanged(0, "tag", False, True),
]


@pytest.fixture
def ends():
    ours, theirs = channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_every_message_has_an_example():
    assert {type(m).__name__ for m in EXAMPLES} == set(Message.types)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_there_and_back(message, ends):
    assert unpack(pack(message)) == message
    send(ends[0], message)
    assert receive(ends[1]) == (message, [])


def packet(**changes):
    fields = {"v": 1, "type": "ReleasePort", "id": 7, "key": "k"}
    fields.update(changes)
    return json.dumps({k: v for k, v in fields.items() if v is not ...}).encode()


@pytest.mark.parametrize(
    ("data", "said", "number"),
    [
        (b"\xff\xfe", "not a JSON packet", 0),
        (b"[" * 5000, "not a JSON packet", 0),
        (b"[]", "not a JSON object", 0),
        (packet(v=2), "not of version 1", 7),
        (packet(v=...), "not of version 1", 7),
        (packet(type="Nonsense"), "unknown type 'Nonsense'", 7),
        (packet(type=["ReleasePort"]), "unknown type", 7),
        (packet(key=...), "ReleasePort without key", 7),
        (packet(key=5), "ReleasePort.key is not a value of type str", 7),
        (packet(key=None), "ReleasePort.key is not a value of type str", 7),
        (packet(id="7"), "ReleasePort.id is not a value of type int", 0),
        (packet(id=True), "ReleasePort.id is not a value of type int", 0),
        (packet(id=1 << 70), "out of range", 1 << 70),
        (packet(more=1), "ReleasePort with unknown field 'more'", 7),
        (packet(key="x" * 5000), "ReleasePort.key is too long", 7),
    ],
)
def test_malformed(data, said, number):
    with pytest.raises(MalformedPacket) as caught:
        unpack(data)
    assert said in str(caught.value)
    assert caught.value.id == number


def test_long_texts_are_cut_and_packets_bounded():
    assert len(unpack(pack(BootFailure(0, "x" * 100000))).text) == messages.MAX_TEXT
    with pytest.raises(ValueError, match="is too long"):
        pack(OpenPort(0, "\U0001f40d" * 4096, "\U0001f40d" * 4096))


def test_descriptor_travels_and_is_not_inheritable(ends):
    read, write = os.pipe()
    send(ends[0], EXAMPLES[6], read)
    _, (fd,) = receive(ends[1])
    assert fd not in (None, read)
    assert not os.get_inheritable(fd)
    os.write(write, b"x")
    assert os.read(fd, 1) == b"x"
    for number in (read, write, fd):
        os.close(number)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_descriptors_with_a_malformed_packet_are_closed(ends, count):
    import array
    import socket

    before = open_descriptors()
    fds = array.array("i", [0] * count)
    ends[0].sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(MalformedPacket):
        receive(ends[1])
    assert open_descriptors() <= before


def test_too_many_descriptors_are_refused(ends):
    import array
    import socket

    before = open_descriptors()
    fds = array.array("i", [0, 0])
    ends[0].sendmsg([pack(WorkerReady(0))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(MalformedPacket, match="more descriptors than the message may have"):
        receive(ends[1])
    assert open_descriptors() <= before


def test_a_packet_that_is_too_long(ends):
    ends[0].send(b" " * (channel.MAX_MESSAGE + 1))
    with pytest.raises(MalformedPacket, match="longer than"):
        receive(ends[1])


def test_an_end_that_closes(ends):
    ends[0].close()
    with pytest.raises(ChannelClosed):
        receive(ends[1])
    with pytest.raises(ChannelClosed):
        send(ends[1], WorkerReady(0))


def test_a_message_is_a_record_of_its_fields():
    port = OpenPort(2, "unix", path="/x")
    assert port == OpenPort(2, "unix", path="/x") != port.replace(path="/y")
    assert len({port, OpenPort(2, "unix", path="/x"), port.replace(id=3)}) == 2
    assert repr(ReleasePort(3, "k")) == "ReleasePort(id=3, key='k')"
    assert ReleasePort(3, "k") != AcceptPaused(3, "k")
    with pytest.raises(AttributeError, match=r"OpenPort\.port cannot be changed"):
        port.port = 5
    for make in (
        lambda: ReleasePort(3),
        lambda: ReleasePort(3, "k", 5),
        lambda: ReleasePort(3, "k", key="l"),
    ):
        with pytest.raises(TypeError, match="ReleasePort has the fields id, key"):
            make()
    with pytest.raises(TypeError, match="ReleasePort has the fields id, key"):
        ReleasePort(3, "k", host="h")
