"""The public functions of the package that make and list servers.

Process: a worker, plain Python, and the master with ``--preload``.
Never: decide where a server gets its socket; the registry does.
"""

from __future__ import annotations

from typing import Any, cast

from gunicorn_passenger import errors
from gunicorn_passenger.serving import standalone
from gunicorn_passenger.serving.asgi_server import AsgiServer
from gunicorn_passenger.serving.discovery import ServerInfo
from gunicorn_passenger.serving.interface import AsgiApp, check_interface
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server, WSGIApp

#: The most threads for one server.
_MAX_THREADS = 1000


def create_server(
    app: WSGIApp | AsgiApp, *, threads: int = 8, interface: str = "auto", **options: object
) -> Server:
    """Make a server for a WSGI or an ASGI application; ``.listen(address)`` starts it.

    :param app: a WSGI callable, or an ASGI one, which runs on an asyncio loop in a thread of its own.
    :param threads: under a worker class that is not gevent's, how many requests to the server run at a time
        in one worker, each in a native thread. 0: they run in the greenlets of the server, where a blocking
        call stops all of them. A gevent class patches blocking calls, and the option has no effect. Nor
        has it for an ASGI application.
    :param interface: ``"wsgi"``, ``"asgi"``, or ``"auto"``: what the application's arguments show.
    :raises TypeError: when ``app`` is not callable or has another interface, or for an option that does not
        exist.
    :raises SettingError: (a ``ValueError``) for a number of threads, or an interface, that cannot be used.
    :raises PassengerError: for an ASGI application, when uvicorn is not installed, or too old.
    """
    for name in options:
        raise errors.UnknownSetting(
            f"create_server() has no option {name!r}: it takes the application, threads and interface; "
            "options such as name and placement go to listen()"
        )
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= _MAX_THREADS:
        raise errors.SettingError(
            f"create_server(threads={threads!r}): threads is a whole number from 0 to {_MAX_THREADS}"
        )
    if check_interface(app, interface) == "asgi":
        return AsgiServer(app, registry)
    return Server(cast(WSGIApp, app), registry, threads)


def listen(address: object, app: WSGIApp | AsgiApp, **options: Any) -> Server:
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
    """Whether the program runs in a worker that has its ports from the master: under
    ``gunicorn_passenger.Worker`` or, with the hooks, under another worker class.
    """
    return registry.active


def servers() -> list[ServerInfo]:
    """The servers of this application: name, address, placement, state."""
    return registry.discovery.list_servers()
