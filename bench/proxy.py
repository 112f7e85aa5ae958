"""Reverse proxies beside each other: requests, WebSocket messages, bodies, and idle WebSockets.

Every contestant runs with one worker on one core; the load and the upstream share another. They take turns,
each started afresh for every run. What is measured, and how: bench/README.md.
"""

import contextlib
import json
import socket
import subprocess
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from harness import ROOT, environment
from harness.comparison import Comparison, Contestant, Goal, write_record
from harness.figures import Column, Run, middle, ratio, share, span
from harness.limits import free_ports, raise_file_limit
from harness.load import CONNECTIONS, Load, h2load, measure_load, traffic
from harness.nginx import DEFAULT, nginx_command, nginx_in_front
from harness.processes import Command, gunicorn_command, pinned, running, spoken_line, wait_for
from harness.program import comparison_parser, run_benchmark
from harness.requests import HELLO, UnixConnection, fetch, serving
from harness.site import Site, first_site, new_site
from harness.tables import progress
from harness.usage import busy_seconds, cpu_seconds, family, memory_of

HERE = ROOT / "bench" / "proxy"

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

OTHERS = share("others", "others")
SHARES = [share("proxy", "server_load"), share("load and upstream", "generator_load"), OTHERS]
OURS: Column = ("ours is x", lambda runs, every: ratio(every.get("ours"), runs))
CARRIED = [
    middle("MB/s", "rate"), span("rate"), middle("CPU s/GB", "cpu", 2), span("cpu", 2),
    middle("memory, MB more", "growth", 1), span("growth", 1), *SHARES, OURS,
]  # fmt: skip


def small(rate: str, cost: str) -> list[Column]:
    return [middle(rate, "rate"), span("rate"), middle(cost, "cpu", 1), span("cpu", 1), *SHARES, OURS]


CASES = {
    "hello": (f"hello: 12 bytes, {CONNECTIONS} connections", small("req/s", "CPU us/req")),
    "fresh": (
        f"fresh: hello, with new values in a browser's headers in every request, {CONNECTIONS} connections",
        small("req/s", "CPU us/req"),
    ),
    "second-hop": (
        "second-hop: the same behind nginx, which opens a connection for each request, in HTTP/1.0",
        small("req/s", "CPU us/req"),
    ),
    "echo": (f"echo: messages of 125 bytes over {WEBSOCKETS} WebSockets", small("messages/s", "CPU us each")),
    "down": ("down: answers of 256 MB", CARRIED),
    "up": ("up: requests with 256 MB", CARRIED),
    "idle": (
        f"idle: {IDLE_WEBSOCKETS} WebSockets that carried one message each",
        [
            middle("kB each", "memory", 1), span("memory", 1),
            middle(f"CPU ms in {IDLE_SECONDS:g} s", "cpu", 1), span("cpu", 1), OTHERS,
        ],
    ),
}  # fmt: skip
BODIES = ("down", "up")
SMALL = ("hello", "fresh", "second-hop")
HTTP = (*SMALL, *BODIES)

GOALS = [
    Goal("hello", 1.5, "http-proxy"),
    Goal("hello", 1.2, "fast-proxy"),
    Goal("hello", 0.5, "nginx"),
    Goal("hello", 10, "werkzeug"),
    Goal("fresh", 0.35, "nginx"),
    Goal("second-hop", 2, "http-proxy"),
    Goal("echo", 1, "http-proxy"),
    Goal("down", 1.2, "nginx"),
    Goal("down", 0.9, "nginx-256k"),
    Goal("down", 4, figure="growth", name="MB more memory", most=True),
    Goal("up", 1, "http-proxy"),
    Goal("up", 4, figure="growth", name="MB more memory", most=True),
    Goal("idle", 1, "http-proxy", figure="memory", name="the memory of", most=True),
    # a server's own heartbeats are allowed: a tick of the system's clock
    Goal("idle", 10, figure="cpu", name="ms of CPU time", most=True),
]

# --- the contestants --------------------------------------------------------------------------------


def gunicorn_proxy(worker: str, app: str, site: Site, target: str) -> Command:
    options = ["--keep-alive", 1000, "--worker-connections", 2 * IDLE_WEBSOCKETS]
    return gunicorn_command(worker, app, site.socket, *options, python=site.bin / "python")


def node(*words: str) -> Callable[[Site, str], Command]:
    return lambda site, target: ["node", *words, target, site.socket]


#: nginx as a proxy that keeps its connections and carries WebSockets, as its documentation shows.
NGINX_PROXY = """
    client_max_body_size 0;
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    upstream target {{ server {address}; keepalive 100; keepalive_requests 1000000000; }}
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
        location = / {{ default_type text/plain; return 200 "Hello World!"; }}
        location / {{ root {files}; }}
    }}
"""


def nginx_proxy(more: str, site: Site, target: str) -> Command:
    address = target.removeprefix("http://")
    return nginx_command(site.home, NGINX_PROXY.format(address=address, socket=site.socket, more=more))


CONTESTANTS = {
    "ours": Contestant(
        "gunicorn_passenger.http_proxy on gunicorn -k gunicorn_passenger.Worker",
        partial(gunicorn_proxy, "gunicorn_passenger.Worker", "ours"),
    ),
    "http-proxy": Contestant("node-http-proxy with a keep-alive agent", node("http-proxy.js", "http-proxy")),
    "http-proxy-3": Contestant("http-proxy-3 with a keep-alive agent", node("http-proxy.js", "http-proxy-3")),
    "fast-proxy": Contestant("fast-proxy on undici (no WebSockets)", node("fast-proxy.js"), HTTP),
    "nginx": Contestant("nginx, default buffers", partial(nginx_proxy, "")),
    "nginx-256k": Contestant("nginx, buffers of 256 kB", partial(nginx_proxy, NGINX_256K)),
    "werkzeug": Contestant(
        "Werkzeug's ProxyMiddleware on gunicorn -k gevent (no WebSockets)",
        partial(gunicorn_proxy, "gevent", "middleware"),
        HTTP,
    ),
}
FOR_NODE = ("http-proxy", "http-proxy-3", "fast-proxy")
FOR_NGINX = ("nginx", "nginx-256k")

PROXIES = Comparison(
    contestants=CONTESTANTS,
    tables=CASES,
    goals=GOALS,
    goals_title="what ours has, over what the peer has",
    at_limit="The load and the upstream were at their limit with {}: they may be faster than shown.",
)


def install_proxies(options: Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Install the contestants for Python and Node; the versions, and what could not be installed, and why."""
    venv, names, cases = options.venv, options.only, options.cases
    of_node = [name for name in FOR_NODE if name in names]
    wanted = {"cc": "gcc libc6-dev"}
    if "hello" in cases:
        wanted["h2load"] = "nghttp2-client"
    if {*SMALL, "down"} & set(cases) or set(FOR_NGINX) & set(names):
        wanted["nginx"] = "nginx-light"
    if of_node:
        wanted |= {"node": "nodejs", "npm": "npm"}
    environment.require_programs(wanted)
    environment.make_environment(venv)
    packages = ["gunicorn", "gunicorn_h1c", "gevent", "werkzeug", "gunicorn-passenger"]
    versions = environment.versions_of(venv, packages, {"h2load": "--version", "nginx": "-v"})
    if not of_node:
        return versions, {}
    why = npm_error()
    versions["node"] = environment.program_version("node", "-v")
    for name in (*FOR_NODE, "undici"):
        with contextlib.suppress(OSError):
            package = HERE / "node_modules" / name / "package.json"
            versions[name] = json.loads(package.read_text())["version"]
    return versions, {name: f"cannot be installed: {why}" for name in of_node if why}


def npm_error() -> str:
    """Install what bench/proxy/package-lock.json says; what npm had to say if it failed, else nothing."""
    lock, stamp = HERE / "package-lock.json", HERE / "node_modules" / ".package-lock.json"
    if stamp.exists() and stamp.stat().st_mtime >= lock.stat().st_mtime:
        return ""
    progress("installing the proxies for Node")
    command = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel", "error"]
    why = environment.installation_error(command, HERE)
    if not why:
        stamp.touch()
    return why


# --- runs -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def upstream(first: Site, case: str) -> Iterator[tuple[int, list[int]]]:
    """What the proxies carry to: nginx for what it sends, else traffic.c. Its port and its processes."""
    with new_site(first) as site:
        if case in (*SMALL, "down"):
            port = free_ports(1)
            command = nginx_command(site.home, NGINX_UPSTREAM.format(port=port, files=first.home))
        else:
            port, command = 0, [first.traffic, "upstream"]
        stdout = None if port else subprocess.PIPE
        with running(command, site.home, HERE, first.load_core, stdout) as process:
            port = port or int(spoken_line(process.stdout, "traffic"))
            address = ("127.0.0.1", port)
            wait_for(process, lambda: socket.create_connection(address).close(), "it accepted connections")
            yield port, family(process.pid)


def drive_proxy(case: str, site: Site, seconds: float) -> Load:
    """Load a proxy, in requests, messages or MB; that every response was good is checked."""
    if case == "hello":
        return h2load(site, seconds, path="/bench/hello")
    if case in SMALL:
        return traffic(site, "fresh", CONNECTIONS, seconds, HELLO.decode())
    if case == "echo":
        return traffic(site, case, WEBSOCKETS, seconds)
    return traffic(site, case, BODY, seconds, unit=BODY / MB)


def check_body(case: str, site: Site) -> None:
    """See that a proxy carries a body unchanged."""
    with contextlib.closing(UnixConnection(site.socket)) as connection:
        if case == "down":
            fetch(connection, "/bench/pattern", PATTERN)
        else:
            fetch(connection, "/bench/sum", b"%d" % zlib.adler32(PATTERN), PATTERN)


def measure_proxy(first: Site, name: str, case: str, seconds: float) -> Run:
    """One run: start, check, warm up, measure, stop."""
    with upstream(first, case) as (port, behind), new_site(first) as site:
        target = f"http://127.0.0.1:{port}"
        variables = {"BENCH_TARGET": target, "NODE_ENV": "production"}
        command = CONTESTANTS[name].command(site, target)
        with serving(command, site, HERE, "/bench/hello", HELLO, **variables) as pids:
            if case == "idle":
                return measure_idle(site, pids)
            for pid in pids:
                # the peak of the resident memory is counted from now on; see proc(5)
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            before = sum(memory_of(pid, "status")["VmRSS"] for pid in pids)
            if case in BODIES:
                check_body(case, site)
            scale = GB / MB if case in BODIES else 1e6
            with nginx_in_front(first, site, DEFAULT if case == "second-hop" else "") as (near, nginx):
                drive_proxy(case, near, WARM_UP)
                others = [*behind, *nginx]
                _, run = measure_load(site, pids, lambda: drive_proxy(case, near, seconds), others, scale)
            peak = sum(memory_of(pid, "status")["VmHWM"] for pid in pids)
    return run | {"growth": max(0, peak - before) / 1024 if case in BODIES else None}


def measure_idle(site: Site, pids: list[int]) -> Run:
    """What idle WebSockets cost: resident kB each, and all of the proxy's CPU time, in milliseconds.

    Memory is compared with that after a first WebSocket, which may have loaded code.
    """

    def resident_memory() -> int:
        time.sleep(REST)
        return sum(memory_of(pid)["Rss"] for pid in pids)

    @contextlib.contextmanager
    def websockets(count: int) -> Iterator[None]:
        """They are open, and carry messages, before and after."""
        with subprocess.Popen(
            [site.traffic, "idle", site.socket, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=pinned(site.load_core),
        ) as process:  # fmt: skip
            try:
                spoken_line(process.stdout, "traffic", "open")
                yield
                process.stdin.close()
                spoken_line(process.stdout, "traffic", "alive")
            finally:
                process.kill()

    with websockets(1):
        pass
    before = resident_memory()
    cores = (site.core, site.load_core)
    with websockets(IDLE_WEBSOCKETS):
        each = (resident_memory() - before) / IDLE_WEBSOCKETS
        busy, used, start = busy_seconds(cores), cpu_seconds(pids), time.monotonic()
        time.sleep(IDLE_SECONDS)
        busy, wall = busy_seconds(cores) - busy, time.monotonic() - start
        used = cpu_seconds(pids) - used
    return {"memory": each, "cpu": 1000 * used, "others": max(0.0, busy - used) / wall / len(cores)}


def compare_proxies() -> int:
    options = comparison_parser(__doc__, CONTESTANTS, CASES, seconds=3).parse_args()
    options.only = options.only or list(CONTESTANTS)
    raise_file_limit(4 * IDLE_WEBSOCKETS)
    record = PROXIES.introduce(options, *install_proxies(options))
    with first_site(options.venv) as first:
        files = first.home / "bench"
        files.mkdir()
        (files / "pattern").write_bytes(PATTERN)
        with (files / "body").open("wb") as file:
            file.truncate(BODY)
        status = PROXIES.compare(options, record, partial(measure_proxy, first))
    write_record(options.json, record)
    return status


if __name__ == "__main__":
    run_benchmark(compare_proxies)
