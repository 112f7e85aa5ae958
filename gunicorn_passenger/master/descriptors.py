"""Descriptors that a worker or a daemon has sent: closed without waiting, whatever they are.

Runs in: the master, in the broker's thread. Must never: wait for what a sender can delay.

``close`` can block: for a TCP socket with SO_LINGER and bytes that its client does not take, for a terminal,
for a file of a network or of a user's own file system. The broker's thread holds the lock that every fork
waits for. So it closes nothing itself but connected stream sockets that do not linger; all else goes to a
thread of its own.
"""

from __future__ import annotations

import _socket
import os
import socket
import stat
import struct
from collections import deque
from contextlib import suppress
from typing import Any

from gunicorn_passenger.ipc import channel
from gunicorn_passenger.system import unpatched

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
#: The major number of /dev/null and its like.
_MEMORY = 1
#: An empty packet looks like the end: the end is there after more of them than the buffer of a sender can
#: hold.
_MOST_EMPTY = 1024
#: How many descriptors may wait to be closed before their senders are not heard any more.
MOST = 64


def is_connection(fd: int) -> bool:
    """Whether a descriptor is a connected stream socket, which a sibling could serve."""
    sock = _socket_of(fd)
    if sock is None:
        return False
    try:
        if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM or _lingers(sock):
            return False
        sock.getpeername()
    except OSError:
        return False
    finally:
        sock.detach()
    return True


def _closes_at_once(fd: int) -> bool:
    """Whether ``close`` does not wait: for pipes, the devices of memory(4), and sockets that do not
    linger."""
    info = os.fstat(fd)
    if stat.S_ISFIFO(info.st_mode):
        return True
    if stat.S_ISCHR(info.st_mode):
        return os.major(info.st_rdev) == _MEMORY
    sock = _socket_of(fd)
    if sock is None:
        return False
    try:
        return sock.family in _FAMILIES and not _lingers(sock)
    finally:
        sock.detach()


def _socket_of(fd: int) -> _socket.socket | None:
    """A socket object for a descriptor, to be detached from it again."""
    try:
        return _socket.socket(fileno=fd) if stat.S_ISSOCK(os.fstat(fd).st_mode) else None
    except OSError:
        return None


def _lingers(sock: _socket.socket) -> bool:
    try:
        on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    except OSError:
        return True
    return bool(on and seconds)


class Closer:
    """Closes descriptors in a thread of its own.

    A child that is forked meanwhile inherits what still waits. Only a worker that sends what is not a
    client's connection can make that so: connections are closed at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._lock = unpatched.lock()
        self._runs = False
        #: how many there were that are not closed at once
        self.slow = 0

    @property
    def full(self) -> bool:
        """Whether so many wait that their senders are not to be heard any more."""
        return len(self._waiting) >= MOST

    def close(self, fd: int) -> None:
        """Close a descriptor that a worker has sent."""
        if _closes_at_once(fd):
            os.close(fd)
            return
        with self._lock:
            self._waiting.append(fd)
            self.slow += 1
            if self._runs:
                return
            self._runs = True
        try:
            unpatched.start_thread(self._run)
        except RuntimeError:
            # no thread to be had: rather wait than leak
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._runs = False
                    return
                fd = self._waiting[0]
            with suppress(OSError):
                os.close(fd)
            with self._lock:
                self._waiting.popleft()

    def receive(self, sock: Any, size: int) -> bytes:
        """Receive bytes from a stream; descriptors that come with them are closed.

        :raises OSError: as ``recv``.
        """
        data, ancillary, _, _ = sock.recvmsg(size, channel.ROOM, socket.MSG_CMSG_CLOEXEC)
        for fd in channel.sent(ancillary):
            self.close(fd)
        return bytes(data)

    def close_socket(self, sock: Any) -> None:
        """Close the master's end of a pair or a client's connection.

        Messages that nobody has read would be thrown away with the descriptors in them, which may wait, too.
        """
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # nothing more can be sent, so the loop ends
        with suppress(OSError):
            sock.setblocking(False)
            empty = 0
            while empty < _MOST_EMPTY:
                data, ancillary, _, _ = sock.recvmsg(
                    channel.MAX_MESSAGE, channel.ROOM, socket.MSG_CMSG_CLOEXEC
                )
                for fd in channel.sent(ancillary):
                    self.close(fd)
                empty += not data
        sock.close()


#: That of this process.
closer = Closer()
