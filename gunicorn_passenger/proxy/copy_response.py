"""An answer of a target, sent over our own connection to the client.

Runs in: a worker, in the request's greenlet. Must never: end an answer that broke off as if it were whole.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import gevent
from werkzeug.http import http_date

from gunicorn_passenger.errors import ClientDisconnected
from gunicorn_passenger.proxy import splice, wire
from gunicorn_passenger.proxy.events import HandlerFailed
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.round_trip import RoundTrip

#: Bytes that are spliced before others get their turn.
_TURN = 4 << 20


def serialize_headers(fields: HeaderList, status: int) -> bytes:
    """The fields of an answer as they are sent."""
    if status == 204:
        # RFC 9110 section 8.6: no Content-Length with 204
        fields = [field for field in fields if field[0].lower() != "content-length"]
    elif status == 426 and any(name.lower() == "upgrade" for name, _ in fields):
        # RFC 9110 section 7.8: a sender of Upgrade names it in Connection
        fields = [*fields, ("connection", "upgrade")]
    return wire.lines_of(fields)


def copy_response(
    exchange: RoundTrip,
    connection: Any,
    status: int,
    reason: str,
    lines: bytes,
    length: int | None,
    dated: bool,
    body: Iterator[bytes] | None,
) -> None:
    """Send it.

    :param connection: the client's :class:`~gunicorn_passenger.http.connection.Connection`.

    :param lines: the fields.
    :param dated: whether a Date is among them.
    :param body: what a handler has left of the body, where there is one.
    """
    response = connection.response
    if status == 204:
        length = None
    if not dated:
        lines += wire.lines_of([("date", http_date())])  # RFC 9110 section 6.6.1
    line = wire.status_text(status, reason)
    first = exchange.receive(wait=False) if body is None else b""
    response.sent = len(first)
    unread = not exchange.upload.begun
    whole = body is None and exchange.complete and not exchange.trailers
    response.relay(line, lines, length, first, whole, unread)
    if whole:
        return
    chunked = response.chunked
    if body is None:
        if exchange.left >= splice.LEAST and splice.available and not response.bodiless:
            _splice(exchange, connection, response)
        body = exchange.body()
    for piece in body:
        if response.bodiless:
            continue
        response.sent += len(piece)
        connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    if length is not None and response.sent < length and not response.bodiless:
        raise HandlerFailed("proxy_res: a handler has read a part of the body")
    if chunked:
        connection.send(b"0\r\n%b\r\n" % wire.lines_of(exchange.trailers))
    response.relayed()


def _splice(exchange: RoundTrip, connection: Any, response: Any) -> None:
    """Let the kernel move a long body, as far as it can."""
    stream = exchange.link.stream
    if stream.tls or exchange.link.buf:
        return
    try:
        pipe = splice.pipe()
    except OSError:
        return  # no descriptors: it is copied then
    try:
        source, sink = stream.sock.fileno(), connection.raw_fileno()
        turn = 0
        while exchange.left:
            try:
                count = pipe.fill(source, exchange.left)
            except BlockingIOError:
                exchange.wait()
                continue
            except OSError:
                return  # who reads finds out why
            if not count:
                return
            exchange.moved(count)
            response.sent += count
            connection.count_sent(count)
            try:
                pipe.drain(sink, connection.wait_writable)
            except OSError as error:
                raise ClientDisconnected(
                    error.errno or errno.EPIPE, f"the client has gone: {error.strerror}"
                ) from None
            turn += count
            if turn >= _TURN:
                turn = 0
                gevent.sleep(0)
    finally:
        pipe.done()
