"""Receives the workers' messages, and dispatches each to its handler.

Process: the master, in the broker's thread. Never: block, trust a worker, or let the failure of one worker
reach another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import UNIX_PATH_MAX
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.messages import (
    AcceptPaused,
    Acknowledged,
    AssignResult,
    BootFailure,
    BootVerdict,
    GetReport,
    KeepBind,
    Message,
    OfferConnections,
    OpenMailbox,
    OpenPort,
    PacketRejected,
    ReleaseMailbox,
    ReleasePort,
    ReportSent,
    RequestDenied,
    RequestSuccessor,
    SuccessorReady,
    WorkerLeaving,
    WorkerReady,
)
from gunicorn_passenger.ipc.report_types import Report
from gunicorn_passenger.ipc.scoreboard import RetiredCounters
from gunicorn_passenger.master.boot_failures import BootFailures
from gunicorn_passenger.master.event_log import EventLog
from gunicorn_passenger.master.listener_sync import ListenerSync
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.loop import BrokerLoop
from gunicorn_passenger.master.mailbox_exchange import MailboxExchange
from gunicorn_passenger.master.migration_relay import MigrationRelay
from gunicorn_passenger.master.placement import PlacementScheduler
from gunicorn_passenger.master.worker_channels import WorkerChannel, WorkerChannels
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.text import MAX_NAME, printable

#: How many malformed packets of one worker are tolerated before its channel is closed.
_MAX_MALFORMED = 100
#: How many messages of a worker that was reaped are still read.
_MAX_REMAINING = 100
#: Seconds between two checks whether the descriptors of a worker that is not read meanwhile are closed.
_FULL_CLOSER_INTERVAL = 0.02
#: Characters of a text in a RequestDenied.
_MAX_DENIAL = 1000


class MessageDispatcher:
    """What the master does with the messages of its workers, and with their end."""

    def __init__(
        self,
        log: Log,
        workers: WorkerChannels,
        listeners: Listeners,
        placement: PlacementScheduler,
        sync: ListenerSync,
        loop: BrokerLoop,
        retired_counters: RetiredCounters,
        event_log: EventLog,
        boot_failures: BootFailures,
        report: Callable[[], Report],
    ) -> None:
        """:param report: makes the application's report."""
        self._log = log
        self._workers = workers
        self._listeners = listeners
        self._placement = placement
        self._sync = sync
        self._loop = loop
        self._retired_counters = retired_counters
        self._event_log = event_log
        self._boot_failures = boot_failures
        self._report = report
        self.migration = MigrationRelay(workers, listeners, self.reply)
        self.mailboxes = MailboxExchange(self.reply)
        #: ages of workers whose channel was closed while they run, until they are reaped
        self._expelled: set[int] = set()
        self._handlers: dict[type[Message], Callable[[WorkerChannel, Any, int | None], object]] = {
            OpenPort: self._on_open_port,
            ReleasePort: self._on_release_port,
            AcceptPaused: self._on_accept_paused,
            KeepBind: self._on_keep_bind,
            WorkerReady: self._on_worker_ready,
            WorkerLeaving: self._on_worker_leaving,
            AssignResult: self._on_assign_result,
            GetReport: self._on_get_report,
            BootFailure: self._on_boot_failure,
            RequestSuccessor: self._on_request_successor,
            OpenMailbox: self.mailboxes.open,
            ReleaseMailbox: self.mailboxes.release,
        }

    # --- receiving -------------------------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """As :meth:`.BrokerService.tick`."""
        due = [self.migration.tick(now)]
        for worker in self._workers:
            if not worker.closer.full:
                continue
            if worker.closer.stalled(now):
                self._log.error(
                    "gunicorn-passenger: the master cannot close the descriptors that worker %s has "
                    "sent, and closes its channel, so the worker exits and gunicorn starts another one",
                    self._workers.pid(worker.age),
                )
                self.close_channel(worker, expelled=True)
            else:
                due.append(now + _FULL_CLOSER_INTERVAL)
        return min((at for at in due if at is not None), default=None)

    def serve(self, worker: WorkerChannel) -> None:
        """Handle one packet of a worker."""
        fds: list[int] = []
        try:
            message, fds = channel.receive(worker.sock, worker.closer.close)
        except BlockingIOError:
            return
        except channel.MalformedPacket as error:
            self._on_malformed(worker, error)
            return
        except (channel.ChannelClosed, OSError):
            self.close_channel(worker)
            return
        try:
            if isinstance(message, OfferConnections):
                self.migration.offer(worker, message, fds, self._sync.stopping())
            else:
                handler = self._handlers.get(type(message), self._dispatch_to_services)
                handler(worker, message, fds[0] if fds else None)
        except Exception:
            # A bug in this package that the worker's messages trigger. They would trigger it again and again,
            # and all other workers need this thread: so the worker loses its channel.
            self._log.exception(
                "gunicorn-passenger: internal error while handling the message %s of worker %s; the master "
                "closes its channel, so the worker exits and gunicorn starts another one",
                type(message).__name__,
                self._workers.pid(worker.age),
            )
            self.close_channel(worker, expelled=True)
        finally:
            for fd in fds:
                worker.closer.close(fd)

    def _on_malformed(self, worker: WorkerChannel, error: channel.MalformedPacket) -> None:
        worker.malformed += 1
        self._log.warning(
            "gunicorn-passenger: worker %s sent a malformed message: %s", self._workers.pid(worker.age), error
        )
        if worker.malformed >= _MAX_MALFORMED:
            self._log.error(
                "gunicorn-passenger: closing the channel of worker %s after %d malformed messages; it exits, "
                "and gunicorn starts another worker",
                self._workers.pid(worker.age),
                worker.malformed,
            )
            self.close_channel(worker, expelled=True)
            return
        self.reply(worker, PacketRejected(error.id, str(error)))

    def reply(self, worker: WorkerChannel, message: Message, fd: int | None = None) -> bool:
        """Send a worker a message; close its channel when that fails.

        :returns: whether it was sent.
        """
        try:
            channel.send(worker.sock, message, *(() if fd is None else (fd,)))
        except (BlockingIOError, channel.ChannelClosed, OSError) as error:
            does_not_read = isinstance(error, BlockingIOError)
            if does_not_read:
                self._log.error(
                    "gunicorn-passenger: worker %s does not read its channel; the master closes it, so the "
                    "worker exits and gunicorn starts another one",
                    self._workers.pid(worker.age),
                )
            self.close_channel(worker, expelled=does_not_read)
            return False
        return True

    def _deny(self, worker: WorkerChannel, number: int, error: Exception, text: str) -> None:
        kind = errors.refusal_kind(error)
        code = getattr(error, "errno", None) or 0
        self.reply(worker, RequestDenied(number, kind, code, text[:_MAX_DENIAL]))

    # --- handlers --------------------------------------------------------------------------------

    def _on_open_port(self, worker: WorkerChannel, request: OpenPort, fd: int | None) -> None:
        if self._sync.stopping():
            self.reply(worker, RequestDenied(request.id, "listen", 0, "the application is stopping"))
            return
        same_user = self._listeners.cfg.uid == os.geteuid()
        try:
            request = _check_text(request)
            opened = self._placement.request(worker.age, request, same_user, fd)
        except errors.ListenError as error:
            self._deny(worker, request.id, error, str(error))
            return
        except Exception as error:
            # whatever a worker asks for, it gets a response
            text = f"the master cannot open the port: {error}"
            self._log.error(
                "gunicorn-passenger: worker %s: %s", self._workers.pid(worker.age), text[:_MAX_DENIAL]
            )
            self._deny(worker, request.id, error, text)
            return
        self.reply(worker, opened)

    def _on_release_port(self, worker: WorkerChannel, message: ReleasePort, _fd: int | None) -> None:
        self._placement.release(worker.age, message.key, message.id)

    def _on_accept_paused(self, worker: WorkerChannel, message: AcceptPaused, _fd: int | None) -> None:
        self._placement.on_accept_paused(worker.age, message.key)

    def _on_keep_bind(self, worker: WorkerChannel, message: KeepBind, _fd: int | None) -> None:
        response: Message = Acknowledged(message.id)
        port = self._listeners.ports.get(message.key)
        if port is None or not port.from_config:
            pass  # with SO_REUSEPORT each worker has opened its own
        elif any(age > self._workers.previous_generation for age in port.wanted_by):
            # not one of the previous program's, which is about to leave
            response = RequestDenied(message.id, "listen", 0, "a server of the program listens there")
            worker.primary_binds.pop(message.key, None)
        else:
            worker.primary_binds[message.key] = message.for_good
        if message.id:
            self.reply(worker, response)

    def _on_worker_ready(self, worker: WorkerChannel, message: WorkerReady, _fd: int | None) -> None:
        if worker.ready:
            return
        worker.ready = True
        worker.ready_at = time.monotonic()
        if worker.age > self._workers.previous_generation:
            self._boot_failures.on_worker_ready()
        serving = sum(other.serving for other in self._workers)
        self._workers.started = self._workers.started or serving >= max(self._workers.planned, 1)
        self._workers.pid(worker.age)
        self._workers.primary_name = printable(message.primary[:MAX_NAME]) or self._workers.primary_name
        self._workers.primary_counts = message.serves_primary
        for other in self._workers:
            if other.draining:
                self.reply(other, SuccessorReady(0))
        self.mailboxes.on_worker_changed(worker)
        self._workers.wake_arbiter()
        if message.serves_primary:
            self._name_unclaimed()

    def _name_unclaimed(self) -> None:
        """Once a program is ready: name the binds that no server of it listens on."""
        for port in self._listeners.ports.values():
            if port.from_config and not port.claimed:
                port.claimed = True
                self._log.info(
                    "The primary is served on %s, too: it is in gunicorn's bind, and no server of the "
                    "program listens on it",
                    port.key,
                )

    def _on_worker_leaving(self, worker: WorkerChannel, message: WorkerLeaving, _fd: int | None) -> None:
        worker.draining = True
        self.mailboxes.on_worker_changed(worker)
        self._placement.on_worker_gone(worker.age)
        self.reply(worker, Acknowledged(message.id))
        if any(other.serving for other in self._workers) and not self._sync.stopping():
            self.reply(worker, SuccessorReady(0))
        self._workers.wake_arbiter()

    def _on_request_successor(self, worker: WorkerChannel, _message: Message, _fd: int | None) -> None:
        if worker.retiring:
            self._boot_failures.retry_now()
        worker.retiring = True
        self._workers.wake_arbiter()

    def _on_assign_result(self, worker: WorkerChannel, message: AssignResult, _fd: int | None) -> None:
        self.migration.on_assign_result(worker, message)

    def _on_get_report(self, worker: WorkerChannel, message: GetReport, _fd: int | None) -> None:
        """Send the report in a file in memory, since a packet has a limited size."""
        try:
            fd = os.memfd_create("gunicorn-passenger-report")
        except OSError as error:
            self._deny(worker, message.id, error, f"no report: {error.strerror}")
            return
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(json.dumps(self._report()).encode())
        except Exception as error:
            # not the worker's fault, which would ask again after a restart
            self._log.exception("gunicorn-passenger: internal error while building the status report")
            self._deny(worker, message.id, error, f"no report: {error}")
        else:
            self.reply(worker, ReportSent(message.id), fd)
        finally:
            os.close(fd)

    def _on_boot_failure(self, worker: WorkerChannel, message: BootFailure, _fd: int | None) -> None:
        worker.failed = True
        if self._sync.stopping():
            # gunicorn stops anyway: that a worker can have nothing any more need not be logged
            self.reply(worker, BootVerdict(message.id, "wait"))
            return
        text = " ".join(message.text.split())
        log = self._boot_failures.is_new(text)
        if not self._boot_failures.halting and self._survives_without(worker):
            self.reply(worker, BootVerdict(message.id, "exit", log))
            self.note_boot_failure(text)
            return
        first = not self._boot_failures.halting
        self._boot_failures.halting = True
        self.reply(worker, BootVerdict(message.id, "halt" if first else "wait", log))

    def _survives_without(self, worker: WorkerChannel) -> bool:
        """Whether gunicorn need not halt because this worker cannot boot.

        Another worker serves, or one with the program from the other side of the last reload may become
        ready. As long as not all workers of the first start have been ready, gunicorn halts as ever.
        """
        previous = self._workers.previous_generation
        if not (self._workers.started or previous):
            return False
        return any(
            other.serving or (other.booting and (other.age > previous) != (worker.age > previous))
            for other in self._workers
        )

    def note_boot_failure(self, text: str) -> None:
        """A worker cannot boot, and others serve: say so once for each attempt."""
        previous = self._workers.previous_generation
        is_reload = any(other.serving and other.age <= previous for other in self._workers)
        if self._boot_failures.record(text, is_reload, time.monotonic()):
            self._boot_failures.report(self._log, self._event_log)
        self._workers.wake_arbiter()

    def _dispatch_to_services(self, worker: WorkerChannel, message: Message, _fd: int | None) -> None:
        for service in self._loop.services:
            response = service.message(worker.age, message)
            if response is not None:
                self.reply(worker, response)
                return
        name = type(message).__name__
        self._on_malformed(worker, channel.MalformedPacket(f"only the master sends {name}", message.id))

    # --- the end of a worker ---------------------------------------------------------------------

    def on_worker_reaped(self, age: int) -> None:
        """The arbiter has reaped a worker; processes that it has forked may keep its channel open."""
        worker = self._workers.by_age(age)
        if worker is not None:
            self._drain_channel(worker)
            self.close_channel(worker)
        if age in self._expelled:
            self._expelled.discard(age)
            self._placement.on_worker_gone(age)

    def _drain_channel(self, worker: WorkerChannel) -> None:
        """Handle the messages that a worker has sent before its end."""
        for _ in range(_MAX_REMAINING):
            fd = worker.sock.fileno()
            if self._workers.by_fd(fd) is not worker or worker.closer.full or not unpatched.is_readable(fd):
                return
            self.serve(worker)

    def close_channel(self, worker: WorkerChannel, expelled: bool = False) -> None:
        """A worker has exited: close its channel and withdraw its requests.

        :param expelled: whether it still runs, and breaks the protocol. It exits when it notices that its
            channel is closed, and gunicorn replaces it.
        """
        pid = self._workers.pid(worker.age)
        if not self._workers.remove(worker):
            return
        worker.closer.close_socket(worker.sock)
        self._retired_counters.retire(worker.scoreboard, self._listeners.ports.values())
        self.migration.on_worker_gone(worker)
        self.mailboxes.on_worker_gone(worker)
        self._listeners.on_worker_gone(worker.age)
        if expelled:
            # it may accept until it notices: its ports move to others when it is reaped
            self._expelled.add(worker.age)
        else:
            self._placement.on_worker_gone(worker.age)
        if worker.serving and not self._sync.stopping():
            self._event_log.record("crash", f"worker {pid} exited unexpectedly")
        if worker.booting and not self._sync.stopping():
            self.note_boot_failure("a worker exited while it was loading the program")
        for service in self._loop.services:
            service.left(worker.age)


def _check_text(request: OpenPort) -> OpenPort:
    """The request with texts that can be logged, reported and encoded: the one place that checks them.

    A host must be numeric (:mod:`gunicorn_passenger.system.port_opening`), so that only a name and a path are
    free text.

    :raises errors.ListenError: when a name is too long, or a path cannot be a path.
    """
    if len(request.name) > MAX_NAME:
        raise server_errors.server_name_too_long(request.name, MAX_NAME)
    try:
        size = len(os.fsencode(request.path))
    except UnicodeError:
        raise listen_errors.bad_address(
            request.path[:100], "the path of the UNIX socket cannot be encoded"
        ) from None
    if size > UNIX_PATH_MAX:
        raise listen_errors.unix_path_too_long(request.path[:200], UNIX_PATH_MAX)
    return request.replace(name=printable(request.name))
