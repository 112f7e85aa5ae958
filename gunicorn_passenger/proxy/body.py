"""Reading a request body as it arrives.

Runs in: wherever the proxy is mounted. Must never: collect a body, or read past its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gunicorn_passenger.errors import ClientDisconnected

PIECE = 65536


class BrokenOff(Exception):
    """The client has gone before the end of its request."""


def pieces(stream: Any, length: int | None) -> Iterator[bytes]:
    """The body of a WSGI request, in pieces as they come in.

    WSGI's ``read(n)`` waits for all n bytes, so a client that sends a little and waits for the answer
    would wait for ever behind a proxy. Our own server and most others can ``read1``: it returns what has
    come in.

    :param length: the Content-Length, or ``None`` for a body that ends itself (chunked).
    :raises BrokenOff: when the client goes before its end.
    """
    read = getattr(stream, "read1", stream.read)
    left = length
    while left is None or left > 0:
        try:
            data = read(PIECE if left is None else min(PIECE, left))
        except ClientDisconnected as error:
            raise BrokenOff(str(error)) from None
        if not data:
            if left is not None:
                raise BrokenOff(f"{left} bytes of the request body are missing")
            return
        if left is not None:
            left -= len(data)
        yield data
