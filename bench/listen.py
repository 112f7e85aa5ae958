"""What ``listen()`` costs: the boot time of a worker, and the answers of the port broker.

Part 1 boots the same application again and again, each time under a gunicorn of its own, in turn as

- ``plain``: ``gunicorn -k gevent``;
- ``without``: ``gunicorn -k gunicorn_passenger.Worker``, one server;
- ``with``: the same, and ``passenger.create_server(app).listen(port)``,

and takes the time from the fork (gunicorn's ``pre_fork``) to ``post_worker_init`` and until the worker
serves: the event ``"ready"``, or in ``plain`` the first heartbeat of the worker's loop. In the first
worker the master opens the port; in later ones it is open already. One worker boots at a time.

Part 2 asks the broker for ports from within a worker that serves, while the master is idle and
while it is reloaded by one HUP after another. Beside it Node's ``cluster`` does the same, under
both of its scheduling policies: ``server.listen()`` until ``'listening'`` in a cluster worker, while
the primary is idle and while it forks one worker after another.

The aims: ``listen()`` adds no more than 5 ms to the boot of a worker, and the median of the broker's
answers, the release included, stays under 2 ms. The exit status is 0 when they are met, 1 when one is
missed, 2 when a contestant failed, and 3 when the boots were too few or too noisy to tell.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

#: The aims, in milliseconds.
BOOT_AIM = 5.0
ANSWER_AIM = 2.0

#: Seconds that any single step may take on a loaded machine.
PATIENCE = 60.0

#: Rounds of part 1 below which an interval says nothing.
FEWEST_ROUNDS = 6

#: Workers that one master boots in part 1: the first and the later ones.
BOOTS = 4

#: Part 2 is cut into passes, between which the contestants take turns.
PASSES = 3

#: Workers that one master has in part 2.
WORKERS = 2

#: Calls that one request makes while the master is reloaded.
BURST = 5

#: Seconds between two calls of part 2, so that each finds the broker at rest.
PACE = 0.01

#: The states of part 2.
IDLE, BUSY = "idle", "busy"

CONTESTANTS = ("plain", "without", "with")

BOOT_CONF = '''
"""Stamps a worker's boot; one worker boots at a time."""
import json
import os
import time

CONTESTANT = os.environ["BENCH_CONTESTANT"]
RECORDS = os.environ["BENCH_RECORDS"]


def record(worker):
    with open(RECORDS, "a") as file:
        file.write(json.dumps(worker.stamps) + "\\n")


def recorded():
    with open(RECORDS) as file:
        return file.read().count("\\n")


def pre_fork(arbiter, worker):
    deadline = time.monotonic() + 60
    while recorded() < worker.age - 1:
        if time.monotonic() > deadline:
            raise RuntimeError("the worker before this one does not get ready")
        time.sleep(0.01)
    time.sleep(0.1)
    worker.stamps = {"age": worker.age, "fork": time.monotonic()}


def post_fork(arbiter, worker):
    worker.stamps["child"] = time.monotonic()


def post_worker_init(worker):
    worker.stamps["loaded"] = time.monotonic()
    if CONTESTANT != "plain":
        return
    notify = worker.notify

    def first_notify():
        """gunicorn's gevent worker reports for the first time once its server accepts."""
        worker.stamps["serving"] = time.monotonic()
        worker.notify = notify
        record(worker)
        notify()

    worker.notify = first_notify
'''

BOOT_APP = '''
"""The application of all contestants."""
import json
import os
import time

CONTESTANT = os.environ["BENCH_CONTESTANT"]
RECORDS = os.environ["BENCH_RECORDS"]
stamps = {}


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


if CONTESTANT != "plain":
    import gunicorn_passenger as passenger

    @passenger.on("ready")
    def ready(worker):
        now = time.monotonic()
        with open(RECORDS, "a") as file:
            file.write(json.dumps({**worker.stamps, **stamps, "serving": now}) + "\\n")

if CONTESTANT == "with":
    stamps["before"] = time.monotonic()
    passenger.create_server(application).listen(int(os.environ["BENCH_PORT"]))
    stamps["after"] = time.monotonic()
'''

BROKER_APP = '''
"""Takes the broker's time when a request asks for it."""
import json
import os
import time
from urllib.parse import parse_qsl

import gevent
import gunicorn_passenger as passenger
from gunicorn_passenger.address import Tcp
from gunicorn_passenger.serving.application import application as servers


@passenger.on("ready")
def ready(worker):
    with open(os.environ["BENCH_RECORDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")


def other(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


def ask(port):
    """The bare question: a descriptor from the master, and the release of it."""
    start = time.monotonic()
    fd, key, bound = servers.link.open(Tcp("127.0.0.1", port), "bench")
    answered = time.monotonic()
    os.close(fd)
    servers.link.close(key)
    return answered - start, time.monotonic() - start


def listen(port):
    """What a program calls."""
    start = time.monotonic()
    server = passenger.create_server(other).listen(port)
    answered = time.monotonic()
    assert server.listening
    server.close()
    return answered - start, time.monotonic() - start


def application(environ, start_response):
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    start_response("200 OK", [("Content-Type", "application/json")])
    if "calls" not in query:
        return [b"null"]
    call = {"ask": ask, "listen": listen}[query["call"]]
    first, calls, pace = int(query["port"]), int(query["calls"]), float(query["pace"])
    held = int(query["held"])
    call(held)  # the first call of a worker is a matter of its boot, and part 1's
    ports = [held] * calls if query["port_is"] == "open" else range(first, first + calls)
    times = []
    for port in ports:
        gevent.sleep(pace)
        times.append(call(port))
    return [json.dumps(times).encode()]
'''

CLUSTER_JS = """
// server.listen() until 'listening' in a cluster worker.
const cluster = require('cluster')
const http = require('http')
const { policy, held, fresh, calls, pace, churners } = JSON.parse(process.env.BENCH)
cluster.schedulingPolicy = policy === 'rr' ? cluster.SCHED_RR : cluster.SCHED_NONE
const now = () => Number(process.hrtime.bigint()) / 1e9
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000))

function listen (port) {
  return new Promise((resolve, reject) => {
    const server = http.createServer((request, response) => response.end('ok'))
    server.on('error', reject)
    const start = now()
    server.listen(port, '127.0.0.1', () => {
      const answered = now()
      server.close(() => resolve([answered - start, now() - start]))
    })
  })
}

async function measure ({ id, portIs }) {
  const times = []
  await listen(held)
  for (let i = 0; i < calls; i++) {
    await sleep(pace)
    times.push(await listen(portIs === 'open' ? held : fresh + i))
  }
  process.send({ id, times })
}

async function primary () {
  const holder = cluster.fork({ ROLE: 'holder' })
  await new Promise((resolve) => holder.once('message', resolve))
  const worker = cluster.fork({ ROLE: 'measurer' })
  await new Promise((resolve) => worker.once('message', resolve))
  let busy = false
  let forks = 0
  const churn = () => {
    if (!busy) return
    forks++
    const child = cluster.fork({ ROLE: 'churner' })
    child.once('message', () => child.process.kill('SIGTERM'))
    child.once('exit', churn)
  }
  const results = []
  for (const state of ['idle', 'busy']) {
    busy = state === 'busy'
    for (let i = 0; busy && i < churners; i++) churn()
    for (const portIs of ['open', 'new']) {
      const answer = new Promise((resolve) => worker.once('message', resolve))
      worker.send({ id: results.length, portIs })
      results.push({ state, portIs, times: (await answer).times })
    }
  }
  busy = false
  process.stdout.write(JSON.stringify({ results, forks }) + '\\n', () => process.exit(0))
}

if (cluster.isPrimary) {
  primary()
} else if (process.env.ROLE === 'measurer') {
  process.on('message', measure)
  process.send('up')
} else { // holder, churner
  http.createServer().listen(held, '127.0.0.1', () => process.send('up'))
}
"""


class Failed(Exception):
    """A contestant did not do what it should have."""


class PortTaken(Failed):
    """Another program took a port between the look for a free one and its use."""


T = TypeVar("T")


def again_if_taken(step: Callable[..., T], *arguments: object) -> T:
    """Do a step, and once more (three times at most) when a foreign program has taken a port of it."""
    for _ in range(3):
        try:
            return step(*arguments)
        except PortTaken as error:
            print(f"\nOnce more: {error}", file=sys.stderr)
    return step(*arguments)


# --- processes and ports ----------------------------------------------------------------------------


def _die_with_parent() -> None:
    """In the child: end when the benchmark ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append(int(name))
    return found


@contextlib.contextmanager
def started(arguments: Sequence[object], home: Path, **env: object) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own; at the end of the block every process of it is gone."""
    log = home / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(a) for a in arguments],
            cwd=home,
            env={**environment(home), **{k: str(v) for k, v in env.items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield process
    except Exception as error:
        text = log.read_text(errors="replace")
        for line in text.splitlines():
            if "EADDRINUSE" in line or "is in use by" in line:
                raise PortTaken(line) from error
        print(f"--- log of {arguments[0]}\n{text[-4000:]}---", file=sys.stderr)
        raise
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while left := session(process.pid):
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    if process.stdout is not None:
        process.stdout.close()


def environment(home: Path) -> dict[str, str]:
    """This process's environment without anything that would change a contestant."""
    foreign = ("PASSENGER_", "GUNICORN_", "NODE_", "BENCH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    for name in ("XDG_RUNTIME_DIR", "PORT", "WEB_CONCURRENCY", "PYTHONDONTWRITEBYTECODE"):
        env.pop(name, None)
    return {**env, "HOME": str(home), "PASSENGER_RUNTIME_DIR": str(home / "run"), "PYTHONPATH": str(home)}


def gunicorn(worker: str, workers: int, app: str, *arguments: object) -> list[object]:
    return [
        sys.executable, "-m", "gunicorn", "-k", worker, "-w", workers, "-b", "unix:app.sock",
        "--umask", "007", "--no-control-socket", "--log-level", "warning", *arguments, app,
    ]  # fmt: skip


def free_range(count: int) -> int:
    """The first of ``count`` free ports in a row, below the range that the kernel gives to clients."""
    for _ in range(1000):
        first = random.randrange(10240, 32000 - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket(socket.AF_INET6))
                    probe.bind(("::", port))
            except OSError:
                continue
        return first
    raise Failed(f"no {count} free ports in a row")


def wait_for(condition: Callable[[], object], what: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            raise Failed(f"ended with status {process.returncode} while waiting for {what}")
        if time.monotonic() > deadline:
            raise Failed(f"waited {PATIENCE:g} s for {what}")
        time.sleep(0.01)


def lines(path: Path) -> list[str]:
    """The complete lines of a file."""
    return path.read_text().split("\n")[:-1]


# --- part 1: booting --------------------------------------------------------------------------------


def boot_once(contestant: str, home: Path) -> list[dict[str, float]]:
    """Start one gunicorn and boot its workers one by one; their stamps, by age."""
    records = home / "records"
    records.write_text("")
    worker = "gevent" if contestant == "plain" else "gunicorn_passenger.Worker"
    command = gunicorn(worker, BOOTS, "boot_app:application", "-c", "boot_conf.py")
    env = {"BENCH_CONTESTANT": contestant, "BENCH_RECORDS": records, "BENCH_PORT": free_range(1)}
    with started(command, home, **env) as process:
        wait_for(lambda: len(lines(records)) >= BOOTS, f"{BOOTS} workers", process)
    stamps = [json.loads(line) for line in lines(records)]
    if [s["age"] for s in stamps] != list(range(1, BOOTS + 1)):
        raise Failed(f"a worker of {contestant!r} booted twice: {stamps}")
    return stamps


def measure_boots(rounds: int, home: Path) -> dict[str, list[list[dict[str, float]]]]:
    """Contestant -> round -> age -> stamps. A round before the first one is not counted."""
    result: dict[str, list[list[dict[str, float]]]] = {c: [] for c in CONTESTANTS}
    for number in range(rounds + 1):
        turn = number % len(CONTESTANTS)
        for contestant in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
            stamps = again_if_taken(boot_once, contestant, home)
            if number:
                result[contestant].append(stamps)
        progress(f"boots: round {number} of {rounds}")
    return result


def report_boots(boots: dict[str, list[list[dict[str, float]]]]) -> tuple[list[str], list[str]]:
    """Print part 1; the aims that were missed, and those that the noise leaves undecided."""
    missed, undecided = [], []
    rows, differences = [], []
    for which, ages in (("first", range(1)), ("later", range(1, BOOTS))):
        for contestant in CONTESTANTS:
            cells = [
                [t for times in by_round(boots[contestant], ages, *span) for t in times]
                for span in (("fork", "loaded"), ("fork", "serving"), ("before", "after"))
            ]
            rows.append([which, contestant, str(len(cells[0])), *map(spread, cells)])
        plain, bare, ours = (by_round(boots[c], ages, "fork", "serving") for c in CONTESTANTS)
        added, low, high = difference(ours, bare)
        differences.append([which, interval(added, low, high), interval(*difference(bare, plain))])
        text = f"listen() adds {interval(added, low, high)} ms to the boot of the {which} worker"
        if low > BOOT_AIM and len(ours) >= FEWEST_ROUNDS:
            missed.append(f"{text} (aim {BOOT_AIM:g})")
        elif high > BOOT_AIM or len(ours) < FEWEST_ROUNDS:
            undecided.append(f"{text} (aim {BOOT_AIM:g}); take more rounds, or a quieter machine")
    print("\nBoot of a worker, ms from the fork: median (min-max)\n")
    table(["worker", "contestant", "n", "to post_worker_init", "to serving", "in listen() itself"], rows)
    print("\nDifferences of the medians to serving, ms (95 % interval)\n")
    table(["worker", "with - without", "without - plain"], differences)
    return missed, undecided


def by_round(
    rounds: list[list[dict[str, float]]], ages: Sequence[int], begin: str, end: str
) -> list[list[float]]:
    """The milliseconds between two stamps, of the workers of these ages, in each round."""
    return [[1000 * (r[age][end] - r[age][begin]) for age in ages if end in r[age]] for r in rounds]


def difference(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float, float]:
    """The difference of two medians and its 95 % interval.

    The interval is that of the bootstrap over whole rounds, since what disturbs the machine in one
    round disturbs both contestants.
    """

    def of(picked: Sequence[int]) -> float:
        medians = [statistics.median(t for i in picked for t in rounds[i]) for rounds in (ours, theirs)]
        return medians[0] - medians[1]

    dice = random.Random(1)
    every = range(len(ours))
    drawn = [of(dice.choices(every, k=len(ours))) for _ in range(2000)]
    return of(every), percentile(drawn, 2.5), percentile(drawn, 97.5)


def interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


# --- part 2: the broker's answers -------------------------------------------------------------------

#: (contestant, call, port is, state) -> [answer, answer and release] of each call, in seconds
Samples = dict[tuple[str, str, str, str], list[list[float]]]


class Request(http.client.HTTPConnection):
    """A connection to the UNIX socket of the primary."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE * 2)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def request(home: Path, path: str) -> Any:
    connection = Request(home / "app.sock")
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise Failed(f"{path}: status {response.status}")
        return json.loads(body)
    finally:
        connection.close()


def ask_broker(calls: int, home: Path) -> tuple[Samples, int]:
    """One pass of part 2 on one gunicorn, and how often it was reloaded."""
    samples: Samples = {}
    records = home / "records"
    records.write_text("")
    reloads = 0
    count = 4 * calls + 1  # one to hold, and one for each call on a new port
    held = free_range(count)
    port = held + 1
    command = gunicorn(
        "gunicorn_passenger.Worker", WORKERS, "broker_app:application",
        "--graceful-timeout", 120, "--timeout", 120,
    )  # fmt: skip
    env = {"BENCH_RECORDS": records, "PASSENGER_PORTS": f"{held}-{held + count - 1}"}
    with started(command, home, **env) as process:
        wait_for(lambda: len(lines(records)) >= WORKERS, "the workers", process)
        time.sleep(0.3)
        for state in (IDLE, BUSY):
            for call in ("ask", "listen"):
                for port_is in ("open", "new"):
                    key = ("broker", call, port_is, state)
                    query = f"/?call={call}&port_is={port_is}&held={held}&pace={PACE}"
                    if state == IDLE:
                        times = request(home, f"{query}&port={port}&calls={calls}")
                    else:
                        times, hups = reloading(process, home, query, port, calls)
                        reloads += hups
                    samples[key] = times
                    port += calls if port_is == "new" else 0
    return samples, reloads


def reloading(
    process: subprocess.Popen[bytes], home: Path, query: str, port: int, calls: int
) -> tuple[list[Any], int]:
    """Ask in short requests while one HUP follows another; the times, and the number of HUPs.

    A worker that is told to leave finishes its request, and gunicorn's reload waits for it; so a
    request is short, or the master would mostly wait.
    """
    times: list[Any] = []
    ended = threading.Event()
    failures: list[Exception] = []

    def ask() -> None:
        try:
            while len(times) < calls and not ended.is_set():
                some = min(BURST, calls - len(times))
                times.extend(request(home, f"{query}&port={port + len(times)}&calls={some}"))
        except Exception as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=ask, daemon=True)
    hups = 0
    try:
        thread.start()
        while not ended.is_set():
            ready = len(lines(home / "records"))
            process.send_signal(signal.SIGHUP)
            hups += 1
            wait_for(lambda n=ready: len(lines(home / "records")) >= n + WORKERS, "a reload", process)
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
    return times, hups


def ask_node(policy: str, node: str, calls: int, home: Path) -> tuple[Samples, int]:
    """One pass of part 2 on one Node cluster, and how many workers it forked while busy."""
    first = free_range(calls + 1)
    bench = {
        "policy": policy, "held": first, "fresh": first + 1, "calls": calls, "pace": PACE, "churners": 2,
    }  # fmt: skip
    with started([node, "cluster.js"], home, BENCH=json.dumps(bench)) as process:
        lock = threading.Timer(PATIENCE + 4 * calls * 10 * PACE, process.kill)
        lock.start()
        try:
            assert process.stdout is not None
            output = process.stdout.readline()
        finally:
            lock.cancel()
        if not output:
            raise Failed("node gave no answer")
        answer = json.loads(output)
        process.wait(10)
    samples: Samples = {}
    for result in answer["results"]:
        samples[f"node {policy}", "listen", result["portIs"], result["state"]] = result["times"]
    return samples, int(answer["forks"])


def measure_answers(calls: int, node: str | None, home: Path) -> tuple[Samples, dict[str, int]]:
    samples: Samples = {}
    busy = {"HUPs": 0, "forks (rr)": 0, "forks (none)": 0}
    for number in range(PASSES):
        share = calls * (number + 1) // PASSES - calls * number // PASSES
        results = {"HUPs": again_if_taken(ask_broker, share, home)}
        for policy in ("rr", "none") if node else ():
            results[f"forks ({policy})"] = again_if_taken(ask_node, policy, node, share, home)
        for what, (some, count) in results.items():
            busy[what] += count
            for key, times in some.items():
                samples.setdefault(key, []).extend(times)
        progress(f"answers: pass {number + 1} of {PASSES}")
    return samples, busy


NAMES = {
    ("broker", "ask"): "link.open()",
    ("broker", "listen"): "Server.listen()",
    ("node rr", "listen"): "Node, shared by round robin",
    ("node none", "listen"): "Node, shared socket",
}


def report_answers(samples: Samples, busy: dict[str, int]) -> list[str]:
    """Print part 2; the aims that were missed."""
    missed = []
    rows = []
    for state in (IDLE, BUSY):
        for port_is in ("open", "new"):
            for (contestant, call), name in NAMES.items():
                pairs = samples.get((contestant, call, port_is, state))
                if not pairs:
                    continue
                answers = [1000 * a for a, _ in pairs]
                released = statistics.median(1000 * b for _, b in pairs)
                rows.append(
                    [
                        state,
                        port_is,
                        name,
                        str(len(answers)),
                        f"{statistics.median(answers):.2f}",
                        f"{percentile(answers, 99):.2f}",
                        f"{max(answers):.2f}",
                        f"{released:.2f}",
                    ]
                )
                if contestant == "broker" and released >= ANSWER_AIM:
                    what = f"{name}, {port_is} port, {state} master"
                    missed.append(f"{what}: median {released:.2f} ms (aim {ANSWER_AIM:g})")
    print("\nAnswers, ms\n")
    table(["master", "port", "call", "n", "median", "p99", "max", "with release, median"], rows)
    print("\nWhile busy: " + ", ".join(f"{n} {what}" for what, n in busy.items() if n))
    return missed


# --- printing ---------------------------------------------------------------------------------------


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if text.endswith("\n") else "", file=sys.stderr, flush=True)


def machine(node: str | None) -> None:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    print(f"Machine: {os.cpu_count()} CPUs, {model}, {platform.system()} {platform.release()}")
    version = importlib.metadata.version
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("gunicorn", "gevent", "gunicorn-passenger")),
    ]
    if node:
        run = subprocess.run(
            [node, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE
        )
        versions.append(f"Node {run.stdout.strip().lstrip('v')}")
    print("Versions: " + ", ".join(versions))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of part 1 (default 15; 6 or more decide)"
    )
    parser.add_argument(
        "--calls", type=int, default=300, help="calls of each kind in part 2 (default 300, from 60 to 700)"
    )
    parser.add_argument("--no-node", action="store_true", help="leave out the peer of part 2")
    options = parser.parse_args()
    if options.rounds < 1 or not 60 <= options.calls <= 700:  # the master holds at most 1024 ports
        parser.error("--rounds must be at least 1, --calls from 60 to 700")
    node = None if options.no_node else shutil.which("node")
    # an end by SIGTERM cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine(node)
    if node is None:
        print("Node is left out.")
    home = Path(tempfile.mkdtemp(prefix="listen-"))
    try:
        for name, text in (
            ("boot_conf.py", BOOT_CONF),
            ("boot_app.py", BOOT_APP),
            ("broker_app.py", BROKER_APP),
            ("cluster.js", CLUSTER_JS),
        ):
            (home / name).write_text(text.lstrip())
        boots = measure_boots(options.rounds, home)
        answers, busy = measure_answers(options.calls, node, home)
    except (Failed, OSError, http.client.HTTPException) as error:
        print(f"FAILED: {error!r}" if not isinstance(error, Failed) else f"FAILED: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(home, ignore_errors=True)
    progress("\n")
    missed, undecided = report_boots(boots)
    missed += report_answers(answers, busy)
    print()
    for text in missed:
        print(f"MISSED: {text}")
    for text in undecided:
        print(f"UNDECIDED: {text}")
    if not missed and not undecided:
        print("All aims met.")
    return 1 if missed else 3 if undecided else 0


if __name__ == "__main__":
    sys.exit(main())
