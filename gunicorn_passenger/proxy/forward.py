"""One request's way through the proxy: route, target, request, answer, or why there is none.

Runs in: wherever the proxy is mounted, in the greenlet or thread of the request. Must never: send
anything that was not checked, or leave a connection in use behind.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import quote

from werkzeug.exceptions import NotFound, default_exceptions
from werkzeug.wrappers import Request, Response

from gunicorn_passenger.errors import (
    BadResponse,
    ClientDisconnected,
    PoolExhausted,
    ProxyError,
    TruncatedResponse,
    UpstreamRefused,
    UpstreamTimeout,
)
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import rewrite, upgrade, wire
from gunicorn_passenger.proxy.agent import Pool, UpstreamConnection
from gunicorn_passenger.proxy.copy_response import copy_response, serialize_headers
from gunicorn_passenger.proxy.downstream import CHUNKED, NativeDownstream, WsgiDownstream, downstream_for
from gunicorn_passenger.proxy.events import (
    HandlerFailed,
    UpstreamRequest,
    UpstreamResponse,
    check_reason,
    checked,
)
from gunicorn_passenger.proxy.fast_path import ForwardPlan, is_cacheable
from gunicorn_passenger.proxy.log import log
from gunicorn_passenger.proxy.mirror import MirroredRequest
from gunicorn_passenger.proxy.options import TOKEN, Options
from gunicorn_passenger.proxy.request_headers import ForwardedInfo, HeaderList, RequestHeaders
from gunicorn_passenger.proxy.response_head import ResponseHead
from gunicorn_passenger.proxy.round_trip import NO_BODY_SENDER, NoBodySender, RequestBodySender, RoundTrip
from gunicorn_passenger.proxy.routes import Backend, Route
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.upstream_io import DownstreamDisconnected
from gunicorn_passenger.system.text import printable

_REDIRECTS = (301, 302, 303, 307, 308)
#: Fields of a request that stay with the origin that they were meant for.
_CREDENTIALS = {"authorization", "cookie"}
_CONTENT = {"content-length", "content-type", "content-encoding", "content-language", "content-location"}


class ForwardedRequest:
    """One request of a client."""

    # (class attributes are what most requests leave as they are)
    exchange: RoundTrip | None = None
    target: Target | None = None
    fields: RequestHeaders
    _client: WsgiDownstream
    _origin: ForwardedInfo
    _backend: Backend | None = None
    _upload: RequestBodySender | NoBodySender = NO_BODY_SENDER
    _request: Any = None
    _upstream_response: Any = None
    _path = ""
    #: what the target was asked for
    _asked = ""
    #: whether the head of an answer was given to the server
    _started = False
    #: a cookie that keeps the client with its target
    _sticky = ""

    def __init__(
        self,
        proxy: Any,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        overrides: dict[str, Any] | None,
        must_upgrade: bool = False,
    ) -> None:
        """
        :param overrides: options for this request alone.
        :param must_upgrade: whether nothing but an upgrade is expected.
        """
        self._proxy = proxy
        self.environ = environ
        self._start_response = start_response
        self._overrides = overrides
        self._must_upgrade = must_upgrade
        self._began = time.monotonic()
        self.events = proxy.events
        self.options: Options = proxy.options

    def run(self) -> Iterable[bytes]:
        """Carry it.

        :returns: the body of the answer, or nothing when it was sent already.
        :raises TruncatedResponse: when the answer cannot be finished.
        :raises ClientDisconnected: when nobody waits for it any more.
        """
        return self._guarded(self._carry)

    def resume(
        self,
        way: ForwardPlan,
        fields: RequestHeaders,
        link: UpstreamConnection,
        sent: bytes,
        came: bytes,
        met: BaseException | None,
        began: float,
    ) -> Iterable[bytes]:
        """Carry on a request that went the straight way so far.

        :param sent: the request, as the target was sent it over ``link``.
        :param came: what has come of the answer.
        :param met: what reading on has met.
        :param began: when the request was sent, by ``time.monotonic()``.
        """
        self._began = began
        return self._guarded(self._carry_on, way, fields, link, sent, came, met)

    def _guarded(self, carry: Callable[..., Iterable[bytes]], *arguments: Any) -> Iterable[bytes]:
        try:
            return carry(*arguments)
        except ProxyError as error:
            return self._fail(error)
        except (DownstreamDisconnected, ClientDisconnected) as error:
            raise self._client_gone(error) from None
        except (HandlerFailed, wire.Unsendable) as error:
            return self._handler_failed(error)
        except BaseException:
            self._end(broken=True)
            raise

    # --- the request -----------------------------------------------------------------------------

    def _carry(self) -> Iterable[bytes]:
        environ = self.environ
        route = self._find_route()
        if route is None:
            return self.say(404, "No target is mounted at this path.")
        options = self.options
        client = self._client = downstream_for(environ, self._start_response, self._proxy)
        keep_case = options.preserve_header_key_case
        method = client.method
        fields = client.fields(keep_case)
        try:
            self._path, scheme = rules.request_path(environ, client.pristine)
        except rules.BadTarget as error:
            return self.say(400, str(error))
        if (
            method in ("OPTIONS", "TRACE", "CONNECT")
            or fields.upgrade
            or not fields.valid
            or self._must_upgrade
        ):
            if (refusal := self._refusal(fields, method)) is not None:
                return refusal
            if method in ("OPTIONS", "TRACE"):
                fields = fields.one_hop_less()
        length = client.length()
        if length and _is_websocket(fields):
            return self.say(400, "A WebSocket request has no body.")
        self.fields = fields
        known = fields.origin
        if known is not None and known[0] is options:
            self._origin = known[1]
        else:
            self._origin = client.origin(options, fields.host)
            fields.origin = options, self._origin
        before = ""
        if options.to_proxy and fields.host:
            before = f"{scheme or self._origin.scheme}://{fields.host}"
        if route.remove:
            self._remove_prefix(route.remove)

        if length or options.forward is not None:
            self._upload = RequestBodySender(client, length, options)
        if options.buffer is not None and not _is_websocket(fields):
            self._replace_body(self._proxy.buffer_for(options))
        if options.forward is not None:
            self._upload.copy = self._copy(method, before)
        if route.nowhere:
            return self._copy_alone()
        backends = route.only or self._choose(route)
        if backends is None:
            self._end()
            return self.say(404, "There is no target for this request.")
        head = self._ask(backends, method, before)
        if options.follow_redirects and head.status in _REDIRECTS:
            head = self._follow(head, method)
        if head.status == 101:
            return upgrade.carry(self, head)
        return self._answer(head)

    def _carry_on(
        self,
        way: ForwardPlan,
        fields: RequestHeaders,
        link: UpstreamConnection,
        sent: bytes,
        came: bytes,
        met: BaseException | None,
    ) -> Iterable[bytes]:
        assert fields.origin is not None
        connection = self.environ["gunicorn.socket"].connection
        self._client = NativeDownstream(self.environ, self._start_response, connection, True)
        self.options, self.target, self.fields = way.options, way.target, fields
        self._origin = fields.origin[1]
        self._path = self._asked = self.environ["RAW_URI"]
        self.exchange = RoundTrip(way.pool, way.options, "GET", self._client, NO_BODY_SENDER)
        return self._answer(self.exchange.resume(link, sent, came, met))

    def _find_route(self) -> Route | None:
        """Where the request goes, and with which options."""
        route: Route = self._proxy.route
        changes = self._overrides
        if changes and "target" in changes:
            changes = dict(changes)
            target = changes.pop("target")
            self.options = self.options.merged(changes, "proxy.web()")
            return route.instead(target, self.options).find(self.environ.get("PATH_INFO", ""))
        found = route.find(self.environ.get("PATH_INFO", "")) if route.table else route
        if found is not None:
            self.options = found.options.merged(changes, "proxy.web()") if changes else found.options
        return found

    def _refusal(self, fields: RequestHeaders, method: str) -> Iterable[bytes] | None:
        """The answer to a request that no target gets to see."""
        if not fields.valid:
            return self.say(400, "The request has no valid Host.")
        if method == "CONNECT":
            return self.say(501, "This proxy makes no connections for its clients (CONNECT).")
        if fields.upgrade and not self.options.ws:
            return self.say(501, "This proxy does not carry upgrades.")
        if fields.upgrade and not self._client.tunnels:
            return self.say(501, "Upgrades need gunicorn with the worker gunicorn_passenger.Worker.")
        if self._must_upgrade and not fields.upgrade:
            return self.say(400, "The request asks for no upgrade.")
        if method in ("OPTIONS", "TRACE") and fields.hops == 0:
            # it is meant for the proxy itself (RFC 9110 section 7.6.2)
            if method == "TRACE":
                return self.say(405, "This proxy does not repeat what it was sent (TRACE).")
            self._start_response("200 OK", [("Content-Length", "0")])
            return []
        return None

    def _choose(self, route: Route) -> list[Backend] | None:
        """The targets to try."""
        options = self.options
        try:
            return route.choose(
                self.werkzeug_request() if route.asks else None,
                options,
                self._sticky_cookie() if options.sticky else None,
            )
        except Exception as error:
            raise HandlerFailed("the function that chooses the target failed") from error

    def _remove_prefix(self, prefix: str) -> None:
        path, mark, query = self._path.partition("?")
        if not path.startswith(prefix):
            # the client has written it in another way, with %61 for a
            path = quote(self.environ["PATH_INFO"].encode("latin-1", "replace"), safe="/:@!$&'()*+,;=~-._")
            prefix = quote(prefix.encode("latin-1", "replace"), safe="/:@!$&'()*+,;=~-._")
        path = path[len(prefix) :]
        self._path = (path if path.startswith("/") else "/" + path) + mark + query

    def werkzeug_request(self) -> Any:
        if self._request is None:
            self._request = Request(self.environ)
        return self._request

    def _ask(self, backends: list[Backend], method: str, before: str) -> ResponseHead:
        """Send the request to the first target that can be connected to."""
        last = len(backends) - 1
        for number, backend in enumerate(backends):
            self._backend = backend
            backend.active += 1
            self.target = backend.target
            try:
                head = self._ask_one(backend.target, method, before, wait=number == last)
            except (UpstreamRefused, UpstreamTimeout, PoolExhausted) as error:
                if self.exchange is not None and self.exchange.connected:
                    raise
                if backend.has_peers and not isinstance(error, PoolExhausted):
                    backend.failed(self.options)
                if number == last:
                    raise
                log.warning("proxy: %s: %s; the next target is tried", backend.target, error)
                backend.active -= 1
                self._backend = None
                continue
            backend.failed_until = 0.0
            if self.options.sticky:
                self._stick(backend)
            return head
        raise AssertionError("no target")

    def _resolve(self, target: Target) -> Target:
        if not target.server:
            return target
        try:
            found: Target = self._proxy.find_server(target.server)
            return found
        except LookupError:
            raise UpstreamRefused(f"no server of this application has the name {target.server!r}") from None

    def _ask_one(self, named: Target, method: str, before: str, wait: bool) -> ResponseHead:
        target = self._resolve(named) if named.server else named
        path = rules.target_path(self.options, target, self._path, before)
        if self.events.any and self.events.has("start"):
            self.events.emit("start", self.werkzeug_request(), named)
        return self._send(target, method, path, wait)

    def _send(
        self, target: Target, method: str, path: str, wait: bool = True, foreign: bool = False
    ) -> ResponseHead:
        """Send the request as the handlers have it, and read the head of its answer.

        :param wait: whether to wait for a connection when all are in use.
        :param foreign: whether a redirect has led to a target that the options are not for.
        """
        options = self.options
        events = self.events
        fields = self.fields
        lines = None
        event = "proxy_req_ws" if fields.upgrade else "proxy_req"
        if events.any and events.has(event):
            asked = UpstreamRequest(method, path, self._lines(target, foreign), target)
            events.emit(event, asked, self.werkzeug_request(), options)
            method, path = _checked_request(asked, event)
            lines = _checked_lines(asked, event, target, options)
            if asked.body is not None:
                self._replace_body(asked.body)
        self._asked = path
        upload = self._upload
        if upload.length and _is_websocket(fields):
            # a target that ignores such a body takes it for the next request
            raise HandlerFailed("proxy_req_ws: a WebSocket request has no body")
        expect = fields.expect and upload.length != 0 and self.environ.get("SERVER_PROTOCOL") != "HTTP/1.0"
        head = wire.request_line(method, path)
        if lines is not None or expect or upload.replaced or upload.length < 0 or options.sticky or foreign:
            if lines is None:
                head += self._text(self._lines(target, foreign), expect, False)
            else:
                head += self._text(lines, expect, True)
            pool = self._pool(target)
        else:
            kept = fields.kept
            if kept is None or not kept.holds(options, target):
                text = self._text(self._lines(target, False), False, False)
                kept = fields.kept = ForwardPlan(options, target, text, self._pool(target))
                route = self._proxy.route
                kept.straight = (
                    self._client.pristine
                    and options is route.options
                    and route.leads_to(target)
                    and is_cacheable(options, target, fields, kept.pool)
                )
            head += kept.text
            pool = kept.pool
        exchange = self.exchange = RoundTrip(pool, options, method, self._client, upload)
        if fields.upgrade:
            exchange.switching = True
        return exchange.request(head, expect, wait)

    def _pool(self, target: Target) -> Pool:
        options = self.options
        pool: Pool = options.agent.pool(target, options.secure, options.local_address)
        return pool

    def _lines(self, target: Target, foreign: bool) -> HeaderList:
        options = self.options
        lines = rules.upstream_headers(self.fields, options, target, self._origin, foreign)
        return _without_cookie(lines, options.sticky_name) if options.sticky else lines

    def _text(self, lines: HeaderList, expect: bool, unframed: bool) -> bytes:
        """The fields as they are sent, with one framing: that of the body that there is.

        :param unframed: whether the length of the body has to be written.
        """
        fields = self.fields
        upload = self._upload
        keep_case = self.options.preserve_header_key_case
        own: HeaderList = []
        if upload.length == CHUNKED:
            own.append(("Transfer-Encoding", "chunked"))
        elif upload.replaced or (unframed and (fields.measured or upload.length)):
            own.append(("Content-Length", str(upload.length)))
        if upload.length == CHUNKED or upload.replaced:
            lines = [line for line in lines if line[0].lower() != "content-length"]
        if expect:
            own.append(("Expect", "100-continue"))
        connection = []
        if fields.te_trailers and self._client.connection is not None:
            own.append(("TE", "trailers"))
            connection.append("TE")
        if fields.upgrade:
            own.append(("Upgrade", fields.upgrade))
            connection.append("Upgrade")
        elif not self.options.agent.max_idle:
            connection.append("close")
        if connection:
            own.append(("Connection", ", ".join(connection)))
        if not keep_case:
            own = [(name.lower(), value) for name, value in own]
        return wire.lines_of(lines + own) + b"\r\n"

    def _replace_body(self, body: Any) -> None:
        upload = self._upload
        if not isinstance(upload, RequestBodySender):
            upload = self._upload = RequestBodySender(self._client, 0, self.options)
        if upload.copy is not None:
            # the copy was to have the client's body, which nobody reads now
            upload.copy.end(whole=False)
            upload.copy = None
        if isinstance(body, (bytes, bytearray)):
            upload.replace(bytes(body), len(body))
            return
        if isinstance(body, str) or not callable(getattr(body, "read", None)):
            raise HandlerFailed(f"proxy_req: the body {type(body).__name__} is neither bytes nor a file")
        try:
            at = body.tell()
            length = body.seek(0, 2) - at
            body.seek(at)
        except (AttributeError, OSError, ValueError):
            length = CHUNKED
        upload.replace(body, length)

    # --- copies ----------------------------------------------------------------------------------

    def _copy(self, method: str, before: str) -> MirroredRequest | None:
        """The request for ``forward``."""
        options = self.options
        try:
            target = self._resolve(options.forward)
        except UpstreamRefused as error:
            log.warning("proxy: %s: a request was not copied: %s", options.forward, error)
            return None
        path = rules.target_path(options, target, self._path, before)
        lines = rules.upstream_headers(self.fields, options, target, self._origin)
        length = self._upload.length
        if length == CHUNKED or self._upload.replaced:
            lines = [line for line in lines if line[0].lower() != "content-length"]
            framing = (
                ("transfer-encoding", "chunked") if length == CHUNKED else ("content-length", str(length))
            )
            lines.append(framing)
        head = wire.request_line(method, path) + wire.lines_of([*lines, ("connection", "close")]) + b"\r\n"
        copy = MirroredRequest(target, self._pool(target), head, length, options)
        copy.start()
        return copy

    def _copy_alone(self) -> Iterable[bytes]:
        """There is no target but the copy's."""
        for piece in self._upload.pieces():
            if self._upload.copy is not None:
                self._upload.copy.feed(piece)
        if self._upload.copy is not None:
            self._upload.copy.end()
        self._start_response("200 OK", [("Content-Length", "0")])
        return []

    # --- cookies ---------------------------------------------------------------------------------

    def _sticky_cookie(self) -> str | None:
        """What names the target that this client had before."""
        for part in self.environ.get("HTTP_COOKIE", "").split(";"):
            name, _, value = part.partition("=")
            if name.strip() == self.options.sticky_name:
                self._sticky = value.strip()
        return self._sticky or None

    def _stick(self, backend: Backend) -> None:
        if self._sticky == backend.id or not backend.id:
            self._sticky = ""
            return
        secure = "; Secure" if self._origin.scheme == "https" else ""
        self._sticky = f"{self.options.sticky_name}={backend.id}; Path=/; HttpOnly; SameSite=Lax{secure}"

    # --- redirects -------------------------------------------------------------------------------

    def _follow(self, head: ResponseHead, method: str) -> ResponseHead:
        """Ask where the target says, as often as allowed."""
        options = self.options
        target = self._resolve(self.target) if self.target is not None else None
        path = self._asked
        followed = 0
        first = target
        while head.status in _REDIRECTS and target is not None:
            where = next((value for name, value in head.fields if name.lower() == "location"), None)
            if where is None:
                break
            body = self._upload.length != 0 or self._upload.replaced
            becomes_get = head.status == 303 or (head.status in (301, 302) and method == "POST")
            if body and not becomes_get:
                break  # the body is gone: the client may send it again
            found = rewrite.redirect(where, target, path)
            if found is None:
                break
            followed += 1
            if followed > options.follow_redirects:
                raise BadResponse(f"it has redirected the request more than {options.follow_redirects} times")
            assert self.exchange is not None
            if self.exchange.whole:
                self.exchange.receive()
            self.exchange.finish()
            fields = self.fields
            if becomes_get:
                if method != "HEAD":
                    method = "GET"
                fields = fields.without_length()
                fields = fields.changed([line for line in fields.fields if line[0].lower() not in _CONTENT])
                self._upload = NO_BODY_SENDER
            target, path = found
            foreign = target != first
            if foreign:
                rest = [line for line in fields.fields if line[0].lower() not in _CREDENTIALS]
                fields = fields.changed(rest).with_host(target.authority, options.preserve_header_key_case)
            self.fields = fields
            self.target = target
            head = self._send(target, method, path, foreign=foreign)
            path = self._asked
        return head

    # --- the answer ------------------------------------------------------------------------------

    def _answer(self, head: ResponseHead) -> Iterable[bytes]:
        options = self.options
        exchange = self.exchange
        assert exchange is not None
        connection = self._client.connection
        plain = options.plain_response and not (options.via or options.self_handle_response)
        # a handler may have asked for the head alone
        headless = exchange.method == "HEAD" and self._client.method != "HEAD"
        if connection is not None and plain and not (self._sticky or self.events.any or headless):
            # nothing is changed: the text is made once for equal heads
            if head.lines is None:
                head.lines = serialize_headers(head.fields, head.status)
            copy_response(
                exchange, connection, head.status, head.reason, head.lines, head.length, head.dated, None
            )
            self._over()
            return ()
        target = self.target
        assert target is not None
        fields = head.fields
        status, reason = head.status, head.reason
        body: Iterator[bytes] | None = None
        if self.events.has("proxy_res"):
            response = UpstreamResponse(status, reason, fields, target, exchange.body())
            self._upstream_response = response
            made = self.events.emit("proxy_res", response, self.werkzeug_request())
            if options.self_handle_response:
                return self._handled(made)
            fields = _changed(response, head)
            status, reason = response.status_code, response.reason
            body = response.left()
        elif options.self_handle_response:
            raise HandlerFailed("self_handle_response is set, and there is no handler of 'proxy_res'")
        elif self.events.has("end"):
            self._upstream_response = UpstreamResponse(status, reason, fields, target, exchange.body())
        if not options.plain_response:
            fields = rewrite.rewrite_headers(fields, status, options, self._resolve(target), self._origin)
        if options.via:
            fields = rules.with_via(fields, options, head.version)
        if self._sticky:
            fields = [*fields, ("set-cookie", self._sticky)]
        length = head.length
        if headless and status not in (204, 304):
            fields = [field for field in fields if field[0].lower() != "content-length"]
            fields.append(("content-length", "0"))
            length = 0
        if connection is not None:
            dated = any(name.lower() == "date" for name, _ in fields)
            copy_response(
                exchange, connection, status, reason, serialize_headers(fields, status), length, dated, body
            )
            self._over()
            return ()
        return self._hand_on(status, reason, fields, body if body is not None else exchange.body())

    def _hand_on(
        self, status: int, reason: str, fields: HeaderList, body: Iterator[bytes]
    ) -> Iterable[bytes]:
        """Send the answer the way of WSGI."""
        drop = {"trailer", "upgrade"}  # WSGI leaves what speaks of the connection to the server
        if str(self.environ.get("SERVER_SOFTWARE", "")).startswith("gunicorn"):
            drop |= {"date", "server"}  # it writes its own
        if status == 204:
            drop.add("content-length")
        fields = wire.checked([field for field in fields if field[0].lower() not in drop])
        self._start_response(wire.status_text(status, reason or "Unknown"), fields)
        self._started = True
        return _WsgiBody(self, body)

    def _handled(self, made: Any) -> Iterable[bytes]:
        """Send what a handler has made of the answer."""
        if made is None:
            raise HandlerFailed(
                "self_handle_response is set, and no handler of 'proxy_res' returned a response"
            )
        if not callable(made):
            raise HandlerFailed(f"a handler of 'proxy_res' returned {made!r}, which is no response")
        body = iter(made(self.environ, self._noting_start))
        return _WsgiBody(self, body, made)

    def _noting_start(self, *arguments: Any) -> Any:
        """``start_response`` for who answers in place of the target."""
        self._started = True
        return self._start_response(*arguments)

    def pieces(self, body: Iterator[bytes]) -> Iterator[bytes]:
        """The body for a WSGI server.

        :raises TruncatedResponse: when it breaks off: the server then has to end the connection, so that
            the client sees a truncated message, never a clean end.
        """
        try:
            yield from body
        except ProxyError as error:
            yield from self._fail(error)
            return
        except DownstreamDisconnected as error:
            raise self._client_gone(error) from None
        self._over()

    # --- the end ---------------------------------------------------------------------------------

    def _over(self) -> None:
        """The answer was sent as a whole."""
        self._end()
        if self.events.has("end"):
            try:
                self.events.emit("end", self.werkzeug_request(), self._upstream_response)
            except HandlerFailed as error:
                log.error("proxy: %s", error, exc_info=error.__cause__)

    def tunnel_over(self, tunnel: Any) -> None:
        """An upgraded connection has ended."""
        self._end()
        if self.events.has("close"):
            try:
                self.events.emit("close", tunnel)
            except HandlerFailed as error:
                log.error("proxy: %s", error, exc_info=error.__cause__)

    def _end(self, broken: bool = False) -> None:
        if self._backend is not None:
            self._backend.active -= 1
            self._backend = None
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            if broken:
                exchange.abort()
            else:
                exchange.finish()
        copy = self._upload.copy
        if copy is not None:
            # whatever became of the request: a copy that was not fed to its end is given up
            copy.end(whole=False)

    def say(self, status: int, text: str) -> Iterable[bytes]:
        """An answer of the proxy's own."""
        if status == 400 and self._client.connection is not None:
            # what follows such a request is better not taken for another
            self._client.connection.response.force_close()
        error = NotFound(text) if status == 404 else default_exceptions[status](text)
        return error.get_response(self.environ)(self.environ, self._start_response)

    def _fail(self, error: ProxyError) -> Iterable[bytes]:
        """There is no answer, or no more of it."""
        self._end(broken=True)
        error.target = error.target or self.target
        error.elapsed = time.monotonic() - self._began
        line = printable(
            f"proxy: {error.target if error.target is not None else self._proxy}: {error.reason} "
            f"after {error.elapsed:.3f} s ({self.environ['REQUEST_METHOD']} {self._shown_path()})"
        )
        made = None
        if self.events.has("error"):
            try:
                made = self.events.emit("error", error, self.werkzeug_request(), error.target)
            except HandlerFailed as failure:
                if not self._answered:
                    log.error("%s: %s", line, error.status_code)
                    return self._handler_failed(failure)
                log.error("proxy: %s", failure, exc_info=failure.__cause__)
        if self._answered:
            raise TruncatedResponse(f"{line}: the answer is cut off")
        log.error("%s: %s", line, error.status_code)
        if callable(made):
            answer: Iterable[bytes] = made(self.environ, self._start_response)
            return answer
        status = error.status_code
        headers = [("Retry-After", "1")] if status == 503 else []
        text = _TEXTS.get(status, error.reason)
        response: Response = default_exceptions[status](text).get_response(self.environ)
        response.headers.extend(headers)
        return response(self.environ, self._start_response)

    @property
    def _answered(self) -> bool:
        """Whether the head of an answer is on its way to the client."""
        connection = self._client.connection
        return self._started or (connection is not None and connection.response.headers_sent)

    def _shown_path(self) -> str:
        return (self._path or quote(self.environ.get("PATH_INFO", ""), encoding="latin-1"))[:200]

    def _handler_failed(self, error: HandlerFailed | wire.Unsendable) -> Iterable[bytes]:
        self._end(broken=True)
        log.error(
            "proxy: %s (%s %s): 500",
            error,
            self.environ["REQUEST_METHOD"],
            self._shown_path(),
            exc_info=error.__cause__,
        )
        if self._answered:
            raise TruncatedResponse("proxy: the answer is cut off by a handler that failed")
        return self.say(500, "The proxy cannot answer this request.")

    def _client_gone(self, error: BaseException) -> ClientDisconnected:
        """The client has gone before its answer was whole."""
        self._end(broken=True)
        if not isinstance(error, ClientDisconnected):
            error = ClientDisconnected(errno.ECONNABORTED, "the client has gone before it was answered")
        if self.events.has("econnreset"):
            try:
                self.events.emit("econnreset", error, self.werkzeug_request(), self.target)
            except HandlerFailed as failure:
                log.error("proxy: %s", failure, exc_info=failure.__cause__)
        return error


_TEXTS = {
    502: "The server behind this proxy did not answer as it should.",
    503: "All connections to the server behind this proxy are in use; try again in a moment.",
    504: "The server behind this proxy did not answer in time.",
}


def _changed(response: UpstreamResponse, head: ResponseHead) -> HeaderList:
    """What the handlers have made of an answer's fields; its framing stays.

    :raises HandlerFailed: when that cannot be sent.
    """
    status = response.status_code
    if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 999:
        raise HandlerFailed(f"proxy_res: the status {status!r} is no number from 200 to 999")
    check_reason(response.reason)
    fields = [
        (name, value)
        for name, value in checked(response.headers, "proxy_res")
        if name.lower() not in rules.ASIDE
        or name.lower() == "trailer"
        or (name.lower() == "upgrade" and status == 426)
    ]
    if head.length is not None:
        fields.append(("content-length", str(head.length)))
    return fields


def _is_websocket(fields: RequestHeaders) -> bool:
    """Whether a request asks for a WebSocket, whose request has no body (RFC 6455 section 4.1)."""
    return bool(fields.upgrade) and any(
        protocol.partition("/")[0] == "websocket" for protocol in rules.protocols(fields.upgrade)
    )


class _WsgiBody:
    """The body of an answer as WSGI wants it: closing it ends the exchange."""

    def __init__(self, passage: ForwardedRequest, body: Iterator[bytes], made: Any = None) -> None:
        self._passage = passage
        self._body = body
        self._pieces = passage.pieces(body)
        self._made = made

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
        self._passage._end(broken=self._made is None)


def _checked_request(asked: UpstreamRequest, event: str) -> tuple[str, str]:
    """
    :raises HandlerFailed: when a handler has left what is no request line.
    """
    method, path = asked.method, asked.path
    if not isinstance(method, str) or not TOKEN.fullmatch(method):
        raise HandlerFailed(f"{event}: the method {method!r} is no token")
    if not isinstance(path, str) or not path or not path.isascii() or not path.isprintable() or " " in path:
        raise HandlerFailed(f"{event}: the path {path!r} cannot stand in a request line")
    return method, path


def _checked_lines(asked: UpstreamRequest, event: str, target: Target, options: Options) -> HeaderList:
    """The fields that a handler has left, with one Host; what frames the message is not its to say.

    :raises HandlerFailed: when they cannot be sent.
    """
    lines = [
        (name, value)
        for name, value in checked(asked.headers, event)
        if name.lower() not in rules.ASIDE or name.lower() == "trailer"
    ]
    hosts = [value for name, value in lines if name.lower() == "host"]
    if len(hosts) > 1:
        raise HandlerFailed(f"{event}: the request has more than one Host: {', '.join(hosts)}")
    return lines if hosts else rules.with_host(lines, target.authority, options.preserve_header_key_case)


def _without_cookie(fields: HeaderList, name: str) -> HeaderList:
    """The fields without the proxy's own cookie."""
    result = []
    for key, value in fields:
        if key.lower() == "cookie" and name in value:
            parts = [part for part in value.split(";") if part.partition("=")[0].strip() != name]
            rest = ";".join(parts).strip()
            if rest:
                result.append((key, rest))
        else:
            result.append((key, value))
    return result
