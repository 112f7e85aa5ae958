"""The locks of the log, where gevent has patched the master: its threads are the system's.

Process: the master; a worker gives its handlers gevent's locks back. Never: block.

A lock of gevent's lets the hub run while it waits, and the arbiter has no hub to run: when the broker's
thread logs at the same moment, the arbiter would end with ``LoopExit: This operation would block forever``.
"""

from __future__ import annotations

import _thread
import logging
from typing import Any

from gunicorn_passenger.system import unpatched

_shared: list[logging.Handler] = []


def share_between_threads(log: Any) -> None:
    """Called in the master before it has a thread.

    :param log: gunicorn's logger.
    """
    if not unpatched.threads_are_greenlets():
        return
    loggers = (log.error_log, log.access_log, logging.getLogger())
    _shared[:] = {id(handler): handler for logger in loggers for handler in logger.handlers}.values()
    for handler in _shared:
        handler.lock = _thread.RLock()


def leave_to_greenlets() -> None:
    """Called in a worker after the fork."""
    for handler in _shared:
        handler.createLock()
    _shared.clear()
