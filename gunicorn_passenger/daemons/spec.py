"""What a daemon is: its specification, checked; and who has asked for which in the master.

Runs in: the master, a worker, plain Python. Must never: open a port or start a process.
"""

from __future__ import annotations

import dataclasses
import grp
import json
import math
import os
import pwd
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from gunicorn_passenger import errors
from gunicorn_passenger.config import address, listen_errors
from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.daemons import daemon_errors

#: How many sockets one daemon may listen on, and how many daemons an application may have.
MAX_SOCKETS = 16
MAX_DAEMONS = 64
MAX_NAME = 100
#: Seconds that a daemon may have to end.
MAX_STOP_TIMEOUT = 3600.0
#: Characters of a spec as JSON, where a worker sends it.
MAX_MESSAGE = 4096

ON_RELOAD = ("keep", "restart")

#: Runs a Python function in an interpreter of its own.
_CALLING = os.path.join(os.path.dirname(os.path.abspath(__file__)), "function_runner.py")


@dataclass(frozen=True)
class DaemonListen:
    """One socket that a daemon is to be given; hosts are numeric."""

    #: ``"tcp"``, ``"auto"`` or ``"unix"``
    kind: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        return "auto" if self.kind == "auto" else address.format_tcp(self.host, self.port)


@dataclass(frozen=True)
class DaemonSpec:
    """All that is asked for. Two specs that are equal are the same daemon."""

    name: str
    command: tuple[str, ...]
    #: the command as people are to read it
    shown: str
    listen: tuple[DaemonListen, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"
    #: a name or a number; empty for the workers' own
    user: str = ""
    group: str = ""
    on_reload: str = "keep"
    stop_timeout: float = 10.0
    give_up_after: int = 10
    #: the ports that the program allows itself; empty for all that are allocated
    within: str = ""
    #: whether it may ask the master for reports
    report: bool = False

    def pack(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def unpack(cls, text: str) -> DaemonSpec:
        """A spec that a worker has sent.

        :raises errors.SettingError: when it is none.
        """
        try:
            fields = json.loads(text)
            listen = tuple(DaemonListen(**item) for item in fields.pop("listen"))
            env = tuple((name, value) for name, value in fields.pop("env"))
            spec = cls(listen=listen, env=env, command=tuple(fields.pop("command")), **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise errors.SettingError("the worker sent a daemon that is none") from None
        _check(spec)
        return spec

    def find_command(self, path: str | None) -> None:
        """Is there such a command, for whoever asks?

        :param path: the daemon's ``PATH``.
        :raises errors.DaemonError: names the command and what is wrong with it.
        """
        command = self.command[0]
        if os.sep in command:
            # as the daemon will see it
            command = os.path.join(self.cwd, command)
        if shutil.which(command, path=path) is None:
            raise daemon_errors.no_command(
                self.name, self.command[0], os.path.exists(command) and os.sep in command
            )


def _check(spec: DaemonSpec) -> None:
    """What holds for every spec, wherever it comes from.

    :raises errors.SettingError: names the field.
    """
    for field, kind in (
        ("name", str), ("shown", str), ("cwd", str), ("user", str), ("group", str), ("on_reload", str),
        ("within", str), ("report", bool), ("give_up_after", int),
    ):  # fmt: skip
        if type(getattr(spec, field)) is not kind:
            raise daemon_errors.bad_daemon(field, getattr(spec, field), f"it is no {kind.__name__}")
    name = spec.name
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable() or ":" in name:
        raise daemon_errors.bad_daemon(
            "name", name, f"it is 1 to {MAX_NAME} printable characters and no colon"
        )
    texts = [*spec.command, *(text for pair in spec.env for text in pair), spec.cwd]
    if not spec.command or not all(isinstance(text, str) for text in texts) or not spec.command[0]:
        raise daemon_errors.bad_daemon("target", spec.command, "a command is a string or a list of strings")
    if any("\0" in text for text in texts):
        raise daemon_errors.bad_daemon(
            "target", name, "a command, its directory and its environment have no NUL in them"
        )
    if any(not variable or "=" in variable for variable, _ in spec.env):
        raise daemon_errors.bad_daemon(
            "env", dict(spec.env), "a variable's name is not empty and has no = in it"
        )
    if not os.path.isabs(spec.cwd):
        raise daemon_errors.bad_daemon("cwd", spec.cwd, "it is no absolute path")
    if spec.on_reload not in ON_RELOAD:
        raise daemon_errors.bad_daemon("on_reload", spec.on_reload, "it is 'keep' or 'restart'")
    timeout = spec.stop_timeout
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or math.isnan(timeout):
        raise daemon_errors.bad_daemon("stop_timeout", timeout, "it is no number of seconds")
    if not 0 <= timeout <= MAX_STOP_TIMEOUT:
        raise daemon_errors.bad_daemon(
            "stop_timeout", timeout, f"it is not from 0 to {MAX_STOP_TIMEOUT:g} seconds"
        )
    if not 0 <= spec.give_up_after <= 1_000_000:
        raise daemon_errors.bad_daemon(
            "give_up_after", spec.give_up_after, "it is a number of deaths, or 0 for never"
        )
    if len(spec.listen) > MAX_SOCKETS:
        raise daemon_errors.bad_daemon(
            "listen", len(spec.listen), f"a daemon has at most {MAX_SOCKETS} sockets"
        )
    for item in spec.listen:
        _check_listen(item)


def _check_listen(item: DaemonListen) -> None:
    if (
        not all(isinstance(text, str) for text in (item.kind, item.host, item.path))
        or type(item.port) is not int
    ):
        raise daemon_errors.bad_daemon("listen", item, "it is no address")
    if item.kind in ("tcp", "auto") and not _is_numeric(item.host):
        # the master must not wait for a name server
        raise daemon_errors.bad_daemon("listen", item.host[:100], "it is no numeric address")
    if item.kind == "tcp" and not 1 <= item.port <= 65535:
        raise listen_errors.bad_port(item.port)
    if item.kind == "unix" and (not os.path.isabs(item.path) or "\0" in item.path):
        raise daemon_errors.bad_daemon(
            "listen", item.path[:100], "the path of the UNIX socket is not absolute"
        )
    if item.kind not in ("tcp", "auto", "unix"):
        raise daemon_errors.bad_daemon("listen", item.kind[:40], "it is an unknown kind of address")


def _is_numeric(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return True
    return False


# --- making one ------------------------------------------------------------------------------------


def build_spec(
    target: object,
    name: object,
    listen: object,
    args: object,
    env: object,
    cwd: object,
    user: object,
    group: object,
    on_reload: object,
    stop_timeout: object,
    give_up_after: object,
    within: str,
    report: bool,
) -> DaemonSpec:
    """The spec of what ``spawn()`` was given.

    :raises errors.SettingError: names the parameter that cannot be used.
    :raises errors.ListenError: for an address that is none.
    """
    if env is not None and not (
        isinstance(env, Mapping) and all(isinstance(text, str) for pair in env.items() for text in pair)
    ):
        raise daemon_errors.bad_daemon("env", env, "it maps names to strings")
    variables = dict(env or {})
    if not isinstance(args, list | tuple):
        raise daemon_errors.bad_daemon("args", args, "it is a list or a tuple")
    if callable(target):
        called, default = _call(target, args)
        command: tuple[str, ...] = (sys.executable, _CALLING, f"{called['module']}:{called['name']}")
        shown = f"{called['module']}.{called['name']}({', '.join(repr(arg) for arg in args)})"
        variables["PASSENGER_CALL"] = json.dumps(called, separators=(",", ":"))
    else:
        command = (*_command(target), *_texts(args))
        shown = shlex.join(command)
        default = os.path.basename(command[0])
    spec = DaemonSpec(
        name=str(default)[:MAX_NAME] if name is None else name,  # type: ignore[arg-type]
        command=command,
        shown=shown[:200],
        listen=tuple(_listen(listen)),
        env=tuple(sorted(variables.items())),
        cwd=os.path.abspath(_path(cwd)),
        user=_account("user", user),
        group=_account("group", group),
        on_reload=on_reload,  # type: ignore[arg-type]
        stop_timeout=stop_timeout,  # type: ignore[arg-type]
        give_up_after=give_up_after,  # type: ignore[arg-type]
        within=within,
        report=report,
    )
    _check(spec)
    return spec


def _command(target: object) -> list[str]:
    if isinstance(target, str):
        try:
            words = shlex.split(target)
        except ValueError as error:
            raise daemon_errors.bad_daemon("target", target, str(error).lower()) from None
    elif isinstance(target, list | tuple):
        words = _texts(target)
    else:
        raise daemon_errors.bad_daemon(
            "target", target, "it is a command line, a list of strings or a function"
        )
    if not words:
        raise daemon_errors.bad_daemon("target", target, "the command is empty")
    return words


def _texts(values: Iterable[object]) -> list[str]:
    texts = []
    for value in values:
        if not isinstance(value, str | os.PathLike | int) or isinstance(value, bool):
            raise daemon_errors.bad_daemon("args", value, "a command takes strings, numbers and paths")
        texts.append(str(value) if isinstance(value, int) else os.fsdecode(value))
    return texts


def _call(target: Any, args: list[object] | tuple[object, ...]) -> tuple[dict[str, Any], str]:
    """How a fresh interpreter finds a function; and its name."""
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise daemon_errors.not_importable(repr(target), "it has no name")
    if "<" in name:
        what = "it is a lambda" if name.endswith("<lambda>") else "it is defined inside another function"
        raise daemon_errors.not_importable(name, what)
    if getattr(target, "__self__", None) is not None:
        raise daemon_errors.not_importable(
            name, "it is a method of an object, which exists in this process only"
        )
    file = ""
    if module in ("__main__", "__config__"):
        owner = getattr(target, "__globals__", None) or vars(sys.modules[module])
        file = owner.get("__file__") or ""
        if not file:
            raise daemon_errors.not_importable(name, "its module is no file")
        # a script's own last line must not run again
        module = "__passenger_main__" if module == "__main__" else module
    try:
        json.dumps(args, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise daemon_errors.bad_daemon(
            "args", args, "a function takes what JSON can carry: texts, numbers, lists"
        ) from None
    path = [] if file == "" else [os.path.dirname(os.path.abspath(file))]
    call = {"module": module, "file": file and os.path.abspath(file), "name": name, "args": list(args)}
    return {**call, "path": list(dict.fromkeys(path + _own_path()))}, name.rpartition(".")[2]


def _own_path() -> list[str]:
    """What this process has in ``sys.path`` and a fresh interpreter would not."""
    given = {os.path.abspath(item) for item in os.environ.get("PYTHONPATH", "").split(os.pathsep) if item}
    system = tuple({os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
    scripts = os.path.dirname(os.path.abspath(sys.argv[0])) if sys.argv and sys.argv[0] else ""
    own = [os.path.abspath(item) for item in sys.path]
    return [p for p in own if p not in given and p != scripts and not p.startswith(system)]


def _listen(value: object) -> list[DaemonListen]:
    if value is None:
        return []
    # (host, port) is one address, as for Server.listen; a list is several
    items = value if isinstance(value, list) else [value]
    return [_one(item) for item in items]


def _one(item: object) -> DaemonListen:
    want = address.parse(item)
    if isinstance(want, address.Primary):
        raise daemon_errors.bad_daemon("listen", item, "the primary socket is the workers'")
    if isinstance(want, address.Unix):
        return DaemonListen("unix", path=want.path)
    if isinstance(want, address.Auto):
        return DaemonListen("auto", address.resolve(want.host, 0)[1])
    return DaemonListen("tcp", address.resolve(want.host, want.port)[1], want.port)


def _path(cwd: object) -> str:
    if cwd is None:
        return os.getcwd()
    if not isinstance(cwd, str | os.PathLike):
        raise daemon_errors.bad_daemon("cwd", cwd, "it is no path")
    return os.fsdecode(cwd)


def _account(field: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise daemon_errors.bad_daemon(field, value, "it is a name or a number")
    return str(value)


# --- as whom it runs -------------------------------------------------------------------------------


class RunAs(NamedTuple):
    """As whom a daemon runs."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @property
    def changes(self) -> bool:
        """Whether that is somebody else than this process."""
        return (self.uid, self.gid) != (os.geteuid(), os.getegid())

    @property
    def user(self) -> str:
        return account_name(self.uid)

    def environment(self) -> dict[str, str]:
        """What tells a program who it is."""
        try:
            entry = pwd.getpwuid(self.uid)
        except KeyError:
            return {"HOME": "/"}
        return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}


def resolve_run_as(spec: DaemonSpec, uid: int, gid: int, initgroups: bool, trusted: bool) -> RunAs:
    """As whom a daemon is to run.

    :param uid: the workers' user, ``gid`` their group.
    :param initgroups: whether workers have all the groups of their user.
    :param trusted: whether the operator asks, who may name any user that this process may become.
    :raises errors.DaemonError: when there is no such user, or it may not run as that one.
    """
    user, primary = _user(spec, uid)
    group = _group(spec, gid if user == uid or primary is None else primary)
    if not trusted and (user, group) != (uid, gid):
        raise daemon_errors.other_user(spec.name, spec.user or spec.group, account_name(uid))
    if (user, group) != (os.geteuid(), os.getegid()) and os.geteuid() != 0:
        raise daemon_errors.cannot_switch_user(spec.name, account_name(user), account_name(os.geteuid()))
    groups: tuple[int, ...] = (group,)
    if initgroups or (spec.user and trusted):
        groups = tuple(os.getgrouplist(account_name(user), group))
    return RunAs(user, group, groups)


def _user(spec: DaemonSpec, uid: int) -> tuple[int, int | None]:
    """The user's number, and its own group where the system knows one."""
    if not spec.user:
        return uid, None
    try:
        entry = pwd.getpwuid(int(spec.user)) if spec.user.isdecimal() else pwd.getpwnam(spec.user)
    except (KeyError, OverflowError):
        if not spec.user.isdecimal() or int(spec.user) >= 1 << 32:
            raise daemon_errors.no_account(spec.name, "user", spec.user) from None
        return int(spec.user), None
    return entry.pw_uid, entry.pw_gid


def _group(spec: DaemonSpec, gid: int) -> int:
    if not spec.group:
        return gid
    if spec.group.isdecimal() and int(spec.group) < 1 << 32:
        return int(spec.group)
    try:
        return grp.getgrnam(spec.group).gr_gid
    except KeyError:
        raise daemon_errors.no_account(spec.name, "group", spec.group) from None


# --- what the master's own code has asked for ------------------------------------------------------


class RequestedDaemons:
    """Daemons asked for in the master: in gunicorn.conf.py, in its hooks, or by a preloaded program."""

    def __init__(self) -> None:
        self._reading: list[DaemonSpec] = []
        self._read: list[DaemonSpec] = []
        self._lasting: list[tuple[DaemonSpec, bool]] = []
        self._module: object = None
        self._reading_module: object = None
        #: whether a master looks after them
        self.attended = False

    def note_read(self, spec: DaemonSpec) -> None:
        """gunicorn reads its configuration, now or at every reload.

        :raises errors.DaemonError: for a name that is used twice.
        """
        module = sys.modules.get("__config__")
        if module is not self._reading_module:
            self._reading, self._reading_module = [], module
        if any(other.name == spec.name for other in self._reading):
            raise daemon_errors.duplicate_daemon_name(spec.name)
        self._reading.append(spec)

    def note_lasting(self, spec: DaemonSpec, trusted: bool) -> None:
        """A hook of gunicorn's or a preloaded program, which do not ask again at a reload.

        :param trusted: whether it is the operator who asks.
        :raises errors.DaemonError: for a name that is used twice.
        """
        if (spec, trusted) in self._lasting:
            return  # a hook that gunicorn calls more than once
        known = [*self._read, *self._reading, *(other for other, _ in self._lasting)]
        if any(other.name == spec.name for other in known):
            raise daemon_errors.duplicate_daemon_name(spec.name)
        self._lasting.append((spec, trusted))

    def done_reading(self) -> None:
        """gunicorn has read its configuration."""
        module = sys.modules.get("__config__")
        # one that is given as python:module is imported once: what it has asked for stays
        if self._reading or module is not self._module:
            self._read, self._reading = self._reading, []
        self._module = module

    @property
    def unread(self) -> bool:
        """Whether anything was asked for."""
        return bool(self._reading or self._read or self._lasting)

    def all(self) -> list[tuple[DaemonSpec, bool]]:
        """Each spec, and whether it is the operator's."""
        return [*((spec, True) for spec in self._read), *self._lasting]


wishes = RequestedDaemons()
