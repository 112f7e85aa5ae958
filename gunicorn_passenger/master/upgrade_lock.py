"""The lock between two masters for servers that only one worker of the application may serve.

Process: the master. Never: wait.

Within one master the broker knows which worker accepts. But while ``USR2`` upgrades gunicorn there are two
masters, each with workers that want the same server. So a master locks a byte for each such server, in a
file in memory that it shares with the next master (an open file description lock, fcntl(2)). The kernel
releases the lock when the master and the workers that have inherited it have exited, however they ended.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from zlib import crc32

from gunicorn_passenger.master import upgrade_state

_NAME = "gunicorn-passenger-exclusive"
_FLOCK = "hhqqi4x"


class UpgradeLock:
    """The locks of one master."""

    def __init__(self, inherited: int = -1) -> None:
        """
        :param inherited: a descriptor from the previous master; negative for none.
        :raises OSError: when the system has no room for the file.
        """
        path = f"/proc/self/fd/{inherited}"
        self._fd = -1
        with suppress(OSError):
            if inherited >= 0 and os.readlink(path).startswith(f"/memfd:{_NAME}"):
                # an open file description of our own: a lock that both masters share would exclude neither
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                os.close(inherited)
        if self._fd < 0:
            self._fd = os.memfd_create(_NAME)

    def acquire(self, key: str) -> bool:
        """Whether this master has the lock of a server now."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock(key, fcntl.F_WRLCK))
        except OSError:
            return False
        return True

    def release(self, key: str) -> None:
        with suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock(key, fcntl.F_UNLCK))

    def close(self) -> None:
        """In a worker: give up its share of the locks."""
        with suppress(OSError):
            os.close(self._fd)

    def export_descriptor(self, lowest: int) -> int:
        """In the child that becomes the new master: a descriptor that it inherits.

        :param lowest: the lowest number that it may have.
        :raises OSError: when this process has no room for it.
        """
        return upgrade_state.inheritable(self._fd, lowest)


def _lock(key: str, kind: int) -> bytes:
    # two servers whose names share a byte exclude each other between masters, which does no harm
    return struct.pack(_FLOCK, kind, os.SEEK_SET, crc32(key.encode()), 1, 0)
