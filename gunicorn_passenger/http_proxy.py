"""A reverse proxy in the style of node-http-proxy: the public interface of :mod:`gunicorn_passenger.proxy`.

Process: a worker, or plain Python. Never: have logic of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.errors import (
    BadRequestBody,
    BadResponse,
    PoolExhausted,
    ProxyError,
    SettingError,
    UpstreamClosed,
    UpstreamRefused,
    UpstreamTimeout,
)
from gunicorn_passenger.proxy.agent import Agent
from gunicorn_passenger.proxy.handler import Proxy
from gunicorn_passenger.proxy.middleware import ProxyMiddleware
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = [
    "Agent",
    "BadRequestBody",
    "BadResponse",
    "PoolExhausted",
    "ProxyError",
    "ProxyMiddleware",
    "ProxyServer",
    "UpstreamClosed",
    "UpstreamRefused",
    "UpstreamTimeout",
    "create_server",
]


class ProxyServer(Server):
    """A :class:`~gunicorn_passenger.Server` whose application is the proxy."""

    #: its application is the proxy and nothing else: no middleware can have changed its requests
    only_proxy = True

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy, registry)  # without threads: a proxy does not block
        self.proxy = proxy

    @property
    def name(self) -> str:
        return self.given_name or f"proxy to {self.proxy}"

    @property
    def options(self) -> Options:
        """The options, checked."""
        return self.proxy.options

    def web(self, environ: WSGIEnvironment, start_response: StartResponse, **options: Any) -> Iterable[bytes]:
        """Forward one request: ``return proxy.web(environ, start_response)``, for an app that routes itself.

        :param options: options that differ for this request.
        """
        return self.proxy.web(environ, start_response, **options)

    def ws(self, environ: WSGIEnvironment, start_response: StartResponse, **options: Any) -> Iterable[bytes]:
        """Forward one upgrade, such as a WebSocket, in the same way; it returns when that has ended."""
        return self.proxy.ws(environ, start_response, **options)

    def on(self, event: str, fn: Callable[..., Any] | None = None) -> Any:
        """Call ``fn`` at an event; without ``fn``, a decorator. ``docs/reference/proxy.md`` lists the events.

        :raises ValueError: for an unknown event.
        """
        return self.proxy.on(event, fn)

    def off(self, event: str, fn: Callable[..., Any]) -> None:
        """Do not call it any more."""
        self.proxy.events.off(event, fn)

    def close(self) -> None:
        """Stop accepting, and close the connections to the targets that no request uses."""
        super().close()
        self.proxy.close()


def create_server(target: Any = None, host: str | None = None, **options: Any) -> ProxyServer:
    """Make a reverse proxy; ``.listen("passenger")`` puts it where the web server reaches it.

    :param target: a port, ``"http://host:port/base"``, ``"unix:/path"``, the name of a server of this
        application, a list of these, a table of path prefixes, a function of the request, or ``None``
        with ``forward``.
    :param host: the host for a bare port (default ``localhost``).
    :param options: node-http-proxy's options in snake_case, times in seconds, and those that
        ``docs/reference/proxy.md`` lists.
    :raises ValueError: for a value that cannot be used; ``TypeError`` for an unknown option.
    """
    where = "http_proxy.create_server()"
    checked = Options().merged(options, where)
    try:
        proxy = Proxy(target, host, checked, registry.discovery)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    if not registry.started:
        registry.discovery.named_by_proxies |= proxy.route.server_names()
    return ProxyServer(proxy)
