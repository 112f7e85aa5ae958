"""The proxy as WSGI middleware, with the arguments of Werkzeug's ``ProxyMiddleware``.

Process: any process in which it is mounted.
Never: send a request of the application to a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.proxy.agent import Agent, positive
from gunicorn_passenger.proxy.handler import Proxy
from gunicorn_passenger.proxy.options import Options

#: the value of Werkzeug's ``host`` that stands for the host of the target
_AUTO = "<auto>"


class ProxyMiddleware:
    """Sends requests below some paths to other servers, and all others to the application.

    In place of ``werkzeug.middleware.http_proxy.ProxyMiddleware``: bodies are streamed both ways,
    connections are kept, and upgrades work under our worker.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        targets: Mapping[str, Mapping[str, Any]],
        chunk_size: int = 2 << 13,
        timeout: float = 10,
        **options: Any,
    ) -> None:
        """
        :param app: gets all requests that do not belong to a target.
        :param targets: path prefixes and for each a dict with ``target`` (a URL, or what else
            :func:`~gunicorn_passenger.http_proxy.create_server` takes), and perhaps ``remove_prefix``
            (default false), ``host`` (the Host field to send: ``"<auto>"``, the target's, by default;
            ``None``: the client's), ``headers`` and ``ssl_context``, and options of this proxy. The first
            that a path begins with counts.
        :param chunk_size: accepted for compatibility with Werkzeug: chunks are forwarded as they come.
        :param timeout: seconds for connecting and for the silence of a target.
        :param options: the proxy's, for all targets.
        :raises ValueError: for a value that cannot be used; ``TypeError`` for an unknown option.
        """
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise SettingError(f"chunk_size={chunk_size!r} is not a number of bytes")
        seconds = positive("timeout", timeout)
        self.app = app
        self._seconds = seconds
        common = Options().merged(
            {"proxy_timeout": seconds, "change_origin": True, **options}, "ProxyMiddleware()"
        )
        self._agent_given = "agent" in options
        self.targets: dict[str, Proxy] = {}
        for prefix, given in targets.items():
            inside = prefix.strip("/")
            self.targets[f"/{inside}/" if inside else "/"] = self._proxy(prefix, dict(given), common)

    def _proxy(self, prefix: str, given: dict[str, Any], common: Options) -> Proxy:
        where = f"ProxyMiddleware(): the entry of {prefix!r}"
        if "target" not in given:
            raise SettingError(f"{where} has no 'target'")
        target = given.pop("target")
        remove = bool(given.pop("remove_prefix", False))
        host = given.pop("host", _AUTO)
        context = given.pop("ssl_context", None)
        if host is None:
            given["change_origin"] = False
        elif host != _AUTO:
            given["headers"] = {**(given.get("headers") or {}), "Host": host}
        if not self._agent_given and "agent" not in given:
            given["agent"] = Agent(connect_timeout=self._seconds, ssl_context=context)
        # as in Werkzeug, the path of the target is used where it replaces the prefix
        given.setdefault("prepend_path", remove)
        options = common.merged(given, where)
        try:
            proxy = Proxy(
                {
                    prefix if prefix.startswith("/") else f"/{prefix}": {
                        "target": target,
                        "remove_prefix": remove,
                    }
                },
                None,
                options,
            )
        except SettingError as error:
            raise SettingError(f"{where}: {error}") from None
        return proxy

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        for prefix, proxy in self.targets.items():
            if path.startswith(prefix):
                return proxy(environ, start_response)
        result: Iterable[bytes] = self.app(environ, start_response)
        return result
