"""Which HTTP handler serves a listener: ours, or gunicorn's own where ours does not do what is asked.

Runs in: a worker, or plain Python. Must never: know of the master.

Ours speaks HTTP/1.x in the clear. TLS, HTTP/2, the PROXY protocol and the uwsgi protocol are
gunicorn's: it is decided here, once for each listener, and said in the log at debug level. What
belongs to the primary alone is switched off on a second server, which no ``bind`` names.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

from gevent import socket as gsocket
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.http.acceptor import Acceptor
from gunicorn_passenger.http.access_log import escape_access_log
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.ipc.scoreboard import Counters

#: gunicorn's settings of the primary's wire, and their neutral values.
_PRIMARY_ONLY = {
    "certfile": None,
    "keyfile": None,
    "proxy_protocol": False,
    "protocol": "http",
    "http_protocols": "h1",
}


class ListenerHandler(Protocol):
    """What the worker asks of the acceptor of a listener."""

    def start(self) -> None: ...
    def serve(self, app: Any) -> None: ...
    def stop_accepting(self) -> None: ...
    def pause(self) -> None: ...
    def idle(self) -> bool: ...
    def kill(self, timeout: float) -> None: ...
    def counts(self) -> Counters: ...
    def waiting(self, most: int) -> list[tuple[Any, Any]]: ...
    def adopt(self, sock: Any, addr: Any, early: bytes = b"", begun: bool = False) -> Any: ...
    @property
    def sockname(self) -> Any: ...
    def done(self) -> bool: ...


def unsupported_features(cfg: Any) -> str:
    """What gunicorn is configured to do that our handler does not, for the log; empty if nothing."""
    if cfg.is_ssl:
        return "TLS"
    if getattr(cfg, "protocol", "http") != "http":
        return f"the {cfg.protocol} protocol"
    if getattr(cfg, "proxy_protocol", False) not in (False, None, "off"):
        return "the PROXY protocol"
    if "h2" in str(getattr(cfg, "http_protocols", "h1")).replace(" ", "").split(","):
        return "HTTP/2"
    return ""


def make_acceptor(sock: Any, app: Any, cfg: Any, log: Any, worker: Any) -> ListenerHandler:
    """The acceptor of a listener.

    :param sock: a listening gevent socket; the acceptor owns it.
    :param app: the WSGI callable.
    :param cfg: gunicorn's configuration, as it applies there.
    :param worker: gunicorn's worker, or a
        :class:`~gunicorn_passenger.http.listener_context.StandaloneWorker`.
    """
    share = cfg.workers > 1
    escape_access_log(log)
    sockname = sock.getsockname()
    if reason := unsupported_features(cfg):
        log.debug("%s is served by gunicorn's own handler: %s is set", format_sockname(sockname), reason)
        tls = {"ssl_context": ssl_context(cfg)} if cfg.is_ssl else {}
        return GunicornAcceptor(
            sock, GunicornHandler(app, cfg, log, worker), cfg.worker_connections, share, **tls
        )
    gateway = ListenerContext(
        app, cfg, log, worker, sockname, settings.timeouts(), settings.closes_websockets_on_exit()
    )
    if gateway.reader.slow_parser_reason:
        log.debug(
            "%s: requests are parsed by gunicorn's Python parser: %s",
            format_sockname(sockname),
            gateway.reader.slow_parser_reason,
        )
    return Acceptor(sock, gateway, cfg.worker_connections, share)


class GunicornHandler(GeventWorker):
    """gunicorn's connection handler for one WSGI app."""

    def __init__(self, app: Any, cfg: Any, log: Any, worker: Any) -> None:
        # gunicorn's own __init__ makes a worker process; this is just its request handling
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
        self._worker.alive = value

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
    # not copy.copy(): an older Config looks its own attributes up in itself and never ends
    second = object.__new__(type(cfg))
    second.__dict__.update(cfg.__dict__, settings=dict(cfg.settings))
    for name, value in _PRIMARY_ONLY.items():
        if name in second.settings:
            setting = copy.copy(second.settings[name])
            setting.set(value)
            second.settings[name] = setting
    return second


class ListenerName:
    """The listener as gunicorn's handler sees it, which asks it for its name at each connection.

    A connection may be accepted just before the listener is closed and handled just after; asking
    the closed socket would fail, and the client would be reset.
    """

    def __init__(self, name: Any) -> None:
        self._name = name

    def getsockname(self) -> Any:
        return self._name


class GunicornAcceptor:
    """Accepts on one listening socket and runs gunicorn's handler on each connection."""

    def __init__(self, sock: Any, handler: Any, connections: int, share: bool, **tls: Any) -> None:
        """
        :param sock: a listening gevent socket; the acceptor owns it.
        :param connections: how many connections it serves at a time.
        :param share: whether siblings accept from the same socket, so that one connection is
            accepted at a time and they get theirs.
        """
        self.pool = Pool(connections)
        self._handler = handler
        self._accepted = 0
        self._closed = False
        name = self._name = ListenerName(sock.getsockname())
        listener = gsocket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.server = StreamServer(
            listener,
            handle=lambda client, addr: self._handle(name, client, addr),
            spawn=self.pool,
            **tls,
        )
        if share:
            self.server.max_accept = 1

    def start(self) -> None:
        self.server.start()

    def serve(self, app: Any) -> None:
        """From now on, serve this."""
        self._handler.wsgi = app

    def stop_accepting(self) -> None:
        """Close the listening socket; connections go on."""
        self._closed = True
        self.server.close()

    def pause(self) -> None:
        """Accept nothing more, and leave the listening socket open: it is another process's too."""
        self.server._stop_event.set()
        self.server.stop_accepting()

    def _handle(self, name: Any, client: Any, addr: Any) -> None:
        self._accepted += 1
        # the name that a client of a UNIX socket has bound is not an address
        self._handler.handle(name, client, addr if isinstance(addr, tuple) else "")

    def idle(self) -> bool:
        return bool(self.pool.free_count() == self.pool.size)

    def done(self) -> bool:
        return self._closed and self.idle()

    def waiting(self, most: int) -> list[tuple[Any, Any]]:
        """None: gunicorn's handler cannot tell, and TLS has a state of its own."""
        return []

    def adopt(self, sock: Any, addr: Any, early: bytes = b"", begun: bool = False) -> Any:
        raise NotImplementedError  # nobody gives such a connection away

    @property
    def sockname(self) -> Any:
        return self._name.getsockname()

    def counts(self) -> Counters:
        """What it has done so far; bytes and errors are gunicorn's, which does not count them."""
        return Counters(len(self.pool), self._accepted, self._handler.requests)

    def kill(self, timeout: float) -> None:
        """End what still runs."""
        self.server.stop(timeout=timeout)
