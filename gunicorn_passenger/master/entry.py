"""Where the arbiter meets the broker.

Runs in: the master, called from the worker class (which gunicorn instantiates before each fork)
and from gunicorn's hooks. Must never: let a failure of the broker stop gunicorn.
"""

from __future__ import annotations

import os
from typing import Any

from gunicorn.errors import HaltServer

from gunicorn_passenger import hooks, sockets
from gunicorn_passenger.address import format_sockname, is_unix
from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.master import forks
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.control import Control
from gunicorn_passenger.settings import settings

#: gunicorn's exit status for a configuration that cannot be used.
_CONFIG_ERROR = 1


def attach(cfg: Any) -> None:
    """Take the places in gunicorn's hooks that the broker needs; the user's own hooks stay."""
    hooks.before(cfg, "when_ready", _know_arbiter)
    hooks.after(cfg, "pre_fork", _arm)
    hooks.before(cfg, "child_exit", _reaped)
    hooks.after(cfg, "pre_exec", _handover)
    hooks.before(cfg, "on_exit", _finish)


def prepare_worker(age: int, listening: list[Any], cfg: Any, log: Any) -> tuple[Any, Any, list[Any]]:
    """Before the fork of a worker: its channel, and the listeners of the primary.

    :returns: the worker's end of its channel, or ``None`` where the broker has failed; its board, or
        ``None``; and the gunicorn listeners that the primary is served on.
    :raises HaltServer: at the start, when a setting cannot be used.
    """
    attach(cfg)
    settings.program_paused()
    first = forks.current() is None
    try:
        broker = forks.current() or _start(listening, cfg, log)
        _configure(broker, cfg, log, first)
        channel, board = broker.prepare(age, listening)
    except (OSError, RuntimeError) as error:
        log.error(
            "gunicorn-passenger: the port broker failed (%s): the primary is served, ports asked for "
            "with listen() are not",
            error,
        )
        return None, None, Broker.primary_of(listening)
    return channel, board, broker.primary_of(listening)


def _start(listening: list[Any], cfg: Any, log: Any) -> Broker:
    broker = Broker(log, listening, cfg)
    broker.arbiter = _known[0] if _known else None
    forks.install(broker)
    control = Control(broker)
    control.open()
    broker.add(control)
    broker.watch_reports = control.watch_reports
    _explain(listening, broker, log, cfg)
    return broker


def _configure(broker: Broker, cfg: Any, log: Any, first: bool) -> None:
    """Give the broker the settings of the start, or of a reload."""
    if broker.cfg is cfg and not first:
        return
    try:
        settings.check_environment()
        allotment = settings.operator_allotment(cfg.uid)
        grace = settings.grace_period()
    except SettingError as error:
        if first:
            raise HaltServer(str(error), _CONFIG_ERROR) from None
        log.error("gunicorn-passenger: %s; the settings of before stay in force", error)
        allotment, grace = broker.allotment, broker.grace
    for sentence in allotment.widening():
        log.warning("gunicorn-passenger: %s", sentence)
    broker.configure(cfg, allotment, grace)


def _explain(listening: list[Any], broker: Broker, log: Any, cfg: Any) -> None:
    """Say at the start what a reader of the log may not expect."""
    primary = broker.primary_of(listening)
    ours = {sockets.sockname(listener.sock) for listener in listening if listener.sock is not None}
    for address in sorted(format_sockname(n) for n in sockets.listening_here().values() if n not in ours):
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


def _know_arbiter(arbiter: Any) -> None:
    _known[:] = [arbiter]
    broker = forks.current()
    if broker is not None:
        broker.arbiter = arbiter


def _arm(arbiter: Any, _worker: Any) -> None:
    broker = forks.current()
    if broker is not None:
        broker.arbiter = arbiter
        broker.arm()


def _reaped(_arbiter: Any, worker: Any) -> None:
    broker = forks.current()
    if broker is not None:
        broker.reaped(worker.age)


def _finish(_arbiter: Any) -> None:
    broker = forks.current()
    if broker is not None:
        broker.finish()


def _handover(_arbiter: Any) -> None:
    broker = forks.retired()
    if broker is not None:
        broker.handover()
