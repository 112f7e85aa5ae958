"""The descriptors of this process, by the inode of their socket.

Process: a worker.
Never: follows a descriptor that was closed and reused; the inode of the socket tells the two apart.
"""

from __future__ import annotations

import os


def inode_of(fd: int) -> int:
    """The inode of an open file; -1 for a closed descriptor."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1


def fds_of(inode: int) -> list[int]:
    """All descriptors of this process for an open file: ``dup()`` makes several."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return []
    return [int(name) for name in names if inode_of(int(name)) == inode]
