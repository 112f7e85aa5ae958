"""What clients lose while workers are reloaded, killed, replaced and upgraded.

The engine is that of the tests: tests/support/storm_site.py. The storms and what is counted: bench/README.md.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.comparison import write_record
from harness.limits import free_ports
from harness.program import choice, exit_status, option_parser, run_benchmark
from harness.site import temporary_directory
from harness.tables import machine, progress, table

sys.path.insert(0, str(ROOT / "tests" / "support"))

import storm_site
from load_clients import KINDS


@dataclass(frozen=True)
class Planned:
    """A storm, and how often what it does is done: in full, and with ``--quick``."""

    title: str
    storm: storm_site.Storm
    times: int
    quick: int
    #: of the site
    options: dict[str, Any] = field(default_factory=dict)


SLOW = {"import_time": 4.0}
REPLACING = {"options": ["--max-requests", 100, "--max-requests-jitter", 20]}
STORMS = {
    "hup": Planned("HUP", storm_site.hup, 50, 6),
    "slow-hup": Planned("HUP, 4 s import", storm_site.hup, 20, 4, SLOW),
    "slow-hup-1": Planned("HUP, 4 s import, 1 worker", storm_site.hup, 20, 4, {**SLOW, "workers": 1}),
    "kill": Planned("kill -9", storm_site.kill_9, 50, 10),
    "ttin": Planned("TTIN, TTOU", storm_site.ttin_ttou, 15, 2),
    "max_requests": Planned("max_requests=100", storm_site.max_requests, 100, 12, REPLACING),
    "usr2-back": Planned("USR2, roll-back", storm_site.usr2_and_back, 5, 1),
    "usr2": Planned("USR2, TERM", storm_site.usr2, 5, 1),
    "usr2-winch": Planned("USR2, WINCH, QUIT", storm_site.usr2_winch, 5, 1, {"daemon": True}),
}

#: gunicorn's gevent_pywsgi workers count no requests, so max_requests replaces none of them.
IMPOSSIBLE = {("max_requests", "gevent_pywsgi+hooks")}

HEAD = [
    "storm",
    "times",
    "contestant",
    "requests",
    *KINDS,
    "closed idle",
    "allowed losses",
    "slowest, s",
    "stop, s",
]


@dataclass
class Result:
    """What one contestant did in one storm."""

    storm: str
    times: int
    contestant: str
    outcome: storm_site.Outcome | None = None
    #: why there is no outcome
    failed: str = ""
    seconds: float = 0.0

    def row(self) -> list[str]:
        start = [STORMS[self.storm].title, str(self.times), self.contestant]
        if self.outcome is None:
            return [*start, *["-"] * (len(HEAD) - len(start))]
        report = self.outcome.report
        counts = (report.requests, *map(report.count, KINDS), report.closed_idle, len(self.outcome.allowed))
        return [*start, *map(str, counts), f"{report.slowest:.2f}", f"{self.outcome.took:.1f}"]


def raise_storm(name: str, contestant: str, quick: bool) -> Result:
    """One storm on one contestant, on fresh ports in a directory of its own."""
    plan = STORMS[name]
    result = Result(name, plan.quick if quick else plan.times, contestant)
    begun, port = time.monotonic(), free_ports(2)
    with temporary_directory(Path("/tmp")) as home:
        site = storm_site.Site(Path(home), (port, port + 1), contestant, **plan.options)
        try:
            with site, storm_site.Traffic(site.places) as traffic:
                kills = plan.storm(site, traffic, result.times)
                result.outcome = storm_site.finish(site, traffic, kills)
        except AssertionError as error:
            result.failed = str(error)
    result.seconds = time.monotonic() - begun
    return result


def report_storms(results: list[Result]) -> int:
    """Print what there is to say of the results; the exit status."""
    progress()
    print(f"\n{machine()}\n")
    table(HEAD, [result.row() for result in results])
    for result in results:
        title = f"{STORMS[result.storm].title}, {result.contestant}"
        if result.outcome is None:
            print(f"\n{title}: could not be raised: {result.failed}")
        elif faults := result.outcome.faults:
            more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
            print("\n    ".join([f"\n{title}:", *faults[:5], *more]))
    failed = any(result.outcome is None for result in results)
    own = {"ours", *storm_site.HOOKED, *storm_site.ASGI}
    ours = [r.outcome for r in results if r.contestant in own]
    missed = any(outcome and outcome.faults for outcome in ours)
    if missed and not failed:
        print("\nMissed: ours lost what it must not lose.")
    elif ours and not failed:
        print("\nMet: ours refused, reset and truncated nothing that a killed worker does not explain.")
    return exit_status(failed, missed)


def raise_storms() -> int:
    known = list(storm_site.CONTESTANTS)
    usual = [name for name in known if name not in {*storm_site.HOOKED, *storm_site.ASGI}]
    parser = option_parser(__doc__)
    parser.add_argument("--only", type=choice(known), default=usual, help=", ".join(known))
    parser.add_argument("--storms", type=choice(STORMS), default=list(STORMS), help=", ".join(STORMS))
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all failures to a file as well")
    options = parser.parse_args()
    results: list[Result] = []
    try:
        for name in options.storms:
            for contestant in options.only:
                if (name, contestant) in IMPOSSIBLE:
                    continue
                progress(f"{STORMS[name].title}: {contestant}")
                results.append(raise_storm(name, contestant, options.quick))
    finally:
        write_record(options.json, results)
    return report_storms(results)


if __name__ == "__main__":
    run_benchmark(raise_storms)
