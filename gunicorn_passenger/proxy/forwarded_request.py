"""The state of one request that is forwarded, and how it ends: well, with an error, or without its client.

Process: any process in which the proxy is mounted, in the greenlet or thread of the request.
Never: leave a connection in use when the request is over.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from urllib.parse import quote

from werkzeug.exceptions import default_exceptions
from werkzeug.wrappers import Request, Response

from gunicorn_passenger.errors import ClientDisconnected, ProxyError, TruncatedResponse
from gunicorn_passenger.http.downstream_api import DownstreamConnection
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.downstream import NativeDownstream, WsgiDownstream, downstream_for
from gunicorn_passenger.proxy.events import Events, HandlerFailed, UpstreamResponse
from gunicorn_passenger.proxy.log import log
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.pool import UpstreamConnection
from gunicorn_passenger.proxy.request_body import NO_BODY_SENDER, RequestBodySender
from gunicorn_passenger.proxy.request_headers import ForwardedInfo, RequestHeaders
from gunicorn_passenger.proxy.round_trip import RoundTrip
from gunicorn_passenger.proxy.routes import Backend, Route
from gunicorn_passenger.proxy.target import ServerDirectory, Target
from gunicorn_passenger.proxy.wait_errors import DownstreamDisconnected
from gunicorn_passenger.system.text import printable

_TEXTS = {
    502: "The server behind this proxy did not respond as it should.",
    503: "All connections to the server behind this proxy are in use; try again in a moment.",
    504: "The server behind this proxy did not respond in time.",
}


class LocalResponse(Exception):
    """The proxy itself responds: no upstream gets the request."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class ProxyContext(Protocol):
    """What a request needs of its :class:`~.handler.Proxy`."""

    options: Options
    route: Route
    events: Events
    servers: ServerDirectory | None
    #: the :class:`~.plan.ForwardPlan` for ordinary requests, once there was one
    ordinary_plan: Any

    def buffer_for(self, options: Options) -> Any:
        """The body to send in place of the client's."""


class ForwardedRequest:
    """One request of a client."""

    # class attributes: most requests leave these as they are
    method = "GET"
    #: the first line of the request to the upstream
    request_line = b""
    #: the path that the client has asked for, as the upstream may be sent it, and the one that it is sent
    path = ""
    upstream_path = ""
    #: what stands before the path with ``to_proxy``, such as ``http://host``
    authority_prefix = ""
    #: the target as the route names it; ``None`` before it is chosen
    target: Target | None = None
    #: the one of the targets that is tried now
    backend: Backend | None = None
    #: whether to wait for a connection when the pool has none
    waits = True
    #: whether the response, when it comes as a whole, may go to the client unchanged
    copies_response = False
    #: the connection to the upstream that the request owns, and its response when that is read in parts
    upstream: UpstreamConnection | None = None
    round_trip: RoundTrip | None = None
    upstream_response: UpstreamResponse | None = None
    #: whether the head of a response was given to the WSGI server
    response_started = False
    #: the id in the sticky cookie of the client, and the ``Set-Cookie`` for the response
    sticky_id = ""
    new_cookie = ""
    _downstream: WsgiDownstream | None = None
    _headers: RequestHeaders | None = None
    _forwarded_info: ForwardedInfo | None = None
    _werkzeug_request: Any = None

    def __init__(
        self,
        proxy: ProxyContext,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        connection: DownstreamConnection | None,
    ) -> None:
        """
        :param connection: our own connection that the request has come over, where the proxy may use it.
        """
        self.proxy = proxy
        self.environ = environ
        self.start_response = start_response
        self.connection = connection
        self.options = proxy.options
        self.began = time.monotonic()
        self.sender: RequestBodySender = NO_BODY_SENDER
        #: the targets that remain to be tried
        self.backends: list[Backend] = []

    # --- the client ------------------------------------------------------------------------------

    @property
    def downstream(self) -> WsgiDownstream:
        """The client, and how the proxy speaks to it."""
        found = self._downstream
        if found is None:
            if self.connection is not None:
                found = NativeDownstream(self.environ, self.start_response, self.connection, True)
            else:
                found = downstream_for(self.environ, self.start_response, self.proxy)
                self.connection = found.connection
            self._downstream = found
        return found

    @property
    def headers(self) -> RequestHeaders:
        """The headers that are meant for the target."""
        if self._headers is None:
            self._headers = self.downstream.headers(self.options.preserve_header_key_case)
        return self._headers

    @headers.setter
    def headers(self, headers: RequestHeaders) -> None:
        self._headers = headers

    @property
    def forwarded_info(self) -> ForwardedInfo:
        """Where the request comes from."""
        if self._forwarded_info is None:
            self._forwarded_info = self.downstream.forwarded_info(self.options, self.headers.host)
        return self._forwarded_info

    @forwarded_info.setter
    def forwarded_info(self, info: ForwardedInfo) -> None:
        self._forwarded_info = info

    def werkzeug_request(self) -> Any:
        """The request as the program's handlers get it."""
        if self._werkzeug_request is None:
            self._werkzeug_request = Request(self.environ)
        return self._werkzeug_request

    def note_start(self, *arguments: Any) -> Any:
        """``start_response`` for an application that responds in place of the upstream."""
        self.response_started = True
        return self.start_response(*arguments)

    @property
    def has_responded(self) -> bool:
        """Whether the head of a response is on its way to the client."""
        if self.response_started:
            return True
        response = self.connection.response if self.connection is not None else None
        return response is not None and response.headers_sent

    # --- the end ---------------------------------------------------------------------------------

    def complete(self) -> None:
        """The response was sent to its end."""
        self.end()
        if self.proxy.events.has("end"):
            self._notify("end", self.werkzeug_request(), self.upstream_response)

    def tunnel_closed(self, tunnel: Any) -> None:
        """The tunnel of this request has ended."""
        self.end()
        if self.proxy.events.has("close"):
            self._notify("close", tunnel)

    def end(self, broken: bool = False) -> None:
        """Give back what the request uses; harmless when repeated.

        :param broken: whether the connection to the upstream cannot carry another request.
        """
        self.leave_backend()
        upstream, self.upstream = self.upstream, None
        round_trip, self.round_trip = self.round_trip, None
        if round_trip is not None:
            if broken:
                round_trip.abort()
            else:
                round_trip.finish()
        elif upstream is not None:
            upstream.stream.shutdown()
            upstream.pool.discard(upstream)
        mirror = self.sender.mirror
        if mirror is not None:
            # whatever became of the request: a mirrored body that was not fed to its end is given up
            mirror.end(whole=False)

    def leave_backend(self) -> None:
        """This request does not count any more for the target that it was sent to."""
        if self.backend is not None:
            self.backend.active -= 1
            self.backend = None

    def _notify(self, event: str, *arguments: Any) -> None:
        """Call handlers whose failure cannot change the response any more."""
        try:
            self.proxy.events.emit(event, *arguments)
        except HandlerFailed as error:
            log.error("proxy: %s", error, exc_info=error.cause)

    # --- errors ----------------------------------------------------------------------------------

    def end_with(self, error: BaseException) -> Iterable[bytes]:
        """End the request with an exception: most of them become a response.

        :raises TruncatedResponse: when the response has begun and cannot be finished.
        :raises ClientDisconnected: when the client has disconnected.
        """
        if isinstance(error, LocalResponse):
            self.end()
            return self._respond(error.status, error.text)
        if isinstance(error, ProxyError):
            return self._fail(error)
        if isinstance(error, (DownstreamDisconnected, ClientDisconnected)):
            raise self.client_gone(error) from None
        if isinstance(error, (HandlerFailed, wire.Unsendable)):
            return self._handler_failed(error)
        self.end(broken=True)
        raise error

    def _respond(self, status: int, text: str) -> Iterable[bytes]:
        if status == 200:
            self.start_response("200 OK", [("Content-Length", "0")])
            return []
        if status == 400 and self.connection is not None and self.connection.response is not None:
            # the bytes after such a request must not be read as another one
            self.connection.response.force_close()
        error = default_exceptions[status](description=text)
        return error.get_response(self.environ)(self.environ, self.start_response)

    def _fail(self, error: ProxyError) -> Iterable[bytes]:
        """The upstream sent no response, or a truncated one."""
        self.end(broken=True)
        error.target = error.target or self.target
        error.elapsed = time.monotonic() - self.began
        line = printable(
            f"proxy: {error.target if error.target is not None else self.proxy}: {error.reason}, "
            f"after {error.elapsed:.3f} s ({self.environ['REQUEST_METHOD']} {self._shown_path()})"
        )
        made = None
        events = self.proxy.events
        if events.has("error"):
            try:
                made = events.emit("error", error, self.werkzeug_request(), error.target)
            except HandlerFailed as failure:
                if not self.has_responded:
                    log.error("%s: %s", line, error.status_code)
                    return self._handler_failed(failure)
                log.error("proxy: %s", failure, exc_info=failure.cause)
        if self.has_responded:
            raise TruncatedResponse(f"{line}: the response is truncated")
        log.error("%s: %s", line, error.status_code)
        if callable(made):
            result: Iterable[bytes] = made(self.environ, self.start_response)
            return result
        status = error.status_code
        headers = [("Retry-After", "1")] if status == 503 else []
        text = _TEXTS.get(status, error.reason)
        response: Response = default_exceptions[status](description=text).get_response(self.environ)
        response.headers.extend(headers)
        return response(self.environ, self.start_response)

    def mirror_failed(self, error: ProxyError, target: Target) -> None:
        """The request was not mirrored. Handlers of ``error`` are told; what they return is not used."""
        error.target = error.target or target
        error.elapsed = time.monotonic() - self.began
        log.warning("proxy: %s: a request was not mirrored: %s", target, error)
        if self.proxy.events.has("error"):
            self._notify("error", error, self.werkzeug_request(), target)

    def _shown_path(self) -> str:
        return (self.path or quote(self.environ.get("PATH_INFO", ""), encoding="latin-1"))[:200]

    def _handler_failed(self, error: HandlerFailed | wire.Unsendable) -> Iterable[bytes]:
        self.end(broken=True)
        log.error(
            "proxy: %s (%s %s): 500",
            error,
            self.environ["REQUEST_METHOD"],
            self._shown_path(),
            exc_info=error.cause if isinstance(error, HandlerFailed) else None,
        )
        if self.has_responded:
            raise TruncatedResponse("proxy: a handler has failed, and the response is truncated")
        return self._respond(500, "The proxy cannot respond to this request.")

    def client_gone(self, error: BaseException) -> ClientDisconnected:
        """End the request of a client that has disconnected.

        :returns: what the caller raises.
        """
        self.end(broken=True)
        if not isinstance(error, ClientDisconnected):
            error = ClientDisconnected(errno.ECONNABORTED, "the client disconnected before the response")
        if self.proxy.events.has("econnreset"):
            self._notify("econnreset", error, self.werkzeug_request(), self.target)
        return error
