"""Shows what docs/explanation/comparison.md says of uWSGI and of Node's cluster: one line for each claim.

Needs node, and uWSGI (``pip install uwsgi``). It measures nothing.
"""

import http.client
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import APPS, Failed
from harness.limits import free_ports
from harness.processes import all_processes, running, wait_for
from harness.program import option_parser, run_benchmark
from harness.site import temporary_directory

WORKERS = 2
TOGETHER = 16


class Beside:
    """The programs beside us, and where they run."""

    def __init__(self, uwsgi: str, node: str, home: Path) -> None:
        self.uwsgi_path = uwsgi
        self.node_path = node
        self.home = home

    @contextmanager
    def two_workers(
        self, *options: object, second: object = ""
    ) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """A uWSGI with two workers that serve on one port."""
        port = free_ports(1)
        command = [
            self.uwsgi_path, "--http-socket", f"127.0.0.1:{port}", "--master", "--processes", WORKERS,
            "--die-on-term", "--need-app", "--pythonpath", APPS, "--module", "beside_app:say_pid", *options,
        ]  # fmt: skip
        with running(command, self.home, APPS, BENCH_SECOND=second) as process:
            yield process, port

    def log_text(self) -> str:
        return (self.home / "log").read_text(errors="replace")


def asked(port: int) -> int:
    """The process that answers on a port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/")
        return int(connection.getresponse().read())
    finally:
        connection.close()


def answering(port: int) -> set[int]:
    """The processes that answer when many requests come together."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        return set(pool.map(lambda _: asked(port), range(4 * TOGETHER)))


def children(process: subprocess.Popen[bytes]) -> set[int]:
    return {pid for pid, fields in all_processes() if int(fields[1]) == process.pid}


def daemons(process: subprocess.Popen[bytes]) -> int:
    """How many children run a shell, which uWSGI starts for each daemon."""
    return sum(Path(f"/proc/{pid}/comm").read_text() == "sh\n" for pid in children(process))


def uwsgi_library(beside: Beside) -> str:
    second = free_ports(1)
    with beside.two_workers(second=second) as (process, port):
        wait_for(process, lambda: asked(port) and asked(second), "both ports served")
        answers = answering(second)
        if answers != {process.pid}:
            raise Failed(f"on the second port {answers} answered; the master is {process.pid}")
    return "a server that the program opens on import runs in the master alone, and no worker serves it"


def uwsgi_library_in_each_worker(beside: Beside) -> str:
    with beside.two_workers("--lazy-apps", second=free_ports(1)) as (process, _):
        process.wait(60)
    if "Address already in use" not in beside.log_text():
        raise Failed("--lazy-apps: no worker failed")
    return "with --lazy-apps, the second worker fails: Address already in use"


def uwsgi_configured_sockets(beside: Beside) -> str:
    shared = free_ports(1)
    options = ("--shared-socket", f"127.0.0.1:{shared}", "--http-socket", "=0")
    with beside.two_workers(*options) as (process, port):
        wait_for(process, lambda: len(answering(shared)) == WORKERS, "both workers served the shared socket")
        wait_for(process, lambda: len(answering(port)) == WORKERS, "both workers served the first socket")
    return "all workers serve a --shared-socket, but each socket has the same application"


def uwsgi_reload(beside: Beside) -> str:
    failed: list[OSError | http.client.HTTPException] = []
    done = threading.Event()
    answers: list[int] = []

    def client(port: int) -> None:
        while not done.is_set():
            try:
                answers.append(asked(port))
            except (OSError, http.client.HTTPException) as error:
                failed.append(error)

    def reload(process: subprocess.Popen[bytes], port: int) -> None:
        before = answering(port)
        process.send_signal(signal.SIGHUP)
        wait_for(process, lambda: before.isdisjoint(answering(port)), "new workers served")

    with beside.two_workers() as (process, port):
        wait_for(process, lambda: asked(port), "it served")
        threads = [threading.Thread(target=client, args=[port]) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                reload(process, port)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    refused = sum(isinstance(error, ConnectionRefusedError) for error in failed)
    if refused:
        raise Failed(f"{refused} connections were refused in three reloads")
    return (
        f"three SIGHUPs, {len(answers)} requests: 0 connections refused, {len(failed)} failed in another way"
    )


def uwsgi_daemon(beside: Beside) -> str:
    with beside.two_workers("--attach-daemon", "sleep 4711") as (process, port):
        wait_for(
            process, lambda: len(answering(port)) == WORKERS and daemons(process), "workers and a daemon ran"
        )
        count = daemons(process)
    if count != 1:
        raise Failed(f"{count} daemons ran")
    return f"{WORKERS} workers, one --attach-daemon"


def uwsgi_cheaper(beside: Beside) -> str:
    with beside.two_workers("--cheaper", 1) as (process, port):
        wait_for(process, lambda: asked(port), "it served")
        before = len(children(process))
        wait_for(
            process,
            lambda: answering(port) and len(children(process)) > before,
            "the load had added a worker",
        )
        after = len(children(process))
    return f"--cheaper 1: {before} worker at rest, {after} under load"


def uwsgi_router(beside: Beside) -> str:
    if "--route " not in version(beside.uwsgi_path, "--help"):
        return "not tried: this uWSGI has no --route, because it was built without libpcre2-dev"
    second = free_ports(1)
    home = beside.home / "second"
    home.mkdir()
    command = [sys.executable, "-m", "http.server", second, "--bind", "127.0.0.1", "--directory", home]
    (home / "page").write_text("second")
    with (
        running(command, home, home) as target,
        beside.two_workers("--route", f"^/page http:127.0.0.1:{second}") as (process, port),
    ):

        def page(of: int) -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", of, timeout=10)
            try:
                connection.request("GET", "/page")
                return connection.getresponse().read() == b"second"
            finally:
                connection.close()

        wait_for(target, lambda: page(second), "the target served")
        wait_for(process, lambda: page(port), "the route led to it")
    return "the router http: forwards a path to another server"


def node_cluster(beside: Beside) -> str:
    first, second = free_ports(1), free_ports(1)
    command = [beside.node_path, APPS / "beside_cluster.js"]
    with running(command, beside.home, APPS, BENCH_PORT=first, BENCH_SECOND=second) as process:
        for port in (first, second):
            wait_for(
                process, lambda port=port: len(answering(port)) == WORKERS, f"both workers served port {port}"
            )
    if "reload: undefined" not in beside.log_text():
        raise Failed("cluster.reload is not undefined")
    return "both workers serve both ports, which each opens as if it were alone; cluster has no reload()"


CLAIMS: dict[str, list[Callable[[Beside], str]]] = {
    "uWSGI": [
        uwsgi_library,
        uwsgi_library_in_each_worker,
        uwsgi_configured_sockets,
        uwsgi_reload,
        uwsgi_daemon,
        uwsgi_cheaper,
        uwsgi_router,
    ],
    "Node": [node_cluster],
}


def version(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def show() -> int:
    parser = option_parser(__doc__)
    beside = Path(sys.executable).parent / "uwsgi"
    parser.add_argument("--uwsgi", default=str(beside) if beside.exists() else "uwsgi", help="its program")
    options = parser.parse_args()
    programs = {"uWSGI": shutil.which(options.uwsgi), "Node": shutil.which("node")}
    if missing := [name for name, path in programs.items() if path is None]:
        raise Failed(f"not installed: {', '.join(missing)}")
    failed = 0
    for name, claims in CLAIMS.items():
        print(f"{name} {version(programs[name], '--version')}")
        for claim in claims:
            with temporary_directory() as home:
                try:
                    print(f"  {claim(Beside(str(programs['uWSGI']), str(programs['Node']), Path(home)))}")
                except Failed as error:
                    failed += 1
                    print(f"  FAILED {claim.__name__}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_benchmark(show)
