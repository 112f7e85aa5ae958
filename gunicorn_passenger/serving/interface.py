"""Which interface an application has: WSGI (PEP 3333) or ASGI (version 3).

Process: a worker, plain Python, and the master with ``--preload``.
Never: call the application.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.serving import server_errors

AsgiApp = Callable[
    [Any, Callable[[], Awaitable[dict[str, Any]]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]

INTERFACES = ("auto", "asgi", "wsgi")


def check_interface(app: object, interface: object) -> str:
    """The interface by which to call an application.

    :param interface: ``"asgi"`` or ``"wsgi"`` where the program names it, or ``"auto"``.
    :returns: ``"asgi"`` or ``"wsgi"``.
    :raises errors.SettingError: for another value of ``interface``.
    :raises errors.NotCallable: when the application has neither interface, or not the one that is named.
    """
    if interface not in INTERFACES:
        raise errors.SettingError(
            f"create_server(interface={interface!r}): interface is one of {', '.join(map(repr, INTERFACES))}"
        )
    if not callable(app):
        raise server_errors.not_callable(app)
    found = _recognize(app)
    if found in ("asgi2", "class"):
        raise server_errors.asgi_instance_missing(app, found == "class")
    if interface == "auto":
        if found == "unknown":
            raise server_errors.unknown_interface(app)
        return "wsgi" if found == "either" else found
    if found not in (interface, "either", "unknown"):
        raise server_errors.wrong_interface(app, str(interface), found)
    return str(interface)


def _recognize(app: Callable[..., Any]) -> str:
    """``"asgi"``, ``"wsgi"``, ``"either"``, ``"unknown"``, ``"class"`` for a class whose instances are ASGI
    applications, or ``"asgi2"`` for an application of the first ASGI, which is called twice.
    """
    if inspect.isclass(app):
        if not inspect.iscoroutinefunction(app.__call__):
            return _by_arguments(app)
        return "asgi2" if _takes(app.__call__, 3) and not _takes(app.__call__, 4) else "class"
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(type(app).__call__):
        return "asgi" if _takes(app, 3) else "unknown"
    return _by_arguments(app)


def _by_arguments(app: Callable[..., Any]) -> str:
    wsgi, asgi = _takes(app, 2), _takes(app, 3)
    if wsgi and asgi:
        return "either"
    if asgi:
        return "asgi"
    if wsgi:
        return "wsgi"
    return "asgi2" if _takes(app, 1) and _names(app)[:1] == ["scope"] else "unknown"


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments; where Python cannot tell, it can."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
