"""Socket.IO with several workers: ``gunicorn_passenger.socketio.attach(sio)``, one line in the program.

Process: a worker; plain Python; and the master with ``--preload``.
Never: change what python-socketio does in a process without siblings.

Socket.IO needs every request of a session to reach the worker that has the session, and every event to reach
the clients of all workers. The session ids that :func:`attach` makes begin with the tag of their worker, by
which siblings pass it the connection (``sticky="socketio"``). :class:`LocalManager` passes the events.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.serving import sibling_messages
from gunicorn_passenger.status import control_client

try:
    import engineio
    import socketio
except ImportError as error:
    raise ImportError(
        f"gunicorn_passenger.socketio needs python-socketio ({error}): pip install python-socketio"
    ) from None

#: Messages of siblings that wait until the worker acts on them; further ones are dropped and counted.
_MAX_RECEIVED = 10_000
#: the attribute of an Engine.IO server that is attached
_ATTACHED = "_gunicorn_passenger_attached"


class LocalManager(socketio.PubSubManager):
    """A client manager whose events reach the clients of all workers of this gunicorn.

    ``emit``, rooms, namespaces, callbacks, ``disconnect`` and ``close_room`` work as with
    ``socketio.RedisManager``, without a server. In a process without siblings it is a plain manager.
    """

    name = "gunicorn-passenger"

    def __init__(self, channel: str = "socketio", logger: Any = None, json: Any = None) -> None:
        """
        :param channel: tells apart the Socket.IO servers of one program; each needs one of its own.
        """
        super().__init__(channel=channel, logger=logger, json=json)
        self._topic = _topic(channel)
        self._received: Any = None

    def initialize(self) -> None:
        """Called by python-socketio before the first client of this worker is served."""
        self._received = self.server.eio.create_queue(_MAX_RECEIVED)
        sibling_messages.subscribe(self._topic, self._received.put_nowait)
        super().initialize()

    def _publish(self, data: dict[str, Any]) -> None:
        sibling_messages.publish(self._topic, self.json.dumps(data).encode())

    def _listen(self) -> Iterator[bytes]:
        while True:
            yield self._received.get()


class _Emitter(socketio.PubSubManager):
    """A client manager without clients, which sends its events by way of the master."""

    name = "gunicorn-passenger"

    def __init__(self, app: str, channel: str) -> None:
        super().__init__(channel=channel, write_only=True)
        self._app = app
        self._topic = _topic(channel)
        self._instance: control_client.Instance | None = None

    def _publish(self, data: dict[str, Any]) -> None:
        text = self.json.dumps(data)
        if self._instance is not None:
            # not when it is slow: it may send the message yet
            with suppress(ConnectionError, FileNotFoundError):
                self._send(self._instance, text)
                return
        # at first, and when the application was started again
        self._instance = control_client.own_application(self._app)
        try:
            self._send(self._instance, text)
        except OSError as error:
            raise _no_response(self._instance, error) from None

    def _send(self, instance: control_client.Instance, text: str) -> None:
        try:
            control_client.publish(instance, self._topic, text)
        except (TimeoutError, PermissionError) as error:
            raise _no_response(instance, error) from None


def _no_response(instance: control_client.Instance, error: OSError) -> PassengerError:
    return PassengerError(f"the master with pid {instance.pid} did not respond ({error}); see its error log")


def emitter(app: str = "", channel: str = "socketio") -> socketio.PubSubManager:
    """What emits to the clients of an application from outside: from a cron job, or a daemon of ``spawn()``.

    ``emitter().emit("news", {"a": 1}, room="all")``. It needs the account of the application's master.

    :param app: the application's pid or name. By default it is the one that has spawned this process, or the
        only one that runs.
    :param channel: that of the application's :class:`LocalManager`.
    :returns: a client manager whose methods (``emit``, ``disconnect``, ``close_room``) raise
        :class:`PassengerError` when the application cannot be found or does not respond.
    """
    return _Emitter(app, channel)


def _topic(channel: str) -> str:
    return f"socketio {channel}"


def attach(sio: Any) -> None:
    """Let a Socket.IO server work with any number of workers. Call it once, before the first client comes.

    It turns ``sticky="socketio"`` on for the primary and for all servers that are not given another value.
    It sets a :class:`LocalManager`, unless the server has a client manager for several processes, such as
    ``socketio.RedisManager``. Under plain Python it changes nothing that a client or the program can see.

    :param sio: a ``socketio.Server``, a ``flask_socketio.SocketIO`` that has its application, or an
        ``engineio.Server``.
    :raises SettingError: (a ``ValueError``) when it is attached already, has clients, or runs in asyncio.
    :raises TypeError: for anything else.
    """
    server = getattr(sio, "server", sio) if type(sio).__module__.startswith("flask_socketio") else sio
    if server is None and sio is not None:
        raise SettingError(
            "socketio.attach(): the SocketIO object has no server yet; call init_app(app) before"
        )
    eio = getattr(server, "eio", server)
    if not isinstance(eio, engineio.Server):
        if isinstance(eio, engineio.AsyncServer):
            raise SettingError(
                f"socketio.attach(): {type(server).__name__} runs in asyncio, and connections of ASGI "
                "servers are not passed between workers; use socketio.Server"
            )
        raise TypeError(
            "socketio.attach() takes a socketio.Server, a flask_socketio.SocketIO or an engineio.Server, "
            f"not {type(sio).__name__}"
        )
    if getattr(eio, _ATTACHED, False):
        raise SettingError("socketio.attach(): this server is attached already; call it once")
    if eio.sockets:
        raise SettingError(
            "socketio.attach(): this server has clients already; call it where you make the server"
        )
    setattr(eio, _ATTACHED, True)
    if server is not eio and type(server.manager) is socketio.Manager:
        server.manager = LocalManager()
        server.manager.set_server(server)
    random_id = eio.generate_id
    eio.generate_id = lambda: sibling_messages.tag() + random_id()
    settings.default_sticky = "socketio"
