"""The errors of listening: one text for each, whichever process finds out.

Process: every process. Never: raise; a function here returns the error to raise.

Each text is one line and says what happened, where, and what to do.
"""

from __future__ import annotations

import errno
import os

from gunicorn_passenger.errors import ListenError, PortInUse, PortNotAllocated


def bad_address(address: object, why: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"cannot listen on {address!r}: {why}; use 'passenger', a port number, 'host:port', '[::1]:port', "
        "'unix:/path' or 'auto'",
    )


def bad_port(port: object, where: str = "") -> ListenError:
    port = port[:20] if isinstance(port, str) else port
    where = where[:80]
    inside = f" in {where!r}" if where else ""
    return ListenError(errno.EINVAL, f"port {port!r}{inside} is not a number from 1 to 65535")


def unresolved(host: str, why: object) -> ListenError:
    return ListenError(
        errno.EADDRNOTAVAIL,
        f"host {host!r} does not resolve ({why}); use an address of this machine, such as 127.0.0.1 or ::1",
    )


def each_needs_tcp(path: str) -> ListenError:
    return ListenError(
        errno.EINVAL,
        f"placement 'each' needs a port for each worker, but unix:{path} is a single socket; listen on a "
        "port or 'auto'",
    )


def too_few_ports(allocation: str, needed: int, free: int, where_set: str) -> ListenError:
    return ListenError(
        errno.EADDRINUSE,
        f"placement 'each' needs {needed} more port{'s' * (needed > 1)}, one for each worker, but the port "
        f"allocation {allocation or 'none'} (set by {where_set}) has only {free} free; allocate more ports "
        "or start fewer workers",
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
    said += " (docs/reference/ports.md)"
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


def serves_primary(address: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} is in gunicorn's bind, and this worker serves the primary there now that it is ready; "
        "call listen() while the program is loading, or listen on another port",
    )


def bound_by_sibling(address: str, pid: int) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} is bound by worker {pid} of this application, which does not listen there; to share the "
        "port, call listen() directly after bind()",
    )


def duplicate_listen(address: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} already has a server in this program; close that server first or listen on another port",
    )


def cannot_open(address: str, error: OSError) -> ListenError:
    return ListenError(
        error.errno or errno.EIO,
        f"cannot listen on {address}: {error.strerror or error}" + _advice(error, address),
    )


def _advice(error: OSError, address: str) -> str:
    if error.errno == errno.EACCES and not address.startswith("unix:"):
        return (
            "; the master has no permission to bind it: use a port above 1023, or start gunicorn as root or "
            "with CAP_NET_BIND_SERVICE"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "; this machine does not have that address"
    if error.errno == errno.ENOENT:
        return "; create the directory first"
    if error.errno == errno.EMFILE:
        return "; the process has no file descriptor left: raise its limit (ulimit -n)"
    return ""


def unix_path_too_long(path: str, limit: int) -> ListenError:
    return ListenError(
        errno.ENAMETOOLONG,
        f"UNIX socket path {path!r} has {len(os.fsencode(path))} bytes, but the system allows {limit}; "
        "use a shorter path",
    )


def unix_not_a_socket(path: str) -> ListenError:
    return ListenError(
        errno.EEXIST, f"{path!r} exists and is not a socket; remove it or listen on another path"
    )


def unix_other_user(path: str, account: str) -> ListenError:
    return ListenError(
        errno.EACCES,
        f"UNIX socket {path!r} cannot be opened: the workers run as {account}, but the master runs as "
        f"another user and would create it with the master's rights; start gunicorn as {account}, or list "
        "the socket in gunicorn's bind setting",
    )


def too_many_ports(limit: int) -> ListenError:
    return ListenError(
        errno.ENOBUFS, f"this application already holds {limit} ports, which is the limit; close some servers"
    )


def too_many_waiting(limit: int) -> ListenError:
    return ListenError(
        errno.ENOBUFS,
        f"this worker already waits for {limit} ports of servers with the placement 'each', which is the "
        "limit; allocate more ports or start fewer workers",
    )


def too_many_ports_of_worker(limit: int) -> ListenError:
    return ListenError(
        errno.ENOBUFS,
        f"this worker already has {limit} ports, which is the limit for one worker; close some servers",
    )
