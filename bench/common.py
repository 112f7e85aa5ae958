"""What the benchmarks of servers share: their virtual environment, processes, requests, load and tables."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that any single step may take on a loaded machine, and that a server has to stop.
PATIENCE = 60.0
STOPPING = 10.0

#: The connections of the load, and the seconds for which each server warms up.
CONNECTIONS = 32
WARM_UP = 0.4

#: The share of its core above which the load generator, not the server, may be what is measured.
SATURATED = 0.95

#: The share of the two cores that others may take before a run counts as disturbed.
DISTURBED = 0.05

TICK = os.sysconf("SC_CLK_TCK")

#: What every contestant answers to the smallest request.
HELLO = b"Hello World!"

Command = list[str]


class Failed(Exception):
    """A measurement that cannot be had, and why."""


# --- what has to be installed -----------------------------------------------------------------------


def pip_install(venv: Path, *what: str) -> str:
    """Install into the virtual environment; what pip had to say if it failed, else nothing."""
    run = subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if run.returncode == 0:
        return ""
    lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()]
    return (telling or lines or ["pip failed"])[0]


def make_environment(venv: Path) -> None:
    """Make the virtual environment that the benchmarks share.

    What this project needs is installed again when setup.cfg has changed, or an old environment would
    measure it without.
    """
    if not (venv / "bin" / "python").exists():
        progress(f"making {venv}")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    stamp = venv / "installed"
    if not stamp.exists() or stamp.stat().st_mtime < (ROOT / "setup.cfg").stat().st_mtime:
        progress("installing gunicorn, gevent, Flask and this project")
        if why := pip_install(venv, "gunicorn", "gevent", "Flask", "--editable", f"{ROOT}[fast]"):
            raise Failed(f"pip install: {why}")
        stamp.touch()
    # as an installation does it: compiled at each start, it would take more memory than it has
    subprocess.run(
        [venv / "bin" / "python", "-m", "compileall", "-q", ROOT / "gunicorn_passenger"], check=True
    )


def versions(venv: Path) -> dict[str, str]:
    """What is installed in the virtual environment."""
    run = subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {package["name"].lower(): package["version"] for package in json.loads(run.stdout)}


def program_version(*command: str) -> str:
    """The last word of what a program says of its version: "nginx version: nginx/1.2" is 1.2."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return run.stdout.split()[-1].rpartition("/")[2]


# --- processes --------------------------------------------------------------------------------------


def fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def processes() -> Iterator[tuple[int, list[str]]]:
    """All processes with their fields."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), fields(int(entry.name))


def family(pid: int) -> list[int]:
    """A process and its descendants, the eldest first."""
    children: dict[int, list[int]] = {}
    for child, facts in processes():
        children.setdefault(int(facts[1]), []).append(child)
    found = [pid]
    for member in found:
        found.extend(sorted(children.get(member, [])))
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """The CPU time that processes have used, their threads included."""
    return sum(int(ticks) for pid in pids for ticks in fields(pid)[11:13]) / TICK


def exact_cpu_seconds(pid: int) -> float:
    """The CPU time of a process's living threads, finer than the system's ticks."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def busy_seconds(cores: Sequence[int]) -> float:
    """The time for which cores were not idle, a hypervisor's theft included."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name in [f"cpu{core}" for core in cores]:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, counts)
            ticks += user + nice + system + irq + softirq + steal
    return ticks / TICK


def two_cores() -> tuple[int, int]:
    """The core for the server, and that for the load."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Failed("two cores are needed: one for the server, one for the load")
    return cores[0], cores[1]


def pinned(core: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, [core])


@contextlib.contextmanager
def running(
    command: Command, core: int, log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server on one core; at the end of the block it is gone, with all that it started.

    What fails in the block is reported with the end of the server's log.
    """

    def in_child() -> None:
        os.sched_setaffinity(0, [core])
        # it ends when the benchmark ends, however that ends (prctl(2), PR_SET_PDEATHSIG)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True, preexec_fn=in_child,
        )  # fmt: skip
    try:
        yield process
    except (Failed, OSError) as error:
        raise Failed(f"{error}{last_words(log)}") from error
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server with all that it started: its session, which tells them from others."""
    process.terminate()
    try:
        process.wait(STOPPING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid, facts in processes():
        if int(facts[3]) == process.pid:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "".join(f"\n    {line[:200]}" for line in lines[-5:])


def raise_file_limit(wanted: int) -> None:
    """Let this program and those that it starts open so many files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise Failed(f"{wanted} open files are needed, the limit is {hard} (ulimit -Hn)")
    soft = hard if hard != resource.RLIM_INFINITY else wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 65536), hard))


@dataclass(frozen=True)
class Memory:
    """Memory of a process in kB: resident, its proportional share, and what is its own."""

    rss: int
    pss: int
    uss: int


def memory_of(pid: int) -> Memory:
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0])
    return Memory(found["Rss"], found["Pss"], found["Private_Clean"] + found["Private_Dirty"])


# --- requests ---------------------------------------------------------------------------------------


class Request(http.client.HTTPConnection):
    """A connection to a server's UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def wait_for(process: subprocess.Popen[bytes], connect: Callable[[], object]) -> None:
    """Wait until a server accepts connections."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if process.poll() is not None:
            raise Failed(f"the server ended with status {process.returncode}")
        try:
            connect()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise Failed("the server does not accept connections") from None
            time.sleep(0.01)


# --- the load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What h2load reports."""

    requests: int
    rate: float
    slowest: float | None
    fastest: float | None
    #: its own CPU time and its duration, in seconds
    cpu: float
    wall: float


def timed(command: Command, core: int, seconds: float) -> tuple[str, float, float]:
    """Run a load generator: what it printed, its CPU time and its duration."""
    before, start = children_cpu(), time.monotonic()
    try:
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=PATIENCE + 10 * seconds, preexec_fn=pinned(core), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} does not come to an end") from None
    return run.stdout, children_cpu() - before, time.monotonic() - start


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def h2load_command(path: Path, seconds: float, *options: str, url: str = "http://localhost/") -> Command:
    """Requests to a UNIX socket, each connection with one at a time."""
    command = ["h2load", "--h1", "-c", str(CONNECTIONS), "-D", f"{seconds * 1000:.0f}ms"]
    return [*command, *options, "-B", f"unix:{path}", url]


def h2load_report(report: str, cpu: float, wall: float) -> Load:
    """An answer that had begun when h2load stopped is among the 2xx, but not done."""
    rate = re.search(r"^finished in \S+, ([\d.]+) req/s", report, re.M)
    counts = re.search(r"^requests: (.*)$", report, re.M)
    status = re.search(r"^status codes: (\d+) 2xx, (.*)$", report, re.M)
    each = re.search(r"^req/s +: +([\d.]+) +([\d.]+)", report, re.M)
    if not (rate and counts and status and each):
        raise Failed(f"h2load: {report.strip()[-300:] or 'no report'}")
    count = {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", counts[1])}
    bad = count["failed"] + count["errored"] + count["timeout"]
    if (
        bad
        or status[2] != "0 3xx, 0 4xx, 0 5xx"
        or not 0 < count["done"] == count["succeeded"] <= int(status[1])
    ):
        raise Failed(f"not all answers were good: {counts[1]}; {status[0]}")
    return Load(count["done"], float(rate[1]), float(each[1]), float(each[2]), cpu, wall)


# --- printing, and the command line -----------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found[1] if found else model
    return f"{os.cpu_count()} CPUs, {model}, {platform.system()} {platform.release()}"


def choice(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes names, separated by commas."""

    def names(text: str) -> list[str]:
        picked = [name.strip() for name in text.split(",")]
        if unknown := [name for name in picked if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return [name for name in known if name in picked]

    return names
