"""A request that asked for another protocol, and a target that agreed: the connection becomes a tunnel.

Runs in: a gevent worker, in the request's greenlet. Must never: lose bytes that either side has sent
already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gevent import get_hub
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import BadResponse
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.response_head import ResponseHead
from gunicorn_passenger.proxy.round_trip import RoundTrip
from gunicorn_passenger.proxy.tunnel import Tunnel, bridge

if TYPE_CHECKING:
    from gunicorn_passenger.proxy.forward import ForwardedRequest


def carry(passage: ForwardedRequest, head: ResponseHead) -> Iterable[bytes]:
    """Send the 101 to the client, and pass bytes until both sides have had enough."""
    agreed = rules.protocols(head.upgrade)
    if not agreed <= rules.protocols(passage.fields.upgrade) or "" in agreed:
        raise BadResponse(f"it switches to {head.upgrade[:40]!r}, which nobody asked for")
    exchange = passage.exchange
    assert exchange is not None
    upload = exchange.upload
    upload.stop()
    if not upload.over and upload.held is None:
        raise BadResponse("it switches protocols before the request is over")
    environ = passage.environ
    client = environ.get("gunicorn.socket")
    options = passage.options
    fields = head.fields
    if options.via:
        fields = rules.with_via(fields, options, head.version)
    lines = wire.lines_of(fields)
    answer = b"%b%b%b\r\n" % (
        wire.status_line(101, head.reason or "Switching Protocols"),
        lines,
        wire.lines_of([("Connection", "Upgrade"), ("Upgrade", head.upgrade)]),
    )

    tunnel = Tunnel(
        passage.target, passage.werkzeug_request, options.ws_timeout, options.ws_stop, "websocket" in agreed
    )
    passage.events.emit("open", tunnel)
    try:
        _join(tunnel, exchange, client, answer, f"101 {head.reason}", lines.decode("latin-1"))
    finally:
        passage.tunnel_over(tunnel)
    return () if getattr(client, "connection", None) is not None else ALREADY_HANDLED


def _join(tunnel: Tunnel, exchange: RoundTrip, client: Any, answer: bytes, status: str, lines: str) -> None:
    """Run a tunnel between the two connections, and end that to the target.

    :param client: ``gunicorn.socket``.
    :param answer: the head that the client gets, and its parts for hooks and log.
    """
    with contextlib.ExitStack() as stack:
        link = exchange.detach()
        stack.callback(exchange.pool.drop, link)
        upstream, upstream_early = link.stream.sock, link.buf
        link.buf = b""
        if link.stream.tls:
            upstream, end = bridge(link.stream.recv, link.stream.send, link.stream.finish)
            stack.callback(end)
        near, early = client._sock, b""
        connection = getattr(client, "connection", None)
        if connection is not None:
            early = connection.hijack(answer, status, lines)
            connection.leaving = tunnel.leave
            stack.callback(setattr, connection, "leaving", None)
            if connection.gateway.closing or not connection.gateway.worker.alive:
                get_hub().loop.run_callback(tunnel.leave)
        else:
            client.sendall(answer)
            if hasattr(client, "context"):  # TLS
                near, end = bridge(client.recv, client.sendall, client.close)
                stack.callback(end)
        if connection is not None:
            stack.callback(lambda: connection.count_sent(tunnel.bytes_out))
        if not tunnel.closed:
            tunnel.run(near, early, upstream, upstream_early)
