"""The broker of this process, and what happens to it around a fork.

Process: the master, in the thread that forks, and for a moment in each child of it. Never: keep a fork
waiting without a bound, or leave anything of the master's open in a child.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
from threading import get_ident
from types import CodeType
from typing import Any

from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.system import log_locks
from gunicorn_passenger.system.callers import frames
from gunicorn_passenger.system.import_watch import imported

_current: list[Broker] = []
_parent: list[Broker] = []
_hooked: list[bool] = []
_stops: list[bool] = []
#: the greenlets that load the program, beside the main one
_loading: list[Any] = []
#: the callbacks of gevent's loop that are about to interrupt the start
_interruptions: list[Any] = []
#: whether the garbage collector leaves the master's objects alone until a fork is over
_frozen: list[bool] = []
#: the signals that a thread had blocked before the fork that it is in
_masks: dict[int, Any] = {}

#: Seconds that the interpreter of a worker has to end, once the worker was told to stop while it boots.
_EXIT_SECONDS = 10
#: The signals on which gunicorn stops a worker.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def current_broker() -> Broker | None:
    """The broker of this process, if it is a master that has one."""
    return _current[0] if _current else None


def parent_broker() -> Broker | None:
    """The broker of the master that this process was forked from."""
    return _parent[0] if _parent else None


def install(broker: Broker) -> None:
    """Make ``broker`` the one of this process, and guard its forks from now on."""
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
        )
    _current[:] = [broker]


def freeze_until_forked() -> None:
    """Have the garbage collector of the worker that is forked next leave the master's objects alone.

    A collection would write to the memory that it shares with the master, and the system would copy it. Not
    for the worker classes of others: eventlet looks for locks among the collector's objects, and gevent for
    what was imported before it has patched.
    """
    if not gc.get_freeze_count():  # otherwise the program has done this itself
        _frozen.append(True)
        gc.freeze()


def _before_fork() -> None:
    # a stop signal that reaches a child before it has installed its handlers waits until then
    _masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    for broker in _current:
        broker.loop.before_fork()


def _after_in_parent() -> None:
    if _frozen:
        _frozen.clear()
        gc.unfreeze()
    for broker in _current:
        broker.after_fork_in_parent()
    _unblock()


def _after_in_child() -> None:
    worker = any(broker.after_fork_in_child() for broker in _current)
    # the arbiter's reexec child still exports the state of its broker
    _parent[:] = _current
    _current.clear()
    _frozen.clear()
    if worker:
        log_locks.leave_to_greenlets()
        _handle_stops(_record_stop)
    _unblock()
    if worker:
        _handle_stops(exit_boot)


def _unblock() -> None:
    mask = _masks.pop(get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _handle_stops(handler: Any) -> None:
    """A worker that is told to stop while it boots exits at once.

    Until it has set its own handlers it has the arbiter's, which only put the signal into a queue
    that no code reads in a child: the stop would be lost, and gunicorn would wait for its timeout.
    """
    for number in STOPS:
        signal.signal(number, handler)


def _record_stop(_number: int, _frame: Any) -> None:
    # Python prints and ignores an exception that is raised inside a fork
    _stops.append(True)


def exit_boot(_number: int, frame: Any) -> None:
    """The signal handler of a worker that boots; the import of a large program may take long.

    Where Python would print and ignore the exception, the worker exits when it has booted instead. A server
    of the program may accept already, so Python may be in the greenlet of a request: that is finished, and
    the greenlet that boots is interrupted.

    :raises SystemExit: wherever else Python runs now.
    """
    _stops.append(True)
    ignore_further_stops()
    limit_exit(0.0)
    hub = _hub_of_another_greenlet()
    if hub is not None:
        _interruptions.append(hub.loop.run_callback(hub.parent.throw, SystemExit(0)))
        return
    if not any(_ignores_exceptions(outer.f_code) for outer in frames(frame)):
        raise SystemExit(0)


def load_in_this_greenlet() -> None:
    """The program is loaded in this greenlet, so a stop may interrupt it."""
    _loading.append(sys.modules["greenlet"].getcurrent())


def leave_boot() -> None:
    """The worker leaves because it was told to stop; from here on a stop does not interrupt it."""
    for callback in _interruptions:
        callback.stop()
    _interruptions.clear()


def _hub_of_another_greenlet() -> Any:
    """gevent's hub, if Python runs in it or in one of its greenlets, and not where the worker boots."""
    module = imported("gevent.hub")
    if module is None:
        return None
    greenlet = sys.modules["greenlet"].getcurrent()
    if greenlet in _loading:
        return None
    while greenlet is not None and not isinstance(greenlet, module.Hub):
        greenlet = greenlet.parent
    return greenlet


def limit_exit(seconds: float) -> None:
    """Have the system end this worker if it has not exited in time.

    gunicorn's timeout does not apply before the first heartbeat, and what the import has left behind (a
    callback at exit, a thread, a lock that is held) may never let the interpreter end.

    :param seconds: that its connections may take; the interpreter has some seconds more.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_EXIT_SECONDS + math.ceil(seconds))


def _ignores_exceptions(code: CodeType) -> bool:
    """Whether Python ignores exceptions there: in finalizers, and where it forgets an import's lock."""
    return code.co_name == "__del__" or (
        code.co_name == "cb" and code.co_filename == "<frozen importlib._bootstrap>"
    )


def ignore_further_stops() -> None:
    """A worker that exits ignores further stops: a Ctrl-C comes from the terminal and from the master."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def stop_requested() -> bool:
    """Whether this worker was told to stop while it booted; the program may have caught the exception."""
    return bool(_stops)
