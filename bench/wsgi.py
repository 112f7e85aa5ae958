"""WSGI servers beside each other: requests per second and CPU time per request, over a UNIX socket.

Every contestant serves the same applications with one worker process that is pinned to one core; the load
comes from ``h2load``, pinned to another, over 32 connections (from ``connect.c`` where every request has a
connection of its own). The contestants take turns, each started afresh for every run:

- ``ours``: ``gunicorn -k gunicorn_passenger.Worker``;
- ``gevent`` and ``pywsgi``: gunicorn's own workers ``gevent`` and ``gevent_pywsgi``;
- ``uwsgi``, ``granian``, ``bjoern``: servers written in C and Rust;
- ``bare``: a gevent loop that parses nothing and sends a constant.

With ``--memory`` it measures the memory of ``ours`` and ``gevent`` instead, idle connections included.

The program makes a virtual environment for the servers. The exit status is 0 when the goals are met, 1 when
one is missed, 2 when a run failed, and 3 when a goal could not be measured, or other programs disturbed it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    CONNECTIONS,
    DISTURBED,
    HELLO,
    ROOT,
    SATURATED,
    WARM_UP,
    Command,
    Failed,
    Load,
    Request,
    busy_seconds,
    choice,
    cpu_seconds,
    exact_cpu_seconds,
    family,
    h2load_command,
    h2load_report,
    machine,
    make_environment,
    memory_of,
    pip_install,
    program_version,
    progress,
    raise_file_limit,
    running,
    table,
    timed,
    two_cores,
    versions,
    wait_for,
)

APPS = ROOT / "bench" / "apps"
CONNECT_SOURCE = ROOT / "bench" / "connect.c"

#: The connections and the seconds of the memory measurement's idle part.
IDLE_CONNECTIONS = 1000
IDLE_SECONDS = 10.0

# --- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is asked of a server, and the answer that it has to give."""

    title: str
    app: str
    answer: bytes
    body: bytes | None = None
    access_log: bool = False
    closing: bool = False


CASES = {
    "hello": Case("hello: 12 bytes", "plain:hello", HELLO),
    "flask": Case("flask: 12 bytes by Flask", "flask_hello:application", HELLO),
    "large": Case("large: an answer of 10 kB", "plain:large", b"0123456789" * 1024),
    "post": Case("post: a request with 4 kB", "plain:post", b"4096", body=b"x" * 4096),
    "connections": Case("connections: a new one for every request", "plain:hello", HELLO, closing=True),
    "accesslog": Case(
        "accesslog: hello, with an access log in a file", "plain:hello", HELLO, access_log=True
    ),
}

#: case -> peer -> how many times its requests per second ours should reach
GOALS = {
    "hello": {"gevent": 6.0, "pywsgi": 4.0, "granian": 1.0},
    "flask": {"gevent": 2.3},
    "large": {"gevent": 5.0},
    "post": {"gevent": 5.0},
    "connections": {"gevent": 2.5},
    "accesslog": {"gevent": 4.0},
}

#: The peers whose ratio to ours stands in the tables.
RATIOS = ("gevent", "pywsgi", "granian")


@dataclass(frozen=True)
class Site:
    """Where one server runs: its virtual environment, directory and pair of cores."""

    bin: Path
    home: Path
    core: int
    load_core: int

    @property
    def socket(self) -> Path:
        return self.home / "s"

    @property
    def access_log(self) -> Path:
        return self.home / "access.log"

    @property
    def log(self) -> Path:
        return self.home / "server.log"


def gunicorn(worker: str) -> Callable[[Case, Site], Command]:
    def command(case: Case, site: Site) -> Command:
        log = ["--access-logfile", str(site.access_log)] if case.access_log else []
        return [
            str(site.bin / "gunicorn"), "-k", worker, "-w", "1", "-b", f"unix:{site.socket}",
            "--umask", "0077", "--keep-alive", "1000", "--worker-connections", "2000",
            "--no-control-socket", *log, case.app,
        ]  # fmt: skip

    return command


def uwsgi(case: Case, site: Site) -> Command:
    """With http11-socket uWSGI keeps connections whatever the client says, with http-socket it never does."""
    protocol = "--http-socket" if case.closing else "--http11-socket"
    log = ["--logto", str(site.access_log)] if case.access_log else ["--disable-logging"]
    return [
        str(site.bin / "uwsgi"), "--home", str(site.bin.parent), "--module", case.app, "--need-app",
        "--die-on-term", protocol, str(site.socket), "--processes", "1", "--threads", str(CONNECTIONS), *log,
    ]  # fmt: skip


def granian(case: Case, site: Site) -> Command:
    """Granian writes the access log to its standard output, which is a file here."""
    return [
        str(site.bin / "granian"), "--interface", "wsgi", "--uds", str(site.socket), "--workers", "1",
        "--http", "1", "--no-ws", "--blocking-threads", str(GRANIAN_THREADS), "--backpressure", "128",
        "--access-log" if case.access_log else "--no-access-log", case.app,
    ]  # fmt: skip


def script(name: str) -> Callable[[Case, Site], Command]:
    def command(case: Case, site: Site) -> Command:
        return [str(site.bin / "python"), str(APPS / name), case.app, str(site.socket)]

    return command


@dataclass(frozen=True)
class Contestant:
    title: str
    command: Callable[[Case, Site], Command]
    #: What pip installs for it alone, beside gunicorn, gevent and Flask.
    package: str | None = None
    #: The cases that it can serve; without a list, all.
    cases: tuple[str, ...] = tuple(CASES)


#: Of 1, 2, 4, 8 and 32 the number with which Granian needed the least CPU time in `hello` and `flask`.
GRANIAN_THREADS = 32

CONTESTANTS = {
    "ours": Contestant("gunicorn -k gunicorn_passenger.Worker", gunicorn("gunicorn_passenger.Worker")),
    "gevent": Contestant("gunicorn -k gevent", gunicorn("gevent")),
    "pywsgi": Contestant("gunicorn -k gevent_pywsgi", gunicorn("gevent_pywsgi")),
    "uwsgi": Contestant(f"uWSGI, {CONNECTIONS} threads", uwsgi, "uwsgi"),
    "granian": Contestant(f"Granian, {GRANIAN_THREADS} threads", granian, "granian"),
    "bjoern": Contestant(
        "bjoern (it has no access log)",
        script("run_bjoern.py"),
        "bjoern",
        tuple(name for name in CASES if name != "accesslog"),
    ),
    "bare": Contestant("a bare gevent loop", script("run_bare.py"), cases=("hello", "large", "connections")),
}


@dataclass(frozen=True)
class Run:
    """What one run of one contestant in one case showed."""

    rate: float
    #: CPU time of the server's processes for each request, in microseconds
    cpu: float
    #: shares of their cores that the server and the load generator used
    server_load: float
    generator_load: float
    #: the share of the two cores that neither of them used and that was not idle
    others: float
    #: requests per second on the slowest and on the fastest connection, if connections last
    slowest: float | None
    fastest: float | None


#: case -> contestant -> its runs, one for each round, or None where one failed
Runs = dict[str, dict[str, list[Run | None]]]


# --- what has to be installed -----------------------------------------------------------------------


def need_tools(install: bool) -> None:
    """See that h2load is here; with --install, get it and the headers that bjoern is built with."""
    if install:
        root = [] if os.geteuid() == 0 else ["sudo"]
        packages = ["gcc", "libev-dev", "nghttp2-client"]
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            if subprocess.run([*root, "apt-get", "-q", *words], stdout=sys.stderr, check=False).returncode:
                raise Failed(f"apt-get {' '.join(words)} failed")
    for program, package in (("h2load", "nghttp2-client"), ("gcc", "gcc")):
        if shutil.which(program) is None:
            raise Failed(f"there is no {program}: apt-get install {package}, or run this with --install")


def prepare(venv: Path, names: Sequence[str]) -> dict[str, str]:
    """Make the virtual environment; which contestants could not be installed, and why."""
    make_environment(venv)
    installed = versions(venv)
    absent = {}
    for name in names:
        package = CONTESTANTS[name].package
        if package and package not in installed:
            progress(f"installing {package}")
            if why := pip_install(venv, package):
                absent[name] = f"cannot be installed: {why}"
    return absent


# --- processes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(contestant: Contestant, case: Case, site: Site) -> Iterator[list[int]]:
    """Start a server and end it again; in between, it answers. The processes, the worker last."""
    with running(contestant.command(case, site), site.core, site.log, APPS) as process:
        check_answer(process, case, site)
        yield family(process.pid)


# --- requests ---------------------------------------------------------------------------------------


def check_answer(process: subprocess.Popen[bytes], case: Case, site: Site) -> None:
    """Wait until the server accepts, and see that it answers as it should."""
    connection = Request(site.socket)
    wait_for(process, connection.connect)
    try:
        headers = {"Connection": "close"} if case.closing else {}
        connection.request("POST" if case.body else "GET", "/", case.body, headers)
        response = connection.getresponse()
        if (response.status, response.read()) != (200, case.answer):
            raise Failed(f"a wrong answer, with status {response.status}")
        if connection.sock is None and not case.closing:
            raise Failed("the server closes the connection")
    except http.client.HTTPException as error:
        raise Failed(f"no answer: {error!r}") from error
    finally:
        connection.close()


# --- the load ---------------------------------------------------------------------------------------


def drive(case: Case, site: Site, seconds: float) -> Load:
    """Load a server; that every answer was good is checked."""
    if case.closing:
        return connect_report(*timed(connect_command(case, site, seconds), site.load_core, seconds))
    options = []
    if case.body:
        body = site.home / "body"
        body.write_bytes(case.body)
        options = ["-d", str(body)]
    return h2load_report(*timed(h2load_command(site.socket, seconds, *options), site.load_core, seconds))


def connect_command(case: Case, site: Site, seconds: float) -> Command:
    program = site.home / "connect"
    if not program.exists():
        subprocess.run(["gcc", "-O2", "-o", program, CONNECT_SOURCE], check=True)
    return [str(program), str(site.socket), str(CONNECTIONS), str(seconds), case.answer.decode()]


def connect_report(report: str, cpu: float, wall: float) -> Load:
    try:
        done, bad, seconds = report.split()
        requests = int(done)
    except ValueError:
        raise Failed(f"connect: {report.strip() or 'no report'}") from None
    if int(bad) or not requests:
        raise Failed(f"not all answers were good: {requests} good, {bad} bad")
    return Load(requests, requests / float(seconds), None, None, cpu, wall)


def measure(contestant: Contestant, case: Case, site: Site, seconds: float) -> Run:
    """One run: start, warm up, measure, stop."""
    cores = (site.core, site.load_core)
    with serving(contestant, case, site) as pids:
        drive(case, site, WARM_UP)
        busy, before = busy_seconds(cores), cpu_seconds(pids)
        load = drive(case, site, seconds)
        used, busy = cpu_seconds(pids) - before, busy_seconds(cores) - busy
        if family(pids[0]) != pids:
            raise Failed("a worker died")
    if case.access_log:
        check_access_log(site, load.requests)
    return Run(
        rate=load.rate,
        cpu=1e6 * used / load.requests,
        server_load=used / load.wall,
        generator_load=load.cpu / load.wall,
        others=max(0.0, busy - used - load.cpu) / load.wall / len(cores),
        slowest=load.slowest,
        fastest=load.fastest,
    )


def check_access_log(site: Site, requests: int) -> None:
    """Once the server has ended, every request stands in its log."""
    logged = 0
    for path in (site.log, site.access_log):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            logged += sum(b"GET /" in line for line in file)
    if logged < requests:
        raise Failed(f"{requests} requests, but {logged} of them in the access log")


@contextlib.contextmanager
def site(venv: Path) -> Iterator[Site]:
    cores = two_cores()
    home = Path(tempfile.mkdtemp(prefix="wsgi-"))
    try:
        yield Site(venv / "bin", home, *cores)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def measure_all(
    venv: Path, names: Sequence[str], cases: Sequence[str], rounds: int, seconds: float
) -> tuple[Runs, list[str]]:
    """All rounds, and what failed in them."""
    runs: Runs = {case: {} for case in cases}
    failures = []
    for number in range(1, rounds + 1):
        for case in cases:
            for name in names:
                contestant = CONTESTANTS[name]
                if case not in contestant.cases:
                    continue
                progress(f"round {number} of {rounds}: {case}, {name}")
                run = None
                try:
                    with site(venv) as place:
                        run = measure(contestant, CASES[case], place, seconds)
                except Failed as error:
                    failures.append(f"{case}, {name}, round {number}: {error}")
                runs[case].setdefault(name, []).append(run)
    return runs, failures


# --- memory -----------------------------------------------------------------------------------------


def idle_connections(path: Path, count: int, stack: contextlib.ExitStack) -> None:
    """Open connections that make one request each and stay."""
    for _ in range(count):
        connection = Request(path)
        stack.callback(connection.close)
        connection.request("GET", "/")
        if connection.getresponse().read() != HELLO:
            raise Failed("a wrong answer")


def measure_memory(name: str, venv: Path, seconds: float) -> dict[str, Any]:
    contestant, case = CONTESTANTS[name], CASES["hello"]
    with site(venv) as place, serving(contestant, case, place) as pids:
        started = memory_of(pids[-1])
        drive(case, place, seconds)
        burst = memory_of(pids[-1])
    with site(venv) as place, serving(contestant, case, place) as pids, contextlib.ExitStack() as stack:
        before = memory_of(pids[-1])
        idle_connections(place.socket, IDLE_CONNECTIONS, stack)
        used = exact_cpu_seconds(pids[-1])
        time.sleep(IDLE_SECONDS)
        used = exact_cpu_seconds(pids[-1]) - used
        # once they have idled: at first, the last of them are as busy as any
        after = memory_of(pids[-1])
    return {
        "started": asdict(started),
        "burst": asdict(burst),
        "kB per idle connection": (after.uss - before.uss) / IDLE_CONNECTIONS,
        "idle CPU ms": 1000 * used,
    }


def report_memory(results: dict[str, dict[str, Any]]) -> None:
    print("\nMemory of the worker, MB: resident / proportional share / its own\n")

    def cell(memory: dict[str, int]) -> str:
        return " / ".join(f"{memory[kind] / 1024:.1f}" for kind in ("rss", "pss", "uss"))

    table(
        ["contestant", "after the start", "after a burst of hello"],
        [[name, cell(result["started"]), cell(result["burst"])] for name, result in results.items()],
    )
    print(f"\n{IDLE_CONNECTIONS} connections that made one request each and idle\n")
    table(
        ["contestant", "kB each", f"CPU ms in {IDLE_SECONDS:g} s"],
        [
            [name, f"{result['kB per idle connection']:.1f}", f"{result['idle CPU ms']:.1f}"]
            for name, result in results.items()
        ],
    )


# --- printing ---------------------------------------------------------------------------------------


def good(runs: Sequence[Run | None]) -> list[Run]:
    return [run for run in runs if run]


def report_case(case: str, results: dict[str, list[Run | None]]) -> None:
    print(f"\n{CASES[case].title}\n")
    medians = {
        name: statistics.median(run.rate for run in good(runs))
        for name, runs in results.items()
        if good(runs)
    }
    head = ["contestant", "req/s", "min-max", "CPU us/req", "server", "load", "others"]
    head += [f"x {peer}" for peer in RATIOS]
    if CASES[case].access_log:
        head += ["per connection, min-max", "max/min"]
    rows = []
    for name, runs in results.items():
        some = good(runs)
        if not some:
            rows.append([name, "failed", *["-"] * (len(head) - 2)])
            continue
        rates = [run.rate for run in some]
        row = [name, f"{medians[name]:.0f}", f"{min(rates):.0f}-{max(rates):.0f}"]
        row += [f"{statistics.median(run.cpu for run in some):.1f}"]
        for share in ("server_load", "generator_load", "others"):
            row.append(f"{100 * statistics.median(getattr(run, share) for run in some):.0f} %")
        row += [f"{medians[name] / medians[peer]:.2f}" if peer in medians else "-" for peer in RATIOS]
        if CASES[case].access_log:
            spans = [(run.slowest or 0, run.fastest or 0) for run in some]
            row.append(f"{min(low for low, _ in spans):.0f}-{max(high for _, high in spans):.0f}")
            row.append(f"{statistics.median(high / max(low, 1) for low, high in spans):.2f}")
        rows.append(row)
    table(head, rows)
    remark(
        results,
        lambda run: run.generator_load > SATURATED,
        "The load generator was at its limit with {}: they may be faster than shown.",
    )
    remark(
        results,
        lambda run: run.others > DISTURBED,
        "Others used the cores in runs of {}: the rate is too low, and the CPU time may be too high.",
    )


def remark(results: dict[str, list[Run | None]], when: Callable[[Run], bool], text: str) -> None:
    if names := [name for name, runs in results.items() if any(when(run) for run in good(runs))]:
        print("\n" + text.format(", ".join(names)))


def report_goals(runs: Runs) -> tuple[bool, bool]:
    """Print how ours stands; whether a goal was missed, and whether one is not decided.

    Runs of which half had much company on their cores decide nothing.
    """
    print("\nGoals: requests per second of ours over those of the peer\n")
    missed = unknown = False
    rows = []
    for case, results in runs.items():
        for peer, goal in GOALS[case].items():
            pairs = [
                (a, b)
                for a, b in zip(results.get("ours", []), results.get(peer, []), strict=False)
                if a and b
            ]
            if not pairs:
                rows.append([case, f"{goal:g} x {peer}", "-", "-", "-", "not measured"])
                unknown = True
                continue
            rates, costs = (
                [statistics.median(getattr(pair[i], what) for pair in pairs) for i in (0, 1)]
                for what in ("rate", "cpu")
            )
            ratio = rates[0] / rates[1]
            each = [a.rate / b.rate for a, b in pairs]
            by_cpu = f"{costs[1] / costs[0]:.2f}" if costs[0] else "-"
            company = max(statistics.median(pair[i].others for pair in pairs) for i in (0, 1))
            verdict = "undecided" if company > DISTURBED else "met" if ratio >= goal else "NOT MET"
            missed = missed or verdict == "NOT MET"
            unknown = unknown or verdict == "undecided"
            row = [case, f"{goal:g} x {peer}", f"{ratio:.2f}", f"{min(each):.2f}-{max(each):.2f}", by_cpu]
            rows.append([*row, verdict])
    table(["case", "goal", "reached", "in each round", "by CPU time", ""], rows)
    return missed, unknown


def tool_versions(venv: Path) -> dict[str, str]:
    installed = versions(venv)
    names = [
        "gunicorn",
        "gunicorn_h1c",
        "gevent",
        "flask",
        "gunicorn-passenger",
        "uwsgi",
        "granian",
        "bjoern",
    ]
    found = {name: installed[name] for name in names if name in installed}
    found["python"] = program_version(str(venv / "bin/python"), "-V")
    found["h2load"] = program_version("h2load", "--version")
    return found


# --- the program ------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    contestants, cases = list(CONTESTANTS), list(CASES)
    parser.add_argument("--only", metavar="A,B", type=choice(contestants), help=", ".join(contestants))
    parser.add_argument("--cases", metavar="A,B", type=choice(cases), default=cases, help=", ".join(cases))
    parser.add_argument("--rounds", type=int, default=5, help="how often all take turns (default 5)")
    parser.add_argument("--seconds", type=float, default=4, help="duration of a run (default 4)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead (ours, gevent)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers to a file as well")
    parser.add_argument(
        "--venv",
        type=Path,
        default=ROOT / ".venv-bench",
        help="the virtual environment (default .venv-bench)",
    )
    parser.add_argument("--install", action="store_true", help="get h2load and libev-dev by apt-get first")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds < 0.1:
        parser.error("--rounds must be at least 1, --seconds at least 0.1")
    options.only = options.only or (["ours", "gevent"] if options.memory else contestants)
    options.venv = options.venv.absolute()
    return options


def run_memory(options: argparse.Namespace, record: dict[str, Any]) -> int:
    raise_file_limit(2 * IDLE_CONNECTIONS + 100)
    results = {}
    for name in options.only:
        progress(f"memory: {name}")
        results[name] = measure_memory(name, options.venv, options.seconds)
    progress("")
    record["memory"] = results
    report_memory(results)
    return 0


def run_cases(options: argparse.Namespace, record: dict[str, Any], names: Sequence[str]) -> int:
    runs, failures = measure_all(options.venv, names, options.cases, options.rounds, options.seconds)
    progress("")
    record["failures"] = failures
    record["runs"] = {
        case: {name: [run and asdict(run) for run in some] for name, some in results.items()}
        for case, results in runs.items()
    }
    for case, results in runs.items():
        report_case(case, results)
    missed, unknown = report_goals(runs)
    if failures:
        print()
    for text in failures:
        print(f"FAILED: {text}")
    return 2 if failures else 1 if missed else 3 if unknown else 0


def main() -> int:
    options = arguments()
    # an end by SIGTERM cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        need_tools(options.install)
        absent = prepare(options.venv, options.only)
        record: dict[str, Any] = {
            "machine": machine(), "versions": tool_versions(options.venv), "left out": absent,
        }  # fmt: skip
        progress("")
        print(f"Machine: {record['machine']}")
        print("Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
        for name in options.only:
            print(f"{name}: {absent.get(name) or CONTESTANTS[name].title}")
        names = [name for name in options.only if name not in absent]
        status = run_memory(options, record) if options.memory else run_cases(options, record, names)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        return status
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"FAILED: {error}" if isinstance(error, Failed) else f"FAILED: {error!r}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
