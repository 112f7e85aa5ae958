"""The command line of a benchmark, the signals that end it, and its exit status."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from . import ROOT, Failed

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def choice(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes names, separated by commas."""

    def names(text: str) -> list[str]:
        picked = [name.strip() for name in text.split(",")]
        if unknown := [name for name in picked if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return [name for name in known if name in picked]

    return names


def option_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of a program's docstring."""
    return argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])


def comparison_parser(
    doc: str | None, contestants: Iterable[str], cases: Iterable[str], seconds: float
) -> argparse.ArgumentParser:
    """The options of a benchmark that compares contestants in cases."""
    parser = option_parser(doc)
    add = parser.add_argument
    add("--only", metavar="A,B", type=choice(contestants), help=", ".join(contestants))
    add("--cases", "--case", metavar="A,B", type=choice(cases), default=list(cases), help=", ".join(cases))
    add("--rounds", type=at_least(1, int), default=5, help="how often all take turns (default 5)")
    add("--seconds", type=at_least(0.1, float), default=seconds, help=f"of a run (default {seconds:g})")
    add("--json", metavar="FILE", type=Path, help="write all numbers to a file as well")
    venv = ROOT / ".venv-bench"
    add("--venv", type=lambda text: Path(text).absolute(), default=venv, help="default .venv-bench")
    return parser


def at_least(least: float, kind: type) -> Callable[[str], float]:
    """The type of an option that takes a number."""

    def number(text: str) -> float:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}")
        return value

    return number


def exit_status(failed: object, missed: object, undecided: object = ()) -> int:
    """0 when the goals are met, 1 when one is missed, 2 when a run failed, 3 when a goal is not decided."""
    return 2 if failed else 1 if missed else 3 if undecided else 0


def end_benchmark(number: int, frame: object) -> None:
    """Clean up and end; impatience does not stop that."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def run_benchmark(benchmark: Callable[[], int]) -> None:
    """Run a benchmark and exit with its status, which is 2 when it cannot be measured."""
    for number in ENDING:
        signal.signal(number, end_benchmark)
    try:
        sys.exit(benchmark())
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"FAILED: {error}" if isinstance(error, Failed) else f"FAILED: {error!r}", file=sys.stderr)
        sys.exit(2)
