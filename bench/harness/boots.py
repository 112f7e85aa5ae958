"""Boots of gunicorn's workers, timed by ``apps/boot_conf.py``, and the differences between contestants."""

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from . import APPS, Failed, PortTaken
from .limits import free_ports
from .processes import Command, gunicorn_command, running, wait_for
from .site import temporary_directory
from .tables import percentile, progress
from .usage import family, memory_of


def again_if_taken(step: Callable[..., Any], *arguments: object) -> Any:
    """Do a step, and once more (three times at most) when another program has taken a port of it."""
    for _ in range(3):
        try:
            return step(*arguments)
        except PortTaken as error:
            print(f"\nOnce more: {error}", file=sys.stderr)
    return step(*arguments)


@contextlib.contextmanager
def started(
    command: Callable[[Path], Command], stdout: int | None = None, **variables: object
) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """A program in a new directory, the path of its socket, and the file in which workers record."""
    with temporary_directory() as name:
        home = Path(name)
        records, socket = home / "records", home / "s"
        records.touch()
        variables["BENCH_RECORDS"] = records
        with running(command(socket), home, APPS, stdout=stdout, **variables) as process:
            yield process, socket, records


def complete_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


#: The rounds below which an interval says nothing, and the workers that one master boots, the first and the
#: later ones.
FEWEST_ROUNDS = 6
BOOTS = 4

#: Of one worker, by name, in seconds
Stamps = dict[str, float]


def boot_once(contestant: str, worker: str) -> tuple[list[Stamps], list[int]]:
    """Start one gunicorn and boot its workers one by one.

    :param worker: the worker class.
    :returns: their stamps, by age, and the memory in kB that each has for itself.
    """
    command = partial(gunicorn_command, worker, "boot_app:application")
    options = ("-c", "boot_conf.py", "--log-level", "warning")
    env = {"BENCH_CONTESTANT": contestant, "BENCH_PORT": free_ports(1)}
    with started(lambda path: command(path, *options, workers=BOOTS), **env) as (process, _, records):
        wait_for(process, lambda: len(complete_lines(records)) >= BOOTS, f"{BOOTS} workers were ready")
        stamps = [json.loads(line) for line in complete_lines(records)]
        memory = [private_memory(pid) for pid in family(process.pid)[1:]]
    if [s["age"] for s in stamps] != list(range(1, BOOTS + 1)):
        raise Failed(f"a worker of {contestant!r} booted twice: {stamps}")
    return stamps, memory


def measure_boots(
    rounds: int, contestants: dict[str, str]
) -> tuple[dict[str, list[list[Stamps]]], dict[str, list[int]]]:
    """Boot the contestants in turn. A round before the first one is not counted.

    :param contestants: their worker classes.
    :returns: contestant -> round -> age -> stamps, and contestant -> kB of each worker.
    """
    boots: dict[str, list[list[Stamps]]] = {c: [] for c in contestants}
    memory: dict[str, list[int]] = {c: [] for c in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        turn = number % len(names)
        for contestant in names[turn:] + names[:turn]:
            stamps, amounts = again_if_taken(boot_once, contestant, contestants[contestant])
            if number:
                boots[contestant].append(stamps)
                memory[contestant].extend(amounts)
        progress(f"boots: round {number} of {rounds}")
    return boots, memory


def private_memory(pid: int) -> int:
    """The memory in kB that no other process shares with it."""
    amounts = memory_of(pid)
    return amounts["Private_Clean"] + amounts["Private_Dirty"]


def by_round(rounds: list[list[Stamps]], ages: Sequence[int], begin: str, end: str) -> list[list[float]]:
    """The milliseconds between two stamps, of the workers of these ages, in each round."""
    return [[1000 * (r[age][end] - r[age][begin]) for age in ages if end in r[age]] for r in rounds]


def lower_quartile(values: Iterable[float]) -> float:
    """What the time of a boot is when other programs disturb it little: they only ever add to it."""
    return percentile(list(values), 25)


def difference(
    ours: list[list[float]],
    theirs: list[list[float]],
    statistic: Callable[[Iterable[float]], float] = median,
) -> tuple[float, float, float]:
    """The difference of two medians, or of another statistic, and its 95 % interval.

    The interval is that of the bootstrap over whole rounds, since what disturbs the machine in one
    round disturbs both contestants.
    """

    def of(picked: Sequence[int]) -> float:
        found = [statistic(t for i in picked for t in rounds[i]) for rounds in (ours, theirs)]
        return found[0] - found[1]

    dice = random.Random(1)
    every = range(len(ours))
    drawn = [of(dice.choices(every, k=len(ours))) for _ in range(2000)]
    return of(every), percentile(drawn, 2.5), percentile(drawn, 97.5)


def interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-"
