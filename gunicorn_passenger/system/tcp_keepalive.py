"""TCP keepalive: the kernel notices a peer that vanished without closing its connection.

Process: a worker, or plain Python.
Never: apply to UNIX sockets, whose peers cannot vanish.

Without it, a client that lost its network holds its WebSocket or long response forever.
"""

from __future__ import annotations

import _socket
import socket

#: Seconds without traffic until the kernel sends the first probe (RFC 9293 section 3.8.4), seconds between
#: two probes, and how many may remain without a reply. A vanished peer is noticed after two minutes.
_IDLE, _INTERVAL, _PROBES = 60, 15, 4


def enable_tcp_keepalive(sock: _socket.socket) -> None:
    """Turn on TCP keepalive. On Linux, connections accepted from a listening socket inherit the options.

    :param sock: a connection, or a listening socket; one that is not TCP is left alone.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
