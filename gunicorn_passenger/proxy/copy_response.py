"""Copies a response from the upstream to a client of our own server, chunk by chunk or inside the kernel.

Process: a worker, in the greenlet of the request.
Never: end a truncated response as if it were whole.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import gevent
from werkzeug.http import http_date

from gunicorn_passenger.errors import ClientDisconnected
from gunicorn_passenger.http.chunked import encode_chunk, last_chunk
from gunicorn_passenger.http.downstream_api import DownstreamConnection, DownstreamResponse
from gunicorn_passenger.proxy import splice, wire
from gunicorn_passenger.proxy.events import HandlerFailed
from gunicorn_passenger.proxy.round_trip import RoundTrip

#: How many bytes are spliced before other greenlets run.
_SPLICE_QUANTUM = 4 << 20


def copy_response(
    round_trip: RoundTrip,
    connection: DownstreamConnection,
    status: int,
    reason: str,
    lines: bytes,
    length: int | None,
    dated: bool,
    body: Iterator[bytes] | None,
) -> None:
    """Send a response to the client, to its end.

    :param connection: the client's :class:`~gunicorn_passenger.http.connection.Connection`.
    :param lines: the header lines.
    :param dated: whether a Date is among them.
    :param body: the rest of the body that a handler has left, where a handler had it.
    :raises HandlerFailed: when a handler has read a part of the body whose length was announced.
    :raises ProxyError: when the upstream truncates the response.
    :raises ClientDisconnected: when the client disconnects.
    """
    response = connection.response
    assert response is not None
    if status == 204:
        length = None
    if not dated:
        lines += wire.lines_of([("date", http_date())])  # RFC 9110 section 6.6.1
    line = wire.status_text(status, reason)
    first = round_trip.receive(wait=False) if body is None else b""
    response.sent = len(first)
    unread = not round_trip.sender.started or round_trip.sender.replaced
    if (status >= 400 or round_trip.head.close) and round_trip.sender.is_cut_off:
        response.force_close()  # RFC 9112 section 9.6
    whole = body is None and round_trip.complete and not round_trip.trailers
    response.begin_upstream_response(line, lines, length, first, whole, unread)
    if whole:
        return
    chunked = response.chunked
    if body is None:
        if round_trip.left >= splice.LEAST and splice.available and not response.bodiless:
            _splice(round_trip, connection, response)
        body = round_trip.body()
    for chunk in body:
        if response.bodiless:
            continue
        response.sent += len(chunk)
        connection.send(encode_chunk(chunk) if chunked else chunk)
        connection.share_loop()
    if length is not None and response.sent < length and not response.bodiless:
        raise HandlerFailed("proxy_res: a handler has read a part of the body")
    if chunked:
        connection.send(last_chunk(wire.lines_of(round_trip.trailers)))
    response.mark_sent()


def _splice(round_trip: RoundTrip, connection: DownstreamConnection, response: DownstreamResponse) -> None:
    """Let the kernel move a long body, as far as it can."""
    stream = round_trip.upstream.stream
    if stream.tls or round_trip.upstream.buffer:
        return
    try:
        pipe = splice.pipe()
    except OSError:
        return  # no file descriptors are left: we copy the body
    try:
        source, sink = stream.sock.fileno(), connection.raw_fileno()
        since_switch = 0
        while round_trip.left:
            try:
                count = pipe.fill(source, round_trip.left)
            except BlockingIOError:
                round_trip.wait()
                continue
            except OSError:
                return  # the next read finds out why
            if not count:
                return
            round_trip.count_spliced(count)
            response.sent += count
            connection.count_sent(count)
            try:
                pipe.drain(sink, connection.wait_writable)
            except OSError as error:
                raise ClientDisconnected(
                    error.errno or errno.EPIPE, f"the client disconnected: {error.strerror}"
                ) from None
            since_switch += count
            if since_switch >= _SPLICE_QUANTUM:
                since_switch = 0
                gevent.sleep(0)
    finally:
        pipe.release()
