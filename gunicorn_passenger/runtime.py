"""The runtime directory: where sockets live that nobody gave a path.

Runs in: the master and the command line. Must never: use a directory that somebody else could have
prepared.
"""

from __future__ import annotations

import os
import stat

from gunicorn_passenger.errors import SettingError


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
    path = directory()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, 0o700)
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
