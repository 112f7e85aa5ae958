"""The gunicorn worker class: joins the master's broker and the program's servers.

Runs in: the master (``setup``, ``check_config``, ``__init__``) and a worker (all else).
Must never: open a port.
"""

from __future__ import annotations

import _socket
import errno
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
from gunicorn.workers.ggevent import GeventWorker

from gunicorn_passenger import errors
from gunicorn_passenger.arbiter import fork_handlers, integration
from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.interposition import socket_patch, third_party_drain
from gunicorn_passenger.ipc.scoreboard import PRIMARY_SLOT
from gunicorn_passenger.serving import events
from gunicorn_passenger.serving.acceptors import ListenerHandler, make_acceptor
from gunicorn_passenger.serving.broker_client import BrokerClient
from gunicorn_passenger.serving.registry import ThirdPartyServer, registry
from gunicorn_passenger.serving.server import default_name
from gunicorn_passenger.status import prometheus_multiproc
from gunicorn_passenger.system import listening_sockets

#: Seconds that a worker which cannot start waits for gunicorn's halt, when a sibling has caused it.
_HALT_WAIT = 10.0


#: How often a leaving worker looks for idle connections of servers that are not ours, in seconds.
_RELEASE = 0.5


class NullHeartbeat:
    """Stands for gunicorn's ``WorkerTmp`` where the system has no file for it."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def notify(self) -> None:
        """Nobody is told."""

    def last_update(self) -> float:
        return time.monotonic()

    def fileno(self) -> int:
        """gunicorn only closes it on exec, as it does with the listener that this is."""
        return int(self._worker.sockets[0].fileno())

    def close(self) -> None:
        """There is nothing to close."""


class Worker(GeventWorker):
    """``gunicorn -k gunicorn_passenger.Worker``: a gevent worker with second servers."""

    # gunicorn's own attributes, which it does not annotate
    alive: bool
    sockets: list[Any]
    wsgi: Any

    # --- in the master ---------------------------------------------------------------------------

    @classmethod
    def setup(cls) -> None:
        """gunicorn has read its configuration; with --preload it loads the program next."""
        settings.config_file_loaded()
        prometheus_multiproc.directory.prepare()
        registry.run_as_master()

    @classmethod
    def check_config(cls, cfg: Any, _log: Any) -> None:
        """Called before gunicorn's ``when_ready``."""
        integration.install_hooks(cfg)

    def __init__(
        self, age: int, ppid: int, sockets: list[Any], app: Any, timeout: float, cfg: Any, log: Any
    ) -> None:
        """Called in the master, just before the fork."""
        self.channel, self.board, primary = integration.prepare_worker(age, sockets, cfg, log)
        self.inherited = sockets
        try:
            super().__init__(age, ppid, list(primary), app, timeout, cfg, log)
        except OSError as error:
            # gunicorn's heartbeat is a file, the last thing that it makes; without one it would end
            log.error(
                "A worker starts without a heartbeat, so no timeout ends it when it hangs: the master cannot "
                "make its file (%s); raise the limit of open files (ulimit -n) or make room, then reload",
                error,
            )
            self.tmp = NullHeartbeat(self)
            self.worker_connections = cfg.worker_connections
        self._acceptors: list[ListenerHandler] = []
        self._primary_name: Any = None
        #: for an unmodified server that becomes the primary, now or later, once or again
        self._primary_copy: Any = None
        #: why the program cannot go on although it had started
        self.failure: PassengerError | None = None
        self._leaving: Any = None
        self._quitting = False
        self._interposition: Any = None

    # --- in the worker ---------------------------------------------------------------------------

    def init_process(self) -> None:
        """Called after the fork: from here to the end the process is the worker."""
        try:
            self._take_sockets()
            monkey.patch_all()
            hub.reinit()
            self.sockets = [
                gsocket.socket(s.FAMILY, gsocket.SOCK_STREAM, fileno=s.sock.detach()) for s in self.sockets
            ]
            self._primary_name = self.sockets[0].getsockname()
            self._primary_copy = _socket.socket(fileno=os.dup(self.sockets[0].fileno()))
            self._leaving = Event()
            settings.enter_program_scope()
            link = BrokerClient(self.channel, self.log)
            link.on_lost = self._lost_master
            registry.run_as_worker(self, link)
            self._interposition = socket_patch.install(registry)
            # gunicorn's own GeventWorker.init_process patches and wraps again; the rest is its parent's
            super(GeventWorker, self).init_process()
        except PassengerError as error:
            self._give_up(error)
        except OSError as error:
            self._explain_native_bind(error)
            raise

    def _take_sockets(self) -> None:
        """Keep the primary's listeners; close the ports, which are asked for, not inherited."""
        self._inherited = set(listening_sockets.own_listeners())
        if self.cfg.reuse_port:
            # gunicorn has just made this worker its own sockets, for every bind
            unix = [s for s in self.sockets if s.FAMILY == gsocket.AF_UNIX]
            self.sockets, spare = unix or self.sockets[:1], (self.sockets[1:] if not unix else [])
        else:
            spare = [s for s in self.inherited if s not in self.sockets]
        for listener in spare:
            if listener.sock is not None:
                listener.sock.close()
                listener.sock = None
        self.inherited = []

    def init_signals(self) -> None:
        if fork_handlers.stop_requested():
            sys.exit(0)
        super().init_signals()

    def load_wsgi(self) -> None:
        """Load the program; what it cannot have stops the start with one line."""
        try:
            super().load_wsgi()
        except SystemExit:
            # a server that turns a refused listen into sys.exit() would be started again for ever
            if registry.refusal is None:
                raise
            raise registry.refusal from None
        self._loaded = self.wsgi

    def _give_up(self, error: PassengerError) -> None:
        try:
            assert registry.link is not None
            halt = registry.link.fault(str(error))
        except errors.BrokerUnavailable:
            self.log.error("%s", error)
            halt = True
        if not halt:
            # a sibling's exit halts gunicorn, which then tells this worker to go
            deadline = time.monotonic() + _HALT_WAIT
            while self.alive and time.monotonic() < deadline:
                self.notify()
                self._leaving.wait(timeout=1.0)
            if not self.alive:
                sys.exit(0)
        # the master halts with this status instead of starting the next worker
        sys.exit(Arbiter.APP_LOAD_ERROR)

    def _explain_native_bind(self, error: OSError) -> None:
        if error.errno == errno.EADDRINUSE and not self.booted:
            self.log.error(
                "A server that the program opens does not go through Python's socket module, so the master "
                "cannot share its port among the workers (%s): run it with one worker, or pass it a "
                "listening socket made by Python",
                error,
            )

    def run(self) -> None:
        """Serve until told to leave, then finish what was let in."""
        registry.start()
        self._serve_primaries()
        self._warn_of_unmanaged_listeners()
        os.register_at_fork(after_in_child=self._forked)
        assert registry.link is not None
        registry.link.ready(self._primary_title())
        events.emit("ready", self, self.log)
        while self.alive:
            if os.getpid() != self.pid:
                # a child that the program has forked: the worker's loop is not its business
                Event().wait()
            self.notify()
            self._interposition.sweep()
            self._write_counts()
            self._leaving.wait(timeout=1.0)
        if not self._quitting:
            self._leave()
        self._write_counts()
        events.emit("exit", self, self.log)
        if self.failure is None:
            fork_handlers.ignore_further_stops()
        # What was let in is served. A server in a thread of its own that is no daemon would keep the
        # interpreter waiting at its end, until the master kills the worker.
        threading._shutdown = lambda: None  # type: ignore[attr-defined]
        if self.failure is not None:
            self.alive = True  # it waits for gunicorn's halt
            self._leaving.clear()
            raise self.failure

    def _primary_title(self) -> str:
        """What people call the primary."""
        primary = registry.primary
        if primary is not None:
            return primary.name
        return default_name(self.wsgi)

    def _write_counts(self) -> None:
        if self.board is not None and os.getpid() == self.pid:
            registry.write_counts(self.board)
            self._interposition.write_counts(self.board)

    def _forked(self) -> None:
        """In a child that the program has forked (multiprocessing, ForkingMixIn): accept nothing."""
        for accepting in self._acceptors:
            accepting.pause()
        registry.pause()

    # --- the primary -----------------------------------------------------------------------------

    def _serve_primaries(self) -> None:
        primary = registry.primary
        if isinstance(primary, ThirdPartyServer):
            if len(self.sockets) > 1:
                self.log.warning(
                    "%s was captured as the primary and can accept from one socket only: %s is not served",
                    primary.name,
                    ", ".join(format_sockname(s.getsockname()) for s in self.sockets[1:]),
                )
            for sock in self.sockets:
                sock.close()
            return
        if primary is not None:
            self.wsgi = primary.app
        for sock in self.sockets:
            sock.setblocking(1)
            accepting = make_acceptor(sock, self.wsgi, self.cfg, self.log, self)
            registry.count(PRIMARY_SLOT, accepting)
            accepting.start()
            self._acceptors.append(accepting)

    def set_primary_app(self, app: Any) -> None:
        """From now on the primary is ``app``; without one, what gunicorn loaded."""
        if self.booted:
            self.wsgi = app or self._loaded
            for accepting in self._acceptors:
                accepting.serve(self.wsgi)

    def primaries(self) -> list[ListenerHandler]:
        """The acceptors of the primary."""
        return self._acceptors

    def primary_name(self) -> Any:
        """What the primary socket is bound to."""
        return self._primary_name

    def primary_descriptors(self) -> set[int]:
        """The worker's own copies of the primary's listeners."""
        return {sock.fileno() for sock in (*self.sockets, self._primary_copy)}

    def dup_primary_socket(self) -> Any:
        """A copy of the primary socket for an unmodified server, which accepts from it itself."""
        for accepting in self._acceptors:
            accepting.stop_accepting()
        return _socket.socket(fileno=os.dup(self._primary_copy.fileno()))

    def wake(self) -> None:
        """It has become time to leave, and no signal says so."""
        if self._leaving is not None:
            self._leaving.set()

    def _lost_master(self) -> None:
        """The master has closed the channel: without it this worker could not be told to stop accepting."""
        if self.booted and self.alive:
            self.log.error("gunicorn-passenger: the master has closed this worker's channel: it leaves")
            self.alive = False
            self._leaving.set()

    # --- leaving ---------------------------------------------------------------------------------

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        if self._leaving is not None:
            gevent.spawn(self._leaving.set)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """Leave at once. A Ctrl-C comes twice: from the terminal, and from the master."""
        if self._quitting:
            return
        self._quitting = True
        if self.booted and self._leaving is not None:
            gevent.spawn(self._quit)
        else:
            super().handle_quit(sig, frame)

    def _quit(self) -> None:
        self.alive = False
        self.cfg.worker_int(self)
        self._leaving.set()

    def _leave(self) -> None:
        """Stop accepting everywhere, finish what is in hand within the graceful timeout."""
        self._primary_copy.close()
        for accepting in self._acceptors:
            accepting.stop_accepting()
        registry.stop_accepting()
        self._interposition.stop_accepting()
        third_party_drain.force_connection_close()
        assert registry.link is not None
        registry.link.leaving()
        handing = gevent.spawn(registry.hand_over, self.primaries, float(max(self.cfg.keepalive, 1)))
        try:
            self._finish()
        finally:
            handing.kill(block=False)

    def _finish(self) -> None:
        """Wait until nothing is left, within the graceful timeout."""
        idle_until = time.monotonic() + self.cfg.keepalive
        deadline = time.monotonic() + self.cfg.graceful_timeout
        while not self._idle():
            if time.monotonic() >= deadline:
                self.log.warning("Worker graceful timeout (pid:%s)", self.pid)
                for accepting in self._acceptors:
                    accepting.kill(1)
                registry.kill(1)
                return
            self.notify()
            self._write_counts()
            if time.monotonic() >= idle_until and not self._interposition.idle():
                third_party_drain.shutdown_idle_connections()
                idle_until = time.monotonic() + _RELEASE
            gevent.sleep(0.1)

    def _idle(self) -> bool:
        return (
            all(accepting.idle() for accepting in self._acceptors)
            and registry.idle()
            and bool(self._interposition.idle())
        )

    # --- what cannot be reached ------------------------------------------------------------------

    def _warn_of_unmanaged_listeners(self) -> None:
        if self.cfg.workers < 2:
            return
        own = {format_sockname(self._primary_name)}
        for server in registry.servers:
            if isinstance(server.address, tuple):
                own.add(format_sockname(server.address))
        if strays := sorted(set(socket_patch.unmanaged_listeners(self._inherited)) - own):
            self.log.warning(
                "%s was opened by code that does not go through Python's socket module: the master "
                "cannot share it, so this worker alone has it (pid:%s)",
                ", ".join(strays),
                self.pid,
            )
