"""The broker's loop: a thread of the master that polls the workers' channels and the services.

Process: the master. Never: die for good, or delay a fork without a limit.

The thread holds the lock whenever it does anything but wait in ``poll``. A fork takes the lock first
(``arbiter/fork_handlers.py``), so a child never inherits a lock that the thread held, nor a half-changed
table. The wait for the lock is bounded: a thread that hangs delays the fork by some seconds.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.master.service import BrokerService
from gunicorn_passenger.system import unpatched

#: Seconds that the main thread, or a fork, waits for the lock.
LOCK_TIMEOUT = 5.0
#: Seconds after which a service that has failed is called again.
_RETRY_INTERVAL = 1.0
#: Seconds that the thread sleeps after a failure that it did not expect.
_FAILURE_PAUSE = 0.1


class LoopOwner(Protocol):
    """What the loop calls, always with the lock held."""

    def worker_fds(self) -> list[int]:
        """The descriptors of the workers' channels."""

    def serve_worker(self, fd: int) -> None:
        """A worker has sent something."""

    def tick(self, now: float) -> float | None:
        """As :meth:`.BrokerService.tick`."""

    def on_thread_death(self) -> None:
        """The thread has died, and is about to be started again."""


class BrokerLoop:
    """The thread, its lock, and what it polls."""

    def __init__(self, log: Log, owner: LoopOwner) -> None:
        self._log = log
        self._owner = owner
        self.services: list[BrokerService] = []
        self._lock = unpatched.lock()
        self._locked_for_fork = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.running = False
        #: when the owner or a service wants to be called again (monotonic seconds)
        self._deadline: float | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, in the main thread, which must not wait forever.

        :raises TimeoutError: the loop's thread hangs.
        """
        if not self._lock.acquire(True, LOCK_TIMEOUT):
            raise TimeoutError(f"the port broker hangs: it has not released its lock for {LOCK_TIMEOUT:g} s")
        try:
            yield
        finally:
            self._lock.release()

    def add(self, service: BrokerService) -> None:
        """Serve one service more from now on."""
        with self.locked():
            self.services.append(service)
        self.start()

    def start(self) -> None:
        """Start the thread; wake it, if it runs."""
        if self.running:
            self.wake()
            return
        self.running = True
        try:
            unpatched.start_thread(self._run)
        except RuntimeError as error:
            self.running = False
            self._log.error(
                "gunicorn-passenger: the port broker cannot start (%s): only the primary is served, and "
                "listen() gets no ports; raise the limit on processes (ulimit -u, pids.max), then restart "
                "gunicorn",
                error,
            )

    def wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_write, b".")

    # --- around a fork ---------------------------------------------------------------------------

    def before_fork(self) -> None:
        self._locked_for_fork = self._lock.acquire(True, LOCK_TIMEOUT)
        if not self._locked_for_fork:
            self._log.error(
                "gunicorn-passenger: the port broker hangs; gunicorn forks without waiting for it any "
                "longer. Restart gunicorn if this repeats"
            )

    def after_fork_in_parent(self) -> None:
        if self._locked_for_fork:
            self._lock.release()
        self.wake()

    def after_fork_in_child(self, upgrades: bool) -> None:
        """:param upgrades: whether the child becomes the next master (``USR2``)."""
        for service in self.services:
            service.forked(upgrades)
        self.services = []
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._wake_read = self._wake_write = -1
        self.running = False
        if self._locked_for_fork:
            self._lock.release()

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._run_once()
                except Exception:
                    # tables are changed in single steps, so that the next iteration finds them whole
                    self._log.exception("gunicorn-passenger: internal error in the port broker; it continues")
                    time.sleep(_FAILURE_PAUSE)
        except BaseException as error:
            self._log.error(
                "gunicorn-passenger: the port broker's thread has died (%r) and is started again", error
            )
            time.sleep(_FAILURE_PAUSE)
        finally:
            self._restart()

    def _restart(self) -> None:
        """Start the thread again, after its death."""
        self.running = False
        with self._lock:
            self._owner.on_thread_death()
        self.start()

    def _run_once(self) -> None:
        poll = unpatched.poll()
        with self._lock:
            poll.register(self._wake_read, select.POLLIN)
            for fd in self._owner.worker_fds():
                poll.register(fd, select.POLLIN)
            services = {}
            for service in self.services:
                for fd, wanted in service.descriptors().items():
                    services[fd] = service
                    poll.register(fd, wanted)
            wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        events = poll.poll(None if wait is None else wait * 1000 + 1)
        with self._lock:
            for fd, what in events:
                if fd == self._wake_read:
                    with suppress(BlockingIOError):
                        while len(os.read(fd, 4096)) == 4096:
                            pass
                elif fd in services:
                    self._serve_service(services[fd], fd, what)
                else:
                    self._owner.serve_worker(fd)
            due = [self._owner.tick(time.monotonic())]
            now = time.monotonic()
            due.extend(self._tick_service(service, now) for service in self.services)
            self._deadline = min((at for at in due if at is not None), default=None)

    def _serve_service(self, service: BrokerService, fd: int, what: int) -> None:
        """A failure of a service must not delay the workers that come after it in this iteration."""
        try:
            service.serve(fd, what)
        except Exception:
            self._log_failure(service)

    def _tick_service(self, service: BrokerService, now: float) -> float | None:
        """A service that fails is called again, and not at once: it would fail in each iteration."""
        try:
            return service.tick(now)
        except Exception:
            self._log_failure(service)
            return now + _RETRY_INTERVAL

    def _log_failure(self, service: BrokerService) -> None:
        self._log.exception(
            "gunicorn-passenger: internal error in %s; it continues",
            type(service).__name__,
        )
