"""``prometheus_client``'s multiprocess mode, set up and cleaned for a program that counts in several workers.

Runs in: the master. Must never: import ``prometheus_client`` (it decides at its import, and the program is to
import it), remove what it has not made, or let anybody but the workers' user at what they count.

Asked for with ``configure(prometheus=True)``. Each worker then keeps its counts in files of one directory,
``prometheus-<pid of the master>``, and whoever answers ``/metrics`` adds them up. The directory belongs to
the workers' user alone. A master that is root makes it beside the runtime directory, which lets no other
user through.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from contextlib import suppress
from typing import Any

from gunicorn_passenger import errors, runtime
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.settings import settings

#: Where ``prometheus_client`` looks.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_NAME = re.compile(r"prometheus-([1-9][0-9]*)")


class Directory:
    """The directory of this master, if one was asked for."""

    def __init__(self) -> None:
        #: where the workers count; empty when they do not
        self.path = ""
        #: whether it is ours to own and to remove
        self._ours = False
        self._pid = 0
        self._held = -1
        self._said: list[str] = []

    def prepare(self) -> None:
        """gunicorn has read its configuration; what comes next may import the program (``--preload``)."""
        try:
            wanted = settings.prometheus()
        except SettingError:
            return  # it is said when all settings are looked at
        if not wanted:
            self._let_go()
        elif not self.path or self._pid != os.getpid():
            self._begin()
        elif self._ours:
            os.environ[VARIABLE] = self.path

    def _let_go(self) -> None:
        """A reload has switched it off: workers that are there go on, the next ones count for themselves."""
        if self._ours and os.environ.get(VARIABLE) == self.path:
            del os.environ[VARIABLE]

    def _begin(self) -> None:
        self._pid = os.getpid()
        try:
            parent = runtime.ensure_passable() if os.geteuid() == 0 else runtime.ensure()
            given = os.environ.get(VARIABLE, "")
            # what the master before (USR2) has handed on is its own
            if given and not (os.path.dirname(given) == parent and _NAME.fullmatch(os.path.basename(given))):
                self.path, self._ours = given, False
                return
            _clear(parent)
            path = os.path.join(parent, f"prometheus-{self._pid}")
            os.mkdir(path, 0o700)
            self._lock(path)
        except (PassengerError, OSError) as error:
            if _NAME.fullmatch(os.path.basename(os.environ.get(VARIABLE, ""))):
                del os.environ[VARIABLE]  # that of the master before
            self._said.append(errors.no_prometheus(error))
            return
        self.path, self._ours = path, True
        os.environ[VARIABLE] = path
        values = sys.modules.get("prometheus_client.values")
        if values is not None and not getattr(values.ValueClass, "_multiprocess", True):
            self._said.append(errors.prometheus_too_early())

    def _lock(self, path: str) -> None:
        """Hold it, with the workers, for whom a pid says nothing: other containers have their own."""
        self._held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def give(self, cfg: Any, log: Any) -> None:
        """The settings are known: give the directory to the workers' user, and say what went wrong."""
        while self._said:
            log.warning("gunicorn-passenger: %s", self._said.pop(0))
        given = os.environ.get(VARIABLE, "")
        if self._ours and given and given != self.path:  # gunicorn's ``raw_env``
            self.finish()
            self.path = given
        if not self._ours or os.geteuid() != 0:
            return
        try:
            for name in (self.path, *(entry.path for entry in os.scandir(self.path))):
                # files are those of a program that was preloaded
                os.chown(name, cfg.uid, cfg.gid, follow_symlinks=False)
        except OSError as error:
            log.warning("gunicorn-passenger: %s", errors.no_prometheus(error))

    def gone(self, pid: int) -> None:
        """A worker is gone: its gauges of live processes go, its counts stay (``mark_process_dead``)."""
        if not self.path or self._pid != os.getpid():
            return
        theirs = re.compile(rf"gauge_live[a-z]*_{pid}\.db")
        with suppress(OSError):
            for name in os.listdir(self.path):
                if theirs.fullmatch(name):
                    with suppress(OSError):
                        os.unlink(os.path.join(self.path, name))

    def finish(self) -> None:
        """gunicorn exits."""
        if self._ours and self._pid == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._held)
            self.path, self._ours, self._held = "", False, -1


def _clear(parent: str) -> None:
    """Remove what masters have left that were killed, and one that had this process's pid."""
    for name in os.listdir(parent):
        match = _NAME.fullmatch(name)
        if match and (int(match.group(1)) == os.getpid() or not runtime.lives(int(match.group(1)))):
            path = os.path.join(parent, name)
            if not _is_held(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_held(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


directory = Directory()
