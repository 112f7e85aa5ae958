"""``prometheus_client``'s multiprocess mode, set up and cleaned for a program that counts in several workers.

Runs in: the master. Must never: import ``prometheus_client`` (it decides at its import, and the program is to
import it), remove what it has not made, or let anybody but the workers' user at what they count.

Asked for with ``configure(prometheus=True)``. Each worker then keeps its counts in files of one directory,
``prometheus-<pid of the master>``, and whoever answers ``/metrics`` adds them up. The directory belongs to
the workers' user alone. A master that is root makes it beside the runtime directory, which lets no other
user through.

Where the master is root and the workers are not, the workers may put anything into their directory: links to
files of root's, or a name that the program would open in the master (``--preload``), where it runs as root.
So such a master

- gives the directory away once, through its descriptor, while it is still empty;
- counts in a second directory of its own, ``prometheus.master-<pid>``, whose files the workers get as hard
links:
  they can read them and not change them;
- touches what is in the workers' directory by ``link`` and ``unlink`` relative to its descriptor alone, which
follow
  no link and change no file.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.system import runtime_dir

#: Where ``prometheus_client`` looks.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

#: What ``prometheus_client`` calls the gauges of live processes.
_LIVE_MODES = ("liveall", "livemax", "livemin", "livemostrecent", "livesum")
_NAME = re.compile(r"prometheus(?:\.master)?-([1-9][0-9]*)")


class MultiprocDir:
    """The directory of this master, if one was asked for."""

    def __init__(self) -> None:
        #: where the workers count; empty when they do not
        self.path = ""
        #: where a master counts that is root, when the workers are not; else the same
        self._masters = ""
        #: whether it is ours to own and to remove
        self._ours = False
        self._pid = 0
        self._held = -1
        self._held_masters = -1
        #: whether the workers' user has the directory, and all that is in it
        self._given = False
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
            os.environ[VARIABLE] = self._masters

    def _let_go(self) -> None:
        """A reload has switched it off: workers that are there go on, the next ones count for themselves."""
        if self._ours and os.environ.get(VARIABLE) == self._masters:
            del os.environ[VARIABLE]

    def _begin(self) -> None:
        self._pid = os.getpid()
        try:
            parent = runtime_dir.ensure_world_traversable() if os.geteuid() == 0 else runtime_dir.ensure()
            given = os.environ.get(VARIABLE, "")
            # what the master before (USR2) has handed on is its own
            if given and not (os.path.dirname(given) == parent and _NAME.fullmatch(os.path.basename(given))):
                self.path, self._ours = given, False
                return
            _clear(parent)
            path = masters = os.path.join(parent, f"prometheus-{self._pid}")
            self._held = _make(path)
            if os.geteuid() == 0:
                # as whom the workers run is not known yet
                masters = os.path.join(parent, f"prometheus.master-{self._pid}")
                self._held_masters = _make(masters)
        except (PassengerError, OSError) as error:
            self._close()
            if _NAME.fullmatch(os.path.basename(os.environ.get(VARIABLE, ""))):
                del os.environ[VARIABLE]  # that of the master before
            self._said.append(errors.no_prometheus(error))
            return
        self.path, self._masters, self._ours, self._given = path, masters, True, False
        os.environ[VARIABLE] = masters
        if not _hooked:
            _hooked.append(True)
            os.register_at_fork(after_in_child=_in_child)
        values = sys.modules.get("prometheus_client.values")
        if values is not None and not getattr(values.ValueClass, "_multiprocess", True):
            self._said.append(errors.prometheus_too_early())

    def _close(self) -> None:
        for fd in (self._held, self._held_masters):
            if fd >= 0:
                os.close(fd)
        self._held = self._held_masters = -1

    def give(self, cfg: Any, log: Any) -> None:
        """The settings are known: give the directory to the workers' user, and say what went wrong."""
        while self._said:
            log.warning("gunicorn-passenger: %s", self._said.pop(0))
        given = os.environ.get(VARIABLE, "")
        if self._ours and given and given != self._masters:  # gunicorn's ``raw_env``
            self.finish()
            self.path = given
        if not self._ours or self._held_masters < 0:
            return
        try:
            if not self._given:
                # it is empty, and nobody but root could have reached it
                os.fchown(self._held, cfg.uid, cfg.gid)
                self._given = True
            self._share(cfg)
        except OSError as error:
            log.warning("gunicorn-passenger: %s", errors.no_prometheus(error))

    def _share(self, cfg: Any) -> None:
        """Let the workers read what the master itself counts: a program that was preloaded.

        :raises OSError: when the system has no room.
        """
        for name in os.listdir(self._held_masters):
            # nobody but root can have made it: the master's own directory lets nobody in
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._held_masters)
            try:
                os.fchown(fd, -1, cfg.gid)
                os.fchmod(fd, 0o640)
            finally:
                os.close(fd)
            # whatever a worker has put there under this name is the workers' own to lose
            with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                os.unlink(name, dir_fd=self._held)
            with suppress(FileExistsError):
                os.link(
                    name, name, src_dir_fd=self._held_masters, dst_dir_fd=self._held, follow_symlinks=False
                )

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What a process of the workers' user is given in place of the master's own environment."""
        found = dict(environ)
        if self._ours and found.get(VARIABLE) == self._masters:
            found[VARIABLE] = self.path
        return found

    def gone(self, pid: int) -> None:
        """A worker is gone: its gauges of live processes go, its counts stay (``mark_process_dead``)."""
        if not self.path or self._pid != os.getpid():
            return
        with suppress(OSError):
            where = (
                self._held if self._ours else os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            )
            try:
                # by name: a list of the directory would be as long as its owner likes
                for mode in _LIVE_MODES:
                    with suppress(OSError):
                        os.unlink(f"gauge_{mode}_{pid}.db", dir_fd=where)
            finally:
                if not self._ours:
                    os.close(where)

    def finish(self) -> None:
        """gunicorn exits."""
        if self._ours and self._pid == os.getpid():
            for path in {self.path, self._masters}:
                _remove(path)
            self._close()
            self.path, self._masters, self._ours = "", "", False


_hooked: list[bool] = []


def _in_child() -> None:
    """A child of the master counts where the workers do; it holds their directory (flock(2)), not the
    master's."""
    if directory._ours and os.environ.get(VARIABLE) == directory._masters:
        os.environ[VARIABLE] = directory.path
    if directory._held_masters >= 0:
        os.close(directory._held_masters)
        directory._held_masters = -1


def _make(path: str) -> int:
    """Make a directory, and hold it with the workers, for whom a pid says nothing: containers have their own.

    :raises OSError: when it cannot be.
    """
    os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _remove(path: str) -> None:
    """Remove a directory with all that workers have put into it.

    ``rmtree`` follows no link and goes from descriptor to descriptor; one that is nested too deeply for it
    stays.
    """
    with suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)


def _clear(parent: str) -> None:
    """Remove what masters have left that were killed, and one that had this process's pid."""
    for name in os.listdir(parent):
        match = _NAME.fullmatch(name)
        if match and (int(match.group(1)) == os.getpid() or not runtime_dir.pid_exists(int(match.group(1)))):
            path = os.path.join(parent, name)
            if not _is_held(path):
                _remove(path)


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


directory = MultiprocDir()
