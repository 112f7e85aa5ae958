"""What ``listen()`` costs: the boot time of a worker, and the answers of the port broker.

Part 1 boots the same application again and again, each time under a gunicorn of its own, in turn as

- ``plain``: ``gunicorn -k gevent``;
- ``without``: ``gunicorn -k gunicorn_passenger.Worker``, one server;
- ``with``: the same, and ``passenger.create_server(app).listen(port)``.

Part 2 asks the broker for ports from within a worker that serves; beside it Node's ``cluster`` does the same.
How the times are taken, and the aims: bench/README.md.
"""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

from harness import PATIENCE
from harness.boots import (
    BOOTS,
    FEWEST_ROUNDS,
    Stamps,
    again_if_taken,
    by_round,
    complete_lines,
    difference,
    interval,
    measure_boots,
    spread,
    started,
)
from harness.environment import program_version
from harness.limits import free_ports
from harness.processes import gunicorn_command, spoken_line, wait_for
from harness.program import at_least, exit_status, option_parser, run_benchmark
from harness.requests import UnixConnection, fetch
from harness.tables import percentile, print_machine, progress, table

#: The aims, in milliseconds.
BOOT_AIM = 5.0
ANSWER_AIM = 2.0

#: Part 1: its contestants, and their worker classes.
CONTESTANTS = {
    "plain": "gevent",
    "without": "gunicorn_passenger.Worker",
    "with": "gunicorn_passenger.Worker",
}

#: Part 2: the states of the master, the workers that it has, the passes, between which the contestants take
#: turns, and the calls that one request makes while the master is reloaded.
IDLE, BUSY = "idle", "busy"
WORKERS = 2
PASSES = 3
BURST = 5

#: Seconds between two calls of part 2, so that each finds the broker at rest.
PACE = 0.01


# --- part 1: booting --------------------------------------------------------------------------------


def report_boots(boots: dict[str, list[list[Stamps]]]) -> tuple[list[str], list[str]]:
    """Print part 1; the aims that were missed, and those that the noise leaves undecided."""
    missed, undecided = [], []
    rows, differences = [], []
    for which, ages in (("first", range(1)), ("later", range(1, BOOTS))):
        for contestant in CONTESTANTS:
            cells = [
                [t for times in by_round(boots[contestant], ages, *ends) for t in times]
                for ends in (("fork", "loaded"), ("fork", "serving"), ("before", "after"))
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


# --- part 2: the broker's answers -------------------------------------------------------------------

#: (contestant, call, port is, state) -> [answer, answer and release] of each call, in seconds
Samples = dict[tuple[str, str, str, str], list[list[float]]]


def broker_times(socket: Path, port: int, calls: int, **query: object) -> list[list[float]]:
    """Have a worker call; the times of its calls."""
    query |= {"port": port, "calls": calls, "pace": PACE}
    with contextlib.closing(UnixConnection(socket)) as connection:
        return json.loads(fetch(connection, f"/?{urlencode(query)}"))


def measure_broker(calls: int) -> tuple[Samples, int]:
    """One pass of part 2 on one gunicorn, and how often it was reloaded."""
    command = partial(gunicorn_command, "gunicorn_passenger.Worker", "broker_app:application")
    options = ("--graceful-timeout", 120, "--timeout", 120, "--log-level", "warning")
    samples: Samples = {}
    reloads = 0
    count = 4 * calls + 1  # one to hold, and one for each call on a new port
    held = free_ports(count)
    port = held + 1
    env = {"PASSENGER_PORTS": f"{held}-{held + count - 1}"}
    with started(lambda path: command(path, *options, workers=WORKERS), **env) as (process, path, records):
        wait_for(process, lambda: len(complete_lines(records)) >= WORKERS, "the workers were ready")
        time.sleep(0.3)
        for state, call, port_is in product((IDLE, BUSY), ("ask", "listen"), ("open", "new")):
            ask = partial(broker_times, path, call=call, port_is=port_is, held=held)
            if state == IDLE:
                times = ask(port, calls)
            else:
                times, hups = reloading(process, records, ask, port, calls)
                reloads += hups
            samples["broker", call, port_is, state] = times
            port += calls if port_is == "new" else 0
    return samples, reloads


def reloading(
    process: subprocess.Popen[bytes], records: Path, ask: Callable[..., list[Any]], port: int, calls: int
) -> tuple[list[Any], int]:
    """Ask in short requests while one HUP follows another; the times, and the number of HUPs.

    A worker that is told to leave finishes its request, and gunicorn's reload waits for it; so a
    request is short, or the master would mostly wait.
    """
    times: list[Any] = []
    ended = threading.Event()
    failures: list[Exception] = []

    def ask_in_bursts() -> None:
        try:
            while len(times) < calls and not ended.is_set():
                times.extend(ask(port + len(times), min(BURST, calls - len(times))))
        except Exception as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=ask_in_bursts, daemon=True)
    hups = 0
    try:
        thread.start()
        while not ended.is_set():
            ready = len(complete_lines(records))
            process.send_signal(signal.SIGHUP)
            hups += 1
            wait_for(process, lambda n=ready: len(complete_lines(records)) >= n + WORKERS, "a reload")
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
    return times, hups


def measure_node(policy: str, node: str, calls: int) -> tuple[Samples, int]:
    """One pass of part 2 on one Node cluster, and how many workers it forked while busy."""
    first = free_ports(calls + 1)
    bench = json.dumps({"policy": policy, "held": first, "fresh": first + 1, "calls": calls, "pace": PACE})
    with started(lambda _: [node, "cluster.js"], subprocess.PIPE, BENCH=bench) as (process, *_):
        lock = threading.Timer(PATIENCE + 4 * calls * 10 * PACE, process.kill)
        lock.start()
        try:
            report = json.loads(spoken_line(process.stdout, "node"))
        finally:
            lock.cancel()
        process.wait(10)
    results = report["results"]
    samples: Samples = {(f"node {policy}", "listen", r["portIs"], r["state"]): r["times"] for r in results}
    return samples, int(report["forks"])


def measure_answers(calls: int, node: str | None) -> tuple[Samples, dict[str, int]]:
    samples: Samples = {}
    busy = {"HUPs": 0, "forks (rr)": 0, "forks (none)": 0}
    for number in range(PASSES):
        share = calls * (number + 1) // PASSES - calls * number // PASSES
        results = {"HUPs": again_if_taken(measure_broker, share)}
        for policy in ("rr", "none") if node else ():
            results[f"forks ({policy})"] = again_if_taken(measure_node, policy, node, share)
        for what, (some, count) in results.items():
            busy[what] += count
            for key, times in some.items():
                samples.setdefault(key, []).extend(times)
        progress(f"answers: pass {number + 1} of {PASSES}")
    return samples, busy


NAMES = {
    ("broker", "ask"): "BrokerClient.open_port()",
    ("broker", "listen"): "Server.listen()",
    ("node rr", "listen"): "Node, shared by round robin",
    ("node none", "listen"): "Node, shared socket",
}


def report_answers(samples: Samples, busy: dict[str, int]) -> list[str]:
    """Print part 2; the aims that were missed."""
    missed, rows = [], []
    for state, port_is in ((IDLE, "open"), (IDLE, "new"), (BUSY, "open"), (BUSY, "new")):
        for (contestant, call), name in NAMES.items():
            pairs = samples.get((contestant, call, port_is, state))
            if not pairs:
                continue
            answers = [1000 * a for a, _ in pairs]
            released = median(1000 * b for _, b in pairs)
            figures = (median(answers), percentile(answers, 99), max(answers), released)
            rows.append([state, port_is, name, str(len(answers)), *(f"{figure:.2f}" for figure in figures)])
            if contestant == "broker" and released >= ANSWER_AIM:
                what = f"{name}, {port_is} port, {state} master"
                missed.append(f"{what}: median {released:.2f} ms (aim {ANSWER_AIM:g})")
    print("\nAnswers, ms\n")
    table(["master", "port", "call", "n", "median", "p99", "max", "with release, median"], rows)
    print("\nWhile busy: " + ", ".join(f"{n} {what}" for what, n in busy.items() if n))
    return missed


def measure_listen() -> int:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--rounds", type=at_least(1, int), default=15, help="of part 1 (default 15; 6 or more decide)")
    add(
        "--calls", type=at_least(60, int), default=300, help="of each kind in part 2 (default 300, 60 to 700)"
    )
    add("--no-node", action="store_true", help="leave out the peer of part 2")
    options = parser.parse_args()
    if options.calls > 700:
        parser.error("--calls must be at most 700: the master holds at most 1024 ports")
    node = None if options.no_node else shutil.which("node")
    packages = ("gunicorn", "gevent", "gunicorn-passenger")
    versions = {"Python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}
    if node:
        versions["Node"] = program_version(node, "--version")
    print_machine(versions)
    if node is None:
        print("Node is left out.")
    boots, _ = measure_boots(options.rounds, CONTESTANTS)
    answers, busy = measure_answers(options.calls, node)
    progress()
    missed, undecided = report_boots(boots)
    missed += report_answers(answers, busy)
    print()
    for verdict, texts in (("MISSED", missed), ("UNDECIDED", undecided)):
        for text in texts:
            print(f"{verdict}: {text}")
    if not missed and not undecided:
        print("All aims met.")
    return exit_status(False, missed, undecided)


if __name__ == "__main__":
    run_benchmark(measure_listen)
