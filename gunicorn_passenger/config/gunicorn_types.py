"""The types of gunicorn's objects, as far as the package uses them. gunicorn itself carries no annotations.

Process: every process. Never: import gunicorn, or have code of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

from gunicorn_passenger.config.address import SockAddr


class Log(Protocol):
    """gunicorn's logger."""

    def debug(self, msg: str, *args: object) -> None: ...
    def info(self, msg: str, *args: object) -> None: ...
    def warning(self, msg: str, *args: object) -> None: ...
    def error(self, msg: str, *args: object, exc_info: Any = None) -> None: ...
    def exception(self, msg: str, *args: object, exc_info: Any = True) -> None: ...


class Listener(Protocol):
    """A listener in the arbiter's ``LISTENERS``: an object of one of the classes in ``gunicorn.sock``."""

    FAMILY: int
    #: ``None`` when it is closed
    sock: socket.socket | None

    def close(self) -> None: ...
    def fileno(self) -> int: ...
    def getsockname(self) -> SockAddr | str: ...


class Config(Protocol):
    """gunicorn's configuration."""

    address: list[SockAddr | str]
    backlog: int
    chdir: str
    env_orig: MutableMapping[str, str]
    gid: int
    initgroups: bool
    proc_name: str
    reload: bool
    #: gunicorn's ``Setting`` objects by name
    settings: Mapping[str, Any]
    uid: int
    umask: int

    def set(self, name: str, value: object) -> None: ...


class ArbiterWorker(Protocol):
    """A worker object, as the arbiter has it."""

    age: int


class Arbiter(Protocol):
    """The arbiter."""

    LISTENERS: list[Listener]
    #: by pid
    WORKERS: dict[int, ArbiterWorker]
    cfg: Config
    #: the pid of the previous master; 0 for none
    master_pid: int
    num_workers: int
    proc_name: str
    #: the pid of the next master; 0 for none
    reexec_pid: int
    #: whether systemd has passed the listeners
    systemd: bool

    def wakeup(self) -> None: ...
