"""The proxy between real peers: nginx and Node behind it, and the site that a test asks."""

from __future__ import annotations

import hashlib
import json
import random

from conditions import wait_for
from free_ports import free_port
from http_client import Client, fetch
from peer_servers import LIMIT, WebsocketsServer, nginx, node_server, wait_listening
from processes import starting

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


def names(seen):
    """The names and values that Node received, as pairs."""
    return list(zip(seen["fields"][::2], seen["fields"][1::2], strict=True))
