"""Chooses the HTTP handler of a listener: ours, or gunicorn's own for features that ours lacks.

Process: a worker, or plain Python.
Never: use the master.

Our handler speaks HTTP/1.x without TLS. gunicorn's serves TLS, HTTP/2, the PROXY protocol and the uwsgi
protocol. The choice is made once for each listener, and logged at debug level. gunicorn's settings for
these features hold for the primary alone; a server that no ``bind`` names does without them.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Protocol

from gevent import socket as gsocket
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.access_log import escape_access_log
from gunicorn_passenger.http.listener_context import ListenerContext, StandaloneWorker
from gunicorn_passenger.ipc.accept_balance import AcceptBalance
from gunicorn_passenger.ipc.scoreboard import Counters
from gunicorn_passenger.system.tcp_keepalive import enable_tcp_keepalive

#: gunicorn's settings for the primary's wire protocol, and their neutral values.
_PRIMARY_ONLY = {
    "certfile": None,
    "keyfile": None,
    "proxy_protocol": False,
    "protocol": "http",
    "http_protocols": "h1",
}


class ListenerHandler(Protocol):
    """The acceptor of a listener, as the worker uses it."""

    def start(self) -> None: ...
    def set_app(self, app: Any) -> None: ...
    def stop_accepting(self) -> None: ...
    def leave_to_parent(self) -> None: ...
    def idle(self) -> bool: ...
    def kill(self, timeout: float) -> None: ...
    def counts(self) -> Counters: ...
    def pop_idle_connections(self, most: int) -> list[tuple[Any, Any]]: ...
    def make_room(self) -> bool: ...
    def attach(self, sock: Any, addr: Any, begun: bool = False, data: bytes = b"") -> Any: ...
    @property
    def sockname(self) -> Any: ...
    def is_drained(self) -> bool: ...


def unsupported_features(cfg: Any) -> str:
    """A configured feature that our handler lacks, for the log; empty if it has all that is configured."""
    if cfg.is_ssl:
        return "TLS"
    if getattr(cfg, "protocol", "http") != "http":
        return f"the {cfg.protocol} protocol"
    if getattr(cfg, "proxy_protocol", False) not in (False, None, "off"):
        return "the PROXY protocol"
    if "h2" in str(getattr(cfg, "http_protocols", "h1")).replace(" ", "").split(","):
        return "HTTP/2"
    return ""


def make_acceptor(
    sock: Any, app: Any, cfg: Any, log: Log, worker: Any, balance: AcceptBalance | None = None
) -> ListenerHandler:
    """The acceptor of a listener.

    :param sock: a listening socket, whose descriptor the acceptor owns from now on.
    :param app: the WSGI callable.
    :param cfg: gunicorn's configuration, as it applies there.
    :param worker: gunicorn's worker; ``None`` under plain Python.
    :param balance: shares the connections with the worker's siblings; gunicorn's own handler does not use it.
    """
    sock = gsocket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    worker = worker or StandaloneWorker()
    escape_access_log(log)
    enable_tcp_keepalive(sock)
    sockname = sock.getsockname()
    if reason := unsupported_features(cfg):
        log.debug(
            "gunicorn's own handler serves %s, because %s is configured", format_sockname(sockname), reason
        )
        tls = {"ssl_context": ssl_context(cfg)} if cfg.is_ssl else {}
        return GunicornAcceptor(
            sock, GunicornHandler(app, cfg, log, worker), cfg.worker_connections, cfg.workers > 1, **tls
        )
    listener = ListenerContext(
        app, cfg, log, worker, sockname, settings.timeouts(), settings.closes_websockets_on_exit()
    )
    if listener.reader.slow_parser_reason:
        log.debug(
            "%s: gunicorn's Python parser, which is slower, parses the requests: %s",
            format_sockname(sockname),
            listener.reader.slow_parser_reason,
        )
    return Acceptor(sock, listener, cfg.worker_connections, balance)


class GunicornHandler(GeventWorker):
    """gunicorn's connection handler for one WSGI app."""

    def __init__(self, app: Any, cfg: Any, log: Log, worker: Any) -> None:
        # gunicorn's own __init__ prepares a worker process; only its request handling is used here
        self.wsgi = app
        self.cfg = cfg
        self.log = log
        self._worker = worker
        self.requests = 0

    @property
    def alive(self) -> bool:
        return bool(self._worker.alive)

    @alive.setter
    def alive(self, value: bool) -> None:
        # gunicorn's code sets it after max_requests
        self._worker.retire()

    @property
    def nr(self) -> int:
        return int(self._worker.nr)

    @nr.setter
    def nr(self, value: int) -> None:
        self._worker.nr = value
        self.requests += 1

    @property
    def max_requests(self) -> int:
        return int(self._worker.max_requests)


def secondary_config(cfg: Any) -> Any:
    """gunicorn's configuration as it applies to a server that no ``bind`` names."""
    # not copy.copy(): the Config of older gunicorns recurses forever on it
    second = object.__new__(type(cfg))
    second.__dict__.update(cfg.__dict__, settings=dict(cfg.settings))
    for name, value in _PRIMARY_ONLY.items():
        if name in second.settings:
            setting = copy.copy(second.settings[name])
            setting.set(value)
            second.settings[name] = setting
    return second


class GunicornAcceptor:
    """Accepts on one listening socket and runs gunicorn's handler on each connection."""

    def __init__(self, sock: Any, handler: Any, connections: int, share: bool, **tls: Any) -> None:
        """
        :param sock: a listening gevent socket; the acceptor owns it.
        :param connections: how many connections it serves at a time.
        :param share: whether siblings accept from the same socket. It then accepts one connection at a time,
            so that they get their share.
        """
        self.pool = Pool(connections)
        self._handler = handler
        self._accepted = 0
        self._closed = False
        self.sockname = sock.getsockname()
        # Stands in for the listener, whose name gunicorn's handler reads for each connection: one that was
        # accepted just before the listener closed is handled just after, and the closed socket would raise.
        listener = SimpleNamespace(getsockname=lambda: self.sockname)
        self.server = StreamServer(
            sock,
            handle=lambda client, addr: self._handle(listener, client, addr),
            spawn=self.pool,
            **tls,
        )
        if share:
            self.server.max_accept = 1

    def start(self) -> None:
        self.server.start()

    def set_app(self, app: Any) -> None:
        """From now on, serve this application."""
        self._handler.wsgi = app

    def stop_accepting(self) -> None:
        """Close the listening socket; open connections continue."""
        self._closed = True
        self.server.close()

    def leave_to_parent(self) -> None:
        """In a forked child: accept nothing, and leave the listening socket open for the parent."""
        self.server._stop_event.set()
        self.server.stop_accepting()

    def _handle(self, name: Any, client: Any, addr: Any) -> None:
        self._accepted += 1
        # a client of a UNIX socket may have bound a name, which is not an address
        self._handler.handle(name, client, addr if isinstance(addr, tuple) else "")

    def idle(self) -> bool:
        return bool(self.pool.free_count() == self.pool.size)

    def is_drained(self) -> bool:
        return self._closed and self.idle()

    def pop_idle_connections(self, most: int) -> list[tuple[Any, Any]]:
        """None: gunicorn's handler does not know its idle connections, and TLS state cannot migrate."""
        return []

    def make_room(self) -> bool:
        """:returns: that it takes no connections of siblings."""
        return False

    def attach(self, sock: Any, addr: Any, begun: bool = False, data: bytes = b"") -> Any:
        raise NotImplementedError("gunicorn's handler takes no connections of siblings")

    def counts(self) -> Counters:
        """Its counters; gunicorn's handler counts neither bytes nor errors."""
        return Counters(len(self.pool), self._accepted, self._handler.requests)

    def kill(self, timeout: float) -> None:
        """End the open connections.

        :param timeout: seconds that they may take.
        """
        self.server.stop(timeout=timeout)
