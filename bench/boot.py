"""What the hooks cost a worker of another class whose program opens no port: time to boot, and memory.

The same application boots again and again, each time under a gunicorn of its own, in turn as

- ``plain``: ``gunicorn -k sync``;
- ``hooks``: the same, with ``from gunicorn_passenger.hooks import *`` in the configuration.

How the times are taken, and the goals: bench/README.md.
"""

import importlib.metadata
import platform
from statistics import median

from harness.boots import BOOTS, FEWEST_ROUNDS, Stamps, boot_once, by_round, difference, interval, spread
from harness.program import at_least, exit_status, option_parser, run_benchmark
from harness.tables import print_machine, progress, table

#: The goals: milliseconds, and MB of memory that no other process shares.
TIME_GOAL = 10.0
MEMORY_GOAL = 2.0

CONTESTANTS = ("plain", "hooks")


def measure_boots(rounds: int) -> tuple[dict[str, list[list[Stamps]]], dict[str, list[float]]]:
    """Contestant -> round -> age -> stamps, and contestant -> MB of each worker."""
    boots: dict[str, list[list[Stamps]]] = {c: [] for c in CONTESTANTS}
    memory: dict[str, list[float]] = {c: [] for c in CONTESTANTS}
    for number in range(rounds + 1):
        turn = number % len(CONTESTANTS)
        for contestant in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
            stamps, amounts = boot_once(contestant, "sync")
            if number:  # a round before the first one is not counted
                boots[contestant].append(stamps)
                memory[contestant].extend(amount / 1024 for amount in amounts)
        progress(f"round {number} of {rounds}")
    return boots, memory


def measure() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=at_least(1, int), default=15, help="default 15; 6 or more decide")
    options = parser.parse_args()
    packages = ("gunicorn", "gunicorn-passenger")
    print_machine(
        {"Python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}
    )
    boots, memory = measure_boots(options.rounds)
    progress()
    times = {c: by_round(boots[c], range(BOOTS), "fork", "serving") for c in CONTESTANTS}
    cpu = {c: [1000 * stamps["cpu"] for one in boots[c] for stamps in one] for c in CONTESTANTS}
    rows = [
        [c, spread([t for one in times[c] for t in one]), spread(cpu[c]), spread(memory[c])]
        for c in CONTESTANTS
    ]
    table(["contestant", "fork to serving, ms", "CPU, ms", "memory of its own, MB"], rows)
    added, low, high = difference(times["hooks"], times["plain"])
    grown = median(memory["hooks"]) - median(memory["plain"])
    print(f"\nThe hooks add {interval(added, low, high)} ms and {grown:+.2f} MB.")
    enough = options.rounds >= FEWEST_ROUNDS
    missed = (low > TIME_GOAL and enough) or grown > MEMORY_GOAL
    undecided = not missed and (high > TIME_GOAL or not enough)
    open_question = "undecided; take more rounds, or a quieter machine"
    verdict = "missed" if missed else open_question if undecided else "met"
    print(f"Goals (at most {TIME_GOAL:g} ms and {MEMORY_GOAL:g} MB): {verdict}.")
    return exit_status(False, missed, undecided)


if __name__ == "__main__":
    run_benchmark(measure)
