"""A worker that drains ends the sessions of Engine.IO's clients that poll; they connect again at once.

Process: a worker, where Engine.IO's server runs: its hub, threads, or the loop of an ASGI application.
Never: end a session that began a moment ago, or one with a WebSocket, which is closed with its connection.

Without this, a client that polls would keep its old worker, and the old program, for gunicorn's
``graceful_timeout``. Its pending poll ends with a NOOP packet, which every client ignores. Its next request
gets 400, as for any session that the server does not know, and the client opens another one: a sibling's. A
CLOSE packet would not do: python-engineio's client does not connect again after one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from gunicorn_passenger.config.settings import settings

#: Seconds between two looks at the sessions. One that both have seen is ended: it had that time to begin.
_INTERVAL = 0.25


class PollingSessions:
    """The sessions of an Engine.IO server whose clients poll."""

    def __init__(self, eio: Any, new_id: Callable[[], str], noop: Any) -> None:
        """
        :param eio: an ``engineio.Server`` or ``engineio.AsyncServer``.
        :param new_id: makes the id of a session.
        :param noop: Engine.IO's packet.
        """
        self._eio = eio
        self._new_id = new_id
        self._noop = noop
        self._is_async = asyncio.iscoroutinefunction(eio.handle_request)
        #: where an ``AsyncServer`` runs, once it has had a session
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seen: set[str] = set()
        self._ended: set[str] = set()

    def generate_id(self) -> str:
        """Engine.IO calls this for each session, in its loop if it has one."""
        if self._is_async and self._loop is None:
            self._loop = asyncio._get_running_loop()
        return self._new_id()

    def end(self) -> None:
        """From now on, until the process exits, end all sessions. Called when the worker begins to drain."""
        if not settings.closes_websockets_on_exit():
            return
        if not self._is_async:
            self._eio.start_background_task(self._end_all)
        elif self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(partial(self._eio.start_background_task, self._end_all_in_loop))

    def _end_all(self) -> None:
        while True:
            self._end_established()
            self._eio.sleep(_INTERVAL)

    async def _end_all_in_loop(self) -> None:
        while True:
            self._end_established()
            await asyncio.sleep(_INTERVAL)

    def _end_established(self) -> None:
        """End the sessions whose clients poll, and that were there at the last look."""
        polling = {
            sid: session
            for sid, session in list(self._eio.sockets.items())
            if session.connected and not (session.upgrading or session.upgraded or session.closing)
        }
        found = (polling.keys() & self._seen) - self._ended
        self._seen = set(polling)
        self._ended |= found
        for session in map(polling.__getitem__, found):
            # what close() sends; a coroutine where close() is one
            session.send = lambda _, queue=session.queue: queue.put(self._noop)
            # the program's handler of the event "disconnect" may take its time
            self._eio.start_background_task(
                session.close, wait=False, reason=self._eio.reason.TRANSPORT_CLOSE
            )
