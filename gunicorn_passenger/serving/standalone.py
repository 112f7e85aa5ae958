"""Plain Python without gunicorn: no master exists, so the process opens its ports and serves by itself.

Process: plain Python.
Never: run in a worker.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Protocol

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import Address, Auto, Tcp, Unix, format_sockname, resolve
from gunicorn_passenger.config.port_allocation import PortAllocation
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.serving import events, server_errors
from gunicorn_passenger.serving.acceptor_table import AcceptorTable
from gunicorn_passenger.serving.finish import Drainable, finish_connections
from gunicorn_passenger.serving.scheduler import Scheduler
from gunicorn_passenger.serving.server import ListenAddress
from gunicorn_passenger.system.live_objects import live_objects
from gunicorn_passenger.system.port_opening import ListenRequest, open_listener

#: Where ``"passenger"`` is served, unless PORT says otherwise.
DEVELOPMENT_PORT = 8000


class StandaloneServers(Drainable, Protocol):
    """The servers of a process without gunicorn."""

    acceptors: AcceptorTable
    servers: list[Any]
    scheduler: Scheduler | None

    def start(self) -> None:
        """Accept on everything."""

    def stop_accepting(self) -> None:
        """Close the listening sockets."""


def run(servers: StandaloneServers) -> None:
    """Accept until interrupted (Ctrl-C or SIGTERM), then finish the open connections."""
    import gevent  # gunicorn's master and workers of other classes import this module, and not gevent
    from gevent.event import Event

    from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler

    servers.scheduler = GeventScheduler()
    interrupted = Event()
    watchers = [gevent.signal_handler(number, interrupted.set) for number in (signal.SIGINT, signal.SIGTERM)]
    cfg, log = servers.acceptors.configuration()
    servers.start()
    events.emit("ready", None, log)
    try:
        interrupted.wait()
    finally:
        for watcher in watchers:
            watcher.cancel()
        servers.stop_accepting()
        servers.acceptors.finish()
        finish_connections(servers, cfg.graceful_timeout, log, gevent.sleep)
        events.emit("exit", None, log)
        for server in servers.servers:
            _unlink(server.address)


def open_socket(want: Address | None, primary: bool) -> ListenAddress:
    """Open the listening socket of a server.

    :param primary: whether the server is the primary; its address is printed.
    :raises errors.ListenError: when it cannot be opened, or gunicorn runs another worker class.
    """
    if (found := worker_class()) is not None:
        raise server_errors.hooks_missing(found)
    sock = _open(want)
    name = sock.getsockname()
    if primary:
        print(f"Serving on http://{format_sockname(name)}/ (plain Python, for development)", file=sys.stderr)
    return ListenAddress(sock, name, format_sockname(name))


def worker_class() -> str | None:
    """The worker class of the gunicorn that this process belongs to, if it does."""
    arbiters = sys.modules.get("gunicorn.arbiter")
    if arbiters is None:
        return None
    arbiter = next(live_objects(arbiters.Arbiter), None)
    return None if arbiter is None else str(arbiter.cfg.worker_class_str)


def _open(want: Address | None) -> Any:
    if isinstance(want, Unix):
        return open_listener(ListenRequest("unix", path=want.path), None)
    if isinstance(want, Tcp):
        allocation = program_allocation()
        # a refusal comes before the host name is resolved
        allocation.check(want.port)
        return open_listener(ListenRequest("tcp", resolve(want.host, want.port)[1], want.port), allocation)
    if isinstance(want, Auto):
        return open_listener(ListenRequest("auto", resolve(want.host, 0)[1]), program_allocation())
    return open_listener(ListenRequest("tcp", "127.0.0.1", development_port()), None)


def program_allocation() -> PortAllocation:
    """The port allocation of a program without gunicorn."""
    return settings.operator_allocation(os.geteuid()).narrowed(settings.program_layer())


def development_port() -> int:
    """The port of the primary under plain Python.

    :raises errors.SettingError: when the environment variable PORT is not a port number.
    """
    text = os.environ.get("PORT", "").strip()
    if not text:
        return DEVELOPMENT_PORT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise errors.SettingError(f"PORT={text!r} is not a number from 1 to 65535")
    return int(text)


def _unlink(address: object) -> None:
    """Remove the file of a UNIX socket that this process has opened."""
    if isinstance(address, str) and address.startswith("unix:"):
        path = address[len("unix:") :]
        if os.path.exists(path):
            os.unlink(path)
