"""A worker of another class than ours: its unmodified servers get the master's sockets, and drain.

Process: a worker of another class, from its ``post_fork`` on.
Never: imports gevent, changes how gunicorn's class serves the primary, or costs a worker that opens no port a
thread.
"""

from __future__ import annotations

import _socket
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import BrokerUnavailable, PassengerError
from gunicorn_passenger.interposition import replaced_methods
from gunicorn_passenger.ipc.scoreboard import Scoreboard
from gunicorn_passenger.master.owned_listener import BrokerOwnedListener
from gunicorn_passenger.serving.background_work import do_not_wait_for_threads, finish_background_work
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.serving.finish import finish_connections
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.scheduler import Scheduler, ThreadScheduler
from gunicorn_passenger.serving.server import default_name
from gunicorn_passenger.system import listening_sockets, unpatched

#: Seconds that a worker which cannot boot waits for gunicorn to stop it.
_STOP_WAIT = 2.0


def enter(
    worker: Any, listening: list[Any], channel: _socket.socket | None, scoreboard: Scoreboard | None
) -> None:
    """Connect a worker that was just forked to the broker.

    :param worker: gunicorn's worker object.
    :param listening: the arbiter's listeners.
    :param channel: the worker's end of its channel, or ``None`` where the broker has failed.
    """
    inodes = set(listening_sockets.own_listeners())
    owned = [listener for listener in listening if isinstance(listener, BrokerOwnedListener)]
    # a server of the program does not get its port from here, but from the master
    worker.sockets = [listener for listener in worker.sockets if listener not in owned]
    for listener in owned:
        listener.close_now()
    settings.enter_program_scope()
    HookedWorker(worker, channel, scoreboard, inodes).replace_methods()


class HookedWorker:
    """gunicorn's worker object, and what the package adds to its life."""

    def __init__(
        self,
        worker: Any,
        channel: _socket.socket | None,
        scoreboard: Scoreboard | None,
        inherited: set[int],
    ) -> None:
        """:param inherited: inodes of the sockets on which the master listened at the fork."""
        self._worker = worker
        self.cfg, self.log, self.pid = worker.cfg, worker.log, worker.pid
        self._scoreboard = scoreboard
        self._init_process, self._run = worker.init_process, worker.run
        #: whether gunicorn's own loop runs, or has run
        self._running = False
        #: held by the thread that begins the drain
        self._draining = unpatched.lock()
        #: when the worker must have exited (monotonic seconds); set when it begins to drain
        self._deadline = 0.0
        self._threads_at_start: set[threading.Thread] = set()
        self._scheduler = ThreadScheduler(self.log, self._tick)
        self._broker = BrokerClient(channel, self.log, self._scheduler)
        registry.run_as_worker(self, self._broker, None)
        self._patch = replaced_methods.install(registry, inherited)

    # --- what the package's own worker class has, too ---------------------------------------------

    def primary_descriptors(self) -> set[int]:
        """No descriptor: gunicorn's class keeps the primary's listeners to itself."""
        return set()

    def primary_name(self) -> None:
        """No address: no server of the program is the primary here."""

    # --- the worker's life -------------------------------------------------------------------------

    def replace_methods(self) -> None:
        """Learn when gunicorn boots the worker, runs its loop, and tells it to stop."""
        self._worker.init_process = self.init_process
        self._worker.run = self.run
        for name in ("handle_exit", "handle_exit_signal"):
            if (handle := getattr(self._worker, name, None)) is not None:
                setattr(self._worker, name, partial(self._on_stop, handle))

    def _on_stop(self, handle: Callable[..., None], *args: Any) -> None:
        """A signal handler: the thread of the ports does what may wait."""
        if self._patch.leased.used:
            self._scheduler.spawn(self._begin_drain)
        handle(*args)

    def init_process(self) -> None:
        """Boot the worker, and run it.

        :raises SystemExit: when it cannot boot because gunicorn stops: with another status the master would
            end with a traceback.
        :raises Exception: as gunicorn's own method does.
        """
        try:
            self._init_process()
        except PassengerError as error:
            if self._worker.booted or not self._is_superfluous(error):
                raise
            deadline = monotonic() + _STOP_WAIT
            while self._worker.alive and monotonic() < deadline:
                self._worker.notify()
                self._scheduler.sleep(0.1)
            sys.exit(0)

    def _is_superfluous(self, error: PassengerError) -> bool:
        """Whether gunicorn stops in any case, as the master says."""
        try:
            return self._broker.report_boot_failure(str(error)).action == "wait"
        except BrokerUnavailable:
            return False

    def run(self) -> None:
        """Run gunicorn's loop, which serves the primary; then finish the other servers' connections."""
        self._threads_at_start = set(threading.enumerate())
        self._running = True
        registry.start()
        self._broker.announce_ready(default_name(getattr(self._worker, "wsgi", None)), False)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # uvicorn raises the signal again when it has drained, which would end the process here
            signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        self._run()
        if os.getpid() == self.pid and self._patch.leased.used:
            self._finish()

    def _tick(self) -> None:
        """Called once a second in a thread of its own, if the program has opened a port."""
        if os.getpid() != self.pid:
            return
        self._patch.reap_closed_fds()
        self._write_counts()
        if self._running and not self._worker.alive:
            self._begin_drain()

    def _write_counts(self) -> None:
        if self._scoreboard is not None:
            self._patch.write_counts(self._scoreboard)

    def _begin_drain(self) -> None:
        """Stop accepting on the program's ports. gunicorn's class does the same for the primary."""
        if not self._draining.acquire(False):
            return
        self._deadline = monotonic() + self.cfg.graceful_timeout
        registry.stop_accepting()
        self._patch.stop_accepting()
        self._broker.announce_exit()

    def _finish(self) -> None:
        self._begin_drain()
        scheduler: Scheduler = self._scheduler
        if _runs_gevent():
            from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler

            scheduler = GeventScheduler()
        else:
            # gunicorn's loop has ended, and with it an asyncio server of the program in this thread
            self._patch.leased.forget_connections_of_this_thread()
        finish_connections(
            registry,
            max(self._deadline - monotonic(), 0.0),
            self.log,
            scheduler.sleep,
            self._on_drain_tick,
            self._patch,
            float(self.cfg.keepalive),
        )
        self._write_counts()
        finish_background_work(
            # the master kills the worker at the deadline, and the log should say so before
            self._deadline - monotonic() - 0.5,
            self.log,
            scheduler,
            self._worker.notify,
            self._threads_at_start | self._patch.server_threads(),
        )
        do_not_wait_for_threads()

    def _on_drain_tick(self) -> None:
        self._worker.notify()
        self._write_counts()


def _runs_gevent() -> bool:
    """Whether the worker's class is one of gunicorn's gevent classes."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("time"))
