"""What the requests of Engine.IO's clients say of their session.

Process: a worker. It does no I/O.
Never: trust a request for more than when its connection is closed.
"""

from __future__ import annotations

import re

_SESSION = re.compile(rb"(?=\S*\bEIO=[0-9])\S*\bsid=")


def is_upgrade(target: bytes) -> bool:
    """Whether a request for a WebSocket carries on a session that began by polling.

    Its client sends a probe and waits for the reply. A client of python-engineio that gets a Close frame in
    its place stays without a session for ever. So the server sends a frame before it closes the WebSocket.

    :param target: the request target or its query, or the rest of the header section with it.
    """
    return _SESSION.match(target) is not None
