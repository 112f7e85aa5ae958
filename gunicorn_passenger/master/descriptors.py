"""Closes descriptors that a worker or a daemon has sent, whatever they are, without waiting.

Process: the master, in the broker's thread. Never: wait for what a sender can delay, or query the file
system of a descriptor.

``close`` can block: for a TCP socket with SO_LINGER and bytes that its client does not take, even when it
lies in the receive queue of another socket; for a terminal; for a file of a network or of a user's own file
system, of which even ``fstat`` can block or fail. The broker's thread holds the lock that every fork waits
for. So it closes nothing but pipes; all else goes to closing threads, one for each sender.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import socket
import struct
from collections import deque
from contextlib import suppress

from gunicorn_passenger.ipc import channel
from gunicorn_passenger.system import unpatched

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
#: An empty packet looks like the end. It is the end after more of them than a sender's buffer can hold.
_MAX_EMPTY = 1024
#: How many descriptors of one sender may wait to be closed before the master reads nothing more from it.
MAX_WAITING = 256
#: A sender for which too many wait is cut off after so many seconds without a single ``close``, or after so
#: many in which there was always one to be closed.
STALL_TIMEOUT = 5.0
BUSY_TIMEOUT = 30.0
#: The most seconds between two checks that count: a master that was stopped meanwhile has closed nothing.
_LOOK_LIMIT = 0.1


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


def _is_pipe(fd: int) -> bool:
    """Whether a descriptor is a pipe, of which a ``close`` never waits."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return False
    return True


def _socket_of(fd: int) -> _socket.socket | None:
    """A socket object for a descriptor, to be detached from it again; ``None`` when it is not a socket."""
    try:
        # this asks for the family, the type and the protocol of the socket, and nothing else
        return _socket.socket(fileno=fd)
    except OSError:
        return None


def _open_file(fd: int) -> str:
    """What the kernel calls the open file behind a descriptor; empty if that cannot be known.

    Unlike ``fstat``, this does not ask the file system of the file.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _lingers(sock: _socket.socket) -> bool:
    try:
        on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    except OSError:
        return True
    return bool(on and seconds)


class Closer:
    """Closes the descriptors of one sender, in a thread of its own while there are any."""

    def __init__(self) -> None:
        #: the descriptors, each with its open file
        self._waiting: deque[tuple[int, str]] = deque()
        self._lock = unpatched.lock()
        self._runs = False
        #: seconds of the present ``close``, and of all since there was nothing to close, as far as
        #: :meth:`stalled` has looked; and when it looked last (monotonic seconds)
        self._closing_for = self._busy_for = self._looked_at = 0.0

    @property
    def full(self) -> bool:
        """Whether too many wait: the caller reads nothing from the sender until some are closed."""
        return len(self._waiting) >= MAX_WAITING

    def stalled(self, now: float) -> bool:
        """Whether too many wait, and have waited for too long: the caller cuts the sender off.

        Called again and again while :attr:`full`.

        :param now: monotonic seconds.
        """
        passed = min(now - self._looked_at, _LOOK_LIMIT)
        self._looked_at = now
        self._closing_for += passed
        self._busy_for += passed
        return self._closing_for >= STALL_TIMEOUT or self._busy_for >= BUSY_TIMEOUT

    def close(self, fd: int) -> None:
        """Close a descriptor that the sender has sent."""
        if _is_pipe(fd):
            os.close(fd)
            return
        with self._lock:
            self._waiting.append((fd, _open_file(fd)))
            if self._runs:
                return
            self._runs = True
            self._closing_for = self._busy_for = 0.0
            _busy.add(self)
        self._start()

    def _start(self) -> None:
        try:
            unpatched.start_thread(self._run)
        except RuntimeError:
            # the system has no thread for it: waiting is better than a leak
            self._run()

    def after_fork_in_child(self) -> None:
        """The child has copies of what still waits: it must not keep a client's connection open.

        The closing thread may have closed the first descriptor just before the fork, and the number may be
        that of another file by now, for example the heartbeat file of this child.
        """
        self._lock = unpatched.lock()
        self._waiting = deque((fd, name) for fd, name in self._waiting if name and _open_file(fd) == name)
        self._start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._runs = False
                    _busy.discard(self)
                    return
                fd, _ = self._waiting[0]
            with suppress(OSError):
                os.close(fd)
            with self._lock:
                self._waiting.popleft()
                self._closing_for = 0.0

    def receive(self, sock: _socket.socket, size: int) -> bytes:
        """Receive bytes from a stream; descriptors that come with them are closed.

        :raises OSError: as ``recv``.
        """
        data, ancillary, _, _ = sock.recvmsg(size, channel.ROOM, socket.MSG_CMSG_CLOEXEC)
        for fd in channel.received_fds(ancillary):
            self.close(fd)
        return bytes(data)

    def close_socket(self, sock: _socket.socket) -> None:
        """Close the master's end of a pair or a client's connection.

        The kernel would close the descriptors in unread messages with the socket, and that may wait, too.
        """
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # nothing more can be sent, so the loop ends
        with suppress(OSError):
            sock.setblocking(False)
            empty = 0
            while empty < _MAX_EMPTY:
                data, ancillary, _, _ = sock.recvmsg(
                    channel.MAX_MESSAGE, channel.ROOM, socket.MSG_CMSG_CLOEXEC
                )
                for fd in channel.received_fds(ancillary):
                    self.close(fd)
                empty += not data
        self.close(sock.detach())


#: the closers that have something to close
_busy: set[Closer] = set()


def _after_fork_in_child() -> None:
    for closer in list(_busy):
        closer.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
