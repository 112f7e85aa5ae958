"""``spawn()``: one further process for the whole application, whoever asks for it.

Runs in: the master (gunicorn.conf.py, gunicorn's hooks, ``--preload``), a worker, plain Python, a daemon.
Must never: start a daemon in a worker; the master has one for all of them.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.spec import MAX_MESSAGE, DaemonSpec, build_spec, resolve_run_as, wishes
from gunicorn_passenger.errors import DaemonError, PassengerError
from gunicorn_passenger.ipc.channel import DaemonSpawned, RequestDenied, SpawnDaemon
from gunicorn_passenger.serving import server_errors, standalone
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.system import unpatched

_hooked: list[bool] = []


class Daemon:
    """What ``spawn()`` returns: the name of a daemon, and where it listens."""

    def __init__(self, name: str, address: tuple[str, int] | str | None = None) -> None:
        self.name = name
        #: ``(host, port)`` or ``"unix:/path"`` of its first socket; ``None`` without one, and while it is
        #: not known yet
        self.address = address

    def __repr__(self) -> str:
        return f"<Daemon {self.name!r} {self.address or ''}>"


def spawn(
    target: object,
    *,
    name: str | None = None,
    listen: object = None,
    args: Sequence[object] = (),
    env: Mapping[str, str] | None = None,
    cwd: object = None,
    user: str | int | None = None,
    group: str | int | None = None,
    on_reload: str = "keep",
    stop_timeout: float = 10.0,
    give_up_after: int = 10,
    report: bool = False,
) -> Daemon:
    """Have one further process for the whole application, for as long as the application runs.

    Called in ``gunicorn.conf.py`` (with any worker class: ``from gunicorn_passenger.hooks import *``), or in
    the application under ``gunicorn_passenger.Worker``, where all workers that ask for the same daemon share
    one. With plain ``python`` it is a child of this process and ends with it.

    :param target: a command line (a string, or a list of strings), or a function of a module, which is
        imported and called in an interpreter of its own.
    :param name: names it in the log, in ``status`` and for ``restart`` and ``stop``; by default that of the
        command or the function. Each daemon has its own.
    :param listen: where it listens: a port number, ``"host:port"``, ``"unix:/path"``, ``"auto"``, or a list
        of these. The master opens the sockets; the daemon finds them from descriptor 3 on (``LISTEN_FDS``,
        sd_listen_fds(3)).
    :param args: further words of the command, or the arguments of the function.
    :param env: added to the master's environment.
    :param cwd: the directory to run in (default: the present one).
    :param user: as whom it runs (default: the workers' user); ``group`` likewise. The application may
        name no other than the workers'.
    :param on_reload: ``"keep"`` it at a reload (``HUP``), or ``"restart"`` it. One that is asked for
        differently than before is always restarted.
    :param stop_timeout: seconds from ``SIGTERM`` to ``SIGKILL``.
    :param give_up_after: how many quick deaths in a row it takes to give up (0: never).
    :param report: for this package's own daemons.
    :returns: its name and address.
    :raises errors.SettingError: (a ``ValueError``) for a parameter that cannot be used.
    :raises errors.DaemonError: for a name that is used twice, a command that is not there, a user that it
        may not run as.
    :raises errors.ListenError: when it may not listen there, or cannot.
    """
    if _in_daemon():
        return _elsewhere(target, name, listen)
    reading = _called_in("load_config", "gunicorn.app.base")
    try:
        within = "" if reading else registry.check_program_allocation(None)
        spec = build_spec(
            target,
            name,
            listen,
            args,
            env,
            cwd,
            user,
            group,
            on_reload,
            stop_timeout,
            give_up_after,
            within,
            report,
        )
        if not reading:
            for item in spec.listen:
                if item.kind == "tcp":
                    registry.check_program_allocation(item.port)
        return _place(spec, reading)
    except PassengerError as error:
        if not reading:
            raise
        # gunicorn prints a traceback for whatever else its configuration file raises
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__", "").startswith("gunicorn_passenger."):
            frame = frame.f_back
        where = f"{frame.f_code.co_filename}, line {frame.f_lineno}"
        raise SystemExit(f"Error: {where}: {error}") from None


def _place(spec: DaemonSpec, reading: bool) -> Daemon:
    """Tell whoever is to start it."""
    if reading:
        wishes.note_read(spec)
    elif registry.worker is not None:
        return _ask_master(spec)
    elif registry.active or _under_gunicorn():
        if _called_in("spawn_worker", "gunicorn.arbiter") or _forked_from_master():
            raise daemon_errors.spawn_without_worker(spec.name)
        # the program's own code runs in the master with --preload
        try:
            wishes.note_lasting(spec, trusted=not settings._program_runs)
        except DaemonError as error:
            if not wishes.attended:
                raise
            # a hook of a master that runs: what leaves it would end gunicorn
            logging.getLogger("gunicorn.error").error("gunicorn-passenger: %s", error)
    else:
        return _household.spawn(spec)
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(before=_warn_unattended)
    return Daemon(spec.name, _known_address(spec))


def _elsewhere(target: Any, name: str | None, listen: Any) -> Daemon:
    """In a daemon that imports the program for its function: nothing is started."""
    try:
        spec = build_spec(target, name, listen, [], None, None, None, None, "keep", 10.0, 10, "", False)
    except (PassengerError, OSError):
        return Daemon(name or "")
    return Daemon(spec.name, _known_address(spec))


def _ask_master(spec: DaemonSpec) -> Daemon:
    """In a worker: the same daemon for all workers that ask for it."""
    spec.find_command(dict(spec.env).get("PATH", os.environ.get("PATH")))
    text = spec.pack()
    if len(text) > MAX_MESSAGE:
        raise daemon_errors.daemon_too_long(spec.name, MAX_MESSAGE)
    link = registry.link
    assert link is not None
    try:
        answer = link.ask(SpawnDaemon(0, text), f"daemon {spec.name!r}")
    except errors.BrokerUnavailable as error:
        registry.log.error("%s", error)
        return Daemon(spec.name)
    if isinstance(answer, RequestDenied):
        kind = errors.REFUSALS.get(answer.kind)
        raise kind(answer.errno, answer.text) if kind is not None else DaemonError(answer.text)
    if not isinstance(answer, DaemonSpawned):
        raise server_errors.broker_unavailable(
            f"daemon {spec.name!r}", "did not understand this worker (different versions?)"
        )
    if answer.path:
        return Daemon(answer.name, f"unix:{answer.path}")
    return Daemon(answer.name, (answer.host, answer.port) if answer.port else None)


def _known_address(spec: DaemonSpec) -> tuple[str, int] | str | None:
    """Where it will listen, as far as that is known before it does."""
    if not spec.listen or spec.listen[0].kind == "auto":
        return None
    first = spec.listen[0]
    return (first.host, first.port) if first.kind == "tcp" else str(first)


# --- where we are ----------------------------------------------------------------------------------


def _in_daemon() -> bool:
    """Whether this process is a daemon that imports the program for one of its functions."""
    return bool(getattr(sys.modules.get("__main__"), "IS_DAEMON", False))


def _called_in(function: str, module: str) -> bool:
    """Whether a function of gunicorn's is running, which has led to this call."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def _under_gunicorn() -> bool:
    return "gunicorn.arbiter" in sys.modules and os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/")


def _forked_from_master() -> bool:
    forks: Any = sys.modules.get("gunicorn_passenger.arbiter.fork_handlers")
    return forks is not None and forks.parent_broker() is not None


def _warn_unattended() -> None:
    """A worker is forked, and no master of ours has looked at what gunicorn.conf.py asks for."""
    if wishes.unread and not wishes.attended and _called_in("spawn_worker", "gunicorn.arbiter"):
        wishes.attended = True
        logging.getLogger("gunicorn.error").error(
            "gunicorn-passenger: spawn() was called, but nothing starts the daemons: add 'from "
            "gunicorn_passenger.hooks import *' to gunicorn.conf.py (and define no nworkers_changed of your "
            "own), or use -k gunicorn_passenger.Worker"
        )


if _in_daemon():
    # Servers that the program makes while it is imported are the workers' to open.
    registry.run_as_master()


# --- plain Python ----------------------------------------------------------------------------------


class StandaloneDaemons:
    """The daemons of a program that runs without gunicorn: they end with it."""

    def __init__(self) -> None:
        self._supervisor: Any = None
        self._held: list[Any] = []
        self._names: dict[str, str] = {}

    def spawn(self, spec: DaemonSpec) -> Daemon:
        from gunicorn_passenger.daemons.supervisor_client import SupervisorClient, open_daemon_socket

        if spec.name in self._names.values():
            raise daemon_errors.duplicate_daemon_name(spec.name)
        spec.find_command(dict(spec.env).get("PATH", os.environ.get("PATH")))
        who = resolve_run_as(spec, os.geteuid(), os.getegid(), False, True)
        listening: list[Any] = []
        try:
            for item in spec.listen:
                listening.append(
                    open_daemon_socket(
                        item, spec.within, standalone._allocation(), standalone._BACKLOG, 0o600, lambda _: ""
                    )
                )
            if self._supervisor is None:
                self._supervisor = SupervisorClient()
                self._supervisor.set_blocking(True)
                atexit.register(self._end)
                os.register_at_fork(after_in_child=self._forked)
                unpatched.start_thread(self._listen)
            key = self._supervisor.start(spec, who, [one.sock for one in listening], os.environ)
        except BaseException:
            for one in listening:
                one.close(unlink=True)
            raise
        self._names[key] = spec.name
        self._held += listening
        first = listening[0] if listening else None
        address = None if first is None else str(first) if first.path else (first.host, first.port)
        return Daemon(spec.name, address)

    def _listen(self) -> None:
        """The thread that prints what the daemons write."""
        from gunicorn_passenger.system.text import printable

        while (message := self._supervisor.receive()) is not None:
            name = self._names.get(message.get("key", ""), "")
            lines = message.get("lines", [])
            if message["is"] == "died":
                lines = [f"{message['how']}; it is started again"] if "pause" in message else [message["how"]]
            elif message["is"] == "failed":
                lines = ["it is not started again: it has died quickly too often"]
            for line in lines:
                with suppress(OSError, ValueError):
                    os.write(2, f"[{name}] {printable(line.rstrip(chr(13)), keep=chr(9))}\n".encode())

    def _end(self) -> None:
        """End them now, and wait a little: their ports are to be free when the program is over."""
        with suppress(OSError):
            self._supervisor.end()
        for one in self._held:
            one.close(unlink=True)
        with suppress(OSError, ChildProcessError):
            unpatched.unpatched("os", "waitpid")(self._supervisor.pid, 0)

    def _forked(self) -> None:
        atexit.unregister(self._end)
        self._supervisor.close()
        for one in self._held:
            one.close(unlink=False)


_household = StandaloneDaemons()
