"""Sets up and cleans the directory of ``prometheus_client``'s multiprocess mode, for a program's own metrics.

Process: the master. Never: import ``prometheus_client`` (it chooses its mode when the program imports it),
remove a directory that it has not made, or let another user than the workers' own read their counters.

Switched on with ``configure(prometheus=True)``. Each worker then keeps its counters in files of one
directory, ``prometheus-<pid of the master>``, and the process that serves ``/metrics`` adds them up. Only
the workers' user may enter the directory. A master that is root makes it beside the runtime directory, which
other users may not enter.

Where the master is root and the workers are not, the workers may put anything into their directory: links to
files of root's, or a name that the program would open in the master (``--preload``), where it runs as root.
So such a master

- changes the owner of the directory once, through its descriptor, while it is still empty;
- counts in a second directory of its own, ``prometheus.master-<pid>``, to whose files the workers get hard
  links: they can read them, but not change them;
- changes the workers' directory only with ``link`` and ``unlink`` relative to its descriptor, which neither
  follow a link nor change a file.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress

from gunicorn_passenger.config.gunicorn_types import Config, Log
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.serving import program_metrics
from gunicorn_passenger.serving.program_metrics import VARIABLE
from gunicorn_passenger.system import procfs, runtime_dir

#: What ``prometheus_client`` calls the gauges of live processes.
_LIVE_MODES = ("liveall", "livemax", "livemin", "livemostrecent", "livesum")
_NAME = re.compile(r"prometheus(?:\.master)?-([1-9][0-9]*)")


class MultiprocDir:
    """The directory of this master, if the setting is on."""

    def __init__(self) -> None:
        #: where the workers keep their counters; empty when the setting is off
        self.path = ""
        #: where a master counts that is root while its workers are not; otherwise the same path
        self._masters_path = ""
        #: whether this master has made it, and removes it
        self._ours = False
        self._pid = 0
        self._fd = -1
        self._masters_fd = -1
        #: whether the workers' user owns the directory
        self._owner_changed = False
        self._warnings: list[str] = []
        #: whether :meth:`_forked` is registered
        self._registered = False

    def prepare(self) -> None:
        """gunicorn has read its configuration, and may import the program next (``--preload``)."""
        try:
            wanted = settings.prometheus()
        except SettingError:
            return  # raised when all settings are checked
        if not wanted:
            self._switch_off()
        elif not self.path or self._pid != os.getpid():
            self._set_up()
        elif self._ours:
            os.environ[VARIABLE] = self._masters_path

    def _switch_off(self) -> None:
        """A reload has switched it off: running workers continue, and new ones count only for themselves."""
        if self._ours and os.environ.get(VARIABLE) == self._masters_path:
            del os.environ[VARIABLE]

    def _set_up(self) -> None:
        self._pid = os.getpid()
        try:
            parent = runtime_dir.ensure_world_traversable() if os.geteuid() == 0 else runtime_dir.ensure()
            given = os.environ.get(VARIABLE, "")
            # the previous master's directory (USR2) belongs to that master
            if given and not (os.path.dirname(given) == parent and _NAME.fullmatch(os.path.basename(given))):
                self.path, self._ours = given, False
                return
            _clear(parent)
            path = masters = os.path.join(parent, f"prometheus-{self._pid}")
            self._fd = _make(path)
            if os.geteuid() == 0:
                # the workers' user is not known yet
                masters = os.path.join(parent, f"prometheus.master-{self._pid}")
                self._masters_fd = _make(masters)
        except (PassengerError, OSError) as error:
            self._close()
            if _NAME.fullmatch(os.path.basename(os.environ.get(VARIABLE, ""))):
                del os.environ[VARIABLE]  # the previous master's
            self._warnings.append(_not_added_up(error))
            return
        self.path, self._masters_path, self._ours, self._owner_changed = path, masters, True, False
        os.environ[VARIABLE] = masters
        if not self._registered:
            self._registered = True
            os.register_at_fork(after_in_child=self._forked)
        values = sys.modules.get("prometheus_client.values")
        if values is not None and not getattr(values.ValueClass, "_multiprocess", True):
            self._warnings.append(
                "configure(prometheus=True): prometheus_client was imported in the master too early, so the "
                "workers' own counters are not added up; import it in the program, not in gunicorn.conf.py"
            )

    def _close(self) -> None:
        for fd in (self._fd, self._masters_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._masters_fd = -1

    def give_to_workers(self, cfg: Config, log: Log) -> None:
        """The settings are known: give the directory to the workers' user, and log the warnings."""
        while self._warnings:
            log.warning("gunicorn-passenger: %s", self._warnings.pop(0))
        given = os.environ.get(VARIABLE, "")
        if self._ours and given and given != self._masters_path:  # gunicorn's ``raw_env``
            self.finish()
            self.path = given
        if not self._ours or self._masters_fd < 0:
            return
        try:
            if not self._owner_changed:
                # it is empty, and only root could have entered it
                os.fchown(self._fd, cfg.uid, cfg.gid)
                self._owner_changed = True
            self._share(cfg)
        except OSError as error:
            log.warning("gunicorn-passenger: %s", _not_added_up(error))

    def _share(self, cfg: Config) -> None:
        """Let the workers read the counters of the master itself, where the program was preloaded.

        :raises OSError: when the disk is full.
        """
        for name in os.listdir(self._masters_fd):
            # only root can have made it: other users may not enter the master's own directory
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._masters_fd)
            try:
                os.fchown(fd, -1, cfg.gid)
                os.fchmod(fd, 0o640)
            finally:
                os.close(fd)
            # a file that a worker has put there under this name is replaced
            with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                os.unlink(name, dir_fd=self._fd)
            with suppress(FileExistsError):
                os.link(name, name, src_dir_fd=self._masters_fd, dst_dir_fd=self._fd, follow_symlinks=False)

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The master's environment, as a process of the workers' user gets it."""
        found = dict(environ)
        if self._ours and found.get(VARIABLE) == self._masters_path:
            found[VARIABLE] = self.path
        return found

    def on_worker_exit(self, pid: int) -> None:
        """A worker has exited: remove its live gauges and keep its counters (``mark_process_dead``)."""
        if not self.path or self._pid != os.getpid():
            return
        with suppress(OSError):
            where = (
                self._fd if self._ours else os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            )
            try:
                # by name: a list of the directory would be as long as its owner likes
                for mode in _LIVE_MODES:
                    with suppress(OSError):
                        os.unlink(f"gauge_{mode}_{pid}.db", dir_fd=where)
            finally:
                if not self._ours:
                    os.close(where)

    def sum_in_worker(self) -> None:
        """In a worker, before it loads the program."""
        if self.path and os.environ.get(VARIABLE):
            program_metrics.sum_when_imported()

    def _forked(self) -> None:
        """A child of the master counts in the workers' directory, and holds the lock of that one only."""
        if self._ours and os.environ.get(VARIABLE) == self._masters_path:
            os.environ[VARIABLE] = self.path
        if self._masters_fd >= 0:
            os.close(self._masters_fd)
            self._masters_fd = -1

    def finish(self) -> None:
        """gunicorn exits: remove the directories."""
        if self._ours and self._pid == os.getpid():
            for path in {self.path, self._masters_path}:
                _remove(path)
            self._close()
            self.path, self._masters_path, self._ours = "", "", False


def _make(path: str) -> int:
    """Make a directory and lock it (flock(2)): containers have their own pids, so a pid alone says nothing.

    :raises OSError: when that fails.
    """
    os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _remove(path: str) -> None:
    """Remove a directory with everything that workers have put into it.

    ``rmtree`` does not follow links and works with descriptors. A directory that is nested too deeply for it
    stays.
    """
    with suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)


def _clear(parent: str) -> None:
    """Remove the directories of masters that were killed, and of one that had this process's pid."""
    for name in os.listdir(parent):
        match = _NAME.fullmatch(name)
        if match and (int(match.group(1)) == os.getpid() or procfs.owner(int(match.group(1))) is None):
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


def _not_added_up(error: Exception) -> str:
    return f"configure(prometheus=True): the workers' own counters are not added up: {error}"


directory = MultiprocDir()
