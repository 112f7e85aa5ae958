"""Pairs of servers, ours and gunicorn's own gevent worker, with the same settings."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from conditions import wait_for
from free_ports import free_port
from http_wire import exchange
from processes import KNOWN_NAMES, Process, Starter

#: Settings that the cases need; one pair of servers each.
GROUPS: dict[str, list[str]] = {
    "default": [],
    "lenient": [
        "--strip-header-spaces", "--permit-obsolete-folding", "--permit-unconventional-http-method",
        "--permit-unconventional-http-version", "--header-map", "dangerous",
        "--limit-request-field_size", "2000",
    ],
    "casefold": ["--permit-unconventional-http-method", "--casefold-http-method", "--header-map", "refuse"],
    "limits": [
        "--limit-request-line", "60", "--limit-request-fields", "4", "--limit-request-field_size", "40",
    ],
    "unlimited": [
        "--limit-request-line", "0", "--limit-request-fields", "0", "--limit-request-field_size", "20000",
    ],
    "untrusted": ["--forwarded-allow-ips", "10.0.0.0/8,192.0.2.1", "--forwarder-headers", "X_REAL_IP,SCRIPT_NAME"],
    "forwarder": ["--forwarded-allow-ips", "*", "--forwarder-headers", "*", "-c", "schemes.conf.py"],
    "one request": ["--keep-alive", "0"],
}  # fmt: skip

#: What the environment says, by group.
ENVIRONMENT = {"forwarder": {"SCRIPT_NAME": "/base"}}


class Server:
    """One gunicorn, on a UNIX socket and a TCP port."""

    def __init__(self, process: Process, path: str, port: int) -> None:
        self.process = process
        self.path = path
        self.port = port

    @property
    def places(self) -> tuple[str | int, ...]:
        return (self.path, self.port)

    def wait_ready(self) -> None:
        """Until both places answer, whatever they answer."""

        def ready(where: str | int) -> bool:
            assert self.process.popen.poll() is None, self.process.log()
            try:
                return bool(exchange(where, [b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"])[0])
            except (ConnectionRefusedError, FileNotFoundError):
                return False

        wait_for(lambda: all(map(ready, self.places)), lambda: f"answers:\n{self.process.log()}")


class Servers:
    """Servers by settings, each started when it is first asked for."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="gp-http-", dir="/tmp"))
        self.home.chmod(0o755)
        self.starter = Starter(self.home)
        self.starter.write(
            "schemes.conf.py", "secure_scheme_headers = {'X-SCHEME': 'tls', 'X_SECURE': '1'}\n"
        )
        self._servers: dict[tuple[str, str], Server] = {}

    def start(self, group: str, worker: str = "ours") -> Server:
        """Start, and do not wait.

        :param worker: ``ours``, ``ours python`` (gunicorn's setting http_parser), or ``reference``.
        """
        if (group, worker) not in self._servers:
            number = len(self._servers)
            path, port = f"{self.home}/{number}.sock", free_port()
            arguments = ["--keep-alive", "60", "--graceful-timeout", "3", *GROUPS[group]]
            if worker != "ours" and "http_parser" in KNOWN_NAMES:
                arguments += ["--http-parser", "python"]
            if worker == "reference":
                arguments += ["-k", "gevent", "-b", f"127.0.0.1:{port}"]
            if "control_socket_disable" in KNOWN_NAMES:
                arguments += ["--no-control-socket"]
            env = {**ENVIRONMENT.get(group, {}), **({} if worker == "reference" else {"ECHO_PORT": port})}
            process = self.starter.gunicorn("http_echo", *arguments, workers=1, bind=f"unix:{path}", env=env)
            self._servers[group, worker] = Server(process, path, port)
        return self._servers[group, worker]

    def get(self, group: str, *workers: str) -> list[Server]:
        servers = [self.start(group, worker) for worker in workers]
        for server in servers:
            server.wait_ready()
        return servers

    def end(self) -> None:
        """End them all at once."""
        for process in self.starter.started:
            with suppress(ProcessLookupError):
                process.popen.terminate()
        left = {process.pid: process.end() for process in self.starter.started}
        shutil.rmtree(self.home, ignore_errors=True)
        assert not any(left.values()), f"processes had to be killed: {left}"


def concurrently(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 12) -> list[Any]:
    """Call for each item, in several threads; the results in order."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
