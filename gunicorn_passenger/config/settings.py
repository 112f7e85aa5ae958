"""The settings: their names, where each value comes from, and whether it is valid.

Process: every process. Never: act on a setting; other modules ask this one.

A setting can come from three places. The process decides to which of them a ``configure()`` call belongs:

- the *environment* (``PASSENGER_PORTS`` and so on);
- the *operator*: ``configure()`` in ``gunicorn.conf.py``, run by the master while it reads its
  configuration, at the start and again at every reload;
- the *program*: ``configure()`` in the application.

For ``ports`` each place narrows the port allocation (see :mod:`gunicorn_passenger.config.port_allocation`).
For the other settings the program overrides the environment, and the environment overrides
``gunicorn.conf.py``, as gunicorn's own ``GUNICORN_CMD_ARGS`` does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gunicorn_passenger.config.host_names import parse_host_names
from gunicorn_passenger.config.port_allocation import (
    AllocationSource,
    PortAllocation,
    account_name,
    parse_ports,
    system_layer,
)
from gunicorn_passenger.errors import PassengerError, SettingError, UnknownSetting, unknown_name


class Timeouts(NamedTuple):
    """Seconds that a client may take (``head_timeout``, ``body_timeout``, ``write_timeout``)."""

    #: from the first byte of the request line to the end of the headers
    head: float = 30.0
    #: without a byte, in a request body
    body: float = 60.0
    #: without reading a byte, in a response
    write: float = 60.0


PLACEMENTS = ("shared", "one", "each")
#: only in the setting: an unmodified server keeps the port that it opens, and the master has no part in it
OFF = "off"

#: RFC 6265 section 4.1.1: the name of a cookie is a token
_COOKIE_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")

DEFAULT_GRACE_PERIOD = 10.0
DEFAULT_MAX_BLOCKING_TIME = 2.0


def check_placement(value: object) -> str:
    """:raises SettingError: for an unknown placement."""
    if value not in PLACEMENTS:
        raise SettingError(
            f"placement {value!r} is unknown; use 'shared' (all workers accept from the one socket), "
            "'one' (one worker at a time) or 'each' (every worker has a port of its own)"
        )
    return str(value)


def _bool(value: object, where: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise SettingError(f"{where}: {value!r} is neither true nor false; use 1 or 0")


def _seconds(value: object, where: str) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise SettingError(f"{where}: {value!r} is not a number of seconds") from None
    if not 0 <= seconds <= 86400:
        raise SettingError(f"{where}: {value!r} is out of range; use 0 to 86400 seconds")
    return seconds


def _timeout(value: object, where: str) -> float:
    seconds = _seconds(value, where)
    if seconds < 0.1:
        raise SettingError(f"{where}: {value!r} is too short for any client; use 0.1 seconds or more")
    return seconds


def _placement(value: object, where: str) -> dict[int, str]:
    if isinstance(value, str) and (value.strip() == OFF or value.strip() in PLACEMENTS):
        raise SettingError(
            f"{where}: name the port, too, such as {{9000: {value.strip()!r}}} or '9000={value.strip()}'"
        )
    if isinstance(value, str):
        # as in the environment: "9000=shared,9100=shared"
        pairs = [item.partition("=")[::2] for item in value.split(",") if item.strip()]
    elif isinstance(value, Mapping):
        pairs = [(str(port), name) for port, name in value.items()]
    else:
        raise SettingError(
            f"{where}: {value!r} is not a mapping of ports to placements, such as {{9000: 'shared'}}"
        )
    table: dict[int, str] = {}
    for port, name in pairs:
        for number in parse_ports(port, where):
            try:
                word = name.strip() if isinstance(name, str) else name
                table[number] = OFF if word == OFF else check_placement(word)
            except SettingError as error:
                raise SettingError(f"{where}: port {number}: {error}") from None
    return table


def _ws_stop(value: object, where: str) -> str:
    if value not in ("close", "wait"):
        raise SettingError(
            f"{where}: {value!r} is neither 'close' (close WebSockets with code 1001 when a worker exits) "
            "nor 'wait' (let them end by themselves)"
        )
    return str(value)


def check_sticky(value: object, where: str) -> object:
    """:raises SettingError: for a value that cannot be used."""
    if callable(value) or value in (OFF, "socketio", "cookie"):
        return value
    kind, colon, name = str(value).partition(":")
    if kind == "cookie" and colon and _COOKIE_NAME.fullmatch(name):
        return f"cookie:{name}"
    raise SettingError(
        f"{where}: {value!r} cannot be used; use 'socketio' (the worker that has the Engine.IO session), "
        "'cookie' or 'cookie:NAME' (the worker that has set the cookie), a function that returns the key of "
        "a request, or 'off'"
    )


_CHECKS: dict[str, Callable[[object, str], Any]] = {
    "auto_install": _bool,
    "ports": parse_ports,
    "placement": _placement,
    "grace_period": _seconds,
    "overlap": _seconds,
    "head_timeout": _timeout,
    "body_timeout": _timeout,
    "write_timeout": _timeout,
    "ws_stop": _ws_stop,
    "prometheus": _bool,
    "status_hosts": parse_host_names,
    "max_blocking_time": _seconds,
    "sticky": check_sticky,
}

#: Settings that only the master can act on.
_OPERATOR_ONLY = frozenset({"grace_period", "overlap", "prometheus"})


class Settings:
    """The settings of this process."""

    def __init__(self) -> None:
        self.operator: dict[str, Any] = {}
        self.program: dict[str, Any] = {}
        #: what configure() was given while gunicorn reads its configuration
        self._reading: dict[str, Any] = {}
        #: whether the program runs now (in a worker, or in the master with --preload)
        self.in_program = False
        self._config_module: object = None
        #: for the servers of the program that are not given a value
        self.default_sticky = OFF

    def configure(self, **values: object) -> None:
        for name in values:
            if name not in _CHECKS:
                raise unknown_name("configure()", "setting", name, sorted(_CHECKS))
        checked = {name: _CHECKS[name](value, f"configure({name}=...)") for name, value in values.items()}
        if self.in_program:
            for name in sorted(_OPERATOR_ONLY & checked.keys()):
                raise SettingError(
                    f"configure({name}=...) is for gunicorn.conf.py: the master acts on it; "
                    f"set it there or as PASSENGER_{name.upper()}"
                )
            self.program.update(checked)
        else:
            self._reading.update(checked)

    def config_file_loaded(self) -> None:
        """gunicorn has read its configuration; what runs next is the program (``--preload``)."""
        module = sys.modules.get("__config__")
        # A configuration given as python:module is imported once, and a reload does not run it again:
        # then its settings stay.
        if self._reading or module is not self._config_module:
            self.operator = self._reading
            self._reading = {}
        self._config_module = module
        self.in_program = True

    def discard_config_file(self, operator: dict[str, Any]) -> None:
        """gunicorn cannot use the configuration that it has just read.

        :param operator: what the previous configuration has set.
        """
        self.operator, self._reading = operator, {}
        self._config_module = sys.modules.get("__config__")
        self.in_program = False

    def leave_program_scope(self) -> None:
        """The master continues; a ``configure()`` call now comes from ``gunicorn.conf.py``."""
        self.in_program = False

    def enter_program_scope(self) -> None:
        """A worker begins to load the program."""
        self.in_program = True

    def _effective(self, name: str, default: Any = None) -> Any:
        # with plain python no master reads a configuration: every call is the program's
        program = {**self._reading, **self.program}
        if name in program:
            return program[name]
        variable = f"PASSENGER_{name.upper()}"
        if text := os.environ.get(variable, "").strip():
            return _CHECKS[name](text, variable)
        return self.operator.get(name, default)

    def auto_install(self, default: bool) -> bool:
        return bool(self._effective("auto_install", default))

    def grace_period(self) -> float:
        """Seconds that a port stays open after the last worker has released it."""
        return float(self._effective("grace_period", DEFAULT_GRACE_PERIOD))

    def overlap(self, default: float) -> float:
        """Seconds for which an old worker waits for a new one that boots."""
        return float(self._effective("overlap", default))

    def prometheus(self) -> bool:
        """Whether the program's own ``prometheus_client`` metrics are added up over all workers."""
        return bool(self._effective("prometheus"))

    def timeouts(self) -> Timeouts:
        """Seconds that the clients of the package's own servers may take."""
        given = {name: self._effective(f"{name}_timeout") for name in Timeouts._fields}
        return Timeouts(**{name: seconds for name, seconds in given.items() if seconds is not None})

    def closes_websockets_on_exit(self) -> bool:
        """Whether a worker that exits closes the application's WebSockets."""
        return bool(self._effective("ws_stop") != "wait")

    def max_blocking_time(self) -> float:
        """Seconds for which a worker's event loop may be blocked without a warning; 0 for no warning."""
        return float(self._effective("max_blocking_time", DEFAULT_MAX_BLOCKING_TIME))

    def sticky(self, is_primary: bool) -> object:
        """Which worker serves a request of a server that was not given the option ``sticky``.

        :param is_primary: whether the setting applies to it.
        """
        return self._effective("sticky", self.default_sticky) if is_primary else self.default_sticky

    def status_hosts(self) -> frozenset[str]:
        """Host names that the status application serves, beside local names and addresses."""
        return frozenset(self._effective("status_hosts", ()))

    def placement(self, port: int, asked: str) -> str:
        return str(self._effective("placement", {}).get(port, asked))

    def operator_allocation(self, uid: int) -> PortAllocation:
        """The port allocation of the master: the system's file, the environment, ``gunicorn.conf.py``.

        :raises SettingError: when one of them has a value that cannot be used.
        """
        account = account_name(uid)
        allocation = PortAllocation(account).narrowed(system_layer(account, uid))
        # Set but empty means no port at all, as configure(ports="") does: PASSENGER_PORTS=$PORTS with PORTS
        # unset must not open every port.
        if (text := os.environ.get("PASSENGER_PORTS")) is not None:
            ports = parse_ports(text, "PASSENGER_PORTS")
            allocation = allocation.narrowed(
                AllocationSource(ports, "PASSENGER_PORTS", "add it to PASSENGER_PORTS and restart")
            )
        if "ports" in self.operator:
            remedy = "add it to configure(ports=...) in gunicorn.conf.py and reload"
            allocation = allocation.narrowed(
                AllocationSource(self.operator["ports"], "configure() in gunicorn.conf.py", remedy)
            )
        return allocation

    def program_layer(self) -> AllocationSource | None:
        """The ports that the program limits itself to; ``None`` without such a setting."""
        ports = {**self._reading, **self.program}.get("ports")
        if ports is None:
            return None
        return AllocationSource(
            ports, "configure() in the application", "add it to configure(ports=...) in the application"
        )

    def check_environment(self) -> None:
        """:raises SettingError: for a ``PASSENGER_*`` variable whose value cannot be used."""
        for name in _CHECKS:
            self._effective(name)


settings = Settings()


def configure(**values: object) -> None:
    """Set one or more settings, in the application or in ``gunicorn.conf.py``.

    :param auto_install: whether the first server that listens becomes the primary (default: on for a
        script run by ``gunicorn-passenger start``, otherwise off).
    :param ports: the port allocation, such as ``"9000-9019,9100"``. It can only narrow what the system's
        file, the environment and ``gunicorn.conf.py`` allow.
    :param placement: port -> placement, such as ``{9000: "shared"}``.
    :param grace_period: seconds (default 10) that a port stays open after the last worker has released it;
        ``gunicorn.conf.py`` only.
    :param overlap: seconds (default: gunicorn's ``graceful_timeout``) for which an old worker continues to
        accept while its successor boots; 0 lets it leave at once; ``gunicorn.conf.py`` only.
    :param head_timeout: seconds (default 30) that a client may take to send the request line and the headers;
        gunicorn's ``keepalive`` limits the pause between two requests.
    :param body_timeout: seconds (default 60) that a client may pause inside a request body.
    :param write_timeout: seconds (default 60) that a client may take without reading anything of a response.
    :param ws_stop: what a worker that exits does with the application's WebSockets: ``"close"`` (the default)
        closes them with code 1001 at once, ``"wait"`` lets them end by themselves until gunicorn's
        ``graceful_timeout``. The same holds for Socket.IO clients that poll. Proxied WebSockets have an
        option of their own.
    :param prometheus: whether the program's own ``prometheus_client`` metrics are added up over all workers
        (default: no); ``gunicorn.conf.py`` only.
    :param status_hosts: host names that the status application serves beside local names and IP addresses,
        such as ``["status.example.org", ".internal"]``.
    :param max_blocking_time: seconds (default 2) for which the program may block a worker's event loop before
        the log names the function that does; 0 turns this off.
    :param sticky: which worker serves a request to the primary (default: the one that reads it):
        ``"socketio"``, ``"cookie"``, ``"cookie:NAME"``, or a function, as in :meth:`.server.Server.listen`.
    :raises TypeError: for an unknown name.
    :raises SettingError: (a ``ValueError``) for a value that cannot be used.
    """
    try:
        settings.configure(**values)
    except (UnknownSetting, SettingError) as error:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") != "__config__" or frame.f_code.co_name != "<module>":
            if frame.f_back is None:
                raise
            frame = frame.f_back
        raise config_file_error(error) from None


def config_file_error(error: PassengerError) -> SystemExit:
    """What to raise for an error in ``gunicorn.conf.py``: gunicorn shows others with a traceback."""
    frame: Any = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith("gunicorn_passenger."):
        frame = frame.f_back
    return SystemExit(f"Error: {frame.f_code.co_filename}, line {frame.f_lineno}: {error}")
