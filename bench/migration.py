"""How long a reload takes with many idle connections, and how many of them the new workers serve.

One gunicorn serves the primary on a UNIX socket. A client opens the connections, sends one request on each,
and leaves them idle. Then gunicorn gets SIGHUP. Printed is the time from the signal until the last old worker
has exited, and what a second request on each connection meets.
"""

import signal
import socket
import time
from collections import Counter
from pathlib import Path

from harness import APPS, PATIENCE, Failed
from harness.limits import free_ports, raise_file_limit
from harness.processes import gunicorn_command, running, wait_for
from harness.program import at_least, option_parser, run_benchmark
from harness.site import temporary_directory

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def request(client: socket.socket) -> int:
    """The pid of the worker that responds on this connection; 0 where it has closed the connection."""
    try:
        client.sendall(REQUEST)
        response = client.recv(4096)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    _, found, body = response.partition(b"\r\n\r\n")
    if not found:
        return 0
    return int(body)


def open_connection(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    # before the timeout: a UNIX socket that does not block refuses where the backlog is full
    client.connect(str(path))
    client.settimeout(PATIENCE)
    return client


def measure_reload() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--connections", type=at_least(1, int), default=10_000, help="default 10000")
    parser.add_argument("--workers", type=at_least(1, int), default=4, help="default 4")
    parser.add_argument("--times", type=at_least(1, int), default=5, help="reloads (default 5)")
    options = parser.parse_args()
    raise_file_limit(options.connections + 1000)
    with temporary_directory() as name:
        path = Path(name) / "s"
        command = gunicorn_command(
            "gunicorn_passenger.Worker", "one_app", path, "--worker-connections", 2 * options.connections,
            "--keep-alive", 3600, workers=options.workers,
        )  # fmt: skip
        with running(command, Path(name), APPS, BENCH_PORT=free_ports(1)) as process:
            wait_for(process, lambda: request(open_connection(path)), "it accepted connections")
            clients = [open_connection(path) for _ in range(options.connections)]
            for _ in range(options.times):
                old = set(map(request, clients))
                if 0 in old:
                    raise Failed("a connection was closed before the reload")
                began = time.perf_counter()
                process.send_signal(signal.SIGHUP)
                wait_for(process, lambda pids=old: not any(map(alive, pids)), "the end of the old workers")
                took = time.perf_counter() - began
                found = Counter(map(request, clients))
                closed = found.pop(0, 0)
                served = sum(found.values())
                print(
                    f"{took:.2f} s until the last of {len(old)} old workers had exited; {served} connections "
                    f"served by {len(found)} new workers, {closed} closed"
                )
                if closed:
                    return 1
    return 0


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


if __name__ == "__main__":
    run_benchmark(measure_reload)
