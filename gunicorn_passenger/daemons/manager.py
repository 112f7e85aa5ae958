"""The daemons that should run: requested by the master's own code or by workers, changed by a reload.

Process: the master, in the broker's thread and around gunicorn's hooks. Never: wait for a daemon (except when
gunicorn exits), or give a daemon more rights than the code that requested it may have.

Beside it: ``sockets.py`` opens and holds the sockets, ``lifecycle.py`` starts and stops the processes.
"""

from __future__ import annotations

import _socket
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.gunicorn_types import Arbiter
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.lifecycle import DaemonLifecycle
from gunicorn_passenger.daemons.requested import requested_daemons
from gunicorn_passenger.daemons.run_as import RunAs, resolve_run_as
from gunicorn_passenger.daemons.sockets import DaemonSockets
from gunicorn_passenger.daemons.spec import MAX_DAEMONS, DaemonSpec, check_after
from gunicorn_passenger.daemons.state import FAILED, DaemonState
from gunicorn_passenger.errors import DaemonError, PassengerError
from gunicorn_passenger.ipc.messages import DaemonSpawned, Message, RequestDenied, SpawnDaemon
from gunicorn_passenger.ipc.report_types import DaemonEntry
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.grace_timer import GraceTimer
from gunicorn_passenger.master.service import BrokerService
from gunicorn_passenger.system import procfs

#: Seconds that the supervisor has beyond the daemons' ``stop_timeout`` when gunicorn exits.
_STOP_MARGIN = 5.0


class DaemonManager(BrokerService):
    """All daemons of this master."""

    def __init__(
        self,
        broker: Broker,
        environment: Callable[[Mapping[str, str]], dict[str, str]],
        watch_reports: Callable[[_socket.socket], None],
    ) -> None:
        """
        :param environment: makes a daemon's environment of the master's.
        :param watch_reports: sends reports on a socket, for the status daemon.
        """
        self._broker = broker
        self._daemons: dict[str, DaemonState] = {}
        self._sockets = DaemonSockets(broker, self._daemons)
        self._lifecycle = DaemonLifecycle(broker, self._daemons, self._sockets, environment, watch_reports)
        #: specs that failed; they are not tried again before the next reload
        self._refused: set[DaemonSpec] = set()
        self._generation = 0
        #: the last worker that was started before the last reload
        self._last_before = 0
        #: whether all workers have been ready since
        self._settled = False
        self._begun = False
        #: for how long no worker has used a daemon, by name, or the sockets of the previous master, by ""
        self._unused = GraceTimer[str]()

    # --- gunicorn's hooks ------------------------------------------------------------------------

    def started(self, arbiter: Arbiter) -> None:
        """
        :raises PassengerError: when a daemon that the master's own code requested cannot be started.
        """
        waits = bool(arbiter.master_pid)
        self._begun = True
        self._lifecycle.begin(waits)
        if waits and requested_daemons.pending:
            self._broker.log.info(
                "Daemons are started when the previous master (pid %s) has exited", arbiter.master_pid
            )
        for spec, trusted in requested_daemons.all():
            self._request(spec, trusted)

    def reloaded(self) -> None:
        self._generation += 1
        self._settled = False
        arbiter = self._broker.arbiter
        workers = dict(arbiter.WORKERS).values() if arbiter is not None else ()
        self._last_before = max((worker.age for worker in workers), default=0)
        self._refused.clear()
        requested = requested_daemons.all()
        names = {spec.name for spec, _ in requested}
        for daemon in [d for d in self._daemons.values() if not d.by_workers and d.name not in names]:
            self._lifecycle.stop(daemon, "forget", "gunicorn.conf.py does not request it any more")
        for spec, trusted in requested:
            self._try_request(spec, trusted, "; the daemon is unchanged")

    def refresh(self) -> None:
        """Start daemons that a hook of gunicorn's has requested since the master was ready."""
        for spec, trusted in requested_daemons.all():
            if spec.name not in self._daemons and spec not in self._refused:
                self._try_request(spec, trusted)

    def _try_request(self, spec: DaemonSpec, trusted: bool, consequence: str = "") -> None:
        try:
            self._request(spec, trusted)
        except PassengerError as error:
            self._refused.add(spec)
            self._broker.log.error("gunicorn-passenger: %s%s", error, consequence)

    def _request(self, spec: DaemonSpec, trusted: bool) -> None:
        """The master's own code requests a daemon, for the first time or again."""
        cfg = self._broker.cfg
        known = self._daemons.get(spec.name)
        if known is not None and known.by_workers:
            raise daemon_errors.duplicate_daemon_name(spec.name)
        if known is None or known.spec != spec:
            # this only looks up the command, also in another user's directory; the daemon's own user runs it
            spec.find_command(dict(spec.env).get("PATH", os.environ.get("PATH")))
        run_as = resolve_run_as(spec, cfg.uid, cfg.gid, cfg.initgroups, trusted)
        self._apply(known, spec, run_as, by_workers=False)

    # --- the desired state -----------------------------------------------------------------------

    def _apply(
        self, known: DaemonState | None, spec: DaemonSpec, run_as: RunAs, by_workers: bool
    ) -> DaemonState:
        """Have a daemon run by this spec: start one, keep the present one, or restart it with the changes."""
        if known is None or known.then == "forget":
            if known is None and len(self._daemons) >= MAX_DAEMONS:
                raise daemon_errors.too_many_daemons(MAX_DAEMONS)
        elif known.spec == spec and known.run_as == run_as:
            if self._generation > known.generation:
                known.generation = self._generation
                # in the order in which the reloaded program spawns them
                self._daemons[spec.name] = self._daemons.pop(spec.name)
                if spec.on_reload == "restart" or known.state == FAILED:
                    self._lifecycle.restart(known, "restarted by the reload")
            return known
        held = known.sockets if known is not None else []
        sockets = self._sockets.open(spec, held)
        if known is None:
            known = DaemonState(spec, run_as, by_workers, generation=self._generation)
            self._daemons[spec.name] = known
            known.set_sockets(sockets)
            self._lifecycle.start(known)
            return known
        unused = [one for one in held if one not in sockets]
        known.spec, known.run_as, known.by_workers = spec, run_as, by_workers
        known.set_sockets(sockets)
        known.generation = self._generation
        self._sockets.close(unused)
        self._lifecycle.restart(known, "restarted: its arguments have changed")
        return known

    # --- workers ---------------------------------------------------------------------------------

    def message(self, age: int, message: Message) -> Message | None:
        if not isinstance(message, SpawnDaemon):
            return None
        number = message.id
        if self._broker.stopping() or self._lifecycle.stopping:
            return RequestDenied(number, "listen", 0, "the application is stopping")
        try:
            daemon = self._request_by_worker(age, DaemonSpec.unpack(message.spec))
        except errors.ListenError as error:
            return RequestDenied(number, errors.refusal_kind(error), error.errno or 0, str(error)[:1000])
        except PassengerError as error:
            return RequestDenied(number, "daemon", 0, str(error)[:1000])
        except Exception as error:
            # the worker gets a response, whatever it has requested
            text = f"the master cannot start the daemon: {error!r}"
            self._broker.log.error("gunicorn-passenger: worker %s: %s", self._broker.workers.pid(age), text)
            return RequestDenied(number, "daemon", 0, text[:1000])
        # a daemon that is stopped or failed keeps its address for the next start
        return DaemonSpawned(number, daemon.name, *(daemon.places[0] if daemon.places else ()))

    def _request_by_worker(self, age: int, spec: DaemonSpec) -> DaemonState:
        cfg = self._broker.cfg
        check_after(spec, self._daemons)
        # with the workers' rights, even where the master has others
        run_as = resolve_run_as(spec, cfg.uid, cfg.gid, cfg.initgroups, trusted=False)
        for item in spec.listen:
            if item.kind == "unix" and cfg.uid != os.geteuid():
                raise listen_errors.unix_other_user(item.path, self._broker.allocation.account)
        known = self._daemons.get(spec.name)
        if known is not None and known.then != "forget":
            if not known.by_workers:
                raise daemon_errors.duplicate_daemon_name(spec.name)
            if known.spec != spec and not self._may_change(known, age):
                self._broker.log.warning(
                    "gunicorn-passenger: worker %s requests the daemon %s with other arguments than earlier "
                    "workers; the daemon is unchanged. Reload gunicorn to restart it with the new arguments",
                    self._broker.workers.pid(age),
                    spec.name,
                )
                spec, run_as = known.spec, known.run_as
        daemon = self._apply(known, spec, run_as, by_workers=True)
        daemon.wanted_by.add(age)
        self._unused.restart(spec.name)
        return daemon

    def _may_change(self, known: DaemonState, age: int) -> bool:
        """Whether a worker that requests a daemon with other arguments has the newer code.

        :returns: ``False`` when the program on the disk has changed since the earlier workers started, and
            gunicorn has not reloaded yet.
        :raises errors.DaemonError: when the program uses the name for two daemons.
        """
        if age > self._last_before and known.generation < self._generation:
            newer = True
        elif self._broker.cfg.reload:
            # gunicorn's --reload starts workers with changed code, one after the other
            newer = age > max(known.wanted_by, default=0)
        else:
            newer = not known.wanted_by and age > self._last_before
        if not newer and (age in known.wanted_by or not self._settled):
            raise daemon_errors.duplicate_daemon_name(known.name)
        if newer:
            known.wanted_by.clear()
        return newer

    def left(self, age: int) -> None:
        for daemon in self._daemons.values():
            daemon.wanted_by.discard(age)

    # --- the broker's loop -----------------------------------------------------------------------

    def descriptors(self) -> dict[int, int]:
        return self._lifecycle.descriptors()

    def serve(self, fd: int, events: int) -> None:
        self._lifecycle.serve()

    def tick(self, now: float) -> float | None:
        due = [*self._lifecycle.tick(now), self._drop_unwanted(now)]
        return min((at for at in due if at is not None), default=None)

    def _drop_unwanted(self, now: float) -> float | None:
        """Stop daemons that no worker has used for the grace period; ports are closed in the same way.

        The timer is paused while workers come and go: one that boots may be about to request the daemon.

        :returns: when the next grace period ends (monotonic seconds).
        """
        workers = self._broker.workers
        if workers.all_ready and any(worker.age > self._last_before for worker in workers):
            self._settled = True
        unused = [
            name
            for name, daemon in self._daemons.items()
            if daemon.by_workers and daemon.then != "forget" and not daemon.wanted_by
        ]
        if self._sockets.inherited and self._begun:
            unused.append("")
        grace = self._broker.grace
        for name in self._unused.expired(unused, now, grace, workers.settled):
            if name:
                self._lifecycle.stop(self._daemons[name], "forget", f"no worker has used it for {grace:g} s")
            else:
                self._sockets.close_inherited()
        return self._unused.deadline(grace)

    # --- the operator ----------------------------------------------------------------------------

    def daemons(self) -> list[DaemonEntry]:
        return [self._describe(daemon) for _, daemon in sorted(self._daemons.items())]

    def _describe(self, daemon: DaemonState) -> DaemonEntry:
        return {
            "name": daemon.name,
            "pid": daemon.pid or None,
            "state": daemon.state,
            "address": ", ".join(str(one) for one in daemon.sockets) or None,
            "started": None if daemon.started is None else round(daemon.started, 3),
            "restarts": daemon.restarts,
            "command": daemon.spec.shown[:200],
            "memory": procfs.memory(daemon.pid) if daemon.pid else None,
            "user": daemon.run_as.user,
        }

    def command(self, verb: str, name: str) -> str | None:
        daemon = next((one for one in self._daemons.values() if one.goes_by(name)), None)
        if daemon is None or daemon.then == "forget":
            return None
        name = daemon.name
        if self._lifecycle.waits_for_master:
            raise DaemonError(
                f"this master starts daemon {name!r} only when the previous master has exited; use --app "
                "with the pid of the previous master"
            )
        if verb == "stop":
            self._lifecycle.record(daemon, "stopped by an operator")
            self._lifecycle.stop(daemon, "stop", "an operator requests it")
            return f"the daemon {name} is being stopped" if daemon.key else f"the daemon {name} is stopped"
        self._lifecycle.restart(daemon, "restarted by an operator")
        if daemon.state == FAILED:
            raise DaemonError(f"daemon {name!r} cannot be started: gunicorn's error log says why")
        return f"the daemon {name} is being restarted"

    # --- the end, and forks ----------------------------------------------------------------------

    def stop(self) -> None:
        """Stop all daemons, one after the other, each within its own ``stop_timeout``.

        Called without the broker's lock: the broker's thread has to read the supervisor's events.
        """
        seconds = 0.0
        with suppress(TimeoutError), self._broker.locked():
            seconds = self._lifecycle.stop_all()
        self._broker.wake()
        deadline = time.monotonic() + seconds + _STOP_MARGIN
        while self._lifecycle.supervised and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(TimeoutError), self._broker.locked():
            self._lifecycle.kill_all()

    def forked(self, upgrades: bool) -> None:
        self._lifecycle.forked()
        if not upgrades:
            # the next master gets them (export_state)
            self._sockets.close_in_child()

    def export_state(self, lowest: int) -> list[list[Any]]:
        """The sockets for the next master (see :meth:`.sockets.DaemonSockets.export_state`)."""
        return self._sockets.export_state(lowest)
