"""Contestants that take turns in every case, and the goals of ours."""

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import Failed
from .figures import Column, Run, numbers
from .processes import Command
from .program import exit_status
from .tables import machine, print_machine, progress, table

#: The share of its core above which the load generator, not the server, may be what is measured.
SATURATED = 0.95

#: The share of the two cores that others may take before a run counts as disturbed.
DISTURBED = 0.05

COMPANY = "Others used the cores in runs of {}: the rate is too low, and the CPU time may be too high."

#: contestant -> its runs in one case, one for each round, or None where one failed
Results = dict[str, list[Run | None]]


@dataclass(frozen=True)
class Contestant:
    title: str
    #: of the server; what it is told depends on the benchmark
    command: Callable[..., Command]
    #: the cases that it can serve; without a list, all
    cases: Collection[str] | None = None
    #: what pip installs for it alone
    package: str = ""


@dataclass(frozen=True)
class Goal:
    """What ours should reach: so many times what a peer has, or without a peer so much."""

    case: str
    limit: float
    peer: str | None = None
    figure: str = "rate"
    #: what a figure that is not a rate is called
    name: str = ""
    #: whether less is better
    most: bool = False

    def __str__(self) -> str:
        text = f"{self.limit:g}" + (" x" if self.peer else "")
        return " ".join(filter(None, ["at most" if self.most else "", text, self.name, self.peer]))

    def judge(self, results: Results) -> tuple[str, list[str]]:
        """The verdict, and what was reached: by the medians, in each round, and by CPU time.

        Only rounds in which both contestants were measured count. Rates in runs of which half had much
        company on their cores decide nothing.
        """
        both = zip(results.get("ours", []), results.get(self.peer or "ours", []), strict=False)
        pairs = [(ours, theirs) for ours, theirs in both if ours and theirs]
        if not pairs:
            return "not measured", ["-", "-", "-"]

        def of_both(figure: str) -> list[list[float]]:
            return [numbers(runs, figure) for runs in zip(*pairs, strict=True)]

        each, theirs = of_both(self.figure)
        reached = median(each)
        if self.peer:
            # memory that did not grow at all is as good as a kB
            reached /= max(median(theirs), 1.0)
            each = [a / max(b, 1.0) for a, b in zip(each, theirs, strict=True)]
        cost, cost_of_peer = map(median, of_both("cpu"))
        by_cpu = f"{cost_of_peer / cost:.2f}" if cost else "-"
        verdict = "met" if (reached <= self.limit if self.most else reached >= self.limit) else "NOT MET"
        if self.figure == "rate" and max(map(median, of_both("others"))) > DISTURBED:
            verdict = "undecided"
        return verdict, [f"{reached:.2f}", f"{min(each):.2f}-{max(each):.2f}", by_cpu]


@dataclass(frozen=True)
class Comparison:
    """What one benchmark compares."""

    contestants: Mapping[str, Contestant]
    #: case -> the title of its table, and its columns
    tables: Mapping[str, tuple[str, Sequence[Column]]]
    goals: Sequence[Goal]
    goals_title: str
    #: what is said below a table of contestants that the load could not use up
    at_limit: str
    #: whether what was reached is also shown by CPU time
    by_cpu: bool = False

    def introduce(
        self, options: argparse.Namespace, versions: Mapping[str, str], absent: Mapping[str, str]
    ) -> dict[str, Any]:
        """Print what takes part, and begin the record for ``--json``.

        :param absent: contestants that cannot take part, and why.
        """
        print_machine(versions)
        for name in options.only:
            print(f"{name}: {absent.get(name) or self.contestants[name].title}")
        facts = (machine(), versions, options.seconds, absent)
        return dict(zip(("machine", "versions", "seconds", "left out"), facts, strict=True))

    def compare(
        self, options: argparse.Namespace, record: dict[str, Any], measure: Callable[[str, str, float], Run]
    ) -> int:
        """All rounds; in each, all contestants take turns in each case. The exit status."""
        names = [name for name in options.only if name not in record["left out"]]
        runs: dict[str, Results] = {case: {} for case in options.cases}
        failures = []
        for number in range(1, options.rounds + 1):
            for case in options.cases:
                for name in names:
                    if case not in (self.contestants[name].cases or self.tables):
                        continue
                    progress(f"round {number} of {options.rounds}: {case}, {name}")
                    run = None
                    try:
                        run = measure(name, case, options.seconds)
                    except (Failed, OSError) as error:
                        failures.append(f"{case}, {name}, round {number}: {error}")
                    runs[case].setdefault(name, []).append(run)
        progress()
        for case, results in runs.items():
            self.report_case(case, results)
        missed, undecided = self.report_goals(runs)
        print("".join(f"\nFAILED: {text}" for text in failures), end="\n" * bool(failures))
        record |= {"failures": failures, "runs": runs}
        return exit_status(failures, missed, undecided)

    def report_case(self, case: str, results: Results) -> None:
        title, columns = self.tables[case]
        every = {name: [run for run in runs if run] for name, runs in results.items()}
        failed = ["failed", *["-"] * (len(columns) - 1)]
        rows = [[n, *([cell(r, every) for _, cell in columns] if r else failed)] for n, r in every.items()]
        print(f"\n{title}\n")
        table(["contestant", *(title for title, _ in columns)], rows)
        for figure, limit, text in (
            ("generator_load", SATURATED, self.at_limit),
            ("others", DISTURBED, COMPANY),
        ):
            if names := [name for name, runs in every.items() if max([0, *numbers(runs, figure)]) > limit]:
                print("\n" + text.format(", ".join(names)))

    def report_goals(self, runs: Mapping[str, Results]) -> tuple[bool, bool]:
        """Print how ours stands; whether a goal was missed, and whether one is not decided."""
        print(f"\nGoals: {self.goals_title}\n")
        head = ["case", "goal", "reached", "in each round", *["by CPU time"] * self.by_cpu, ""]
        judged = [(goal, *goal.judge(runs[goal.case])) for goal in self.goals if goal.case in runs]
        table(head, [[g.case, str(g), *cells[: len(head) - 3], verdict] for g, verdict, cells in judged])
        verdicts = {verdict for _, verdict, _ in judged}
        return "NOT MET" in verdicts, bool({"undecided", "not measured"} & verdicts)


def write_record(path: Path | None, record: object) -> None:
    """For ``--json``."""
    if path:
        path.write_text(json.dumps(record, indent=1, default=vars) + "\n")
