"""Reports unexpected errors in callbacks of the event loop.

Process: a serving process, in the hub.
Never: raise, or fill the log with one fault.

gevent stops a watcher whose callback raises. A callback that serves many connections therefore catches every
exception, gives up the one connection that caused it, reports the fault here, and continues.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any

import gevent
from gevent import getcurrent
from gevent._hub_local import get_hub_if_exists

log = logging.getLogger("gunicorn.error")

#: Seconds after its traceback was logged in which a fault is only counted.
_QUIET = 60.0
#: How many different faults are remembered; one more, and all of them are forgotten.
_MAX_FAULTS = 64


class _FaultCount:
    """One fault: an exception type, raised by one line of code."""

    def __init__(self) -> None:
        self.until = 0.0
        self.count = 0


_seen: dict[tuple[type, str, int], _FaultCount] = {}


def log_from_hub(*arguments: Any, exc_info: BaseException | None = None) -> None:
    """Log an error from code that the event loop calls, without waiting and without raising.

    A log handler may wait (for a lock, for a log server), and the hub cannot. So a greenlet writes the line.

    :param arguments: the format and its arguments, as for ``Logger.error``.
    """
    with suppress(Exception):
        if getcurrent() is get_hub_if_exists():
            gevent.spawn(_write, *arguments, exc_info=exc_info)
        else:
            _write(*arguments, exc_info=exc_info)


def _write(*arguments: Any, exc_info: BaseException | None) -> None:
    with suppress(Exception):
        log.error(*arguments, exc_info=exc_info)


def report_fault(what: str, error: BaseException) -> None:
    """Log an unexpected error with its traceback, at most once a minute for each line that raises it.

    :param what: what was given up because of it, such as ``"a new connection was closed"``.
    """
    with suppress(Exception):
        place = (type(error), *_origin(error.__traceback__))
        if place not in _seen and len(_seen) >= _MAX_FAULTS:
            _seen.clear()
        fault = _seen.setdefault(place, _FaultCount())
        now = monotonic()
        if now < fault.until:
            fault.count += 1
            return
        more = f" ({fault.count} more like it were not logged)" if fault.count else ""
        fault.until, fault.count = now + _QUIET, 0
        log_from_hub("Unexpected error: %s%s", what, more, exc_info=error)


def _origin(traceback: TracebackType | None) -> tuple[str, int]:
    """The file and line that raised."""
    if traceback is None:
        return "", 0
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
