"""The daemons of the application, as the master knows them: who wants which, their sockets, their state.

Runs in: the master, in the broker's thread and around gunicorn's hooks. Must never: wait for a daemon (but
when gunicorn exits), give one more rights than whoever has asked for it may have, or start one while an older
master has its own.

Who does what: the master holds the sockets and decides what is to run; the supervisor
(``daemons/supervisor.py``), a process of its own, starts, restarts and ends. It is started with the first
daemon, and again when it dies.

The sockets are no part of the arbiter's ``LISTENERS``: a worker of gunicorn's own classes would accept from
them.
"""

from __future__ import annotations

import _socket
import errno
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.spec import (
    MAX_DAEMONS,
    DaemonListen,
    DaemonSpec,
    RunAs,
    resolve_run_as,
    wishes,
)
from gunicorn_passenger.daemons.supervisor_client import (
    DaemonSocket,
    SupervisorClient,
    daemon_socket,
    open_daemon_socket,
)
from gunicorn_passenger.errors import DaemonError, PassengerError
from gunicorn_passenger.ipc.channel import DaemonSpawned, Message, RequestDenied, SpawnDaemon
from gunicorn_passenger.master import upgrade_state
from gunicorn_passenger.master.listeners import MAX_PORTS
from gunicorn_passenger.status import prometheus_multiproc
from gunicorn_passenger.system import listening_sockets, procfs
from gunicorn_passenger.system.text import printable

#: Lines of output that are logged in one go, and the pause after so many, in seconds. More stay in the
#: daemon's pipe: a daemon that floods its output waits, and everybody else does not.
_LINES = 200
#: Characters of how a daemon has ended, which the supervisor may have from the program itself.
_MAX_HOW = 500
_REST = 0.02
#: How often it is looked at whether the master of before is gone, in seconds.
_LOOK = 0.1
#: Seconds before a supervisor that has died is started again; doubled each time, until one has lived for a
#: minute.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
_STEADY = 60.0
#: Seconds after which a start is tried again that failed for want of something.
_RETRY = 1.0
#: What the channel to a supervisor says that is gone.
_LOST = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)
#: Seconds that the supervisor has beyond the daemons' own, when gunicorn exits.
_SPARE = 5.0

WAITING, RUNNING, PAUSING, FAILED, STOPPING, STOPPED = (
    "waiting", "running", "pausing", "failed", "stopping", "stopped",
)  # fmt: skip


@dataclass
class DaemonState:
    """One daemon, whether it runs or not."""

    spec: DaemonSpec
    who: RunAs
    #: whether workers ask for it; else the operator does, or a program that was preloaded
    by_workers: bool
    sockets: list[DaemonSocket] = field(default_factory=list)
    #: Host, port and path of each of its sockets, also of those that are closed while it is stopped: what
    #: workers know of it stays true when it is started again.
    places: list[tuple[str, int, str]] = field(default_factory=list)
    #: the workers that want it, by age
    wanted_by: set[int] = field(default_factory=set)
    #: how many reloads there had been when it was last asked for
    generation: int = 0
    #: since when no worker wants it (monotonic seconds)
    unwanted_since: float | None = None
    state: str = WAITING
    #: the supervisor's name for it, while that knows it
    key: str = ""
    pid: int = 0
    #: Unix time
    started: float | None = None
    restarts: int = 0
    #: what is to become of it once it has ended: "start", "stop" or "forget"
    then: str = ""

    def listens(self, sockets: list[DaemonSocket]) -> None:
        """These are its sockets from now on."""
        self.sockets = sockets
        self.places = [(one.host, one.port, one.path) for one in sockets]


class DaemonManager:
    """All daemons of this master: a :class:`~.service.BrokerService`."""

    def __init__(self, broker: Any, channels: bool = True) -> None:
        """
        :param channels: whether workers have channels, and so can ask for daemons.
        """
        self._broker = broker
        self._channels = channels
        self._daemons: dict[str, DaemonState] = {}
        #: what could not be had, and is not tried again before the next reload
        self._refused: set[DaemonSpec] = set()
        self._supervisor: SupervisorClient | None = None
        self._supervisor_started = 0.0
        self._pause = _FIRST_PAUSE
        #: when the supervisor is to be started again (monotonic seconds)
        self._again_at: float | None = None
        self._rest_until = 0.0
        self._generation = 0
        #: the last worker that was started before the last reload
        self._last_before = 0
        #: whether all workers have been ready since
        self._settled = False
        self._begun = False
        self._waits_for_master = False
        self._ended = False
        self._handed = _handed()
        self._handed_since: float | None = None

    # --- called by gunicorn's hooks --------------------------------------------------------------

    def started(self, arbiter: Any) -> None:
        """
        :raises PassengerError: when a daemon that the master's own code asks for cannot be had.
        """
        self._waits_for_master = bool(arbiter.master_pid)
        self._begun = True
        if self._waits_for_master and wishes.unread:
            self._broker.log.info(
                "Daemons wait until the master of before (pid %s) is gone", arbiter.master_pid
            )
        for spec, trusted in wishes.all():
            self._want(spec, trusted)

    def reloaded(self) -> None:
        self._generation += 1
        self._settled = False
        arbiter = self._broker.arbiter
        workers = dict(arbiter.WORKERS).values() if arbiter is not None else ()
        self._last_before = max((worker.age for worker in workers), default=0)
        self._refused.clear()
        wanted = wishes.all()
        names = {spec.name for spec, _ in wanted}
        for daemon in [d for d in self._daemons.values() if not d.by_workers and d.spec.name not in names]:
            self._end(daemon, "forget", "gunicorn.conf.py does not ask for it any more")
        for spec, trusted in wanted:
            try:
                self._want(spec, trusted)
            except PassengerError as error:
                self._refused.add(spec)
                self._broker.log.error("gunicorn-passenger: %s; it stays as it was", error)

    def refresh(self) -> None:
        """Daemons that were asked for since the master was ready, by a hook of gunicorn's."""
        for spec, trusted in wishes.all():
            if spec.name not in self._daemons and spec not in self._refused:
                try:
                    self._want(spec, trusted)
                except PassengerError as error:
                    self._refused.add(spec)
                    self._broker.log.error("gunicorn-passenger: %s", error)

    def handed(self) -> list[Any]:
        """What the sockets that came from the master before are bound to."""
        return [listening_sockets.sockname(one.sock) for _, _, one in self._handed]

    def _want(self, spec: DaemonSpec, trusted: bool) -> None:
        """The master's own code wants a daemon, now or still."""
        cfg = self._broker.cfg
        known = self._daemons.get(spec.name)
        if known is not None and known.by_workers:
            raise daemon_errors.duplicate_daemon_name(spec.name)
        if known is None or known.spec != spec:
            # it only looks, also where the directory is another user's; the daemon's own user runs the
            # command
            spec.find_command(dict(spec.env).get("PATH", os.environ.get("PATH")))
        who = resolve_run_as(spec, cfg.uid, cfg.gid, cfg.initgroups, trusted)
        self._settle_spec(known, spec, who, by_workers=False)

    # --- wanting ---------------------------------------------------------------------------------

    def _settle_spec(
        self, known: DaemonState | None, spec: DaemonSpec, who: RunAs, by_workers: bool
    ) -> DaemonState:
        """Have a daemon run by this spec: a new one, the present one, or the present one changed."""
        if known is None or known.then == "forget":
            if known is None and len(self._daemons) >= MAX_DAEMONS:
                raise daemon_errors.too_many_daemons(MAX_DAEMONS)
        elif known.spec == spec and known.who == who:
            if self._generation > known.generation:
                known.generation = self._generation
                if spec.on_reload == "restart" or known.state == FAILED:
                    self._restart(known, "restarted by the reload")
            return known
        held = known.sockets if known is not None else []
        sockets = self._open(spec, held)
        if known is None:
            known = self._daemons[spec.name] = DaemonState(spec, who, by_workers, generation=self._generation)
            known.listens(sockets)
            self._launch(known)
            return known
        spare = [one for one in held if one not in sockets]
        known.spec, known.who, known.by_workers = spec, who, by_workers
        known.listens(sockets)
        known.generation = self._generation
        self._close(spare)
        self._restart(known, "restarted: it is asked for differently")
        return known

    def _open(
        self, spec: DaemonSpec, held: list[DaemonSocket], places: Sequence[tuple[str, int, str]] = ()
    ) -> list[DaemonSocket]:
        """The sockets of a spec; those that are held already, or came from the master before, are kept.

        :param places: where they were bound before they were closed.
        :raises errors.ListenError: when one is not to be had; then nothing has changed.
        """
        free = list(held)
        found: list[DaemonSocket] = []
        opened: list[DaemonSocket] = []
        try:
            for want in spec.listen:
                one = next((b for b in free if b.want == want), None)
                if one is not None:
                    free.remove(one)
                else:
                    one = self._take_handed(spec, len(found))
                    if one is None:
                        before = places[len(found)][1] if len(found) < len(places) else 0
                        one = self._open_one(spec, want, before)
                        self._broker.log.info("Opened %s for the daemon %s", one, spec.name)
                    opened.append(one)
                found.append(one)
        except BaseException:
            for one in opened:
                one.close(unlink=True)
            raise
        return found

    def _take_handed(self, spec: DaemonSpec, index: int) -> DaemonSocket | None:
        want = spec.listen[index]
        for entry in self._handed:
            name, place, one = entry
            same = one.want == want and (want.kind != "auto" or (name, place) == (spec.name, index))
            if same:
                self._handed.remove(entry)
                if one.path:
                    # its file is removed by the last of the masters
                    one = daemon_socket(want, one.sock)
                # ports that this master's own port allocation does not name are not had by way of the one
                # before
                if want.kind != "unix":
                    try:
                        self._broker.allocation.check(one.port)
                    except errors.ListenError:
                        one.close(unlink=False)
                        raise
                return one
        return None

    def _open_one(self, spec: DaemonSpec, want: Any, before: int) -> DaemonSocket:
        broker = self._broker
        # a master without a descriptor left could not even start workers
        limit = min(MAX_PORTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        if sum(len(daemon.sockets) for daemon in self._daemons.values()) >= limit:
            raise listen_errors.too_many_ports(limit)
        cfg = broker.cfg
        mode = 0o666 & ~cfg.umask if cfg.umask else 0o600
        one = open_daemon_socket(
            want, spec.within, broker.allocation, cfg.backlog, mode, self._holder, before
        )
        if one.path and (cfg.uid, cfg.gid) != (os.geteuid(), os.getegid()):
            # As gunicorn does for its own: the workers are to reach it. The operator has named the path, and
            # its directory may be another user's all the same: give() follows no link.
            with suppress(OSError):
                listening_sockets.give(one.path, cfg.uid, cfg.gid)
        return one

    def _holder(self, number: int) -> str:
        for daemon in self._daemons.values():
            if any(one.port == number for one in daemon.sockets):
                return f"its daemon {daemon.spec.name!r}"
        for port in self._broker.listeners.ports.values():
            if port.port == number:
                return f"its server on {port.key}"
        return ""

    # --- starting and ending ---------------------------------------------------------------------

    def _launch(self, daemon: DaemonState) -> None:
        """Start a daemon, if any may be started now."""
        daemon.then = ""
        daemon.state, daemon.pid, daemon.started = WAITING, 0, None
        if not self._begun or self._waits_for_master or self._again_at is not None or self._ended:
            return
        report, theirs = self._report_pair(daemon)
        try:
            if self._supervisor is None:
                self._supervisor = SupervisorClient()
                self._supervisor_started = time.monotonic()
            listening = [one.sock for one in daemon.sockets]
            environ = prometheus_multiproc.directory.environment(os.environ)
            daemon.key = self._supervisor.start(daemon.spec, daemon.who, listening, environ, theirs)
        except OSError as error:
            self._broker.log.error(
                "gunicorn-passenger: the daemon %s cannot be started now: %s", daemon.spec.name, error
            )
            if report is not None:
                report.close()
            if self._supervisor is None or error.errno in _LOST:
                self._lose()
            else:
                # no descriptors, for one: the daemons that run are none the worse for it
                self._again_at = time.monotonic() + _RETRY
            return
        finally:
            if theirs is not None:
                theirs.close()
        if report is not None:
            self._watch(report)

    def _report_pair(self, daemon: DaemonState) -> tuple[Any, Any]:
        if not daemon.spec.report:
            return None, None
        try:
            return _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self._broker.log.warning(
                "gunicorn-passenger: the daemon %s gets no reports: %s", daemon.spec.name, error.strerror
            )
            return None, None

    def _watch(self, sock: Any) -> None:
        """Have whoever tells reports answer on this socket."""
        for owner in (self._broker, *self._broker.parts):
            watch = getattr(owner, "watch_reports", None)
            if watch is not None:
                try:
                    watch(sock)
                except OSError as error:
                    self._broker.log.warning("gunicorn-passenger: a daemon gets no reports: %s", error)
                return
        sock.close()

    def _end(self, daemon: DaemonState, then: str, why: str) -> None:
        """End a daemon; when it is gone, do ``then``."""
        daemon.then = then
        if not daemon.key:
            self._after(daemon)
            return
        if daemon.state != STOPPING:
            daemon.state = STOPPING
            self._broker.log.info("Stopping the daemon %s: %s", daemon.spec.name, why)
            try:
                assert self._supervisor is not None
                self._supervisor.stop(daemon.key)
            except OSError:
                self._lose()

    def _restart(self, daemon: DaemonState, why: str) -> None:
        self._note(daemon, why)
        self._end(daemon, "start", why)

    def _after(self, daemon: DaemonState) -> None:
        """It has ended, and no process of it is left."""
        then, daemon.then = daemon.then, ""
        daemon.key, daemon.pid, daemon.started = "", 0, None
        if then == "start":
            if len(daemon.sockets) != len(daemon.spec.listen):
                try:
                    daemon.listens(self._open(daemon.spec, daemon.sockets, daemon.places))
                except PassengerError as error:
                    daemon.state = FAILED
                    self._broker.log.error("gunicorn-passenger: daemon %s: %s", daemon.spec.name, error)
                    return
            self._launch(daemon)
            return
        self._close(daemon.sockets)
        daemon.sockets = []
        if then == "forget":
            self._daemons.pop(daemon.spec.name, None)
            self._note(daemon, "stopped: nobody wants it any more")
        else:
            daemon.state = STOPPED

    def _close(self, bounds: Iterable[DaemonSocket]) -> None:
        arbiter = self._broker.arbiter
        shared = arbiter is not None and (arbiter.reexec_pid or self._master_before())
        for one in bounds:
            one.close(unlink=not shared)

    def _master_before(self) -> bool:
        """Whether the master that this one came from (USR2) is there; gunicorn itself notices later."""
        before = self._broker.arbiter.master_pid
        return bool(before) and os.getppid() == before

    def _note(self, daemon: DaemonState, text: str) -> None:
        self._broker.history.note("daemon", f"{daemon.spec.name} {text}")

    # --- the broker's loop -----------------------------------------------------------------------

    def descriptors(self) -> dict[int, int]:
        if self._supervisor is None or time.monotonic() < self._rest_until:
            return {}
        return {self._supervisor.fileno(): select.POLLIN}

    def serve(self, fd: int, events: int) -> None:
        lines = 0
        while self._supervisor is not None and lines < _LINES:
            try:
                message = self._supervisor.receive()
                if message is None:
                    self._lose()
                    return
                lines += self._hear(message)
            except BlockingIOError:
                return
            except (
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
                OverflowError,
            ) as error:
                self._broker.log.error("gunicorn-passenger: the supervisor said what is nothing: %r", error)
                self._lose()
                return
        self._rest_until = time.monotonic() + _REST

    def tick(self, now: float) -> float | None:
        due = []
        if self._waits_for_master:
            if self._master_before():
                due.append(now + _LOOK)
            else:
                self._waits_for_master = False
                self._launch_all()
        if self._again_at is not None and now >= self._again_at:
            self._again_at = None
            self._launch_all()
        if self._again_at is not None:
            due.append(self._again_at)
        if now < self._rest_until:
            due.append(self._rest_until)
        due.extend(self._drop_unwanted(now))
        return min(due, default=None)

    def _launch_all(self) -> None:
        for daemon in list(self._daemons.values()):
            if daemon.state == WAITING and not daemon.key:
                self._launch(daemon)

    def _drop_unwanted(self, now: float) -> list[float]:
        """End what no worker has wanted for the grace period, as it is done for ports.

        The clock stands still while a worker boots: it may be about to ask for it.
        """
        links = self._broker._links
        settled = all(link.ready for link in links.values()) and (bool(links) or not self._channels)
        if settled and any(link.age > self._last_before for link in links.values()):
            self._settled = True
        grace = self._broker.grace
        due = []
        for daemon in [d for d in self._daemons.values() if d.by_workers and d.then != "forget"]:
            if daemon.wanted_by or not settled:
                daemon.unwanted_since = None
            elif daemon.unwanted_since is None:
                daemon.unwanted_since = now
            if daemon.unwanted_since is not None:
                if now - daemon.unwanted_since >= grace:
                    self._end(daemon, "forget", f"no worker has wanted it for {grace:g} s")
                else:
                    due.append(daemon.unwanted_since + grace)
        if self._handed and settled and self._begun:
            if self._handed_since is None:
                self._handed_since = now
            if now - self._handed_since >= grace:
                for _, _, one in self._handed:
                    one.close(unlink=False)
                self._handed = []
            else:
                due.append(self._handed_since + grace)
        return due

    # --- the supervisor --------------------------------------------------------------------------

    def _hear(self, message: dict[str, Any]) -> int:
        """What has become of a daemon.

        :returns: how many lines of output there were.
        """
        log = self._broker.log
        what = message["is"]
        if what == "warning":
            log.warning("gunicorn-passenger: the supervisor of the daemons: %s", message["text"])
            return 1
        daemon = next((d for d in self._daemons.values() if d.key == message["key"]), None)
        if daemon is None:
            return 0
        name = daemon.spec.name
        if what == "lines":
            for line in message["lines"]:
                if line.strip():
                    log.info("[%s] %s", name, line.rstrip("\r"))
            return len(message["lines"])
        if what == "started":
            daemon.pid, daemon.started = int(message["pid"]), time.time()
            if daemon.state != STOPPING:
                daemon.state = RUNNING
            log.info("Daemon %s runs as pid %s", name, daemon.pid)
        elif what == "left":
            log.warning(
                "Daemon %s: its first process has ended and left %s others, which are ended too: "
                "a daemon must stay in the foreground", name, message["count"],
            )  # fmt: skip
        elif what == "killed":
            log.warning(
                "Daemon %s has not ended within %g s: killing %s processes",
                name, daemon.spec.stop_timeout, message["count"],
            )  # fmt: skip
        elif what == "stuck":
            log.error(
                "Daemon %s: %s processes cannot be ended (another user's, or waiting for a device): they are "
                "left alone", name, message["count"],
            )  # fmt: skip
        elif what == "died":
            self._died(daemon, message)
        elif what == "failed":
            log.error(
                "Daemon %s is given up: it has died %s times in a row within seconds; mend it, then "
                "'gunicorn-passenger restart %s', or reload", name, message["deaths"], name,
            )  # fmt: skip
            self._note(daemon, "given up")
            self._gone(daemon)
            daemon.state = FAILED
            # nobody would ever take up what connects
            self._close(daemon.sockets)
            daemon.sockets = []
            if daemon.then:
                self._after(daemon)
        elif what == "ended":
            log.info("Daemon %s has ended", name)
            self._gone(daemon)
            self._after(daemon)
        return 1

    def _died(self, daemon: DaemonState, message: dict[str, Any]) -> None:
        pause = message.get("pause")
        how = printable(str(message["how"]))[:_MAX_HOW]
        daemon.pid, daemon.started = 0, None
        if pause is None:
            self._broker.log.error("Daemon %s %s", daemon.spec.name, how)
        else:
            daemon.restarts += 1
            self._broker.log.error("Daemon %s %s; it is started again in %g s", daemon.spec.name, how, pause)
            if daemon.state != STOPPING:
                daemon.state = PAUSING
        self._note(daemon, how)

    def _gone(self, daemon: DaemonState) -> None:
        if self._supervisor is not None:
            self._supervisor.forget(daemon.key)
        daemon.key = ""

    def _lose(self) -> None:
        """The supervisor is gone, and the daemons with it."""
        supervisor, self._supervisor = self._supervisor, None
        now = time.monotonic()
        if supervisor is not None:
            left = supervisor.clear()
            if self._ended:
                return
            self._broker.log.error(
                "gunicorn-passenger: the supervisor of the daemons (pid %s) is gone; it and they are started "
                "again%s",
                supervisor.pid, f", what was left of them ({left} processes) was killed" if left else "",
            )  # fmt: skip
            self._broker.history.note("daemon", "the supervisor of the daemons was started again")
        self._pause = _FIRST_PAUSE if now - self._supervisor_started >= _STEADY else self._pause
        self._again_at = now + self._pause
        self._pause = min(_LONGEST_PAUSE, self._pause * 2)
        for daemon in list(self._daemons.values()):
            if daemon.key:
                daemon.key = ""
                if daemon.state == STOPPING:
                    self._after(daemon)
                else:
                    daemon.state, daemon.pid, daemon.started = WAITING, 0, None
                    daemon.restarts += 1

    # --- workers ---------------------------------------------------------------------------------

    def message(self, age: int, message: Message) -> Message | None:
        if not isinstance(message, SpawnDaemon):
            return None
        number = message.id
        if self._broker.stopping() or self._ended:
            return RequestDenied(number, "listen", 0, "the application is stopping")
        try:
            daemon = self._asked(age, DaemonSpec.unpack(message.spec))
        except errors.ListenError as error:
            return RequestDenied(number, errors.refusal_kind(error), error.errno or 0, str(error)[:1000])
        except PassengerError as error:
            return RequestDenied(number, "daemon", 0, str(error)[:1000])
        except Exception as error:
            # whatever a worker asks for, it is answered
            text = f"the master cannot start what was asked for: {error!r}"
            self._broker.log.error("gunicorn-passenger: worker %s: %s", self._broker.pid(age), text)
            return RequestDenied(number, "daemon", 0, text[:1000])
        # one that is stopped, or given up, will be where it was
        return DaemonSpawned(number, daemon.spec.name, *(daemon.places[0] if daemon.places else ()))

    def _asked(self, age: int, spec: DaemonSpec) -> DaemonState:
        """A worker wants a daemon."""
        cfg = self._broker.cfg
        # with the workers' rights, whatever the master's are
        who = resolve_run_as(spec, cfg.uid, cfg.gid, cfg.initgroups, trusted=False)
        for item in spec.listen:
            if item.kind == "unix" and cfg.uid != os.geteuid():
                raise listen_errors.unix_other_user(item.path, self._broker.allocation.account)
        known = self._daemons.get(spec.name)
        if known is not None and known.then != "forget":
            if not known.by_workers:
                raise daemon_errors.duplicate_daemon_name(spec.name)
            if known.spec != spec and not self._may_change(known, age):
                self._broker.log.warning(
                    "gunicorn-passenger: worker %s asks for the daemon %s differently than the workers "
                    "before it; it stays as it is until a reload",
                    self._broker.pid(age),
                    spec.name,
                )
                spec, who = known.spec, known.who
        daemon = self._settle_spec(known, spec, who, by_workers=True)
        daemon.wanted_by.add(age)
        daemon.unwanted_since = None
        return daemon

    def _may_change(self, known: DaemonState, age: int) -> bool:
        """A worker asks for a daemon that others have asked for differently: is its word the newer one?

        :returns: ``False`` when the program has changed on the disk since its workers have started, and the
            reload is still to come.
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
            raise daemon_errors.duplicate_daemon_name(known.spec.name)
        if newer:
            known.wanted_by.clear()
        return newer

    def left(self, age: int) -> None:
        for daemon in self._daemons.values():
            daemon.wanted_by.discard(age)

    # --- people ----------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        return {"daemons": [self._describe(daemon) for _, daemon in sorted(self._daemons.items())]}

    def _describe(self, daemon: DaemonState) -> dict[str, Any]:
        return {
            "name": daemon.spec.name,
            "pid": daemon.pid or None,
            "state": daemon.state,
            "address": ", ".join(str(one) for one in daemon.sockets) or None,
            "started": None if daemon.started is None else round(daemon.started, 3),
            "restarts": daemon.restarts,
            "command": daemon.spec.shown[:200],
            "memory": procfs.memory(daemon.pid) if daemon.pid else None,
            "user": daemon.who.user,
        }

    def command(self, verb: str, name: str) -> str | None:
        daemon = self._daemons.get(name)
        if daemon is None or daemon.then == "forget":
            return None
        if self._waits_for_master:
            raise DaemonError(f"daemon {name!r} waits until the master of before is gone; ask that one")
        if verb == "stop":
            self._note(daemon, "stopped by an operator")
            self._end(daemon, "stop", "an operator asks for it")
            return f"the daemon {name} is being stopped" if daemon.key else f"the daemon {name} is stopped"
        self._restart(daemon, "restarted by an operator")
        if daemon.state == FAILED:
            raise DaemonError(f"daemon {name!r} cannot be started: the log tells why")
        return f"the daemon {name} is being restarted"

    # --- the end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all daemons, each within its own timeout. Without the gate: the broker's thread goes on."""
        with suppress(TimeoutError), self._broker._hold():
            self._ended = True
            for daemon in self._daemons.values():
                if daemon.key:
                    daemon.state, daemon.then = STOPPING, "stop"
            if self._supervisor is not None:
                try:
                    self._supervisor.end()
                except OSError:
                    self._lose()
        self._broker._wake()
        longest = max((d.spec.stop_timeout for d in self._daemons.values() if d.key), default=0.0)
        deadline = time.monotonic() + longest + _SPARE
        while self._supervisor is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(TimeoutError), self._broker._hold():
            if self._supervisor is not None:
                self._lose()
            for daemon in self._daemons.values():
                self._close(daemon.sockets)
                daemon.sockets = []

    # --- forks -----------------------------------------------------------------------------------

    def forked(self) -> None:
        """In a child: the supervisor and the sockets are the master's.

        The child that becomes the next master keeps the sockets until then (:meth:`hand_over`).
        """
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None
        if not _reexec():
            for daemon in self._daemons.values():
                for one in daemon.sockets:
                    one.sock.close()
            for _, _, one in self._handed:
                one.sock.close()

    def export_state(self, lowest: int) -> list[list[Any]]:
        """In the child that is about to become the next master: the sockets for it.

        :param lowest: the lowest number that their descriptors may have.
        :returns: of each: the daemon, which of its sockets, the descriptor, kind, host, port and path.
        :raises OSError: when this process has no room for them.
        """
        entries: list[list[Any]] = []
        for daemon in self._daemons.values():
            for index, one in enumerate(daemon.sockets):
                number = upgrade_state.inheritable(one.sock.fileno(), lowest)
                want = one.want
                entries.append([daemon.spec.name, index, number, want.kind, want.host, want.port, want.path])
        return entries


def _reexec() -> bool:
    """Whether the fork that is going on is the arbiter's own for ``USR2``: it tells no hook before."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "reexec" and frame.f_globals.get("__name__") == "gunicorn.arbiter":
            return True
        frame = frame.f_back
    return False


def _handed() -> list[tuple[str, int, DaemonSocket]]:
    """The sockets of the master before: whose, which of its, and the socket."""
    found = []
    with suppress(ValueError, TypeError):
        for name, index, number, kind, host, port, path in upgrade_state.inherited().pop("daemons", []):
            with suppress(OSError):
                sock = _socket.socket(fileno=number)
                os.set_inheritable(number, False)
                found.append((name, index, daemon_socket(DaemonListen(kind, host, port, path), sock)))
    return found
