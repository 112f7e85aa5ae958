"""What the requests of Engine.IO's clients say of their session.

Process: a worker. It does no I/O.
Never: trust a request for more than when its connection is closed.
"""

from __future__ import annotations

import re

_ENGINE_IO = re.compile(rb"\S*\bEIO=[0-9]")
_SESSION = re.compile(rb"\S*\bsid=")


def sends_before_close(target: bytes) -> int:
    """How often the server has to send something over a WebSocket before it may send a Close frame.

    0 without Engine.IO. 1 for a WebSocket that carries on a session which began by polling: its client sends
    a probe and waits for the reply, and one of python-engineio's that gets a Close frame in its place stays
    without a session for ever. 2 for a new session, which begins with a packet of Engine.IO and one of
    Socket.IO: a client of python-socketio would wait a second in vain for the latter.

    :param target: the request target or its query, or the rest of the header section with it.
    """
    if not _ENGINE_IO.match(target):
        return 0
    return 1 if _SESSION.match(target) else 2
