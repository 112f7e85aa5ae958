"""WSGI servers beside each other: requests per second, CPU time per request, and response times.

Every contestant serves the same applications with one worker process that is pinned to one core; the load is
pinned to another. They take turns, each started afresh for every run. What is measured, and how:
bench/README.md.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import APPS, Failed, environment
from harness.comparison import Comparison, Contestant, Goal, write_record
from harness.figures import Column, Run, middle, numbers, ratio, share, span
from harness.limits import free_ports, raise_file_limit
from harness.load import CONNECTIONS, Load, h2load, measure_load, traffic
from harness.nginx import DEFAULT, KEPT, nginx_in_front
from harness.processes import Command, gunicorn_command
from harness.program import at_least, comparison_parser, run_benchmark
from harness.requests import HELLO, UnixConnection, fetch, serving
from harness.site import Site, first_site, new_site
from harness.tables import progress, table
from harness.usage import cpu_seconds, memory_of

ACCESS_LOG = "access.log"

#: Seconds for which each server warms up.
WARM_UP = 0.4

#: The connections (by default, and at most) and the seconds of the memory measurement's idle part.
IDLE_CONNECTIONS = 1000
MOST_CONNECTIONS = 20_000
IDLE_SECONDS = 10.0

#: Of 1, 2, 4, 8 and 32 the number with which Granian needed the least CPU time in `hello` and `flask`.
GRANIAN_THREADS = 32

#: The connections of the latency case, and the share of the load that saturates a server.
LATENCY_CONNECTIONS = 128
LATENCY_LOAD = 0.7

# --- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is asked of a server, and the response that it has to give."""

    title: str
    app: str
    response: bytes
    body: bytes | None = None
    access_log: bool = False
    #: whether each request has a connection of its own
    closing: bool = False
    #: which load of traffic.c it is; h2load by default
    load: str = ""
    tcp: bool = False
    #: what nginx does, when it is in front of the server
    nginx: str = ""
    workers: int = 1


CASES = {
    "hello": Case("hello: 12 bytes", "plain:hello", HELLO),
    "flask": Case("flask: 12 bytes by Flask", "flask_hello:application", HELLO),
    "large": Case("large: an answer of 10 kB", "plain:large", b"0123456789" * 1024),
    "post": Case("post: a request with 4 kB", "plain:post", b"4096", body=b"x" * 4096),
    "connections": Case(
        "connections: a new one for every request", "plain:hello", HELLO, closing=True, load="connections"
    ),
    "connections-tcp": Case(
        "connections-tcp: the same on TCP", "plain:hello", HELLO, closing=True, load="connections", tcp=True
    ),
    "visitors": Case(
        "visitors: HTTP/1.0, a new connection and new values in a browser's headers for every request",
        "plain:hello",
        HELLO,
        closing=True,
        load="visitors",
    ),
    "fresh": Case(
        "fresh: kept connections, new values in a browser's headers for every request",
        "plain:hello",
        HELLO,
        load="fresh",
    ),
    **{
        f"{name}-{app}": Case(
            f"{name}-{app}: {title}", module, HELLO, closing=closing, load="fresh", nginx=nginx
        )
        for app, module in (("hello", "plain:hello"), ("flask", "flask_hello:application"))
        for name, title, closing, nginx in (
            ("nginx", "behind nginx in its default configuration", True, DEFAULT),
            ("nginx-kept", "behind nginx, which keeps its connections", False, KEPT),
        )
    },
    "latency": Case(
        f"latency: response times in us at {LATENCY_LOAD:.0%} of the load that saturates; "
        "two workers on one core, one of 20 requests takes 20 ms",
        "plain:mixed",
        HELLO,
        load="latency",
        workers=2,
    ),
    "accesslog": Case(
        "accesslog: hello, with an access log in a file", "plain:hello", HELLO, access_log=True
    ),
}

#: Requests per second of ours over those of a peer.
GOALS = [
    Goal("hello", 6, "gevent"),
    Goal("hello", 4, "pywsgi"),
    Goal("hello", 1, "granian"),
    Goal("flask", 2.3, "gevent"),
    Goal("large", 5, "gevent"),
    Goal("post", 5, "gevent"),
    *[
        Goal(case, limit, peer)
        for case in ("connections", "connections-tcp")
        for limit, peer in ((6, "gevent"), (1, "granian"), (0.75, "uwsgi"))
    ],
    Goal("visitors", 1, "granian"),
    Goal("visitors", 0.6, "uwsgi"),
    Goal("fresh", 1.1, "granian"),
    Goal("fresh", 0.85, "uwsgi"),
    *[
        goal
        for case in CASES
        if case.startswith("nginx")
        for goal in (Goal(case, 2, "gevent"), Goal(case, 1, "granian", "cpu", "the CPU time of", most=True))
    ],
    *[
        Goal("latency", 1.2, peer, figure=figure, name=f"the {figure} of", most=True)
        for figure in ("p50", "p99", "p99.9")
        for peer in ("gevent", "granian", "uwsgi")
    ],
    Goal("accesslog", 4, "gevent"),
]


LATENCIES = ("p50", "p99", "p99.9")


def times(peer: str) -> Column:
    return f"x {peer}", lambda runs, every: ratio(runs, every.get(peer))


def columns(case: Case) -> list[Column]:
    def range_of_connections(runs: list[Run], _: object) -> str:
        return f"{min(numbers(runs, 'slowest')):.0f}-{max(numbers(runs, 'fastest')):.0f}"

    def evenness(runs: list[Run], _: object) -> str:
        each = zip(numbers(runs, "slowest"), numbers(runs, "fastest"), strict=True)
        return f"{statistics.median(high / max(low, 1) for low, high in each):.2f}"

    peers = map(times, ("gevent", "granian", "uwsgi"))
    return [
        middle("req/s", "rate"), span("rate"), middle("CPU us/req", "cpu", 1), share("server", "server_load"),
        share("load", "generator_load"), share("others", "others"), *peers,
        *[middle(figure, figure) for figure in LATENCIES if case.load == "latency"],
        *[("per connection, min-max", range_of_connections), ("max/min", evenness)] * case.access_log,
    ]  # fmt: skip


# --- the contestants --------------------------------------------------------------------------------


def gunicorn(worker: str, case: Case, site: Site) -> Command:
    log = ["--access-logfile", site.home / ACCESS_LOG] if case.access_log else []
    options = ["--keep-alive", 1000, "--worker-connections", MOST_CONNECTIONS, *log]
    python = site.bin / "python"
    return gunicorn_command(worker, case.app, site.target, *options, python=python, workers=case.workers)


def second_server(case: Case, site: Site) -> Command:
    """The same application as a second server of the program, on the port."""
    return gunicorn(OURS, replace(case, app="second"), replace(site, port=0))


def uwsgi(case: Case, site: Site) -> Command:
    """With http11-socket uWSGI keeps connections whatever the client says, with http-socket it never does."""
    protocol = "--http-socket" if case.closing else "--http11-socket"
    log = ["--logto", site.home / ACCESS_LOG] if case.access_log else ["--disable-logging"]
    address = f"127.0.0.1:{site.port}" if site.port else site.socket
    threads = LATENCY_CONNECTIONS if case.load == "latency" else CONNECTIONS
    return [
        site.bin / "uwsgi", "--home", site.bin.parent, "--module", case.app, "--need-app", "--listen", 128,
        "--die-on-term", protocol, address, "--processes", case.workers, "--threads", threads, *log,
    ]  # fmt: skip


def granian(case: Case, site: Site) -> Command:
    """Granian writes the access log to its standard output, which is a file here."""
    address = ["--host", "127.0.0.1", "--port", site.port] if site.port else ["--uds", site.socket]
    return [
        site.bin / "granian", "--interface", "wsgi", *address, "--workers", case.workers, "--http", 1,
        "--no-ws", "--blocking-threads", GRANIAN_THREADS, "--backpressure", 128,
        "--access-log" if case.access_log else "--no-access-log", case.app,
    ]  # fmt: skip


def script(name: str, case: Case, site: Site) -> Command:
    return [site.bin / "python", APPS / name, case.app, site.socket]


OURS = "gunicorn_passenger.Worker"
#: the cases of one worker on a UNIX socket
PLAIN = {name for name, case in CASES.items() if not (case.tcp or case.nginx or case.workers > 1)}
BJOERN, BARE = partial(script, "run_bjoern.py"), partial(script, "run_bare.py")
CONTESTANTS = {
    "ours": Contestant(f"gunicorn -k {OURS}", partial(gunicorn, OURS)),
    "second": Contestant(f"a second server of gunicorn -k {OURS}", second_server, ("connections-tcp",)),
    "gevent": Contestant("gunicorn -k gevent", partial(gunicorn, "gevent")),
    "pywsgi": Contestant("gunicorn -k gevent_pywsgi", partial(gunicorn, "gevent_pywsgi")),
    "uwsgi": Contestant(f"uWSGI, {CONNECTIONS} threads", uwsgi, package="uwsgi"),
    "granian": Contestant(f"Granian, {GRANIAN_THREADS} threads", granian, package="granian"),
    "bjoern": Contestant("bjoern (it has no access log)", BJOERN, PLAIN - {"accesslog"}, "bjoern"),
    "bare": Contestant("a bare gevent loop", BARE, PLAIN - {"accesslog", "flask", "post"}),
}

SERVERS = Comparison(
    contestants=CONTESTANTS,
    tables={name: (case.title, columns(case)) for name, case in CASES.items()},
    goals=GOALS,
    goals_title="requests per second of ours over those of the peer",
    at_limit="The load generator was at its limit with {}: they may be faster than shown.",
    by_cpu=True,
)


def install_servers(venv: Path, names: Sequence[str], install: bool) -> dict[str, str]:
    """Install what the contestants need; those that could not be installed, and why.

    :param install: whether to get programs, and the headers that bjoern is built with, from the distribution.
    """
    if install:
        root = [] if os.geteuid() == 0 else ["sudo"]
        packages = ["gcc", "libc6-dev", "libev-dev", "nghttp2-client", "nginx-light"]
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            if subprocess.run([*root, "apt-get", "-q", *words], stdout=sys.stderr, check=False).returncode:
                raise Failed(f"apt-get {' '.join(words)} failed")
    wanted = {"h2load": "nghttp2-client", "cc": "gcc libc6-dev", "nginx": "nginx-light"}
    environment.require_programs(wanted, ", or run this with --install")
    environment.make_environment(venv)
    installed = environment.installed_versions(venv)
    absent = {}
    for name in names:
        package = CONTESTANTS[name].package
        if package and package not in installed:
            progress(f"installing {package}")
            if why := environment.installation_error(environment.pip(venv, "install", "--quiet", package)):
                absent[name] = f"cannot be installed: {why}"
    return absent


# --- runs -------------------------------------------------------------------------------------------


def drive_server(case: Case, site: Site, seconds: float, rate: float = 0) -> Load:
    """Load a server; that every response was good is checked.

    :param rate: the requests per second of the latency case; 0 for as many as the server can serve.
    """
    if case.load == "latency":
        return traffic(site, case.load, LATENCY_CONNECTIONS, seconds, case.response.decode(), rate)
    if case.load:
        return traffic(site, case.load, CONNECTIONS, seconds, case.response.decode())
    options: list[object] = []
    if case.body:
        body = site.home / "body"
        body.write_bytes(case.body)
        options = ["-d", body]
    return h2load(site, seconds, *options)


def serving_case(name: str, case: Case, site: Site) -> contextlib.AbstractContextManager[list[int]]:
    command = CONTESTANTS[name].command(case, site)
    variables = {"BENCH_PORT": site.port}
    return serving(command, site, APPS, "/", case.response, case.body, case.closing, **variables)


def measure_server(first: Site, rate: float, name: str, case_name: str, seconds: float) -> Run:
    """One run: start, warm up, measure, stop.

    :param rate: the requests per second of the latency case; 0 for 70 % of what saturates the server.
    """
    case = CASES[case_name]
    with new_site(first, free_ports(1) if case.tcp else 0) as site:
        with serving_case(name, case, site) as pids, nginx_in_front(first, site, case.nginx) as (near, nginx):
            saturated = drive_server(case, near, WARM_UP)
            rate = rate or LATENCY_LOAD * saturated.amount / saturated.seconds
            load, run = measure_load(site, pids, lambda: drive_server(case, near, seconds, rate), nginx)
        if case.access_log:
            check_access_log(site, int(load.amount))
    return run | {
        "slowest": load.slowest, "fastest": load.fastest,
        **dict(zip(LATENCIES, load.latencies, strict=False)),
    }  # fmt: skip


def check_access_log(site: Site, requests: int) -> None:
    """Once the server has ended, every request stands in its log."""
    logged = 0
    for path in (site.log, site.home / ACCESS_LOG):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            logged += sum(b"GET /" in line for line in file)
    if logged < requests:
        raise Failed(f"{requests} requests, but {logged} of them in the access log")


def measure_memory(first: Site, name: str, seconds: float, connections: int) -> dict[str, Any]:
    """The worker's memory in kB (resident, proportional share, its own): started, after a burst, idle."""

    def memory(pids: list[int]) -> dict[str, int]:
        found = memory_of(pids[-1])
        own = found["Private_Clean"] + found["Private_Dirty"]
        return {"rss": found["Rss"], "pss": found["Pss"], "uss": own}

    progress(f"memory: {name}")
    case = CASES["hello"]
    with new_site(first) as site, serving_case(name, case, site) as pids:
        started = memory(pids)
        drive_server(case, site, seconds)
        burst = memory(pids)
    with new_site(first) as site, serving_case(name, case, site) as pids, contextlib.ExitStack() as stack:
        before = memory(pids)
        for _ in range(connections):
            fetch(stack.enter_context(contextlib.closing(UnixConnection(site.socket))), wanted=HELLO)
        used = cpu_seconds(pids[-1:])
        time.sleep(IDLE_SECONDS)
        used = cpu_seconds(pids[-1:]) - used
        # once they have idled: at first, the last of them are as busy as any
        each = (memory(pids)["uss"] - before["uss"]) / connections
    return {"started": started, "burst": burst, "kB per idle connection": each, "idle CPU ms": 1000 * used}


def report_memory(results: dict[str, dict[str, Any]], connections: int) -> None:
    progress()
    rows, idle = [], []
    for name, result in results.items():
        both = (result["started"].values(), result["burst"].values())
        rows.append([name, *(" / ".join(f"{kb / 1024:.1f}" for kb in memory) for memory in both)])
        idle.append([name, f"{result['kB per idle connection']:.1f}", f"{result['idle CPU ms']:.1f}"])
    print("\nMemory of the worker, MB: resident / proportional share / its own\n")
    table(["contestant", "after the start", "after a burst of hello"], rows)
    print(f"\n{connections} connections that made one request each and idle\n")
    table(["contestant", "kB each", f"CPU ms in {IDLE_SECONDS:g} s"], idle)


def compare_servers() -> int:
    parser = comparison_parser(__doc__, CONTESTANTS, CASES, seconds=4)
    parser.add_argument("--memory", action="store_true", help="measure memory instead (ours, gevent)")
    parser.add_argument(
        "--idle", type=int, default=IDLE_CONNECTIONS, metavar="N",
        help=f"with --memory: how many connections idle (default {IDLE_CONNECTIONS})",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=at_least(0, float), default=0, metavar="N",
        help="requests/s of the latency case (default: 70 %% of what saturates each server)",
    )  # fmt: skip
    parser.add_argument("--install", action="store_true", help="get h2load and libev-dev by apt-get first")
    options = parser.parse_args()
    if not 1 <= options.idle < MOST_CONNECTIONS:
        parser.error(f"--idle {options.idle}: give a number from 1 to {MOST_CONNECTIONS - 1}")
    options.only = options.only or (["ours", "gevent"] if options.memory else list(CONTESTANTS))
    absent = install_servers(options.venv, options.only, options.install)
    packages = ["gunicorn", "gunicorn_h1c", "gevent", "flask", "gunicorn-passenger"]
    packages += [contestant.package for contestant in CONTESTANTS.values()]
    versions = environment.versions_of(options.venv, packages, {"h2load": "--version", "nginx": "-v"})
    record = SERVERS.introduce(options, versions, absent)
    status = 0
    with first_site(options.venv) as first:
        if options.memory:
            raise_file_limit(options.idle + 200)
            record["memory"] = {
                name: measure_memory(first, name, options.seconds, options.idle) for name in options.only
            }
            report_memory(record["memory"], options.idle)
        else:
            status = SERVERS.compare(options, record, partial(measure_server, first, options.rate))
    write_record(options.json, record)
    return status


if __name__ == "__main__":
    run_benchmark(compare_servers)
