"""The program's events: ``ready``, ``listening`` and ``exit``.

Process: a worker, or plain Python.
Never: let a handler that raises stop the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, overload

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
    - ``"exit"(worker)``: the worker exits, after it has finished its connections.

    ``worker`` is gunicorn's worker object, or ``None`` under plain Python. An error of a handler is logged.

    :raises ValueError: for an unknown event.
    :raises TypeError: when ``fn`` is not callable.
    """
    if event not in _handlers:
        raise ValueError(f"unknown event {event!r}; the events are {', '.join(EVENTS)}")
    if fn is None:
        return lambda function: on(event, function)
    if not callable(fn):
        raise TypeError(f"the handler of event {event!r} must be callable; {fn!r} is not")
    _handlers[event].append(fn)
    return fn


def emit(event: str, subject: Any, log: Any = None) -> None:
    """Call the handlers of an event, in the order in which they were added."""
    for handler in list(_handlers[event]):
        try:
            handler(subject)
        except Exception:
            (log or logging.getLogger("gunicorn.error")).exception(
                "gunicorn-passenger: the program's handler of the event %r raised an error", event
            )
