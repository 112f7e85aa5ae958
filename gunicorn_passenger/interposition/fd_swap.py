"""Puts another socket under a descriptor that may be in epoll sets.

Runs in: a worker. Must never: wake anybody, or change what a set asks for.

The kernel keeps a registration until the *description* is closed (epoll(7)). Where another process, the
master, keeps it open, a set would go on reporting the old socket under the number of the new one, and would
not see the new one at all. So the registration is moved, with the events and the data that the set's owner
gave it: libev keeps a generation of its own in the data.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from typing import Any

_ADD, _DELETE = 1, 2
_LINE = re.compile(r"^tfd:\s+(\d+)\s+events:\s+([0-9a-f]+)\s+data:\s+([0-9a-f]+)", re.MULTILINE)


class _Event(ctypes.Structure):
    # struct epoll_event is packed on x86-64 alone
    _pack_ = 1 if os.uname().machine == "x86_64" else 0
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)


def swap_fd(fd: int, source: Any) -> None:
    """``dup2``, and the epoll sets of this process see what is there now.

    :param fd: the descriptor that others use.
    :param source: the socket that is to be under it.
    """
    sets = _sets(fd)
    for epoll, events, data in sets:
        event = _Event(events, data)
        _libc.epoll_ctl(epoll, _DELETE, fd, ctypes.byref(event))
    os.dup2(source.fileno(), fd, inheritable=os.get_inheritable(fd))
    for epoll, events, data in sets:
        event = _Event(events, data)
        _libc.epoll_ctl(epoll, _ADD, fd, ctypes.byref(event))


def _sets(fd: int) -> list[tuple[int, int, int]]:
    """The epoll sets that a descriptor is in: the set, the events and the data."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                with open(f"/proc/self/fdinfo/{name}") as file:
                    for number, events, data in _LINE.findall(file.read()):
                        if int(number) == fd:
                            found.append((int(name), int(events, 16), int(data, 16)))
    return found
