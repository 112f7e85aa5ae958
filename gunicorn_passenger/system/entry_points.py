"""Keeps gevent from reading the entry points of all installed packages again and again.

Process: a worker, while it patches the standard library.
Never: change what a program reads later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Read the entry points of the installed packages once in this block.

    gevent looks for plugins at 25 points while it patches. Each time, ``importlib.metadata`` would read the
    files of every installed package: that took two thirds of the time that a worker needs to start.
    """
    read = metadata.entry_points
    metadata.entry_points = metadata.entry_points().select
    try:
        yield
    finally:
        metadata.entry_points = read
