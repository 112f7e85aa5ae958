"""Real peers of the proxy: nginx, programs of Node with packages from npm, a server of the websockets package."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

from conditions import wait_for
from free_ports import free_port
from http_client import refused
from processes import Process, Starter, require

NODE = Path(__file__).parent.parent / "node"

#: Seconds that a client of the tests waits for any one thing.
LIMIT = 60


def wait_listening(process: Process, where: Any) -> Process:
    """Wait until a program accepts connections."""

    def ready() -> bool:
        assert process.popen.poll() is None, f"ended with {process.popen.returncode}:\n{process.log()}"
        return not refused(where)

    wait_for(ready, lambda: f"{where} to listen:\n{process.log()}")
    return process


def nginx(start: Starter, name: str, http: str, *ports: int) -> Process:
    """nginx with the given ``http { }`` block, ready when all ports accept."""
    program = require("nginx")
    home = start.home / name
    home.mkdir()
    conf = home / "nginx.conf"
    conf.write_text(
        f"""
        daemon off;
        worker_processes 1;
        pid {home}/nginx.pid;
        error_log {home}/error.log;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 512; }}
        http {{
            access_log off;
            client_body_temp_path {home}/n1; proxy_temp_path {home}/n2; fastcgi_temp_path {home}/n3;
            uwsgi_temp_path {home}/n4; scgi_temp_path {home}/n5;
            client_max_body_size 64m;
            {http}
        }}
        """
    )
    process = start.run(program, "-c", conf, "-p", home, "-e", home / "error.log")
    for port in ports:
        wait_listening(process, port)
    return process


def node_server(start: Starter, script: str, *arguments: object, port: int) -> Process:
    """A server of tests/node, ready when its port accepts."""
    process = start.run(require("node"), NODE / script, port, *arguments, cwd=NODE)
    return wait_listening(process, port)


def node_client(script: str, *arguments: object) -> Any:
    """Run a client of tests/node to its end; what it printed, which is JSON."""
    done = subprocess.run(
        [require("node"), NODE / script, *map(str, arguments)],
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{script} {arguments}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return json.loads(done.stdout)


class WebsocketsServer:
    """A server of the ``websockets`` package in threads of the test: echoes, and obeys ``close CODE``."""

    def __init__(self) -> None:
        from websockets.sync.server import serve

        self.port = free_port()
        self.closed: list[tuple[int | None, str]] = []
        self.server = serve(
            self.converse,
            "127.0.0.1",
            self.port,
            max_size=None,
            select_subprotocol=lambda ws, offered: next((o for o in offered if o == "second.example"), None),
            open_timeout=LIMIT,
            close_timeout=LIMIT,
            ping_interval=None,
            process_request=self.request,
        )
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def request(self, connection: Any, request: Any) -> Any:
        return connection.respond(403, "not you\n") if request.path.endswith("/denied") else None

    def converse(self, ws: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            for message in ws:
                if isinstance(message, str) and message.startswith("close "):
                    ws.close(int(message.split()[1]), "as asked")
                    break
                if message == "info":
                    head = ws.request
                    ws.send(json.dumps({"path": head.path, "headers": list(head.headers.raw_items())}))
                elif message == "ping":
                    ws.send(f"pong {ws.ping(b'from the server').wait(LIMIT)}")
                else:
                    ws.send(message)
        except ConnectionClosed:
            pass
        self.closed.append((ws.close_code, ws.close_reason))

    def end(self) -> None:
        self.server.shutdown()
        self.thread.join()
