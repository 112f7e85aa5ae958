"""The runtime directory: for sockets without a configured path.

Process: the master and the command line. Never: use a directory that another user could have prepared.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePath

from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.system import listening_sockets, procfs

#: The status socket of a master: its pid.
SOCKET = re.compile(r"([1-9][0-9]*)\.sock")
_TMP = "/tmp"  # noqa: S108 - what is there is checked where it is used
#: The number of user ids (user_namespaces(7)).
_ALL_USERS = (1 << 32) - 1


def directory() -> str:
    """The path: ``PASSENGER_RUNTIME_DIR``, else below ``XDG_RUNTIME_DIR``, ``/run`` (root), ``TMPDIR`` or
    ``/tmp``.

    An ``XDG_RUNTIME_DIR`` that belongs to another user (``su`` and ``sudo`` may leave it) is not used.
    """
    if given := os.environ.get("PASSENGER_RUNTIME_DIR", "").strip():
        return os.path.abspath(given)
    xdg = os.environ.get("XDG_RUNTIME_DIR", "").strip()
    if xdg and _owner(os.path.realpath(xdg)) in (None, os.geteuid()):
        return os.path.join(os.path.abspath(xdg), "gunicorn-passenger")
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return "/run/gunicorn-passenger"
    return _in_tmp()


def _owner(path: str) -> int | None:
    try:
        return os.lstat(path).st_uid
    except (OSError, ValueError):
        return None


def ensure(warn: Callable[[str], object] = lambda _: None) -> str:
    """Make the runtime directory with mode 0700, or check that only this user may use it.

    Another user may have made ``/tmp/gunicorn-passenger-UID`` first. Then a directory with an unpredictable
    name is used instead, which the command line finds.

    :param warn: called with one sentence in that case.
    :raises SettingError: when it cannot be created, or another user owns it or may write to it.
    """
    path = directory()
    try:
        return _ensure(path, 0o700)
    except SettingError as error:
        if path != _in_tmp() or _owner(path) is None or _is_ours(path):
            raise
        other = next(iter(_stand_ins()), "")
        if not other:
            try:
                other = tempfile.mkdtemp(prefix=f"{os.path.basename(path)}-", dir=os.path.dirname(path))
            except OSError:
                raise error from None
        warn(
            f"the runtime directory {path} belongs to {account_name(_owner(path) or 0)} and cannot be "
            f"trusted: {other} is used instead; set PASSENGER_RUNTIME_DIR to choose another"
        )
        return other


def _in_tmp() -> str:
    """The directory for temporary files: ``TMPDIR``, else ``/tmp``."""
    above = os.environ.get("TMPDIR", "").strip()
    return _below(above if os.path.isabs(above) else _TMP)


def _below(above: str) -> str:
    return os.path.join(os.path.normpath(above), f"gunicorn-passenger-{os.geteuid()}")


def _stand_ins() -> list[str]:
    """The substitutes for the directory in ``/tmp``, by name."""
    above, name = os.path.split(_in_tmp())
    ours = re.compile(rf"{re.escape(name)}-[a-z0-9_]{{8}}")  # as tempfile.mkdtemp makes them
    found = []
    with suppress(OSError), os.scandir(above) as entries:
        found = [entry.path for entry in entries if ours.fullmatch(entry.name)]
    return sorted(path for path in found if _is_ours(path))


def ensure_world_traversable() -> str:
    """Make a directory beside the runtime directory, mode 0711, through which other users reach their files.

    For a master that is root and workers that are not, since only root may enter the runtime directory.

    :raises SettingError: as :func:`ensure`, and when other users may not enter a directory above it.
    """
    path = _ensure(f"{directory()}-users", 0o711)
    if closed := not_traversable(path):
        raise SettingError(
            f"the workers' user needs {path}, but cannot enter {closed} (its mode is "
            f"{stat.S_IMODE(os.stat(closed).st_mode):04o}); set PASSENGER_RUNTIME_DIR to another path"
        )
    return path


def not_traversable(path: str) -> str:
    """The directory, or the first one above it, that other users cannot enter; empty if they can."""
    for above in (path, *map(str, PurePath(path).parents)):
        if not os.stat(above).st_mode & 0o001:
            return above
    return ""


def _ensure(path: str, mode: int) -> str:
    advice = "set PASSENGER_RUNTIME_DIR to another path"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        made = False
        with suppress(FileExistsError):
            os.mkdir(path, mode)
            made = True
        # from here on by its descriptor: another user may be able to replace the path
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (NotADirectoryError, FileExistsError):
        raise SettingError(f"the runtime directory {path} is not a directory; {advice}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SettingError(f"the runtime directory {path} is not a directory; {advice}") from None
        if _owner(path) not in (None, os.geteuid()):
            raise _not_ours(path) from None
        raise SettingError(
            f"the runtime directory {path} cannot be created ({error.strerror}); {advice}"
        ) from None
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise _not_ours(path)
        if os.geteuid() == 0 and (above := _untrusted_above(path)):
            raise SettingError(
                f"the runtime directory {path} cannot be used by a master that runs as root: {above} belongs "
                f"to another user, or others may write to it; {advice}"
            )
        if made:
            os.fchmod(fd, mode)  # without the effect of the umask
    finally:
        os.close(fd)
    return path


def _not_ours(path: str) -> SettingError:
    return SettingError(
        f"the runtime directory {path} must belong to you, and only you may write to it; remove it or set "
        "PASSENGER_RUNTIME_DIR to another path"
    )


def _untrusted_above(path: str) -> str:
    """The first directory above in which another user could replace the next one."""
    owners = {0, _unmapped()}
    for above in map(str, PurePath(os.path.realpath(path)).parents):
        info = os.lstat(above)
        if info.st_uid not in owners or (info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX):
            return above
    return ""


def _unmapped() -> int:
    """The owner of the host's directories in a container with user ids of its own; otherwise root."""
    with suppress(OSError, ValueError):
        with open("/proc/self/uid_map", encoding="ascii") as file:
            mapped = sum(int(line.split()[2]) for line in file)
        if mapped < _ALL_USERS:
            with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
                return int(file.read())
    return 0


def directories() -> list[str]:
    """Where masters of this account may have put their status sockets.

    The environment of a login may differ from that of a service. So without a ``PASSENGER_RUNTIME_DIR`` these
    are all usual places, and those in the environment of each process of this account.
    """
    uid = os.geteuid()
    if os.environ.get("PASSENGER_RUNTIME_DIR", "").strip():
        places = [directory()]
    else:
        places = [
            directory(),
            f"/run/user/{uid}/gunicorn-passenger",
            _in_tmp(),
            *_stand_ins(),
            _below(_TMP),
        ]
        if uid == 0:
            places.append("/run/gunicorn-passenger")
        places.extend(_set_for_processes(uid))
    return [path for path in dict.fromkeys(places) if _is_ours(path)]


def _is_ours(path: str) -> bool:
    """Whether a directory belongs to this account, and only this account may write to it."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def _set_for_processes(uid: int) -> list[str]:
    """The directories that ``PASSENGER_RUNTIME_DIR`` and ``TMPDIR`` of this account's processes name."""
    found = []
    for pid in procfs.pids():
        for entry in procfs.environment(pid) if procfs.owner(pid) == uid else ():
            name, _, value = entry.partition(b"=")
            if name == b"PASSENGER_RUNTIME_DIR" and value.startswith(b"/"):
                found.append(os.path.normpath(os.fsdecode(value)))
            elif name == b"TMPDIR" and value.startswith(b"/"):
                found.append(_below(os.fsdecode(value)))
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
        remove_if_stale(pid, name)


def remove_if_stale(pid: int, path: str) -> bool:
    """Remove a status socket without a listener whose master does not run any more.

    :returns: whether it was removed.
    """
    with suppress(OSError):
        if (
            stat.S_ISSOCK(os.lstat(path).st_mode)
            and not listening_sockets.has_listener(path)
            and procfs.owner(pid) is None
        ):
            os.unlink(path)
            return True
    return False
