"""Joins the two connections of an upgraded request: the upstream has agreed to another protocol.

Process: a gevent worker, in the greenlet of the request.
Never: lose bytes that either side has sent already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from gevent import get_hub
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import BadResponse
from gunicorn_passenger.http.downstream_api import DownstreamConnection
from gunicorn_passenger.http.response import RESPONSE_SENT
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.response_head import ResponseHead
from gunicorn_passenger.proxy.round_trip import RoundTrip
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.tunnel import Tunnel, tls_bridge


def make_tunnel(
    head: ResponseHead,
    requested: str,
    round_trip: RoundTrip,
    target: Target | None,
    options: Options,
    make_request: Callable[[], Any],
) -> Tunnel:
    """The tunnel for an upgrade that the upstream has agreed to.

    :param head: of the response with status 101.
    :param requested: the ``Upgrade`` of the request.
    :param make_request: gives the request for the program's handlers.
    :raises BadResponse: when the upstream switches to a protocol other than the requested one, or too early.
    """
    agreed = rules.protocols(head.upgrade)
    if not agreed <= rules.protocols(requested) or "" in agreed:
        raise BadResponse(f"it switches to {head.upgrade[:40]!r}, which the request did not ask for")
    sender = round_trip.sender
    sender.join()
    if not sender.sent:
        raise BadResponse("it switches protocols before the request is over")
    return Tunnel(target, make_request, options.ws_timeout, options.ws_stop, "websocket" in agreed)


def run(
    tunnel: Tunnel, head: ResponseHead, round_trip: RoundTrip, client: Any, options: Options
) -> Iterable[bytes]:
    """Send the 101 to the client, and pass bytes until both sides have ended.

    :param client: ``gunicorn.socket``.
    :returns: what the WSGI application returns.
    """
    headers = head.headers
    if options.via:
        headers = rules.with_via(headers, options, head.version)
    lines = wire.lines_of(headers)
    response = b"%b%b%b\r\n" % (
        wire.status_line(101, head.reason or "Switching Protocols"),
        lines,
        wire.lines_of([("Connection", "Upgrade"), ("Upgrade", head.upgrade)]),
    )
    connection: DownstreamConnection | None = getattr(client, "connection", None)
    with contextlib.ExitStack() as stack:
        upstream = round_trip.detach()
        stack.callback(round_trip.pool.discard, upstream)
        far, far_early = upstream.stream.sock, upstream.buffer
        upstream.buffer = b""
        if upstream.stream.tls:
            far, end = tls_bridge(upstream.stream.recv, upstream.stream.send, upstream.stream.shutdown_write)
            stack.callback(end)
        near, early = client._sock, b""
        if connection is not None:
            early = connection.hijack(response, f"101 {head.reason}", lines.decode("latin-1"))
            connection.on_drain = tunnel.begin_shutdown
            stack.callback(setattr, connection, "on_drain", None)
            if connection.listener.closing or not connection.listener.worker.alive:
                get_hub().loop.run_callback(tunnel.begin_shutdown)
            stack.callback(lambda: connection.count_sent(tunnel.bytes_out))
        else:
            client.sendall(response)
            if hasattr(client, "context"):  # TLS
                near, end = tls_bridge(client.recv, client.sendall, client.close)
                stack.callback(end)
        if not tunnel.closed:
            tunnel.run(near, early, far, far_early)
    return RESPONSE_SENT if connection is not None else ALREADY_HANDLED
