"""Boots of gunicorn's workers, timed by ``apps/boot_conf.py``, and the differences between contestants."""

import contextlib
import json
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from . import APPS, Failed
from .limits import free_ports
from .processes import Command, gunicorn_command, running, wait_for
from .site import temporary_directory
from .tables import percentile
from .usage import family, memory_of


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


def private_memory(pid: int) -> int:
    """The memory in kB that no other process shares with it."""
    amounts = memory_of(pid)
    return amounts["Private_Clean"] + amounts["Private_Dirty"]


def by_round(rounds: list[list[Stamps]], ages: Sequence[int], begin: str, end: str) -> list[list[float]]:
    """The milliseconds between two stamps, of the workers of these ages, in each round."""
    return [[1000 * (r[age][end] - r[age][begin]) for age in ages if end in r[age]] for r in rounds]


def difference(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float, float]:
    """The difference of two medians and its 95 % interval.

    The interval is that of the bootstrap over whole rounds, since what disturbs the machine in one
    round disturbs both contestants.
    """

    def of(picked: Sequence[int]) -> float:
        medians = [median(t for i in picked for t in rounds[i]) for rounds in (ours, theirs)]
        return medians[0] - medians[1]

    dice = random.Random(1)
    every = range(len(ours))
    drawn = [of(dice.choices(every, k=len(ours))) for _ in range(2000)]
    return of(every), percentile(drawn, 2.5), percentile(drawn, 97.5)


def interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-"
