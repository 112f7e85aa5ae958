"""The gunicorn worker class: connects the master's port broker and the program's servers.

Process: the master (``setup``, ``check_config``, ``__init__``) and a worker (all other methods).
Never: open a port.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import logging
import os
import sys
import threading
import time
from typing import Any

import gevent
from gevent import hub, monkey
from gevent import socket as gsocket
from gevent.event import Event
from gunicorn.arbiter import Arbiter
from gunicorn.reloader import reloader_engines
from gunicorn.workers.ggevent import GeventWorker

# A program uses `http_proxy`, `status` and both `api` modules. The master imports them before it forks: the
# workers share their memory, and a worker that can open hardly any file cannot import anything.
from gunicorn_passenger import channels, errors, http_proxy, status  # noqa: F401
from gunicorn_passenger.arbiter import deployment_checks, fork_handlers, integration, program_import
from gunicorn_passenger.arbiter.null_heartbeat import NullHeartbeat
from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.daemons import api as daemons_api  # noqa: F401
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.interposition import pending_bind, replaced_methods
from gunicorn_passenger.ipc.messages import BootVerdict
from gunicorn_passenger.ipc.scoreboard import PRIMARY_SLOT
from gunicorn_passenger.master.owned_listener import BrokerOwnedListener
from gunicorn_passenger.serving import api as serving_api  # noqa: F401
from gunicorn_passenger.serving import (
    events,
    once,  # noqa: F401
)
from gunicorn_passenger.serving.background_work import do_not_wait_for_threads, finish_background_work
from gunicorn_passenger.serving.blocking_watch import BlockingWatch
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.serving.finish import finish_connections
from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import default_name
from gunicorn_passenger.serving.server_errors import with_program_line
from gunicorn_passenger.serving.third_party import ThirdPartyServer
from gunicorn_passenger.status import prometheus_multiproc
from gunicorn_passenger.system import listening_sockets, monkey_patching


def _gevent_socket(listener: Any) -> Any:
    """The socket of one of gunicorn's listeners, for this worker."""
    return gsocket.socket(listener.FAMILY, gsocket.SOCK_STREAM, fileno=listener.sock.detach())


def _explain_native_bind(error: Exception, log: Log) -> None:
    # pyzmq's ZMQError has the number, too, but is not an OSError
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        log.error(
            "A server of the program opens its port without Python's socket module, so the master cannot "
            "share the port among the workers (%s): run gunicorn with --workers 1, or pass the server a "
            "listening socket made with Python's socket module",
            error,
        )


def _explain_endless_import(log: Log) -> None:
    """A module whose last line is ``app.run()`` is a script; gunicorn waits for its end."""
    if not registry.script and any(isinstance(s, ThirdPartyServer) for s in registry.servers):
        log.warning(
            "The program is not loaded after %g s, and it runs a server: if its last line is app.run() or "
            "serve_forever(), that line keeps the worker from serving. Start the script with: "
            "gunicorn-passenger start SCRIPT",
            _LOADING_SECONDS,
        )


#: Seconds that a worker which cannot start waits for gunicorn to halt, when a sibling's exit causes that.
_HALT_WAIT = 10.0
#: Seconds after which the servers of the application are expected to exist.
_SETTLED_SECONDS = 3.0
#: Seconds after which a program that is still being imported may need a hint.
_LOADING_SECONDS = 10.0
_NO_BLOCKING_WATCH = (
    "What blocks this worker's event loop will not be logged: %s; raise the limit on processes (ulimit -u, "
    "pids.max) and reload gunicorn"
)


class Worker(GeventWorker):
    """``gunicorn -k gunicorn_passenger.Worker``: a gevent worker that serves several ports."""

    # gunicorn's own attributes, which it does not annotate
    alive: bool
    sockets: list[Any]
    wsgi: Any
    reloader: Any

    # --- in the master ---------------------------------------------------------------------------

    @classmethod
    def setup(cls) -> None:
        """gunicorn has read its configuration; with --preload it loads the program next."""
        # gunicorn passes no configuration here, and calls nothing else before it loads the program
        cfg = sys._getframe(1).f_locals.get("self")
        log = logging.getLogger("gunicorn.error")
        if cfg is not None:
            deployment_checks.check(cfg, log)
        if getattr(cfg, "preload_app", False) and not monkey.is_module_patched("socket"):
            log.warning(
                "--preload imports the program before gevent has patched the standard library: a program "
                "that uses ssl (requests, urllib3) may then fail with RecursionError, and its locks may "
                "block a worker. Begin gunicorn.conf.py with: from gevent import monkey; monkey.patch_all() "
                "(docs/how-to/deployment.md)"
            )
        integration.print_errors_in_one_line()
        settings.config_file_loaded()
        pending_bind.bind_locks.create()
        prometheus_multiproc.directory.prepare()
        registry.run_as_master()
        program_import.install()

    @classmethod
    def check_config(cls, cfg: Any, _log: Any) -> None:
        """Called before gunicorn's ``when_ready``."""
        integration.install_hooks(cfg)

    def __init__(
        self, age: int, ppid: int, sockets: list[Any], app: Any, timeout: float, cfg: Any, log: Log
    ) -> None:
        """Called in the master, just before the fork."""
        self.channel, self.scoreboard, primary = integration.prepare_worker(age, sockets, cfg, log)
        self.inherited_listeners = sockets
        try:
            super().__init__(age, ppid, list(primary), app, timeout, cfg, log)
        except OSError as error:
            # gunicorn makes the heartbeat file last, and the master would end without it
            log.error(
                "A worker starts without a heartbeat, so --timeout cannot end it if it hangs: the master "
                "cannot create the heartbeat file (%s); raise the limit on open files (ulimit -n) or free "
                "disk space, then reload gunicorn",
                error,
            )
            self.tmp = NullHeartbeat(self)
            self.worker_connections = cfg.worker_connections
        self._primary_name: Any = None
        #: the other sockets of gunicorn's bind, by name; the primary is served where no server listens
        self._other_binds: dict[str, Any] = {}
        #: for each unmodified server that becomes the primary, now or later
        self._primary_copy: Any = None
        #: the error that ended the program although it had started
        self.failure: PassengerError | None = None
        self._exit_requested: Any = None
        #: by path: when a file of the program was changed last, as far as the reloader has said
        self._changed_files: dict[str, float] = {}
        self._quitting = False
        #: the threads that run servers, and pools that wait for work
        self._threads_at_start: set[threading.Thread] = set()
        self._socket_patch: Any = None

    # --- in the worker ---------------------------------------------------------------------------

    def init_process(self) -> None:
        """Called after the fork: from here on the process is the worker."""
        try:
            self._keep_primary_listeners()
            monkey_patching.patch_standard_library(self.log, self.cfg.preload_app)
            hub.reinit()
            self.sockets = [_gevent_socket(listener) for listener in self.sockets]
            self._other_binds = {key: _gevent_socket(li) for key, li in self._other_binds.items()}
            self._primary_name = self.sockets[0].getsockname()
            self._primary_copy = _socket.socket(fileno=os.dup(self.sockets[0].fileno()))
            self._exit_requested = Event()
            settings.enter_program_scope()
            broker = BrokerClient(self.channel, self.log, GeventScheduler())
            broker.on_lost = self._on_master_lost
            broker.on_bind_claimed = self._on_bind_claimed
            broker.start_reading()
            registry.run_as_worker(self, broker)
            registry.acceptors.seat = self.scoreboard.seat if self.scoreboard is not None else None
            registry.connect_siblings()
            self._socket_patch = replaced_methods.install(registry, self._inodes_at_fork)
            # before the program starts a server that shows its metrics
            prometheus_multiproc.directory.sum_in_worker()
            # GeventWorker.init_process would patch and wrap again; its parent does the rest
            super(GeventWorker, self).init_process()
        except SystemExit:
            if not self.booted and fork_handlers.stop_requested():
                self._leave_boot()
            raise
        except Exception as error:
            refused = isinstance(error, PassengerError)
            if not refused and not self.booted:
                _explain_native_bind(error, self.log)
            if registry.broker is None or (self.booted and not refused):
                raise
            self._exit_after_boot_failure(error)

    def _keep_primary_listeners(self) -> None:
        """Keep the listeners of gunicorn's bind, and close those that programs have opened.

        A server of the program does not get its port from here, but from the master.
        """
        self._inodes_at_fork = set(listening_sockets.own_listeners())
        if self.cfg.reuse_port:
            # gunicorn has just made sockets of this worker's own, one for each bind
            unix = [s for s in self.sockets if s.FAMILY == gsocket.AF_UNIX]
            self.sockets, spare = unix or self.sockets[:1], (self.sockets[1:] if not unix else [])
        else:
            spare = [s for s in self.inherited_listeners if s not in self.sockets]
        for listener in spare:
            if isinstance(listener, BrokerOwnedListener):
                listener.close_now()
            elif listener.sock is not None:
                self._other_binds[format_sockname(listener.sock.getsockname())] = listener
        self.inherited_listeners = []

    def init_signals(self) -> None:
        if fork_handlers.stop_requested():
            sys.exit(0)
        super().init_signals()

    def load_wsgi(self) -> None:
        """Load the program; a refused ``listen()`` stops the start with one line in the log."""
        if self.reloader is not None:
            # gunicorn's own would end the worker, whether or not the changed program can start
            kind = reloader_engines[self.cfg.reload_engine]
            self.reloader = kind(extra_files=self.cfg.reload_extra_files, callback=self._on_file_changed)
        hint = gevent.spawn_later(_LOADING_SECONDS, _explain_endless_import, self.log)
        try:
            super().load_wsgi()
        except SystemExit:
            # gunicorn would restart forever a program that turns a refused listen() into sys.exit()
            if registry.last_error is None:
                raise
            raise registry.last_error from None
        finally:
            hint.kill(block=False)
        self._loaded = self.wsgi

    def _exit_after_boot_failure(self, error: Exception) -> None:
        """The program cannot start: exit as the master says.

        :raises SystemExit: with the status on which gunicorn halts, or another one.
        :raises Exception: ``error``, which gunicorn logs before it halts.
        """
        refused = isinstance(error, PassengerError)
        broker = registry.broker
        assert broker is not None
        try:
            verdict = broker.report_boot_failure(with_program_line(error))
        except errors.BrokerUnavailable:
            verdict = BootVerdict(0, "halt", True)
        if verdict.log and refused:
            self.log.error("%s", with_program_line(error))
        elif verdict.log and verdict.action != "halt":
            self.log.error("Exception in worker process", exc_info=error)
        do_not_wait_for_threads()
        if verdict.action == "exit":
            sys.exit(1)
        if verdict.action == "wait":
            # a sibling's exit halts gunicorn, which then stops this worker
            deadline = time.monotonic() + _HALT_WAIT
            while self.alive and time.monotonic() < deadline:
                self.notify()
                self._exit_requested.wait(timeout=1.0)
            if not self.alive:
                sys.exit(0)
        if not refused:
            raise error
        # on this status the master halts instead of starting another worker
        sys.exit(Arbiter.APP_LOAD_ERROR)

    def run(self) -> None:
        """Serve until gunicorn stops the worker, then finish the open connections."""
        if fork_handlers.stop_requested() or (not self.alive and self.failure is None):
            self._leave_boot()
            return
        registry.start()
        assert registry.broker is not None
        self._serve_primary(registry.broker)
        os.register_at_fork(after_in_child=registry.acceptors.leave_to_parent)
        self._threads_at_start = set(threading.enumerate())
        if (seconds := settings.max_blocking_time()) > 0:
            try:
                BlockingWatch(seconds, self.log, self.scoreboard).start()
            except RuntimeError as error:
                self.log.warning(_NO_BLOCKING_WATCH, error)
        serves_primary = not isinstance(registry.primary, ThirdPartyServer)
        name = default_name(self.wsgi) if registry.primary is None else registry.primary.name
        registry.broker.announce_ready(name, serves_primary)
        events.emit("ready", self, self.log)
        gevent.spawn_later(_SETTLED_SECONDS, registry.discovery.explain_missing, self.log)
        while self.alive:
            if os.getpid() != self.pid:
                # a child that the program has forked must not run the worker's loop
                Event().wait()
            self.notify()
            self._socket_patch.reap_closed_fds()
            self._write_counts()
            self._exit_requested.wait(timeout=1.0)
        deadline = time.monotonic() + self.cfg.graceful_timeout
        if not self._quitting:
            self._drain(deadline)
        self._write_counts()
        events.emit("exit", self, self.log)
        if self.failure is None:
            fork_handlers.ignore_further_stops()
            if not self._quitting:
                finish_background_work(
                    deadline - time.monotonic(),
                    self.log,
                    registry.broker.scheduler,
                    self.notify,
                    self._threads_at_start | self._socket_patch.server_threads(),
                )
        do_not_wait_for_threads()
        if self.failure is not None:
            self.alive = True  # while it waits for gunicorn to halt
            self._exit_requested.clear()
            raise self.failure

    def _write_counts(self) -> None:
        if self.scoreboard is not None and os.getpid() == self.pid:
            registry.acceptors.write_counts(self.scoreboard)
            self._socket_patch.leased.write_counts(self.scoreboard)

    # --- the primary -----------------------------------------------------------------------------

    def _serve_primary(self, broker: BrokerClient) -> None:
        primary = registry.primary
        if isinstance(primary, ThirdPartyServer):
            others = [key for key in self._other_binds if not registry.has_port(key)]
            unserved = [*(format_sockname(s.getsockname()) for s in self.sockets[1:]), *others]
            if unserved:
                self.log.warning(
                    "%s is the primary and a third-party server, which accepts from one socket only: %s is "
                    "not served; give gunicorn one bind",
                    primary.name,
                    ", ".join(unserved),
                )
            for sock in (*self.sockets, *self._other_binds.values()):
                sock.close()
            self._other_binds.clear()
            return
        if primary is not None:
            self.wsgi = primary.app
        sticky = settings.sticky(is_primary=True) if primary is None else primary.sticky
        registry.acceptors.open_mailbox(sticky)
        for key in list(self._other_binds):  # a server may take one meanwhile
            if not broker.keep_bind(key, for_good=False):
                self._on_bind_claimed(key)
        self.sockets.extend(self._other_binds.pop(key) for key in list(self._other_binds))
        for sock in self.sockets:
            sock.setblocking(1)
            registry.acceptors.start_primary(sock, self.wsgi, self.cfg, PRIMARY_SLOT, sticky)

    def _on_bind_claimed(self, key: str) -> None:
        """A server of the program listens on a bind: from now on the primary is not served there."""
        if (sock := self._other_binds.pop(key, None)) is not None:
            sock.close()
        registry.acceptors.stop_primary_at(key)

    def set_primary_app(self, app: Any) -> None:
        """From now on the primary serves ``app``; for ``None``, the application that gunicorn loaded."""
        if self.booted:
            self.wsgi = app or self._loaded
            for acceptor in registry.acceptors.primary:
                acceptor.set_app(self.wsgi)

    def primary_name(self) -> Any:
        """The address of the primary socket."""
        return self._primary_name

    def primary_descriptors(self) -> set[int]:
        """The worker's own copies of the primary's listeners."""
        return {sock.fileno() for sock in (*self.sockets, *self._other_binds.values(), self._primary_copy)}

    def dup_primary_socket(self) -> Any:
        """A copy of the primary socket for an unmodified server, which accepts from it itself."""
        copy = _socket.socket(fileno=os.dup(self._primary_copy.fileno()))
        registry.acceptors.stop_primary()
        return copy

    def notify(self) -> None:
        """The heartbeat. When the master has died, this worker drains; gunicorn's cuts its responses off."""
        if os.getppid() != self.ppid:
            self._on_master_lost()
        super(GeventWorker, self).notify()

    def _on_master_lost(self) -> None:
        """The master has closed the channel, and could not pause this worker's accepting any more.

        A worker that boots exits, too: the master would never stop it.
        """
        if self.alive:
            # a dying master closes its end of the channel before the worker gets another parent
            self.log.error(
                "gunicorn-passenger: the channel to the master is closed: this worker drains and exits, and "
                "gunicorn starts another one; if the master has died, start gunicorn again (pid:%s)",
                self.pid,
            )
            self.alive = False
            self._exit_requested.set()

    # --- exit ------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Have the master start a successor. This worker serves until that does, and gunicorn stops it."""
        self.max_requests = sys.maxsize
        assert registry.broker is not None
        if not registry.broker.request_successor():
            self.alive = False
            self._exit_requested.set()

    def _on_file_changed(self, path: str) -> None:
        """Called by gunicorn's reloader, in its thread, every second for a file that was changed once."""
        changed = 0.0
        with contextlib.suppress(OSError):
            changed = os.stat(path).st_mtime
        if self._changed_files.get(path) != changed:
            self._changed_files[path] = changed
            self.log.info("Worker reloading: %s modified", path)
            self.retire()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if sig and not self.booted:
            do_not_wait_for_threads()
            fork_handlers.exit_boot(sig, frame)
        super().handle_exit(sig, frame)
        if self._exit_requested is not None:
            gevent.spawn(self._exit_requested.set)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """Exit at once. A Ctrl-C comes twice: from the terminal, and from the master."""
        if self._quitting:
            return
        self._quitting = True
        if self.booted and self._exit_requested is not None:
            gevent.spawn(self._quit)
        else:
            super().handle_quit(sig, frame)

    def _quit(self) -> None:
        self.alive = False
        self.cfg.worker_int(self)
        self._exit_requested.set()

    def _leave_boot(self) -> None:
        """The worker was stopped while it booted. Once it is set up, the program's servers may accept."""
        fork_handlers.leave_boot()
        if self._socket_patch is not None and registry.servers and not self._quitting:
            fork_handlers.limit_exit(self.cfg.graceful_timeout)
            self._drain(time.monotonic() + self.cfg.graceful_timeout)
            fork_handlers.limit_exit(0.0)
        do_not_wait_for_threads()

    def _drain(self, deadline: float) -> None:
        """Stop accepting everywhere, and finish the open connections.

        :param deadline: when the graceful timeout is over (monotonic seconds).
        """
        self._primary_copy.close()
        registry.stop_accepting()
        self._socket_patch.stop_accepting()
        assert registry.broker is not None
        assert registry.migration is not None
        registry.broker.announce_exit()
        registry.acceptors.finish()
        keepalive = float(self.cfg.keepalive)
        migrating = gevent.spawn(registry.migration.migrate_idle_connections, max(keepalive, 1.0))
        try:
            finish_connections(
                registry,
                deadline - time.monotonic(),
                self.log,
                gevent.sleep,
                self._on_drain_tick,
                self._socket_patch,
                keepalive,
                registry.acceptors.leave_mailbox,
            )
        finally:
            migrating.kill(block=False)

    def _on_drain_tick(self) -> None:
        self.notify()
        self._write_counts()
