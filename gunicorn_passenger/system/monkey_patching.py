"""Has gevent patch the standard library, and tells when that comes too late for modules imported before.

Process: a worker. Never: run in the master, whose threads must stay native.
"""

from __future__ import annotations

import gc
import warnings
from importlib import _bootstrap, metadata

from gevent import events, monkey

from gunicorn_passenger.config.gunicorn_types import Log


def patch_standard_library(log: Log, preloaded: bool) -> None:
    """:param preloaded: with ``--preload`` the master has already logged a warning."""
    if _is_importing():
        gc.unfreeze()
    events.subscribers.append(_thaw)
    # gevent looks for plugins at 25 points while it patches. Each time, importlib.metadata would read the
    # files of every installed package: that took two thirds of the time that a worker needs to start.
    read = metadata.entry_points
    metadata.entry_points = metadata.entry_points().select
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", monkey.MonkeyPatchWarning)
            monkey.patch_all()
    finally:
        metadata.entry_points = read
        events.subscribers.remove(_thaw)
    # a collection would write to all memory that the worker shares with the master, and copy it
    gc.freeze()
    late = [str(item.message) for item in caught if issubclass(item.category, monkey.MonkeyPatchWarning)]
    if late and not preloaded:
        log.warning(
            "gunicorn.conf.py has imported modules before gevent patched the standard library, so they may "
            "block a worker or fail with RecursionError: import them inside the functions that use them, or "
            "make this the first line of gunicorn.conf.py: from gevent import monkey; monkey.patch_all() "
            "(docs/how-to/deployment.md). gevent says: %s",
            " ".join(late),
        )


def _is_importing() -> bool:
    """Whether a thread imports a module: the lock of that module is one of those that gevent looks for."""
    return bool(getattr(_bootstrap, "_module_locks", True))


def _thaw(event: object) -> None:
    """gevent looks next for modules that have imported names of ``ssl``, among the objects of the collector.

    Earlier it looks for locks that are held, and writes to all objects. What the master has made is better
    frozen then: the system would copy it.
    """
    if isinstance(event, events.GeventWillPatchModuleEvent) and event.module_name == "ssl":
        gc.unfreeze()
