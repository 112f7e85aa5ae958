"""Executes a plan: sends the request to its target, and the response to the client.

Process: any process in which the proxy is mounted, in the greenlet or thread of the request.
Never: send what was not checked, or repeat a request that may be executed only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gunicorn_passenger.errors import (
    BadResponse,
    PoolExhausted,
    ProxyError,
    UpstreamClosed,
    UpstreamRefused,
    UpstreamTimeout,
)
from gunicorn_passenger.http.response import RESPONSE_SENT
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import rewrite, sticky, upgrade, wire
from gunicorn_passenger.proxy.copy_response import copy_response
from gunicorn_passenger.proxy.events import HandlerFailed, UpstreamResponse, check_reason, checked
from gunicorn_passenger.proxy.forwarded_request import ForwardedRequest
from gunicorn_passenger.proxy.plan import ForwardPlan, plan_next_target, resolve
from gunicorn_passenger.proxy.redirects import REDIRECTS, Redirects
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.response_head import (
    ResponseHead,
    parse_response_head,
    serialize_headers,
    wire_head,
)
from gunicorn_passenger.proxy.round_trip import IDEMPOTENT, RoundTrip, closed_by_upstream, no_response_in
from gunicorn_passenger.proxy.upstream_request import expects_continue
from gunicorn_passenger.proxy.wait_errors import DownstreamDisconnected, WaitTimeout


def execute(  # noqa: PLR0915 - one function, so that the common case needs no other
    plan: ForwardPlan, request: ForwardedRequest
) -> Iterable[bytes]:
    """Send a request as planned, and its response to the client.

    The common case comes first, with local variables alone: a connection, a request that is sent as a whole,
    and a response that has come as a whole with the first read. Everything else is below it.

    :returns: the body of the response, or ``RESPONSE_SENT``.
    :raises Exception: what :meth:`ForwardedRequest.end_with` makes a response of.
    """
    connection = request.connection
    new = False
    redirects: Redirects | None = None
    client = request.downstream if connection is None else connection
    while True:
        pool = plan.pool
        try:
            upstream = request.upstream = pool.acquire(new, request.waits, client)
        except (UpstreamRefused, UpstreamTimeout, PoolExhausted) as error:
            if redirects is not None:
                raise
            plan, new = plan_next_target(request, error), False
            continue
        stream = upstream.stream
        message = request.request_line + plan.header_lines
        expect = in_parts = False
        if request.sender.length:
            expect = expects_continue(request)
            body = b"" if expect else request.sender.take_small()
            in_parts = not body
            message += body
        received: bytes | None = b""
        failure: ProxyError | None = None
        if not in_parts:
            options = plan.options
            try:
                received = stream.request(message, options.upstream_timeout, client)
            except UpstreamTimeout as error:
                failure = error
            except WaitTimeout:
                failure = no_response_in(options.upstream_timeout)
            except OSError as error:
                failure = closed_by_upstream("before it responded", error)
            if received is None:
                if upstream.reused:
                    # it came before the request was sent: it is not a response to that
                    request.upstream = None
                    pool.discard(upstream)
                    continue
                received = b""
            elif (
                received
                and request.copies_response
                and connection is not None
                and not request.proxy.events.any
            ):
                last = pool.last_head
                if last is not None and received.startswith(last.data) and last.keep_case is plan.keep_case:
                    known: ResponseHead | None = last.head
                    end = len(last.data)
                else:
                    end = received.find(b"\r\n\r\n") + 4
                    known = parse_response_head(pool, received[:end], plan.keep_case) if end > 3 else None
                if known is not None and known.length == len(received) - end:
                    whole = wire_head(known) if known.wire is None else known.wire
                    if whole:
                        if request.backend is not None:
                            request.backend.failed_until = 0.0
                            request.leave_backend()
                        request.upstream = None
                        pool.release(upstream)
                        response = connection.response
                        assert response is not None
                        response.send_upstream_response(known, whole, received[end:])
                        return RESPONSE_SENT
        upstream.buffer = received or b""
        round_trip = request.round_trip = RoundTrip(
            upstream,
            plan.options,
            request.method,
            request.downstream,
            request.sender,
            plan.upgrades,
        )
        try:
            if failure is not None:
                raise failure
            if in_parts:
                round_trip.send_in_parts(message, expect)
            head = round_trip.read_head(expect)
            unwanted = _may_try_next(request, round_trip, head.status)
            rejected: ProxyError | None = BadResponse(f"it responded with {head.line}") if unwanted else None
        except (UpstreamClosed, UpstreamTimeout, BadResponse) as error:
            if isinstance(error, UpstreamClosed) and round_trip.may_repeat():
                round_trip.drop()
                request.round_trip = request.upstream = None
                new = True
                continue
            if not _may_try_next(request, round_trip, error.status_code):
                raise
            rejected = error
        if rejected is not None:
            round_trip.drop()
            request.round_trip = request.upstream = None
            plan, new = plan_next_target(request, rejected), False
            continue
        backend = request.backend
        if backend is not None and redirects is None:
            backend.failed_until = 0.0
            if request.options.sticky and backend.id and backend.id != request.sticky_id:
                request.new_cookie = sticky.set_cookie(
                    request.options.sticky_name, backend.id, request.forwarded_info.scheme
                )
        if request.options.follow_redirects and head.status in REDIRECTS:
            redirects = redirects or Redirects(plan)
            followed = redirects.follow(request, plan, round_trip, head)
            if followed is not None:
                plan, new = followed, False
                continue
        if head.status == 101:
            return _tunnel(request, round_trip, head)
        return _respond(plan, request, round_trip, head)


def _may_try_next(request: ForwardedRequest, round_trip: RoundTrip, status: int) -> bool:
    """Whether the next target may get the request, after this one has failed with a status.

    Only an idempotent request may be executed twice (RFC 9110 section 9.2.2), and only with its whole body.
    """
    return (
        status in request.options.retry_statuses
        and bool(request.backends)
        and round_trip.method in IDEMPOTENT
        and request.sender.replayable
    )


def _tunnel(request: ForwardedRequest, round_trip: RoundTrip, head: ResponseHead) -> Iterable[bytes]:
    """Make the two connections a tunnel, and wait for its end."""
    tunnel = upgrade.make_tunnel(
        head, request.headers.upgrade, round_trip, request.target, request.options, request.werkzeug_request
    )
    request.proxy.events.emit("open", tunnel)
    try:
        return upgrade.run(tunnel, head, round_trip, request.environ["gunicorn.socket"], request.options)
    finally:
        request.tunnel_closed(tunnel)


def _respond(
    plan: ForwardPlan, request: ForwardedRequest, round_trip: RoundTrip, head: ResponseHead
) -> Iterable[bytes]:
    """Send the response, with the changes that the options and the handlers make."""
    options = request.options
    events = request.proxy.events
    connection = request.connection
    # a handler may have asked for the head alone
    headless = round_trip.method == "HEAD" and request.downstream.method != "HEAD"
    prefix = request.forwarded_info.prefix
    plain = options.plain_response and not (options.via or options.self_handle_response or prefix)
    changes = not plain or request.new_cookie or events.any or headless
    if connection is not None and not changes:
        # the lines are made once for equal heads
        if head.lines is None:
            head.lines = serialize_headers(head.headers, head.status)
        copy_response(
            round_trip, connection, head.status, head.reason, head.lines, head.length, head.dated, None
        )
        request.complete()
        return RESPONSE_SENT
    target = request.target
    assert target is not None
    headers = head.headers
    status, reason = head.status, head.reason
    body: Iterator[bytes] | None = None
    if events.has("proxy_res"):
        response = UpstreamResponse(status, reason, headers, target, round_trip.body())
        request.upstream_response = response
        made = events.emit("proxy_res", response, request.werkzeug_request())
        if options.self_handle_response:
            return _handled(request, made)
        headers = _changed(response, head)
        status, reason = response.status_code, response.reason
        body = response.left()
    elif options.self_handle_response:
        raise HandlerFailed("self_handle_response is set, and 'proxy_res' has no handler")
    elif events.has("end"):
        request.upstream_response = UpstreamResponse(status, reason, headers, target, round_trip.body())
    if prefix or not options.plain_response:
        headers = rewrite.rewrite_headers(
            headers, status, options, resolve(request, target), request.forwarded_info
        )
    if options.via:
        headers = rules.with_via(headers, options, head.version)
    if request.new_cookie:
        headers = [*headers, ("set-cookie", request.new_cookie)]
    length = head.length
    if headless and status not in (204, 304):
        headers = [header for header in headers if header[0].lower() != "content-length"]
        headers.append(("content-length", "0"))
        length = 0
    if connection is not None:
        dated = any(name.lower() == "date" for name, _ in headers)
        copy_response(
            round_trip, connection, status, reason, serialize_headers(headers, status), length, dated, body
        )
        request.complete()
        return RESPONSE_SENT
    return _respond_through_wsgi(
        request, status, reason, headers, body if body is not None else round_trip.body()
    )


def _respond_through_wsgi(
    request: ForwardedRequest, status: int, reason: str, headers: HeaderList, body: Iterator[bytes]
) -> Iterable[bytes]:
    """Give the response to the WSGI server."""
    drop = {"trailer", "upgrade"}  # WSGI leaves the headers of the connection to the server
    if str(request.environ.get("SERVER_SOFTWARE", "")).startswith("gunicorn"):
        drop |= {"date", "server"}  # gunicorn writes its own
    if status == 204:
        drop.add("content-length")
    headers = wire.checked([header for header in headers if header[0].lower() not in drop])
    request.start_response(wire.status_text(status, reason or "Unknown"), headers)
    request.response_started = True
    return _WsgiBody(request, body)


def _handled(request: ForwardedRequest, made: Any) -> Iterable[bytes]:
    """Send the response that a handler has made."""
    if made is None:
        raise HandlerFailed("self_handle_response is set, and no handler of 'proxy_res' returned a response")
    if not callable(made):
        raise HandlerFailed(f"a handler of 'proxy_res' returned {made!r}, which is not a response")
    application: Callable[..., Iterable[bytes]] = made
    return _WsgiBody(request, application(request.environ, request.note_start), keeps_upstream=True)


def _changed(response: UpstreamResponse, head: ResponseHead) -> HeaderList:
    """The headers of a response after the handlers; its framing stays.

    :raises HandlerFailed: when a handler has left what cannot be sent.
    """
    status = response.status_code
    if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 999:
        raise HandlerFailed(f"proxy_res: the status {status!r} is not a number from 200 to 999")
    check_reason(response.reason)
    headers = [
        (name, value)
        for name, value in checked(response.headers, "proxy_res")
        if name.lower() not in rules.ASIDE
        or name.lower() == "trailer"
        or (name.lower() == "upgrade" and status == 426)
    ]
    if head.length is not None:
        headers.append(("content-length", str(head.length)))
    return headers


class _WsgiBody:
    """The body of a response for a WSGI server; closing it ends the request."""

    def __init__(
        self, request: ForwardedRequest, body: Iterable[bytes], keeps_upstream: bool = False
    ) -> None:
        """
        :param keeps_upstream: whether the connection to the upstream is kept when the server closes the body
            before its end.
        """
        self._request = request
        self._body = body
        self._chunks = self._send()
        self._keeps_upstream = keeps_upstream
        #: whether the response is whole, while the client is still sending its request
        self._ends_early = False

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def _send(self) -> Iterator[bytes]:
        """
        :raises TruncatedResponse: when the body is truncated: the server then has to end the connection, so
            that the client does not take it for whole.
        """
        try:
            yield from self._body
        except ProxyError as error:
            yield from self._request.end_with(error)
            return
        except DownstreamDisconnected as error:
            raise self._request.client_gone(error) from None
        if self._request.sender.sent:
            self._request.complete()
        else:
            # The end waits for the client: the server must be able to send its last chunk before.
            self._ends_early = True

    def close(self) -> None:
        """End the request, even when the body was not read to its end."""
        try:
            self._chunks.close()  # type: ignore[attr-defined]
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
            if self._ends_early:
                self._request.complete()
        finally:
            self._request.end(broken=not self._keeps_upstream)
