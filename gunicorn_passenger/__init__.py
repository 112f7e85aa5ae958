"""gunicorn-passenger: second servers, shared ports and a reverse proxy for programs under gunicorn.

The public interface, and nothing else. Every name is imported when it is first used (PEP 562), so that the
master and the command line do not import what only a worker needs.

Process: every process. Never: import anything that imports gevent.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gunicorn_passenger import errors
from gunicorn_passenger._version import __version__
from gunicorn_passenger.errors import (
    AlreadyInstalled,
    DaemonError,
    ListenError,
    PassengerError,
    PortInUse,
    PortNotAllocated,
    SettingError,
    UnknownSetting,
)

if TYPE_CHECKING:
    from gunicorn_passenger import http_proxy, status
    from gunicorn_passenger.channels import channel
    from gunicorn_passenger.config.settings import configure
    from gunicorn_passenger.daemons.api import Daemon, spawn
    from gunicorn_passenger.serving.api import active, create_server, listen, serve_forever, servers
    from gunicorn_passenger.serving.discovery import ServerInfo
    from gunicorn_passenger.serving.events import on
    from gunicorn_passenger.serving.once import once
    from gunicorn_passenger.serving.server import Server
    from gunicorn_passenger.worker import Worker

__all__ = [
    "AlreadyInstalled",
    "Daemon",
    "DaemonError",
    "ListenError",
    "PassengerError",
    "PortInUse",
    "PortNotAllocated",
    "Server",
    "ServerInfo",
    "SettingError",
    "UnknownSetting",
    "Worker",
    "__version__",
    "active",
    "channel",
    "configure",
    "create_server",
    "http_proxy",
    "listen",
    "on",
    "once",
    "serve_forever",
    "servers",
    "spawn",
    "status",
]

#: the module that defines a public name; an empty string where the name is itself a module
_HOME = {
    "Daemon": "daemons.api",
    "Server": "serving.server",
    "ServerInfo": "serving.discovery",
    "Worker": "worker",
    "active": "serving.api",
    "channel": "channels",
    "configure": "config.settings",
    "create_server": "serving.api",
    "http_proxy": "",
    "listen": "serving.api",
    "on": "serving.events",
    "once": "serving.once",
    "serve_forever": "serving.api",
    "servers": "serving.api",
    "socketio": "",
    "spawn": "daemons.api",
    "status": "",
}

errors.install_excepthook()


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not home:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if error.name != "gevent":
            raise
        raise errors.MissingPackage(
            f"{name} of gunicorn_passenger needs gevent, which the environment {sys.prefix} does not have: "
            "'pip install gevent', or start the gunicorn of the environment that has it "
            "(docs/how-to/debugging.md)"
        ) from None
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
