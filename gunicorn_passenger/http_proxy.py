"""A reverse proxy in the style of node-http-proxy: the public face of :mod:`gunicorn_passenger.proxy`.

Runs in: a worker, or plain Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gunicorn_passenger.errors import SettingError, UnknownSetting
from gunicorn_passenger.proxy.core import Proxy
from gunicorn_passenger.serving.application import application
from gunicorn_passenger.serving.server import Server

__all__ = ["ProxyServer", "create_server"]

_OPTIONS = ("xfwd", "change_origin", "headers", "proxy_timeout")


class ProxyServer(Server):
    """A :class:`~gunicorn_passenger.Server` whose application is the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy, application)
        self.proxy = proxy

    @property
    def name(self) -> str:
        return self._name or f"proxy to {self.proxy.target}"

    def web(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Carry one request: ``return proxy.web(environ, start_response)``, for an app that routes itself."""
        return self.proxy.web(environ, start_response)


def create_server(target: object, host: str | None = None, **options: Any) -> ProxyServer:
    """Make a reverse proxy; ``.listen("passenger")`` puts it where the web server reaches it.

    :param target: a port, ``"http://host:port/base"`` or ``"unix:/path"``.
    :param host: the host for a bare port (default ``localhost``).
    :param xfwd: write ``X-Forwarded-For``, ``-Port``, ``-Proto`` and ``-Host`` (default off).
    :param change_origin: send the target's own name as ``Host`` (default off).
    :param headers: fields to set on every request to the target.
    :param proxy_timeout: seconds that the target may take to accept or to go on (default: no limit).
    :raises ValueError: for a value that cannot be used; ``TypeError`` for an unknown option.
    """
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise UnknownSetting(f"http_proxy.create_server() has no option {name!r}; there are: {known}")
    try:
        return ProxyServer(Proxy(target, host, **options))
    except ValueError as error:
        raise SettingError(f"http_proxy.create_server(): {error}") from None
