"""``spawn()``: one further process for the whole application, whichever process requests it.

Process: the master (gunicorn.conf.py, gunicorn's hooks, ``--preload``), a worker, plain Python, a daemon.
Never: start a daemon in a worker; the master has one for all of them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config.settings import config_file_error, settings
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.requested import requested_daemons
from gunicorn_passenger.daemons.spec import MAX_MESSAGE, DaemonSpec, build_spec
from gunicorn_passenger.daemons.standalone import standalone_daemons
from gunicorn_passenger.errors import DaemonError, PassengerError
from gunicorn_passenger.ipc.messages import DaemonSpawned, RequestDenied, SpawnDaemon
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.serving.registry import check_program_allocation, registry
from gunicorn_passenger.system.callers import called_in

_hooked: list[bool] = []


class Daemon:
    """What ``spawn()`` returns: the name of a daemon, and where it listens."""

    def __init__(self, name: str, address: tuple[str, int] | str | None = None) -> None:
        self.name = name
        #: ``(host, port)`` or ``"unix:/path"`` of its first socket; ``None`` without a socket, and while
        #: the address is not known yet
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
    kill_mode: str = "mixed",
    after: Sequence[str | Daemon] | None = None,
    report: bool = False,
) -> Daemon:
    """Run one further process for the whole application, for as long as the application runs.

    Called in ``gunicorn.conf.py`` (with any worker class: ``from gunicorn_passenger.hooks import *``), or in
    the application under ``gunicorn_passenger.Worker``, where all workers that request the same daemon share
    one. With plain ``python`` it is a child of this process and ends with it.

    :param target: a command line (a string, or a list of strings), or a function of a module, which a
        separate interpreter imports and calls.
    :param name: its name in the log, in ``status`` and for ``restart`` and ``stop``; by default the name of
        the command or the function. Each daemon needs a name of its own.
    :param listen: where it listens: a port number, ``"host:port"``, ``"unix:/path"``, ``"auto"``, or a list
        of these. The master opens the sockets; the daemon finds them from descriptor 3 on (``LISTEN_FDS``,
        sd_listen_fds(3)).
    :param args: further words of the command, or the arguments of the function.
    :param env: variables, added to the master's environment.
    :param cwd: the directory to run in (default: the current directory).
    :param user: the user that it runs as (default: the workers' user); ``group`` likewise. The application
        may only name the workers' own.
    :param on_reload: ``"keep"`` it at a reload (``HUP``), or ``"restart"`` it. A daemon whose
        arguments have changed is always restarted.
    :param stop_timeout: seconds from ``SIGTERM`` to ``SIGKILL``.
    :param kill_mode: ``"mixed"``: the first process alone gets ``SIGTERM``, and what it leaves behind is
        killed. ``"group"``: all processes of the daemon get ``SIGTERM``.
    :param after: the daemons, spawned earlier, that are stopped only when this one has stopped; by default
        all that were spawned before it.
    :param give_up_after: consecutive quick exits after which it is not restarted any more (0: never).
    :param report: for this package's own daemons.
    :returns: its name and address.
    :raises errors.SettingError: (a ``ValueError``) for a parameter that cannot be used.
    :raises errors.DaemonError: for a name that is used twice, a command that does not exist, a user that
        it may not run as.
    :raises errors.ListenError: when the port is not allocated, or cannot be opened.
    """
    if _in_daemon():
        return _describe_only(target, name, listen)
    reading = is_reading_config()
    try:
        within = "" if reading else check_program_allocation(None)
        spec = build_spec(
            target,
            name=name,
            listen=listen,
            args=args,
            env=env,
            cwd=cwd,
            user=user,
            group=group,
            on_reload=on_reload,
            stop_timeout=stop_timeout,
            give_up_after=give_up_after,
            kill_mode=kill_mode,
            after=after,
            report=report,
            within=within,
        )
        if not reading:
            for item in spec.listen:
                if item.kind == "tcp":
                    check_program_allocation(item.port)
        return _place(spec, reading)
    except PassengerError as error:
        if not reading:
            raise
        raise config_file_error(error) from None


def _place(spec: DaemonSpec, reading: bool) -> Daemon:
    """Pass the spec on to the process that starts the daemon."""
    if reading:
        requested_daemons.add_from_config(spec)
    elif registry.worker is not None:
        return _ask_master(spec)
    elif registry.active or _under_gunicorn():
        if called_in("spawn_worker", "gunicorn.arbiter") or _forked_from_master():
            raise daemon_errors.spawn_without_worker(spec.name)
        # with --preload the program's own code runs in the master
        try:
            requested_daemons.add_persistent(spec, trusted=not settings.in_program)
        except DaemonError as error:
            if not requested_daemons.handled:
                raise
            # a hook of a running master: an exception would end gunicorn
            logging.getLogger("gunicorn.error").error("gunicorn-passenger: %s", error)
    else:
        return Daemon(spec.name, standalone_daemons.spawn(spec))
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(before=_warn_unhandled)
    return Daemon(spec.name, _known_address(spec))


def _describe_only(target: object, name: str | None, listen: object) -> Daemon:
    """In a daemon, which imports the program for its function: start nothing."""
    try:
        spec = build_spec(target, name=name, listen=listen)
    except (PassengerError, OSError):
        return Daemon(name or "")
    return Daemon(spec.name, _known_address(spec))


def _ask_master(spec: DaemonSpec) -> Daemon:
    """In a worker: the master has one daemon for all workers that request it."""
    spec.find_command(dict(spec.env).get("PATH", os.environ.get("PATH")))
    text = spec.pack()
    if len(text) > MAX_MESSAGE:
        raise daemon_errors.daemon_too_long(spec.name, MAX_MESSAGE)
    broker = registry.broker
    assert broker is not None
    try:
        response = broker.request(SpawnDaemon(0, text), f"daemon {spec.name!r}")
    except errors.BrokerUnavailable as error:
        registry.log.error("%s", error)
        return Daemon(spec.name)
    if isinstance(response, RequestDenied):
        kind = errors.REFUSALS.get(response.kind)
        raise kind(response.errno, response.text) if kind is not None else DaemonError(response.text)
    if not isinstance(response, DaemonSpawned):
        raise server_errors.broker_unavailable(
            f"daemon {spec.name!r}", "did not understand this worker (different versions?)"
        )
    if response.path:
        return Daemon(response.name, f"unix:{response.path}")
    return Daemon(response.name, (response.host, response.port) if response.port else None)


def _known_address(spec: DaemonSpec) -> tuple[str, int] | str | None:
    """Where it will listen, as far as this is known in advance."""
    if not spec.listen or spec.listen[0].kind == "auto":
        return None
    first = spec.listen[0]
    return (first.host, first.port) if first.kind == "tcp" else str(first)


# --- the calling process ----------------------------------------------------------------------------------


def _in_daemon() -> bool:
    """Whether this process is a daemon that imports the program for one of its functions."""
    return bool(getattr(sys.modules.get("__main__"), "IS_DAEMON", False))


def is_reading_config() -> bool:
    """Whether this call comes from ``gunicorn.conf.py``."""
    return called_in("load_config", "gunicorn.app.base")


def _under_gunicorn() -> bool:
    return "gunicorn.arbiter" in sys.modules and os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/")


def _forked_from_master() -> bool:
    forks: Any = sys.modules.get("gunicorn_passenger.arbiter.fork_handlers")
    return forks is not None and forks.parent_broker() is not None


def _warn_unhandled() -> None:
    """gunicorn forks a worker, but this package's hooks have not started the daemons of gunicorn.conf.py."""
    if (
        requested_daemons.pending
        and not requested_daemons.handled
        and called_in("spawn_worker", "gunicorn.arbiter")
    ):
        requested_daemons.handled = True
        logging.getLogger("gunicorn.error").error(
            "gunicorn-passenger: spawn() was called, but nothing starts the daemons: add 'from "
            "gunicorn_passenger.hooks import *' to gunicorn.conf.py (and define no nworkers_changed of your "
            "own), or use -k gunicorn_passenger.Worker"
        )


if _in_daemon():
    # the workers open the servers that the program makes while it is imported
    registry.run_as_master()
