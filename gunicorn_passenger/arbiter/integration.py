"""What the broker does in gunicorn's hooks: at the start, at each fork, in a reload or upgrade, at the end.

Process: the master, called from the worker class (which gunicorn instantiates before each fork) and from
gunicorn's hooks; a worker, just after its fork. Never: let a failure of the broker stop gunicorn.
"""

from __future__ import annotations

import _socket
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from gunicorn.errors import HaltServer

from gunicorn_passenger.arbiter import (
    deployment_checks,
    fork_handlers,
    hook_chain,
    hooked_worker,
    program_import,
    succession,
)
from gunicorn_passenger.config.address import is_unix
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.daemons.manager import DaemonManager
from gunicorn_passenger.daemons.requested import requested_daemons
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.interposition import replaced_methods
from gunicorn_passenger.interposition.pending_bind import bind_locks
from gunicorn_passenger.ipc.scoreboard import Scoreboard
from gunicorn_passenger.master import upgrade_state
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.listener_sync import primary_listeners
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server_errors import with_program_line
from gunicorn_passenger.status import prometheus_multiproc, report
from gunicorn_passenger.status.control_server import ControlServer
from gunicorn_passenger.system import listening_sockets, log_locks, runtime_dir
from gunicorn_passenger.system.text import escape_error_log

#: gunicorn's exit status for a configuration that cannot be used.
_CONFIG_ERROR = 1


def install_hooks(cfg: Any) -> None:
    """Install our handlers in gunicorn's hooks; the user's own hooks stay."""
    hook_chain.chain(cfg, "when_ready", ready)
    hook_chain.chain(cfg, "on_reload", reloaded)
    hook_chain.chain(cfg, "pre_fork", _before_worker_fork, first=False)
    hook_chain.chain(cfg, "post_fork", _after_worker_fork)
    hook_chain.chain(cfg, "child_exit", _on_worker_reaped)
    hook_chain.chain(cfg, "pre_exec", _export_upgrade_state, first=False)
    hook_chain.chain(cfg, "on_exit", _finish)


def prepare_worker(
    age: int, listening: list[Any], cfg: Any, log: Log
) -> tuple[_socket.socket | None, Scoreboard | None, list[Any]]:
    """Before the fork of a worker: its channel, and the listeners of the primary.

    :returns: the worker's end of its channel, or ``None`` where the broker has failed; its scoreboard, or
        ``None``; and the gunicorn listeners that the primary is served on.
    :raises HaltServer: at the start, when a setting cannot be used.
    """
    install_hooks(cfg)
    settings.leave_program_scope()
    is_first = fork_handlers.current_broker() is None
    try:
        broker = fork_handlers.current_broker() or _start(listening, cfg, log)
        is_reload = broker.cfg is not cfg
        _configure(broker, cfg, log, is_first)
        if is_first:
            _start_services(broker)
        elif is_reload:
            _tell_reload(broker)
        channel, scoreboard = broker.prepare_worker(age, listening)
    except (OSError, RuntimeError) as error:
        log.error(
            "gunicorn-passenger: the port broker failed (%s): the workers serve the primary, but no port of "
            "listen(); correct the cause, then restart gunicorn",
            error,
        )
        return None, None, primary_listeners(listening)
    return channel, scoreboard, primary_listeners(listening)


def _start(listening: list[Any], cfg: Any, log: Log) -> Broker:
    broker = Broker(log, listening, cfg, report.build)
    escape_error_log(log)
    log_locks.share_between_threads(log)
    broker.arbiter = _arbiters[0] if _arbiters else None
    fork_handlers.install(broker)
    control = ControlServer(broker)
    control.open()
    broker.loop.add(control)
    environment = prometheus_multiproc.directory.environment
    _daemons[:] = [DaemonManager(broker, environment, control.watch_reports)]
    broker.loop.add(_daemons[0])
    if broker.arbiter is None or _workers_are_ours(broker.arbiter):
        _log_primary_notes(listening, log, cfg)
    return broker


def _start_services(broker: Broker) -> None:
    """The master is ready, and the broker has its settings.

    :raises HaltServer: when a daemon that gunicorn.conf.py asks for cannot be started.
    """
    try:
        with broker.locked():
            for service in broker.loop.services:
                service.started(broker.arbiter)
    except PassengerError as error:
        raise HaltServer(str(error), _CONFIG_ERROR) from None


def _configure(broker: Broker, cfg: Any, log: Log, first: bool) -> None:
    """Give the broker the settings of the start, or of a reload."""
    if broker.cfg is cfg and not first:
        return
    try:
        settings.check_environment()
        allocation = settings.operator_allocation(cfg.uid)
        grace = settings.grace_period()
        overlap = settings.overlap(cfg.graceful_timeout)
    except SettingError as error:
        if first:
            raise HaltServer(str(error), _CONFIG_ERROR) from None
        log.error("gunicorn-passenger: %s; the previous settings stay in force", error)
        allocation, grace, overlap = broker.allocation, broker.grace, broker.overlap
    for sentence in allocation.ineffective_ports():
        log.warning("gunicorn-passenger: %s", sentence)
    broker.configure(cfg, allocation, grace, overlap)
    prometheus_multiproc.directory.give_to_workers(cfg, log)


def _log_primary_notes(listening: list[Any], log: Log, cfg: Any) -> None:
    """Log at the start what an operator may not expect of the primary under our worker class."""
    for listener in primary_listeners(listening):
        name = listener.getsockname()
        if not is_unix(name):
            log.info("The primary is served on %s, the first bind, because bind has no UNIX socket", listener)
        elif isinstance(name, str) and name and not name.startswith("\0"):
            _warn_if_world_writable(name, log, cfg)


def _warn_if_world_writable(path: str, log: Log, cfg: Any) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    directory = os.path.dirname(os.path.abspath(path))
    if mode & 0o002 and not runtime_dir.not_traversable(directory):
        log.warning(
            "Every user of this machine may connect to unix:%s (its mode is %04o): set gunicorn's umask "
            "(--umask 007, now %03o) so that only the socket's user and group may",
            path,
            mode & 0o7777,
            cfg.umask,
        )


def print_errors_in_one_line() -> None:
    """An error of ours that ends the master is printed as gunicorn prints its own: without a traceback."""
    others = sys.excepthook
    if getattr(others, "_passenger", False):
        return

    def print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, PassengerError):
            print(f"\nError: {with_program_line(error)}\n", file=sys.stderr, flush=True)
        else:
            others(kind, error, traceback)

    print_error._passenger = True  # type: ignore[attr-defined]
    sys.excepthook = print_error


_arbiters: list[Any] = []
#: the daemons of this master; in a forked child, those of its master
_daemons: list[DaemonManager] = []


def install_hooks_for_other_workers(arbiter: Any) -> bool:
    """Install our handlers with any worker class (see :mod:`gunicorn_passenger.hooks`).

    :returns: whether they were not installed yet.
    """
    if getattr(arbiter.cfg.when_ready, "_passenger", False):
        return False
    if not _workers_are_ours(arbiter):
        print_errors_in_one_line()
        deployment_checks.check(arbiter.cfg, arbiter.log)
        settings.config_file_loaded()
        # with --preload the program is loaded next
        registry.run_as_master()
        program_import.install()
        replaced_methods.watch_gevent()
        bind_locks.create()
        prometheus_multiproc.directory.prepare()
    install_hooks(arbiter.cfg)
    return True


def _workers_are_ours(arbiter: Any) -> bool:
    worker: Any = sys.modules.get("gunicorn_passenger.worker")
    return worker is not None and issubclass(arbiter.worker_class, worker.Worker)


def ready(arbiter: Any) -> None:
    """gunicorn is ready, and starts its workers next."""
    _set_arbiter(arbiter)
    ours = _workers_are_ours(arbiter)
    succession.install(arbiter, succession.OverlappingArbiter if ours else succession.PatientArbiter)
    prometheus_multiproc.directory.give_to_workers(arbiter.cfg, arbiter.log)
    settings.leave_program_scope()
    requested_daemons.handled = True
    requested_daemons.commit_config()
    upgrade_state.forget(arbiter.cfg)
    if requested_daemons.pending or upgrade_state.inherited().get("daemons"):
        _start_for_daemons(arbiter)


def _start_for_daemons(arbiter: Any) -> None:
    """Start a broker for the daemons that the master's own code asks for, before a worker needs one."""
    try:
        broker = _start(arbiter.LISTENERS, arbiter.cfg, arbiter.log)
        _configure(broker, arbiter.cfg, arbiter.log, True)
        _start_services(broker)
    except HaltServer as halt:
        # gunicorn catches HaltServer only after its start
        arbiter.halt(reason=halt.reason, exit_status=halt.exit_status)
    except (OSError, RuntimeError) as error:
        arbiter.log.error(
            "gunicorn-passenger: the daemons cannot be started (%s); correct that, then reload gunicorn",
            error,
        )


def reloaded(arbiter: Any) -> None:
    """gunicorn has read its configuration again, and starts new workers next."""
    settings.leave_program_scope()
    broker = fork_handlers.current_broker()
    if broker is None:
        requested_daemons.commit_config()
        return
    # before a new worker asks for a bind on which a server of the previous program listens; with our own
    # worker class the arbiter has done it
    broker.workers.previous_generation = arbiter.worker_age
    try:
        _configure(broker, arbiter.cfg, arbiter.log, False)
        _tell_reload(broker)
    except (OSError, RuntimeError) as error:
        arbiter.log.error(
            "gunicorn-passenger: the daemons were not told of the reload (%s), and continue as before; "
            "reload gunicorn again",
            error,
        )


def _tell_reload(broker: Broker) -> None:
    requested_daemons.commit_config()
    with broker.locked():
        for service in broker.loop.services:
            service.reloaded()


def _set_arbiter(arbiter: Any) -> None:
    _arbiters[:] = [arbiter]
    broker = fork_handlers.current_broker()
    if broker is not None:
        broker.arbiter = arbiter


#: the worker of another class that is forked next, and what it gets
_prepared: list[tuple[Any, _socket.socket | None, Scoreboard | None, set[int]]] = []


def _before_worker_fork(arbiter: Any, worker: Any) -> None:
    ours = _workers_are_ours(arbiter)
    if not ours:
        channel, scoreboard, _ = prepare_worker(worker.age, arbiter.LISTENERS, arbiter.cfg, arbiter.log)
        # listed here: a worker would copy memory of the master for it
        inodes = set(listening_sockets.own_listeners())
        _prepared[:] = [(worker, channel, scoreboard, inodes)]
        if prometheus_multiproc.directory.path:
            worker.load_wsgi = partial(_load_with_sums, worker.load_wsgi)
    broker = fork_handlers.current_broker()
    if requested_daemons.pending:
        _refresh(arbiter, broker)
    if broker is not None:
        broker.arbiter = arbiter
        broker.workers.mark_forking()
        if ours:
            fork_handlers.freeze_until_forked()


def _refresh(arbiter: Any, broker: Broker | None) -> None:
    """One of the user's own hooks may have asked for a daemon meanwhile."""
    if broker is None:
        _start_for_daemons(arbiter)
    elif _daemons:
        with suppress(TimeoutError), broker.locked():
            _daemons[0].refresh()


def _after_worker_fork(arbiter: Any, worker: Any) -> None:
    """In a worker, just forked."""
    for prepared, channel, scoreboard, inodes in _prepared:
        if prepared is worker:
            hooked_worker.enter(worker, arbiter.LISTENERS, channel, scoreboard, inodes)
    _prepared.clear()


def _load_with_sums(load: Callable[[], object]) -> None:
    """Load the program. A server that it starts may be asked for the metrics while it loads."""
    prometheus_multiproc.directory.sum_in_worker()
    load()


def _on_worker_reaped(_arbiter: Any, worker: Any) -> None:
    prometheus_multiproc.directory.on_worker_exit(worker.pid)
    broker = fork_handlers.current_broker()
    if broker is not None:
        broker.on_worker_reaped(worker.age)


def _finish(_arbiter: Any) -> None:
    broker = fork_handlers.current_broker()
    if broker is not None:
        broker.finish()
    prometheus_multiproc.directory.finish()


def _export_upgrade_state(_arbiter: Any) -> None:
    broker = fork_handlers.parent_broker()
    if broker is None:
        return
    arbiter = broker.arbiter
    # systemd's protocol has gunicorn's own sockets at 3 and above
    lowest = 3 + len(arbiter.LISTENERS)
    try:
        state = broker.export_upgrade_state(lowest)
        state["daemons"] = [entry for daemons in _daemons for entry in daemons.export_state(lowest)]
        upgrade_state.export(arbiter.cfg.env_orig, lowest, state)
    except OSError as error:
        arbiter.log.error(
            "gunicorn-passenger: the new master cannot be told which servers the program has opened (%s); it "
            "keeps their ports as if they were in bind, and opens the daemons' sockets again. Raise the "
            "limit on open files (ulimit -n)",
            error,
        )
    broker.sync.number_for_systemd()
