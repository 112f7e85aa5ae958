"""Accepts connections for an ASGI application, and has uvicorn's protocols serve them.

Process: a worker, or plain Python, in the thread of the asyncio loop; methods that other threads call say so.
Never: accept for a worker that has begun to drain.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any

import uvicorn

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.http.engineio import sends_before_close
from gunicorn_passenger.ipc.scoreboard import Counters
from gunicorn_passenger.serving.asgi_sticky import SiblingConnections
from gunicorn_passenger.serving.interface import AsgiApp
from gunicorn_passenger.serving.scheduler import Scheduler
from gunicorn_passenger.system import unpatched

#: How many connections a worker without siblings accepts in one event-loop iteration.
_BURST = 64
#: Seconds until the next attempt at the limit of connections, and when the system lacks a descriptor.
_PAUSE = 0.1
#: Seconds between two searches for idle connections during a drain.
_IDLE_CHECK_INTERVAL = 0.5
#: Seconds that the application has to send the first frames of a WebSocket whose client waits for them.
_FIRST_FRAME_TIMEOUT = 5.0
#: Seconds between two searches for WebSockets to close, and whether connections that were ended are gone.
_POLL = 0.02

#: The messages with which an application begins its response.
_FIRST = {
    "http.response.start",
    "websocket.accept",
    "websocket.close",
    "websocket.http.response.start",
}
_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR, errno.EPERM}


class CountingTransport:
    """A transport that counts what is written."""

    def __init__(self, transport: Any, count: Callable[[int], object]) -> None:
        self._transport = transport
        self._count = count
        #: how often uvicorn has written in the present protocol
        self.writes = 0

    def set_protocol(self, protocol: Any) -> None:
        self.writes = 0
        self._transport.set_protocol(protocol)

    def write(self, data: Any) -> None:
        self.writes += 1
        self._count(len(data))
        self._transport.write(data)

    def writelines(self, chunks: Any) -> None:
        self.write(b"".join(chunks))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class AsgiAcceptor(SiblingConnections):
    """Accepts on one listening socket; the connections belong to one asyncio loop."""

    def __init__(
        self,
        sock: Any,
        app: AsgiApp,
        state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
        cfg: Any,
        log: Log,
        scheduler: Scheduler,
        closes_websockets: bool,
    ) -> None:
        """Called in any thread.

        :param sock: a listening socket; the acceptor owns it.
        :param state: what the lifespan of the application has made for its requests.
        :param closes_websockets: whether a drain ends WebSockets.
        """
        super().__init__(scheduler)
        self._sock = sock
        self.sockname = sock.getsockname()
        sock.setblocking(False)
        self._app = app
        self._loop = loop
        self._log = log
        self._limit = cfg.worker_connections
        #: seconds; a client that has just connected is not yet idle, even when no connection is kept
        self._keepalive = float(cfg.keepalive or 1)
        self._burst = 1 if cfg.workers > 1 else _BURST
        self._closes_websockets = closes_websockets
        self._config = make_config(self._call, cfg, lifespan="off")
        self._config.load()
        #: holds the connections, and the Date header that uvicorn renews
        self._server = uvicorn.Server(self._config)
        self._connections = self._server.server_state.connections
        self._state = state
        self._closing = self._cancelled = False
        self._complained = False
        #: tasks that give a connection its protocol
        self._opening: set[asyncio.Task[Any]] = set()
        self._accepted = self._requests = self._sent = self._errors = 0
        self._protocol = self._make_protocol_class()

    # --- called by the worker's threads -----------------------------------------------------------

    def _in_loop(self, function: Callable[[], object]) -> None:
        # What the caller has in context variables, perhaps while it serves a request, is not for the clients.
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, context=Context())

    def start(self) -> None:
        self._in_loop(self._start)

    def stop_accepting(self) -> None:
        """Accept nothing more; open connections continue. The loop closes the socket when it can."""
        self._closing = True
        self._in_loop(self._begin_drain)

    def abort(self) -> None:
        """Close the listening socket and the connections at once. Called in the loop's thread."""
        self._closing = self._shut = True
        self._sock.close()
        for protocol in list(self._connections):
            protocol.transport.abort()
        while self._arriving:
            os.close(self._arriving.popleft()[1])

    def leave_to_parent(self) -> None:
        """In a forked child, which has no thread with the loop: close the parent's sockets."""
        self._sock.close()
        for _, fd, _ in self._arriving:
            os.close(fd)
        for protocol in self._connections:
            with suppress(Exception):
                os.close(protocol.transport.get_extra_info("socket").fileno())

    def idle(self) -> bool:
        """Whether no connection is open."""
        return not (self._arriving or self._opening or self._connections or self._server.server_state.tasks)

    def is_drained(self) -> bool:
        """Whether it has stopped accepting, and no connection is open."""
        return self._closing and self.idle()

    def counts(self) -> Counters:
        """The counters since the start."""
        connections = len(self._connections) + len(self._opening)
        return Counters(connections, self._accepted, self._requests, self._sent, self._errors)

    def kill(self, timeout: float) -> None:
        """Close the connections that are left.

        :param timeout: seconds that they may take to end.
        """
        self._closing = True
        self._in_loop(self._kill)
        deadline = time.monotonic() + timeout
        while not self.idle() and time.monotonic() < deadline:
            self._scheduler.sleep(_POLL)

    def set_app(self, app: Any) -> None:
        raise NotImplementedError("an ASGI server is never the primary")

    def pop_idle_connections(self, most: int) -> list[tuple[Any, Any]]:
        """None: uvicorn keeps a connection until its keep-alive time is over."""
        return []

    # --- in the loop ------------------------------------------------------------------------------

    def _start(self) -> None:
        self._tick()
        self._watch()

    def _tick(self) -> None:
        """Have uvicorn renew its Date header once a second, as its own loop does."""
        task = self._loop.create_task(self._server.on_tick(0))
        task.add_done_callback(
            lambda _: None if self.is_drained() else self._loop.call_later(1.0, self._tick)
        )

    def _watch(self) -> None:
        if not self._closing:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._loop.call_later(_PAUSE, self._watch)

    def _accept(self) -> None:
        for _ in range(self._burst):
            if self._closing:
                return
            if self._room() <= 0:
                self._pause()
                return
            try:
                fd, _ = self._sock._accept()
            except BlockingIOError:
                return  # a sibling was faster
            except OSError as error:
                if error.errno not in _GONE:
                    self._wait_for_room(error)
                return
            self._accepted += 1
            self._open(self._sock.family, fd, self._protocol)

    def _open(self, family: int, fd: int, protocol: Callable[[], Any]) -> None:
        # the loop never waits in a socket: one of the system's needs no hub
        client = unpatched.unpatched("socket", "socket")(family, socket.SOCK_STREAM, fileno=fd)
        client.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(protocol, client))
        self._opening.add(task)
        task.add_done_callback(partial(self._opened, client))

    def _room(self) -> int:
        return int(self._limit) - len(self._connections) - len(self._opening)

    def _wait_for_room(self, error: OSError) -> None:
        self._pause()
        if not self._complained:
            self._complained = True
            self._log.error(
                "Cannot accept connections: %s; they wait. Raise the limit on open files (ulimit -n) or "
                "lower --worker-connections",
                error.strerror,
            )

    def _opened(self, client: Any, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._log.error("A connection to an ASGI server could not be served", exc_info=error)
        if task.cancelled() or error is not None:
            client.close()

    def _make_protocol_class(self) -> Callable[..., Any]:
        acceptor = self

        def count_sent(size: int) -> None:
            acceptor._sent += size

        class Protocol(self._config.http_protocol_class):  # type: ignore[name-defined]
            #: whether a sibling is asked to take the connection
            passing = False
            #: the loop's time when the last response was complete
            idle_since = 0.0

            def __init__(self) -> None:
                super().__init__(
                    config=acceptor._config,
                    server_state=acceptor._server.server_state,
                    app_state=acceptor._state,
                )

            def connection_made(self, transport: Any) -> None:
                super().connection_made(CountingTransport(transport, count_sent))

            def on_response_complete(self) -> None:
                self.idle_since = self.loop.time()
                super().on_response_complete()

            @property
            def is_idle(self) -> bool:
                """Whether it waits for a further request."""
                done = self.cycle is not None and self.cycle.response_complete
                return done and not self.passing and not self.transport.is_closing()

        return Protocol

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, as uvicorn calls it."""
        counted = False

        async def counting_send(message: Any) -> None:
            nonlocal counted
            kind = message["type"]
            if kind in _FIRST and not counted:
                counted = True
                self._requests += 1
                self._errors += message.get("status", 200) >= 500
                if kind == "http.response.start" and self._closing:
                    # RFC 9112 section 9.6: the connection's last response
                    named = [h for h in message.get("headers", ()) if bytes(h[0]).lower() != b"connection"]
                    message = {**message, "headers": [*named, (b"connection", b"close")]}
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
        finally:
            if not counted:
                # uvicorn responds with 500
                self._requests += 1
                self._errors += 1

    # --- the end ----------------------------------------------------------------------------------

    def _begin_drain(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            if self._closes_websockets:
                self._close_websockets({})
            self._loop.call_later(self._keepalive, self._end_idle)

    def _websockets(self) -> list[Any]:
        return [c for c in self._connections if not isinstance(c, self._config.http_protocol_class)]

    def _close_websockets(self, known: dict[Any, float]) -> None:
        """Close the WebSockets that are open, and look again for others until it is drained.

        :param known: those that were seen before, and until when each waits for the first frames of its
            application (:func:`.engineio.sends_before_close`); 0.0 when it is closed.
        """
        now = self._loop.time()
        for each in self._websockets():
            if not each.transport.writes or each.transport.is_closing():
                continue  # the application has not accepted it yet, or it ends
            if each not in known:
                known[each] = now + _FIRST_FRAME_TIMEOUT
            if not known[each] or (_waits_for_frame(each) and known[each] > now):
                continue
            known[each] = 0.0
            if _must_get_a_frame(each):
                each.transport.abort()
            else:
                self._shut_down([each])
        if not self.is_drained():
            self._loop.call_later(_POLL, self._close_websockets, known)

    def _end_idle(self) -> None:
        """End connections that have no request; uvicorn gives a new connection any time for its first."""
        self._shut_down(
            c
            for c in self._connections - set(self._websockets())
            if not c.passing and (c.cycle is None or c.cycle.response_complete)
        )
        if not self.idle():
            self._loop.call_later(_IDLE_CHECK_INTERVAL, self._end_idle)

    def _shut_down(self, protocols: Any) -> None:
        for protocol in list(protocols):
            if _is_closing(protocol):
                continue
            try:
                protocol.shutdown()
            except Exception:
                self._log.exception(
                    "gunicorn-passenger: uvicorn could not close a connection, which was aborted"
                )
                protocol.transport.abort()

    def _kill(self) -> None:
        """End the connections; an application that does not notice it is cancelled."""
        self._begin_drain()
        websockets = [each for each in self._websockets() if not _must_get_a_frame(each)]
        self._shut_down(websockets)
        for protocol in self._connections - set(websockets):
            protocol.transport.abort()
        self._loop.call_later(_PAUSE, self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        for task in self._opening | self._server.server_state.tasks:
            task.cancel()
        for protocol in self._connections:
            protocol.transport.abort()


def _is_closing(protocol: Any) -> bool:
    """Whether one side has begun to close a WebSocket; uvicorn cannot close it a second time."""
    state = getattr(getattr(protocol, "conn", None), "state", None)
    return getattr(state, "name", "").endswith("CLOSING")


def _waits_for_frame(websocket: Any) -> bool:
    """Whether a client waits for frames behind the response, see :func:`.engineio.sends_before_close`."""
    # uvicorn writes the response with 101 at once, and makes no scope for a request that it refuses
    sends: int = websocket.transport.writes - 1
    scope = getattr(websocket, "scope", None)
    return scope is not None and 0 <= sends < sends_before_close(scope["query_string"])


def _must_get_a_frame(websocket: Any) -> bool:
    """Whether a Close frame would be the first that its client gets, which has to be another one."""
    return websocket.transport.writes == 1 and _waits_for_frame(websocket)


def make_config(app: AsgiApp, cfg: Any, lifespan: str) -> uvicorn.Config:
    """uvicorn's configuration for an application, from gunicorn's.

    :param lifespan: ``"auto"`` or ``"off"``.
    """
    config: dict[str, Any] = {
        "interface": "asgi3",
        "lifespan": lifespan,
        "log_config": None,
        "access_log": bool(cfg.accesslog),
        "timeout_keep_alive": cfg.keepalive,
        "forwarded_allow_ips": cfg.forwarded_allow_ips,
    }
    if "reset_contextvars" in inspect.signature(uvicorn.Config).parameters:
        # A large body has asyncio read on in the context of its request. What that has in context variables
        # would reach the connection's next request, which behind a web server is another client's.
        config["reset_contextvars"] = True
    return uvicorn.Config(app, **config)
