"""The HTTP connection handler that every server of ours runs on a connection.

Runs in: a worker, or plain Python. Must never: know of the master.

It is gunicorn's own handler for its gevent worker, so that gunicorn's settings mean on a second
server what they mean on the primary. What belongs to the primary alone (TLS, the PROXY protocol,
the uwsgi protocol, HTTP/2) is switched off on a second server, which no ``bind`` names.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from gevent import socket as gsocket
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.workers.ggevent import GeventWorker

#: gunicorn's settings of the primary's wire, and their neutral values.
_PRIMARY_ONLY = {
    "certfile": None,
    "keyfile": None,
    "proxy_protocol": False,
    "protocol": "http",
    "http_protocols": "h1",
}


class Lifecycle:
    """What a connection handler asks of the process that it serves in, when that is no worker."""

    alive = True
    nr = 0
    max_requests = sys.maxsize


class Handler(GeventWorker):
    """gunicorn's connection handler for one WSGI app."""

    def __init__(self, app: Any, cfg: Any, log: Any, worker: Any) -> None:
        # gunicorn's own __init__ makes a worker process; this is just its request handling
        self.wsgi = app
        self.cfg = cfg
        self.log = log
        self._worker = worker

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

    @property
    def max_requests(self) -> int:
        return int(self._worker.max_requests)


def second_server_config(cfg: Any) -> Any:
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


class Acceptor:
    """Accepts on one listening socket and runs a handler on each connection."""

    def __init__(self, sock: Any, handler: Any, connections: int, share: bool, **tls: Any) -> None:
        """
        :param sock: a listening gevent socket; the acceptor owns it.
        :param connections: how many connections it serves at a time.
        :param share: whether siblings accept from the same socket, so that one connection is
            accepted at a time and they get theirs.
        """
        self.pool = Pool(connections)
        name = ListenerName(sock.getsockname())
        listener = gsocket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.server = StreamServer(
            listener,
            handle=lambda client, addr: handler.handle(name, client, addr),
            spawn=self.pool,
            **tls,
        )
        if share:
            self.server.max_accept = 1

    def start(self) -> None:
        self.server.start()

    def stop_accepting(self) -> None:
        """Close the listening socket; connections go on."""
        self.server.close()

    def pause(self) -> None:
        """Accept nothing more, and leave the listening socket open: it is another process's too."""
        self.server._stop_event.set()
        self.server.stop_accepting()

    def idle(self) -> bool:
        return bool(self.pool.free_count() == self.pool.size)

    def kill(self, timeout: float) -> None:
        """End what still runs."""
        self.server.stop(timeout=timeout)
