"""The figures of runs, and the columns of tables that show them."""

from collections.abc import Callable, Sequence
from statistics import median

#: The figures that one run of one contestant in one case showed, by name; ``None`` is one that it cannot
#: have. Those of every run but an idle one:
#:
#: - ``rate``: requests or messages per second, or MB/s
#: - ``cpu``: CPU time of the server's processes for each of them
#: - ``server_load``, ``generator_load``: the shares of their cores that the server used, and the load
#:   together with an upstream
#: - ``others``: the share of the two cores that none of them used and that was not idle
Run = dict[str, float | None]

#: contestant -> its runs in one case that did not fail
GoodRuns = dict[str, list[Run]]

#: The title of a table's column, and how its cell is made from a contestant's runs and those of all.
Column = tuple[str, Callable[[list[Run], GoodRuns], str]]


def numbers(runs: Sequence[Run], figure: str) -> list[float]:
    return [number for run in runs if (number := run.get(figure)) is not None]


def middle(title: str, figure: str, digits: int = 0) -> Column:
    return title, lambda runs, _: f"{median(numbers(runs, figure)):.{digits}f}"


def span(figure: str, digits: int = 0) -> Column:
    def lowest_and_highest(runs: list[Run], _: GoodRuns) -> str:
        values = numbers(runs, figure)
        return f"{min(values):.{digits}f}-{max(values):.{digits}f}"

    return "min-max", lowest_and_highest


def share(title: str, figure: str) -> Column:
    return title, lambda runs, _: f"{100 * median(numbers(runs, figure)):.0f} %"


def ratio(mine: Sequence[Run] | None, theirs: Sequence[Run] | None) -> str:
    """Of the medians of the rates."""
    if not mine or not theirs:
        return "-"
    return f"{median(numbers(mine, 'rate')) / median(numbers(theirs, 'rate')):.2f}"
