"""TCP ports for tests, reserved against the other test processes of this machine."""

from __future__ import annotations

import os
import socket

#: Abstract UNIX sockets that reserve the ports this test process was given: other test processes of the
#: machine see them, and they are gone with the process.
_reserved: dict[int, socket.socket] = {}

#: How many ports a test process keeps for itself: each costs it a descriptor.
_RESERVED = 300


def _reserve(port: int) -> bool:
    """Take a port for this test process, if no other process holds it on any address."""
    if port in _reserved:
        return False
    token = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        token.bind(f"\0gunicorn-passenger-test-port-{port}")
        with socket.socket(socket.AF_INET6) as probe:
            # without SO_REUSEADDR, so that a port on which connections are in TIME_WAIT is not given out:
            # tests bind these ports without it, too
            probe.bind(("::", port))
    except OSError:
        token.close()
        return False
    _reserved[port] = token
    if len(_reserved) > _RESERVED:
        # it has long been used: a server listens there, or its test is over, or another process keeps the token
        _reserved.pop(next(iter(_reserved)))
    return True


def reservation_of(port: int) -> socket.socket:
    """What reserves a port that was given out just now, for as long as it is kept."""
    return _reserved[port]


def free_port() -> int:
    """A TCP port that no process holds, below the range that the kernel gives to clients."""
    return free_range(1)


def free_range(count: int) -> int:
    """The first of ``count`` such ports in a row."""
    while True:
        first = 10240 + int.from_bytes(os.urandom(2), "big") % 20000
        if all(_reserve(port) for port in range(first, first + count)):
            return first
