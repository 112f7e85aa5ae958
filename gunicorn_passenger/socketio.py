"""Socket.IO with several workers: ``gunicorn_passenger.socketio.attach(sio)``, one line in the program.

Process: a worker; plain Python; and the master with ``--preload``.
Never: change what python-socketio does in a process without siblings.

Socket.IO needs every request of a session to reach the worker that has the session, and every event to reach
the clients of all workers. The session ids that :func:`attach` makes begin with the tag of their worker, by
which siblings pass it the connection (``sticky="socketio"``). :class:`LocalManager` and
:class:`AsyncLocalManager` pass the events.
"""

from __future__ import annotations

import asyncio
import queue
import re
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.serving import sibling_messages
from gunicorn_passenger.serving.engineio_sessions import EngineIOSessions
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.status.message_client import MessageClient
from gunicorn_passenger.system.installed import outdated

#: The oldest python-socketio whose client manager the package can extend.
_SOCKETIO = "5.16.1"

try:
    import engineio
    import socketio
    from socketio.async_pubsub_manager import AsyncPubSubManager
except ImportError as error:
    raise ImportError(
        f"gunicorn_passenger.socketio needs python-socketio {_SOCKETIO} or newer ({error}): pip install "
        "'gunicorn-passenger[socketio]'"
    ) from None
if found := outdated("python-socketio", _SOCKETIO):
    raise ImportError(
        f"gunicorn_passenger.socketio needs python-socketio {_SOCKETIO} or newer, and this Python has "
        f"{found}: pip install 'gunicorn-passenger[socketio]'"
    )

#: Messages of siblings that wait until the worker acts on them; further ones are dropped and counted.
_MAX_RECEIVED = 10_000
#: RFC 1123 section 2.1, a label of a host name
_HOST = re.compile(r"[A-Za-z0-9-]{1,63}")
#: the attribute of an Engine.IO server that is attached
_ATTACHED = "_gunicorn_passenger_attached"


class LocalManager(socketio.PubSubManager):
    """A client manager whose events reach the clients of all workers of this gunicorn.

    ``emit``, rooms, namespaces, callbacks, ``disconnect`` and ``close_room`` work as with
    ``socketio.RedisManager``, without a server. In a process without siblings it is a plain manager.
    """

    name = "gunicorn-passenger"

    def __init__(self, channel: str = "socketio", logger: Any = None) -> None:
        """
        :param channel: tells apart the Socket.IO servers of one program; each needs one of its own.
        :param logger: as for ``socketio.PubSubManager``.
        """
        super().__init__(channel=channel, logger=logger)
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


class AsyncLocalManager(AsyncPubSubManager):
    """:class:`LocalManager` for a ``socketio.AsyncServer``."""

    name = "gunicorn-passenger"

    def __init__(self, channel: str = "socketio", logger: Any = None) -> None:
        """
        :param channel: as for :class:`LocalManager`.
        :param logger: as for ``socketio.AsyncPubSubManager``.
        """
        super().__init__(channel=channel, logger=logger)
        self._topic = _topic(channel)
        self._received: deque[bytes] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def initialize(self) -> None:
        """Called by python-socketio in its loop, before the first client of this worker is served."""
        self._loop = asyncio.get_running_loop()
        sibling_messages.subscribe(self._topic, self._receive)
        super().initialize()

    def _receive(self, data: bytes) -> None:
        """Called in the hub.

        :raises queue.Full: when too many wait.
        """
        if len(self._received) >= _MAX_RECEIVED:
            raise queue.Full
        self._received.append(data)
        with suppress(RuntimeError):  # the loop is closed
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _publish(self, data: dict[str, Any]) -> None:
        sibling_messages.publish(self._topic, self.json.dumps(data).encode())

    async def _listen(self) -> AsyncIterator[bytes]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._received:
                yield self._received.popleft()


class _Emitter(socketio.PubSubManager):
    """A client manager without clients, which sends its events by way of the master."""

    name = "gunicorn-passenger"

    def __init__(self, app: str, channel: str) -> None:
        super().__init__(channel=channel, write_only=True)
        self._client = MessageClient(app)
        self._topic = _topic(channel)

    def _publish(self, data: dict[str, Any]) -> None:
        self._client.publish(self._topic, self.json.dumps(data).encode())


#: the client managers for the workers of one machine
_LOCAL = (LocalManager, AsyncLocalManager)


def emitter(app: str = "", channel: str = "socketio") -> socketio.PubSubManager:
    """A client manager that emits from another process: from a cron job, or a daemon of ``spawn()``.

    ``emitter().emit("news", {"a": 1}, room="all")``. The process must run as the master's user.

    :param app: the application's pid or name. By default it is the one that has spawned this process, or the
        only one that runs.
    :param channel: that of the application's :class:`LocalManager`.
    :returns: a client manager whose methods (``emit``, ``disconnect``, ``close_room``) raise
        :class:`.errors.PassengerError` when the application cannot be found or does not respond.
    """
    return _Emitter(app, channel)


def _new_id(random_id: Callable[[], str], host: str | None) -> str:
    """A session id: the tag of the worker, the machine between dots, and what Engine.IO makes."""
    tag = sibling_messages.tag()
    return f"{tag}.{host}.{random_id()}" if tag and host else tag + random_id()


def _topic(channel: str) -> str:
    return f"socketio {channel}"


def _websocket(driver: Any, handler: Callable[[Any], object], server: Any) -> Any:
    """What Engine.IO makes for each WebSocket of a client."""
    from gunicorn_passenger.serving.engineio_websocket import engineio_websocket

    return engineio_websocket(driver, handler, server)


def attach(sio: Any, host: str | None = None) -> None:
    """Let a Socket.IO server work with any number of workers. Call it once, before the first client comes.

    It turns ``sticky="socketio"`` on for the primary and for all servers that are not given another value.
    It sets a :class:`LocalManager` or an :class:`AsyncLocalManager`, unless the server has a client manager
    for several processes, such as ``socketio.RedisManager``. On a server of ours, WebSockets use the
    package's own code instead of simple-websocket, and are not compressed. Under plain Python it changes
    nothing else that a client or the program can see.

    A ``socketio.AsyncServer`` works on a server of :func:`gunicorn_passenger.create_server`.

    :param sio: a ``socketio.Server``, a ``flask_socketio.SocketIO`` that has its application, a
        ``socketio.AsyncServer`` with ``async_mode="asgi"``, or the ``engineio`` server of these kinds.
    :param host: names this machine in the session ids, for the web server that sends each session to its
        machine. With a client manager for several machines the default is the name of the host up to the
        first dot; otherwise the ids name no machine.
    :raises SettingError: (a ``ValueError``) for a host that is not a name, and when the server is attached
        already, has clients, is instrumented for the admin interface, or is one for aiohttp and the like.
    :raises TypeError: for anything else.
    """
    server = getattr(sio, "server", sio) if type(sio).__module__.startswith("flask_socketio") else sio
    if server is None and sio is not None:
        raise SettingError(
            "socketio.attach(): the SocketIO object has no server yet; call init_app(app) first"
        )
    eio = getattr(server, "eio", server)
    if not isinstance(eio, (engineio.Server, engineio.AsyncServer)):
        raise TypeError(
            "socketio.attach() takes a socketio.Server, a socketio.AsyncServer, a flask_socketio.SocketIO or "
            f"the server of Engine.IO, not {type(sio).__name__}"
        )
    is_async = isinstance(eio, engineio.AsyncServer)
    if is_async and eio.async_mode != "asgi":
        raise SettingError(
            f"socketio.attach(): this {type(server).__name__} is one for {eio.async_mode}, whose connections "
            "are not passed between workers; make it with async_mode='asgi', and serve its "
            "socketio.ASGIApp with create_server()"
        )
    if getattr(eio, _ATTACHED, False):
        raise SettingError("socketio.attach(): this server is already attached; call attach() once")
    if eio.sockets:
        raise SettingError(
            "socketio.attach(): this server already has clients; call attach() where you make the server"
        )
    plain_manager = socketio.AsyncManager if is_async else socketio.Manager
    replaces = server is not eio and type(server.manager) is plain_manager
    if replaces and "emit" in vars(server.manager):
        raise SettingError(
            "socketio.attach(): the client manager, which attach() replaces, has already been changed; call "
            "attach() before sio.instrument()"
        )
    if host is None and server is not eio and not (replaces or isinstance(server.manager, _LOCAL)):
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])
    elif host is not None and not _HOST.fullmatch(host):
        raise SettingError(
            f"socketio.attach(host={host!r}): use 1 to 63 letters, digits and hyphens, such as 'web1'"
        )
    setattr(eio, _ATTACHED, True)
    if replaces:
        server.manager = AsyncLocalManager() if is_async else LocalManager()
        server.manager.set_server(server)
    # what Engine.IO's server takes from its driver has no public name; a copy, since all servers share it
    used = vars(eio).get("_async", {})
    if not is_async and used.get("websocket") is not None:
        vars(eio)["_async"] = {**used, "websocket": partial(_websocket, used["websocket"])}
    noop = engineio.packet.Packet(engineio.packet.NOOP)
    sessions = EngineIOSessions(eio, is_async, partial(_new_id, eio.generate_id, host), noop)
    eio.generate_id = sessions.generate_id
    registry.acceptors.sessions.append(sessions)
    settings.default_sticky = "socketio"
