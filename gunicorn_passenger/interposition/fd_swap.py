"""Puts another socket under a descriptor that may be in epoll sets.

Process: a worker.
Never: wake a greenlet or thread, or change the events that an epoll set asks for.

The kernel keeps a registration until the *open file description* is closed (epoll(7)). The master keeps the
old one open, so an epoll set would still report the old socket under the number of the new one, and would
not see the new one at all. So the registration moves, with its events and its data: libev keeps a generation
of its own in the data, which is why ``select.epoll`` cannot do this.
"""

from __future__ import annotations

import _socket
import functools
import os
import re
import stat
import struct
from collections.abc import Container, Iterable
from contextlib import suppress
from typing import Any

from gunicorn_passenger.interposition.own_fds import room

_ADD, _DELETE = 1, 2
_REGISTRATION = re.compile(r"^tfd:\s+(\d+)\s+events:\s+([0-9a-f]+)\s+data:\s+([0-9a-f]+)", re.MULTILINE)
#: struct epoll_event, which is packed on x86-64 alone
_EVENT = struct.Struct("=IQ" if os.uname().machine == "x86_64" else "@IQ")


def swap_fds(fds: Iterable[int], source: _socket.socket) -> None:
    """``dup2`` onto each descriptor, and the epoll sets of this process follow.

    :param fds: the descriptors that servers use.
    :param source: the socket to put under them.
    :raises OSError: when the system cannot say which epoll sets they are in; then nothing has changed.
    """
    targets = set(fds) - {source.fileno()}
    registrations = epoll_registrations(targets)
    with room():
        control: Any = _libc().epoll_ctl if registrations else None
    for epoll, fd, event in registrations:
        control(epoll, _DELETE, fd, event)
    for fd in targets:
        os.dup2(source.fileno(), fd, inheritable=os.get_inheritable(fd))
    for epoll, fd, event in registrations:
        control(epoll, _ADD, fd, event)


@functools.cache
def _libc() -> Any:
    import ctypes  # few workers need it

    return ctypes.CDLL(None, use_errno=True)


def epoll_registrations(fds: Container[int]) -> list[tuple[int, int, bytes]]:
    """The epoll sets that descriptors are in: the set, the descriptor, the event that it is registered with.

    :raises OSError: when that cannot be read from /proc.
    """
    found = []
    with room():
        for name in os.listdir("/proc/self/fd"):
            # most are sockets, and the other questions take longer
            with suppress(OSError):
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    continue
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                    with open(f"/proc/self/fdinfo/{name}") as file:
                        for fd, events, data in _REGISTRATION.findall(file.read()):
                            if int(fd) in fds:
                                event = _EVENT.pack(int(events, 16), int(data, 16))
                                found.append((int(name), int(fd), event))
    return found
