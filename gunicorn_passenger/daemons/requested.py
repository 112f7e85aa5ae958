"""The daemons that the master's own code requested: gunicorn.conf.py, its hooks, or a preloaded program.

Process: the master. Never: start a daemon; the manager does.
"""

from __future__ import annotations

import sys

from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.spec import DaemonSpec, check_after


class RequestedDaemons:
    """What ``spawn()`` was called with in the master, since its start or the last reload."""

    def __init__(self) -> None:
        self._reading: list[DaemonSpec] = []
        self._from_config: list[DaemonSpec] = []
        self._persistent: list[tuple[DaemonSpec, bool]] = []
        self._config_module: object = None
        self._reading_module: object = None
        #: whether this package's hooks start them
        self.handled = False

    def add_from_config(self, spec: DaemonSpec) -> None:
        """gunicorn is reading its configuration, which requests its daemons again at every reload.

        :raises errors.DaemonError: for a name that is used twice.
        :raises errors.SettingError: when ``after`` names an unknown daemon.
        """
        module = sys.modules.get("__config__")
        if module is not self._reading_module:
            self._reading, self._reading_module = [], module
        _check_names(spec, self._reading)
        self._reading.append(spec)

    def add_persistent(self, spec: DaemonSpec, trusted: bool) -> None:
        """A hook of gunicorn's or a preloaded program, which do not request it again at a reload.

        :param trusted: whether the operator requests it, and not the program.
        :raises errors.DaemonError: for a name that is used twice.
        :raises errors.SettingError: when ``after`` names an unknown daemon.
        """
        if (spec, trusted) in self._persistent:
            return  # a hook that gunicorn calls more than once
        known = [*self._from_config, *self._reading, *(other for other, _ in self._persistent)]
        _check_names(spec, known)
        self._persistent.append((spec, trusted))

    def commit_config(self) -> None:
        """gunicorn has read its configuration."""
        module = sys.modules.get("__config__")
        # a configuration given as python:module is imported once: then its daemons stay
        if self._reading or module is not self._config_module:
            self._from_config, self._reading = self._reading, []
        self._config_module = module

    def discard_config(self) -> None:
        """gunicorn cannot use the configuration that it has just read: the previous daemons stay."""
        self._reading, self._config_module = [], sys.modules.get("__config__")

    @property
    def pending(self) -> bool:
        """Whether any daemon was requested."""
        return bool(self._reading or self._from_config or self._persistent)

    def all(self) -> list[tuple[DaemonSpec, bool]]:
        """Each spec, and whether the operator requested it."""
        return [*((spec, True) for spec in self._from_config), *self._persistent]


def _check_names(spec: DaemonSpec, known: list[DaemonSpec]) -> None:
    names = [other.name for other in known]
    if spec.name in names:
        raise daemon_errors.duplicate_daemon_name(spec.name)
    check_after(spec, names)


requested_daemons = RequestedDaemons()
