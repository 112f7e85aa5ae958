"""The proxy between real programs: nginx, Node's http, ws and socket.io, websockets, Flask-SocketIO; and their clients.

The program is ``programs/proxy_peers.py``. What the peers are is in ``peer_servers.py`` and ``node/``.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import zlib

import pytest
import socketio
from conftest import Client, fetch, free_port, require, wait_for
from peer_servers import (
    LIMIT,
    WebsocketsServer,
    nginx,
    node_client,
    node_modules,  # noqa: F401 (a fixture)
    node_server,
    starting,
    wait_listening,
)
from test_examples import Example, assert_shown
from upstream_sockets import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as ws_connect
from websockets.sync.client import unix_connect

BIG = random.Random(4).randbytes(16 * 1024 * 1024)
TEXT = "".join(f"line {number} of a text that is compressed\n" for number in range(2000)).encode()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Peers:
    """The upstreams, and their ports by name."""

    def __init__(self, start):
        self.start = start
        self.ports = {name: free_port() for name in ("node", "nginx", "limited")}
        files = start.home / "files"
        files.mkdir()
        files.chmod(0o755)
        (files / "big.bin").write_bytes(BIG)
        (files / "text.txt").write_bytes(TEXT)
        (files / "small.txt").write_bytes(b"0123456789" * 10)
        (files / "empty.txt").write_bytes(b"")
        (files / "dir").mkdir()
        self.node = node_server(start, "upstream.js", port=self.ports["node"])
        common = f"""
            default_type application/octet-stream;
            root {files};
            gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1000;
            location /conn {{ return 200 "$connection $connection_requests"; }}
            location /seen {{ return 200 "$request_uri|$http_host|$http_x_forwarded_for|$server_protocol"; }}
            location /echo {{ proxy_pass http://127.0.0.1:{self.ports["node"]}; }}
            location /moved {{ return 302 /small.txt; }}
        """
        self.nginx = nginx(
            start,
            "upstream",
            f"""
            server {{ listen 127.0.0.1:{self.ports["nginx"]}; absolute_redirect off; {common} }}
            server {{ listen 127.0.0.1:{self.ports["limited"]}; keepalive_requests 3; {common} }}
            """,
            self.ports["nginx"],
            self.ports["limited"],
        )
        self.websockets = WebsocketsServer()
        self.ports["pyws"] = self.websockets.port

    def state(self):
        """What Node's upstream has counted."""
        return json.loads(fetch(self.ports["node"], "/state")[1])

    def gunicorn(self, start, *arguments, workers, bind):
        ports = {**self.ports, "chat": free_port()}
        process = start.gunicorn(
            "proxy_peers", *arguments, workers=workers, bind=bind, env={"PEERS": json.dumps(ports)}
        )
        where = bind.removeprefix("unix:") if bind.startswith("unix:") else int(bind.rpartition(":")[2])
        wait_listening(process, where)
        wait_for(lambda: fetch(where, "/chat/pid")[0] == 200, lambda: f"the start:\n{process.log()}")
        return process


@pytest.fixture(scope="module")
def peers(node_modules):  # noqa: F811
    with starting() as start, contextlib.ExitStack() as stack:
        peers = Peers(start)
        stack.callback(peers.websockets.end)
        yield peers


class Site:
    """The proxy, running, on a port; ``url`` is for WebSockets and Socket.IO."""

    def __init__(self, peers, process, port, workers):
        self.peers = peers
        self.process = process
        self.port = port
        self.workers = workers

    def get(self, path, method="GET", body=None, **headers):
        """One request; status, fields by lower-case name, body."""
        client = Client(self.port, timeout=LIMIT)
        try:
            client.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = client.getresponse()
            data = response.read()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, data
        finally:
            client.close()

    def assert_quiet(self, since=0):
        text = self.process.log()[since:]
        for word in ("Traceback", "[ERROR]", "[CRITICAL]", "Exception"):
            assert word not in text, text


def serve(peers, workers):
    with starting() as start:
        port = free_port()
        process = peers.gunicorn(start, workers=workers, bind=f"127.0.0.1:{port}")
        yield Site(peers, process, port, workers)


@pytest.fixture(scope="module")
def one_worker(peers):
    yield from serve(peers, 1)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def front(peers):
    """nginx in front of the proxy's UNIX socket, as a user deploys it."""
    with starting() as start:
        port = free_port()
        process = peers.gunicorn(start, workers=2, bind=f"unix:{start.home}/app.sock")
        nginx(
            start,
            "front",
            f"""
            map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
            upstream app {{ server unix:{start.home}/app.sock fail_timeout=0; keepalive 8; }}
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://app;
                    proxy_http_version 1.1;
                    proxy_set_header Host $http_host;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection $connection_upgrade;
                    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                    proxy_set_header X-Forwarded-Proto https;
                    proxy_read_timeout 300s;
                }}
            }}
            """,
            port,
        )
        site = Site(peers, process, port, 2)
        yield site
        site.assert_quiet()


# --- nginx as the upstream ---------------------------------------------------------------------------


def test_nginx_file(site):
    status, fields, body = site.get("/nginx/small.txt")
    assert (status, body) == (200, b"0123456789" * 10)
    assert fields["content-length"] == "100"
    assert fields["accept-ranges"] == "bytes"
    assert fields["server"].startswith("nginx")
    assert fields["etag"]
    assert fields["last-modified"]


def test_nginx_file_of_no_bytes(site):
    status, fields, body = site.get("/nginx/empty.txt")
    assert (status, fields["content-length"], body) == (200, "0", b"")


def test_nginx_head(site):
    client = Client(site.port)
    with contextlib.closing(client):
        for path, length in [("small.txt", "100"), ("big.bin", str(len(BIG)))] * 2:
            client.request("HEAD", f"/nginx/{path}")
            response = client.getresponse()
            assert (response.status, response.getheader("Content-Length")) == (200, length)
            assert response.read() == b""


@pytest.mark.parametrize(
    ("ranges", "status", "content_range", "expected"),
    [
        ("bytes=0-9", 206, "bytes 0-9/100", b"0123456789"),
        ("bytes=95-", 206, "bytes 95-99/100", b"56789"),
        ("bytes=-3", 206, "bytes 97-99/100", b"789"),
        ("bytes=200-", 416, "bytes */100", None),
    ],
)
def test_nginx_range(site, ranges, status, content_range, expected):
    came, fields, body = site.get("/nginx/small.txt", Range=ranges)
    assert (came, fields["content-range"]) == (status, content_range)
    if expected is not None:
        assert body == expected


def test_nginx_several_ranges(site):
    status, fields, body = site.get("/nginx/small.txt", Range="bytes=0-1,98-99")
    assert status == 206
    boundary = re.fullmatch(r"multipart/byteranges; boundary=(\S+)", fields["content-type"]).group(1)
    parts = [part.partition(b"\r\n\r\n")[2] for part in body.split(b"--" + boundary.encode())[1:-1]]
    assert parts == [b"01\r\n", b"89\r\n"]


def test_nginx_unmodified(site):
    _, fields, _ = site.get("/nginx/small.txt")
    client = Client(site.port)
    with contextlib.closing(client):
        for name, value in [
            ("If-None-Match", fields["etag"]),
            ("If-Modified-Since", fields["last-modified"]),
        ] * 2:
            client.request("GET", "/nginx/small.txt", headers={name: value})
            response = client.getresponse()
            assert (response.status, response.read()) == (304, b"")
            assert response.getheader("ETag") == fields["etag"]
        # the connection is in order
        client.request("GET", "/nginx/small.txt", headers={"If-None-Match": '"other"'})
        response = client.getresponse()
        assert (response.status, len(response.read())) == (200, 100)


def test_nginx_gzip_on_the_fly(site):
    """Chunked, because nginx does not know the length; untouched by the proxy."""
    status, fields, body = site.get("/nginx/text.txt", Accept_Encoding="gzip")
    assert (status, fields["content-encoding"], fields["transfer-encoding"]) == (200, "gzip", "chunked")
    assert "content-length" not in fields
    assert gzip.decompress(body) == TEXT
    assert fields["etag"].startswith("W/")
    status, fields, body = site.get("/nginx/text.txt")
    assert "content-encoding" not in fields
    assert (status, body) == (200, TEXT)


def test_nginx_big_file(site):
    status, fields, body = site.get("/nginx/big.bin")
    assert (status, fields["content-length"]) == (200, str(len(BIG)))
    assert sha256(body) == sha256(BIG)


def test_nginx_big_files_at_once(site):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(sha256(site.get("/nginx/big.bin")[2]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [sha256(BIG)] * 4


def test_nginx_connections_are_used_again(single):
    single.get("/nginx/conn")
    opened = int(fetch(single.peers.ports["nginx"], "/conn")[1].split()[0])
    for _ in range(30):
        status, _, body = single.get("/nginx/conn")
        serial, requests = map(int, body.split())
        assert status == 200
        assert serial < opened, "a connection was opened for this request"
        assert requests > 1


def test_nginx_that_closes_after_three_requests(site):
    """It announces each end with ``Connection: close``, which is not for the client."""
    client = Client(site.port)
    with contextlib.closing(client):
        for number in range(20):
            client.request("POST" if number % 2 else "GET", "/limited/conn", b"x" * 10)
            response = client.getresponse()
            _, requests = response.read().split()
            assert response.status in (200, 405)
            assert int(requests) <= 3
            assert response.getheader("Connection", "keep-alive").lower() == "keep-alive"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nginx_that_reloads_has_closed_the_idle_connections(site, method):
    for _ in range(8):
        assert site.get("/nginx/conn")[0] == 200
    before = set(site.peers.nginx.workers())
    site.peers.nginx.signal(signal.SIGHUP)
    wait_for(lambda: not before & set(site.peers.nginx.workers()), "nginx's new worker")
    wait_for(lambda: fetch(site.peers.ports["nginx"], "/conn")[0] == 200, "nginx")
    for _ in range(8):
        assert site.get("/nginx/conn", method, b"body" if method == "POST" else None)[0] == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_nginx_post(site, chunked):
    body = BIG[: 3 * 1024 * 1024 + 5]
    pieces = (body[at : at + 100_000] for at in range(0, len(body), 100_000)) if chunked else body
    status, _, data = site.get("/nginx/echo", "POST", pieces, Content_Type="x/y")
    assert status == 200
    seen = json.loads(data)
    assert (seen["method"], seen["length"], seen["sha256"]) == ("POST", len(body), sha256(body))
    status, _, _ = site.get("/nginx/small.txt", "POST", b"not welcome")
    assert status == 405


def test_nginx_sees_the_request_as_it_was(site):
    for path in ("/seen/a%20b/%2F?q=%41&&", "/seen//two///slashes", "/seen?", "/seen/;a=b,c"):
        status, _, body = site.get(f"/nginx{path}", Host="example.org:81")
        assert (status, body.decode()) == (200, f"{path}|example.org:81|127.0.0.1|HTTP/1.1")


def test_nginx_redirects(site):
    status, fields, _ = site.get("/nginx/moved")
    assert (status, fields["location"]) == (302, "/small.txt")
    status, fields, _ = site.get("/nginx/dir")
    assert (status, fields["location"]) == (301, "/dir/")
    assert site.get("/nginx/missing")[0] == 404


# --- curl -------------------------------------------------------------------------------------------


def curl(*arguments, **options):
    done = subprocess.run(
        [require("curl"), "-sS", "--max-time", str(LIMIT), *map(str, arguments)],
        capture_output=True,
        check=True,
        **options,
    )
    return done.stdout


def test_curl(site, tmp_path):
    base = f"http://127.0.0.1:{site.port}"
    assert sha256(curl(f"{base}/nginx/big.bin")) == sha256(BIG)
    assert curl("--compressed", f"{base}/nginx/text.txt") == TEXT
    # a download that goes on where it stopped
    part = tmp_path / "big.bin"
    part.write_bytes(BIG[:1_000_000])
    curl("-C", "-", "-o", part, f"{base}/nginx/big.bin")
    assert sha256(part.read_bytes()) == sha256(BIG)
    # an upload: Expect: 100-continue, of known and unknown length
    upload = tmp_path / "upload"
    upload.write_bytes(BIG[:5_000_000])
    for options in (["-T", upload], ["-T", "-"], ["-T", upload, "-H", "Expect: 100-continue"]):
        with upload.open("rb") as file:
            seen = json.loads(curl(*options, f"{base}/node/upload", stdin=file))
        assert (seen["method"], seen["length"], seen["sha256"]) == (
            "PUT",
            5_000_000,
            sha256(BIG[:5_000_000]),
        )
    form = json.loads(curl("-F", "a=b", "-F", f"file=@{upload}", f"{base}/node/form"))
    assert form["method"] == "POST"
    assert form["length"] > 5_000_000


# --- Node's http as the upstream ---------------------------------------------------------------------


def names(seen):
    """The names and values that Node received, as pairs."""
    return list(zip(seen["fields"][::2], seen["fields"][1::2], strict=True))


def test_node_sees_the_request(site):
    status, fields, body = site.get(
        "/node/a%2Fb?c=d", "PUT", b"body", X_One="1", Cookie="a=b; c=d", Host="example.org:81"
    )
    seen = json.loads(body)
    assert (status, fields["content-type"]) == (200, "application/json")
    assert (seen["method"], seen["url"], seen["version"]) == ("PUT", "/a%2Fb?c=d", "1.1")
    assert (seen["length"], seen["sha256"]) == (4, sha256(b"body"))
    got = {name.lower(): value for name, value in names(seen)}
    assert len(got) == len(names(seen))
    assert got["x-one"] == "1"
    assert got["cookie"] == "a=b; c=d"
    assert got["content-length"] == "4"
    assert got["x-forwarded-for"] == "127.0.0.1"
    assert got["x-forwarded-proto"] == "http"
    assert got["x-forwarded-host"] == got["host"] == "example.org:81"
    assert got["x-forwarded-port"] == "81"  # as in node-http-proxy: the port that the client speaks of


def test_node_chunked_both_ways(site):
    status, fields, body = site.get("/node/pieces")
    assert (status, fields["transfer-encoding"]) == (200, "chunked")
    assert body == b"".join(b"piece %d\n" % number for number in range(1000))
    seen = json.loads(site.get("/node/x", "DELETE", iter([b"abc", b"de"]))[2])
    assert (seen["method"], seen["length"], seen["sha256"]) == ("DELETE", 5, sha256(b"abcde"))


def test_node_trailers_both_ways(site):
    with connect(site.port) as client:
        client.send(b"GET /node/trailers HTTP/1.1\r\nHost: x\r\nTE: trailers\r\n\r\n")
        _, body = client.response()
        assert re.fullmatch(rb"4\r\nbody\r\n0\r\nX-Sum: 42\r\n\r\n", body, re.I)
        client.send(
            b"POST /node/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"4\r\nbody\r\n0\r\nX-Sum: 43\r\n\r\n"
        )
        head, body = client.response()
        if b"chunked" in head.lower():
            body = b"".join(body.split(b"\r\n")[1::2])
        seen = json.loads(body)
        assert [value.lower() for value in seen["trailers"]] == ["x-sum", "43"]


def test_node_early_hints(site):
    with connect(site.port) as client:
        client.send(b"GET /node/hints HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _ = client.response()
        assert head.startswith(b"HTTP/1.1 103 Early Hints\r\n")
        assert b"</style.css>; rel=preload" in head
        head, body = client.response()
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"after the hints" in body


def test_node_says_continue(site):
    with connect(site.port) as client:
        client.send(b"POST /node/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"body")
        head, body = client.response()
        assert head.startswith(b"HTTP/1.1 200 ")
        assert sha256(b"body").encode() in body


def test_node_does_not_want_the_body(site):
    with connect(site.port) as client:
        client.send(
            b"POST /unwelcome HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        )
        assert client.head().startswith(b"HTTP/1.1 417 ")


def test_node_answers_without_body(site):
    client = Client(site.port)
    with contextlib.closing(client):
        for path, status in [("nothing", 204), ("unmodified", 304)] * 2:
            client.request("GET", f"/node/{path}")
            response = client.getresponse()
            assert (response.status, response.read()) == (status, b"")
            assert "transfer-encoding" not in {name.lower() for name, _ in response.getheaders()}


def test_node_answer_that_ends_with_its_connection(site):
    assert site.get("/node/old")[::2] == (200, b"until the end")


def test_node_cookies(site):
    client = Client(site.port)
    with contextlib.closing(client):
        client.request("GET", "/node/cookies")
        response = client.getresponse()
        response.read()
        assert [value for name, value in response.getheaders() if name.lower() == "set-cookie"] == [
            "a=1; Path=/",
            "b=2; Expires=Thu, 01 Jan 2032 00:00:00 GMT",
        ]


def test_node_both_directions_at_once(site):
    """Each piece is answered before the next is sent: neither side is collected."""
    with connect(site.port) as client:
        client.send(b"POST /node/duplex HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"text/event-stream" in client.head()
        for length in (1, 10, 100):
            client.send(b"%x\r\n%b\r\n" % (length, b"z" * length))
            client.until(b"data: %d\n\n" % length)
        client.send(b"0\r\n\r\n")
        client.until(b"data: end\n\n")
        client.until(b"0\r\n\r\n")


def test_node_head_long_before_its_body(site):
    with connect(site.port) as client:
        client.send(b"GET /node/slow-head HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.head().startswith(b"HTTP/1.1 200 OK\r\n")
        assert site.get("/node/finish")[2] == b"1"
        client.until(b"finished")


def test_node_learns_that_the_client_has_gone(site):
    before = site.peers.state()["aborted"]
    with connect(site.port) as client:
        client.send(b"GET /node/forever HTTP/1.1\r\nHost: x\r\n\r\n")
        client.until(b"first\n")
    wait_for(lambda: site.peers.state()["aborted"] == before + 1, "Node to hear of it")


def test_node_answers_before_the_body_is_there(site):
    with connect(site.port) as client:
        client.send(b"POST /node/early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nbegin")
        head, body = client.response()
        assert head.startswith(b"HTTP/1.1 413 ")
        assert body == b"big"


def test_node_dies_in_its_answer(one_worker):
    with connect(one_worker.port) as client:
        client.send(b"GET /node/dies HTTP/1.1\r\nHost: x\r\n\r\n")
        client.until(b"only this")
        assert client.ended()


def test_node_many_requests_at_once(site):
    """Answers do not get mixed up."""
    wrong = []

    def ask(number):
        client = Client(site.port, timeout=LIMIT)
        with contextlib.closing(client):
            for turn in range(10):
                client.request("POST", f"/node/{number}?{turn}", f"{number} {turn}")
                seen = json.loads(client.getresponse().read())
                if (seen["url"], seen["sha256"]) != (
                    f"/{number}?{turn}",
                    sha256(f"{number} {turn}".encode()),
                ):
                    wrong.append(seen)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- WebSockets --------------------------------------------------------------------------------------

#: Upstreams of WebSockets: the path, and what is known of each.
SOCKETS = {"ws": "/ws/a%20b?c=d", "websockets": "/pyws/a%20b?c=d", "flask-sock": "/chat/sock"}

UPSTREAMS = pytest.mark.parametrize("upstream", SOCKETS)
DEFLATE = pytest.mark.parametrize("deflate", [True, False], ids=["deflate", "plain"])
CLIENTS = pytest.mark.parametrize("client", ["python", "node"])


def python_client(port, path, deflate, protocols=(), closed=1000, close=None):
    """What node/ws_client.js does, by the websockets package."""
    messages = [
        "text", "", "žluťoučký kůň", b"\x00\xff\x80", b"", "x" * 70000, os.urandom(1 << 20),
        os.urandom(1 << 19).hex(),
    ]  # fmt: skip
    with ws_connect(
        f"ws://127.0.0.1:{port}{path}",
        compression="deflate" if deflate else None,
        subprotocols=list(protocols) or None,
        max_size=None,
        open_timeout=LIMIT,
        close_timeout=LIMIT,
        ping_interval=None,
    ) as ws:
        result = {
            "extensions": ws.response.headers.get("Sec-WebSocket-Extensions", ""),
            "protocol": ws.subprotocol or "",
        }
        # all are sent before the last answer is read
        sender = threading.Thread(target=lambda: [ws.send(message) for message in messages])
        sender.start()
        result["echoed"] = [ws.recv(LIMIT) == message for message in messages]
        sender.join()
        assert ws.ping("from the client").wait(LIMIT)
        ws.send("ping")
        result["answer"] = ws.recv(LIMIT)
        if close:
            ws.close(close, "by the client")
        else:
            ws.send(f"close {closed}")
            with contextlib.suppress(ConnectionClosed):
                ws.recv(LIMIT)
        result["closed"] = [ws.protocol.close_rcvd.code, ws.protocol.close_rcvd.reason]
    return result


def converse(client, port, path, deflate, **options):
    if client == "python":
        return python_client(port, path, deflate, **options)
    found = node_client(
        "ws_client.js", f"ws://127.0.0.1:{port}{path}", json.dumps({"deflate": deflate, **options})
    )
    assert found.get("pong") == "from the client", found
    return found


def assert_conversation(found, upstream, deflate, closed):
    assert found["echoed"] == [True] * 8
    assert ("permessage-deflate" in found["extensions"]) == deflate
    assert found["closed"] == closed
    assert found["answer"] == {"ws": "pong from the server", "websockets": "pong True"}.get(upstream, "ping")


@UPSTREAMS
@CLIENTS
@DEFLATE
def test_websocket(site, upstream, client, deflate):
    """Text, binary and empty messages, up to a megabyte; pings of both sides; the server closes."""
    found = converse(client, site.port, SOCKETS[upstream], deflate, closed=3002)
    assert_conversation(found, upstream, deflate, [3002, "as asked"])


@pytest.mark.parametrize("code", [1000, 1001, 1011, 4999])
@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_close_code_of_the_server(site, upstream, code):
    with ws_connect(f"ws://127.0.0.1:{site.port}{SOCKETS[upstream]}", open_timeout=LIMIT) as ws:
        ws.send(f"close {code}")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(LIMIT)
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (code, "as asked")


@pytest.mark.parametrize("code", [1000, 1001, 3001])
@CLIENTS
@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_close_code_of_the_client(single, upstream, client, code):
    ends = {
        "ws": lambda: [tuple(pair) for pair in single.peers.state()["closed"]],
        "websockets": lambda: list(single.peers.websockets.closed),
    }[upstream]
    before = len(ends())
    found = converse(client, single.port, SOCKETS[upstream], True, close=code)
    assert found["closed"] == [code, "by the client"]  # the echo of the closing handshake
    # those of tests before may come late
    wait_for(lambda: (code, "by the client") in ends()[before:], lambda: f"{code}, there are {ends()}")


def test_websocket_that_ends_without_a_word(site):
    """Of the server's side, and of the client's: the other learns of it."""
    with ws_connect(f"ws://127.0.0.1:{site.port}/ws/", open_timeout=LIMIT) as ws:
        ws.send("terminate")
        with pytest.raises(ConnectionClosed) as caught:
            ws.recv(LIMIT)
        assert caught.value.rcvd is None
    before = len(site.peers.state()["closed"])
    with ws_connect(f"ws://127.0.0.1:{site.port}/ws/", open_timeout=LIMIT) as ws:
        ws.send("x")
        assert ws.recv(LIMIT) == "x"
        ws.socket.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: [1006, ""] in site.peers.state()["closed"][before:], "the upstream to hear of it")


@CLIENTS
@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_subprotocols(site, upstream, client):
    found = converse(
        client, site.port, SOCKETS[upstream], False, protocols=["first.example", "second.example"]
    )
    assert found["protocol"] == "second.example"


@pytest.mark.parametrize("upstream", ["ws", "websockets"])
def test_websocket_handshake_as_the_upstream_sees_it(site, upstream):
    with ws_connect(
        f"ws://127.0.0.1:{site.port}{SOCKETS[upstream]}",
        open_timeout=LIMIT,
        additional_headers=[("Cookie", "a=b"), ("X-Twice", "1"), ("X-Twice", "2")],
        origin="http://example.org",
    ) as ws:
        ws.send("info")
        seen = json.loads(ws.recv(LIMIT))
    assert seen["path"] == SOCKETS[upstream]
    fields = seen["headers"]
    pairs = (
        list(zip(fields[::2], fields[1::2], strict=True))
        if isinstance(fields[0], str)
        else map(tuple, fields)
    )
    by_name = {}
    for name, value in pairs:
        by_name.setdefault(name.lower(), []).append(value)
    assert by_name["host"] == [f"127.0.0.1:{site.port}"]
    assert by_name["cookie"] == ["a=b"]
    assert by_name["origin"] == ["http://example.org"]
    assert by_name["x-twice"] == ["1", "2"]
    assert [value.lower() for value in by_name["upgrade"]] == ["websocket"]
    assert [value.lower() for value in by_name["connection"]] == ["upgrade"]
    assert by_name["x-forwarded-for"] == ["127.0.0.1"]
    assert by_name["x-forwarded-proto"] in (["ws"], ["http"])
    assert len(by_name["sec-websocket-key"]) == len(by_name["sec-websocket-version"]) == 1


@pytest.mark.parametrize(("path", "status"), [("/ws/denied", 401), ("/pyws/denied", 403)])
@CLIENTS
def test_websocket_that_is_denied(site, client, path, status):
    if client == "node":
        found = node_client("ws_client.js", f"ws://127.0.0.1:{site.port}{path}")
        assert found["status"] == status
        assert found["body"].startswith("not you")
        return
    with pytest.raises(InvalidStatus) as caught:
        ws_connect(f"ws://127.0.0.1:{site.port}{path}", open_timeout=LIMIT)
    assert caught.value.response.status_code == status
    assert caught.value.response.body.startswith(b"not you")


def test_another_protocol_than_websockets(site):
    with connect(site.port) as client:
        client.send(
            b"GET /node/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly"
        )
        head = client.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"upgrade: echo" in head.lower()
        assert client.exactly(10) == b"helloearly"
        client.send(b"more")
        assert client.exactly(4) == b"more"
        client.finish()
        assert client.rest() == b""


def test_websockets_fifty_at_once_and_requests_beside(site):
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(
                ws_connect(
                    f"ws://127.0.0.1:{site.port}{path}",
                    open_timeout=LIMIT,
                    close_timeout=LIMIT,
                    compression=None,
                )
            )
            for path in itertools.islice(itertools.cycle(SOCKETS.values()), 51)
        ]
        for number, ws in enumerate(clients):
            ws.send(f"client {number}")
        assert site.get("/nginx/small.txt")[0] == 200
        for number, ws in reversed(list(enumerate(clients))):
            assert ws.recv(LIMIT) == f"client {number}"
        assert site.get("/node/")[0] == 200


# --- Socket.IO ---------------------------------------------------------------------------------------

#: Which transports a client tries; an upgrade begins with polling.
TRANSPORTS = {"polling": ["polling"], "websocket": ["websocket"], "upgrade": ["polling", "websocket"]}


def socketio_python(port, path, transports):
    """A python-socketio client: echoes, a call, a broadcast, and the server's disconnect."""
    client = socketio.Client(reconnection=False, request_timeout=LIMIT)
    heard, told, gone = [], [], threading.Event()
    client.on("echoed", lambda data: heard.append(data))
    client.on("told", lambda data: told.append(data))
    client.on("disconnect", lambda *reason: gone.set())
    client.connect(f"http://127.0.0.1:{port}", socketio_path=path, transports=transports, wait_timeout=LIMIT)
    try:
        large, binary = os.urandom(1 << 19).hex(), os.urandom(1 << 20)
        for data in ["text", "", {"nested": ["žluť", 3, None]}, b"\x00\xff\x80", binary, large]:
            client.emit("echo", data)
            wait_for(lambda: heard, "the echo")
            assert heard.pop() == data
        client.emit("everybody", "news")
        wait_for(lambda: told, "the news")
        wanted = transports[-1]
        wait_for(lambda: client.call("ask", "x", timeout=LIMIT)["transport"] == wanted, f"{wanted}")
        assert client.transport() == wanted
        client.emit("leave")
        assert gone.wait(LIMIT)
    finally:
        client.disconnect()


def socketio_node(port, path, transports):
    found = node_client("io_client.js", f"http://127.0.0.1:{port}", f"{path}/", json.dumps(transports))
    assert found.get("echoed") == [True] * 6, found
    assert found["told"] == "news"
    assert found["reply"]["data"] == "x"
    assert found["transport"] == found["reply"]["transport"] == transports[-1]
    assert found["reason"] == "io server disconnect"


SOCKETIO_CLIENTS = {"python": socketio_python, "node": socketio_node}


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_socketio_of_node(site, client, transports):
    SOCKETIO_CLIENTS[client](site.port, "/io", TRANSPORTS[transports])


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_socketio_of_flask(single, client, transports):
    """A second server of the same program. With more workers, polling would have to be sticky."""
    SOCKETIO_CLIENTS[client](single.port, "/socket.io", TRANSPORTS[transports])


@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_socketio_of_flask_in_four_workers(four_workers, client):
    SOCKETIO_CLIENTS[client](four_workers.port, "/socket.io", ["websocket"])


# --- nginx in front ----------------------------------------------------------------------------------


def test_front_plain(front):
    status, fields, body = front.get("/nginx/big.bin")
    assert (status, sha256(body)) == (200, sha256(BIG))
    status, fields, body = front.get("/nginx/text.txt", Accept_Encoding="gzip")
    assert (status, fields["content-encoding"], gzip.decompress(body)) == (200, "gzip", TEXT)
    body = BIG[:2_000_000]
    seen = json.loads(front.get("/node/x", "POST", body)[2])
    assert (seen["length"], seen["sha256"]) == (len(body), sha256(body))
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    seen = json.loads(front.get("/node/x", "POST", pieces)[2])
    assert (seen["length"], seen["sha256"]) == (len(body), sha256(body))
    assert front.get("/nothing")[0] == 204
    assert front.get("/unmodified")[0] == 304


def test_front_tells_who_asked(front):
    """nginx speaks over a UNIX socket of this machine, and is believed."""
    _, _, body = front.get("/node/", X_Forwarded_For="203.0.113.9", Host="example.org")
    got = {name.lower(): value for name, value in names(json.loads(body))}
    addresses = [value.strip() for value in got["x-forwarded-for"].split(",")]
    assert addresses[:2] == ["203.0.113.9", "127.0.0.1"]
    assert got["x-forwarded-proto"].split(",")[0] == "https"
    assert got["host"] == "example.org"


@UPSTREAMS
@CLIENTS
@DEFLATE
def test_front_websocket(front, upstream, client, deflate):
    found = converse(client, front.port, SOCKETS[upstream], deflate, closed=3003)
    assert_conversation(found, upstream, deflate, [3003, "as asked"])


def test_front_websocket_denied(front):
    with pytest.raises(InvalidStatus) as caught:
        ws_connect(f"ws://127.0.0.1:{front.port}/ws/denied", open_timeout=LIMIT)
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("client", SOCKETIO_CLIENTS)
def test_front_socketio(front, client, transports):
    SOCKETIO_CLIENTS[client](front.port, "/io", TRANSPORTS[transports])


# --- a reload under load -----------------------------------------------------------------------------


def test_reload_under_load(start, peers):
    """Four workers are replaced twice: every request is answered whole; WebSockets get 1001, or go on."""
    process = peers.gunicorn(start, "--graceful-timeout", 120, workers=4, bind=f"unix:{start.home}/app.sock")
    end, answers, wrong = threading.Event(), [0] * 4, []
    body = BIG[:100_000]

    def ask(client, turn):
        """One request; an exception, or what is wrong with it."""
        if turn % 3 == 0:
            client.request("GET", "/nginx/text.txt")
            response = client.getresponse()
            return (response.status, response.read()) != (200, TEXT)
        if turn % 3 == 1:
            client.request("POST", "/node/x", body)
            response = client.getresponse()
            return response.status != 200 or json.loads(response.read())["sha256"] != sha256(body)
        client.request("GET", "/node/pieces")
        response = client.getresponse()
        return response.status != 200 or zlib.crc32(response.read()) != pieces

    def load(number):
        for turn in itertools.count():
            if end.is_set():
                return
            client = Client(process.socket, timeout=LIMIT)
            try:
                if ask(client, turn):
                    wrong.append(turn)
            except Exception as error:
                wrong.append(f"{turn}: {error!r}")
            finally:
                client.close()
            answers[number] += 1

    pieces = zlib.crc32(b"".join(b"piece %d\n" % number for number in range(1000)))

    def dial(path):
        try:
            return unix_connect(
                process.socket,
                f"ws://localhost{path}",
                open_timeout=LIMIT,
                close_timeout=LIMIT,
                compression=None,
                ping_interval=None,
            ).__enter__()
        except InvalidStatus as error:
            answer = error.response
            raise AssertionError(f"{answer}\n{answer.body}\n{process.log()[-3000:]}") from error

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                closing = [
                    stack.enter_context(contextlib.closing(dial(path))) for path in ["/ws/", "/pyws/"] * 8
                ]
                waiting = [stack.enter_context(contextlib.closing(dial("/waits/ws/"))) for _ in range(4)]
                for ws in closing + waiting:
                    ws.send("before")
                    assert ws.recv(LIMIT) == "before"
                before = set(process.workers())
                process.signal(signal.SIGHUP)
                for ws in closing:
                    with pytest.raises(ConnectionClosed) as caught:
                        ws.recv(LIMIT)
                    assert caught.value.rcvd is not None, caught.value
                    assert caught.value.rcvd.code == 1001
                # those that may wait go on, in workers that are leaving
                for ws in waiting:
                    ws.send("after")
                    assert ws.recv(LIMIT) == "after"
                    ws.close(1000)
                    assert ws.protocol.close_rcvd is not None
                wait_for(
                    lambda before=before: not before & set(process.workers()) and len(process.workers()) == 4,
                    lambda: f"the reload:\n{process.log()[-3000:]}",
                )
                done = sum(answers)
                wait_for(lambda done=done: sum(answers) > done + 20, "more answers")
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:20]
    assert process.stop() == 0, process.log()
    for word in ("Traceback", "[ERROR]", "[CRITICAL]"):
        assert word not in process.log(), process.log()


def test_reload_behind_nginx(start, peers, home):
    """nginx in front with kept connections to the socket: none of its requests fails, either."""
    process = peers.gunicorn(start, workers=4, bind=f"unix:{home}/app.sock")
    port = free_port()
    nginx(
        start,
        "front",
        f"""
        upstream app {{ server unix:{home}/app.sock fail_timeout=0; keepalive 8; }}
        server {{
            listen 127.0.0.1:{port};
            location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }}
        }}
        """,
        port,
    )
    end, answers = threading.Event(), []

    def load():
        while not end.is_set():
            try:
                answers.append(fetch(port, "/nginx/small.txt"))
            except Exception as error:
                answers.append(repr(error))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            process.hup(4)
            done = len(answers)
            wait_for(lambda done=done: len(answers) > done + 20, "more answers")
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {(200, "0123456789" * 10)}


# --- the example -------------------------------------------------------------------------------------


def test_example(start):
    """examples/proxy, as its README says."""
    port = free_port()
    example = Example(start, "proxy", {8000: port})
    process = wait_listening(example.run(example.command("gunicorn -k")), port)
    wait_for(lambda: fetch(port)[0] == 200, lambda: process.log())
    for command in ("curl", "python client.py"):
        done = subprocess.run(
            ["bash", "-ec", example.command(command)],
            cwd=example.directory,
            env={**os.environ, **example.env},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert_shown(example.promises(command), done.stdout)
    assert process.stop() == 0, process.log()
    assert not re.search("WARNING|ERROR|Traceback", process.log()), process.log()


def test_example_with_plain_python(start):
    port = free_port()
    example = Example(start, "proxy", {8000: port})
    assert "`python server.py`" in (example.directory / "README.md").read_text()
    process = start.python("server.py", cwd=example.directory, env={**example.env, "PORT": port})
    wait_listening(process, port)
    wait_for(lambda: fetch(port)[0] == 200, lambda: process.log())
    process.signal(signal.SIGINT)
    assert process.wait_end() == 0, process.log()


def test_the_packages_of_node_are_those_that_are_pinned(node_modules):  # noqa: F811
    pinned = json.loads((node_modules.parent / "package.json").read_text())["dependencies"]
    for name, version in pinned.items():
        assert json.loads((node_modules / name / "package.json").read_text())["version"] == version
