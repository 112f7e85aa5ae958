"""Reading a request body as it arrives.

Runs in: wherever the proxy is mounted. Must never: collect a body, or read past its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PIECE = 65536


class BrokenOff(Exception):
    """The client has gone before the end of its request."""


def pieces(stream: Any, length: int | None) -> Iterator[bytes]:
    """The body of a WSGI request, in pieces as they come in.

    WSGI's ``read(n)`` waits for all n bytes, so a client that sends a little and waits for the answer
    would wait for ever behind a proxy. gunicorn's body readers know what has come in; they are asked
    where they are there, and ``read`` elsewhere.

    :param length: the Content-Length, or ``None`` for a body that ends itself (chunked).
    """
    reader = getattr(stream, "reader", None)
    if hasattr(reader, "parser"):
        yield from _chunked(reader)
    elif hasattr(reader, "unreader") and hasattr(reader, "length"):
        yield from _measured(reader)
    else:
        left = length
        while left is None or left > 0:
            data = stream.read(PIECE if left is None else min(PIECE, left))
            if not data and left is not None:
                raise BrokenOff(f"{left} bytes of the request body are missing")
            if not data:
                return
            if left is not None:
                left -= len(data)
            yield data


def _chunked(reader: Any) -> Iterator[bytes]:
    """gunicorn's ChunkedReader: its parser yields what each read of the socket brought."""
    if reader.parser is not None:
        yield from (piece for piece in reader.parser if piece)
        reader.parser = None


def _measured(reader: Any) -> Iterator[bytes]:
    """gunicorn's LengthReader: take a read of the socket, put back what belongs to the next request."""
    while reader.length > 0:
        data = reader.unreader.read()
        if not data:
            raise BrokenOff(f"{reader.length} bytes of the request body are missing")
        if len(data) > reader.length:
            reader.unreader.unread(data[reader.length :])
            data = data[: reader.length]
        reader.length -= len(data)
        yield data
