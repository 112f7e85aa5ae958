"""The system's own threads, locks and poll, whether gevent has patched them or not.

Runs in: every process. Must never: touch a gevent hub, or import gevent where nothing has patched the
process.

A ``gunicorn.conf.py`` that starts with ``monkey.patch_all()`` patches the master too. There the
broker's thread must be a thread of the system all the same: the arbiter's loop does not turn a hub.
"""

from __future__ import annotations

import importlib
import select
import sys
from typing import Any


def unpatched(module: str, name: str) -> Any:
    """``module.name`` as it was before gevent patched it."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(importlib.import_module(module), name)
    return monkey.get_original(module, name)


def start_thread(function: Any) -> None:
    """Run ``function()`` in a thread of the system.

    :raises RuntimeError: when the system gives no thread.
    """
    unpatched("_thread", "start_new_thread")(function, ())


def lock() -> Any:
    """A lock between threads of the system."""
    return unpatched("_thread", "allocate_lock")()


def poll() -> Any:
    """A ``select.poll`` object; it holds no descriptor of its own."""
    return unpatched("select", "poll")()


def is_readable(fd: int) -> bool:
    """Whether there is something to read, or the end."""
    waiting = poll()
    waiting.register(fd, select.POLLIN)
    return bool(waiting.poll(0))
