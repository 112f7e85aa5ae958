"""The process at the other end of a UNIX socket.

Process: the master and the command line. Never: trust what the peer itself says.
"""

from __future__ import annotations

import _socket
import socket
import struct
from typing import NamedTuple


class PeerCredentials(NamedTuple):
    """The peer as the kernel knew it when it connected or listened (``SO_PEERCRED``, unix(7))."""

    pid: int
    uid: int
    gid: int


def peercred(sock: _socket.socket) -> PeerCredentials:
    """
    :param sock: a connected UNIX socket.
    :raises OSError: when the kernel does not know the peer.
    """
    size = struct.calcsize("iII")
    return PeerCredentials(
        *struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    )
