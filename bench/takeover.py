"""How soon another worker accepts when the one with the lease is killed, or leaves.

    python bench/takeover.py [--times 50] [--workers 4]

One gunicorn with a server of the placement "one". Each time the worker that accepts is found, a client
begins to ask without a pause (a new connection for each request, which waits as long as it has to), and the
worker is sent SIGKILL, or SIGTERM. Printed is the time from the signal to the first answer by another
worker, and how many connects were refused or reset.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import os
import gunicorn_passenger as passenger

def pid(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]

application = pid
passenger.create_server(pid).listen({port}, name="one", placement="one")
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def ask(port: int) -> int:
    """The pid of the worker that answers.

    :raises OSError: when the connection is refused or reset.
    """
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        data = b""
        while piece := sock.recv(4096):
            data += piece
    if not data:
        raise ConnectionResetError("closed without an answer")
    return int(data.rpartition(b"\r\n\r\n")[2])


def measure(port: int, number: int, times: int) -> tuple[list[float], int]:
    """Milliseconds each time, and how many requests failed."""
    took, failed = [], 0
    for _ in range(times):
        holder = ask(port)
        os.kill(holder, number)
        began = time.perf_counter()
        while True:
            try:
                if ask(port) != holder:
                    break
            except OSError:
                # the worker that was killed may have had it in hand
                failed += 1
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(1.0)  # a successor boots, so that there are always several
    return took, failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="takeover-"))
    port = free_port()
    (home / "program.py").write_text(PROGRAM.format(port=port))
    command = [sys.executable, "-m", "gunicorn", "-k", "gunicorn_passenger.Worker"]
    command += ["-w", str(options.workers), "--umask", "007", "-b", f"unix:{home}/app.sock", "program"]
    with (home / "log").open("wb") as log:
        gunicorn = subprocess.Popen(
            command,
            cwd=home,
            stdout=log,
            stderr=log,
            env={**os.environ, "PASSENGER_RUNTIME_DIR": str(home / "run")},
        )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                ask(port)
                break
            except OSError:
                time.sleep(0.05)
        time.sleep(2)
        print(f"{options.workers} workers, {options.times} times; ms until another worker has answered")
        for label, number in (("SIGKILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
            took, failed = measure(port, number, options.times)
            took.sort()
            print(
                f"{label}: median {statistics.median(took):.1f}, 95 % {took[int(len(took) * 0.95)]:.1f}, "
                f"most {took[-1]:.1f}, least {took[0]:.1f}; failed requests {failed}"
            )
    finally:
        gunicorn.terminate()
        gunicorn.wait(40)
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
