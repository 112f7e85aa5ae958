"""Where the arbiter meets the broker.

Runs in: the master, called from the worker class (which gunicorn instantiates before each fork)
and from gunicorn's hooks. Must never: let a failure of the broker stop gunicorn.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from gunicorn.errors import HaltServer

from gunicorn_passenger.arbiter import fork_handlers, hook_chain
from gunicorn_passenger.config.address import format_sockname, is_unix
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.daemons.manager import DaemonManager
from gunicorn_passenger.daemons.requested import requested_daemons
from gunicorn_passenger.errors import PassengerError, SettingError
from gunicorn_passenger.master import upgrade_state
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.listener_sync import primary_listeners
from gunicorn_passenger.status import prometheus_multiproc, report
from gunicorn_passenger.status.control_server import ControlServer
from gunicorn_passenger.system import listening_sockets
from gunicorn_passenger.system.text import escape_error_log

#: gunicorn's exit status for a configuration that cannot be used.
_CONFIG_ERROR = 1


def install_hooks(cfg: Any) -> None:
    """Take the places in gunicorn's hooks that the broker needs; the user's own hooks stay."""
    hook_chain.before(cfg, "when_ready", _ready)
    hook_chain.before(cfg, "on_reload", _reloaded)
    hook_chain.after(cfg, "pre_fork", _arm)
    hook_chain.before(cfg, "child_exit", _reaped)
    hook_chain.after(cfg, "pre_exec", _handover)
    hook_chain.before(cfg, "on_exit", _finish)


def prepare_worker(age: int, listening: list[Any], cfg: Any, log: Any) -> tuple[Any, Any, list[Any]]:
    """Before the fork of a worker: its channel, and the listeners of the primary.

    :returns: the worker's end of its channel, or ``None`` where the broker has failed; its board, or
        ``None``; and the gunicorn listeners that the primary is served on.
    :raises HaltServer: at the start, when a setting cannot be used.
    """
    install_hooks(cfg)
    settings.leave_program_scope()
    first = fork_handlers.current_broker() is None
    try:
        broker = fork_handlers.current_broker() or _start(listening, cfg, log)
        again = broker.cfg is not cfg
        _configure(broker, cfg, log, first)
        if first:
            _begin(broker)
        elif again:
            # a reload, whose configuration has become ours just now
            _tell_reload(broker)
        channel, board = broker.prepare_worker(age, listening)
    except (OSError, RuntimeError) as error:
        log.error(
            "gunicorn-passenger: the port broker failed (%s): the primary is served, ports asked for "
            "with listen() are not",
            error,
        )
        return None, None, primary_listeners(listening)
    return channel, board, primary_listeners(listening)


def _start(listening: list[Any], cfg: Any, log: Any, channels: bool = True) -> Broker:
    """:param channels: whether the workers are ours, and so have channels; else there are daemons alone."""
    broker = Broker(log, listening if channels else [], cfg, report.build, channels)
    escape_error_log(log)
    broker.arbiter = _known[0] if _known else None
    fork_handlers.install(broker)
    control = ControlServer(broker)
    control.open()
    broker.loop.add(control)
    _daemons[:] = [DaemonManager(broker, prometheus_multiproc.directory.environment)]
    broker.loop.add(_daemons[0])
    if channels:
        _explain(listening, broker, log, cfg)
    return broker


def _begin(broker: Broker) -> None:
    """The master is ready, and the broker has its settings.

    :raises HaltServer: when a daemon that gunicorn.conf.py asks for cannot be had.
    """
    try:
        with broker.locked():
            for service in broker.loop.services:
                service.started(broker.arbiter)
    except PassengerError as error:
        raise HaltServer(str(error), _CONFIG_ERROR) from None


def _configure(broker: Broker, cfg: Any, log: Any, first: bool) -> None:
    """Give the broker the settings of the start, or of a reload."""
    if broker.cfg is cfg and not first:
        return
    try:
        settings.check_environment()
        allocation = settings.operator_allocation(cfg.uid)
        grace = settings.grace_period()
    except SettingError as error:
        if first:
            raise HaltServer(str(error), _CONFIG_ERROR) from None
        log.error("gunicorn-passenger: %s; the settings of before stay in force", error)
        allocation, grace = broker.allocation, broker.grace
    for sentence in allocation.ineffective_ports():
        log.warning("gunicorn-passenger: %s", sentence)
    broker.configure(cfg, allocation, grace)
    prometheus_multiproc.directory.give(cfg, log)


def _explain(listening: list[Any], broker: Broker, log: Any, cfg: Any) -> None:
    """Say at the start what a reader of the log may not expect."""
    primary = primary_listeners(listening)
    ours = {listening_sockets.sockname(listener.sock) for listener in listening if listener.sock is not None}
    ours |= {name for daemons in _daemons for name in daemons.inherited()}
    for address in sorted(
        format_sockname(n) for n in listening_sockets.own_listeners().values() if n not in ours
    ):
        log.warning(
            "%s was opened in the master, by a server that the program starts while it is preloaded: its "
            "threads stay in the master, and workers serve it only as far as it is gevent's. Open it in "
            "post_worker_init or with passenger.create_server(), or leave --preload out",
            address,
        )
    for listener in primary:
        name = listener.getsockname()
        if not is_unix(name):
            log.info("The primary is served on %s, the first bind: bind names no UNIX socket", listener)
        elif isinstance(name, str) and name and not name.startswith("\0"):
            _warn_if_open_to_all(name, log, cfg)


def _warn_if_open_to_all(path: str, log: Any, cfg: Any) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if mode & 0o002 and _reachable_by_all(path):
        log.warning(
            "Everybody on this machine may connect to unix:%s (its mode is %04o): set gunicorn's umask "
            "(--umask 007, now %03o) so that only the web server's group may",
            path,
            mode & 0o7777,
            cfg.umask,
        )


def _reachable_by_all(path: str) -> bool:
    """Whether every directory above the socket lets everybody through."""
    directory = os.path.dirname(os.path.abspath(path))
    while True:
        if not os.stat(directory).st_mode & 0o001:
            return False
        if directory == os.path.dirname(directory):
            return True
        directory = os.path.dirname(directory)


_known: list[Any] = []
#: the daemons of this master, or in a child of it those of the master that it was forked from
_daemons: list[DaemonManager] = []


def install_hooks_for_other_workers(arbiter: Any) -> bool:
    """Take the places in gunicorn's hooks, with whatever worker class (see :mod:`gunicorn_passenger.hooks`).

    :returns: whether they were not taken yet.
    """
    if getattr(arbiter.cfg.when_ready, "_passenger", False):
        return False
    if not _workers_are_ours(arbiter):
        settings.config_file_loaded()
        prometheus_multiproc.directory.prepare()
    install_hooks(arbiter.cfg)
    return True


def _workers_are_ours(arbiter: Any) -> bool:
    worker: Any = sys.modules.get("gunicorn_passenger.worker")
    return worker is not None and issubclass(arbiter.worker_class, worker.Worker)


def ready(arbiter: Any) -> None:
    """gunicorn is ready, and starts its workers next."""
    _ready(arbiter)


def reloaded(arbiter: Any) -> None:
    """gunicorn has read its configuration again, and starts new workers next."""
    _reloaded(arbiter)


def _ready(arbiter: Any) -> None:
    _know_arbiter(arbiter)
    prometheus_multiproc.directory.give(arbiter.cfg, arbiter.log)
    settings.leave_program_scope()
    requested_daemons.handled = True
    requested_daemons.commit_config()
    upgrade_state.forget(arbiter.cfg)
    if requested_daemons.pending or upgrade_state.inherited().get("daemons"):
        _attend(arbiter)


def _attend(arbiter: Any) -> None:
    """Have a broker for the daemons that the master's own code asks for, before the first worker asks."""
    try:
        broker = _start(arbiter.LISTENERS, arbiter.cfg, arbiter.log, _workers_are_ours(arbiter))
        _configure(broker, arbiter.cfg, arbiter.log, True)
        _begin(broker)
    except HaltServer as halt:
        # gunicorn looks out for it only when it is beyond its start
        arbiter.halt(reason=halt.reason, exit_status=halt.exit_status)
    except (OSError, RuntimeError) as error:
        arbiter.log.error("gunicorn-passenger: the daemons cannot be started (%s)", error)


def _reloaded(arbiter: Any) -> None:
    settings.leave_program_scope()
    broker = fork_handlers.current_broker()
    if broker is None:
        requested_daemons.commit_config()
        return
    try:
        _configure(broker, arbiter.cfg, arbiter.log, False)
        _tell_reload(broker)
    except (OSError, RuntimeError) as error:
        arbiter.log.error("gunicorn-passenger: the daemons do not hear of the reload (%s)", error)


def _tell_reload(broker: Broker) -> None:
    requested_daemons.commit_config()
    with broker.locked():
        for service in broker.loop.services:
            service.reloaded()


def _know_arbiter(arbiter: Any) -> None:
    _known[:] = [arbiter]
    broker = fork_handlers.current_broker()
    if broker is not None:
        broker.arbiter = arbiter


def _arm(arbiter: Any, _worker: Any) -> None:
    broker = fork_handlers.current_broker()
    if requested_daemons.pending:
        _refresh(arbiter, broker)
    if broker is not None:
        broker.arbiter = arbiter
        broker.workers.mark_forking()


def _refresh(arbiter: Any, broker: Broker | None) -> None:
    """One of the user's own hooks may have asked for a daemon since."""
    if broker is None:
        _attend(arbiter)
    elif _daemons:
        with suppress(TimeoutError), broker.locked():
            _daemons[0].refresh()


def _reaped(_arbiter: Any, worker: Any) -> None:
    prometheus_multiproc.directory.gone(worker.pid)
    broker = fork_handlers.current_broker()
    if broker is not None:
        broker.on_worker_reaped(worker.age)


def _finish(_arbiter: Any) -> None:
    broker = fork_handlers.current_broker()
    if broker is not None:
        broker.finish()
    prometheus_multiproc.directory.finish()


def _handover(_arbiter: Any) -> None:
    broker = fork_handlers.parent_broker()
    if broker is None:
        return
    arbiter = broker.arbiter
    # systemd's protocol has gunicorn's own sockets at 3 and above
    lowest = 3 + len(arbiter.LISTENERS)
    try:
        state = broker.export_upgrade_state(lowest)
        state["daemons"] = [entry for daemons in _daemons for entry in daemons.export_state(lowest)]
        upgrade_state.hand_over(arbiter.cfg.env_orig, lowest, state)
    except OSError as error:
        arbiter.log.error(
            "gunicorn-passenger: the next master does not learn which servers the program has opened (%s); "
            "it keeps their ports as if they were in bind, and opens the daemons' anew. Raise the limit of "
            "open files (ulimit -n)",
            error,
        )
    broker.sync.number_for_systemd()
