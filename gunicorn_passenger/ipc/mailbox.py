"""The mailboxes of the workers: packets from any sibling to one worker, not through the master.

Process: the master, which makes them, and the workers, which read their own and write to those of siblings.
Never: wait, or decide what a packet means.

- A mailbox is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socketpair. One worker reads the receiving end, which stays
  open in the master: what a killed worker has not read is not lost. All siblings share the sending end.
- The kernel bounds a mailbox by the send buffer of its sending end (socket(7), ``SO_SNDBUF``). A sender that
  finds no room does not wait.
- A packet is a letter for its kind, a name, a zero byte and the data. More than ``MAX_INLINE`` bytes of data
  are in a sealed file in memory, the last descriptor; then the letter is in upper case.
"""

from __future__ import annotations

import _socket
import array
import fcntl
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from gunicorn_passenger.ipc import channel

#: An accepted connection: the name is that of its server, the data what was read of the request. The
#: descriptors are the connection and its claim (see :func:`make_claim`).
CONNECTION = "c"
#: A message: the name is its topic.
MESSAGE = "m"
_KINDS = CONNECTION + MESSAGE

#: Bytes of data in a packet.
MAX_INLINE = 8192
#: Bytes of data in a file.
MAX_DATA = 64 << 20
#: Bytes of a name.
MAX_NAME = 512
#: Bytes of a packet.
MAX_PACKET = 1 + MAX_NAME + 1 + MAX_INLINE
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
#: The largest count of an eventfd (eventfd(2)): it is writable again once the count has been read.
_UNCLAIMED = (1 << 64) - 2
#: The count that says what a worker has decided. Between its two steps the count is 0.
_CLAIMED, _REFUSED = 1, 2


class MailboxFull(Exception):
    """The mailbox has no room, or the kernel has none for more descriptors on their way."""


class MailboxGone(Exception):
    """The worker that reads the mailbox has exited."""


class Packet(NamedTuple):
    """A packet as it was received; the receiver owns the descriptors."""

    kind: str
    name: str
    data: bytes
    fds: list[int]


def pair() -> tuple[_socket.socket, _socket.socket]:
    """A mailbox: the receiving and the sending end."""
    receiving, sending = _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # One way only: no process reads the sending end. What the receiver put there, the master would close in
    # the end, and that may wait (see master/descriptors.py).
    sending.shutdown(socket.SHUT_RD)
    return receiving, sending


# --- sending ----------------------------------------------------------------------------------


def post(sock: _socket.socket, kind: str, name: str, data: bytes, fds: Sequence[int] = ()) -> None:
    """Put a packet into a mailbox.

    :param sock: the sending end.
    :param fds: remain the caller's.
    :raises MailboxFull: when it has no room now.
    :raises MailboxGone: when no worker reads it any more.
    :raises ValueError: when the name or the data is too long.
    """
    packet, files = pack(kind, name, data)
    try:
        forward(sock, packet, [*fds, *files])
    finally:
        for file in files:
            os.close(file)


def pack(kind: str, name: str, data: bytes) -> tuple[bytes, list[int]]:
    """The packet for :func:`forward`, for any number of mailboxes.

    :returns: the packet, and the descriptors that belong to it, which the caller owns.
    :raises MailboxFull: when the system has no memory or no descriptor for large data.
    :raises ValueError: when the name or the data is too long.
    """
    title = name.encode()
    if len(title) > MAX_NAME or b"\0" in title:
        raise ValueError(f"{name[:100]!r} has more than {MAX_NAME} bytes, or a zero byte")
    if len(data) <= MAX_INLINE:
        return b"%b%b\0%b" % (kind.encode(), title, data), []
    if len(data) > MAX_DATA:
        raise ValueError(f"{len(data)} bytes are more than the {MAX_DATA} that siblings pass each other")
    return b"%b%b\0" % (kind.upper().encode(), title), [_sealed_file(data)]


def forward(sock: _socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    """Put a packet into a mailbox as it is.

    :raises MailboxFull: as :func:`post`.
    :raises MailboxGone: as :func:`post`.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        raise MailboxGone from None
    except OSError as error:
        # EAGAIN; ENOBUFS; ETOOMANYREFS, when too many descriptors of this user are on their way (unix(7))
        raise MailboxFull(error.strerror) from None


def _sealed_file(data: bytes) -> int:
    """A file in memory that no process can change; the caller owns the descriptor.

    :raises MailboxFull: when the system has no memory or no descriptor for it.
    """
    try:
        fd = os.memfd_create("gunicorn-passenger-packet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise MailboxFull(error.strerror) from None
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise MailboxFull(error.strerror) from None
    return fd


# --- receiving --------------------------------------------------------------------------------


def take(sock: _socket.socket, close: Callable[[int], object] = os.close) -> tuple[bytes, list[int]] | None:
    """Take the next packet out of a mailbox, as :func:`forward` puts it into another.

    :param sock: the receiving end.
    :param close: closes the descriptors of a packet that is cut off or empty.
    :returns: the packet and its descriptors, which the caller owns; ``None`` at the end of the mailbox.
    :raises BlockingIOError: when it is empty.
    """
    while True:
        packet, ancillary, flags, _ = sock.recvmsg(
            MAX_PACKET, channel.ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        fds = channel.received_fds(ancillary)
        if packet and not flags & socket.MSG_TRUNC:
            return bytes(packet), fds
        for fd in fds:
            close(fd)
        if not (packet or fds):
            return None


def unpack(packet: bytes, fds: list[int]) -> Packet | None:
    """What a packet says.

    :param fds: its descriptors. The caller owns those of the result; in all other cases they are closed.
    :returns: ``None`` for a packet that is not one of this version, or whose descriptors did not arrive.
    """
    kind, (name, zero, data) = packet[:1].decode("latin-1"), packet[1:].partition(b"\0")
    with suppress(UnicodeDecodeError, OSError, ValueError):
        if kind.lower() in _KINDS and zero:
            if kind.isupper():
                data = _read_sealed(fds[-1] if fds else -1)
                os.close(fds.pop())
            if len(fds) == (2 if kind.lower() == CONNECTION else 0):
                return Packet(kind.lower(), name.decode(), data, fds)
    for fd in fds:
        os.close(fd)
    return None


def _read_sealed(fd: int) -> bytes:
    """The content of a file that :func:`_sealed_file` has made. Reading another file might block.

    :raises OSError: when it is not a file in memory.
    :raises ValueError: when it could still change, or is too long.
    """
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise ValueError("not sealed")
    size = os.fstat(fd).st_size
    if size > MAX_DATA:
        raise ValueError("too long")
    return os.pread(fd, size, 0)


# --- claims -----------------------------------------------------------------------------------


def make_claim() -> int:
    """The right to serve a connection, which one worker can claim, once; the caller owns the descriptor.

    It becomes writable when it is claimed or refused.
    """
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.eventfd_write(fd, _UNCLAIMED)
    return fd


def claim(fd: int) -> bool:
    """Claim a connection.

    :returns: whether the caller serves it from now on; false when another worker does.
    """
    return _settle(fd, _CLAIMED)


def refuse(fd: int) -> None:
    """Leave a connection to the worker that has sent it."""
    _settle(fd, _REFUSED)


def _settle(fd: int, outcome: int) -> bool:
    try:
        if os.eventfd_read(fd) != _UNCLAIMED:
            return False
        os.eventfd_write(fd, outcome)
    except OSError:
        return False
    return True


def take_back(fd: int) -> bool | None:
    """Claim a connection that the caller has sent.

    :returns: whether the caller serves it from now on; ``None`` when another worker is about to decide that.
    """
    try:
        return os.eventfd_read(fd) != _CLAIMED
    except BlockingIOError:
        return None
