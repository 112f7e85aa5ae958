"""The descriptors of this process, by the inode of their socket, and the room for further ones.

Process: a worker.
Never: follow a descriptor that was closed and reused; the inode of the socket tells the two apart.

A worker may have no descriptor free (EMFILE) at the moment when it must stop accepting. So it keeps a few
spare ones, which :func:`room` closes for a moment.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: How many descriptors :func:`room` makes free: as many as an import needs, for a directory and a file.
_SPARE = 2

_spare: list[int] = []


def keep_spare() -> None:
    """Open the spare descriptors, as far as the system allows."""
    with suppress(OSError):
        while len(_spare) < _SPARE:
            _spare.append(os.eventfd(0))


@contextmanager
def room() -> Iterator[None]:
    """Descriptors are free in this block, even where the process has reached its limit.

    The block must not switch to another greenlet, and leaves open at most one descriptor that is closed soon.
    """
    with suppress(IndexError):
        while True:
            os.close(_spare.pop())
    try:
        yield
    finally:
        keep_spare()


def inode_of(fd: int) -> int:
    """The inode of an open file; -1 for a closed descriptor."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1


def fds_of(inode: int) -> list[int]:
    """All descriptors of this process for an open file: ``dup()`` makes several."""
    return fds_by_inode().get(inode, [])


def fds_by_inode() -> dict[int, list[int]]:
    """All descriptors of this process, by the inode of their file."""
    try:
        with room():
            fds = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        fds = list(range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    found: dict[int, list[int]] = {}
    for fd in fds:
        found.setdefault(inode_of(fd), []).append(fd)
    found.pop(-1, None)
    return found
