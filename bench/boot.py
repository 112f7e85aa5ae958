"""What the hooks cost a worker of another class whose program opens no port: time to boot, and memory.

The same application boots again and again, four workers under each gunicorn, in turn as

- ``plain``: ``gunicorn -k sync``;
- ``hooks``: the same, with ``from gunicorn_passenger.hooks import *`` in the configuration.

How the times are taken, and the goals: bench/README.md.
"""

import importlib.metadata
import platform
from statistics import median

from harness.boots import (
    BOOTS,
    FEWEST_ROUNDS,
    by_round,
    difference,
    interval,
    lower_quartile,
    measure_boots,
    spread,
)
from harness.program import at_least, exit_status, option_parser, run_benchmark
from harness.tables import print_machine, progress, table

#: The goals: milliseconds of CPU time, and MB of memory that no other process shares.
TIME_GOAL = 10.0
MEMORY_GOAL = 2.0

CONTESTANTS = {"plain": "sync", "hooks": "sync"}


def measure() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=at_least(1, int), default=15, help="default 15; 6 or more decide")
    options = parser.parse_args()
    packages = ("gunicorn", "gunicorn-passenger")
    print_machine(
        {"Python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}
    )
    boots, amounts = measure_boots(options.rounds, CONTESTANTS)
    memory = {c: [amount / 1024 for amount in amounts[c]] for c in CONTESTANTS}
    progress()
    times = {c: by_round(boots[c], range(BOOTS), "fork", "serving") for c in CONTESTANTS}
    cpu = {c: [[1000 * stamps["cpu"] for stamps in one] for one in boots[c]] for c in CONTESTANTS}
    rows = [
        [c, *(spread([t for one in found[c] for t in one]) for found in (times, cpu)), spread(memory[c])]
        for c in CONTESTANTS
    ]
    table(["contestant", "fork to serving, ms", "CPU, ms", "memory of its own, MB"], rows)
    added, low, high = difference(cpu["hooks"], cpu["plain"], lower_quartile)
    grown = median(memory["hooks"]) - median(memory["plain"])
    print(
        f"\nThe hooks add {interval(added, low, high)} ms of CPU time (lower quartiles) and {grown:+.2f} MB."
    )
    enough = options.rounds >= FEWEST_ROUNDS
    missed = (low > TIME_GOAL and enough) or grown > MEMORY_GOAL
    undecided = not missed and (high > TIME_GOAL or not enough)
    open_question = "undecided; take more rounds, or a quieter machine"
    verdict = "missed" if missed else open_question if undecided else "met"
    print(f"Goals (at most {TIME_GOAL:g} ms and {MEMORY_GOAL:g} MB): {verdict}.")
    return exit_status(False, missed, undecided)


if __name__ == "__main__":
    run_benchmark(measure)
