"""A worker of a class other than ours: the program's servers get the master's sockets, and drain.

Process: a worker of another class, from its ``post_fork`` on.
Never: import gevent before there is a server of ours, change how gunicorn's class serves the primary (except
that it gives up a bind that a server of the program has claimed), or cost a worker that opens no port a
thread.
"""

from __future__ import annotations

import _socket
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.arbiter import fork_handlers
from gunicorn_passenger.config.address import format_sockname, is_unix
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import BrokerUnavailable, PassengerError
from gunicorn_passenger.interposition import replaced_methods
from gunicorn_passenger.interposition.socket_options import unreachable_listener
from gunicorn_passenger.ipc.scoreboard import Scoreboard
from gunicorn_passenger.master.listener_sync import primary_among
from gunicorn_passenger.master.owned_listener import BrokerOwnedListener
from gunicorn_passenger.serving import events
from gunicorn_passenger.serving.background_work import do_not_wait_for_threads, finish_background_work
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.serving.finish import ThirdPartyDrainable, finish_connections
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.scheduler import Scheduler, ThreadScheduler
from gunicorn_passenger.serving.server import default_name
from gunicorn_passenger.serving.server_errors import with_program_line
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.import_watch import imported

if TYPE_CHECKING:
    from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler

#: Seconds that a worker which cannot boot waits for gunicorn to stop it.
_STOP_WAIT = 2.0


def enter(
    worker: Any,
    listening: list[Any],
    channel: _socket.socket | None,
    scoreboard: Scoreboard | None,
    inherited: set[int],
) -> None:
    """Connect a worker that was just forked to the broker.

    :param worker: gunicorn's worker object.
    :param listening: the arbiter's listeners.
    :param channel: the worker's end of its channel, or ``None`` where the broker has failed.
    :param inherited: inodes of the sockets on which the master listened at the fork.
    """
    owned = [listener for listener in listening if isinstance(listener, BrokerOwnedListener)]
    # a server of the program does not get its port from here, but from the master
    worker.sockets = [listener for listener in worker.sockets if listener not in owned]
    for listener in owned:
        listener.close_now()
    settings.enter_program_scope()
    HookedWorker(worker, channel, scoreboard, inherited).replace_methods()


class HookedWorker:
    """gunicorn's worker object, and what the package adds to its life.

    The hooks of gunicorn.conf.py get it as the worker for a request to a server of ours; it has all that
    gunicorn's object has.
    """

    # what a server of ours uses of a worker: its requests do not count for max_requests
    nr = 0
    max_requests = sys.maxsize

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
        self._init_signals = worker.init_signals
        #: what gunicorn's class does on SIGTERM, while it boots
        self._on_sigterm: Any = None
        #: whether it was told to stop while it booted
        self._stopped_in_boot = False
        #: whether gunicorn has told it to stop since
        self._told_to_stop = False
        #: whether the program is loaded, and its servers accept
        self._running = False
        #: whether it exits without a drain
        self._quitting = False
        #: held by the thread that begins the drain
        self._draining = unpatched.lock()
        #: when the graceful timeout is over (monotonic seconds); set when the worker begins to drain
        self._deadline = 0.0
        #: the hub of the thread that runs gunicorn's loop, once that has ended, if the program has one there
        self._main_hub: GeventScheduler | None = None
        self._threads_at_start: set[threading.Thread] = set()
        self._is_gevent = _is_gevent(worker)
        self._scheduler: Scheduler = (
            _gevent_scheduler()
            if self._is_gevent
            else ThreadScheduler(self.log, self._tick, _gevent_scheduler)
        )
        #: set when all servers have stopped accepting
        self._drain_begun = self._scheduler.result()
        self._broker = BrokerClient(channel, self.log, self._scheduler)
        self._broker.on_bind_claimed = partial(_log_late_claim, self.log)
        registry.run_as_worker(self, self._broker, is_patched=self._is_gevent, primary_elsewhere=True)
        registry.acceptors.seat = scoreboard.seat if scoreboard is not None else None
        os.register_at_fork(after_in_child=registry.acceptors.leave_to_parent)
        self._patch = replaced_methods.install(registry, inherited)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    # --- what the package's own worker class has, too ---------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether connections to the servers of ours are kept after a response."""
        return bool(self._worker.alive) and not self._draining.locked()

    def primary_descriptors(self) -> set[int]:
        """Those of gunicorn's binds: they belong to its class, even where a server has the same socket."""
        found = set()
        for sock in self._worker.sockets:
            # gunicorn's object has no socket once its class has closed it
            with suppress(AttributeError):
                found.add(sock.fileno())
        return found

    def primary_name(self) -> None:
        """No address: no server of the program is the primary here."""

    def retire(self) -> None:
        """Leave as a worker does that gunicorn stops, so that gunicorn starts another one in its place."""
        os.kill(self.pid, signal.SIGTERM)

    # --- the worker's life -------------------------------------------------------------------------

    def replace_methods(self) -> None:
        """Learn when gunicorn boots the worker, runs its loop, and tells it to stop."""
        self._worker.init_process = self.init_process
        self._worker.init_signals = self.init_signals
        self._worker.run = self.run
        handlers = {"handle_exit": self._on_stop, "handle_quit": self._on_quit, "handle_abort": self._on_quit}
        for name, ours in handlers.items():
            for known in (name, f"{name}_signal"):
                if (handle := getattr(self._worker, known, None)) is not None:
                    setattr(self._worker, known, partial(ours, handle))

    def _on_stop(self, handle: Callable[..., None], *args: Any) -> None:
        """A signal handler: the thread of the ports does what may wait."""
        self._told_to_stop = True
        if self._has_ports():
            self._scheduler.spawn(self._begin_drain)
        handle(*args)

    def _on_quit(self, handle: Callable[..., None], *args: Any) -> None:
        """A signal handler: gunicorn stops the worker at once, or its timeout does."""
        self._quitting = True
        if _is_in_hub() and not self._is_gevent:
            # gunicorn's handler sleeps, and the hub must not
            gevent: Any = sys.modules["gevent"]
            gevent.spawn(handle, *args)
        else:
            handle(*args)

    def init_process(self) -> None:
        """Boot the worker, and run it.

        :raises SystemExit: when it cannot boot because gunicorn stops: with another status the master would
            end with a traceback.
        :raises Exception: as gunicorn's own method does.
        """
        try:
            self._init_process()
        except SystemExit:
            fork_handlers.leave_boot()
            if not self._worker.booted and self._has_ports():
                do_not_wait_for_threads()
            raise
        except Exception as error:
            if self._has_ports():
                do_not_wait_for_threads()
            # also a plain OSError: the port of an unmodified server may be a leaving sibling's still
            if self._worker.booted or not self._is_superfluous(error):
                raise
            deadline = monotonic() + _STOP_WAIT
            while self._worker.alive and monotonic() < deadline:
                self._worker.notify()
                self._scheduler.sleep(0.1)
            sys.exit(0)

    def _is_superfluous(self, error: Exception) -> bool:
        """Whether gunicorn stops in any case, as the master says."""
        try:
            return self._broker.report_boot_failure(with_program_line(error)).action == "wait"
        except BrokerUnavailable:
            return False

    def init_signals(self) -> None:
        """Note a stop until gunicorn's loop runs: a loop that does not run yet may lose it, as uvloop's does.

        :raises SystemExit: when the worker was told to stop before.
        """
        if fork_handlers.stop_requested():
            sys.exit(0)
        self._init_signals()
        self._on_sigterm = signal.signal(signal.SIGTERM, self._on_stop_in_boot)

    def _on_stop_in_boot(self, _number: int, _frame: Any) -> None:
        self._stopped_in_boot = True

    def run(self) -> None:
        """Run gunicorn's loop, which serves the primary; then finish the other servers' connections."""
        self._threads_at_start = set(threading.enumerate())
        if not self._stopped_in_boot:
            self._start()
        if self._on_sigterm is not None:
            default = self._on_sigterm is signal.SIG_DFL
            signal.signal(signal.SIGTERM, _leave if default else self._on_sigterm)
        try:
            if not self._stopped_in_boot:
                self._run()
        finally:
            if os.getpid() == self.pid:
                self._finish()

    def _start(self) -> None:
        self._running = True
        try:
            registry.start()
        except PassengerError:
            self._worker.booted = False  # gunicorn halts, as for a program that it cannot load
            raise
        self._give_up_binds()
        name = default_name(getattr(self._worker, "wsgi", None))
        self._broker.announce_ready(name, serves_primary=False)
        if settings.sticky(is_primary=True) != settings.default_sticky:
            self.log.warning(
                "gunicorn-passenger: configure(sticky=%r) has no effect: under the worker class %r gunicorn "
                "serves the primary; give the option to a server of create_server(), or use "
                "-k gunicorn_passenger.Worker",
                settings.sticky(is_primary=True),
                self._worker.cfg.worker_class_str,
            )
        events.emit("ready", self._worker, self.log)
        if self._is_gevent:
            self._scheduler.start_task(self._tick_forever)

    def _give_up_binds(self) -> None:
        """gunicorn's class does not serve the primary on the binds that a server of the program has."""
        if len(self._worker.sockets) < 2:
            return  # the only one is the primary's
        names = [sock.getsockname() for sock in self._worker.sockets]
        primary = primary_among([is_unix(name) for name in names])
        given = [
            sock
            for sock, name, keeps in zip(self._worker.sockets, names, primary, strict=True)
            if not keeps and not self._broker.keep_bind(format_sockname(name), for_good=True)
        ]
        if not given:
            return
        self._worker.sockets = [sock for sock in self._worker.sockets if sock not in given]
        self._worker.wait_fds = [*self._worker.sockets, *self._worker.PIPE[:1]]
        with closing(unreachable_listener()) as unreachable:
            for sock in given:
                # not closed: the arbiter's list has the same descriptor in an object of its own
                os.dup2(unreachable.fileno(), sock.fileno(), inheritable=False)

    def _has_ports(self) -> bool:
        """Whether the program has opened a port."""
        return self._patch.leased.used or bool(registry.servers)

    def _tick_forever(self) -> None:
        while True:
            self._scheduler.sleep(1.0)
            self._tick()

    def _tick(self) -> None:
        """Called once a second in a thread of its own, if the program has opened a port."""
        if os.getpid() != self.pid:
            return
        self._patch.reap_closed_fds()
        self._write_counts()
        if self._told_to_stop:
            # tornado's class forgets a stop that comes before its loop runs
            self._worker.alive = False
        if self._running and (not self._worker.alive or _uvicorn_stops()):
            self._begin_drain()

    def _write_counts(self) -> None:
        if self._scoreboard is not None:
            registry.acceptors.write_counts(self._scoreboard)
            self._patch.leased.write_counts(self._scoreboard)

    def _begin_drain(self) -> None:
        """Stop accepting on the program's ports. gunicorn's class does the same for the primary."""
        if not self._draining.acquire(False):
            return
        try:
            self._deadline = monotonic() + self.cfg.graceful_timeout
            registry.stop_accepting()
            self._patch.stop_accepting()
            self._broker.announce_exit()
            registry.acceptors.finish()
            if registry.migration is not None:
                migrate = registry.migration.migrate_idle_connections
                self._scheduler.spawn(migrate, max(float(self.cfg.keepalive), 1.0))
        finally:
            self._drain_begun.set(None)

    def _finish(self) -> None:
        """gunicorn's loop has ended."""
        if not self._is_gevent and _has_hub():
            # the program had gevent patch it: its servers and threads are greenlets of this thread
            self._main_hub = _gevent_scheduler()
        has_ports = self._has_ports()
        # gunicorn repeats its stop signal every second, and an event loop that has closed leaves the
        # signal its default action: the end of the process
        signal.signal(signal.SIGTERM, _ignore)
        if has_ports and not self._quitting:
            self._await(self._begin_draining)
            self._finish_connections()
        if self._running:
            events.emit("exit", self._worker, self.log)
        if has_ports and not self._quitting:
            finish_background_work(
                self._deadline - monotonic(),
                self.log,
                self._main_hub or self._scheduler,
                self._worker.notify,
                self._threads_at_start | self._patch.server_threads(),
            )
        if has_ports:
            do_not_wait_for_threads()

    def _await(self, function: Callable[[], object]) -> None:
        """Call a function that waits; the greenlets of this thread, if it has any, run meanwhile."""
        if self._main_hub is None:
            function()
        else:
            self._main_hub.run_beside(function)

    def _begin_draining(self) -> None:
        self._scheduler.run(self._begin_drain)
        self._drain_begun.wait()

    def _finish_connections(self) -> None:
        if not self._is_gevent:
            # gunicorn's loop has ended, and with it an asyncio server of the program in this thread
            self._patch.leased.connections.forget_those_of_this_thread()
        finish = partial(
            finish_connections,
            registry,
            self._deadline - monotonic(),
            self.log,
            self._scheduler.sleep,
            self._on_drain_tick,
            self._patch if self._main_hub is None else _DrainedInHub(self._patch, self._main_hub),
            float(self.cfg.keepalive),
            registry.acceptors.leave_mailbox,
        )
        self._await(partial(self._scheduler.run, finish))
        self._scheduler.run(self._write_counts)

    def _on_drain_tick(self) -> None:
        self._worker.notify()
        self._write_counts()


class _DrainedInHub:
    """The third-party servers of a thread with a hub, for another thread that waits for their connections."""

    def __init__(self, servers: ThirdPartyDrainable, hub: GeventScheduler) -> None:
        self.idle = servers.idle
        self._servers, self._hub = servers, hub

    def shutdown_idle_connections(self) -> None:
        """End the connections that wait for a request."""
        self._hub.run(self._servers.shutdown_idle_connections)


def _log_late_claim(log: Any, key: str) -> None:
    """The master did not respond before gunicorn's loop began, and a server has the bind."""
    log.error(
        "gunicorn-passenger: the primary and a server of the program both accept on %s, because the master "
        "responded too late. A client may reach either of them; reload gunicorn (pid:%s)",
        key,
        os.getpid(),
    )


def _leave(_number: int, _frame: Any) -> None:
    """The signal handler in place of the default action, which would end the process with all connections.

    uvicorn has a handler of its own while it serves. A signal may come before that, and when uvicorn has
    drained it raises the signal again.

    :raises SystemExit: so that gunicorn's loop, which does not serve now, ends.
    """
    signal.signal(signal.SIGTERM, _ignore)
    raise SystemExit(0)


def _ignore(_number: int, _frame: Any) -> None:
    """A signal handler, since children of the worker would inherit ``SIG_IGN``."""


def _is_gevent(worker: Any) -> bool:
    """Whether the worker's class is one of gunicorn's gevent classes, or made from one."""
    return any(kind.__module__ == "gunicorn.workers.ggevent" for kind in type(worker).__mro__)


def _has_hub() -> bool:
    """Whether this thread has a hub of gevent's, and with it greenlets that run while it waits."""
    return _own_hub() is not None


def _is_in_hub() -> bool:
    """Whether this code runs in the hub itself, which must not wait."""
    hub = _own_hub()
    return hub is not None and sys.modules["greenlet"].getcurrent() is hub


def _own_hub() -> Any:
    """The hub of this thread, if it has one."""
    hubs = imported("gevent._hub_local")
    return None if hubs is None else hubs.get_hub_if_exists()


def _gevent_scheduler() -> GeventScheduler:
    """Made in the thread that runs the hub."""
    from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler

    return GeventScheduler()


def _uvicorn_stops() -> bool:
    """Whether uvicorn's server, which handles the signals of its worker class, was told to stop."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return bool(getattr(server, "should_exit", False))
