"""The errors of ``spawn()`` and of the daemons.

Process: every process that may call ``spawn()``. Never: raise; a function here returns the error to raise.

Each text is one line and says what happened, where, and what to do.
"""

from __future__ import annotations

import errno
import re

from gunicorn_passenger.errors import DaemonError, PortInUse, SettingError


def bad_daemon(field: str, value: object, why: str) -> SettingError:
    return SettingError(f"spawn({field}={_without_address(value)!r}): {why}")


def _without_address(value: object) -> str:
    """The value without memory addresses, so that all workers report the same text."""
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
        f"spawn({_without_address(name)}): {why}, but a daemon runs in a separate interpreter, which has to "
        "import the function; define it at the top level of a module, and pass what it needs in args="
    )


def no_account(daemon: str, kind: str, name: str) -> DaemonError:
    return DaemonError(
        f"daemon {daemon!r}: this machine has no {kind} {name[:80]!r}; check spawn({kind}=...)"
    )


def other_user(daemon: str, asked: str, account: str) -> DaemonError:
    return DaemonError(
        f"daemon {daemon!r}: the application may not run it as {asked[:80]!r}, only as the workers' user "
        f"{account}; call spawn() in gunicorn.conf.py, or remove user= and group="
    )


def cannot_switch_user(daemon: str, asked: str, account: str) -> DaemonError:
    return DaemonError(
        f"daemon {daemon!r}: a master that runs as {account} cannot run it as {asked} with that group; "
        "start gunicorn as root, or remove user= and group="
    )


def daemon_port_taken(address: str, holder: str) -> PortInUse:
    return PortInUse(
        errno.EADDRINUSE,
        f"{address} is in use by this application itself ({holder}); give the daemon another port",
    )


def too_many_daemons(limit: int) -> DaemonError:
    return DaemonError(
        f"this application already has {limit} daemons, which is the limit; spawn() fewer of them"
    )


def daemon_too_long(name: str, limit: int) -> SettingError:
    return SettingError(
        f"daemon {name!r}: its command, arguments and environment have more than {limit} characters, which "
        "is the limit for spawn() in the application; put them into a file, or call spawn() in "
        "gunicorn.conf.py"
    )


def spawn_without_worker(name: str) -> DaemonError:
    return DaemonError(
        f"spawn(name={name!r}) was called in a worker that has no channel to the master: add 'from "
        "gunicorn_passenger.hooks import *' to gunicorn.conf.py, or run gunicorn with -k "
        "gunicorn_passenger.Worker"
    )
