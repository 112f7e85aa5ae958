"""The proxy between real programs: nginx, Node's http, ws and socket.io, websockets, Flask-SocketIO; and their clients.

The program is ``programs/proxy_peers.py``. What the peers are is in ``peer_servers.py`` and ``node/``.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import threading

import pytest
from conditions import wait_for
from example_sites import Example, assert_shown
from free_ports import free_port
from http_client import Client, fetch
from peer_servers import LIMIT, wait_listening
from peer_site import BIG, TEXT, names, sha256
from processes import require
from upstream_sockets import connect

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
    assert (status, fields["location"]) == (302, "/nginx/small.txt")
    status, fields, _ = site.get("/nginx/dir")
    assert (status, fields["location"]) == (301, "/nginx/dir/")
    assert site.get("/nginx/missing")[0] == 404


# --- curl --------------------------------------------------------------------------------------------


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
    # a download that is resumed
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
            "a=1; Path=/node",
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


def test_the_packages_of_node_are_those_that_are_pinned(node_modules):
    pinned = json.loads((node_modules.parent / "package.json").read_text())["dependencies"]
    for name, version in pinned.items():
        assert json.loads((node_modules / name / "package.json").read_text())["version"] == version
