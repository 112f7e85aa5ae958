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
        _install_trace()
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
    _install_trace()
    selector = HubSelector()
    return asyncio.SelectorEventLoop(selector), selector


class _Trace:
    """Called at each switch of this thread, in the greenlet that continues.

    It calls the trace function that was set before it.
    """

    #: whether one runs: another trace function, which was set in between, may call an older one in turn
    _runs = False

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, event: str, greenlets: Any) -> None:
        first = not _Trace._runs
        _Trace._runs = True
        try:
            if first:
                _switch_loop(*greenlets)
            if self._previous is not None:
                self._previous(event, greenlets)
        finally:
            if first:
                _Trace._runs = False


def _install_trace() -> None:
    """Set a trace function of ours, unless one is set: a tracer of the program may have taken its place."""
    if not isinstance(greenlet.gettrace(), _Trace):
        greenlet.settrace(_Trace(greenlet.gettrace()))


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
