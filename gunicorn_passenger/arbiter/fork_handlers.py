"""The broker of this process, and what happens to it around a fork.

Runs in: the master, in the thread that forks, and for a moment in each child of it.
Must never: keep a fork waiting without a bound, or leave anything of the master's open in a child.
"""

from __future__ import annotations

import os
import signal
from threading import get_ident
from typing import Any

from gunicorn_passenger.master.broker import Broker

_brokers: list[Broker] = []
_retired: list[Broker] = []
_hooked: list[bool] = []
_told: list[bool] = []
#: the signals that a thread had blocked before the fork that it is in
_masks: dict[int, Any] = {}

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def current_broker() -> Broker | None:
    """The broker of this process, if it is a master that has one."""
    return _brokers[0] if _brokers else None


def parent_broker() -> Broker | None:
    """The broker of the master that this process was forked from."""
    return _retired[0] if _retired else None


def install(broker: Broker) -> None:
    """Make ``broker`` the one of this process, and guard its forks from now on."""
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
        )
    _brokers[:] = [broker]


def _before_fork() -> None:
    # a stop that reaches a child before it has said what to do with one waits until then
    _masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    for broker in _brokers:
        broker.loop.before_fork()


def _after_in_parent() -> None:
    for broker in _brokers:
        broker.after_fork_in_parent()
    _unblock()


def _after_in_child() -> None:
    worker = any(broker.after_fork_in_child() for broker in _brokers)
    # the arbiter's reexec child still asks its broker what to hand over
    _retired[:] = _brokers
    _brokers.clear()
    if worker:
        _handle_stops(_note)
    _unblock()
    if worker:
        _handle_stops(_exit)


def _unblock() -> None:
    mask = _masks.pop(get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _handle_stops(handler: Any) -> None:
    """A worker that is told to stop while it boots goes at once.

    Until it has set its own handlers it has the arbiter's, which only put the signal into a queue
    that nobody reads in a child: the stop would be lost, and gunicorn wait for its timeout.
    """
    for number in _STOPS:
        signal.signal(number, handler)


def _note(_number: int, _frame: Any) -> None:
    # what is raised inside a fork Python shows and ignores
    _told.append(True)


def _exit(_number: int, frame: Any) -> None:
    _told.append(True)
    ignore_further_stops()
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            # Python would show the exception, and ignore it: the worker leaves when it has booted
            return
        frame = frame.f_back
    raise SystemExit(0)


def ignore_further_stops() -> None:
    """A worker that leaves hears of no further stop: a Ctrl-C comes from the terminal and from the master."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def stop_requested() -> bool:
    """Whether this worker was told to stop while it booted; an import may have swallowed the exit."""
    return bool(_told)
