"""WebSockets inside the application: flask-sock, simple-websocket and Flask-SocketIO, on both kinds of server."""

import contextlib
import json
import os
import signal
import socket
import struct
import threading

import pytest
import socketio
import websocket
from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch
from processes import descriptors, starting
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as ws_connect
from websockets.sync.client import unix_connect

BOTH = pytest.mark.parametrize("where", ["primary", "second"])
PATHS = pytest.mark.parametrize("path", ["/sock", "/raw"])

MEGABYTE = 1024 * 1024

#: Seconds that a client of the tests waits for any one thing.
LIMIT = 20


class Served:
    """The program of these tests, running."""

    def __init__(self, start, workers=1, *arguments, **env):
        self.second = free_port()
        self.process = start.gunicorn(
            "ws_app", "--graceful-timeout", 3, *arguments, workers=workers, env={"P1": self.second, **env}
        ).wait_ready()
        self.read = 0

    def __getitem__(self, where):
        """The address of the primary, or of the second server."""
        return self.process.socket if where == "primary" else self.second

    def open_now(self, where="primary"):
        """The open conversations that the (only) worker counts."""
        return json.loads(fetch(self[where], "/open")[1])

    def wait_idle(self):
        wait_for(
            lambda: not self.open_now(), lambda: f"{self.open_now()} to end:\n{self.process.log()[-3000:]}"
        )

    def assert_quiet(self):
        """Nothing went wrong since the last look."""
        text = self.process.log()[self.read :]
        self.read += len(text)
        for word in ("Traceback", "[ERROR]", "[CRITICAL]", "Exception"):
            assert word not in text, text


@pytest.fixture(scope="module")
def shared_server():
    """One program for all tests that leave it as they found it."""
    with starting() as starter:
        yield Served(starter)


@pytest.fixture
def served(shared_server):
    """The shared program; afterwards no conversation is open, and its log has no error."""
    shared_server.read = len(shared_server.process.log())
    yield shared_server
    shared_server.wait_idle()
    shared_server.assert_quiet()


def dial(address, path, **options):
    """A WebSocket, by the ``websockets`` package."""
    options = {"open_timeout": LIMIT, "close_timeout": LIMIT, "max_size": None, **options}
    if isinstance(address, str):
        return unix_connect(address, f"ws://localhost{path}", **options)
    return ws_connect(f"ws://127.0.0.1:{address}{path}", **options)


def plain_socket(address):
    client = Client(address, timeout=LIMIT)
    client.connect()
    return client.sock


def dial_plainly(address, path):
    """A WebSocket, by the ``websocket-client`` package: no compression, control frames are seen."""
    return websocket.create_connection(f"ws://localhost{path}", timeout=LIMIT, socket=plain_socket(address))


def handshake(address, path):
    """A connection after the upgrade, by hand; and what came behind the head."""
    conn = plain_socket(address)
    conn.sendall(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        data = conn.recv(4096)
        assert data, head
        head += data
    assert head.startswith(b"HTTP/1.1 101 "), head
    return conn, head.partition(b"\r\n\r\n")[2]


def frame(payload, opcode=1, fin=True):
    """A client's frame; the mask is nought."""
    assert len(payload) < 126
    return bytes([(0x80 if fin else 0) | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


def receive(conn, count):
    data = b""
    while len(data) < count:
        more = conn.recv(count - len(data))
        assert more, data
        data += more
    return data


# --- flask-sock and simple-websocket -------------------------------------------------------------


@BOTH
@PATHS
def test_text_and_binary(served, where, path):
    with dial(served[where], path) as ws:
        for message in ["hello", "", "žluťoučký kůň", b"\x00\xff\x80", b"", "x" * 70000, b"y" * 70000]:
            ws.send(message)
            assert ws.recv(LIMIT) == message


@BOTH
@PATHS
def test_without_compression(served, where, path):
    with contextlib.closing(dial_plainly(served[where], path)) as ws:
        ws.send("hello")
        assert ws.recv() == "hello"
        ws.send_binary(b"\x00\xff")
        assert ws.recv() == b"\x00\xff"


@BOTH
@PATHS
def test_messages_sent_before_the_first_response_is_read(served, where, path):
    """Many messages sent before the first answer is read keep their order."""
    with dial(served[where], path) as ws:
        for number in range(500):
            ws.send(str(number))
        assert [ws.recv(LIMIT) for _ in range(500)] == [str(number) for number in range(500)]


@BOTH
@PATHS
def test_fragments(served, where, path):
    with dial(served[where], path) as ws:
        ws.send(["one ", "two ", "three"])
        assert ws.recv(LIMIT) == "one two three"
        ws.send([b"\x01" * 3000, b"\x02" * 3000, b"\x03"])
        assert ws.recv(LIMIT) == b"\x01" * 3000 + b"\x02" * 3000 + b"\x03"


@BOTH
@PATHS
def test_a_control_frame_between_fragments(served, where, path):
    conn, rest = handshake(served[where], path)
    with contextlib.closing(conn):
        assert not rest
        conn.sendall(frame(b"one ", fin=False) + frame(b"are you there", opcode=9) + frame(b"two", opcode=0))
        assert receive(conn, 2 + 13) == b"\x8a\x0dare you there"
        assert receive(conn, 2 + 7) == b"\x81\x07one two"


@BOTH
@PATHS
def test_frames_sent_byte_by_byte(served, where, path):
    conn, _ = handshake(served[where], path)
    with contextlib.closing(conn):
        for byte in frame(b"slowly") + frame(b"again"):
            conn.sendall(bytes([byte]))
        assert receive(conn, 8) == b"\x81\x06slowly"
        assert receive(conn, 7) == b"\x81\x05again"


@BOTH
@PATHS
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_one_megabyte(served, where, path, compression):
    """Such a message fills the socket's buffer: all of it must arrive, although ``send`` is called once."""
    binary, text = os.urandom(MEGABYTE), os.urandom(MEGABYTE // 2).hex()
    with dial(served[where], path, compression=compression) as ws:
        for message in (binary, text):
            ws.send(message)
            assert ws.recv(LIMIT) == message


@BOTH
def test_eight_megabytes(served, where):
    """More than the buffer of a TCP connection grows to."""
    message = os.urandom(8 * MEGABYTE)
    with dial(served[where], "/raw", compression=None) as ws:
        ws.send(message)
        assert ws.recv(LIMIT) == message


@BOTH
def test_pings_while_a_large_message_is_under_way(served, where):
    """The pong is sent by another greenlet than the message, and must not get into the midst of its frame."""
    message = os.urandom(8 * MEGABYTE)
    with contextlib.closing(dial_plainly(served[where], "/raw")) as ws:
        ws.send_binary(message)
        ws.sock.recv(1, socket.MSG_PEEK)  # the echo has begun, and waits for its reader
        for number in range(5):
            ws.ping(f"ping {number}")
        received = [ws.recv_data_frame(control_frame=True) for _ in range(6)]
    data = [bytes(frame.data) for opcode, frame in received if opcode == websocket.ABNF.OPCODE_BINARY]
    assert data == [message]
    pongs = [bytes(frame.data) for opcode, frame in received if opcode == websocket.ABNF.OPCODE_PONG]
    assert pongs == [f"ping {number}".encode() for number in range(5)]


@BOTH
@PATHS
def test_pings_of_the_client(served, where, path):
    with dial(served[where], path) as ws:
        for number in range(3):
            assert ws.ping(f"ping {number}").wait(LIMIT)
        ws.send("still there")
        assert ws.recv(LIMIT) == "still there"


@BOTH
@PATHS
def test_the_client_closes(served, where, path):
    with dial(served[where], path) as ws:
        ws.send("x")
        ws.recv(LIMIT)
        ws.close(1001, "gone")
        # the server's answer to the closing handshake
        assert ws.protocol.close_rcvd is not None
        assert ws.protocol.close_rcvd.code == 1001
    served.wait_idle()


@BOTH
@PATHS
@pytest.mark.parametrize("code", [1000, 3000])
def test_the_server_closes(served, where, path, code):
    with dial(served[where], path) as ws:
        ws.send(f"close {code}")
        with pytest.raises(ConnectionClosed):
            ws.recv(LIMIT)
        assert (ws.protocol.close_rcvd.code, ws.protocol.close_rcvd.reason) == (code, "as asked")
    served.wait_idle()


@BOTH
@PATHS
def test_after_the_server_has_closed_the_connection_ends(served, where, path):
    """The closing frame, then the end of the connection: no bytes of an HTTP answer behind it."""
    conn, _ = handshake(served[where], path)
    with contextlib.closing(conn):
        conn.sendall(frame(b"close 1000"))
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := conn.recv(4096):
                received += data
        assert received == b"\x88\x0a\x03\xe8as asked"


@BOTH
@PATHS
def test_fifty_at_once(served, where, path):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(served[where], path)) for _ in range(50)]
        for number, ws in enumerate(clients):
            ws.send(f"client {number}")
        for number, ws in reversed(list(enumerate(clients))):
            assert ws.recv(LIMIT) == f"client {number}"
        assert served.open_now(where) == {path[1:]: 50}
        # plain HTTP beside
        assert fetch(served[where], "/pid")[0] == 200
        for ws in clients:
            ws.send("bye")
        assert [ws.recv(LIMIT) for ws in clients] == ["bye"] * 50


@BOTH
def test_plain_http_beside(served, where):
    """Requests on their own connections, and on one that is kept alive, while WebSockets are open and used."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(served[where], path)) for path in ["/sock", "/raw"] * 5]
        kept = Client(served[where], timeout=LIMIT)
        stack.callback(kept.close)
        for number in range(20):
            for ws in clients:
                ws.send(str(number))
            assert fetch(served[where], "/pid")[0] == 200
            kept.request("POST", "/length", b"z" * 5000)
            assert kept.getresponse().read() == b"5000"
            assert [ws.recv(LIMIT) for ws in clients] == [str(number)] * 10


@BOTH
@PATHS
def test_a_websocket_after_requests_on_the_same_connection(served, where, path):
    client = Client(served[where], timeout=LIMIT)
    for _ in range(2):
        client.request("GET", "/pid")
        response = client.getresponse()
        assert response.status == 200
        assert response.getheader("Connection") == "keep-alive"
        response.read()
    ws = websocket.create_connection(f"ws://localhost{path}", timeout=LIMIT, socket=client.sock)
    with contextlib.closing(ws):
        ws.send("hello")
        assert ws.recv() == "hello"


@BOTH
@PATHS
def test_a_plain_request_for_a_websocket_route_is_an_error(shared_server, where, path):
    """No WebSocket without its handshake: the connection ends or is answered with an error, and nothing stays open."""
    conn = plain_socket(shared_server[where])
    with contextlib.closing(conn):
        conn.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := conn.recv(4096):
                received += data
        assert not received or b" 4" in received[:12] or b" 5" in received[:12], received
    shared_server.wait_idle()
    assert fetch(shared_server[where], "/pid")[0] == 200


# --- a connection taken over by hand -------------------------------------------------------------


@BOTH
def test_a_connection_taken_over_by_hand(served, where):
    conn, rest = handshake(served[where], "/taken")
    with contextlib.closing(conn):
        assert not rest
        conn.sendall(b"anything\r\n\r\nat all")
        assert receive(conn, 18) == b"anything\r\n\r\nat all"
        assert served.open_now() == {"taken": 1}
        conn.shutdown(socket.SHUT_WR)
        assert conn.recv(100) == b""


# --- pings of the server -------------------------------------------------------------------------


def test_pings_of_the_server(start):
    served = Served(start, SOCK_OPTIONS='{"ping_interval": 0.2}')
    for where in ("primary", "second"):
        for path in ("/sock", "/raw"):
            with contextlib.closing(dial_plainly(served[where], path)) as ws:
                opcodes = [ws.recv_data_frame(control_frame=True)[0] for _ in range(3)]  # answers each
                assert opcodes == [websocket.ABNF.OPCODE_PING] * 3
                ws.send("still there")
                while (received := ws.recv_data_frame(control_frame=True))[0] == websocket.ABNF.OPCODE_PING:
                    pass
                assert received[1].data == b"still there"
    served.wait_idle()
    served.assert_quiet()


def test_a_client_that_answers_no_ping_is_dropped(start):
    served = Served(start, SOCK_OPTIONS='{"ping_interval": 0.2}')
    for where in ("primary", "second"):
        for path in ("/sock", "/raw"):
            with contextlib.closing(dial_plainly(served[where], path)) as ws:
                assert ws.recv_frame().opcode == websocket.ABNF.OPCODE_PING
                last = ws.recv_frame()
                assert last.opcode == websocket.ABNF.OPCODE_CLOSE
                assert struct.unpack("!H", last.data[:2]) == (1008,)
    served.wait_idle()
    served.assert_quiet()


# --- clients that die ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("how", ["end", "reset", "half a frame"])
@pytest.mark.parametrize("path", ["/sock", "/raw", "/taken", "/socket.io/?EIO=4&transport=websocket"])
def test_a_client_that_dies_leaves_nothing(served, where, path, how):
    """Neither a conversation nor a descriptor stays behind."""
    (worker,) = served.process.workers()
    served.wait_idle()
    kind = "socketio" if "socket.io" in path else path[1:]

    def sockets():
        return {target for target in descriptors(worker) if target.startswith("socket:")}

    before = sockets()
    conns = [handshake(served[where], path)[0] for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for conn in conns:
            stack.callback(conn.close)
            if kind == "socketio":
                conn.sendall(frame(b"40"))
        wait_for(lambda: served.open_now() == {kind: 3}, "the conversations")
        opened = sockets() - before
        assert len(opened) >= len(conns)
        for conn in conns:
            if how == "half a frame":
                conn.sendall(frame(b"half of what")[:9])
            if how == "reset":
                conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served.wait_idle()
    wait_for(lambda: not opened & sockets(), lambda: f"the descriptors: {opened & sockets()} of {opened}")


# --- Flask-SocketIO ------------------------------------------------------------------------------


class SocketIO:
    """A Socket.IO client that keeps what it is told."""

    def __init__(self, address, transports=("websocket",)):
        options = {"socket": plain_socket(address)} if isinstance(address, str) else {}
        self.client = socketio.Client(
            reconnection=False, request_timeout=LIMIT, websocket_extra_options=options
        )
        self.heard = []
        self.gone = threading.Event()
        self.client.on("echoed", lambda data: self.heard.append(data))
        self.client.on("told", lambda data: self.heard.append(data))
        self.client.on("disconnect", lambda *reason: self.gone.set())
        host = "localhost" if isinstance(address, str) else f"127.0.0.1:{address}"
        self.client.connect(f"http://{host}", transports=list(transports), wait_timeout=LIMIT)

    def ask(self, data=None):
        return self.client.call("ask", data, timeout=LIMIT)

    def echo(self, data):
        before = len(self.heard)
        self.client.emit("echo", data)
        wait_for(lambda: len(self.heard) > before, "the echo")
        return self.heard[-1]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.client.disconnect()


@BOTH
def test_socketio_over_websocket(served, where):
    with SocketIO(served[where]) as client:
        assert client.ask("x")["transport"] == "websocket"
        for data in ["text", b"\x00\xff\x80", {"nested": ["žluť", b"\x01", 3]}, "", b""]:
            assert client.echo(data) == data
        assert served.open_now(where) == {"socketio": 1}
        assert fetch(served[where], "/pid")[0] == 200


@BOTH
def test_socketio_one_megabyte(served, where):
    binary, text = os.urandom(MEGABYTE), os.urandom(MEGABYTE // 2).hex()
    with SocketIO(served[where]) as client:
        assert client.echo(binary) == binary
        assert client.echo(text) == text
        assert client.ask(text)["data"] == text


@BOTH
def test_socketio_the_server_disconnects(served, where):
    with SocketIO(served[where]) as client:
        client.client.emit("leave")
        assert client.gone.wait(LIMIT)
    served.wait_idle()


@BOTH
def test_socketio_broadcast_to_many(served, where):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(SocketIO(served[where])) for _ in range(20)]
        clients[0].client.emit("all", "news")
        for client in clients:
            wait_for(lambda client=client: client.heard == ["news"], "the news")


def test_socketio_broadcast_from_one_server_to_the_other(served):
    """One program, one Socket.IO server on two sockets."""
    with SocketIO(served["primary"]) as one, SocketIO(served["second"]) as other:
        one.client.emit("all", "news")
        wait_for(lambda: one.heard == other.heard == ["news"], "the news")


def test_socketio_polling(served):
    with SocketIO(served["second"], ["polling"]) as client:
        assert client.ask("x")["transport"] == "polling"
        for data in ["text", b"\x00\xff\x80", {"nested": ["žluť", 3]}]:
            assert client.echo(data) == data


def test_socketio_upgrade_from_polling(served):
    with SocketIO(served["second"], ["polling", "websocket"]) as client:
        wait_for(lambda: client.client.transport() == "websocket", "the upgrade")
        wait_for(lambda: client.ask()["transport"] == "websocket", "the server to know of it")
        assert client.echo("text") == "text"
        assert client.echo(b"\x00\xff") == b"\x00\xff"


def test_socketio_polling_and_upgrade_on_the_primary(start):
    """Clients that poll speak TCP here: the primary is the only bind."""
    port = free_port()
    process = start.gunicorn("ws_app", workers=1, bind=f"127.0.0.1:{port}").wait_ready(port)
    with SocketIO(port, ["polling"]) as client:
        assert client.ask()["transport"] == "polling"
        assert client.echo(b"\x00\xff") == b"\x00\xff"
    with SocketIO(port, ["polling", "websocket"]) as client:
        wait_for(lambda: client.ask()["transport"] == "websocket", "the upgrade")
        assert client.echo("text") == "text"
    wait_for(lambda: fetch(port, "/open")[1].strip() == "{}", "the end of both")
    assert process.stop() == 0
    assert "Traceback" not in process.log()


# --- several workers -----------------------------------------------------------------------------


def test_several_workers(start):
    """Both workers have conversations of every kind at the same time, on both servers."""
    served = Served(start, 2)
    for where in ("primary", "second"):
        for path in ("/sock", "/raw"):
            with contextlib.ExitStack() as stack:
                clients, pids = [], set()
                while len(pids) < 2:
                    assert len(clients) < 200, f"only {pids} had conversations"
                    ws = stack.enter_context(dial(served[where], path))
                    ws.send("pid")
                    pids.add(int(ws.recv(LIMIT)))
                    clients.append(ws)
                assert pids == set(served.process.workers())
                for ws in clients:
                    ws.send("all of them")
                assert {ws.recv(LIMIT) for ws in clients} == {"all of them"}
        with contextlib.ExitStack() as stack:
            pids, many = set(), []
            while len(pids) < 2:
                assert len(many) < 200, f"only {pids} had conversations"
                many.append(stack.enter_context(SocketIO(served[where])))
                pids.add(many[-1].ask()["pid"])
            assert pids == set(served.process.workers())
            assert {client.echo("all of them") for client in many} == {"all of them"}
    served.assert_quiet()
    assert served.process.stop() == 0
    served.assert_quiet()


# --- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/sock", "/raw", "/taken", "socketio", "none"])
def test_a_graceful_stop_ends_with_websockets_open(start, path):
    """SIGTERM: open conversations end at the latest with the graceful timeout; the exit status is 0."""
    served = Served(start)
    with contextlib.ExitStack() as stack:
        ends = []
        for where in ("primary", "second"):
            if path == "socketio":
                client = stack.enter_context(SocketIO(served[where]))
                assert client.echo("x") == "x"
                ends.append(client.gone.wait)
            elif path != "none":
                conn, _ = handshake(served[where], path)
                stack.enter_context(contextlib.closing(conn))
                text = frame(b"x")
                conn.sendall(text)
                receive(conn, len(text) if path == "/taken" else 3)

                def ended(limit, conn=conn):
                    conn.settimeout(limit)
                    with contextlib.suppress(ConnectionError):
                        while conn.recv(4096):
                            pass
                    return True

                ends.append(ended)
        assert served.process.stop() == 0
        for end in ends:
            assert end(LIMIT)
    served.assert_quiet()


def test_a_conversation_continues_while_the_worker_drains(start):
    """Within the graceful timeout a client may still finish; then the worker ends without waiting for it."""
    served = Served(start, 1, "--graceful-timeout", 50, PASSENGER_WS_STOP="wait")
    with dial(served["primary"], "/sock") as one, dial(served["second"], "/raw") as other:
        for ws in (one, other):
            ws.send("before")
            assert ws.recv(LIMIT) == "before"
        served.process.signal(signal.SIGTERM)
        served.process.wait_log("Handling signal: term")
        for ws in (one, other):
            ws.send("after")
            assert ws.recv(LIMIT) == "after"
    assert served.process.wait_end() == 0
    assert "graceful timeout" not in served.process.log()
    served.assert_quiet()


def test_a_reload_with_websockets_open(start):
    """A HUP: the old worker keeps its conversation for the graceful timeout, the new one takes new clients."""
    served = Served(start, 1, "--graceful-timeout", 50, PASSENGER_WS_STOP="wait")
    with dial(served["primary"], "/sock") as ws:
        ws.send("pid")
        old = ws.recv(LIMIT)
        served.process.signal(signal.SIGHUP)
        wait_for(lambda: fetch(served["primary"], "/pid")[1] != old, "the new worker")
        ws.send("pid")
        assert ws.recv(LIMIT) == old
    wait_for(lambda: int(old) not in served.process.workers(), "the old worker to leave")
    served.assert_quiet()
