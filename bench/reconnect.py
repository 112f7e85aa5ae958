"""How long Socket.IO clients are without a session when gunicorn reloads a program that imports slowly.

Real clients of python-socketio, half of them with WebSockets, half with long polling, try every 20 ms to
connect again. Printed are the median and the longest time between "disconnect" and the next "connect" of a
client, and the time from the moment when the last new worker was ready until the last client was connected.
"""

import asyncio
import logging
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import PATIENCE, Failed
from harness.limits import raise_file_limit
from harness.program import at_least, choice, option_parser, run_benchmark
from harness.site import temporary_directory
from harness.tables import machine, progress, table
from harness.usage import family
from socket_io import OURS, OURS_SINGLE, SINGLE, SoakClient, contestant

CONTESTANTS = {"ours": (OURS, 4), "ours-1": (OURS_SINGLE, 1), "gevent-1": (SINGLE, 1)}

#: Each worker notes when it is ready, by the clock that all processes share.
NOTE_READY = """
import os, time
def post_worker_init(worker):
    with open({path!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{time.monotonic()}}\\n")
"""


class ReconnectingClient(SoakClient):
    """A client that notes for how long it was disconnected, and tries every 20 ms."""

    def __init__(self, port: int, transport: str) -> None:
        super().__init__(port, transport, 0.02, 0.02)
        self.client.randomization_factor = 0  # seconds, not a part of the delay
        self.lost = 0.0
        self.connected = time.monotonic()
        self.gaps: list[float] = []
        self.client.on("disconnect", self.on_disconnect)
        self.client.on("connect", self.on_connect)

    def on_disconnect(self, *_: object) -> None:
        self.lost = self.lost or time.monotonic()

    def on_connect(self) -> None:
        self.connected = time.monotonic()
        if self.lost:
            self.gaps.append(self.connected - self.lost)
            self.lost = 0.0

    async def worker(self) -> int:
        """The pid of the worker with its session; 0 while it has none."""
        answer = await self.call("whoami")
        return answer[0] if answer else 0


async def connected_to(clients: list[ReconnectingClient], workers: set[int]) -> None:
    """Wait until each client has a session in one of these workers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = await asyncio.gather(*(one.worker() for one in clients))
        left = sum(pid not in workers for pid in found)
        if not left:
            return
        if time.monotonic() > deadline:
            raise Failed(f"{left} of {len(clients)} clients did not connect again")
        await asyncio.sleep(0.1)


def ready_workers(note: Path) -> dict[int, float]:
    """By pid: when the worker was ready."""
    return {int(pid): float(at) for pid, at in (line.split() for line in note.read_text().splitlines())}


async def reload_under_clients(
    port: int, process: Any, note: Path, workers: int, count: int, times: int
) -> tuple[list[float], list[float]]:
    """
    :returns: the gaps of all clients; for each reload, the time from when the last worker was ready until the
        last client was connected.
    """
    clients = [ReconnectingClient(port, ("polling", "websocket")[number % 2]) for number in range(count)]
    await asyncio.gather(*(one.open() for one in clients))
    while len(ready_workers(note)) < workers:
        await asyncio.sleep(0.05)
    last = []
    for _ in range(times):
        before = set(ready_workers(note))
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 2 * PATIENCE
        while len(fresh := set(ready_workers(note)) - before) < workers or before & set(family(process.pid)):
            if time.monotonic() > deadline:
                raise Failed("the workers were not replaced")
            await asyncio.sleep(0.05)
        await connected_to(clients, fresh)
        ready = max(at for pid, at in ready_workers(note).items() if pid in fresh)
        last.append(max(one.connected for one in clients) - ready)
    for one in clients:
        one.client.reconnection = False
    # first the server: a poll that waits would complain when the loop has ended
    process.send_signal(signal.SIGQUIT)
    for one in clients:
        await one.client.eio.wait()
        if one.client.eio.http is not None:
            await one.client.eio.http.close()
    return [gap for one in clients for gap in one.gaps], last


def measure_reconnects() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--clients", type=at_least(2, int), default=40, help="default 40")
    parser.add_argument("--times", type=at_least(1, int), default=20, help="reloads (default 20)")
    parser.add_argument(
        "--import-time", type=at_least(0.0, float), default=4.0, help="of the program, in seconds (default 4)"
    )
    parser.add_argument(
        "--only", type=choice(CONTESTANTS), default=list(CONTESTANTS), help=", ".join(CONTESTANTS)
    )
    options = parser.parse_args()
    # aiohttp complains of connections that python-engineio has left open
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    raise_file_limit(3 * options.clients + 500)
    rows, missed = [], False
    for key in options.only:
        name, workers = CONTESTANTS[key]
        progress(name)
        with temporary_directory() as directory:
            home = Path(directory)
            note, conf = home / "ready", home / "conf.py"
            note.touch()
            conf.write_text(NOTE_READY.format(path=str(note)))
            variables = {"BENCH_IMPORT": options.import_time, "GUNICORN_CMD_ARGS": f"-c {conf}"}
            with contestant(name, home, **variables) as (ports, processes):
                gaps, last = asyncio.run(
                    reload_under_clients(
                        ports[0], processes[0], note, workers, options.clients, options.times
                    )
                )
        rows.append([name, str(len(gaps)), f"{median(gaps):.3f}", f"{max(gaps):.3f}", f"{max(last):.3f}"])
        missed |= name != SINGLE and max(last) > 1
    progress()
    print(f"{machine()}\n\n{options.clients} clients, {options.times} reloads, seconds\n")
    table(["contestant", "connected again", "median", "longest", "after the last worker was ready"], rows)
    print(f"{'MISSED' if missed else 'met'}: connected again within 1 s of the new worker being ready")
    return int(missed)


if __name__ == "__main__":
    run_benchmark(measure_reconnects)
