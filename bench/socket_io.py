"""What Socket.IO costs under several workers, compared with one worker, and with four gunicorns and Redis.

Contestants: ours with four workers; plain ``gunicorn -k gevent`` with one; and four of these with a message
queue in Redis, behind nginx. All clients use WebSockets, and this program is all of them.
``--soak`` measures nothing: real clients of python-socketio count what they hear through reloads and kills.
``--plain`` shows what the same clients get from plain ``gunicorn -k gevent`` with four workers.
"""

import asyncio
import base64
import contextlib
import http.client
import os
import random
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from harness import APPS, PATIENCE, Failed
from harness.limits import free_ports, raise_file_limit
from harness.processes import running, wait_for
from harness.program import at_least, option_parser, run_benchmark
from harness.site import temporary_directory
from harness.tables import print_machine, progress, table
from harness.usage import cpu_seconds, family

OURS, OURS_SINGLE, SINGLE = "ours, 4 workers", "ours, 1 worker", "gevent, 1 worker"
REDIS = "4 gunicorns, Redis, nginx"
PLAIN = "gevent, 4 workers"
WORKERS = 4
#: Seconds between two looks of the clients at what has arrived of broadcasts.
READ_INTERVAL = 0.01
#: Messages between two processes before the sender waits for the receiver.
BATCH = 2000


# --- the servers ------------------------------------------------------------------------------


def gunicorn_words(port: int, worker: str, workers: int) -> list[object]:
    return ["gunicorn", "-k", worker, "-w", workers, "-b", f"127.0.0.1:{port}", "--worker-connections", 5000,
            "--keep-alive", 300, "--no-control-socket", "socketio_app"]  # fmt: skip


@contextlib.contextmanager
def server_at(words: list[object], home: Path, name: str, port: int, **variables: object) -> Iterator[Any]:
    place = home / name
    place.mkdir()
    with running(words, place, APPS, **variables) as process:
        wait_for(process, lambda: socket.create_connection(("127.0.0.1", port), 5).close(), f"{name} listens")
        yield process


@contextlib.contextmanager
def contestant(name: str, home: Path, **more: object) -> Iterator[tuple[list[int], list[Any]]]:
    """
    :param more: variables of the environment of a single gunicorn.
    :returns: the port for clients and those of single gunicorns; the processes, a gunicorn first.
    """
    port = free_ports(WORKERS + 2)
    if name in (OURS, OURS_SINGLE):
        workers = WORKERS if name == OURS else 1
        words = gunicorn_words(port, "gunicorn_passenger.Worker", workers)
        with server_at(words, home, "ours", port, BENCH_MANAGER="ours", **more) as process:
            wait_for(process, lambda: len(family(process.pid)) > workers, "all workers run")
            yield [port], [process]
        return
    if name in (SINGLE, PLAIN):
        words = gunicorn_words(port, "gevent", 1 if name == SINGLE else WORKERS)
        with server_at(words, home, "plain", port, BENCH_MANAGER="none", **more) as process:
            yield [port], [process]
        return
    with contextlib.ExitStack() as stack:
        redis, first = port + 1, port + 2
        words = ["redis-server", "--port", redis, "--save", "", "--bind", "127.0.0.1"]
        processes = [stack.enter_context(server_at(words, home, "redis", redis))]
        for each in range(WORKERS):
            processes.append(
                stack.enter_context(
                    server_at(
                        gunicorn_words(first + each, "gevent", 1), home, f"gunicorn{each}", first + each,
                        BENCH_MANAGER=f"redis://127.0.0.1:{redis}/0",
                    )
                )
            )  # fmt: skip
        servers = "".join(f"server 127.0.0.1:{first + each};" for each in range(WORKERS))
        (home / "nginx.conf").write_text(
            f"worker_processes 1; pid {home}/nginx.pid; error_log {home}/nginx.log; daemon off;\n"
            "events { worker_connections 4096; }\nhttp { access_log off;\n"
            f"upstream chat {{ {servers} }}\n"
            f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://chat; "
            "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; "
            "proxy_set_header Connection upgrade; proxy_read_timeout 300s; } } }\n"
        )
        words = ["nginx", "-c", home / "nginx.conf", "-p", home]
        processes.append(stack.enter_context(server_at(words, home, "nginx", port)))
        yield [port, *range(first, first + WORKERS)], processes[1:] + processes[:1]


def all_pids(processes: list[Any]) -> list[int]:
    return [pid for process in processes for pid in family(process.pid)]


# --- clients that cost little ------------------------------------------------------------------


class RawClient:
    """A WebSocket that counts the events and acknowledgements in what it receives."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(random.randbytes(16)).decode()
        self.sock.sendall(
            f"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.received = b""
        # a server may lose what comes together with the request
        self.wait_for_text(b"\r\n\r\n")
        self.send("40")
        self.wait_for_text(b'40{"sid"')
        self.events = self.acks = 0
        self.received = b""
        self.sock.setblocking(False)

    def wait_for_text(self, wanted: bytes) -> None:
        while wanted not in self.received:
            data = self.sock.recv(4096)
            if not data:
                raise Failed(f"a client was refused: {self.received[:100]!r}")
            self.received += data

    def send(self, text: str) -> None:
        mask = b"\1\2\3\4"
        data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(text.encode()))
        self.sock.sendall(bytes([0x81, 0x80 | len(data)]) + mask + data)

    def read(self) -> None:
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        if not data:
            raise Failed("a client lost its connection")
        text = self.received + data
        self.events += text.count(b'42["news",')
        self.acks += text.count(b"430[")
        # the beginning of an event that is cut off, but nothing that was counted
        self.received = text[-9:] if b'42["news",' not in text[-19:] and b"430[" not in text[-12:] else b""


class Crowd:
    """All clients of one contestant."""

    def __init__(self, port: int, count: int) -> None:
        self.clients = [RawClient(port) for _ in range(count)]
        self.selector = selectors.DefaultSelector()
        for client in self.clients:
            self.selector.register(client.sock, selectors.EVENT_READ, client)

    def read_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                missing = Counter(client.events for client in self.clients)
                raise Failed(f"events that clients have after {PATIENCE:g} s: {dict(missing)}")
            # several events at a time, so that the clients leave the processors to the servers
            time.sleep(READ_INTERVAL)
            for key, _ in self.selector.select(1):
                key.data.read()

    def broadcasts(self, count: int) -> float:
        """Seconds until all clients have so many messages to all."""
        for client in self.clients:
            client.events = 0
        began = time.perf_counter()
        self.clients[0].send(f'42["flood",{count}]')
        self.read_until(lambda: all(client.events >= count for client in self.clients))
        return time.perf_counter() - began

    def round_trips(self, seconds: float) -> float:
        """How many per second, when each client sends the next event once the last one is acknowledged."""
        done = 0
        for client in self.clients:
            client.acks = 0
            client.send('420["echo","x"]')
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            for key, _ in self.selector.select(1):
                key.data.read()
                for _ in range(key.data.acks):
                    done += 1
                    key.data.send('420["echo","x"]')
                key.data.acks = 0
        return done / took

    def close(self) -> None:
        self.selector.close()
        for client in self.clients:
            client.sock.close()


def get(port: int, path: str) -> list[int]:
    """The numbers in a response, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return [int(word) for word in connection.getresponse().read().split()]
    finally:
        connection.close()


def sessions_of_workers(port: int, wanted: int) -> list[str]:
    """The id of a session in each worker of ours; with it, a request reaches that worker."""
    found: dict[str, str] = {}
    connections = []
    while len(found) < wanted:
        # they stay open, so that the workers share them evenly
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connections.append(connection)
        connection.request("GET", "/socket.io/?EIO=4&transport=polling")
        sid = connection.getresponse().read().decode().split('"sid":"')[1].split('"')[0]
        found[sid[:16]] = sid
        if len(connections) > 1000:
            raise Failed(f"1000 connections reached {len(found)} of {wanted} workers")
    for connection in connections:
        connection.close()
    return list(found.values())


def messages_per_second(ports: list[int], batches: int) -> float:
    """From one process to each of three others, where no client hears them."""
    if len(ports) > 1:
        doors = [(port, "") for port in ports[1:]]
    else:
        doors = [(ports[0], f"?sid={sid}") for sid in sessions_of_workers(ports[0], WORKERS)]
    times = []
    for _ in range(batches + 1):
        before = [get(port, f"/received{query}")[1] for port, query in doors]
        began = time.perf_counter()
        get(doors[0][0], f"/pump/{BATCH}{doors[0][1]}")
        for (port, query), count in list(zip(doors, before, strict=True))[1:]:
            while get(port, f"/received{query}")[1] < count + BATCH:
                if time.perf_counter() - began > PATIENCE:
                    raise Failed("messages between two processes were lost")
                time.sleep(0.005)
        times.append(time.perf_counter() - began)
    return batches * BATCH / sum(times[1:])


# --- what a sticky listener costs ---------------------------------------------------------------


def timed_requests(sock: socket.socket, paths: list[str], pids: list[int]) -> tuple[float, float]:
    """Requests on one connection, one after the other: the median time of each, and the CPU time, in us."""
    times = []
    before = cpu_seconds(pids)
    for path in paths:
        began = time.perf_counter()
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
            raise Failed(f"{path} was refused")
        times.append(time.perf_counter() - began)
    return median(times) * 1e6, (cpu_seconds(pids) - before) / len(paths) * 1e6


def cost_of_passing(home: Path, requests: int) -> tuple[float, float]:
    """What it adds to a request that its connection is passed on: time and CPU time, in us."""
    with contestant(OURS, home) as (ports, processes):
        pids = all_pids(processes)
        one, other = sessions_of_workers(ports[0], 2)
        differences = []
        with socket.create_connection(("127.0.0.1", ports[0]), PATIENCE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # any path: the application itself does not look at these requests' sessions
            paths = [f"/hello?sid={sid}" for sid in (one, other)]
            for _ in range(9):
                stay, stay_cpu = timed_requests(sock, [paths[0]] * requests, pids)
                passed, passed_cpu = timed_requests(sock, paths * (requests // 2), pids)
                differences.append((passed - stay, passed_cpu - stay_cpu))
        return tuple(map(median, zip(*differences, strict=True)))  # type: ignore[return-value]


def cost_of_sticky(home: Path, requests: int) -> float:
    """What a sticky listener adds to an ordinary request: CPU time in us."""
    sites = []
    with contextlib.ExitStack() as stack:
        for name, manager in (("sticky", "ours"), ("plain", "none")):
            port = free_ports(1)
            words = gunicorn_words(port, "gunicorn_passenger.Worker", 1)
            process = stack.enter_context(server_at(words, home, name, port, BENCH_MANAGER=manager))
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            wait_for(process, lambda port=port: get(port, "/received") and None, "it responds")
            sites.append((sock, family(process.pid)))
        differences = []
        for _ in range(15):
            (_, sticky), (_, plain) = (
                timed_requests(sock, ["/hello"] * requests, pids) for sock, pids in sites
            )
            differences.append(sticky - plain)
        return median(differences)


# --- real clients, reloads and kills ------------------------------------------------------------


class SoakClient:
    """A client of python-socketio that keeps what it hears."""

    def __init__(self, port: int, transport: str, delay: float = 0.5, most: float = 2) -> None:
        """:param delay: seconds until it tries to connect again; later up to ``most``."""
        import engineio
        import socketio

        # a polling client refuses a response with more packets, and connects again
        engineio.payload.Payload.max_decode_packets = 10_000
        self.port, self.transport = port, transport
        self.news: list[int] = []
        self.client = socketio.AsyncClient(
            reconnection_delay=delay, reconnection_delay_max=most, request_timeout=PATIENCE
        )
        self.client.on("news", self.news.append)

    async def open(self) -> None:
        where = f"http://127.0.0.1:{self.port}"
        await self.client.connect(where, transports=[self.transport], wait_timeout=PATIENCE, retry=True)

    async def call(self, event: str, *arguments: object) -> Any:
        """``None`` while it connects again."""
        import socketio

        with contextlib.suppress(socketio.exceptions.SocketIOError, ValueError):
            return await self.client.call(event, *arguments, timeout=20)
        return None


async def settled_sessions(clients: list[SoakClient], alive: Callable[[], list[int]]) -> list[Any]:
    """Wait until each client has a session in a worker that lives: the pid of the worker, and the session."""
    deadline = time.monotonic() + 5 * PATIENCE
    while True:
        answers = await asyncio.gather(*(one.call("whoami") for one in clients))
        pids = set(alive())
        left = sum(not answer or answer[0] not in pids for answer in answers)
        if not left:
            return answers
        if time.monotonic() > deadline:
            raise Failed(f"{left} of {len(clients)} clients did not connect again")
        await asyncio.sleep(0.2)


async def soak(port: int, process: Any, count: int, cycles: int) -> int:
    def workers() -> list[int]:
        return family(process.pid)[1:]

    clients = [SoakClient(port, ("polling", "websocket")[number % 2]) for number in range(count)]
    for at in range(0, count, 20):
        await asyncio.gather(*(one.open() for one in clients[at : at + 20]))
    number, missed, twice = 0, 0, 0
    for cycle in range(cycles + 1):
        before = await settled_sessions(clients, workers)
        for one in clients:
            one.news.clear()
        said = []
        for speaker in random.sample(clients, 20):
            if await speaker.call("say", number):
                said.append(number)
            number += 1
        deadline = time.monotonic() + PATIENCE
        while any(len(one.news) < len(said) for one in clients) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        after = await settled_sessions(clients, workers)
        heard = [Counter(one.news) for one in clients]
        # the others have lost their connection meanwhile, and what was said before they were back
        stayed = [one for one, then, now in zip(heard, before, after, strict=True) if then == now]
        missed += sum(each not in one for one in stayed for each in said)
        twice += sum(times > 1 for one in heard for times in one.values())
        spread = Counter(pid for pid, _ in after)
        print(
            f"{len(said)} broadcasts to {len(stayed)} clients of {len(spread)} workers "
            f"({min(spread.values())} to {max(spread.values())} each): {missed} missed, {twice} heard twice",
            flush=True,
        )
        if cycle == cycles:
            break
        old = workers()
        if cycle % 2:
            leaving = {random.choice(old)}
            os.kill(*leaving, signal.SIGKILL)
            print("a worker is killed", flush=True)
        else:
            leaving = set(old)
            process.send_signal(signal.SIGHUP)
            print("gunicorn reloads", flush=True)
        # also while the clients connect again: nothing comes twice
        while leaving & set(workers()):
            await random.choice(clients).call("say", number)
            number += 1
        twice += sum(times > 1 for one in clients for times in Counter(one.news).values())
    for one in clients:
        await one.client.disconnect()
    return 1 if missed or twice else 0


async def without_the_package(port: int, count: int, broadcasts: int = 20) -> None:
    """What the clients get from workers that know nothing of each other."""
    clients = [SoakClient(port, ("polling", "websocket")[number % 2]) for number in range(count)]
    for at in range(0, count, 20):
        opening = (asyncio.wait_for(one.open(), 10) for one in clients[at : at + 20])
        await asyncio.gather(*opening, return_exceptions=True)
    print(f"{sum(one.client.connected for one in clients)} of {count} clients have connected")
    speakers = [one for one in clients if one.client.connected][:broadcasts]
    said = sum(map(bool, await asyncio.gather(*(one.call("say", 0) for one in speakers))))
    # their answers come behind what their workers have said before
    answers = await asyncio.gather(*(one.call("whoami") for one in clients))
    for transport in ("polling", "websocket"):
        lasting = [
            one for one, answer in zip(clients, answers, strict=True) if one.transport == transport and answer
        ]
        heard = sum(len(one.news) for one in lasting) / max(1, len(lasting))
        print(
            f"{transport}: {len(lasting)} clients have a session after that, and have heard {heard:.1f} of "
            f"{said} broadcasts on average"
        )
    await asyncio.gather(*(one.client.shutdown() for one in clients), return_exceptions=True)


# --- the program --------------------------------------------------------------------------------


def measure_socket_io() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--clients", type=at_least(2, int), default=500, help="default 500")
    parser.add_argument(
        "--rounds", type=at_least(1, int), default=5, help="how often all take turns (default 5)"
    )
    parser.add_argument("--seconds", type=at_least(0.1, float), default=5, help="of round trips (default 5)")
    parser.add_argument("--broadcasts", type=at_least(1, int), default=200, help="in a run (default 200)")
    parser.add_argument("--requests", type=at_least(2, int), default=1000, help="in a run (default 1000)")
    parser.add_argument("--soak", action="store_true", help="real clients, reloads and kills")
    parser.add_argument("--plain", action="store_true", help="real clients of plain gunicorn, 4 workers")
    parser.add_argument("--cycles", type=at_least(1, int), default=6, help="of a soak (default 6)")
    options = parser.parse_args()
    raise_file_limit(3 * options.clients + 500)
    if options.plain:
        with temporary_directory() as name, contestant(PLAIN, Path(name)) as (ports, _):
            asyncio.run(without_the_package(ports[0], options.clients))
        return 0
    if options.soak:
        with temporary_directory() as name, contestant(OURS, Path(name)) as (ports, processes):
            return asyncio.run(soak(ports[0], processes[0], options.clients, options.cycles))
    print_machine({name: metadata.version(name) for name in ("python-socketio", "gevent", "gunicorn")})
    runs: dict[str, list[tuple[float, ...]]] = {}
    for number in range(options.rounds):
        for name in (OURS, SINGLE, REDIS):
            progress(f"round {number + 1} of {options.rounds}: {name}")
            with temporary_directory() as home, contestant(name, Path(home)) as (ports, processes):
                crowd = Crowd(ports[0], options.clients)
                crowd.broadcasts(10)
                pids = all_pids(processes)
                before = cpu_seconds(pids)
                took = crowd.broadcasts(options.broadcasts)
                cpu = (cpu_seconds(pids) - before) / options.broadcasts
                before = cpu_seconds(pids)
                trips = crowd.round_trips(options.seconds)
                trip_cpu = (cpu_seconds(pids) - before) / (trips * options.seconds)
                crowd.close()
                between = 0.0 if name == SINGLE else messages_per_second(ports, 3)
                runs.setdefault(name, []).append(
                    (options.broadcasts / took, cpu * 1e3, trips, trip_cpu * 1e3, between)
                )
    progress()
    middle = {name: [median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    head = ["", f"broadcasts/s to {options.clients} clients", "CPU ms each", "round trips/s", "CPU ms each",
            "messages/s between workers"]  # fmt: skip
    table(head, [[name, *(f"{n:.4g}" if n else "-" for n in numbers)] for name, numbers in middle.items()])
    with temporary_directory() as home:
        passing, passing_cpu = cost_of_passing(Path(home), options.requests)
    with temporary_directory() as home:
        sticky = cost_of_sticky(Path(home), options.requests)
    print(f"Passing a connection: {passing:.0f} us more (median), {passing_cpu:.0f} us of CPU time")
    print(f"An ordinary request to a sticky listener: {sticky:.2f} us more CPU time")
    ours, single, redis = middle[OURS], middle[SINGLE], middle[REDIS]
    goals = {
        "broadcasts/s at least 1.5 x Redis": ours[0] >= 1.5 * redis[0],
        "round trips/s no fewer": ours[2] >= max(single[2], redis[2]),
        "messages/s at least 2 x Redis": ours[4] >= 2 * redis[4],
        "passing a connection under 300 us": passing < 300,
        "an ordinary request under 2 us": sticky < 2,
    }
    for goal, met in goals.items():
        print(f"{'met' if met else 'MISSED'}: {goal}")
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    run_benchmark(measure_socket_io)
