"""What a request of an Engine.IO client says about its session.

Process: a serving process. It does no I/O.
Never: trust a request for more than when its connection is closed.
"""

from __future__ import annotations

import re

_SESSION = re.compile(rb"(?=\S*\bEIO=[0-9])\S*\bsid=")
#: before version 4, a server sends both packets unasked
_NEW_SESSION = re.compile(rb"\S*\bEIO=4\b")


def sends_before_close(target: bytes) -> int:
    """How often the server has to send something over a WebSocket before it may send a Close frame.

    0 without Engine.IO. 1 for a WebSocket that carries on a session which began by polling: its client sends
    a probe and waits for the reply, and one of python-engineio's that gets a Close frame in its place stays
    without a session for ever. 2 for a new session, which begins with a packet of Engine.IO and one of
    Socket.IO: a client of python-socketio would wait a second in vain for the latter. It does not come if the
    client does not speak Socket.IO: after a while, the first one is enough.

    :param target: the request target or its query, or the rest of the header section with it.
    """
    if _SESSION.match(target):
        return 1
    return 2 if _NEW_SESSION.match(target) else 0
