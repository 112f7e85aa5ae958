"""Socket.IO with four workers: real clients, all transports, directly, through the proxy and through nginx.

socketio.Server under Flask, and socketio.AsyncServer on an ASGI server.
"""

import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest
import requests
import websocket
from chatters import Chatter
from conditions import wait_for
from free_ports import free_port
from http_client import pids_answering
from node_packages import NODE
from peer_clients import socketio_node
from peer_servers import nginx
from processes import listens, starting
from status_commands import only

WORKERS = 4
TRANSPORTS = (["polling"], ["websocket"], ["polling", "websocket"])


class Site:
    def __init__(self, start, program, *options):
        self.start = start
        self.ports = [free_port() for _ in range(4)]
        env = {"P1": self.ports[0], "P2": self.ports[1], "PASSENGER_OVERLAP": 60}
        self.process = start.gunicorn(
            program, "--graceful-timeout", 3, *options, workers=WORKERS, env=env
        ).wait_ready(self.ports[0])
        pids_answering(self.ports[0], WORKERS)
        # with keep-alive, nginx sends the requests of all clients over the same connections
        upstreams = zip(("keepalive 4;", ""), ("''", "close"), self.ports[2:], strict=True)
        servers = "".join(
            f"""
            upstream chat{port} {{ server 127.0.0.1:{self.ports[0]}; {keepalive} }}
            map $http_upgrade $connection{port} {{ default upgrade; '' {connection}; }}
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://chat{port};
                    proxy_http_version 1.1;
                    proxy_set_header Host $http_host;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection $connection{port};
                    proxy_read_timeout 300s;
                }}
            }}
            """
            for keepalive, connection, port in upstreams
        )
        nginx(start, "front", servers, *self.ports[2:])
        self.chatters = [Chatter(*both) for both in itertools.product(self.ports, TRANSPORTS)]
        self.count = itertools.count()

    def workers(self):
        """The workers of all clients, when each has one that lives."""

        def known():
            found = [chatter.whoami() for chatter in self.chatters]
            alive = self.process.workers()
            return all(who and who[0] in alive for who in found) and [who[0] for who in found]

        def states():
            lost = [chatter.last_words() for chatter in self.chatters if not chatter.client.connected]
            return "\n".join([*(chatter.state() for chatter in self.chatters), *lost, self.process.log()])

        # an attempt that a worker's end has cut off costs a client of asyncio's server up to a minute: half of it
        # for the response, the rest until its poll ends
        return wait_for(known, states, timeout=180)

    def broadcast(self, times=6):
        """Each client in turn speaks to all, and every client hears everything once."""
        self.workers()
        for chatter in self.chatters:
            chatter.news.clear()
        said = [next(self.count) for _ in range(times)]
        for number, chatter in zip(said, itertools.cycle(self.chatters), strict=False):
            chatter.call("all", number)
        for chatter in self.chatters:
            wait_for(lambda c=chatter: len(c.news) >= times, lambda c=chatter: f"{said}, heard {c.news}")
        # what comes twice would have come by now: a later message comes behind it
        last = next(self.count)
        self.chatters[0].call("all", last)
        for chatter in self.chatters:
            wait_for(lambda c=chatter: last in c.news)
            assert sorted(chatter.news) == [*said, last]

    def apart(self):
        """Two clients of different workers."""
        pids = self.workers()
        other = next(n for n, pid in enumerate(pids) if pid != pids[0])
        return self.chatters[0], self.chatters[other]

    def close(self):
        # first the server: that of asyncio does not end the poll of a client that says goodbye
        for chatter in self.chatters:
            chatter.client.reconnection = False
        self.process.stop()
        for chatter in self.chatters:
            chatter.client.disconnect()


SITES = {
    "WSGI": ["socketio_app"],
    # an ASGI server runs in a greenlet of our worker class, and in a thread of the system under gthread
    "ASGI": ["socketio_async_app"],
    "ASGI-gthread": ["socketio_async_app", "-k", "gthread", "-c", "python:gunicorn_passenger.hooks"],
}


@pytest.fixture(scope="module", params=SITES.values(), ids=SITES)
def site(request):
    with starting() as start:
        site = Site(start, *request.param)
        yield site
        site.close()


def test_a_broadcast_reaches_every_client_once(site):
    assert len(set(site.workers())) > 1
    site.broadcast(len(site.chatters))
    wait_for(lambda: only(site.start)["mailboxes"]["sessions"] == len(site.chatters))
    found = only(site.start)["mailboxes"]
    assert found["passed"] > 0
    assert found["dropped"] == 0


def test_a_room_spans_the_workers(site):
    one, other = site.apart()
    for chatter in site.chatters:
        chatter.news.clear()
    for chatter in (one, other):
        chatter.call("join", "two")
    one.call("room", "two", "hello")
    for chatter in (one, other):
        wait_for(lambda c=chatter: c.news == ["hello"])
    one.call("close", "two")  # what one worker publishes arrives in its order
    one.call("room", "two", "for an empty room")
    one.call("all", "last")
    for chatter in site.chatters:
        wait_for(lambda c=chatter: "last" in c.news)
        assert chatter.news == (["hello", "last"] if chatter in (one, other) else ["last"])


def test_a_client_of_another_worker_acknowledges(site):
    one, other = site.apart()
    assert one.call("ask", other.whoami()[1], "who") == "who!"
    assert one.call("ask", one.whoami()[1], "who") == "who!"


@pytest.mark.parametrize("transports", TRANSPORTS, ids="-".join)
def test_the_client_of_npm(site, node_modules, transports):
    for port in site.ports:
        socketio_node(f"{port}/node", "/socket.io", transports)


def test_large_messages_reach_the_clients_of_other_workers(site):
    one, other = site.apart()
    for chatter in site.chatters:
        chatter.news.clear()
    one.call("all", "x" * 300_000)
    for chatter in site.chatters:
        wait_for(lambda c=chatter: c.news == ["x" * 300_000])
    # to one client: python-engineio confuses the two encodings of a binary packet that it sends to several
    other.call("join", "binary")
    one.call("room", "binary", b"y" * 300_000)
    wait_for(lambda: other.news[1:] == [b"y" * 300_000])


@pytest.mark.parametrize("site", [SITES["WSGI"]], ids=["WSGI"], indirect=True)
def test_websockets_are_served_by_the_package(site):
    """Without compression; a request that is none of a WebSocket is refused, and the session stays usable."""
    port = site.ports[0]
    client = websocket.create_connection(
        f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket",
        timeout=60,
        header=["Sec-WebSocket-Extensions: permessage-deflate"],
    )
    assert "sec-websocket-extensions" not in client.getheaders()
    assert client.recv().startswith('0{"sid"')
    client.send("40")
    assert client.recv().startswith('40{"sid"')
    client.ping("x")
    client.send('420["whoami"]')
    assert client.recv_frame().opcode == websocket.ABNF.OPCODE_PONG
    assert client.recv().startswith("430[")
    # RFC 6455 section 7.4.1: this client may send 10 MB
    client.send("4" + "x" * 10_000_001)
    opcode, data = client.recv_data(control_frame=True)
    assert (opcode, int.from_bytes(data, "big")) == (websocket.ABNF.OPCODE_CLOSE, 1009)
    client.close()
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    url = f"http://127.0.0.1:{port}/socket.io/?EIO=4"
    sid = json.loads(requests.get(f"{url}&transport=polling", timeout=60).text[1:])["sid"]
    for session in ("", f"&sid={sid}"):
        for headers, status in (({}, 426), ({"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}, 400)):
            response = requests.get(
                f"{url}&transport=websocket{session}", headers=upgrade | headers, timeout=60
            )
            assert response.status_code == status
            assert "Sec-WebSocket" in response.text
    # the session is not lost, and can still be upgraded
    assert requests.post(f"{url}&transport=polling&sid={sid}", data="40", timeout=60).text == "OK"
    client = websocket.create_connection(
        f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket&sid={sid}", timeout=60
    )
    client.send("2probe")
    assert client.recv() == "3probe"
    client.close()
    assert "Traceback" not in site.process.log()


def test_other_processes_emit(site):
    """A process of the same account, such as a cron job."""
    for chatter in site.chatters:
        chatter.news.clear()
    program = (
        "from gunicorn_passenger.socketio import emitter; outside = emitter(); "
        "[outside.emit('news', n) for n in range(3)]; outside.emit('news', {'n': 'x' * 100_000})"
    )
    environment = {**os.environ, "PASSENGER_RUNTIME_DIR": str(site.process.home / "run")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    for chatter in site.chatters:
        wait_for(lambda c=chatter: len(c.news) == 4)
        # python-socketio's client calls the handler of each message in a thread of its own
        assert sorted(chatter.news, key=str) == [0, 1, 2, {"n": "x" * 100_000}]


def test_the_clients_of_a_killed_worker_connect_again(site):
    victim = site.workers()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in site.workers() and len(site.process.workers()) == WORKERS)
    site.broadcast()


def test_a_client_of_another_worker_can_be_disconnected(site):
    one, other = site.apart()
    gone = []
    other.client.on("disconnect", lambda reason: gone.append(reason))
    one.call("throw_out", other.whoami()[1])
    wait_for(lambda: gone)
    site.chatters.remove(other)
    site.broadcast()


def test_a_worker_that_drains_begins_no_session(start, port):
    """On a connection that it keeps, as nginx's: the session is a new worker's."""
    env = {"P1": port, "P2": free_port()}
    process = start.gunicorn(
        "socketio_async_app", "--keep-alive", 75, "--graceful-timeout", 60, workers=1, env=env
    ).wait_ready(port)  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    old = int(get(connection, "/"))
    process.signal(signal.SIGHUP)
    wait_for(lambda: {one["pid"]: one["state"] for one in only(start)["workers"]}.get(old) == "leaving")
    sid = json.loads(get(connection, "/socket.io/?EIO=4&transport=polling")[1:])["sid"]
    # the connection is the new worker's, and so is the session
    assert int(get(connection, "/")) != old
    other = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    other.request("POST", f"/socket.io/?EIO=4&transport=polling&sid={sid}", body="40")
    assert other.getresponse().read() == b"OK"
    for each in (connection, other):
        each.close()
    # its long time to drain is not for the end of the test
    process.signal(signal.SIGQUIT)
    process.wait_end()


@pytest.mark.parametrize("port", ["P1", "P2"], ids=["direct", "proxy"])
@pytest.mark.parametrize("program", ["socketio_app", "socketio_async_app"])
def test_an_upgrade_that_meets_a_drain_gets_its_reply_first(start, program, port):
    """python-engineio's client stays without a session for ever when a Close frame comes in its place."""
    process, old, ports = one_worker(start, program)
    where = f"127.0.0.1:{ports[port]}/socket.io/?EIO=4"
    polling = requests.get(f"http://{where}&transport=polling", timeout=60)
    sid = json.loads(polling.text[1:])["sid"]
    client = websocket.create_connection(f"ws://{where}&transport=websocket&sid={sid}", timeout=60)
    process.signal(signal.SIGHUP)
    wait_for(lambda: not any(listens(old, each) for each in ports.values()), "the old worker to drain")
    client.send("2probe")
    assert client.recv_data() == (websocket.ABNF.OPCODE_TEXT, b"3probe")
    assert client.recv_data()[0] == websocket.ABNF.OPCODE_CLOSE
    client.shutdown()
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    assert "Traceback" not in process.log()
    assert process.stop() == 0


@pytest.mark.parametrize("port", ["P1", "P2"], ids=["direct", "proxy"])
@pytest.mark.parametrize("program", ["socketio_app", "socketio_async_app"])
def test_a_session_that_begins_in_a_drain_gets_its_first_packets(start, program, port):
    """A client of python-socketio waits for both of them, whatever comes in their place."""
    process, old, ports = one_worker(start, program)
    client = websocket.create_connection(
        f"ws://127.0.0.1:{ports[port]}/socket.io/?EIO=4&transport=websocket", timeout=60
    )
    assert client.recv().startswith('0{"sid"')
    process.signal(signal.SIGHUP)
    wait_for(lambda: not any(listens(old, each) for each in ports.values()), "the old worker to drain")
    client.send("40")
    assert client.recv().startswith('40{"sid"')
    assert client.recv_data()[0] == websocket.ABNF.OPCODE_CLOSE
    client.shutdown()
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    assert "Traceback" not in process.log()
    assert process.stop() == 0


def one_worker(start, program):
    """Of a gunicorn that gives workers a long time to drain; its ports: the server's, and the proxy's."""
    ports = {"P1": free_port(), "P2": free_port()}
    process = start.gunicorn(
        program, "--graceful-timeout", 600, "--timeout", 600, workers=1, env=ports
    ).wait_ready(ports["P1"])
    return process, *process.workers(), ports


@pytest.mark.parametrize("port", ["P1", "P2"], ids=["direct", "proxy"])
@pytest.mark.parametrize("program", ["socketio_app", "socketio_async_app"])
def test_a_drain_ends_the_sessions_of_clients_that_poll(start, program, port):
    process, old, ports = one_worker(start, program)
    address, path = ("127.0.0.1", ports[port]), "/socket.io/?EIO=4&transport=polling"

    def request(method, path, body=None):
        with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read().decode()

    session = f"{path}&sid={json.loads(request('GET', path)[1][1:])['sid']}"
    assert request("POST", session, "40") == (200, "OK")
    assert request("GET", session)[1].startswith('40{"sid"')
    with closing(http.client.HTTPConnection(*address, timeout=60)) as waiting:
        waiting.request("GET", session)
        process.signal(signal.SIGHUP)
        # a packet that clients ignore (NOOP)
        response = waiting.getresponse()
        assert (response.status, response.read()) == (200, b"6")
    process.wait_log(f"{old} disconnected: transport close")
    assert request("GET", session)[0] == 400
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    assert "Traceback" not in process.log()
    assert process.stop() == 0


@pytest.mark.parametrize("program", ["socketio_app", "socketio_async_app"])
def test_a_drain_waits_for_a_client_between_two_polls(start, program):
    """It has no connection, and the program has to hear of its end."""
    process, old, ports = one_worker(start, program)
    url = f"http://127.0.0.1:{ports['P1']}/socket.io/?EIO=4&transport=polling"
    sid = json.loads(requests.get(url, timeout=60).text[1:])["sid"]
    assert requests.post(f"{url}&sid={sid}", data="40", timeout=60).text == "OK"
    process.signal(signal.SIGHUP)
    process.wait_log(f"{old} disconnected: transport close")
    wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    assert requests.get(f"{url}&sid={sid}", timeout=60).status_code == 400
    assert process.stop() == 0


def test_no_session_is_ended_while_the_worker_still_accepts(start, home):
    """The client would connect to the same worker again, and again."""
    chatter_port, stopping, go_on = free_port(), home / "stopping", home / "go on"
    text = f"""
        import os, threading, time
        import gunicorn_passenger as passenger
        from socketio_app import io
        go = threading.Event()
        def stop():
            open({str(stopping)!r}, "w").close()
            while not os.path.exists({str(go_on)!r}):
                time.sleep(0.02)
            go.set()
        passenger.once("jobs", go.wait, stop)
        @io.on("connect")
        def on_connect(auth=None):
            print(os.getpid(), "connected", flush=True)
        from socketio_app import application
        """
    start.write("once_app.py", textwrap.dedent(text))
    process = start.gunicorn(
        "once_app", "--graceful-timeout", 600, "--timeout", 600, workers=1,
        env={"P1": chatter_port, "P2": free_port()},
    ).wait_ready(chatter_port)  # fmt: skip
    (old,) = process.workers()
    chatter = Chatter(chatter_port, ["polling"])
    try:
        process.signal(signal.SIGHUP)
        wait_for(stopping.exists, "the drain to begin")
        # more looks at the sessions than it takes to end one
        with pytest.raises(requests.exceptions.Timeout):
            requests.get(
                f"http://127.0.0.1:{chatter_port}/socket.io/?EIO=4&transport=polling&sid={chatter.client.eio.sid}",
                timeout=1.5,
            )
        assert "disconnected" not in process.log()
        go_on.touch()
        process.wait_log(f"{old} disconnected: transport close")
        wait_for(lambda: (chatter.whoami() or [old])[0] != old, chatter.state)
        assert process.log().count(" connected") == 2
    finally:
        chatter.client.reconnection = False
        process.stop()
        chatter.client.disconnect()


@pytest.mark.parametrize("program", ["socketio_app", "socketio_async_app"])
def test_clients_that_poll_connect_again_while_their_worker_drains(start, node_modules, program):
    process, old, ports = one_worker(start, program)
    command = ["node", NODE / "io_reconnect.js", f"http://127.0.0.1:{ports['P1']}", '["polling"]']
    chatter = Chatter(ports["P1"], ["polling"])
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
            try:
                assert node.stdout.readline() == f"{old}\n"
                assert chatter.whoami()[0] == old
                process.signal(signal.SIGHUP)
                # a response of 400 is an error of the transport
                assert node.stdout.readline() == "transport error\n"
                (new,) = wait_for(lambda: {*process.workers()} - {old}, "the new worker")
                assert node.stdout.read() == f"{new}\n"
            finally:
                node.kill()
        wait_for(lambda: (chatter.whoami() or [0])[0] == new, chatter.state)
        wait_for(lambda: old not in process.workers(), "the old worker to be gone")
    finally:
        chatter.client.reconnection = False
        process.stop()
        chatter.client.disconnect()
    assert "Traceback" not in process.log()


def get(connection, path):
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def test_clients_outlive_a_reload(site):
    site.process.hup(WORKERS, site.ports[0])
    site.broadcast()
    text = site.process.log()
    assert "Traceback" not in text, text
