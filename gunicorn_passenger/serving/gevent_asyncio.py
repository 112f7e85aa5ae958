"""An asyncio loop in a greenlet, where gevent has made greenlets of the program's threads.

Process: a worker, or plain Python, in the thread of the hub.
Never: keep the hub from its other greenlets while the loop waits.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import gevent
import greenlet

from gunicorn_passenger.system import unpatched

_READABLE = 1
_EpollSelector: Any = unpatched.unpatched("selectors", "EpollSelector")
#: where a suspended greenlet keeps its running loop
_KEPT = "_gunicorn_passenger_loop"


class HubSelector(_EpollSelector):
    """Waits in the hub until its epoll descriptor is readable, that is, until one of its files is ready."""

    def __init__(self) -> None:
        super().__init__()
        self._ready = gevent.get_hub().loop.io(self.fileno(), _READABLE)
        self._is_left = False

    def select(self, timeout: float | None = None) -> Any:
        """:param timeout: seconds; ``None`` for no limit."""
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            gevent.sleep(0)
        else:
            with gevent.Timeout(timeout, False):
                gevent.get_hub().wait(self._ready)
        while self._is_left:
            gevent.sleep(3600)
        return ready or super().select(0)

    def leave_to_parent(self) -> None:
        """In a forked child: never return to the loop. The child has a copy of the greenlet, and would take
        the parent's events."""
        self._is_left = True
        self._ready.stop()

    def close(self) -> None:
        self._ready.close()
        super().close()


def new_event_loop() -> tuple[asyncio.AbstractEventLoop, HubSelector]:
    """A loop for the calling greenlet.

    asyncio knows one running loop for each thread of the system. From now on it is one for each greenlet of
    this thread, as each would have one if it were a thread.
    """
    if greenlet.gettrace() is not _trace:
        _previous.append(greenlet.settrace(_trace))
    selector = HubSelector()
    return asyncio.SelectorEventLoop(selector), selector


#: the trace functions that were set when ours was set, if any. Ours is set again after another one has taken
#: its place, and that one may call ours.
_previous: list[Any] = []
#: those of them that run now
_running: list[Any] = []


def _trace(event: str, greenlets: Any) -> None:
    """Called at each switch of this thread, in the greenlet that continues."""
    depth = len(_running)
    if not depth:
        _switch_loop(*greenlets)
    # the last one may call ours in turn, which calls the one before it
    previous = _previous[-1 - depth] if depth < len(_previous) else None
    if previous is None:
        return
    _running.append(previous)
    try:
        previous(event, greenlets)
    finally:
        _running.pop()


def _switch_loop(suspended: Any, continued: Any) -> None:
    loop = asyncio._get_running_loop()
    if loop is not None:
        suspended.__dict__[_KEPT] = loop, sys.get_asyncgen_hooks()
    kept = continued.__dict__.pop(_KEPT, None)
    if kept is not None:
        asyncio._set_running_loop(kept[0])
        sys.set_asyncgen_hooks(*kept[1])
    elif loop is not None:
        asyncio._set_running_loop(None)
        sys.set_asyncgen_hooks(None, None)
