"""The server's side of a WebSocket, with wsproto as the client on a socket pair."""

import contextlib
import os
import random
import select
import socket
from itertools import pairwise
from struct import pack
from types import SimpleNamespace

import gevent
import pytest
from gevent import socket as gsocket
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from gunicorn_passenger.http import client_socket, websocket, websocket_frames
from gunicorn_passenger.http.client_socket import ClientSocket, adopt
from gunicorn_passenger.http.websocket import WebSocket, handshake_error

LIMIT = 300_000
MASK = b"\1\2\3\4"


def masked(first, payload=b"", length=None):
    """A client's frame. ``length`` is what its head says."""
    size = len(payload) if length is None else length
    if size < 126:
        head = pack("!BB", first, 0x80 | size)
    elif size < 65536:
        head = pack("!BBH", first, 0x80 | 126, size)
    else:
        head = pack("!BBQ", first, 0x80 | 127, size)
    return head + MASK + websocket_frames.mask(MASK, payload)


def environ_of(request):
    environ = {"REQUEST_METHOD": "GET"}
    for line in request.decode().split("\r\n")[1:]:
        name, _, value = line.partition(": ")
        environ["HTTP_" + name.upper().replace("-", "_")] = value
    return environ


@pytest.mark.parametrize("send", ["send", "sendall"])
@pytest.mark.parametrize("timeout", [None, 60.0], ids=["without a timeout", "with one"])
def test_what_an_application_sends_is_counted_once(send, timeout):
    """A Close frame may have to wait for the frames behind the response with 101."""
    client, theirs = gsocket.socketpair()
    sock, _ = adopt(theirs.detach())
    sock.settimeout(timeout)
    counts = []
    sock.connection = SimpleNamespace(
        count_sent=counts.append, listener=SimpleNamespace(closing=False), send_pending=lambda: None
    )
    with client, sock:
        getattr(sock, send)(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        assert (sock.switched, sock.sends) == (True, 0)
        getattr(sock, send)(b"\x81\x01a")
        assert sock.sends == 1
        getattr(sock, send)(b"\x81\x01b")
        assert sock.sends == 2
        assert client.recv(1000).endswith(b"\r\n\r\n\x81\x01a\x81\x01b")
        # send() with a timeout may send a part, and is left to gevent
        assert counts == ([] if send == "send" and timeout else [36, 3, 3])
        sock.connection = None


class Client:
    """A client that has connected, and the server's WebSocket."""

    def __init__(self):
        self.sock, theirs = gsocket.socketpair()
        self.wsproto = WSConnection(ConnectionType.CLIENT)
        environ = environ_of(self.wsproto.send(Request(host="x", target="/")))
        assert handshake_error(environ) is None
        self.server_socket, _ = adopt(theirs.detach())
        self.server = WebSocket(self.server_socket, environ, LIMIT)
        assert isinstance(self.next(), AcceptConnection)

    def send(self, event):
        self.sock.sendall(self.wsproto.send(event))

    def next(self):
        """The next event, and of a message the whole of it."""
        parts = []
        while True:
            for event in self.wsproto.events():
                if isinstance(event, TextMessage | BytesMessage):
                    parts.append(event.data)
                    if event.message_finished:
                        return parts[0][:0].join(parts)
                else:
                    return event
            self.wsproto.receive_data(self.sock.recv(1 << 20) or None)

    def left(self):
        """What the server has sent until it closed, as bytes."""
        data = b""
        while chunk := self.sock.recv(65536):
            data += chunk
        return data


@pytest.fixture
def client():
    made = Client()
    yield made
    made.sock.close()
    made.server_socket.close()


@pytest.fixture(autouse=True)
def deadline():
    with gevent.Timeout(60):
        yield


@pytest.mark.parametrize("size", [0, 1, 4, 125, 126, 127, 65535, 65536, 200_000])
def test_messages_of_each_size_in_both_directions(client, size):
    for message in ("é" * (size // 2) + "x" * (size % 2), random.randbytes(size)):
        writer = gevent.spawn(client.server.send, message)
        assert client.next() == message
        writer.get()
        reader = gevent.spawn(client.server.receive)
        client.send(Message(data=message))
        assert reader.get() == message


@given(
    st.lists(
        st.tuples(
            st.one_of(st.text(max_size=40), st.binary(max_size=40), st.binary(min_size=120, max_size=300)),
            st.lists(st.integers(0, 300), max_size=3),
            st.binary(max_size=5),
        ),
        max_size=6,
    ),
    st.integers(1, 50),
)
def test_fragments_with_pings_between_them_wherever_the_bytes_are_cut(messages, size):
    client = Client()
    try:
        data = b""
        for message, cuts, ping in messages:
            payload = message.encode() if isinstance(message, str) else message
            opcode = 1 if isinstance(message, str) else 2
            places = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
            parts = [payload[a:b] for a, b in pairwise(places)]
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                data += masked((0x80 if last else 0) | (0 if number else opcode), part) + masked(0x89, ping)
        received = []

        def receive():
            while (message := client.server.receive()) is not None:
                received.append(message)

        reader = gevent.spawn(receive)
        for at in range(0, len(data), size):
            client.sock.sendall(data[at : at + size])
            if not at % 16:
                gevent.idle()
        for _, cuts, ping in messages:
            for _ in range(len(cuts) + 1):
                pong = client.next()
                assert isinstance(pong, Pong)
                assert pong.payload == ping
        client.send(CloseConnection(code=3000, reason="done"))
        reader.get()
        assert received == [message for message, _, _ in messages]
        reply = client.next()
        assert isinstance(reply, CloseConnection)
        assert reply.code == 3000
    finally:
        client.sock.close()
        client.server_socket.close()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x01x", 1002),  # without a mask
        (masked(0xC1, b"x"), 1002),  # compressed
        (masked(0x83, b"x"), 1002),  # an unknown kind
        (masked(0x80, b"x"), 1002),  # the rest of no message
        (masked(0x01, b"x") + masked(0x81, b"x"), 1002),  # a message in a message
        (masked(0x09, b"x"), 1002),  # a ping in fragments
        (masked(0x89, b"x" * 126), 1002),  # a large ping
        (masked(0x88, b"x"), 1002),  # half of a code
        (masked(0x88, b"\x03\xed"), 1002),  # 1005
        (masked(0x88, b"\x00\x01"), 1002),
        (masked(0x88, b"\x03\xe8\xff"), 1007),
        (masked(0x81, b"\xff"), 1007),
        (masked(0x01, b"\xc3") + masked(0x80, b"("), 1007),
        (masked(0x82, b"", LIMIT + 1), 1009),
        (masked(0x82, b"", 1 << 63), 1002),
        (masked(0x82, b"", (1 << 63) - 1), 1009),
        (b"\x81\xfe\x00\x01" + masked(0x81, b"x")[2:], 1002),  # a length in more bytes than it needs
        (b"\x81\xff" + bytes(7) + b"\x7e" + masked(0x81, b"x" * 126)[4:], 1002),
        (masked(0x81, b"x" * (LIMIT + 1)), 1009),
        (masked(0x01, b"", 4 * LIMIT + 1), 1009),
        (masked(0x02, b"x" * 200_000) + masked(0x80, b"", 100_001), 1009),
    ],
)
def test_what_a_client_must_not_send(client, data, code):
    writer = gevent.spawn(client.sock.sendall, data + masked(0x81, b"y" * 500_000))
    # the application learns it at once
    assert client.server.receive() is None
    assert client.server.receive() is None
    # the rest of what it sends is thrown away, so that the connection is not reset
    end = gevent.spawn(client.server.end)
    writer.get()
    event = client.next()
    assert isinstance(event, CloseConnection)
    assert event.code == code
    assert not end.ready()
    if code % 2:
        client.sock.close()
    else:
        client.sock.sendall(masked(0x88, pack("!H", code)))
    end.get()
    with pytest.raises(BrokenPipeError):
        client.server.send("more")


def test_the_limit_of_a_text_counts_characters(client):
    """As Engine.IO's does."""
    text = "\N{GRINNING FACE}" * LIMIT
    for parts in ([text.encode()], [text.encode()[:700_001], text.encode()[700_001:]]):
        data = [
            masked((0x80 if n == len(parts) - 1 else 0) | (0 if n else 1), part)
            for n, part in enumerate(parts)
        ]
        writer = gevent.spawn(client.sock.sendall, b"".join(data))
        assert client.server.receive() == text
        writer.get()


@pytest.mark.parametrize(
    "data", [masked(0x8A), masked(0x00), masked(0x82, b"x")], ids=["pong", "fragment", "message"]
)
def test_a_client_that_floods_lets_the_others_run(client, data):
    client.sock.sendall(masked(0x02, b"x") if data[0] == 0 else b"")
    writer = gevent.get_hub().threadpool.spawn(flood, client.sock.fileno(), data * 1000)
    reader = gevent.spawn(lambda: [0 for _ in iter(client.server.receive, None)])
    for _ in range(20):
        gevent.sleep(0.001)
    assert not reader.ready()
    client.sock.shutdown(socket.SHUT_RDWR)
    reader.get()
    writer.get()
    # empty fragments take no memory
    assert len(client.server._message) <= 1


def flood(fd, data):
    with contextlib.suppress(OSError):
        while True:
            select.select([], [fd], [])
            os.write(fd, data)


def test_a_text_may_be_cut_within_a_character(client):
    client.sock.sendall(masked(0x01, b"\xc3") + masked(0x80, b"\xa9"))
    assert client.server.receive() == "é"


def test_the_messages_of_an_iteration_are_sent_together(client, monkeypatch):
    sent = []
    monkeypatch.setattr(ClientSocket, "_count", lambda self, count: sent.append(count))
    for number in range(5):
        client.server.send(f"{number}")
    assert sent == []
    assert [client.next() for _ in range(5)] == ["0", "1", "2", "3", "4"]
    assert len(sent) == 1
    # a ping is answered behind what waits
    client.server.send("x")
    client.send(Ping(payload=b"p"))
    reader = gevent.spawn(client.server.receive)
    assert client.next() == "x"
    assert isinstance(client.next(), Pong)
    client.send(CloseConnection(code=1000))
    assert reader.get() is None


def test_greenlets_that_send_to_a_client_that_reads_slowly(client):
    """Nothing is lost or interleaved, and the senders wait."""
    client.server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    done = []

    def send(name):
        for number in range(30):
            client.server.send(f"{name}{number} " + name * 20_000)
            done.append(name)

    senders = [gevent.spawn(send, name) for name in "abc"]
    for _ in range(9):
        gevent.idle()
    assert len(done) < 90
    # another one that uses the socket itself, as simple-websocket does
    other = gevent.spawn(client.server_socket.send, websocket.frame(2, b"z" * 30_000))
    messages = [client.next() for _ in range(91)]
    other.get()
    assert b"z" * 30_000 in messages
    messages.remove(b"z" * 30_000)
    gevent.joinall(senders, raise_error=True)
    for name in "abc":
        assert [m for m in messages if m[0] == name] == [f"{name}{n} " + name * 20_000 for n in range(30)]


def test_small_messages_to_a_client_that_does_not_read(client, monkeypatch):
    """The sender gets an error in the end, and the greenlet that receives ends."""
    monkeypatch.setattr(client_socket, "_PATIENCE", 0.05)
    client.server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reader = gevent.spawn(client.server.receive)
    with pytest.raises(OSError):
        while True:
            client.server.send("x" * 100)
            gevent.sleep(0)
    assert reader.get() is None


def test_a_close_that_the_client_does_not_answer(client, monkeypatch):
    monkeypatch.setattr(websocket, "_CLOSE_TIMEOUT", 0.01)
    reader = gevent.spawn(client.server.receive)
    client.server.send("last")
    client.server.close(1001)
    client.server.close()
    assert reader.get() is None
    assert client.next() == "last"
    event = client.next()
    assert (type(event), event.code) == (CloseConnection, 1001)


def test_a_close_that_the_client_answers(client):
    client.server.close()
    reader = gevent.spawn(client.server.receive)
    event = client.next()
    client.sock.sendall(client.wsproto.send(event.response()))
    assert reader.get() is None
    # no second Close frame, and none of a worker that drains
    client.server_socket.send_last(b"\x88\x02\x03\xe9")
    client.server.end()
    client.server_socket.close()
    assert client.left() == b""


def test_what_waits_is_sent_before_the_end(client):
    client.server.send("last")
    client.server.end()
    client.server_socket.close()
    assert client.left() == b"\x81\x04last"


def test_a_client_that_disconnects(client):
    client.sock.sendall(masked(0x81, b"hello")[:6])
    client.sock.close()
    assert client.server.receive() is None
    with pytest.raises(OSError):
        client.server.send("x")


@pytest.mark.parametrize("partly", [False, True])
def test_a_drain_goes_behind_the_messages(client, partly):
    """Also where the kernel has taken a part of a message only, or nothing yet."""
    if partly:
        client.server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for _ in range(15):
        client.server.send("x" * 1000)
    if partly:
        gevent.sleep(0)
    closing = gevent.spawn(client.server_socket.send_last, b"\x88\x02\x03\xe9")
    messages = [client.next() for _ in range(15)]
    assert messages == ["x" * 1000] * 15
    event = client.next()
    assert (type(event), event.code) == (CloseConnection, 1001)
    closing.get()
    # discarded
    client.server.send("more")
    gevent.sleep(0)
    client.server_socket.close()
    assert client.left() == b""


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"HTTP_SEC_WEBSOCKET_VERSION": "8"}, "426"),
        ({"HTTP_SEC_WEBSOCKET_VERSION": ""}, "426"),
        ({"HTTP_SEC_WEBSOCKET_KEY": ""}, "400"),
        ({"HTTP_SEC_WEBSOCKET_KEY": "AAAA"}, "400"),
        ({"HTTP_SEC_WEBSOCKET_KEY": "é" * 24}, "400"),
        ({"HTTP_SEC_WEBSOCKET_KEY": "!!!!!!!!!!!!!!!!!!!!!!=="}, "400"),
        ({"REQUEST_METHOD": "POST"}, "400"),
    ],
)
def test_a_request_that_is_refused(changed, status):
    environ = environ_of(WSConnection(ConnectionType.CLIENT).send(Request(host="x", target="/")))
    got, headers, reason = handshake_error({**environ, **changed})
    assert got.startswith(status)
    assert ("Sec-WebSocket-Version", "13") in headers or status == "400"
    assert "Sec-WebSocket" in reason


def test_the_accept_key_of_the_rfc():
    """RFC 6455 section 1.3."""
    ours, theirs = gsocket.socketpair()
    sock, _ = adopt(theirs.detach())
    WebSocket(sock, {"HTTP_SEC_WEBSOCKET_KEY": "dGhlIHNhbXBsZSBub25jZQ=="}, LIMIT).end()
    sock.close()
    with ours:
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in ours.recv(65536)
