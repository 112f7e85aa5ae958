"""Reverse proxies beside each other: requests, WebSocket messages, bodies, and idle WebSockets.

Every contestant runs with one worker on one core; the load and the upstream share another. The clients reach
it over a UNIX socket, it reaches the upstream over TCP. The contestants take turns, each started afresh for
every run:

- ``ours``: ``gunicorn -k gunicorn_passenger.Worker`` with ``http_proxy.create_server(...)`` and nothing else;
- ``http-proxy``, ``http-proxy-3`` (keep-alive agents) and ``fast-proxy`` (undici): proxies for Node;
- ``nginx``, with the buffers of its defaults, and ``nginx-256k``, with large ones;
- ``werkzeug``: Werkzeug's ``ProxyMiddleware`` on ``gunicorn -k gevent``.

The program installs those for Python and Node itself. The exit status is 0 when the goals are met, 1 when one
is missed, 2 when a run failed, and 3 when a goal could not be measured, or other programs disturbed it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    CONNECTIONS,
    DISTURBED,
    HELLO,
    PATIENCE,
    ROOT,
    SATURATED,
    Command,
    Failed,
    Request,
    busy_seconds,
    choice,
    exact_cpu_seconds,
    family,
    h2load_command,
    h2load_report,
    machine,
    make_environment,
    memory_of,
    pinned,
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

HERE = ROOT / "bench" / "proxy"

#: nginx is where the PATH of an ordinary user does not lead.
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

#: Seconds for which each proxy warms up: Node compiles what runs often, and is slower before.
WARM_UP = 2.0

#: The WebSockets that carry messages, and those that idle, with the seconds for which they are watched, after
#: some in which a server may come to rest.
WEBSOCKETS = 50
IDLE_WEBSOCKETS = 2000
IDLE_SECONDS = 5.0
REST = 1.0

#: The body that is carried, and the one whose bytes are compared before that.
BODY = 256 << 20
PATTERN = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))

MB, GB = 1 << 20, 1 << 30


# --- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    title: str
    #: of the table's columns
    rate: str = ""
    cost: str = ""
    #: by what its cost is divided, in the unit that is counted
    per: float = 1.0
    #: the cost's unit, in seconds
    second: float = 1.0


CASES = {
    "hello": Case(f"hello: 12 bytes, {CONNECTIONS} connections", "req/s", "CPU us/req", second=1e-6),
    "echo": Case(
        f"echo: messages of 125 bytes over {WEBSOCKETS} WebSockets", "messages/s", "CPU us each", second=1e-6
    ),
    "down": Case("down: answers of 256 MB", "MB/s", "CPU s/GB", per=GB / MB),
    "up": Case("up: requests with 256 MB", "MB/s", "CPU s/GB", per=GB / MB),
    "idle": Case(f"idle: {IDLE_WEBSOCKETS} WebSockets that carried one message each"),
}
BODIES = ("down", "up")
HTTP = ("hello", *BODIES)


@dataclass(frozen=True)
class Run:
    """What one run of one contestant in one case showed."""

    #: requests or messages per second, or MB/s
    rate: float
    #: CPU time of the proxy's processes for each of them, in microseconds, or for a GB, in seconds
    cpu: float
    #: shares of their cores that the proxy used, and the load together with the upstream
    server_load: float
    generator_load: float
    #: the share of the two cores that none of them used and that was not idle
    others: float
    #: for bodies, MB by which the proxy's resident memory was larger at its peak than after one small request
    growth: float | None = None


@dataclass(frozen=True)
class Idle:
    """What idle WebSockets cost: resident kB each, and all of the proxy's CPU time, in milliseconds."""

    memory: float
    cpu: float
    #: the share of the two cores that was not idle, apart from the proxy's
    others: float


#: case -> contestant -> its runs, one for each round, or None where one failed
Runs = dict[str, dict[str, list[Run | Idle | None]]]


@dataclass(frozen=True)
class Goal:
    """What ours should reach: so many times what a peer has, or without a peer so much."""

    case: str
    what: str
    limit: float
    peer: str | None = None
    #: whether less is better
    most: bool = False

    def __str__(self) -> str:
        names = {"growth": "MB more memory", "memory": "the memory of", "cpu": "ms of CPU time"}
        text = f"{self.limit:g}" + (" x" if self.peer else "")
        return " ".join(filter(None, ["at most" if self.most else "", text, names.get(self.what), self.peer]))


GOALS = [
    Goal("hello", "rate", 1.5, "http-proxy"),
    Goal("hello", "rate", 1.2, "fast-proxy"),
    Goal("hello", "rate", 0.5, "nginx"),
    Goal("hello", "rate", 10, "werkzeug"),
    Goal("echo", "rate", 1, "http-proxy"),
    Goal("down", "rate", 1.2, "nginx"),
    Goal("down", "rate", 0.9, "nginx-256k"),
    Goal("down", "growth", 4, most=True),
    Goal("up", "rate", 1, "http-proxy"),
    Goal("up", "growth", 4, most=True),
    Goal("idle", "memory", 1, "http-proxy", most=True),
    # a server's own heartbeats are allowed: a tick of the system's clock
    Goal("idle", "cpu", 10, most=True),
]


# --- the contestants --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kit:
    """What all runs share: the tools, the files and the pair of cores."""

    bin: Path
    traffic: Path
    files: Path
    core: int
    load_core: int


@dataclass(frozen=True)
class Site:
    """Where one proxy runs, and where its upstream is."""

    kit: Kit
    home: Path
    port: int

    @property
    def socket(self) -> Path:
        return self.home / "s"

    @property
    def target(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """This process's environment without anything that would change a contestant."""
        foreign = ("PASSENGER_", "GUNICORN_", "NODE_", "NGINX")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {
            **env,
            "BENCH_TARGET": self.target,
            "NODE_ENV": "production",
            "PASSENGER_RUNTIME_DIR": str(self.home / "run"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def gunicorn(worker: str, app: str) -> Callable[[Site], Command]:
    def command(site: Site) -> Command:
        return [
            str(site.kit.bin / "gunicorn"), "-k", worker, "-w", "1", "-b", f"unix:{site.socket}",
            "--umask", "0077", "--keep-alive", "1000", "--worker-connections", str(2 * IDLE_WEBSOCKETS),
            "--no-control-socket", app,
        ]  # fmt: skip

    return command


def node(script: str, *words: str) -> Callable[[Site], Command]:
    return lambda site: ["node", str(HERE / script), *words, site.target, str(site.socket)]


#: nginx as a proxy that keeps its connections and carries WebSockets, as its documentation shows.
NGINX_PROXY = """
    client_max_body_size 0;
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    upstream target {{ server 127.0.0.1:{port}; keepalive 100; keepalive_requests 1000000000; }}
    server {{
        listen unix:{socket};
        location / {{
            proxy_pass http://target;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            {more}
        }}
    }}
"""

#: Large buffers, and nothing in files: requests are handed on while they arrive.
NGINX_256K = """
            proxy_buffer_size 256k;
            proxy_buffers 8 256k;
            proxy_busy_buffers_size 512k;
            proxy_max_temp_file_size 0;
            client_body_buffer_size 256k;
            proxy_request_buffering off;
"""

NGINX_UPSTREAM = """
    sendfile on;
    server {{
        listen 127.0.0.1:{port};
        location = /bench/hello {{ default_type text/plain; return 200 "Hello World!"; }}
        location / {{ root {files}; }}
    }}
"""


def nginx_command(home: Path, http: str) -> Command:
    """nginx in one process beside its master, with everything that it writes below a directory."""
    temporary = "\n".join(
        f"    {kind}_temp_path {home}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        f"""{"user root;" if os.geteuid() == 0 else ""}
daemon off;
worker_processes 1;
worker_rlimit_nofile {4 * IDLE_WEBSOCKETS};
pid {home}/nginx.pid;
error_log stderr;
events {{ worker_connections {3 * IDLE_WEBSOCKETS}; }}
http {{
    access_log off;
    keepalive_timeout 1000s;
    keepalive_requests 1000000000;
{temporary}
{http}
}}
"""
    )
    return ["nginx", "-e", "stderr", "-p", str(home), "-c", str(home / "nginx.conf")]


def nginx(more: str) -> Callable[[Site], Command]:
    return lambda site: nginx_command(
        site.home, NGINX_PROXY.format(port=site.port, socket=site.socket, more=more)
    )


@dataclass(frozen=True)
class Contestant:
    title: str
    command: Callable[[Site], Command]
    #: The cases that it can serve.
    cases: tuple[str, ...] = tuple(CASES)


CONTESTANTS = {
    "ours": Contestant(
        "gunicorn_passenger.http_proxy on gunicorn -k gunicorn_passenger.Worker",
        gunicorn("gunicorn_passenger.Worker", "ours"),
    ),
    "http-proxy": Contestant("node-http-proxy with a keep-alive agent", node("http-proxy.js", "http-proxy")),
    "http-proxy-3": Contestant("http-proxy-3 with a keep-alive agent", node("http-proxy.js", "http-proxy-3")),
    "fast-proxy": Contestant("fast-proxy on undici (no WebSockets)", node("fast-proxy.js"), HTTP),
    "nginx": Contestant("nginx, default buffers", nginx("")),
    "nginx-256k": Contestant("nginx, buffers of 256 kB", nginx(NGINX_256K)),
    "werkzeug": Contestant(
        "Werkzeug's ProxyMiddleware on gunicorn -k gevent (no WebSockets)",
        gunicorn("gevent", "middleware"),
        HTTP,
    ),
}
FOR_NODE = ("http-proxy", "http-proxy-3", "fast-proxy")
FOR_NGINX = ("nginx", "nginx-256k")


# --- what has to be installed -----------------------------------------------------------------------


def require(names: Sequence[str], cases: Sequence[str]) -> None:
    """See that what comes from the distribution is here, and say at once all that is not."""
    wanted = {"cc": "gcc libc6-dev"}
    if "hello" in cases:
        wanted["h2load"] = "nghttp2-client"
    if {"hello", "down"} & set(cases) or set(FOR_NGINX) & set(names):
        wanted["nginx"] = "nginx-light"
    if set(FOR_NODE) & set(names):
        wanted |= {"node": "nodejs", "npm": "npm"}
    missing = [program for program in wanted if shutil.which(program) is None]
    if missing:
        packages = " ".join(wanted[program] for program in missing)
        raise Failed(f"there is no {', no '.join(missing)} here: apt-get install {packages}")


def npm_install() -> str:
    """Install what bench/proxy/package-lock.json says; what npm had to say if it failed, else nothing."""
    lock, stamp = HERE / "package-lock.json", HERE / "node_modules" / ".package-lock.json"
    if stamp.exists() and stamp.stat().st_mtime >= lock.stat().st_mtime:
        return ""
    progress("installing the proxies for Node")
    run = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--loglevel", "error"], cwd=HERE,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if run.returncode == 0:
        stamp.touch()
        return ""
    lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    return lines[0] if lines else "npm ci failed"


def prepare(venv: Path, names: Sequence[str]) -> dict[str, str]:
    """Install the contestants for Python and Node; which could not be, and why."""
    make_environment(venv)
    of_node = [name for name in names if name in FOR_NODE]
    why = npm_install() if of_node else ""
    return {name: f"cannot be installed: {why}" for name in of_node if why}


def tool_versions(venv: Path, names: Sequence[str]) -> dict[str, str]:
    installed = versions(venv)
    python = ["gunicorn", "gunicorn_h1c", "gevent", "werkzeug", "gunicorn-passenger"]
    found = {name: installed[name] for name in python if name in installed}
    found["python"] = program_version(str(venv / "bin/python"), "-V")
    for program, option in (("h2load", "--version"), ("nginx", "-v")):
        if shutil.which(program):
            found[program] = program_version(program, option)
    if set(FOR_NODE) & set(names):
        found["node"] = program_version("node", "-v").lstrip("v")
        for name in (*FOR_NODE, "undici"):
            with contextlib.suppress(OSError):
                package = HERE / "node_modules" / name / "package.json"
                found[name] = json.loads(package.read_text())["version"]
    return found


@contextlib.contextmanager
def kit(venv: Path) -> Iterator[Kit]:
    """Compile the load, and make the files that an upstream serves."""
    cores = two_cores()
    home = Path(tempfile.mkdtemp(prefix="proxy-"))
    try:
        traffic, files = home / "traffic", home / "files"
        subprocess.run(["cc", "-O2", "-o", traffic, HERE / "traffic.c"], check=True)
        (files / "bench").mkdir(parents=True)
        (files / "bench" / "pattern").write_bytes(PATTERN)
        with (files / "bench" / "body").open("wb") as file:
            file.truncate(BODY)
        yield Kit(venv / "bin", traffic, files, *cores)
    finally:
        shutil.rmtree(home, ignore_errors=True)


# --- processes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def directory(kit: Kit) -> Iterator[Path]:
    """A new directory, short enough a name for sockets."""
    home = Path(tempfile.mkdtemp(dir=kit.traffic.parent, prefix="r"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def upstream(kit: Kit, case: str) -> Iterator[tuple[int, list[int]]]:
    """What the proxies carry to: nginx for what it sends, else traffic.c. Its port and its processes."""
    with directory(kit) as home:
        log = home / "log"
        if case in ("hello", "down"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = nginx_command(home, NGINX_UPSTREAM.format(port=port, files=kit.files))
        else:
            port, command = 0, [str(kit.traffic), "upstream"]
        with running(command, kit.load_core, log, home) as process:

            def connect() -> None:
                nonlocal port
                if not port and (text := log.read_text()).endswith("\n"):
                    port = int(text)
                if not port:
                    raise OSError("not yet")
                socket.create_connection(("127.0.0.1", port), PATIENCE).close()

            wait_for(process, connect)
            yield port, family(process.pid)


@contextlib.contextmanager
def serving(contestant: Contestant, kit: Kit, port: int) -> Iterator[tuple[Site, list[int]]]:
    """Start a proxy and end it again; in between, it answers. Its processes, the worker last."""
    with directory(kit) as home:
        site = Site(kit, home, port)
        log = home / "log"
        with running(contestant.command(site), kit.core, log, HERE, site.environment()) as process:
            connection = Request(site.socket)
            wait_for(process, connection.connect)
            with contextlib.closing(connection):
                ask(connection, "GET", "/bench/hello", HELLO)
                if connection.sock is None:
                    raise Failed("the proxy closes the connection")
            yield site, family(process.pid)


def ask(connection: Request, method: str, path: str, answer: bytes, body: bytes | None = None) -> None:
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        if (response.status, response.read()) != (200, answer):
            raise Failed(f"{method} {path}: a wrong answer, with status {response.status}")
    except http.client.HTTPException as error:
        raise Failed(f"{method} {path}: no answer: {error!r}") from error


def check(case: str, site: Site) -> None:
    """See that a proxy carries what the case is about unchanged, and warm it up."""
    if case in BODIES:
        with contextlib.closing(Request(site.socket)) as connection:
            if case == "down":
                ask(connection, "GET", "/bench/pattern", PATTERN)
            else:
                ask(connection, "POST", "/bench/sum", b"%d" % zlib.adler32(PATTERN), PATTERN)
    drive(case, site, WARM_UP)


def cpu_of(pids: Sequence[int]) -> float:
    return sum(exact_cpu_seconds(pid) for pid in pids)


def cpu_by_thread(pids: Sequence[int]) -> dict[str, float]:
    """The CPU time of each living thread: one that ends takes its time with it, and may not count."""
    used = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                used[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return used


def resident(pid: int, what: str) -> int:
    """VmRSS or VmHWM, its peak, in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0])
    raise Failed(f"process {pid} has no {what}")


def forget_peak(pid: int) -> None:
    """The peak of the resident memory is counted from now on; see proc(5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# --- the load ---------------------------------------------------------------------------------------


def drive(case: str, site: Site, seconds: float) -> tuple[float, float, float, float]:
    """Load a proxy: the requests, messages or MB it carried, in how long; the load's CPU and wall time.

    That every answer was good is checked.
    """
    kit = site.kit
    if case == "hello":
        command = h2load_command(site.socket, seconds, url="http://localhost/bench/hello")
        load = h2load_report(*timed(command, kit.load_core, seconds))
        return load.requests, load.requests / load.rate, load.cpu, load.wall
    size = WEBSOCKETS if case == "echo" else BODY
    command = [str(kit.traffic), case, str(site.socket), str(size), str(seconds)]
    report, cpu, wall = timed(command, kit.load_core, seconds)
    try:
        count, took = map(float, report.split())
    except ValueError:
        raise Failed(f"{case}: {report.strip() or 'no report'}") from None
    if not count:
        raise Failed(f"{case}: nothing was carried")
    return count * (1 if case == "echo" else BODY / MB), took, cpu, wall


def measure(contestant: Contestant, case: str, kit: Kit, seconds: float) -> Run | Idle:
    """One run: start, check, warm up, measure, stop."""
    with upstream(kit, case) as (port, behind), serving(contestant, kit, port) as (site, pids):
        if case == "idle":
            return measure_idle(site, pids)
        before = 0
        for pid in pids:
            forget_peak(pid)
            before += resident(pid, "VmRSS")
        check(case, site)
        cores = (kit.core, kit.load_core)
        busy, used, fed = busy_seconds(cores), cpu_of(pids), cpu_of(behind)
        carried, took, cpu, wall = drive(case, site, seconds)
        busy, used, fed = busy_seconds(cores) - busy, cpu_of(pids) - used, cpu_of(behind) - fed
        peak = sum(resident(pid, "VmHWM") for pid in pids)
        if family(pids[0]) != pids:
            raise Failed("a worker died")
    return Run(
        rate=carried / took,
        cpu=used / carried * CASES[case].per / CASES[case].second,
        server_load=used / wall,
        generator_load=(cpu + fed) / wall,
        others=max(0.0, busy - used - cpu - fed) / wall / len(cores),
        growth=max(0, peak - before) / 1024 if case in BODIES else None,
    )


def measure_idle(site: Site, pids: list[int]) -> Idle:
    """Memory is compared with that after a first WebSocket, which may have loaded code."""

    def memory() -> int:
        time.sleep(REST)
        return sum(memory_of(pid).rss for pid in pids)

    def spoken(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout
        if (line := process.stdout.readline().strip()) != word:
            raise Failed(f"idle: {line or 'no report'}")

    @contextlib.contextmanager
    def websockets(count: int) -> Iterator[None]:
        """They are open, and carry messages, before and after."""
        with subprocess.Popen(
            [str(site.kit.traffic), "idle", str(site.socket), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=pinned(site.kit.load_core),
        ) as process:  # fmt: skip
            try:
                spoken(process, "open")
                yield
                assert process.stdin
                process.stdin.close()
                spoken(process, "alive")
            finally:
                process.kill()

    with websockets(1):
        pass
    before = memory()
    with websockets(IDLE_WEBSOCKETS):
        after = memory()
        cores = (site.kit.core, site.kit.load_core)
        busy, before_idle, start = busy_seconds(cores), cpu_by_thread(pids), time.monotonic()
        time.sleep(IDLE_SECONDS)
        busy, wall = busy_seconds(cores) - busy, time.monotonic() - start
        used = sum(seconds - before_idle.get(task, 0.0) for task, seconds in cpu_by_thread(pids).items())
    return Idle((after - before) / IDLE_WEBSOCKETS, 1000 * used, max(0.0, busy - used) / wall / len(cores))


def measure_all(
    kit: Kit, names: Sequence[str], cases: Sequence[str], rounds: int, seconds: float
) -> tuple[Runs, list[str]]:
    """All rounds, and what failed in them."""
    runs: Runs = {case: {} for case in cases}
    failures = []
    for number in range(1, rounds + 1):
        for case in cases:
            for name in names:
                if case not in CONTESTANTS[name].cases:
                    continue
                progress(f"round {number} of {rounds}: {case}, {name}")
                run = None
                try:
                    run = measure(CONTESTANTS[name], case, kit, seconds)
                except (Failed, OSError) as error:
                    failures.append(f"{case}, {name}, round {number}: {error}")
                runs[case].setdefault(name, []).append(run)
    return runs, failures


# --- printing ---------------------------------------------------------------------------------------


def numbers(runs: Sequence[Run | Idle | None], what: str) -> list[float]:
    found = [getattr(run, what) for run in runs if run]
    return [number for number in found if number is not None]


def cells(values: Sequence[float], digits: int) -> list[str]:
    """The median, and the span."""
    return [
        f"{statistics.median(values):.{digits}f}",
        f"{min(values):.{digits}f}-{max(values):.{digits}f}",
    ]


def report_case(case: str, results: dict[str, list[Run | Idle | None]]) -> None:
    print(f"\n{CASES[case].title}\n")
    if case == "idle":
        columns = [("memory", "kB each", 1), ("cpu", f"CPU ms in {IDLE_SECONDS:g} s", 1)]
    else:
        columns = [("rate", CASES[case].rate, 0), ("cpu", CASES[case].cost, 1)]
    if case in BODIES:
        columns = [("rate", "MB/s", 0), ("cpu", "CPU s/GB", 2), ("growth", "memory, MB more", 1)]
    shares = [("others", "others")]
    if case != "idle":
        shares = [("server_load", "proxy"), ("generator_load", "load and upstream"), *shares]
    head = ["contestant"]
    for _, title, _ in columns:
        head += [title, "min-max"]
    head += [title for _, title in shares]
    if case != "idle":
        head.append("ours is x")
    ours = numbers(results.get("ours", []), "rate") if case != "idle" else []
    rows = []
    for name, runs in results.items():
        if not any(runs):
            rows.append([name, "failed", *["-"] * (len(head) - 2)])
            continue
        row = [name]
        for what, _, digits in columns:
            row += cells(numbers(runs, what), digits)
        row += [f"{100 * statistics.median(numbers(runs, what)):.0f} %" for what, _ in shares]
        if case != "idle":
            rate = statistics.median(numbers(runs, "rate"))
            row.append(f"{statistics.median(ours) / rate:.2f}" if ours else "-")
        rows.append(row)
    table(head, rows)
    remark(
        results,
        lambda run: isinstance(run, Run) and run.generator_load > SATURATED,
        "The load and the upstream were at their limit with {}: they may be faster than shown.",
    )
    remark(
        results,
        lambda run: run.others > DISTURBED,
        "Others used the cores in runs of {}: the rate is too low, and the CPU time may be too high.",
    )


def remark(
    results: dict[str, list[Run | Idle | None]], when: Callable[[Run | Idle], bool], text: str
) -> None:
    if names := [name for name, runs in results.items() if any(when(run) for run in runs if run)]:
        print("\n" + text.format(", ".join(names)))


def report_goals(runs: Runs) -> tuple[bool, bool]:
    """Print how ours stands; whether a goal was missed, and whether one is not decided.

    Rates in runs of which half had much company on their cores decide nothing.
    """
    print("\nGoals: what ours has, over what the peer has\n")
    missed = unknown = False
    rows = []
    for goal in GOALS:
        if goal.case not in runs:
            continue
        results = runs[goal.case]
        pairs = [
            (a, b)
            for a, b in zip(results.get("ours", []), results.get(goal.peer or "ours", []), strict=False)
            if a and b
        ]
        if not pairs:
            rows.append([goal.case, str(goal), "-", "-", "not measured"])
            unknown = True
            continue
        mine, theirs = (numbers([pair[i] for pair in pairs], goal.what) for i in (0, 1))
        reached, each = statistics.median(mine), mine
        if goal.peer:
            # memory that did not grow at all is as good as a kB
            reached /= max(statistics.median(theirs), 1.0)
            each = [a / max(b, 1.0) for a, b in zip(mine, theirs, strict=True)]
        good = reached <= goal.limit if goal.most else reached >= goal.limit
        company = max(statistics.median(numbers([pair[i] for pair in pairs], "others")) for i in (0, 1))
        verdict = "met" if good else "NOT MET"
        if goal.what == "rate" and company > DISTURBED:
            verdict = "undecided"
        missed = missed or verdict == "NOT MET"
        unknown = unknown or verdict == "undecided"
        rows.append([goal.case, str(goal), *cells_of_goal(reached, each), verdict])
    table(["case", "goal", "reached", "in each round", ""], rows)
    return missed, unknown


def cells_of_goal(reached: float, each: Sequence[float]) -> list[str]:
    return [f"{reached:.2f}", f"{min(each):.2f}-{max(each):.2f}"]


# --- the program ------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    contestants, cases = list(CONTESTANTS), list(CASES)
    parser.add_argument(
        "--only", metavar="A,B", type=choice(contestants), default=contestants, help=", ".join(contestants)
    )
    parser.add_argument(
        "--case", "--cases", metavar="A,B", dest="cases", type=choice(cases), default=cases,
        help=", ".join(cases),
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="how often all take turns (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="duration of a run (default 3)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers to a file as well")
    parser.add_argument(
        "--venv",
        type=Path,
        default=ROOT / ".venv-bench",
        help="the virtual environment (default .venv-bench)",
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds < 0.1:
        parser.error("--rounds must be at least 1, --seconds at least 0.1")
    options.venv = options.venv.absolute()
    return options


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end(number: int, frame: object) -> None:
    """Clean up and end; impatience does not stop that."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    options = arguments()
    for number in ENDING:
        signal.signal(number, end)
    try:
        require(options.only, options.cases)
        raise_file_limit(4 * IDLE_WEBSOCKETS)
        absent = prepare(options.venv, options.only)
        record: dict[str, Any] = {
            "machine": machine(),
            "versions": tool_versions(options.venv, options.only),
            "seconds": options.seconds,
            "left out": absent,
        }
        progress("")
        print(f"Machine: {record['machine']}")
        print("Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
        for name in options.only:
            print(f"{name}: {absent.get(name) or CONTESTANTS[name].title}")
        names = [name for name in options.only if name not in absent]
        with kit(options.venv) as tools:
            runs, failures = measure_all(tools, names, options.cases, options.rounds, options.seconds)
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
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        return 2 if failures else 1 if missed else 3 if unknown else 0
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"FAILED: {error}" if isinstance(error, Failed) else f"FAILED: {error!r}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
