"""The system's own threads, locks and poll, even where gevent has patched them.

Process: every process. Never: touch a gevent hub, or import gevent where nothing has patched the process.

A ``gunicorn.conf.py`` that starts with ``monkey.patch_all()`` patches the master too. The
broker's thread must be a thread of the system there, too: the arbiter's loop does not run a hub.
"""

from __future__ import annotations

import importlib
import select
import threading
from _thread import LockType
from collections.abc import Callable

# debugpy replaces it with one that warns of its use
from sys import settrace
from typing import Any

from gunicorn_passenger.system.import_watch import imported


def unpatched(module: str, name: str) -> Any:
    """``module.name`` as it was before gevent patched it."""
    monkey = imported("gevent.monkey")
    if monkey is None:
        # a signal handler may come here while its thread holds the lock of an import
        return getattr(imported(module) or importlib.import_module(module), name)
    return monkey.get_original(module, name)


def threads_are_greenlets() -> bool:
    """Whether gevent has patched ``threading``."""
    monkey = imported("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def start_thread(function: Callable[[], object]) -> None:
    """Run ``function()`` in a thread of the system, which debuggers and coverage.py see as they do others.

    :raises RuntimeError: when the system cannot start a thread.
    """
    trace = threading.gettrace()

    def run() -> None:
        if trace is not None:
            settrace(trace)
        function()

    unpatched("_thread", "start_new_thread")(run, ())


def lock() -> LockType:
    """A lock between threads of the system."""
    made: LockType = unpatched("_thread", "allocate_lock")()
    return made


def rlock() -> Any:
    """A lock between threads of the system that the thread which holds it may take again."""
    return unpatched("_thread", "RLock")()


def poll() -> select.poll:
    """A ``select.poll`` object; it holds no descriptor of its own."""
    made: select.poll = unpatched("select", "poll")()
    return made


def is_readable(fd: int) -> bool:
    """Whether data can be read, or the end of the stream."""
    waiting = poll()
    waiting.register(fd, select.POLLIN)
    return bool(waiting.poll(0))
