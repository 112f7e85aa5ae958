"""The reverse proxy: a request comes in, is written anew for its target, and the answer goes back.

Runs in: wherever it is mounted. Must never: collect a body, let one request's failure reach another, or
answer for a target without a line in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.proxy import fast_path
from gunicorn_passenger.proxy.events import Events
from gunicorn_passenger.proxy.forward import ForwardedRequest
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.routes import Route
from gunicorn_passenger.proxy.target import Target


class Proxy:
    """Carries requests to targets. A WSGI callable."""

    def __init__(
        self,
        target: Any,
        host: str | None = None,
        options: Options | None = None,
        find_server: Callable[[str], Target] | None = None,
    ) -> None:
        """
        :param target: see ``docs/proxy.md``.
        :param host: of a bare port.
        :param find_server: gives the address of a server of this application by its name; raises
            ``LookupError`` when there is none.
        :raises SettingError: (a ``ValueError``) when the target is none.
        """
        self.options = options or Options()
        self.route = Route(target, host, self.options)
        self.events = Events()
        self.find_server = find_server or _no_server
        self._buffer: bytes | None = None

    def __str__(self) -> str:
        return str(self.route)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        connection: Any = getattr(environ.get("gunicorn.socket"), "connection", None)
        if connection is not None and connection.memo is not None:
            # what is remembered of a connection's last request is there only when nobody stands between it
            # and the proxy
            answer: Iterable[bytes] | None = fast_path.carry(self, connection, environ, start_response)
            if answer is not None:
                return answer
        return ForwardedRequest(self, environ, start_response, None).run()

    def resume(
        self, environ: dict[str, Any], start_response: Callable[..., Any], *state: Any
    ) -> Iterable[bytes]:
        """Carry on what went the straight way so far."""
        return ForwardedRequest(self, environ, start_response, None).resume(*state)

    def web(
        self, environ: dict[str, Any], start_response: Callable[..., Any], **options: Any
    ) -> Iterable[bytes]:
        """Carry one request, with some options changed for it."""
        return ForwardedRequest(self, environ, start_response, options).run()

    def ws(
        self, environ: dict[str, Any], start_response: Callable[..., Any], **options: Any
    ) -> Iterable[bytes]:
        """Carry one upgrade; what is none is answered with 400."""
        return ForwardedRequest(self, environ, start_response, options, must_upgrade=True).run()

    def buffer_for(self, options: Options) -> Any:
        """The body to send in place of the client's: one that is for all requests is read once."""
        if options.buffer is not self.options.buffer:
            return options.buffer
        if self._buffer is None:
            self._buffer = bytes(options.buffer.read())
        return self._buffer

    def on(self, event: str, handler: Callable[..., Any] | None = None) -> Any:
        """Call ``handler`` at an event; without one, a decorator.

        :raises SettingError: (a ``ValueError``) for an event that there is not.
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
        """Close the connections to the targets that no request uses."""
        self.options.agent.close()


def _no_server(name: str) -> Target:
    raise LookupError(name)


__all__ = ["Proxy", "SettingError"]
