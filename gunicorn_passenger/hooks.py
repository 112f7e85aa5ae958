"""Events of the program, and the package's place in gunicorn's hooks.

Runs in: every process. Must never: swallow or reorder what the user's own hooks do.

``from gunicorn_passenger.hooks import *`` in ``gunicorn.conf.py`` lets the master look after daemons with any
worker class. The names that this brings are gunicorn's; each of them does no more than to take the package's
places in all of gunicorn's hooks, so that a hook of the user's own by the same name does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, overload

#: what ``import *`` brings to gunicorn.conf.py; the earliest of them that gunicorn calls is enough
__all__ = ["nworkers_changed", "on_reload", "on_starting", "when_ready"]

EVENTS = ("ready", "listening", "exit")

_handlers: dict[str, list[Callable[[Any], object]]] = {name: [] for name in EVENTS}

F = TypeVar("F", bound=Callable[[Any], object])


@overload
def on(event: str) -> Callable[[F], F]: ...
@overload
def on(event: str, fn: F) -> F: ...
def on(event: str, fn: F | None = None) -> F | Callable[[F], F]:
    """Call ``fn`` on an event; without ``fn``, a decorator.

    - ``"ready"(worker)``: the worker has loaded the program and begins to serve;
    - ``"listening"(server)``: a server has its socket and begins to accept;
    - ``"exit"(worker)``: the worker leaves, after it has served what it had.

    ``worker`` is gunicorn's worker object, ``None`` under plain Python. A handler that raises is logged.

    :raises ValueError: for an unknown event.
    :raises TypeError: when ``fn`` is not callable.
    """
    if event not in _handlers:
        raise ValueError(f"there is no event {event!r}; there are: {', '.join(EVENTS)}")
    if fn is None:
        return lambda function: on(event, function)
    if not callable(fn):
        raise TypeError(f"a handler of {event!r} must be callable, {fn!r} is not")
    _handlers[event].append(fn)
    return fn


def emit(event: str, subject: Any, log: Any = None) -> None:
    """Call the handlers of an event, in the order in which they were added."""
    for handler in list(_handlers[event]):
        try:
            handler(subject)
        except Exception:
            (log or logging.getLogger("gunicorn.error")).exception(
                "gunicorn-passenger: a handler of %r raised", event
            )


def before(cfg: Any, name: str, ours: Callable[..., object]) -> None:
    """Run ``ours`` before the user's gunicorn hook ``name``, once for each configuration."""
    _wrap(cfg, name, ours, first=True)


def after(cfg: Any, name: str, ours: Callable[..., object]) -> None:
    """Run ``ours`` after the user's gunicorn hook ``name``, once for each configuration."""
    _wrap(cfg, name, ours, first=False)


def _wrap(cfg: Any, name: str, ours: Callable[..., object], first: bool) -> None:
    users = getattr(cfg, name)
    if getattr(users, "_passenger", False):
        return

    # gunicorn checks how many arguments a hook takes, so the wrapper has to name them
    if name in ("pre_fork", "child_exit"):

        def pair(server: Any, worker: Any) -> None:
            if first:
                ours(server, worker)
            users(server, worker)
            if not first:
                ours(server, worker)

        wrapper: Callable[..., None] = pair
    else:

        def single(server: Any) -> None:
            if first:
                ours(server)
            users(server)
            if not first:
                ours(server)

        wrapper = single
    wrapper._passenger = True  # type: ignore[attr-defined]
    cfg.set(name, wrapper)


# --- gunicorn's hooks, for gunicorn.conf.py ----------------------------------------------------------


def nworkers_changed(server: Any, _new_value: int, _old_value: int | None) -> None:
    """gunicorn has read its configuration, at the start or a reload, or has another number of workers."""
    _entry().attach_alone(server)


def on_starting(server: Any) -> None:
    _entry().attach_alone(server)


def when_ready(server: Any) -> None:
    if _entry().attach_alone(server):
        _entry().ready(server)


def on_reload(server: Any) -> None:
    if _entry().attach_alone(server):
        _entry().reloaded(server)


def _entry() -> Any:
    # needed in the master alone, and it imports this module
    from gunicorn_passenger.master import entry

    return entry
