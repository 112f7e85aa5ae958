"""How soon another worker accepts when the one with the lease of a port is killed, or leaves.

One gunicorn has a server of the placement "one". Each time the worker that accepts is found, a client
begins to ask without a pause (a new connection for each request, which waits as long as it has to), and the
worker is sent SIGKILL, or SIGTERM. Printed is the time from the signal to the first response by another
worker, and how many connects were refused or reset.
"""

import http.client
import os
import signal
import statistics
import time
from contextlib import closing
from pathlib import Path

from harness import APPS, PATIENCE
from harness.limits import free_ports
from harness.processes import gunicorn_command, running, wait_for
from harness.program import at_least, option_parser, run_benchmark
from harness.site import temporary_directory
from harness.tables import percentile


def accepting_worker(port: int) -> int:
    """The pid of the worker that answers.

    :raises OSError: when the connection is refused or reset.
    """
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("GET", "/", headers={"Connection": "close"})
        return int(connection.getresponse().read())


def measure_takeovers(port: int, number: int, times: int) -> tuple[list[float], int]:
    """Milliseconds each time, and how many requests failed."""
    took, failed = [], 0
    for _ in range(times):
        holder = accepting_worker(port)
        os.kill(holder, number)
        began = time.perf_counter()
        while True:
            try:
                if accepting_worker(port) != holder:
                    break
            except (OSError, http.client.HTTPException):
                # the worker that was killed may have had it in hand
                failed += 1
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(1.0)  # a successor boots, so that there are always several
    return took, failed


def measure_signals() -> int:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--times", type=at_least(1, int), default=50, help="takeovers by each signal (default 50)")
    add("--workers", type=at_least(2, int), default=4, help="default 4")
    options = parser.parse_args()
    port = free_ports(1)
    worker = "gunicorn_passenger.Worker"
    with temporary_directory() as name:
        home = Path(name)
        command = gunicorn_command(worker, "one_app", home / "s", workers=options.workers)
        with running(command, home, APPS, BENCH_PORT=port) as process:
            wait_for(process, lambda: accepting_worker(port), "it accepted connections")
            time.sleep(2)
            print(f"{options.workers} workers, {options.times} times; ms until another worker has answered")
            for number in (signal.SIGKILL, signal.SIGTERM):
                took, failed = measure_takeovers(port, number, options.times)
                print(
                    f"{number.name}: median {statistics.median(took):.1f}, 95 % {percentile(took, 95):.1f}, "
                    f"most {max(took):.1f}, least {min(took):.1f}; failed requests {failed}"
                )
    return 0


if __name__ == "__main__":
    run_benchmark(measure_signals)
