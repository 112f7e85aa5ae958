"""The reverse proxy as a WSGI callable.

Process: any process in which the proxy is mounted.
Never: let the failure of one request reach another, or hide the failure of an upstream from the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gunicorn_passenger.proxy import plan as planning
from gunicorn_passenger.proxy.events import Events
from gunicorn_passenger.proxy.forward import execute
from gunicorn_passenger.proxy.forwarded_request import ForwardedRequest
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.plan import ForwardPlan
from gunicorn_passenger.proxy.routes import Route
from gunicorn_passenger.proxy.target import ServerDirectory


class Proxy:
    """Forwards requests to targets."""

    def __init__(
        self,
        target: Any,
        host: Any = None,
        options: Options | None = None,
        servers: ServerDirectory | None = None,
    ) -> None:
        """
        :param target: see ``docs/reference/proxy.md``.
        :param host: the name of the host, for a bare port.
        :param servers: the servers of this application, which a target may name.
        :raises SettingError: (a ``ValueError``) when the target cannot be used.
        """
        self.options = options or Options()
        self.route = Route(target, host, self.options)
        self.events = Events()
        self.servers = servers
        #: the plan for ordinary requests, once there was one
        self.ordinary_plan: ForwardPlan | None = None
        self._buffer: bytes | None = None

    def __str__(self) -> str:
        return str(self.route)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        connection = getattr(environ.get("gunicorn.socket"), "connection", None)
        if connection is not None:
            plan = planning.remembered_plan(self, connection, environ)
            if plan is not None:
                request = ForwardedRequest(self, environ, start_response, connection)
                request.path = path = environ["RAW_URI"]
                request.request_line = b"GET %b HTTP/1.1\r\n" % path.encode()
                request.target = plan.target
                if plan.headers is not None and plan.forwarded_info is not None:
                    request.headers = plan.headers
                    request.forwarded_info = plan.forwarded_info
                request.copies_response = True
                try:
                    return execute(plan, request)
                except BaseException as error:
                    return request.end_with(error)
        return self._forward(environ, start_response)

    def _forward(
        self,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        overrides: dict[str, Any] | None = None,
        must_upgrade: bool = False,
    ) -> Iterable[bytes]:
        request = ForwardedRequest(self, environ, start_response, None)
        try:
            return execute(planning.plan_request(request, overrides, must_upgrade), request)
        except BaseException as error:
            return request.end_with(error)

    def web(
        self, environ: dict[str, Any], start_response: Callable[..., Any], **options: Any
    ) -> Iterable[bytes]:
        """Forward one request, with some options changed for it."""
        return self._forward(environ, start_response, options)

    def ws(
        self, environ: dict[str, Any], start_response: Callable[..., Any], **options: Any
    ) -> Iterable[bytes]:
        """Forward one upgrade; a request that does not ask for one gets 400."""
        return self._forward(environ, start_response, options, must_upgrade=True)

    def buffer_for(self, options: Options) -> Any:
        """The body to send in place of the client's: one for all requests is read once."""
        if options.buffer is not self.options.buffer:
            return options.buffer
        if self._buffer is None:
            self._buffer = bytes(options.buffer.read())
        return self._buffer

    def on(self, event: str, handler: Callable[..., Any] | None = None) -> Any:
        """Call ``handler`` at an event; without a handler, a decorator.

        :raises SettingError: (a ``ValueError``) for an unknown event.
        """
        if handler is None:

            def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
                self.events.on(event, function)
                return function

            self.events.check(event)
            return decorate
        self.events.on(event, handler)
        return handler

    def close(self) -> None:
        """End the health checks, and close the connections to the targets that no request uses."""
        self.route.close()
        self.options.agent.close()
