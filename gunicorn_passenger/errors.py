"""Every error of the package, with its text in one place.

Runs in: every process. Must never: import anything else of the package.

Texts are one line each and say what happened, why, and what to do.
"""

from __future__ import annotations

import errno
import sys
from typing import Any


class PassengerError(Exception):
    """Base class of every error that gunicorn-passenger raises on purpose."""


class SettingError(PassengerError, ValueError):
    """A setting has a value that cannot be used."""


class UnknownSetting(PassengerError, TypeError):
    """``configure()`` was given a name that is no setting."""


class NotCallable(PassengerError, TypeError):
    """``create_server()`` was given something that is no WSGI application."""


class AlreadyInstalled(PassengerError):
    """The primary socket has its server already."""


class ScriptError(PassengerError):
    """A script run by ``gunicorn-passenger start`` cannot be served."""


class ListenError(PassengerError, OSError):
    """A server cannot listen where it was asked to.

    Also an ``OSError``: ``errno`` is what the kernel's own ``bind`` or ``listen`` would have
    set, so that programs which catch ``OSError`` behave; ``strerror`` is the text.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type, tuple[int | None, str]]:
        return type(self), (self.errno, self.strerror or "")


class PortNotAllocated(ListenError, PermissionError):
    """The port is not among those allocated to the account (``EACCES``, so a ``PermissionError``)."""

    def __init__(self, code: int = errno.EACCES, text: str = "") -> None:
        super().__init__(code, text)


class PortInUse(ListenError):
    """Another socket holds the address (``EADDRINUSE``)."""

    def __init__(self, code: int = errno.EADDRINUSE, text: str = "") -> None:
        super().__init__(code, text)


class BrokerUnavailable(ListenError):
    """The master's port broker cannot be reached, so no port can be had from it."""

    def __init__(self, code: int = errno.EPIPE, text: str = "") -> None:
        super().__init__(code, text)


class ClientDisconnected(PassengerError, ConnectionAbortedError):
    """The client has gone: what it sends broke off, or what it is sent does not reach it.

    Also an ``OSError``, which is what programs expect of ``wsgi.input`` and ``write()``.
    """

    def __init__(self, code: int, text: str, incomplete: bool = False) -> None:
        super().__init__(code, text)
        #: whether a body broke off, so that the client may still hear an answer
        self.incomplete = incomplete

    def __str__(self) -> str:
        return str(self.strerror)


class BodyTimeout(PassengerError, TimeoutError):
    """A client began to send a body and sends nothing any more."""

    def __init__(self, seconds: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"the request's body came to a stop: nothing for {seconds:g} s")

    def __str__(self) -> str:
        return str(self.strerror)


class TruncatedResponse(PassengerError):
    """The application's answer is shorter than it announced."""


class ProxyError(PassengerError):
    """A proxied request that got no answer from its target."""

    #: the status of the answer that the client gets
    status_code = 502

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        #: the :class:`~gunicorn_passenger.proxy.target.Target`, where one was chosen
        self.target: Any = None
        #: seconds since the request began
        self.elapsed = 0.0


class UpstreamRefused(ProxyError):
    """No connection to the target could be made (502)."""


class UpstreamClosed(ProxyError):
    """The target closed the connection before it had answered (502)."""


class BadResponse(ProxyError):
    """What the target answered is no HTTP, or could be read in two ways (502)."""


class UpstreamTimeout(ProxyError):
    """The target took too long to accept the connection or to answer (504)."""

    status_code = 504


class PoolExhausted(ProxyError):
    """All connections that may be made to the target are in use (503)."""

    status_code = 503


class BadRequestBody(ProxyError):
    """The client's request breaks off or is malformed (400), or is silent for too long (408)."""

    def __init__(self, reason: str, status_code: int = 400) -> None:
        super().__init__(reason)
        self.status_code = status_code


_python_hooks: list[Any] = []


def install_excepthook() -> None:
    """Have Python end a program that dies of a :class:`PassengerError` with its text, not a traceback.

    For the master with ``--preload`` and for plain Python; every other exception is shown as before.
    """
    if not _python_hooks:
        _python_hooks.append(sys.excepthook)
        sys.excepthook = _one_line


def _one_line(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if isinstance(error, PassengerError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        _python_hooks[0](kind, error, traceback)


#: How a refusal travels from the master to a worker and becomes the same class there.
REFUSALS: dict[str, type[ListenError]] = {
    "not_allocated": PortNotAllocated,
    "in_use": PortInUse,
    "listen": ListenError,
}


def refusal_kind(error: ListenError) -> str:
    """The name under which ``error`` travels in a ``Refused`` message."""
    if isinstance(error, PortNotAllocated):
        return "not_allocated"
    if isinstance(error, PortInUse):
        return "in_use"
    return "listen"


# --- texts -----------------------------------------------------------------------------------


def bad_placement(placement: object) -> SettingError:
    return SettingError(
        f"placement {placement!r} is unknown; use 'shared' (all workers accept from the one socket), "
        "'one' (one worker at a time) or 'each' (every worker has a port of its own)"
    )


def client_disconnected(error: OSError) -> ClientDisconnected:
    return ClientDisconnected(error.errno or errno.ECONNABORTED, f"the client has gone: {error.strerror}")


def body_incomplete() -> ClientDisconnected:
    return ClientDisconnected(
        errno.ECONNABORTED, "the request's body broke off: its client closed the connection", incomplete=True
    )


def status_unavailable(why: object) -> str:
    return f"'gunicorn-passenger status' will not find this application, which is served all the same: {why}"


def nothing_runs(account: str) -> PassengerError:
    return PassengerError(f"nothing of account {account} runs under gunicorn-passenger")


def no_such_application(app: str, running: list[str]) -> PassengerError:
    return PassengerError(
        f"--app {app}: no such application runs; there are: {', '.join(running)} (a name or a pid will do)"
    )


def in_no_application(name: str) -> PassengerError:
    return PassengerError(
        f"no application has a server or a daemon {name!r}; gunicorn-passenger status lists them"
    )


def in_several_applications(verb: str, name: str, where: list[str]) -> PassengerError:
    return PassengerError(
        f"{name!r} is in several applications: {', '.join(where)}; say which: "
        f"gunicorn-passenger {verb} {name} --app PID"
    )


def master_timeout(pid: int, why: str) -> PassengerError:
    return PassengerError(f"the master with pid {pid} did not answer ({why}); its log may tell why")


class DaemonError(PassengerError):
    """``spawn()`` asked for a daemon that cannot be had."""


def no_prometheus(why: object) -> str:
    return f"configure(prometheus=True): the workers' own counters are not added up: {why}"


def prometheus_too_early() -> str:
    return (
        "configure(prometheus=True): prometheus_client was imported in the master before, so each worker's "
        "own counters stay its own; import it in the program, not in gunicorn.conf.py"
    )
