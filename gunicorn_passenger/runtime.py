"""The runtime directory: where sockets live that nobody gave a path.

Runs in: the master and the command line. Must never: use a directory that somebody else could have
prepared.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress

from gunicorn_passenger import sockets
from gunicorn_passenger.errors import SettingError

#: The status socket of a master: its pid.
SOCKET = re.compile(r"([1-9][0-9]*)\.sock")


def directory() -> str:
    """The path: ``PASSENGER_RUNTIME_DIR``, else below ``XDG_RUNTIME_DIR``, ``/run`` (root) or ``/tmp``."""
    if given := os.environ.get("PASSENGER_RUNTIME_DIR", "").strip():
        return os.path.abspath(given)
    if xdg := os.environ.get("XDG_RUNTIME_DIR", "").strip():
        return os.path.join(os.path.abspath(xdg), "gunicorn-passenger")
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return "/run/gunicorn-passenger"
    return f"/tmp/gunicorn-passenger-{os.geteuid()}"  # noqa: S108 - checked below, mode 0700


def ensure() -> str:
    """Make the runtime directory with mode 0700, or check that it is ours alone.

    :raises SettingError: when it cannot be made, or somebody else owns it or may write into it.
    """
    return _ensure(directory(), 0o700)


def ensure_passable() -> str:
    """Make a directory beside the runtime directory, mode 0711, where other users reach what is theirs.

    For a master that is root and workers that are not: the runtime directory lets nobody through.

    :raises SettingError: as :func:`ensure`, and when a directory above it lets nobody through.
    """
    path = _ensure(f"{directory()}-users", 0o711)
    above = path
    while above != os.path.dirname(above):
        if not os.stat(above).st_mode & 0o001:
            raise SettingError(
                f"{path} is for the workers' user, and {above} does not let it through (its mode is "
                f"{stat.S_IMODE(os.stat(above).st_mode):04o}); set PASSENGER_RUNTIME_DIR"
            )
        above = os.path.dirname(above)
    return path


def _ensure(path: str, mode: int) -> str:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, mode)
        os.chmod(path, mode)  # what the umask took away
    except FileExistsError:
        pass
    except OSError as error:
        raise SettingError(
            f"the runtime directory {path} cannot be made ({error.strerror}); set PASSENGER_RUNTIME_DIR"
        ) from None
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise SettingError(f"the runtime directory {path} is no directory; set PASSENGER_RUNTIME_DIR")
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise SettingError(
            f"the runtime directory {path} must belong to you and be writable by nobody else; "
            "remove it or set PASSENGER_RUNTIME_DIR"
        )
    return path


def directories() -> list[str]:
    """Where masters of this account may have put their status sockets.

    What is set in the environment may differ between a login and a service, so without a
    ``PASSENGER_RUNTIME_DIR`` of one's own all the usual places are looked at, and those that processes of
    this account were started with.
    """
    uid = os.geteuid()
    if os.environ.get("PASSENGER_RUNTIME_DIR", "").strip():
        places = [directory()]
    else:
        places = [directory(), f"/run/user/{uid}/gunicorn-passenger", f"/tmp/gunicorn-passenger-{uid}"]  # noqa: S108
        if uid == 0:
            places.append("/run/gunicorn-passenger")
        places.extend(_set_for_processes(uid))
    return [path for path in dict.fromkeys(places) if _is_ours(path)]


def _is_ours(path: str) -> bool:
    """Whether a directory is this account's, and nobody else may put anything into it."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def _set_for_processes(uid: int) -> list[str]:
    """What ``PASSENGER_RUNTIME_DIR`` was set to when each process of this account was started."""
    found = []
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid != uid:
                continue
            with open(f"/proc/{pid}/environ", "rb") as file:
                for entry in file.read().split(b"\0"):
                    name, _, value = entry.partition(b"=")
                    if name == b"PASSENGER_RUNTIME_DIR" and value.startswith(b"/"):
                        found.append(os.path.normpath(os.fsdecode(value)))
    return found


def status_sockets(path: str) -> list[tuple[int, str]]:
    """The status sockets in a runtime directory: pid and path, by pid."""
    found = []
    with suppress(OSError):
        for name in os.listdir(path):
            if match := SOCKET.fullmatch(name):
                found.append((int(match.group(1)), os.path.join(path, name)))
    return sorted(found)


def clear(path: str) -> None:
    """Remove the status sockets of masters that were killed."""
    for pid, name in status_sockets(path):
        clear_one(pid, name)


def clear_one(pid: int, path: str) -> bool:
    """Remove a status socket that nobody listens on and whose master is gone.

    :returns: whether it was one.
    """
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not sockets.answers(path) and not lives(pid):
            os.unlink(path)
            return True
    return False


def lives(pid: int) -> bool:
    """Whether there is a process with this pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
