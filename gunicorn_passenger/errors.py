"""Every error of the package, with its text in one place.

Runs in: every process. Must never: import anything else of the package.

Texts are one line each and say what happened, why, and what to do.
"""

from __future__ import annotations

import errno
import os
import re
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


def bad_address(address: object, why: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"cannot listen on {address!r}: {why}; an address is 'passenger', a port number, 'host:port', "
        "'[::1]:port', 'unix:/path' or 'auto'",
    )


def bad_port(port: object, where: str = "") -> ListenError:
    port = port[:20] if isinstance(port, str) else port
    where = where[:80]
    inside = f" in {where!r}" if where else ""
    return ListenError(errno.EINVAL, f"port {port!r}{inside} is not a number from 1 to 65535")


def unresolved(host: str, why: object) -> ListenError:
    return ListenError(
        errno.EADDRNOTAVAIL,
        f"host {host!r} does not resolve ({why}); give an address of this machine, such as 127.0.0.1 or ::1",
    )


def bad_placement(placement: object) -> SettingError:
    return SettingError(
        f"placement {placement!r} is unknown; use 'shared' (all workers accept from the one socket), "
        "'one' (one worker at a time) or 'each' (every worker has a port of its own)"
    )


def primary_with_placement(placement: str) -> SettingError:
    return SettingError(
        f"placement {placement!r} is for further servers: the primary is served by all workers; "
        "leave placement out, or listen on a port of its own and put a proxy before it"
    )


def each_needs_tcp(path: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"placement 'each' needs a port for each worker, unix:{path} is one; listen on a port or 'auto'",
    )


def unknown_name(name: str) -> PassengerError:
    return PassengerError(
        f"there is no server and no daemon {name!r} in this application; gunicorn-passenger status lists them"
    )


def too_few_ports(allocation: str, needed: int, free: int, where_set: str) -> ListenError:
    return ListenError(
        errno.EADDRINUSE,
        f"placement 'each' needs {needed} more ports, one for each worker, and {free} of "
        f"{allocation or 'none'} (set by {where_set}) are free; allocate more ports or start fewer workers",
    )


def no_port_free(allocation: str, where_set: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"listen('auto') found no free port in the port allocation {allocation} (set by {where_set}); "
        "close a server or allocate more ports",
    )


def not_allocated(port: int, account: str, allocation: str, where_set: str, remedy: str) -> PortNotAllocated:
    if allocation == "none":
        said = f"no port is allocated to it (set by {where_set}); to allow this one, {remedy}"
    else:
        said = f"the port allocation is {allocation} (set by {where_set}); listen on one of those ports, "
        said += f"or {remedy}"
    return PortNotAllocated(errno.EACCES, f"port {port} is not allocated to account {account}: {said}")


def privileged(port: int, first_free: int, account: str) -> PortNotAllocated:
    return PortNotAllocated(
        errno.EACCES,
        f"port {port} is privileged (below {first_free}) and no port allocation gives it to account "
        f"{account}; listen on {first_free} or above, or allocate it with PASSENGER_PORTS={port} or "
        f"configure(ports='{port}') in gunicorn.conf.py",
    )


def in_use(address: str, holder: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} is in use by {holder}; stop that program or listen on another port",
    )


def duplicate_listen(address: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} already has a server in this program; close that one first or listen on another port",
    )


def cannot_open(address: str, error: OSError) -> ListenError:
    return ListenError(
        error.errno or errno.EIO,
        f"cannot listen on {address}: {error.strerror or error}" + _advice(error, address),
    )


def _advice(error: OSError, address: str) -> str:
    if error.errno == errno.EACCES and not address.startswith("unix:"):
        return (
            "; the master may not bind it: use a port above 1023 or start gunicorn with the right to bind it"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "; it is no address of this machine"
    if error.errno == errno.ENOENT:
        return "; create the directory first"
    if error.errno == errno.EMFILE:
        return "; the master has no file descriptor left, raise its limit (ulimit -n)"
    return ""


def unix_path_too_long(path: str, limit: int) -> ListenError:
    return ListenError(
        errno.ENAMETOOLONG,
        f"UNIX socket path {path!r} has {len(os.fsencode(path))} bytes, the system takes at most {limit}; "
        "use a shorter path",
    )


def unix_not_a_socket(path: str) -> ListenError:
    return ListenError(
        errno.EEXIST, f"{path!r} exists and is not a socket; remove it or listen on another path"
    )


def unix_other_user(path: str, account: str) -> ListenError:
    return ListenError(
        errno.EACCES,
        f"UNIX socket {path!r} cannot be opened for workers that run as {account} by a master that runs as "
        "another user (it would be created with the master's rights); start gunicorn as that user, or name "
        "the socket in gunicorn's bind setting",
    )


def closed_server(name: str) -> ListenError:
    return ListenError(
        errno.EBADF, f"server {name!r} is closed and cannot listen again; make a new one with create_server()"
    )


def already_listening(name: str, address: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"server {name!r} already listens on {address}; call close() and make a new server to move it",
    )


def name_taken(name: str, address: str) -> ListenError:
    return ListenError(
        errno.EINVAL, f"a server named {name!r} already listens on {address}; give each server its own name"
    )


def not_callable(app: object) -> NotCallable:
    return NotCallable(
        f"create_server() takes a WSGI application, which is callable; {app!r} is not: "
        "pass a function app(environ, start_response) or a framework's application object"
    )


def too_many_ports(limit: int) -> ListenError:
    return ListenError(
        errno.ENOBUFS, f"this application already holds {limit} ports, which is the limit; close some servers"
    )


def too_many_ports_of_worker(limit: int) -> ListenError:
    return ListenError(
        errno.ENOBUFS, f"one worker may have {limit} ports, and this one has them; close some servers"
    )


def server_name_too_long(name: str, limit: int) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"a server's name may have {limit} characters, and {name[:40]!r}... has {len(name)}; give it a "
        "shorter one with listen(..., name=...)",
    )


def no_descriptor(address: str) -> ListenError:
    return ListenError(
        errno.EMFILE,
        f"{address} is not served by this worker: no descriptor is left for it; raise the limit of open "
        "files (ulimit -n)",
    )


def broker_unavailable(address: str, why: str) -> BrokerUnavailable:
    return BrokerUnavailable(
        errno.EPIPE,
        f"{address} is not served by this worker: the master's port broker {why}; "
        "the primary is still served, restart gunicorn to get the port back",
    )


def auto_installed_twice(first: str, second: str) -> AlreadyInstalled:
    return AlreadyInstalled(
        f"listen() was called a second time (on {second}), which auto-install mode does not allow: the first "
        f"server for which listen was called (on {first}) was installed on the primary socket, which the web "
        "server reaches, and was given no port. To run several servers, call "
        "passenger.configure(auto_install=False) first, then listen('passenger') on the server that the web "
        "server is to reach; every other listen() then gets its port from the gunicorn master"
    )


def passenger_twice(first: str) -> AlreadyInstalled:
    return AlreadyInstalled(
        f"listen('passenger') was called a second time: server {first!r} already has the primary socket, and "
        "there is one. Let this server listen on a port (listen(9000)) and reach it through "
        "http_proxy.create_server(9000, 'localhost').listen('passenger'), or close() the first one"
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


def bad_daemon(field: str, value: object, why: str) -> SettingError:
    return SettingError(f"spawn({field}={_without_address(value)!r}): {why}")


def _without_address(value: object) -> str:
    """A value alike in all workers, which are to say the same of it."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))[:80]


def duplicate_daemon_name(name: str) -> DaemonError:
    return DaemonError(
        f"spawn(name={name!r}): the name is used twice, for two different daemons; give each its own name="
    )


def no_command(name: str, command: str, exists: bool) -> DaemonError:
    why = "is not executable (chmod +x)" if exists else "does not exist; give its path, or install it"
    return DaemonError(f"daemon {name!r}: the command {command[:200]!r} {why}")


def not_importable(name: str, why: str) -> SettingError:
    return SettingError(
        f"spawn({_without_address(name)}): {why}, and a daemon is an interpreter of its own, which imports "
        "its function: define it at the top level of a module, and give it what it needs in args="
    )


def no_account(daemon: str, kind: str, name: str) -> DaemonError:
    return DaemonError(f"daemon {daemon!r}: there is no {kind} {name[:80]!r} on this machine")


def other_user(daemon: str, asked: str, account: str) -> DaemonError:
    return DaemonError(
        f"daemon {daemon!r}: the application may not run it as {asked[:80]!r}, only as the workers' user "
        f"{account}; call spawn() in gunicorn.conf.py, or leave user= and group= out"
    )


def cannot_switch_user(daemon: str, asked: str, account: str) -> DaemonError:
    return DaemonError(
        f"daemon {daemon!r}: a master that runs as {account} cannot run it as {asked} with that group; "
        "start gunicorn as root, or leave user= and group= out"
    )


def daemon_port_taken(address: str, holder: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} is in use by this application itself ({holder}); give the daemon another port",
    )


def too_many_daemons(limit: int) -> DaemonError:
    return DaemonError(f"this application already has {limit} daemons, which is the limit")


def daemon_too_long(name: str, limit: int) -> SettingError:
    return SettingError(
        f"daemon {name!r}: its command, arguments and environment have more than {limit} characters, which "
        "is the limit for one that the application asks for; put them into a file, or call spawn() in "
        "gunicorn.conf.py"
    )


def spawn_without_worker(name: str) -> DaemonError:
    return DaemonError(
        f"spawn(name={name!r}) was called in a worker that has no channel to the master: run gunicorn with "
        "-k gunicorn_passenger.Worker, or call spawn() in gunicorn.conf.py, which works with every worker "
        "class"
    )


def no_prometheus(why: object) -> str:
    return f"configure(prometheus=True): the workers' own counters are not added up: {why}"


def prometheus_too_early() -> str:
    return (
        "configure(prometheus=True): prometheus_client was imported in the master before, so each worker's "
        "own counters stay its own; import it in the program, not in gunicorn.conf.py"
    )
