"""gunicorn-passenger: second servers, shared ports and a reverse proxy for programs under gunicorn.

The public face, and nothing else. Runs in: every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gunicorn_passenger import errors
from gunicorn_passenger.daemons import Daemon, spawn
from gunicorn_passenger.errors import (
    AlreadyInstalled,
    DaemonError,
    ListenError,
    PassengerError,
    PortInUse,
    PortNotAllotted,
    SettingError,
    UnknownSetting,
)
from gunicorn_passenger.hooks import on
from gunicorn_passenger.serving.application import ServerInfo, application, create_server
from gunicorn_passenger.serving.server import Server, WSGIApp
from gunicorn_passenger.settings import configure

if TYPE_CHECKING:
    from gunicorn_passenger.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "AlreadyInstalled",
    "Daemon",
    "DaemonError",
    "ListenError",
    "PassengerError",
    "PortInUse",
    "PortNotAllotted",
    "Server",
    "ServerInfo",
    "SettingError",
    "UnknownSetting",
    "Worker",
    "active",
    "configure",
    "create_server",
    "listen",
    "on",
    "serve_forever",
    "servers",
    "spawn",
]

errors.show_in_one_line()


def listen(address: object, app: WSGIApp, **options: Any) -> Server:
    """``create_server(app).listen(address, **options)`` in one call; see :meth:`Server.listen`."""
    return create_server(app).listen(address, **options)


def serve_forever() -> None:
    """Serve until interrupted. Under the worker, which serves anyway, it returns at once.

    With plain ``python``: until Ctrl-C or SIGTERM, finishing what is in hand.

    :raises PassengerError: with plain ``python``, when no server listens.
    """
    if application.active:
        return
    if not application.serves_in_plain_python():
        raise PassengerError("serve_forever() has nothing to serve: call listen() on a server first")
    application.run_here()


def active() -> bool:
    """Whether the program runs under ``gunicorn_passenger.Worker``."""
    return application.active


def servers() -> list[ServerInfo]:
    """The servers of this application: name, address, placement, state."""
    return application.list()


def __getattr__(name: str) -> Any:
    # the worker class imports gunicorn's gevent worker, which a plain program need not
    if name == "Worker":
        from gunicorn_passenger.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
