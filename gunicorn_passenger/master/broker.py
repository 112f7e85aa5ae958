"""The port broker: opens ports for the workers, in a thread of the master.

Process: the master. Never: block (workers wait for it, and a fork waits for it), trust a worker, or
raise an exception into the arbiter.

The broker creates its parts, and is the interface that the arbiter's side uses:

- the arbiter's main thread makes each worker's channel before the fork (:meth:`Broker.prepare_worker`, from
  ``Worker.__init__``) and reports a worker's end (``child_exit``);
- all else is done by the broker's own thread (:mod:`.loop`): it polls the channels (:mod:`.worker_channels`),
  dispatches messages (:mod:`.dispatcher`), grants ports (:mod:`.placement`) and closes unused ones
  (:mod:`.listener_sync`);
- in a forked child everything of the master is closed; a worker keeps its own end of its own channel.
"""

from __future__ import annotations

import _socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gunicorn_passenger.config.gunicorn_types import Arbiter, Config, Listener, Log
from gunicorn_passenger.config.port_allocation import PortAllocation
from gunicorn_passenger.ipc.messages import Message
from gunicorn_passenger.ipc.report_types import Report
from gunicorn_passenger.ipc.scoreboard import RetiredCounters, Scoreboard
from gunicorn_passenger.master import upgrade_lock, upgrade_state
from gunicorn_passenger.master.boot_failures import BootFailures
from gunicorn_passenger.master.dispatcher import MessageDispatcher
from gunicorn_passenger.master.event_log import EventLog
from gunicorn_passenger.master.listener_sync import ListenerSync
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.loop import BrokerLoop
from gunicorn_passenger.master.placement import PlacementScheduler
from gunicorn_passenger.master.port import Port
from gunicorn_passenger.master.worker_channels import WorkerChannels
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.system.callers import called_in
from gunicorn_passenger.system.text import printable

#: Seconds between two checks whether the arbiter has stopped or reloaded (see :mod:`.listener_sync`).
_DECISION_INTERVAL = 0.05


class Broker:
    """All that the master knows of ports, and of the workers that want them."""

    def __init__(
        self,
        log: Log,
        listening: list[Listener],
        cfg: Config,
        build_report: Callable[[Broker], Report],
    ) -> None:
        """
        :param listening: the arbiter's list of listeners.
        :param build_report: makes the application's report; called with the lock held.
        """
        self.log = log
        self.cfg = cfg
        self.started = time.time()
        self.grace = 10.0
        #: seconds for which an old worker waits for a new one that boots
        self.overlap = 0.0
        self.boot_failures = BootFailures()
        self._build_report = build_report
        #: whether the log says that there is no port allocation
        self._told_of_allocation = False
        previous = upgrade_state.inherited()
        upgrade_state.forget(cfg)
        ports = previous.pop("ports", {})
        self.event_log = EventLog()
        self.retired_counters = RetiredCounters()
        self.loop = BrokerLoop(log, self)
        self.locked = self.loop.locked
        self.wake = self.loop.wake
        self.workers = WorkerChannels()
        self.listeners = Listeners(cfg, log, ports.get("stopped", ()))
        lock = upgrade_lock.UpgradeLock(previous.pop("exclusive", -1))
        self.placement = PlacementScheduler(self.listeners, self.workers, lock, self.event_log, self)
        self.sync = ListenerSync(
            self.listeners, self.placement, self.workers, self.retired_counters, self.wake
        )
        self.stopping = self.sync.stopping
        self._dispatcher = MessageDispatcher(
            log,
            self.workers,
            self.listeners,
            self.placement,
            self.sync,
            self.loop,
            self.retired_counters,
            self.event_log,
            self.boot_failures,
            self.report,
        )
        self.mailboxes = self._dispatcher.mailboxes
        #: ages of workers that the arbiter has reaped
        self._reaped: list[int] = []
        self.sync.reconcile(listening, dict(ports.get("open", ())))

    # --- called by the arbiter's main thread ----------------------------------------------------

    @property
    def arbiter(self) -> Any:
        """gunicorn's arbiter; ``None`` until it is known."""
        return self.workers.arbiter

    @arbiter.setter
    def arbiter(self, arbiter: Arbiter | None) -> None:
        self.workers.arbiter = arbiter

    @property
    def allocation(self) -> PortAllocation:
        return self.listeners.allocation

    def configure(self, cfg: Config, allocation: PortAllocation, grace: float, overlap: float) -> None:
        """Take the settings of the start, or of a reload.

        :param grace: the grace period in seconds.
        :param overlap: see :attr:`overlap`.
        """
        with self.locked():
            self.cfg = self.listeners.cfg = cfg
            self.listeners.allocation = allocation
            self.grace = grace
            self.overlap = overlap
            self.boot_failures.forget()

    def prepare_worker(self, age: int, listening: list[Listener]) -> tuple[_socket.socket, Scoreboard | None]:
        """Make the channel of a worker that is about to be forked.

        :returns: the worker's end, and its scoreboard (``None`` when the system has no memory for one).
        :raises OSError: when the system gives no socketpair, or the broker's thread hangs.
        """
        with self.locked():
            self.sync.on_new_list(listening)
            pending = self.workers.prepare(age)
        self.loop.start()
        return pending.theirs, pending.scoreboard

    def survives_boot_failure(self) -> bool:
        """Whether gunicorn need not halt because a worker has exited with the status of a failed boot."""
        return (
            self.workers.started and not self.boot_failures.halting and any(w.serving for w in self.workers)
        )

    def on_worker_not_started(self, reason: str) -> None:
        """The arbiter could not fork a worker: the next attempt follows after a pause."""
        with suppress(TimeoutError), self.locked():
            self._dispatcher.note_boot_failure(reason)

    def on_reload_rejected(self, text: str) -> None:
        """gunicorn could not read its configuration again, and keeps the previous one."""
        with suppress(TimeoutError), self.locked():
            self.boot_failures.reload_rejected(text)
            self.event_log.record("boot_failure", self.boot_failures.text)

    def on_worker_reaped(self, age: int) -> None:
        self._reaped.append(age)
        self.wake()

    def export_upgrade_state(self, lowest: int) -> dict[str, Any]:
        """In the child that is about to become the new master: its state (see :mod:`.upgrade_state`).

        :param lowest: the lowest number that a descriptor for it may have.
        :raises OSError: when this process has no room for it.
        """
        return {
            "ports": self.listeners.export_state(),
            "exclusive": self.placement.upgrade_lock.export_descriptor(lowest),
        }

    def finish(self) -> None:
        """gunicorn exits: close what the thread has not closed yet."""
        for service in self.loop.services:
            service.stop()
        with suppress(TimeoutError), self.locked():
            self.sync.close_all()

    # --- the application, for people (lock held) -------------------------------------------------

    def report(self) -> Report:
        """The application as it is now (see :mod:`gunicorn_passenger.status.report`)."""
        return self._build_report(self)

    def command(self, verb: str, name: str) -> str:
        """``"restart"`` or ``"stop"`` the servers or the daemon of a name.

        :returns: what was done, for people.
        :raises PassengerError: when nothing has that name, or it cannot be done.
        """
        handlers = [self.placement.command, *(service.command for service in self.loop.services)]
        done = [text for text in (handle(verb, name) for handle in handlers) if text is not None]
        if not done:
            raise server_errors.unknown_name(name)
        self.wake()
        return printable(", ".join(done))

    # --- around a fork ---------------------------------------------------------------------------

    def after_fork_in_parent(self) -> None:
        self.workers.after_fork_in_parent()
        self.loop.after_fork_in_parent()

    def after_fork_in_child(self) -> bool:
        """Close what is the master's. A worker closes the ports itself, and the next master gets them.

        :returns: whether the child is a worker.
        """
        is_worker = self.workers.after_fork_in_child()
        # gunicorn calls no hook before its fork for USR2
        upgrades = not is_worker and called_in("reexec", "gunicorn.arbiter")
        self.mailboxes.after_fork_in_child()
        if is_worker:
            # a worker that outlives the master must not keep the lock of another worker's server
            self.placement.upgrade_lock.close()
        elif not upgrades:
            self.sync.close_in_child()
        self.loop.after_fork_in_child(upgrades)
        return is_worker

    # --- called by the loop ----------------------------------------------------------------------

    def worker_fds(self) -> list[int]:
        return self.workers.fds_to_read()

    def serve_worker(self, fd: int) -> None:
        worker = self.workers.by_fd(fd)
        if worker is not None:
            self._dispatcher.serve(worker)

    def tick(self, now: float) -> float | None:
        while self._reaped:
            self._dispatcher.on_worker_reaped(self._reaped.pop())
        self.sync.decide_stop_or_reload()
        for key in self.sync.close_unused(now, self.grace):
            self.log.info("Closed %s: no worker has wanted it for %g s", key, self.grace)
        due = [
            self.placement.schedule(now),
            self.listeners.idle.deadline(self.grace),
            self._dispatcher.tick(now),
            self.mailboxes.tick(now),
        ]
        if self.sync.pending:
            due.append(now + _DECISION_INTERVAL)
        return min((at for at in due if at is not None), default=None)

    def on_thread_death(self) -> None:
        """Register again what is really open."""
        self.listeners.rebuild(self.sync.listening)
        self.event_log.record("broker", "the port broker's thread died and was started again")

    # --- called by the placement -----------------------------------------------------------------

    def send(self, age: int, message: Message, fd: int | None = None) -> bool:
        worker = self.workers.by_age(age)
        return worker is not None and self._dispatcher.reply(worker, message, fd)

    def on_port_opened(self, port: Port) -> None:
        self.sync.add(port)
        self.log.info("Opened %s for the workers", port.key)
        if not (
            self._told_of_allocation or self.listeners.allocation.limited or port.key.startswith("unix:")
        ):
            self._told_of_allocation = True
            self.log.info(
                "No port allocation is set, so the program may open any unprivileged port. To limit it, "
                "name its ports in PASSENGER_PORTS: docs/reference/ports.md"
            )

    def close_port(self, port: Port) -> None:
        self.sync.close_stopped(port)
        self.log.info("Closed %s, as 'gunicorn-passenger stop' asked", port.key)

    def reopen_port(self, port: Port) -> None:
        self.listeners.reopen(port)
        self.sync.add(port)
        self.log.info("Opened %s again", port.key)
