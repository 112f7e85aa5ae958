"""What a master passes to the new one when ``USR2`` upgrades gunicorn: a JSON object, in sections by service.

Process: the master, at its start; and the child of the master that is about to become the new master.
Never: put anything into the environment that grows with the requests of workers.

The object lies in a file in memory (memfd_create(2)) that the new master inherits; the environment has the
number of its descriptor. The environment alone is too small: with many servers, or long names,
``execve`` fails with E2BIG, and gunicorn would have no new master.

The sections: ``"ports"`` (:mod:`.listeners`), ``"exclusive"`` (:mod:`.upgrade_lock`) and ``"daemons"``
(``daemons/manager.py``).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from gunicorn_passenger.config.gunicorn_types import Config

#: Names the descriptor of the file.
VARIABLE = "PASSENGER_UPGRADE"

_NAME = "gunicorn-passenger-upgrade"
#: Raised when a section changes its meaning: what another version has written is not read.
_VERSION = 1
#: Bytes of the file; a thousand ports with the longest names have 3 MB.
_MAX = 64 << 20

_state: list[dict[str, Any]] = []


def inherited(environ: MutableMapping[str, str] = os.environ) -> dict[str, Any]:
    """The state of the previous master; empty at a first start. The environment is read once."""
    if not _state:
        _state.append(_read(environ.pop(VARIABLE, "")))
    return _state[0]


def forget(cfg: Config) -> None:
    """Take the variable out of what gunicorn keeps as the original environment, for the programs after this
    one."""
    cfg.env_orig.pop(VARIABLE, None)


def _read(number: str) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            return {}
        # a variable that the user has set must not close a descriptor of another part of the program
        if not os.readlink(f"/proc/self/fd/{number}").startswith(f"/memfd:{_NAME}"):
            return {}
        with os.fdopen(int(number), "rb") as file:
            file.seek(0)
            state = json.loads(file.read(_MAX))
        if isinstance(state, dict) and state.pop("version", None) == _VERSION:
            return state
    return {}


def export(environ: MutableMapping[str, str], lowest: int, state: dict[str, Any]) -> None:
    """In the child that becomes the new master: leave it a file with the state, and its number.

    :param environ: what the new master is started with.
    :param lowest: the lowest number that the descriptor may have.
    :param state: the sections.
    :raises OSError: when the system has no room for the file.
    """
    fd = os.memfd_create(_NAME)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(json.dumps({"version": _VERSION, **state}, separators=(",", ":")).encode())
        environ[VARIABLE] = str(inheritable(fd, lowest))
    finally:
        os.close(fd)


def inheritable(fd: int, lowest: int) -> int:
    """A copy of a descriptor that the new master inherits.

    :param lowest: the lowest number that it may have.
    :raises OSError: when this process has no room for it.
    """
    return fcntl.fcntl(fd, fcntl.F_DUPFD, lowest)
