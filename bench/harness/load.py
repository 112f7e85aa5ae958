"""Load generators, and what a load costs the server and the rest of the machine."""

import re
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import PATIENCE, Failed
from .figures import Run
from .processes import Command, pinned
from .site import Site
from .usage import busy_seconds, cpu_seconds, family

#: The connections of h2load.
CONNECTIONS = 32


@dataclass(frozen=True)
class Load:
    """What a load generator reports: how much was carried in how many seconds."""

    amount: float
    seconds: float
    #: its own CPU time and its duration, in seconds
    cpu: float
    wall: float
    #: requests per second on the slowest and on the fastest connection, if connections last
    slowest: float | None = None
    fastest: float | None = None
    #: the median, the 99th and the 99.9th percentile of the response times, in microseconds
    latencies: tuple[float, ...] = ()


def generate(command: Command, site: Site, seconds: float) -> tuple[str, float, float]:
    """Run a load generator: what it printed, its CPU time and its duration."""

    def children_cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, start = children_cpu(), time.monotonic()
    try:
        run = subprocess.run(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=PATIENCE + 10 * seconds,
            preexec_fn=pinned(site.load_core), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} does not come to an end") from None
    return run.stdout, children_cpu() - before, time.monotonic() - start


def h2load(site: Site, seconds: float, *options: object, path: str = "/") -> Load:
    """Requests to a UNIX socket, each connection with one at a time.

    A response that had begun when h2load stopped is among the 2xx, but not done.
    """
    command = ["h2load", "--h1", "-c", CONNECTIONS, "-D", f"{seconds * 1000:.0f}ms", *options]
    report, cpu, wall = generate(
        [*command, "-B", f"unix:{site.socket}", f"http://localhost{path}"], site, seconds
    )
    rate = re.search(r"^finished in \S+, ([\d.]+) req/s", report, re.M)
    counts = re.search(r"^requests: (.*)$", report, re.M)
    status = re.search(r"^status codes: (\d+) 2xx, (.*)$", report, re.M)
    each = re.search(r"^req/s +: +([\d.]+) +([\d.]+)", report, re.M)
    if not (rate and counts and status and each):
        raise Failed(f"h2load: {report.strip()[-300:] or 'no report'}")
    count = {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", counts[1])}
    bad = count["failed"] + count["errored"] + count["timeout"] or status[2] != "0 3xx, 0 4xx, 0 5xx"
    if bad or not 0 < count["done"] == count["succeeded"] <= int(status[1]):
        raise Failed(f"not all responses were good: {counts[1]}; {status[0]}")
    return Load(count["done"], count["done"] / float(rate[1]), cpu, wall, float(each[1]), float(each[2]))


def traffic(site: Site, kind: str, size: int, seconds: float, *words: object, unit: float = 1) -> Load:
    """One of the loads of traffic.c, which checks every response itself.

    :param unit: how much each of those carries that it counts.
    """
    command = [site.traffic, kind, site.target, size, seconds, *words]
    report, cpu, wall = generate(command, site, seconds)
    try:
        count, took, *latencies = map(float, report.split())
    except ValueError:
        raise Failed(f"{kind}: {report.strip() or 'no report'}") from None
    if not count:
        raise Failed(f"{kind}: nothing was carried")
    return Load(count * unit, took, cpu, wall, latencies=tuple(latencies))


def measure_load(
    site: Site, pids: Sequence[int], drive: Callable[[], Load], behind: Sequence[int] = (), scale: float = 1e6
) -> tuple[Load, Run]:
    """Load a server, and see what it takes of the cores beside the load, the upstream and other programs.

    :param behind: the processes of the upstream.
    :param scale: the unit of the CPU time in the table: microseconds.
    """
    cores = (site.core, site.load_core)
    busy, used, fed = busy_seconds(cores), cpu_seconds(pids), cpu_seconds(behind)
    load = drive()
    busy, used, fed = busy_seconds(cores) - busy, cpu_seconds(pids) - used, cpu_seconds(behind) - fed
    if family(pids[0]) != pids:
        raise Failed("a worker died")
    return load, {
        "rate": load.amount / load.seconds,
        "cpu": scale * used / load.amount,
        "server_load": used / load.wall,
        "generator_load": (load.cpu + fed) / load.wall,
        "others": max(0.0, busy - used - load.cpu - fed) / load.wall / len(cores),
    }
