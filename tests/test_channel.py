"""The channel's messages, without processes: packing, refusing, carrying descriptors."""

import json
import os

import pytest

from gunicorn_passenger import channel
from gunicorn_passenger.channel import (
    Adopt,
    Adopted,
    Ask,
    Close,
    Closed,
    Fault,
    Granted,
    Hand,
    Heir,
    Leaving,
    Malformed,
    Message,
    Noted,
    Open,
    Opened,
    Pause,
    Paused,
    Ready,
    Refused,
    Rejected,
    Returned,
    Spawn,
    Spawned,
    Told,
    pack,
    receive,
    send,
    unpack,
)

EXAMPLES = [
    Open(1, "tcp", "127.0.0.1", 9000, "", "name", 5, True, "1-2"),
    Open(2, "unix", path="/x"),
    Close(0, "127.0.0.1:9000"),
    Close(3, ""),
    Paused(0, "127.0.0.1:9000"),
    Ready(0, "app.application"),
    Leaving(0),
    Ask(4),
    Hand(6, "127.0.0.1:9000", '["127.0.0.1", 5]'),
    Heir(0),
    Adopted(7, True),
    Returned(6),
    Adopt(0, "primary unix:/a", '""'),
    Spawn(5, "{}"),
    Fault(3, "text"),
    Noted(3, True),
    Opened(1, "127.0.0.1:9000", "127.0.0.1", 9000),
    Opened(1, "", granted=False),
    Granted(1, "127.0.0.1:9000", "127.0.0.1", 9000, "", 3, 2),
    Pause(0, "127.0.0.1:9000"),
    Told(4),
    Spawned(5, "jobs", "127.0.0.1", 9000),
    Refused(1, "in_use", 98, "text"),
    Rejected(0, "text"),
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
    assert receive(ends[1]) == (message, None)


def packet(**changes):
    fields = {"v": 1, "type": "Close", "id": 7, "key": "k"}
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
        (packet(type=["Close"]), "unknown type", 7),
        (packet(key=...), "Close without key", 7),
        (packet(key=5), "Close.key is no", 7),
        (packet(key=None), "Close.key is no", 7),
        (packet(id="7"), "Close.id is no", 0),
        (packet(id=True), "Close.id is no", 0),
        (packet(id=1 << 70), "out of range", 1 << 70),
        (packet(more=1), "Close with unknown field 'more'", 7),
        (packet(key="x" * 5000), "Close.key is too long", 7),
    ],
)
def test_malformed(data, said, number):
    with pytest.raises(Malformed) as caught:
        unpack(data)
    assert said in str(caught.value)
    assert caught.value.id == number


def test_long_texts_are_cut_and_packets_bounded():
    assert len(unpack(pack(Fault(0, "x" * 100000))).text) == channel.MAX_TEXT
    with pytest.raises(ValueError, match="is too long"):
        pack(Open(0, "\U0001f40d" * 4096, "\U0001f40d" * 4096))


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_descriptor_travels_and_is_not_inheritable(ends):
    read, write = os.pipe()
    send(ends[0], EXAMPLES[6], read)
    _, fd = receive(ends[1])
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
    with pytest.raises(Malformed):
        receive(ends[1])
    assert open_descriptors() == before


def test_too_many_descriptors_are_refused(ends):
    import array
    import socket

    before = open_descriptors()
    fds = array.array("i", [0, 0])
    ends[0].sendmsg([pack(Ready(0))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(Malformed, match="more than one descriptor"):
        receive(ends[1])
    assert open_descriptors() == before


def test_a_packet_that_is_too_long(ends):
    ends[0].send(b" " * (channel.MAX_MESSAGE + 1))
    with pytest.raises(Malformed, match="longer than"):
        receive(ends[1])


def test_an_end_that_closes(ends):
    ends[0].close()
    with pytest.raises(Closed):
        receive(ends[1])
    with pytest.raises(Closed):
        send(ends[1], Ready(0))
