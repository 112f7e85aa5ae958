"""The objects of a type that exist in this process.

Process: every process.
Never: use an object of another type. ``isinstance`` would ask each object for its ``__class__``, and a lazy
object of the program, such as Django's settings or ``request.user``, would then be evaluated.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any


def live_objects(*kinds: type) -> Iterator[Any]:
    """All objects of some types that the garbage collector knows; there may be millions of others."""
    # what a worker has from the master is frozen, such as the objects of a preloaded program
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    known = gc.get_objects()
    if frozen:
        gc.freeze()
    for found in known:
        if issubclass(type(found), kinds):
            yield found
