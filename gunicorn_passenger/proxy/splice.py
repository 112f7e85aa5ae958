"""Moves long bodies from socket to socket inside the kernel.

Process: a gevent worker.
Never: leave bytes in a pipe that another body gets.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

#: A body is moved inside the kernel when at least this many bytes of it are still to come.
LEAST = 262144
#: The size of a pipe in bytes, where the system allows it: each call moves as many.
_PIPE = 1 << 20
#: How many pipes are kept for the next bodies.
_SPARE = 4

_spare: list[Pipe] = []
_FLAGS = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)

#: whether the system has it, as Linux does
available = hasattr(os, "splice")


class Pipe:
    """A pipe between two sockets."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the user has reached the limit for pipes
            fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, _PIPE)
        self.held = 0

    def fill(self, source: int, most: int) -> int:
        """
        :returns: how many bytes came from the source; zero at its end.
        :raises BlockingIOError: when none have come yet.
        """
        count = os.splice(source, self.into, min(most, _PIPE), flags=_FLAGS)
        self.held += count
        return count

    def drain(self, sink: int, wait: Callable[[], None]) -> None:
        """Send all that it holds.

        :param wait: waits until the sink takes more.
        """
        while self.held:
            try:
                self.held -= os.splice(self.out, sink, self.held, flags=_FLAGS)
            except BlockingIOError:
                wait()

    def release(self) -> None:
        """Keep the pipe for the next body when it is empty; otherwise close it."""
        if not self.held and len(_spare) < _SPARE:
            _spare.append(self)
            return
        os.close(self.into)
        os.close(self.out)


def pipe() -> Pipe:
    """A pipe for one body.

    :raises OSError: when no file descriptor is left.
    """
    return _spare.pop() if _spare else Pipe()
