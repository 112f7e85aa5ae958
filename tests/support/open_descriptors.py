"""The descriptors of this process, for tests that must leave none open."""

import contextlib
import os

from conditions import wait_for

#: Seconds in which a descriptor that another thread closes is closed.
_SOON = 10.0


def open_descriptors() -> set[tuple[str, str]]:
    """Each with what it is open on; a socket or a pipe has a number there that no other ever has.

    A test compares the sets with ``<=``, and not their sizes: what an earlier test of the process has left to the
    garbage collector may be closed meanwhile.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def wait_closed(before: set[tuple[str, str]]) -> None:
    """Wait until no descriptor is open that was not open before; other threads close some."""
    wait_for(
        lambda: open_descriptors() <= before, lambda: f"to be closed: {open_descriptors() - before}", _SOON
    )
