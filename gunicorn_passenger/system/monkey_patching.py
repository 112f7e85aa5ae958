"""Has gevent patch the standard library, and tells when that comes too late for modules imported before.

Process: a worker. Never: run in the master, whose threads must stay native.
"""

from __future__ import annotations

import gc
import warnings

from gevent import monkey

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.system import entry_points


def patch_standard_library(log: Log, preloaded: bool) -> None:
    """:param preloaded: with ``--preload`` the master has already logged a warning."""
    # gevent looks for locks, and for what was imported too early, among the collector's objects
    gc.unfreeze()
    with entry_points.read_once(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", monkey.MonkeyPatchWarning)
        monkey.patch_all()
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
