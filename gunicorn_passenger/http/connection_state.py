"""What a connection is doing, and what it may do next.

Process: a serving process.
Never: decide anything. The connection changes its state, and other objects read it.

=========  ==============================================================  ===================================
state      meaning                                                         next
=========  ==============================================================  ===================================
NEW        accepted; its greenlet has not run                              ACTIVE, CLOSED
ACTIVE     its greenlet reads a request or sends a response, or is about   IDLE, PARKED, UPGRADED, FLUSHING,
           to: the hub has received the request                            LINGERING, CLOSED
IDLE       its greenlet waits for the next request                         ACTIVE, PARKED, CLOSED
PARKED     the hub waits for the next request, without a greenlet          ACTIVE, CLOSED
UPGRADED   the proxy tunnels another protocol. While an application        LINGERING, CLOSED
           speaks one over the socket, the connection stays ACTIVE
FLUSHING   the last response waits for the coalescer, without a greenlet   CLOSED
LINGERING  the response is sent; what the client still sends is discarded  CLOSED
           (RFC 9112 section 9.6)
CLOSED     its socket is closed, or has another owner
=========  ==============================================================  ===================================

Python's development mode (``python -X dev``) checks each transition.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class ConnectionState(Enum):
    NEW = "new"
    ACTIVE = "active"
    IDLE = "idle"
    PARKED = "parked"
    UPGRADED = "upgraded"
    FLUSHING = "flushing"
    LINGERING = "lingering"
    CLOSED = "closed"


_S = ConnectionState
#: The table above.
TRANSITIONS: dict[ConnectionState, frozenset[ConnectionState]] = {
    _S.NEW: frozenset({_S.ACTIVE, _S.CLOSED}),
    _S.ACTIVE: frozenset({_S.IDLE, _S.PARKED, _S.UPGRADED, _S.FLUSHING, _S.LINGERING, _S.CLOSED}),
    _S.IDLE: frozenset({_S.ACTIVE, _S.PARKED, _S.CLOSED}),
    _S.PARKED: frozenset({_S.ACTIVE, _S.CLOSED}),
    _S.UPGRADED: frozenset({_S.LINGERING, _S.CLOSED}),
    _S.FLUSHING: frozenset({_S.CLOSED}),
    _S.LINGERING: frozenset({_S.CLOSED}),
    _S.CLOSED: frozenset(),
}


def set_checked(connection: Any, name: str, value: Any) -> None:
    """``__setattr__`` of a connection in development mode.

    :raises AssertionError: for a transition that is not in the table.
    """
    if name == "state":
        before = getattr(connection, "state", None)
        if before is not None and value is not before and value not in TRANSITIONS[before]:
            raise AssertionError(f"a connection went from {before.value} to {value.value}")
    object.__setattr__(connection, name, value)
