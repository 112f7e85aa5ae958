"""Plans how a request is forwarded: its target, the headers for that, and the pool of connections.

Process: any process in which the proxy is mounted, in the greenlet or thread of the request.
Never: send anything to the target. That is the executor's part (:mod:`~.forward`).

A client mostly sends the same headers again. The connection keeps the plan with them; while the headers
repeat and nothing else can change the plan, :func:`remembered_plan` returns it and decides nothing again. If
the headers are new, but all of the kind that is forwarded as it is, it only exchanges them.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from gunicorn_passenger.errors import PoolExhausted, ProxyError, UpstreamRefused
from gunicorn_passenger.http.body import EMPTY_BODY
from gunicorn_passenger.http.chunked import CHUNKED
from gunicorn_passenger.http.downstream_api import DownstreamConnection, ParsedHeaders
from gunicorn_passenger.proxy import health, sticky, wire
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy.downstream import WsgiDownstream, is_sole_app
from gunicorn_passenger.proxy.events import HandlerFailed, UpstreamRequest
from gunicorn_passenger.proxy.forwarded_request import ForwardedRequest, LocalResponse, ProxyContext
from gunicorn_passenger.proxy.log import log
from gunicorn_passenger.proxy.mirror import MirroredRequest
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.plain_headers import forwards_plainly, plain_lines
from gunicorn_passenger.proxy.pool import Pool
from gunicorn_passenger.proxy.request_body import NO_BODY_SENDER, RequestBodySender
from gunicorn_passenger.proxy.request_headers import ForwardedInfo, RequestHeaders
from gunicorn_passenger.proxy.request_target import BadTarget, request_path, rewritten_path, target_path
from gunicorn_passenger.proxy.routes import Backend, Route
from gunicorn_passenger.proxy.target import Target, server_target
from gunicorn_passenger.proxy.upstream_request import (
    checked_lines,
    checked_request,
    expects_continue,
    replace_body,
    serialize,
    upstream_headers,
)

_PATH_SAFE = "/:@!$&'()*+,;=~-._"


class ForwardPlan:
    """How requests with certain headers are forwarded to one target."""

    __slots__ = (
        "forwarded_info",
        "header_lines",
        "headers",
        "keep_case",
        "max_idle",
        "options",
        "pool",
        "repeatable",
        "reusable",
        "target",
        "upgrades",
    )

    def __init__(
        self,
        options: Options,
        target: Target,
        pool: Pool,
        headers: RequestHeaders | None,
        forwarded_info: ForwardedInfo | None,
        header_lines: bytes,
    ) -> None:
        """
        :param headers: of the client's request; ``None`` when it is an ordinary one, see
            :mod:`.plain_headers`. Then the request finds out about them and its origin when that is needed.
        :param header_lines: the headers as the target is sent them, with the empty line.
        """
        self.options = options
        self.target = target
        self.pool = pool
        self.headers = headers
        self.forwarded_info = forwarded_info
        self.header_lines = header_lines
        self.keep_case = options.preserve_header_key_case
        #: of the agent, which changes when the worker drains: it decides about a ``Connection`` header
        self.max_idle = options.agent.max_idle
        #: whether it asks for an upgrade
        self.upgrades = headers is not None and bool(headers.upgrade)
        #: whether the header lines do not depend on the body of the request
        self.reusable = False
        #: whether it holds for every GET without a body that has the same headers
        self.repeatable = False

    def fits(self, options: Options, target: Target) -> bool:
        """Whether its header lines can be used again."""
        return self.reusable and self.options is options and self.target is target and not self.is_outdated()

    def is_outdated(self) -> bool:
        """Whether the pool is forgotten, or the target has to be told that no connection is kept."""
        return self.pool.forgotten or self.max_idle != self.options.agent.max_idle

    def for_ordinary_request(self, header_lines: bytes) -> ForwardPlan:
        """The same plan with other headers, for which it holds, too."""
        plan = ForwardPlan(self.options, self.target, self.pool, None, None, header_lines)
        plan.reusable = plan.repeatable = True
        return plan


def remembered_plan(
    proxy: ProxyContext, connection: DownstreamConnection, environ: dict[str, Any]
) -> ForwardPlan | None:
    """The plan for a request for which nothing is to be decided again.

    Either its headers repeat, or they are ordinary ones, and the proxy has a plan for these.
    """
    parsed = connection.parsed
    known: ForwardPlan | None = parsed.plan
    plan = known if known is not None else proxy.ordinary_plan
    if (
        plan is None
        or not plan.repeatable
        or plan.options is not proxy.options  # another proxy has taken the place of the one that planned
        or (connection.listener.app is not proxy and not is_sole_app(connection.listener.app, proxy))
        or environ["REQUEST_METHOD"] != "GET"
        or connection.body is not EMPTY_BODY
        or not environ["RAW_URI"].isprintable()
        or proxy.events.any
        or plan.is_outdated()
        or connection.response is None
        or connection.response.req is not None
    ):
        return None
    if known is None:
        if environ["SERVER_PROTOCOL"] != "HTTP/1.1" or environ["SCRIPT_NAME"]:
            return None
        lines = plain_lines(connection.head, environ.get("HTTP_HOST"), plan.keep_case)
        if lines is None:
            return None
        plan = parsed.plan = plan.for_ordinary_request(lines)
        if not connection.listener.is_proxy:
            connection.listener.is_proxy = True
    return plan


def plan_request(  # noqa: PLR0915 - the decisions, one after the other
    request: ForwardedRequest, overrides: dict[str, Any] | None = None, must_upgrade: bool = False
) -> ForwardPlan:
    """Decide how a request is forwarded; the program's handlers and target function take part in it.

    :param overrides: options for this request alone.
    :param must_upgrade: whether the request has to ask for an upgrade.
    :raises LocalResponse: when no upstream gets the request.
    :raises ProxyError, HandlerFailed: when it cannot be forwarded.
    """
    route = _find_route(request, overrides)
    if route is None:
        raise LocalResponse(404, "No target is mounted at this path.")
    options = request.options
    environ = request.environ
    client = request.downstream
    method = request.method = client.method
    keep_case = options.preserve_header_key_case
    parsed = _parsed_headers(client)
    last: ForwardPlan | None = parsed.plan if parsed is not None else None
    if last is not None and last.keep_case is not keep_case:
        last = None
    headers = last.headers if last is not None and last.headers is not None else client.headers(keep_case)
    try:
        request.path, scheme = request_path(environ, client.unmodified)
    except BadTarget as error:
        raise LocalResponse(400, str(error)) from None
    if method in ("OPTIONS", "TRACE", "CONNECT") or headers.upgrade or not headers.valid or must_upgrade:
        _check_allowed(request, headers, must_upgrade)
        if method in ("OPTIONS", "TRACE"):
            parsed, last, headers = None, None, headers.decremented()
    length = client.length()
    if length and _is_websocket(headers):
        raise LocalResponse(400, "A WebSocket request has no body.")
    if options.max_body is not None and length > options.max_body:
        raise LocalResponse(413, f"The request's body has more than {options.max_body} bytes.")
    request.headers = headers
    if last is not None and last.forwarded_info is not None and last.options is options:
        request.forwarded_info = last.forwarded_info
    else:
        prefix = environ.get("SCRIPT_NAME", "") + route.remove
        request.forwarded_info = client.forwarded_info(options, headers.host, prefix)
    if options.to_proxy and headers.host:
        request.authority_prefix = f"{scheme or request.forwarded_info.scheme}://{headers.host}"
    if route.remove:
        _remove_prefix(request, route.remove)
    if options.rewrite is not None and request.path != "*":
        request.path = rewritten_path(options.rewrite, request.path, request.werkzeug_request)
    if length or options.forward is not None:
        request.sender = RequestBodySender(client, length, options)
    if options.buffer is not None and not _is_websocket(headers):
        replace_body(request, request.proxy.buffer_for(options))
    if options.forward is not None:
        request.sender.mirror = _mirror(request)
    if route.mirror_only:
        _send_mirror_alone(request)
        raise LocalResponse(200)
    backends = route.only or _choose(request, route)
    if backends is None:
        raise LocalResponse(404, "No target serves this request.")
    plan = _plan_backend(request, backends, last)
    if parsed is not None:
        parsed.plan = plan
        if plan.reusable and plan.options is route.options and _is_repeatable(plan, request, route):
            assert client.connection is not None
            client.connection.listener.is_proxy = True
            plan.repeatable = client.protocol == "HTTP/1.1"
            if plan.repeatable and forwards_plainly(options):
                request.proxy.ordinary_plan = plan
    return plan


def _parsed_headers(client: WsgiDownstream) -> ParsedHeaders | None:
    """The headers that a plan may be kept with; ``None`` when the plan depends on more than their bytes."""
    connection = client.connection
    if connection is None or not client.unmodified or client.environ["RAW_URI"][:1] != "/":
        # with a target in absolute form, the host is not that of the header
        return None
    return connection.parsed


def plan_next_target(request: ForwardedRequest, error: ProxyError) -> ForwardPlan:
    """The plan for the next of several targets, after one could not be connected to.

    :raises ProxyError: ``error``, when no other target is left.
    """
    backend = request.backend
    if backend is not None and not isinstance(error, PoolExhausted):
        backend.failed(request.options)
    if not request.backends:
        raise error
    log.warning("proxy: %s: %s; the next target is tried", request.target, error)
    request.leave_backend()
    return _plan_backend(request, request.backends, None)


def _plan_backend(
    request: ForwardedRequest, backends: list[Backend], last: ForwardPlan | None
) -> ForwardPlan:
    """The plan for the first of these targets.

    :param last: the plan of a request with the same headers.
    """
    while True:
        backend = request.backend = backends[0]
        request.backends = backends[1:]
        request.waits = not request.backends
        backend.active += 1
        request.target = backend.target
        try:
            target = resolve(request, backend.target)
        except UpstreamRefused as error:
            if not request.backends:
                raise
            backend.failed(request.options)
            log.warning("proxy: %s: %s; the next target is tried", backend.target, error)
            request.leave_backend()
            backends = request.backends
            continue
        path = target_path(request.options, target, request.path, request.authority_prefix)
        events = request.proxy.events
        if events.any and events.has("start"):
            events.emit("start", request.werkzeug_request(), backend.target)
        return plan_send(request, target, request.downstream.method, path, last=last)


def plan_send(
    request: ForwardedRequest,
    target: Target,
    method: str,
    path: str,
    foreign: bool = False,
    last: ForwardPlan | None = None,
) -> ForwardPlan:
    """The plan to send a request to a target, after the handlers have changed it.

    :param foreign: whether a redirect has led to a target that the options are not meant for.
    :param last: the plan of a request with the same headers.
    :raises HandlerFailed: when a handler fails, or leaves a request that cannot be sent.
    """
    options = request.options
    events = request.proxy.events
    headers = request.headers
    lines = None
    event = "proxy_req_ws" if headers.upgrade else "proxy_req"
    if events.any and events.has(event):
        changed = UpstreamRequest(method, path, upstream_headers(request, target, foreign), target)
        events.emit(event, changed, request.werkzeug_request(), options)
        method, path = checked_request(changed, event)
        lines = checked_lines(changed, event, target, options)
        if changed.body is not None:
            replace_body(request, changed.body)
    sender = request.sender
    sender.check_untouched()
    if sender.length and _is_websocket(headers):
        # a target that ignores such a body takes it for the next request
        raise HandlerFailed("proxy_req_ws: a WebSocket request has no body")
    request.upstream_path = path
    request.method = method
    request.request_line = wire.request_line(method, path)
    request.copies_response = (
        sender is NO_BODY_SENDER
        and request.connection is not None
        and method != "HEAD"
        and not headers.upgrade
        and options.copies_responses
        and not (request.forwarded_info.prefix or (options.retry_statuses and request.backends))
        and request.environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    )
    expect = expects_continue(request)
    plain = lines is None and not (
        expect or sender.replaced or sender.length < 0 or options.sticky or foreign
    )
    if plain and last is not None and last.fits(options, target):
        return last
    if lines is None:
        text = serialize(request, upstream_headers(request, target, foreign), expect, False)
    else:
        text = serialize(request, lines, expect, True)
    plan = ForwardPlan(options, target, _pool(options, target), headers, request.forwarded_info, text)
    plan.reusable = plain
    return plan


def resolve(request: ForwardedRequest, target: Target) -> Target:
    """The address of a target that may name a server of this application.

    :raises UpstreamRefused: when no server has that name.
    """
    if not target.server:
        return target
    try:
        return server_target(target, request.proxy.servers)
    except LookupError:
        raise UpstreamRefused(f"this application has no server with the name {target.server!r}") from None


# --- the route ---------------------------------------------------------------------------------------


def _find_route(request: ForwardedRequest, changes: dict[str, Any] | None) -> Route | None:
    """The route of the request; it sets the options."""
    route = request.proxy.route
    path = request.environ.get("PATH_INFO", "")
    if changes and "target" in changes:
        changes = dict(changes)
        target = changes.pop("target")
        request.options = request.options.merged(changes, "proxy.web()")
        return route.with_target(target, request.options).find(path)
    found = route.find(path) if route.table else route
    if found is not None:
        request.options = found.options.merged(changes, "proxy.web()") if changes else found.options
    return found


def _choose(request: ForwardedRequest, route: Route) -> list[Backend] | None:
    """The targets to try, in their order."""
    options = request.options
    if options.sticky:
        request.sticky_id = sticky.target_id_in(request.environ.get("HTTP_COOKIE", ""), options.sticky_name)
    try:
        group = route.find_group(request.werkzeug_request)
    except Exception as error:
        raise HandlerFailed("the function that chooses the target failed", error) from error
    if group is None:
        return None
    servers = request.proxy.servers
    backends = group.candidates(options, request.sticky_id or None, servers)
    if options.health is not None and group.checks is None and len(backends) > 1:
        health.start(group, options, servers)
    return backends


def _remove_prefix(request: ForwardedRequest, prefix: str) -> None:
    path, mark, query = request.path.partition("?")
    if not path.startswith(prefix):
        # the client has written it in another way, such as %61 for a
        path = quote(request.environ["PATH_INFO"].encode("latin-1", "replace"), safe=_PATH_SAFE)
        prefix = quote(prefix.encode("latin-1", "replace"), safe=_PATH_SAFE)
    path = path[len(prefix) :]
    request.path = (path if path.startswith("/") else "/" + path) + mark + query


def _is_repeatable(plan: ForwardPlan, request: ForwardedRequest, route: Route) -> bool:
    """Whether the plan holds for every GET without a body that has the same headers."""
    options, headers = plan.options, request.headers
    return (
        route.always_targets(plan.target)
        and options.copies_responses
        and not request.forwarded_info.prefix
        and headers.valid
        and not (
            options.buffer is not None
            or options.forward is not None
            or options.to_proxy
            or options.rewrite is not None
            or headers.upgrade
            or headers.expect
        )
        and target_path(options, plan.target, "/x?y", "") == "/x?y"
    )


def _check_allowed(request: ForwardedRequest, headers: RequestHeaders, must_upgrade: bool) -> None:
    """
    :raises LocalResponse: for a request that no upstream gets.
    """
    method = request.method
    if not headers.valid:
        raise LocalResponse(400, "The request has no valid Host.")
    if method == "CONNECT":
        raise LocalResponse(501, "This proxy does not open tunnels (CONNECT).")
    if headers.upgrade and not request.options.ws:
        raise LocalResponse(501, "This proxy does not forward upgrades.")
    if headers.upgrade and not request.downstream.tunnels:
        raise LocalResponse(501, "Upgrades need gunicorn with the worker gunicorn_passenger.Worker.")
    if must_upgrade and not headers.upgrade:
        raise LocalResponse(400, "The request does not ask for an upgrade.")
    if method in ("OPTIONS", "TRACE") and headers.max_forwards == 0:
        # it is meant for the proxy itself (RFC 9110 section 7.6.2)
        if method == "TRACE":
            raise LocalResponse(501, "This proxy does not send a request back (TRACE).")
        raise LocalResponse(200)


def _is_websocket(headers: RequestHeaders) -> bool:
    """Whether a request asks for a WebSocket, whose request has no body (RFC 6455 section 4.1)."""
    return bool(headers.upgrade) and any(
        protocol.partition("/")[0] == "websocket" for protocol in rules.protocols(headers.upgrade)
    )


# --- mirrored requests -------------------------------------------------------------------------------


def _pool(options: Options, target: Target) -> Pool:
    pool: Pool = options.agent.pool(target, options.dial)
    return pool


def _mirror(request: ForwardedRequest) -> MirroredRequest | None:
    """The mirrored request for ``forward``; it is sent beside this one."""
    options = request.options
    try:
        target = resolve(request, options.forward)
    except UpstreamRefused as error:
        request.mirror_failed(error, options.forward)
        return None
    path = target_path(options, target, request.path, request.authority_prefix)
    lines = rules.upstream_headers(request.headers, options, target, request.forwarded_info)
    length = request.sender.length
    if length == CHUNKED or request.sender.replaced:
        lines = [line for line in lines if line[0].lower() != "content-length"]
        framing = ("transfer-encoding", "chunked") if length == CHUNKED else ("content-length", str(length))
        lines.append(framing)
    head = wire.request_line(request.method, path) + wire.lines_of([*lines, ("connection", "close")])
    pool = _pool(options, target)
    mirror = MirroredRequest(target, pool, head + b"\r\n", length, options, request.mirror_failed)
    mirror.start()
    return mirror


def _send_mirror_alone(request: ForwardedRequest) -> None:
    """Feed the body to the mirrored request, the only one that is sent."""
    mirror = request.sender.mirror
    request.sender.check_untouched()
    for chunk in request.sender.chunks():
        if mirror is not None:
            mirror.feed(chunk)
    if mirror is not None:
        mirror.end()
