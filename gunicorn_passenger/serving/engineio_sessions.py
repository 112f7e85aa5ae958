"""The sessions of an Engine.IO server: their ids, their number, and what a drain does with those that poll.

Process: a worker, where Engine.IO's server runs: its hub, threads, or the loop of an ASGI application.
Never: end a session that began a moment ago, or one with a WebSocket, which is closed with its connection.

A client that polls would keep a worker that drains, and the old program, for gunicorn's ``graceful_timeout``.
So its pending poll ends with a NOOP packet, which every client ignores. Its next request gets 400, as for any
session that the server does not know, and the client opens another one: a sibling's. A CLOSE packet would not
do: python-engineio's client does not connect again after one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from gunicorn_passenger.config.settings import settings

#: Seconds between two checks of the sessions. One that both have seen is ended: it had that time to begin.
_INTERVAL = 0.25


class EngineIOSessions:
    """The sessions of one server."""

    def __init__(self, eio: Any, is_async: bool, new_id: Callable[[], str], noop: Any) -> None:
        """
        :param eio: an ``engineio.Server`` or ``engineio.AsyncServer``.
        :param is_async: whether it is an ``AsyncServer``.
        :param new_id: makes the id of a session.
        :param noop: Engine.IO's packet.
        """
        self._eio = eio
        self._is_async = is_async
        self._new_id = new_id
        self._noop = noop
        #: where an ``AsyncServer`` runs, once it has had a session
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drains = False
        self._seen: set[str] = set()
        #: the sessions that are ended, and what does it: a task of asyncio needs a reference
        self._ended: dict[str, Any] = {}

    def generate_id(self) -> str:
        """Engine.IO calls this for each session, in its loop if it has one."""
        if self._is_async and self._loop is None:
            self._loop = asyncio._get_running_loop()
        return self._new_id()

    def count(self) -> int:
        """How many there are."""
        return len(self._eio.sockets)

    def end(self) -> None:
        """From now on, until the process exits, end the sessions whose clients poll.

        Called when the worker drains, and its siblings begin all new sessions.
        """
        if not settings.closes_websockets_on_exit():
            return
        # no thread can be started, or the loop has been closed
        with contextlib.suppress(RuntimeError):
            if not self._is_async:
                self._eio.start_background_task(self._end_all)
                self._drains = True
            elif self._loop is not None:
                start = partial(self._eio.start_background_task, self._end_all_in_loop)
                self._loop.call_soon_threadsafe(start)
                self._drains = True

    def are_ending(self) -> bool:
        """Whether a client that polls has a session that is still to be ended. Any thread may call."""
        if not self._drains or (self._loop is not None and self._loop.is_closed()):
            return False
        return bool(self._polling())

    def _polling(self) -> dict[str, Any]:
        """The sessions whose clients poll, by their ids."""
        return {
            sid: session
            for sid, session in list(self._eio.sockets.items())
            if session.connected and not (session.upgrading or session.upgraded or session.closed)
        }

    def _end_all(self) -> None:
        while True:
            self._end_established()
            self._eio.sleep(_INTERVAL)

    async def _end_all_in_loop(self) -> None:
        while True:
            self._end_established()
            await asyncio.sleep(_INTERVAL)

    def _end_established(self) -> None:
        """End the sessions that were there at the last look."""
        polling = self._polling()
        found = (polling.keys() & self._seen) - self._ended.keys()
        self._seen = set(polling)
        for sid in found:
            # when no thread can be started now, the next look tries again
            with contextlib.suppress(RuntimeError):
                self._ended[sid] = self._end(polling[sid])

    def _end(self, session: Any) -> object:
        if not session.closing:
            # what close() sends; a coroutine where close() is one
            session.send = lambda _: session.queue.put(self._noop)
        # the program's handler of the event "disconnect" may take its time
        task: object = self._eio.start_background_task(
            session.close, wait=False, reason=self._eio.reason.TRANSPORT_CLOSE
        )
        return task
