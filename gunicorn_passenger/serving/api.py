"""The public functions of the package that make and list servers.

Process: a worker, plain Python, and the master with ``--preload``.
Never: decides anything; the registry does.
"""

from __future__ import annotations

from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.serving import standalone
from gunicorn_passenger.serving.discovery import ServerInfo
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server, WSGIApp


def create_server(app: WSGIApp, **options: object) -> Server:
    """Make a server for a WSGI application; ``.listen(address)`` starts it.

    :param app: a WSGI callable.
    :raises TypeError: when it is not callable, or for any option: this version has no options.
    """
    for name in options:
        raise errors.UnknownSetting(
            f"create_server() has no option {name!r}: it takes only the application; options such as name "
            "and placement go to listen()"
        )
    return Server(app, registry)


def listen(address: object, app: WSGIApp, **options: Any) -> Server:
    """``create_server(app).listen(address, **options)`` in one call; see :meth:`.server.Server.listen`."""
    return create_server(app).listen(address, **options)


def serve_forever() -> None:
    """Serve until interrupted. Under the worker, which serves anyway, it returns at once.

    With plain ``python``: until Ctrl-C or SIGTERM; open requests are finished.

    :raises PassengerError: with plain ``python``, when no server listens.
    """
    if registry.active:
        return
    if not any(server.listening for server in registry.servers):
        raise errors.PassengerError("serve_forever() has nothing to serve: call listen() on a server first")
    standalone.run(registry)


def active() -> bool:
    """Whether the program runs under ``gunicorn_passenger.Worker``."""
    return registry.active


def servers() -> list[ServerInfo]:
    """The servers of this application: name, address, placement, state."""
    return registry.discovery.list_servers()
