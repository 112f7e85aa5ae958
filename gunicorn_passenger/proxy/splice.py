"""Long bodies moved from socket to socket by the kernel.

Runs in: a gevent worker. Must never: leave bytes in a pipe that another body gets.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

#: A body is moved by the kernel when at least this much of it is to come.
LEAST = 262144
#: Bytes that a pipe holds, where the system lets us; more bytes are moved with each call then.
_PIPE = 1 << 20
#: Pipes that are kept for the next body.
_SPARE = 4

_spare: list[Pipe] = []
_FLAGS = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)

#: Linux has it
available = hasattr(os, "splice")


class Pipe:
    """A pipe between two sockets."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the user's pipes hold too much already
            fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, _PIPE)
        self.held = 0

    def fill(self, source: int, most: int) -> int:
        """
        :returns: how much came from the source; zero at its end.
        :raises BlockingIOError: when there is nothing yet.
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

    def done(self) -> None:
        """Keep it for the next body, when it is empty."""
        if not self.held and len(_spare) < _SPARE:
            _spare.append(self)
            return
        os.close(self.into)
        os.close(self.out)


def pipe() -> Pipe:
    """A pipe for one body.

    :raises OSError: when there is none to be had.
    """
    return _spare.pop() if _spare else Pipe()
