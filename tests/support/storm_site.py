"""Storms: steady traffic on a gunicorn while its workers are reloaded, killed and replaced.

Runs in: the tests and ``bench/storm.py``. The traffic comes from a process of its own (:mod:`load_clients`).

Facts and rules:

- All processes share the system's monotonic clock, so what the clients saw can be told from what was done when.
- A request may be lost with a worker that is killed when the worker had its connection, and only then. So the worker is
  stopped first (``SIGSTOP``), its connections are read from ``/proc``, and then it is killed: each lost request has to be on
  one of them. On a UNIX socket ``/proc`` does not name the client, so there their number is the bound.
- Every process of a site carries a token in its environment, by which it is found wherever it went (``--daemon``, ``USR2``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conditions
from load_clients import KINDS, Address, ClosedIdle, Connection, Failure, Lost, request

PROGRAMS = Path(__file__).resolve().parent.parent / "programs"

#: Workers of every site.
WORKERS = 4

#: Seconds that any step of a storm may take.
PATIENCE = 120.0

#: gunicorn's graceful timeout, in seconds: what a stop may take.
GRACEFUL = 30


# --- what a storm is raised on ----------------------------------------------------------------------


wait_for = functools.partial(conditions.wait_for, timeout=PATIENCE)


def _die_with_parent() -> None:
    """In the child: end when the caller ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


#: gunicorn's worker classes whose workers have their ports by the hooks. gunicorn serves the primary.
HOOKED = {f"{kind}+hooks": kind for kind in ("sync", "gthread", "gevent", "gevent_pywsgi", "tornado", "asgi")}
HOOKED["uvicorn+hooks"] = "uvicorn_worker.UvicornWorker"

#: Those whose second port has an ASGI application, and not an unmodified server.
ASGI = {"ours+asgi": "gunicorn_passenger.Worker", "sync+hooks+asgi": "sync"}

#: What the bench sets beside each other, and its worker class.
CONTESTANTS: dict[str, str] = {
    **HOOKED,
    **ASGI,
    "ours": "gunicorn_passenger.Worker",
    "gevent": "gevent",
    "gthread": "gthread",
    "reuseport": "gevent",
}


class Site:
    """A gunicorn with the program ``storm_app``, its places, and its end."""

    def __init__(
        self,
        home: Path,
        ports: Sequence[int],
        contestant: str = "ours",
        options: Sequence[object] = (),
        workers: int = WORKERS,
        daemon: bool = False,
        import_time: float = 0.0,
    ) -> None:
        """
        :param home: a directory of its own.
        :param ports: two free ones; only ``ours`` and the hooked classes have use for the second.
        :param contestant: a key of ``CONTESTANTS``.
        :param options: more of gunicorn's.
        :param daemon: whether gunicorn becomes a daemon, as it has to for ``WINCH``.
        :param import_time: seconds that the import of the program takes.
        """
        from gunicorn.config import KNOWN_SETTINGS

        self.home, self.contestant, self.number = home, contestant, workers
        self.socket = str(home / "app.sock")
        self.places: dict[str, Address] = {"primary": self.socket}
        self.token = uuid.uuid4().hex
        self.logfile = home / "log"
        variables = {"STORM_TOKEN": self.token, "STORM_IMPORT": str(import_time)}
        options = [*options, "-b", f"unix:{self.socket}"]
        hooked = "+hooks" in contestant
        if hooked:
            self.places.clear()
            options += ["-c", "python:gunicorn_passenger.hooks"]
            if not CONTESTANTS[contestant].startswith("gevent"):
                variables["STORM_THREADS"] = "1"
        if contestant.startswith("ours") or hooked:
            second = "asgi" if contestant in ASGI else "unmodified"
            self.places |= {"ours": ports[0], second: ports[1]}
            variables |= {"STORM_OURS": str(ports[0]), f"STORM_{second.upper()}": str(ports[1])}
        elif contestant in ("gevent", "gthread"):
            self.places["second bind"] = ports[0]
            options += ["-b", f"127.0.0.1:{ports[0]}"]
        else:
            self.places["SO_REUSEPORT"] = ports[0]
            variables["STORM_REUSE_PORT"] = str(ports[0])
            options += ["-c", PROGRAMS / "storm_reuse_port.py"]
        if any(setting.name == "control_socket_disable" for setting in KNOWN_SETTINGS):
            options.append("--no-control-socket")
        # USR2 starts argv[0] again, so it has to be the script
        self._command = [str(part) for part in (
            sys.executable, Path(sys.executable).parent / "gunicorn", "-k", CONTESTANTS[contestant], "-w", workers,
            "--umask", "007", "--keep-alive", 5, "--graceful-timeout", GRACEFUL, "--timeout", 60,
            "--error-logfile", self.logfile, "--pid", home / "pid", *["--daemon"] * daemon, *options,
            "storm_app:asgi" if contestant in ("asgi+hooks", "uvicorn+hooks") else "storm_app:application",
        )]  # fmt: skip
        foreign = ("PASSENGER_", "GUNICORN_", "STORM_", "PYTHON")
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            **variables,
            "HOME": str(home),
            "PASSENGER_RUNTIME_DIR": str(home / "run"),
            "PYTHONPATH": str(PROGRAMS),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._daemon = daemon
        self._popen: subprocess.Popen[bytes] | None = None
        #: the master that workers are counted of
        self.master = 0

    def __enter__(self) -> Site:
        with (self.home / "output").open("wb") as output:
            self._popen = subprocess.Popen(
                self._command, cwd=self.home, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
                preexec_fn=None if self._daemon else _die_with_parent,
            )  # fmt: skip
        try:
            self.master = wait_for(self.pidfile, self.log)
            wait_for(lambda: len(self.workers()) == self.number, self.log)
            wait_for(lambda: all(answers(address) for address in self.places.values()), self.log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is left of it."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            time.sleep(0.02)
        self.reap()

    def reap(self) -> None:
        if self._popen is not None:
            self._popen.poll()

    def log(self) -> str:
        texts = [p.read_text(errors="replace") for p in (self.home / "output", self.logfile) if p.exists()]
        return "".join(texts)

    def pidfile(self) -> int:
        """The master's pid as its file says it; 0 while there is none."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.home / "pid").read_text())
        return 0

    def processes(self) -> list[int]:
        """All living processes of the site, by the token in their environment."""
        found = []
        token = f"STORM_TOKEN={self.token}".encode()
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with contextlib.suppress(OSError):
                    if token in Path(f"/proc/{name}/environ").read_bytes() and _alive(int(name)):
                        found.append(int(name))
        return found

    def masters(self) -> list[int]:
        """The pids of the masters that have started, the first one first."""
        return [int(pid) for pid in re.findall(r"\[(\d+)\] \[INFO\] Starting gunicorn", self.log())]

    def workers(self, master: int = 0) -> list[int]:
        """The living workers of a master: its children, without the next master (``USR2``)."""
        masters = self.masters()
        return [pid for pid in _children(master or self.master) if pid not in masters and _alive(pid)]

    def signal(self, number: int, master: int = 0) -> None:
        os.kill(master or self.master, number)

    def settled(self) -> None:
        """Wait until the master has as many workers as it is to have."""
        wait_for(lambda: len(self.workers()) == self.number, self.settling)

    def settling(self) -> str:
        return f"{self.number} workers, there are {self.workers()}; log:\n{self.log()[-4000:]}"

    def stop(self) -> tuple[float, list[int]]:
        """``TERM``; the seconds that the stop took, and the processes that were left over."""
        begun = time.monotonic()
        self.signal(signal.SIGTERM)

        def gone() -> bool:
            self.reap()
            return not _alive(self.master)

        wait_for(gone, lambda: f"the master to end:\n{self.log()[-4000:]}", timeout=GRACEFUL + 30)
        return time.monotonic() - begun, self.processes()


def answers(address: Address) -> bool:
    """Whether a small request is answered there now."""
    try:
        connection = Connection(address)
    except Lost:
        return False
    try:
        connection.send(request("/?ready", "Connection: close"))
        return connection.body(connection.head()) == b"ready"
    except (Lost, ClosedIdle):
        return False
    finally:
        connection.close()


# --- the traffic, from outside ----------------------------------------------------------------------


@dataclass
class Report:
    """What the clients saw."""

    requests: int
    closed_idle: int
    failures: list[Failure]
    answered: dict[str, int]
    #: seconds of the slowest small answer, wherever it was
    slowest: float

    def count(self, kind: str) -> int:
        return sum(failure.kind == kind for failure in self.failures)

    def __str__(self) -> str:
        counts = ", ".join(f"{kind} {self.count(kind)}" for kind in KINDS)
        listed = "".join(f"\n    {failure}" for failure in self.failures[:40])
        return f"{self.requests} requests, {counts}, closed idle {self.closed_idle}{listed}"


class Traffic:
    """The client process."""

    def __init__(self, places: dict[str, Address]) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("load_clients.py"), json.dumps(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_die_with_parent,
        )
        self._drained = False

    def __enter__(self) -> Traffic:
        self.flow()
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _say(self, command: str) -> dict[str, Any]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(command + "\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            raise AssertionError("the client process has failed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def workers(self) -> dict[str, list[int]]:
        """By place: the workers that have answered so far."""
        found: dict[str, list[int]] = self._say("count")["workers"]
        return found

    def failed(self) -> dict[str, int]:
        """By place and kind (``ours/refused``): the requests that have failed so far."""
        found: dict[str, int] = self._say("count")["failed"]
        return found

    def flow(self) -> None:
        """Wait until some more of every kind of request has been answered at every place."""
        before = self._say("count")["answered"]

        def more() -> bool:
            now = self._say("count")["answered"]
            kinds = {key.partition("/")[2] for key in now}
            places = {key.partition("/")[0] for key in now}
            # three kinds of small requests, two of downloads, two of uploads
            return len(now) == len(kinds) * len(places) and len(kinds) == 7 and all(
                count > before.get(key, 0) for key, count in now.items()
            )  # fmt: skip

        wait_for(more, lambda: f"the traffic: {before}, {self._say('count')['answered']}")

    def some(self, count: int = 50) -> None:
        """Wait until so many more requests have been answered."""
        goal = sum(self._say("count")["answered"].values()) + count
        wait_for(lambda: sum(self._say("count")["answered"].values()) >= goal, "the traffic")

    def drain(self) -> None:
        """No client connects any more; a worker has accepted each one that is connected."""
        self._say("drain")

    def finish(self) -> Report:
        """What the clients saw, when each has had a response."""
        result = self._say("finish")
        self._popen.wait()
        failures = [Failure(**failure) for failure in result["failures"]]
        return Report(
            result["requests"], result["closed_idle"], failures, result["answered"], result["slowest"]
        )


# --- what a killed worker had -----------------------------------------------------------------------


@dataclass
class Kill:
    """A worker that was killed, and the connections that it had then."""

    worker: int
    at: float
    #: by place: the clients' ports, or on a UNIX socket the number of connections
    ports: dict[str, set[int]] = field(default_factory=dict)
    unix: dict[str, int] = field(default_factory=dict)

    def covers(self, failure: Failure) -> bool:
        """Whether the request was on one of them. Each connection of a UNIX socket counts once."""
        if failure.kind not in ("reset", "truncated") or failure.worker not in (0, self.worker):
            return False
        if not failure.opened <= self.at <= failure.ended:
            return False
        if failure.place in self.ports:
            return failure.port in self.ports[failure.place]
        if self.unix.get(failure.place, 0) > 0:
            self.unix[failure.place] -= 1
            return True
        return False


def kill(worker: int, places: dict[str, Address]) -> Kill | None:
    """Kill a worker with ``SIGKILL``; ``None`` if it was gone already."""
    try:
        conditions.stop(worker)
        done = Kill(worker, time.monotonic(), *_connections(worker, places))
        os.kill(worker, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return None
    return done


def _connections(pid: int, places: dict[str, Address]) -> tuple[dict[str, set[int]], dict[str, int]]:
    """The connections that a process has accepted, by place (proc_pid_net(5))."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
            if found:
                inodes.add(found[1])
    ports: dict[str, set[int]] = {place: set() for place, at in places.items() if not isinstance(at, str)}
    unix = {place: 0 for place, at in places.items() if isinstance(at, str)}
    by_port = {at: place for place, at in places.items()}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *rest = line.split()
        if rest[5] in inodes and state != "0A":
            place = by_port.get(int(local.rpartition(":")[2], 16))
            if place is not None:
                ports[place].add(int(remote.rpartition(":")[2], 16))
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[5] == "03" and fields[7] in by_port:
            unix[by_port[fields[7]]] += 1
    return ports, unix


# --- storms -----------------------------------------------------------------------------------------

Storm = Callable[[Site, Traffic, int], list[Kill]]


def hup(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """Reloads: every other one comes while the workers of the one before still finish."""
    for number in range(times):
        before = set(site.workers())
        site.signal(signal.SIGHUP)
        wait_for(lambda b=before: len(set(site.workers()) - b) >= site.number, site.settling)
        if number % 2:
            wait_for(lambda b=before: not b & set(site.workers()), site.settling)
        traffic.some()
    return []


def kill_9(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """A random worker is killed, again and again; every third one is followed by the next at once."""
    dice = random.Random(3)
    done: list[Kill] = []
    while len(done) < times:
        victim = dice.choice(wait_for(site.workers, "a worker"))
        killed = kill(victim, site.places)
        if killed is not None:
            done.append(killed)
        wait_for(lambda v=victim: not _alive(v), f"the end of worker {victim}")
        if len(done) % 3:
            site.settled()
            wait_for(lambda: _all_serve(site, traffic), site.settling)
        traffic.some()
    return done


def _all_serve(site: Site, traffic: Traffic) -> bool:
    """Whether every worker has answered somewhere."""
    return set(site.workers()) <= {pid for pids in traffic.workers().values() for pid in pids}


def ttin_ttou(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """Two workers more, and two less."""
    for _ in range(times):
        for number, change in ((signal.SIGTTIN, 1), (signal.SIGTTOU, -1)):
            for _ in range(2):
                site.number += change
                site.signal(number)
                # gunicorn's queue of signals is short: the next comes when this one is done
                site.settled()
            traffic.some()
    return []


def max_requests(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """Workers leave by themselves after so many requests, which the site's options say."""
    seen: set[int] = set()

    def replaced() -> bool:
        # a worker of another class counts what the primary gets, and no other client asks there
        for _ in range(1 if "primary" in site.places else 20):
            answers(site.socket)
        seen.update(site.workers())
        return len(seen) >= site.number + times

    wait_for(
        replaced, lambda: f"{times} workers to be replaced, seen {len(seen)}", timeout=PATIENCE + 3.0 * times
    )
    return []


def usr2_and_back(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """A new master is started beside the old one, and stopped again."""
    for _ in range(times):
        new = _upgrade(site, traffic)
        site.signal(signal.SIGTERM, new)
        wait_for(lambda n=new: not _alive(n), site.settling)
        traffic.some()
    return []


def usr2(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """A new master takes over; the old one is stopped."""
    for _ in range(times):
        new, old = _upgrade(site, traffic), site.master
        site.signal(signal.SIGTERM)
        _succeed(site, traffic, new, old)
    return []


def usr2_winch(site: Site, traffic: Traffic, times: int) -> list[Kill]:
    """A new master takes over; the old one sends its workers away first (which only a daemon does), then quits."""
    for _ in range(times):
        new, old = _upgrade(site, traffic), site.master
        site.signal(signal.SIGWINCH)
        wait_for(lambda o=old: not site.workers(o), site.settling)
        traffic.flow()
        site.signal(signal.SIGQUIT)
        _succeed(site, traffic, new, old)
    return []


def _upgrade(site: Site, traffic: Traffic) -> int:
    """Start a new master; its pid, once its workers have answered at every place."""
    masters = len(site.masters())
    site.signal(signal.SIGUSR2)
    wait_for(lambda: len(site.masters()) > masters, site.settling)
    new = site.masters()[-1]
    wait_for(lambda: len(site.workers(new)) == site.number, site.settling)

    def met() -> bool:
        ours = set(site.workers(new))
        return all(ours & set(seen) for seen in traffic.workers().values())

    wait_for(met, lambda: f"the new workers to answer: {traffic.workers()}, {site.workers(new)}")
    return new


def _succeed(site: Site, traffic: Traffic, new: int, old: int) -> None:
    def gone() -> bool:
        site.reap()
        return not _alive(old)

    wait_for(gone, site.settling)
    site.master = new
    # the new master notices within a second that it is alone; until then it starts no other
    wait_for(lambda: site.pidfile() == new, site.settling)
    traffic.some()


@dataclass
class Outcome:
    """What a storm and the stop after it have cost."""

    #: what the clients saw, without what a killed worker explains: that is ``allowed``
    report: Report
    allowed: list[Failure]
    #: the seconds that the stop took, and the processes that it left over
    took: float
    left: list[int]

    @property
    def faults(self) -> list[str]:
        """What must not be; empty when all is well."""
        said = [str(failure) for failure in self.report.failures]
        if self.took > GRACEFUL:
            said.append(f"the stop took {self.took:.1f} s, longer than the graceful timeout")
        if self.left:
            said.append(f"processes were left over: {self.left}")
        return said


def finish(site: Site, traffic: Traffic, kills: list[Kill]) -> Outcome:
    """After a storm: workers and traffic are well; then a stop, which finishes each request that a worker has accepted."""
    # with max_requests, successors start and old workers drain all the time
    wait_for(lambda: len(site.workers()) >= site.number, site.settling)
    traffic.flow()
    traffic.drain()
    took, left = site.stop()
    report = traffic.finish()
    allowed = [loss for loss in report.failures if any(done.covers(loss) for done in kills)]
    report.failures = [loss for loss in report.failures if loss not in allowed]
    return Outcome(report, allowed, took, left)


@contextlib.contextmanager
def raised(
    storm: Storm, times: int, home: Path, ports: Sequence[int], contestant: str = "ours", **options: Any
) -> Iterator[tuple[Site, Traffic, list[Kill]]]:
    """A site in traffic on which a storm has been raised."""
    with Site(home, ports, contestant, **options) as site, Traffic(site.places) as traffic:
        traffic.flow()
        yield site, traffic, storm(site, traffic, times)
