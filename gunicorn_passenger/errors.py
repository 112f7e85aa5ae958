"""The classes of the package's errors, and how the master's refusals reach a worker.

Process: every process. Never: import anything else of the package.

The texts are beside the code that raises the errors, or in a module of its subsystem:
``config/listen_errors.py``, ``serving/server_errors.py``, ``daemons/daemon_errors.py``.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from types import TracebackType
from typing import Any


class PassengerError(Exception):
    """Base class of every error that gunicorn-passenger raises on purpose."""


class SettingError(PassengerError, ValueError):
    """A setting has a value that cannot be used."""


class UnknownSetting(PassengerError, TypeError):
    """A call was given a name that is not a setting or an option."""


def unknown_name(where: str, kind: str, name: str, known: Iterable[str]) -> UnknownSetting:
    """The error for a misspelt name: with what is meant, if one of the known names is close.

    :param where: the call that was given the name.
    :param kind: what it should be: ``"option"`` or ``"setting"``.
    """
    names = list(known)
    close = get_close_matches(snake_case(name), names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known {kind}s: {', '.join(names)}"
    return UnknownSetting(f"{where} has no {kind} {name!r}; {hint}")


def snake_case(name: str) -> str:
    """A name in the spelling of Node's libraries, in Python's: ``changeOrigin`` as ``change_origin``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class NotCallable(PassengerError, TypeError):
    """``create_server()`` was given something that is not a WSGI or ASGI application."""


class AlreadyInstalled(PassengerError):
    """The primary socket already has a server."""


class MissingPackage(PassengerError, ImportError):
    """A package that the called part needs is not installed."""


class ScriptError(PassengerError):
    """A script run by ``gunicorn-passenger start`` cannot be served."""


class DaemonError(PassengerError):
    """``spawn()`` asked for a daemon that the master cannot start."""


class ListenError(PassengerError, OSError):
    """A server cannot listen where it was asked to.

    Also an ``OSError``: ``errno`` is what the kernel's own ``bind`` or ``listen`` would have
    set, so that programs which catch ``OSError`` work; ``strerror`` is the text.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type, tuple[int | None, str]]:
        return type(self), (self.errno, self.strerror or "")


class PortNotAllocated(ListenError, PermissionError):
    """The port is not allocated to the account (``EACCES``, so also a ``PermissionError``)."""


class PortInUse(ListenError):
    """Another socket holds the address (``EADDRINUSE``)."""


class BrokerUnavailable(ListenError):
    """The worker cannot reach the master's port broker, and so cannot get a port."""


class ClientDisconnected(PassengerError, ConnectionAbortedError):
    """The client has closed the connection, before its request or its response was complete.

    Also an ``OSError``, which programs expect from ``wsgi.input`` and ``write()``.
    """

    def __init__(self, code: int, text: str, incomplete: bool = False) -> None:
        super().__init__(code, text)
        #: whether a request body is incomplete; then the client may still read a response
        self.incomplete = incomplete

    def __str__(self) -> str:
        return str(self.strerror)


class BodyTimeout(PassengerError, TimeoutError):
    """A client stopped sending in the middle of a request body."""

    def __init__(self, seconds: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"the client sent nothing of its request body for {seconds:g} s")

    def __str__(self) -> str:
        return str(self.strerror)


class TruncatedResponse(PassengerError):
    """The response of the application, or of a target, ended before its Content-Length."""


class ProxyError(PassengerError):
    """A proxied request that got no response from its target."""

    #: the status of the response that the client gets
    status_code = 502

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        #: the :class:`~gunicorn_passenger.proxy.target.Target`, where one was chosen
        self.target: Any = None
        #: seconds since the request began
        self.elapsed = 0.0


class UpstreamRefused(ProxyError):
    """The proxy could not connect to the target (502)."""


class UpstreamClosed(ProxyError):
    """The target closed the connection before it had responded (502)."""


class BadResponse(ProxyError):
    """The target's response is not HTTP, or is ambiguous (502)."""


class UpstreamTimeout(ProxyError):
    """The target took too long to accept the connection or to respond (504)."""

    status_code = 504


class PoolExhausted(ProxyError):
    """The pool has no free connection to the target and may not open another (503)."""

    status_code = 503


class BadRequestBody(ProxyError):
    """The client's request is incomplete or malformed (400), or the client paused for too long (408)."""

    def __init__(self, reason: str, status_code: int = 400) -> None:
        super().__init__(reason)
        self.status_code = status_code


def install_excepthook() -> None:
    """Show an uncaught :class:`PassengerError` as its text, without a traceback.

    For the master with ``--preload`` and for plain Python. Other exceptions are shown as before.
    """
    if sys.excepthook is _one_line:
        return
    global _next_excepthook
    _next_excepthook, sys.excepthook = sys.excepthook, _one_line


_next_excepthook = sys.__excepthook__


def _one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, PassengerError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        _next_excepthook(kind, error, traceback)


#: The kind in a ``RequestDenied`` message -> the class that the worker raises.
REFUSALS: dict[str, type[ListenError]] = {
    "not_allocated": PortNotAllocated,
    "in_use": PortInUse,
    "listen": ListenError,
}


def refusal_kind(error: Exception) -> str:
    """The kind of ``error`` in a ``RequestDenied`` message."""
    return next((kind for kind, refusal in REFUSALS.items() if isinstance(error, refusal)), "listen")


def client_disconnected(error: OSError) -> ClientDisconnected:
    return ClientDisconnected(
        error.errno or errno.ECONNABORTED, f"the client closed the connection: {error.strerror}"
    )


def body_incomplete() -> ClientDisconnected:
    return ClientDisconnected(
        errno.ECONNABORTED,
        "the request body is incomplete: the client closed the connection",
        incomplete=True,
    )
