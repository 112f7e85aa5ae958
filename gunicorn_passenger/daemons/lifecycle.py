"""Starts and stops daemons through the supervisor, and follows its events.

Process: the master, in the broker's thread. Never: wait for a daemon, or start one while the previous master
(``USR2``) runs its own.

The master decides which daemons run; the supervisor (``daemons/supervisor_loop.py``), a process of its own,
starts, restarts and stops them. It is started with the first daemon, and again when it dies.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from gunicorn_passenger.daemons.sockets import DaemonSockets
from gunicorn_passenger.daemons.spec import stop_waves
from gunicorn_passenger.daemons.state import (
    FAILED,
    PAUSING,
    RUNNING,
    STOPPED,
    STOPPING,
    WAITING,
    DaemonState,
)
from gunicorn_passenger.daemons.supervisor_client import SupervisorClient
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.system.text import printable

#: Lines of output that are logged at a time, and the pause after them, in seconds. The rest stays in the
#: daemon's pipe: a daemon that writes faster blocks, and nothing else is affected.
_MAX_LINES = 200
_PAUSE_AFTER_LINES = 0.02
#: Characters of the description of an exit, part of which comes from the program itself.
_MAX_EXIT_TEXT = 500
#: How often the master checks whether the previous master has exited, in seconds.
_CHECK_INTERVAL = 0.1
#: Seconds before a supervisor that has died is started again; doubled each time, until one has lived for
#: ``STEADY`` seconds. ``daemons/supervisor_loop.py`` has the same for a daemon, with values of its own.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
STEADY = 60.0
#: Seconds after which a failed start is tried again.
_RETRY = 1.0
#: Errors of the channel to a supervisor that has exited.
_SUPERVISOR_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)

Event = Mapping[str, Any]


class DaemonLifecycle:
    """The processes of all daemons."""

    def __init__(
        self,
        broker: Broker,
        daemons: dict[str, DaemonState],
        sockets: DaemonSockets,
        environment: Callable[[Mapping[str, str]], dict[str, str]],
        watch_reports: Callable[[_socket.socket], None],
    ) -> None:
        """
        :param environment: makes a daemon's environment of the master's.
        :param watch_reports: sends reports on a socket, for the status daemon.
        """
        self._broker = broker
        self._daemons = daemons
        self._sockets = sockets
        self._environment = environment
        self._watch_reports = watch_reports
        self._supervisor: SupervisorClient | None = None
        self._supervisor_started = 0.0
        self._pause = FIRST_PAUSE
        #: when daemons that wait are started again (monotonic seconds)
        self._retry_at: float | None = None
        #: until when events of the supervisor are not read (monotonic seconds)
        self._paused_until = 0.0
        #: whether the supervisor does not know yet of a daemon that should stop
        self._stop_due = False
        self._started = False
        #: whether the previous master still runs its daemons
        self.waits_for_master = False
        self.stopping = False
        self._handlers: dict[str, Callable[[DaemonState, Event], None]] = {
            "started": self._on_started,
            "output": self._on_output,
            "leftover": self._on_leftover,
            "killing": self._on_killing,
            "stuck": self._on_stuck,
            "exited": self._on_exited,
            "given_up": self._on_given_up,
            "stopped": self._on_stopped,
        }

    @property
    def supervised(self) -> bool:
        """Whether the supervisor runs."""
        return self._supervisor is not None

    # --- starting and stopping -------------------------------------------------------------------

    def begin(self, wait_for_master: bool) -> None:
        """The master is ready: daemons may be started.

        :param wait_for_master: until the previous master has exited, none is.
        """
        self._started = True
        self.waits_for_master = wait_for_master

    def start(self, daemon: DaemonState) -> None:
        """Start a daemon now, or leave it waiting."""
        daemon.then = ""
        daemon.state = WAITING
        daemon.set_process()
        if not self._started or self.waits_for_master or self._retry_at is not None or self.stopping:
            return
        ours, theirs = self._report_pair(daemon)
        try:
            if self._supervisor is None:
                self._supervisor = SupervisorClient()
                self._supervisor_started = time.monotonic()
            listening = [one.sock for one in daemon.sockets]
            environ = self._environment(os.environ)
            daemon.key = self._supervisor.start(daemon.spec, daemon.run_as, listening, environ, theirs)
        except OSError as error:
            self._broker.log.error(
                "gunicorn-passenger: the daemon %s cannot be started now: %s; the master keeps "
                "trying",
                daemon.name, error,
            )  # fmt: skip
            if ours is not None:
                ours.close()
            if self._supervisor is None or error.errno in _SUPERVISOR_GONE:
                self._on_supervisor_lost()
            else:
                # such as too many descriptors: running daemons are not affected
                self._retry_at = time.monotonic() + _RETRY
            return
        finally:
            if theirs is not None:
                theirs.close()
        if ours is not None:
            try:
                self._watch_reports(ours)
            except OSError as error:
                self._log_without_reports(daemon.name, error)

    def _start_waiting(self) -> None:
        for daemon in list(self._daemons.values()):
            if daemon.state == WAITING and not daemon.key:
                self.start(daemon)

    def _report_pair(self, daemon: DaemonState) -> tuple[_socket.socket | None, _socket.socket | None]:
        if not daemon.spec.report:
            return None, None
        try:
            return _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self._log_without_reports(daemon.name, error)
            return None, None

    def _log_without_reports(self, name: str, error: OSError) -> None:
        self._broker.log.warning(
            "gunicorn-passenger: the daemon %s runs, but cannot show the status of this application: %s; "
            "correct that, then run 'gunicorn-passenger restart %s'",
            name,
            error.strerror,
            name,
        )

    def stop(self, daemon: DaemonState, then: str, why: str) -> None:
        """Stop a daemon soon, in the right order with others that should stop now.

        :param then: what to do when it has stopped: ``"start"``, ``"stop"`` or ``"forget"``.
        """
        daemon.then = then
        if not daemon.key:
            self._after_stop(daemon)
            return
        if daemon.state != STOPPING:
            daemon.state = STOPPING
            self._broker.log.info("Stopping the daemon %s: %s", daemon.name, why)
            self._stop_due = True
            self._broker.wake()

    def _send_stops(self) -> float:
        """Tell the supervisor which daemons should stop, including those that are stopping already.

        :returns: the seconds after which all of them have stopped or are killed.
        """
        self._stop_due = False
        stopping = {d.name: d for d in self._daemons.values() if d.key and d.state == STOPPING}
        waves = stop_waves(daemon.spec for daemon in stopping.values())
        if waves and self._supervisor is not None:
            try:
                self._supervisor.stop([[stopping[spec.name].key for spec in wave] for wave in waves])
            except OSError:
                self._on_supervisor_lost()
        return sum(max(spec.stop_timeout for spec in wave) for wave in waves)

    def restart(self, daemon: DaemonState, why: str) -> None:
        self.record(daemon, why)
        self.stop(daemon, "start", why)

    def _after_stop(self, daemon: DaemonState) -> None:
        """The daemon has stopped, with all of its processes."""
        then, daemon.then = daemon.then, ""
        daemon.key = ""
        daemon.set_process()
        if then == "start":
            if len(daemon.sockets) != len(daemon.spec.listen):
                try:
                    daemon.set_sockets(self._sockets.open(daemon.spec, daemon.sockets, daemon.places))
                except PassengerError as error:
                    daemon.state = FAILED
                    self._broker.log.error("gunicorn-passenger: daemon %s: %s", daemon.name, error)
                    return
            self.start(daemon)
            return
        self._close_sockets(daemon)
        if then == "forget":
            self._daemons.pop(daemon.name, None)
            self.record(daemon, "stopped: it is not requested any more")
        else:
            daemon.state = STOPPED

    def _close_sockets(self, daemon: DaemonState) -> None:
        self._sockets.close(daemon.sockets)
        daemon.sockets = []

    def record(self, daemon: DaemonState, text: str) -> None:
        """Add an event to the application's report."""
        self._broker.event_log.record("daemon", f"{daemon.name} {text}")

    # --- the end ---------------------------------------------------------------------------------

    def stop_all(self) -> float:
        """Stop all daemons, and the supervisor after them.

        :returns: the seconds after which all daemons have stopped or are killed.
        """
        self.stopping = True
        for daemon in self._daemons.values():
            if daemon.key:
                daemon.state, daemon.then = STOPPING, "stop"
        seconds = self._send_stops()
        if self._supervisor is not None:
            try:
                self._supervisor.exit()
            except OSError:
                self._on_supervisor_lost()
        return seconds

    def kill_all(self) -> None:
        """Kill the processes that have not stopped in time, and close all sockets."""
        if self._supervisor is not None:
            self._on_supervisor_lost()
        for daemon in self._daemons.values():
            self._close_sockets(daemon)

    def forked(self) -> None:
        """In a child: the supervisor is the master's."""
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None

    # --- the broker's loop -----------------------------------------------------------------------

    def descriptors(self) -> dict[int, int]:
        if self._supervisor is None or time.monotonic() < self._paused_until:
            return {}
        return {self._supervisor.fileno(): select.POLLIN}

    def serve(self) -> None:
        """Read events of the supervisor."""
        lines = 0
        while self._supervisor is not None and lines < _MAX_LINES:
            try:
                event = self._supervisor.receive()
                if event is None:
                    self._on_supervisor_lost()
                    return
                lines += self._dispatch(event)
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
                self._broker.log.error(
                    "gunicorn-passenger: the supervisor of the daemons sent a malformed message (%r); the "
                    "master restarts it and the daemons",
                    error,
                )
                self._on_supervisor_lost()
                return
        self._paused_until = time.monotonic() + _PAUSE_AFTER_LINES

    def tick(self, now: float) -> list[float]:
        """Start what can be started now.

        :returns: when to be called again (monotonic seconds).
        """
        due = []
        if self._stop_due:
            self._send_stops()
        if self.waits_for_master:
            if self._sockets.previous_master_runs():
                due.append(now + _CHECK_INTERVAL)
            else:
                self.waits_for_master = False
                self._start_waiting()
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._start_waiting()
        if self._retry_at is not None:
            due.append(self._retry_at)
        if now < self._paused_until:
            due.append(self._paused_until)
        return due

    # --- events of the supervisor ----------------------------------------------------------------

    def _dispatch(self, event: Event) -> int:
        """Handle an event.

        :returns: how many lines it adds to the log.
        """
        kind = event["event"]
        if kind == "warning":
            self._broker.log.warning("gunicorn-passenger: the supervisor of the daemons: %s", event["text"])
            return 1
        handler = self._handlers[kind]
        daemon = next((d for d in self._daemons.values() if d.key == event["key"]), None)
        if daemon is None:
            return 0
        handler(daemon, event)
        return len(event["lines"]) if kind == "output" else 1

    def _on_output(self, daemon: DaemonState, event: Event) -> None:
        for line in event["lines"]:
            if line.strip():
                self._broker.log.info("[%s] %s", daemon.name, line.rstrip("\r"))

    def _on_started(self, daemon: DaemonState, event: Event) -> None:
        daemon.set_process(int(event["pid"]), time.time())
        if daemon.state != STOPPING:
            daemon.state = RUNNING
        self._broker.log.info("Daemon %s runs as pid %s", daemon.name, daemon.pid)

    def _on_leftover(self, daemon: DaemonState, event: Event) -> None:
        self._broker.log.warning(
            "Daemon %s: its first process has exited, but %s other processes are left, which are stopped "
            "too; a daemon must stay in the foreground",
            daemon.name,
            event["count"],
        )

    def _on_killing(self, daemon: DaemonState, event: Event) -> None:
        if event["first"] or daemon.spec.kill_mode == "group":
            self._broker.log.warning(
                "Daemon %s has not stopped within %g s (stop_timeout): killing %s processes",
                daemon.name, daemon.spec.stop_timeout, event["count"],
            )  # fmt: skip
        else:
            self._broker.log.info(
                "Daemon %s has exited and left %s processes behind, which are killed (kill_mode='mixed')",
                daemon.name, event["count"],
            )  # fmt: skip

    def _on_stuck(self, daemon: DaemonState, event: Event) -> None:
        self._broker.log.error(
            "Daemon %s: %s processes cannot be killed, because they run as another user or wait for a "
            "device; find and stop them by hand",
            daemon.name,
            event["count"],
        )

    def _on_exited(self, daemon: DaemonState, event: Event) -> None:
        pause = event.get("pause")
        how = printable(str(event["how"]))[:_MAX_EXIT_TEXT]
        daemon.set_process()
        if pause is None:
            self._broker.log.error("Daemon %s %s", daemon.name, how)
        else:
            daemon.restarts += 1
            self._broker.log.error("Daemon %s %s; it is started again in %g s", daemon.name, how, pause)
            if daemon.state != STOPPING:
                daemon.state = PAUSING
        self.record(daemon, how)

    def _on_given_up(self, daemon: DaemonState, event: Event) -> None:
        self._broker.log.error(
            "Daemon %s is not started again: it has exited %s times in a row, each time within seconds of "
            "its start; correct the cause, then run 'gunicorn-passenger restart %s' or reload gunicorn",
            daemon.name,
            event["deaths"],
            daemon.name,
        )
        self.record(daemon, "is not started again: it exited too often")
        self._remove_from_supervisor(daemon)
        daemon.state = FAILED
        # no process would ever accept a connection
        self._close_sockets(daemon)
        if daemon.then:
            self._after_stop(daemon)

    def _on_stopped(self, daemon: DaemonState, _event: Event) -> None:
        self._broker.log.info("Daemon %s has stopped", daemon.name)
        self._remove_from_supervisor(daemon)
        self._after_stop(daemon)

    def _remove_from_supervisor(self, daemon: DaemonState) -> None:
        if self._supervisor is not None:
            self._supervisor.forget(daemon.key)
        daemon.key = ""

    def _on_supervisor_lost(self) -> None:
        """The supervisor has exited, and the daemons with it."""
        supervisor, self._supervisor = self._supervisor, None
        now = time.monotonic()
        if supervisor is not None:
            left = supervisor.kill_orphans()
            if self.stopping:
                return
            self._broker.log.error(
                "gunicorn-passenger: the supervisor of the daemons (pid %s) has exited; the master starts it "
                "and all daemons again%s",
                supervisor.pid, f", and has killed {left} processes that they left behind" if left else "",
            )  # fmt: skip
            self._broker.event_log.record("daemon", "the supervisor of the daemons was started again")
        self._pause = FIRST_PAUSE if now - self._supervisor_started >= STEADY else self._pause
        self._retry_at = now + self._pause
        self._pause = min(LONGEST_PAUSE, self._pause * 2)
        for daemon in list(self._daemons.values()):
            if daemon.key:
                daemon.key = ""
                if daemon.state == STOPPING:
                    self._after_stop(daemon)
                else:
                    daemon.state = WAITING
                    daemon.set_process()
                    daemon.restarts += 1
