"""The specification of a daemon: made of the arguments of ``spawn()``, checked, sent from worker to master.

Process: the master, a worker, plain Python. Never: open a port or start a process.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import address, listen_errors
from gunicorn_passenger.config.record import Record
from gunicorn_passenger.daemons import daemon_errors

#: Limits: sockets of a daemon, daemons of an application, characters of a name.
MAX_SOCKETS = 16
MAX_DAEMONS = 64
MAX_NAME = 100
#: The longest ``stop_timeout``, in seconds.
MAX_STOP_TIMEOUT = 3600.0
#: Characters of a spec in JSON that a worker sends.
MAX_MESSAGE = 4096

ON_RELOAD = ("keep", "restart")
KILL_MODES = ("mixed", "group")

#: A word of a command line that only a shell understands: an operator, a redirection, a variable, "a;". Not
#: one with quotes, which may be a text, or the script in ``sh -c "exec $COMMAND"``.
_SHELL_WORD = re.compile(r"""&&?|\|\|?|\d*[<>].*|[^'"]*;|[^'"]*(\$[A-Za-z_({]|`)[^'"]*""")

#: Runs a Python function in a separate interpreter.
_FUNCTION_RUNNER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "function_runner.py")


class DaemonListen(Record):
    """A socket that a daemon listens on; its host is numeric."""

    #: ``"tcp"``, ``"auto"`` or ``"unix"``
    kind: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        return "auto" if self.kind == "auto" else address.format_tcp(self.host, self.port)


class DaemonSpec(Record):
    """Everything that ``spawn()`` requests. Equal specs are the same daemon."""

    name: str
    command: tuple[str, ...]
    #: the command as ``status`` shows it
    shown: str
    listen: tuple[DaemonListen, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"
    #: a name or a number; empty for the workers' own user
    user: str = ""
    group: str = ""
    on_reload: str = "keep"
    stop_timeout: float = 10.0
    give_up_after: int = 10
    #: which processes get SIGTERM: the first one ("mixed") or all ("group")
    kill_mode: str = "mixed"
    #: the daemons that are stopped only after this one; ``None`` for all that were spawned before it
    after: tuple[str, ...] | None = None
    #: the ports that the program limits itself to; empty for all allocated ports
    within: str = ""
    #: whether the daemon may ask the master for reports
    report: bool = False

    def pack(self) -> str:
        values = {**vars(self), "listen": [vars(wanted) for wanted in self.listen]}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def unpack(cls, text: str) -> DaemonSpec:
        """The spec that a worker has sent.

        :raises errors.SettingError: when it is malformed.
        """
        try:
            values = json.loads(text)
            listen = tuple(DaemonListen(**item) for item in values.pop("listen"))
            env = tuple((name, value) for name, value in values.pop("env"))
            after = values.pop("after")
            after = None if after is None else tuple(after)
            spec = cls(listen=listen, env=env, command=tuple(values.pop("command")), after=after, **values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise errors.SettingError(
                "the worker sent a malformed daemon specification (different versions?)"
            ) from None
        _check(spec)
        return spec

    def find_command(self, path: str | None) -> None:
        """Check that the command exists and this process may run it.

        :param path: the daemon's ``PATH``.
        :raises errors.DaemonError: names the command and what is wrong with it.
        """
        command = self.command[0]
        if os.sep in command:
            # relative to the daemon's directory
            command = os.path.join(self.cwd, command)
        if shutil.which(command, path=path) is None:
            raise daemon_errors.no_command(
                self.name, self.command[0], os.path.exists(command) and os.sep in command
            )


def _check(spec: DaemonSpec) -> None:
    """Check a spec, also one that a worker has sent.

    :raises errors.SettingError: names the parameter.
    """
    for parameter, kind in (
        ("name", str), ("shown", str), ("cwd", str), ("user", str), ("group", str), ("on_reload", str),
        ("within", str), ("report", bool), ("give_up_after", int), ("kill_mode", str),
    ):  # fmt: skip
        if type(getattr(spec, parameter)) is not kind:
            raise daemon_errors.bad_daemon(
                parameter, getattr(spec, parameter), f"it is not a {kind.__name__}"
            )
    name = spec.name
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable() or ":" in name:
        raise daemon_errors.bad_daemon(
            "name", name, f"a name has 1 to {MAX_NAME} printable characters without a colon"
        )
    texts = [*spec.command, *(text for pair in spec.env for text in pair), spec.cwd]
    if not spec.command or not all(isinstance(text, str) for text in texts) or not spec.command[0]:
        raise daemon_errors.bad_daemon("target", spec.command, "a command is a string or a list of strings")
    if any("\0" in text for text in texts):
        raise daemon_errors.bad_daemon(
            "target", name, "the command, its directory or its environment contains a NUL"
        )
    if any(not variable or "=" in variable for variable, _ in spec.env):
        raise daemon_errors.bad_daemon("env", dict(spec.env), "the name of a variable is empty or contains =")
    if not os.path.isabs(spec.cwd):
        raise daemon_errors.bad_daemon("cwd", spec.cwd, "it is not an absolute path")
    if spec.on_reload not in ON_RELOAD:
        raise daemon_errors.bad_daemon("on_reload", spec.on_reload, "use 'keep' or 'restart'")
    if spec.kill_mode not in KILL_MODES:
        raise daemon_errors.bad_daemon("kill_mode", spec.kill_mode, "use 'mixed' or 'group'")
    if not all(isinstance(after, str) for after in spec.after or ()):
        raise daemon_errors.bad_daemon("after", spec.after, "use a list of daemons' names")
    timeout = spec.stop_timeout
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or math.isnan(timeout):
        raise daemon_errors.bad_daemon("stop_timeout", timeout, "it is not a number of seconds")
    if not 0 <= timeout <= MAX_STOP_TIMEOUT:
        raise daemon_errors.bad_daemon("stop_timeout", timeout, f"use 0 to {MAX_STOP_TIMEOUT:g} seconds")
    if not 0 <= spec.give_up_after <= 1_000_000:
        raise daemon_errors.bad_daemon(
            "give_up_after", spec.give_up_after, "use a number of exits in a row, or 0 for no limit"
        )
    if len(spec.listen) > MAX_SOCKETS:
        raise daemon_errors.bad_daemon(
            "listen", len(spec.listen), f"a daemon can have at most {MAX_SOCKETS} sockets"
        )
    for item in spec.listen:
        _check_listen(item)


def _check_listen(item: DaemonListen) -> None:
    if (
        not all(isinstance(text, str) for text in (item.kind, item.host, item.path))
        or type(item.port) is not int
    ):
        raise daemon_errors.bad_daemon("listen", item, "it is not an address")
    if item.kind in ("tcp", "auto") and ("%" in item.host or not address.is_ip(item.host)):
        # the master must not wait for a name server
        raise daemon_errors.bad_daemon("listen", item.host[:100], "it is not a numeric address")
    if item.kind == "tcp" and not 1 <= item.port <= 65535:
        raise listen_errors.bad_port(item.port)
    if item.kind == "unix" and (not os.path.isabs(item.path) or "\0" in item.path):
        raise daemon_errors.bad_daemon(
            "listen", item.path[:100], "the path of the UNIX socket is not absolute"
        )
    if item.kind not in ("tcp", "auto", "unix"):
        raise daemon_errors.bad_daemon("listen", item.kind[:40], "it is an unknown kind of address")


def check_after(spec: DaemonSpec, names: Iterable[str]) -> None:
    """Check that ``after`` names daemons that were spawned earlier.

    :param names: of those.
    :raises errors.SettingError: names the unknown daemon.
    """
    for unknown in sorted(set(spec.after or ()) - set(names)):
        raise daemon_errors.bad_daemon(
            "after", unknown, f"{spec.name!r} can only name daemons that were spawned before it"
        )


def stop_waves(specs: Iterable[DaemonSpec]) -> list[list[DaemonSpec]]:
    """The order in which daemons stop: each wave when the one before it has stopped.

    :param specs: in the order of ``spawn()``.
    """
    waves: list[list[DaemonSpec]] = []
    stopped_in: dict[str, int] = {}
    later: list[DaemonSpec] = []
    for spec in reversed(list(specs)):
        earliest = [
            stopped_in[other.name] + 1 for other in later if other.after is None or spec.name in other.after
        ]
        stopped_in[spec.name] = number = max(earliest, default=0)
        waves += [[] for _ in range(number + 1 - len(waves))]
        waves[number].append(spec)
        later.append(spec)
    return waves


# --- from the arguments of spawn() -----------------------------------------------------------------


def build_spec(
    target: object,
    *,
    name: str | None = None,
    listen: object = None,
    args: object = (),
    env: object = None,
    cwd: object = None,
    user: object = None,
    group: object = None,
    after: object = None,
    **plain: Any,
) -> DaemonSpec:
    """Make the spec of the arguments of ``spawn()``, which are not checked yet.

    :param within: the ports that the program limits itself to; empty for all allocated ports.
    :raises errors.SettingError: names the parameter that cannot be used.
    :raises errors.ListenError: for an invalid address.
    """
    if env is not None and not (
        isinstance(env, Mapping) and all(isinstance(text, str) for pair in env.items() for text in pair)
    ):
        raise daemon_errors.bad_daemon("env", env, "use a mapping of names to strings")
    variables = dict(env or {})
    if not isinstance(args, list | tuple):
        raise daemon_errors.bad_daemon("args", args, "use a list or a tuple")
    if callable(target):
        call, default = _call(target, args)
        command: tuple[str, ...] = (sys.executable, _FUNCTION_RUNNER, f"{call['module']}:{call['name']}")
        shown = f"{call['module']}.{call['name']}({', '.join(repr(arg) for arg in args)})"
        variables["PASSENGER_CALL"] = json.dumps(call, separators=(",", ":"))
    else:
        command = (*_command(target), *_texts(args))
        shown = shlex.join(command)
        default = os.path.basename(command[0])
    spec = DaemonSpec(
        name=str(default)[:MAX_NAME] if name is None else name,
        command=command,
        shown=shown[:200],
        listen=tuple(_listen(listen)),
        env=tuple(sorted(variables.items())),
        cwd=os.path.abspath(_path(cwd)),
        user=_account("user", user),
        group=_account("group", group),
        after=_after(after),
        **plain,
    )
    _check(spec)
    return spec


def _command(target: object) -> list[str]:
    if isinstance(target, str):
        try:
            words = shlex.split(target)
            quoted = shlex.split(target, posix=False)
        except ValueError as error:
            raise daemon_errors.bad_daemon("target", target, str(error).lower()) from None
        for word in filter(_SHELL_WORD.fullmatch, quoted):
            raise daemon_errors.bad_daemon(
                "target", target, f"only a shell understands {word!r}; use ['sh', '-c', '...']"
            )
    elif isinstance(target, list | tuple):
        words = _texts(target)
    else:
        raise daemon_errors.bad_daemon(
            "target", target, "use a command line, a list of strings or a function"
        )
    if not words:
        raise daemon_errors.bad_daemon("target", target, "the command is empty")
    return words


def _texts(values: Iterable[object]) -> list[str]:
    texts = []
    for value in values:
        if not isinstance(value, str | os.PathLike | int) or isinstance(value, bool):
            raise daemon_errors.bad_daemon("args", value, "use strings, numbers and paths for a command")
        texts.append(str(value) if isinstance(value, int) else os.fsdecode(value))
    return texts


def _call(target: Any, args: list[object] | tuple[object, ...]) -> tuple[dict[str, Any], str]:
    """How a new interpreter finds the function; and its name."""
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise daemon_errors.not_importable(repr(target), "it has no name")
    if "<" in name:
        what = "it is a lambda" if name.endswith("<lambda>") else "it is defined inside another function"
        raise daemon_errors.not_importable(name, what)
    if getattr(target, "__self__", None) is not None:
        raise daemon_errors.not_importable(
            name, "it is a method of an object, which exists only in this process"
        )
    file = ""
    owner = getattr(target, "__globals__", None) or getattr(sys.modules.get(module), "__dict__", {})
    if module == "__main__" and owner.get("__spec__") is not None:
        module = owner["__spec__"].name  # python -m: the file alone could not import from its package
    elif module in ("__main__", "__config__"):
        file = owner.get("__file__") or ""
        if not file:
            raise daemon_errors.not_importable(name, "its module has no file")
        # the script's ``if __name__ == '__main__'`` must not run again
        module = "__passenger_main__" if module == "__main__" else module
    try:
        json.dumps(args, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise daemon_errors.bad_daemon(
            "args", args, "use JSON values for a function: strings, numbers, lists"
        ) from None
    path = [] if file == "" else [os.path.dirname(os.path.abspath(file))]
    call = {"module": module, "file": file and os.path.abspath(file), "name": name, "args": list(args)}
    return {**call, "path": list(dict.fromkeys(path + _own_path()))}, name.rpartition(".")[2]


def _own_path() -> list[str]:
    """The entries of ``sys.path`` that a new interpreter would not have, such as the script's directory."""
    given = {os.path.abspath(item) for item in os.environ.get("PYTHONPATH", "").split(os.pathsep) if item}
    system = tuple({os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
    own = [os.path.abspath(item) for item in sys.path]
    return [p for p in own if p not in given and not p.startswith(system)]


def _listen(value: object) -> list[DaemonListen]:
    if value is None:
        return []
    # (host, port) is one address, as for Server.listen; a list has several
    items = value if isinstance(value, list) else [value]
    return [_one(item) for item in items]


def _one(item: object) -> DaemonListen:
    want = address.parse(item)
    if isinstance(want, address.Primary):
        raise daemon_errors.bad_daemon("listen", item, "the primary socket belongs to the workers")
    if isinstance(want, address.Unix):
        return DaemonListen("unix", path=want.path)
    if isinstance(want, address.Auto):
        return DaemonListen("auto", address.resolve(want.host, 0)[1])
    return DaemonListen("tcp", address.resolve(want.host, want.port)[1], want.port)


def _after(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise daemon_errors.bad_daemon("after", value, "use a list of daemons' names")
    return tuple(str(getattr(item, "name", item)) for item in value)


def _path(cwd: object) -> str:
    if cwd is None:
        return os.getcwd()
    if not isinstance(cwd, str | os.PathLike):
        raise daemon_errors.bad_daemon("cwd", cwd, "it is not a path")
    return os.fsdecode(cwd)


def _account(parameter: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise daemon_errors.bad_daemon(parameter, value, "use a name or a number")
    return str(value)
