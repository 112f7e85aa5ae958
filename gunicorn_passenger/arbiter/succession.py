"""Which workers stay, which leave, and when: a reload without a gap.

Process: the master, in gunicorn's arbiter. Never: wait, or stop a worker before another one has
replaced it, unless the overlap is over.

gunicorn itself sends SIGTERM to surplus workers as soon as it has forked others, which are not ready for
seconds. So under our own worker class the arbiter becomes an :class:`OverlappingArbiter`, which asks
:func:`decide` instead. A worker knows nothing of it: SIGTERM still means that it leaves now, and it comes
when others serve.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.util import is_ipv6

from gunicorn_passenger.arbiter import fork_handlers
from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.daemons.requested import requested_daemons
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.worker_channels import WorkerChannel
from gunicorn_passenger.serving.server_errors import program_line, with_program_line

#: Seconds after which a new worker that is ready, but has not asked for a port of the old ones, is taken to
#: need it no more: a program may listen in a thread, a moment after it was loaded.
_LATE_LISTEN = 3.0


#: Seconds that a worker has for its exit after its graceful timeout, when gunicorn stops.
_EXIT_SECONDS = 2


class Candidate(NamedTuple):
    """A worker, as far as the decision needs it."""

    pid: int
    #: gunicorn's number: the younger of two workers has the higher one
    age: int
    #: whether it accepts
    serving: bool
    #: whether it can take the place of another: it serves what that serves, or the overlap is over
    replaces: bool
    #: whether it is to be replaced: it asks for that, or runs the previous program
    retiring: bool = False
    #: whether it was stopped
    leaving: bool = False


class Decision(NamedTuple):
    """What the arbiter does now."""

    #: how many workers to start
    missing: int
    #: the pids of those to stop
    stop: list[int]


def decide(workers: Iterable[Candidate], wanted: int) -> Decision:
    """Which workers to start and to stop.

    The youngest that need no replacement are kept, as many as there are to be. Others stay for as long as
    those that are kept cannot do all of the work: one for each that is not ready or not there. So there are
    never more than twice as many as wanted, not counting those that drain.

    :param wanted: how many workers there are to be.
    """
    by_age = sorted(workers, key=lambda worker: worker.age, reverse=True)
    staying = [worker for worker in by_age if not (worker.retiring or worker.leaving)]
    kept = staying[:wanted]
    others = [worker for worker in by_age if worker not in kept and not worker.leaving]
    # those that serve first, then the boot that began first, which is the first to be ready
    others.sort(key=lambda worker: (not worker.serving, -worker.age if worker.serving else worker.age))
    needed = max(wanted - sum(worker.replaces for worker in kept), 0)
    stop = [worker.pid for worker in by_age if worker.leaving or worker in others[needed:]]
    return Decision(wanted - len(kept), stop)


class _Reloaded(Exception):
    """gunicorn has started the workers of a reload. Its method would now wait for the old ones to exit."""


class PatientArbiter(Arbiter):
    """gunicorn's arbiter, which kills a worker some seconds after its graceful timeout.

    gunicorn kills it at the end of the timeout, so that it could not end what takes too long, and say so.
    """

    def stop(self, graceful: bool = True) -> None:
        """Stop all workers."""
        timeout = self.cfg.graceful_timeout
        if graceful:
            self.cfg.set("graceful_timeout", timeout + _EXIT_SECONDS)
        try:
            super().stop(graceful)
        finally:
            self.cfg.set("graceful_timeout", timeout)


class OverlappingArbiter(PatientArbiter):
    """The arbiter of our own worker class, whose old workers leave when new ones serve."""

    #: the age of the youngest worker before the reload that runs now; ``None`` while none runs
    _reloading: int | None = None
    #: whether gunicorn's own choice of surplus workers is ignored
    _keeps_surplus = False
    #: whether gunicorn stops altogether
    _stopping = False

    # --- starting and stopping workers -----------------------------------------------------------

    def manage_workers(self) -> None:
        """Called about once a second, and when a worker becomes ready, leaves or ends."""
        self.spawn_workers()
        for pid in self._decide().stop:
            self.kill_worker(pid, signal.SIGTERM)
        self._keeps_surplus = True
        try:
            super().manage_workers()  # which reports metrics, too
        finally:
            self._keeps_surplus = False
        if self._reloading is not None:
            raise _Reloaded

    def kill_worker(self, pid: int, sig: int) -> None:
        if self._keeps_surplus:
            return
        worker, broker = self.WORKERS.get(pid), fork_handlers.current_broker()
        if sig in fork_handlers.STOPS and worker is not None and broker is not None:
            # before the signal: the end of a worker that was stopped is not a failure
            broker.workers.mark_stopped(worker.age)
        super().kill_worker(pid, sig)

    def spawn_worker(self) -> Any:
        """Start a worker. While others serve, gunicorn survives that the system refuses a process (a reload
        needs twice as many), or that the hook ``pre_fork`` fails.

        :raises Exception: when no worker serves, and for a worker of a reload when the hook fails.
        """
        try:
            return super().spawn_worker()
        except Exception as error:
            broker = fork_handlers.current_broker()
            in_hook = bool(program_line(error))
            survives = self._reloading is None if in_hook else isinstance(error, OSError)
            serving = broker is not None and any(worker.serving for worker in broker.workers)
            if os.getpid() != self.pid or broker is None or not (survives and serving):
                raise
            remedy = (
                "correct gunicorn's configuration and reload (HUP)"
                if in_hook
                else "if the system refused the process, raise the limit on processes (ulimit -u, or "
                "pids.max of the container) or of memory, or set overlap=0"
            )
            reason = with_program_line(error)
            self.log.error("gunicorn-passenger: a worker could not be started: %s; %s", reason, remedy)
            broker.on_worker_not_started(reason)
            return None

    def spawn_workers(self) -> None:
        """Start the workers that are missing; after a failure, one after a pause."""
        missing = self._decide().missing
        broker = fork_handlers.current_broker()
        if broker is not None and broker.boot_failures.retrying:
            boots = any(worker.booting for worker in broker.workers)
            missing = 0 if boots or time.monotonic() < broker.boot_failures.retry_at else min(missing, 1)
        for _ in range(missing):
            self.spawn_worker()

    def _decide(self) -> Decision:
        workers = list(self.WORKERS.items())
        broker = fork_handlers.current_broker()
        if broker is None:
            found = [Candidate(pid, worker.age, True, True) for pid, worker in workers]
        else:
            try:
                with broker.locked():
                    found = _candidates(broker, workers)
            except TimeoutError:
                # the broker hangs: what it knows of the workers does not count, but they must not be missing
                return Decision(max(self.num_workers - len(workers), 0), [])
            if broker.boot_failures.halting and len(found) < len(workers):
                # gunicorn halts as soon as it has reaped the worker that could not boot
                return Decision(0, [])
        return decide(found, self.num_workers)

    def stop(self, graceful: bool = True) -> None:
        """Stop all workers."""
        self._stopping = True
        super().stop(graceful)

    def reap_workers(self) -> None:
        """gunicorn halts on certain exit statuses of a worker; not while others serve, or while it stops."""
        while True:
            try:
                super().reap_workers()
                return
            except HaltServer:
                broker = fork_handlers.current_broker()
                survives = broker is not None and broker.survives_boot_failure()
                if not survives and not self._stopping:
                    raise
            except Exception as error:
                self._report_hook(error)

    def handle_ttin(self) -> None:
        """One worker more; the hook ``nworkers_changed`` may fail."""
        try:
            super().handle_ttin()
        except Exception as error:
            self._report_hook(error)

    def handle_ttou(self) -> None:
        """One worker less."""
        try:
            super().handle_ttou()
        except Exception as error:
            self._report_hook(error)

    def _report_hook(self, error: Exception) -> None:
        """A hook of the user's has failed in the master, which continues.

        :raises Exception: ``error``, if it comes from elsewhere.
        """
        if os.getpid() != self.pid or not program_line(error):
            raise error
        self.log.error(
            "gunicorn-passenger: a hook of gunicorn's configuration failed: %s. The workers continue; "
            "correct the hook and reload (HUP)",
            with_program_line(error),
        )

    # --- reloading -------------------------------------------------------------------------------

    def reload(self) -> None:
        """Reload; a failure leaves the workers, the configuration and the listeners as they are."""
        names = ("cfg", "worker_class", "address", "_num_workers", "timeout", "proc_name")
        previous, app = {name: getattr(self, name) for name in names}, dict(vars(self.app))
        operator, broker = settings.operator, fork_handlers.current_broker()
        generation = 0 if broker is None else broker.workers.previous_generation
        self._reloading = self.worker_age
        try:
            super().reload()
        except _Reloaded:
            pass
        except (Exception, SystemExit) as error:
            if os.getpid() != self.pid or any(listener.sock is None for listener in self.LISTENERS):
                raise  # in a worker; or gunicorn could not open a listener that it has closed
            self._reloading = None
            self._set_previous_generation(generation)
            self.__dict__.update(previous)
            self.app.__dict__.update(app)
            settings.discard_config_file(operator)
            requested_daemons.discard_config()
            self._resume_configuration()
            self._report_rejected(error)
        finally:
            self._reloading = None

    def setup(self, app: Any) -> None:
        super().setup(app)
        if self._reloading is not None:
            _check_new_binds(self.LISTENERS, self.cfg)
            self._set_previous_generation(self._reloading)

    @staticmethod
    def _set_previous_generation(age: int) -> None:
        """Workers up to this age run the program that the reload replaces."""
        broker = fork_handlers.current_broker()
        if broker is not None:
            broker.workers.previous_generation = age

    def _resume_configuration(self) -> None:
        """Undo what gunicorn does in the process before it reads its configuration."""
        os.environ.update(self.cfg.env)
        os.chdir(self.cfg.chdir)
        if self.log.cfg is not self.cfg:
            self.log.setup(self.cfg)

    def _report_rejected(self, error: BaseException) -> None:
        if isinstance(error, SystemExit):
            text = error.code if isinstance(error.code, str) else "gunicorn's output says why"
        else:
            text = with_program_line(error)
            if not isinstance(error, PassengerError):
                self.log.error("Exception in the reload", exc_info=error)
        self.log.error(
            "gunicorn-passenger: reload failed: %s. The previous workers and configuration stay. Repair "
            "gunicorn's configuration and reload again (HUP)",
            text,
        )
        broker = fork_handlers.current_broker()
        if broker is not None:
            broker.on_reload_rejected(text)


def install(arbiter: Arbiter, ours: type[PatientArbiter]) -> None:
    """Give the running arbiter the methods of a class above: no hook of gunicorn's could do what they do."""
    if not isinstance(arbiter, ours):
        kind = type(arbiter)
        arbiter.__class__ = ours if kind is Arbiter else type(ours.__name__, (ours, kind), {})


def _candidates(broker: Broker, workers: list[tuple[int, Any]]) -> list[Candidate]:
    """The workers that gunicorn knows. Called with the broker's lock held."""
    found = []
    for pid, worker in workers:
        channel = broker.workers.by_age(worker.age)
        if channel is not None and not channel.failed:
            found.append(
                Candidate(
                    pid,
                    worker.age,
                    channel.serving,
                    not worker.aborted and _replaces(broker, channel),
                    channel.retiring or worker.age <= broker.workers.previous_generation,
                    channel.draining or channel.stopped,
                )
            )
        elif channel is None and getattr(worker, "channel", None) is None:
            # the broker could not give it a channel: nothing more is known of it
            found.append(Candidate(pid, worker.age, True, True))
        # the others have ended or are about to
    return found


def _replaces(broker: Broker, channel: WorkerChannel) -> bool:
    """Whether an older worker may leave in favour of this one."""
    now = time.monotonic()
    if now - channel.forked_at >= broker.overlap:
        if broker.overlap and channel.booting and not channel.overdue:
            channel.overdue = True
            _warn_overdue(broker)
        return True
    return channel.serving and (
        now - channel.ready_at >= _LATE_LISTEN
        or all(
            channel.age in port.wanted_by
            for port in broker.listeners.ports.values()
            if port.placement != "each" and any(age < channel.age for age in port.accepting)
        )
    )


def _warn_overdue(broker: Broker) -> None:
    previous = broker.workers.previous_generation
    if any(other.serving and (other.retiring or other.age <= previous) for other in broker.workers):
        broker.log.warning(
            "gunicorn-passenger: a new worker is still booting after %g s, so an old worker exits without "
            "waiting for it, and clients may have to wait; set overlap to more seconds than a boot takes",
            broker.overlap,
        )


def _check_new_binds(listeners: list[Any], cfg: Any) -> None:
    """Before a reload closes the listeners: whether gunicorn could open the new ones.

    :raises OSError: when an address is in use or cannot be bound.
    """
    held = {format_sockname(listener.sock.getsockname()) for listener in listeners}
    for address in cfg.address:
        if isinstance(address, tuple) and format_sockname(address) not in held:
            with socket.socket(socket.AF_INET6 if is_ipv6(address[0]) else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if cfg.reuse_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                try:
                    probe.bind(address)
                except OSError as error:
                    raise OSError(
                        error.errno, f"cannot bind {format_sockname(address)}: {error.strerror}"
                    ) from None
