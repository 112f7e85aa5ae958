"""What clients lose while workers are reloaded, killed, replaced and upgraded.

Four workers serve a program on a UNIX socket and on ports. A client process makes steady traffic on all of
them at once: new connections with one request each, keep-alive connections, slow downloads and slow
uploads, sized and chunked. Then a storm is raised, and after it gunicorn is stopped by ``TERM`` while
keep-alive clients, downloads and uploads are under way. Every request that was not answered in full
is counted.

The contestants:

- ``ours``: ``gunicorn -k gunicorn_passenger.Worker`` with the primary on the UNIX socket, a server of ours on
  one port and an unmodified ``gevent.pywsgi.WSGIServer`` on another, both opened by the program;
- ``gevent``: plain ``gunicorn -k gevent`` with two binds, the UNIX socket and a port: the bar;
- ``reuseport``: plain ``gunicorn -k gevent``, where every worker opens the port by itself with
  ``SO_REUSEPORT``.

The engine is that of the tests (tests/storming.py). The exit status is 0 when ours lost nothing and stopped
within the graceful timeout, 1 when it did not, 2 when a storm could not be raised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, choice, machine, progress, table

sys.path.insert(0, str(ROOT / "tests"))

import storming
from storm_clients import KINDS
from storming import CONTESTANTS, Kill, Outcome, Site, Storm, Traffic


@dataclass(frozen=True)
class Planned:
    """A storm, and how often what it does is done: in full, and with ``--quick``."""

    storm: Storm
    times: int
    quick: int
    #: for Site
    options: dict[str, Any]


STORMS = {
    "hup": Planned(storming.hup, 50, 6, {}),
    "kill": Planned(storming.kill_9, 50, 10, {}),
    "ttin": Planned(storming.ttin_ttou, 15, 2, {}),
    "max_requests": Planned(
        storming.max_requests,
        100,
        12,
        {"options": ["--max-requests", 100, "--max-requests-jitter", 20]},
    ),
    "usr2-back": Planned(storming.usr2_and_back, 5, 1, {}),
    "usr2": Planned(storming.usr2, 5, 1, {}),
    "usr2-winch": Planned(storming.usr2_winch, 5, 1, {"daemon": True}),
}

NAMES = {
    "hup": "HUP",
    "kill": "kill -9",
    "ttin": "TTIN, TTOU",
    "max_requests": "max_requests=100",
    "usr2-back": "USR2, roll-back",
    "usr2": "USR2, TERM",
    "usr2-winch": "USR2, WINCH, QUIT",
}

HEAD = [
    "storm", "times", "contestant", "requests", *KINDS, "closed idle", "allowed losses", "stop, s",
]  # fmt: skip


@dataclass
class Result:
    """What one contestant did in one storm."""

    storm: str
    times: int
    contestant: str
    outcome: Outcome | None
    #: why there is no outcome
    failed: str = ""
    seconds: float = 0.0

    def row(self) -> list[str]:
        start = [NAMES[self.storm], str(self.times), self.contestant]
        if self.outcome is None:
            return [*start, *["-"] * (len(HEAD) - len(start))]
        report = self.outcome.report
        return [
            *start, str(report.requests), *(str(report.count(kind)) for kind in KINDS),
            str(report.closed_idle), str(len(self.outcome.allowed)), f"{self.outcome.took:.1f}",
        ]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """For ``--json``."""
        facts: dict[str, Any] = {
            "storm": self.storm, "times": self.times, "contestant": self.contestant,
            "seconds": round(self.seconds, 1), "failed": self.failed,
        }  # fmt: skip
        if self.outcome is not None:
            report = self.outcome.report
            facts |= {
                "requests": report.requests,
                "closed_idle": report.closed_idle,
                "answered": report.answered,
                "failures": [vars(failure) for failure in report.failures],
                "allowed": [vars(failure) for failure in self.outcome.allowed],
                "stop": self.outcome.took,
                "left": self.outcome.left,
            }
        return facts


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds, below the range that the kernel gives to clients."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10240, 32000)
        with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
            probe.bind(("::", port))
            found.append(port)
    return found


def raise_storm(name: str, contestant: str, quick: bool) -> Result:
    """One storm on one contestant, on fresh ports in a directory of its own."""
    plan = STORMS[name]
    times = plan.quick if quick else plan.times
    home = Path(tempfile.mkdtemp(prefix="storm-", dir="/tmp"))
    result = Result(name, times, contestant, None)
    begun = time.monotonic()
    try:
        with (
            Site(home, free_ports(2), contestant, **plan.options) as site,
            Traffic(site.places) as traffic,
        ):
            kills: list[Kill] = plan.storm(site, traffic, times)
            result.outcome = storming.finish(site, traffic, kills)
    except AssertionError as error:
        result.failed = str(error)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    result.seconds = time.monotonic() - begun
    return result


def report(results: list[Result]) -> int:
    """Print what there is to say of the results; the exit status."""
    print(f"\n{machine()}\n")
    table(HEAD, [result.row() for result in results])
    missed = False
    for result in results:
        title = f"{NAMES[result.storm]}, {result.contestant}"
        if result.outcome is None:
            print(f"\n{title}: could not be raised: {result.failed}")
            continue
        if faults := result.outcome.faults:
            missed = missed or result.contestant == "ours"
            print(f"\n{title}:")
            for fault in faults[:5]:
                print(f"    {fault}")
            if len(faults) > 5:
                print(f"    and {len(faults) - 5} more")
    ours = [result for result in results if result.contestant == "ours"]
    if any(result.outcome is None for result in results):
        return 2
    if missed:
        print("\nMissed: ours lost what it must not lose.")
        return 1
    if ours:
        print("\nMet: ours refused, reset and truncated nothing that a killed worker does not explain.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(CONTESTANTS)
    parser.add_argument("--only", type=choice(list(CONTESTANTS)), default=list(CONTESTANTS), help=known)
    parser.add_argument("--storms", type=choice(list(STORMS)), default=list(STORMS), help=", ".join(STORMS))
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all failures to a file as well")
    options = parser.parse_args()
    # what is started is ended in ``finally``, also when this program is told to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    results: list[Result] = []
    try:
        for name in options.storms:
            for contestant in options.only:
                progress(f"{NAMES[name]}: {contestant}")
                results.append(raise_storm(name, contestant, options.quick))
        progress("")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 2
    finally:
        if options.json is not None:
            options.json.write_text(json.dumps([result.facts() for result in results], indent=1))
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
