"""``passenger.once()``: a function that runs in one worker of the application at a time.

Process: a worker, plain Python, and the master with ``--preload``, where the function waits for the fork.
Never: run a function in a worker to which the master has not granted it.

The master grants a function to one worker as it grants a port with the placement ``"one"``: to the youngest
worker that serves, and to the next one when that worker drains or dies.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from time import monotonic
from typing import Any

from greenlet import GreenletExit

from gunicorn_passenger import errors
from gunicorn_passenger.config.address import Once
from gunicorn_passenger.serving import events, server_errors
from gunicorn_passenger.serving.port_lease import AcceptGrant, PortLease
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.scheduler import Result, Scheduler, Task
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.text import MAX_NAME

#: Seconds that ``stop`` may take, and then as many for the end of ``start``; the drain waits for them.
_END_WITHIN = 5.0


class OnceTask:
    """A function of the program that one worker runs."""

    def __init__(self, name: str, start: Callable[[], object], stop: Callable[[], object] | None) -> None:
        self.name = name
        self._start = start
        self._stop = stop
        self._lease: PortLease | None = None
        self._running: Task | None = None
        #: set when the function has ended; ``None`` while it is not being ended
        self._ending: Result | None = None
        #: held for a moment: the end may be asked for from several threads
        self._lock = unpatched.lock()

    def request(self, _worker: Any) -> None:
        """Ask the master for the right to run; under plain Python, run."""
        if registry.broker is None:
            self._run()
            return
        try:
            self._lease = registry.broker.open_port(Once(self.name), self.name, "one", counts=False)
        except errors.ListenError as error:
            self._log.error("passenger.once(%r) does not run in this worker: %s", self.name, error)
            return
        registry.before_drain.append(self.end)
        self._lease.subscribe(self._on_grant, self._on_pause)

    def _on_grant(self, grant: AcceptGrant) -> None:
        os.close(grant.fd)  # nothing is accepted there
        if self._running is None and not registry.draining:
            self._log.info("passenger.once(%r) starts in this worker", self.name)
            self._run()

    def _run(self) -> None:
        self._running = self._begin(self._start)

    def _begin(self, function: Callable[[], object]) -> Task:
        return self._scheduler.start_task(lambda: self._call(function))

    def _on_pause(self) -> None:
        """An operator stops or restarts it."""
        self.end()
        assert registry.broker is not None
        assert self._lease is not None
        registry.broker.confirm_pause(self._lease.key)

    def end(self, _worker: Any = None) -> None:
        """Stop the function, if this worker runs it. Returns when it has ended, or does not end in time."""
        with self._lock:
            ending, running = self._ending, self._running
            if ending is None and running is not None:
                self._ending = self._scheduler.result()
        if ending is not None:
            ending.wait()
        elif running is not None:
            try:
                self._end(running)
            finally:
                with self._lock:
                    ended, self._ending, self._running = self._ending, None, None
                if ended is not None:
                    ended.set(None)

    def _end(self, running: Task) -> None:
        functions = [running]
        if self._stop is not None:
            functions.insert(0, self._begin(self._stop))
            functions[0].join(_END_WITHIN)
            if not functions[0].ready():
                self._log.error(
                    "passenger.once(%r): its stop function has not returned within %g s, so the worker tries "
                    "to end it (pid:%s)",
                    self.name,
                    _END_WITHIN,
                    os.getpid(),
                )
        for function in functions:
            function.kill(block=False)
        deadline = monotonic() + _END_WITHIN
        for function in functions:
            function.join(max(deadline - monotonic(), 0.0))
        if all(function.ready() for function in functions):
            self._log.info("passenger.once(%r) has stopped in this worker", self.name)
        else:
            self._log.error(
                "passenger.once(%r) has not stopped in this worker (pid:%s), and may run in another worker "
                "at the same time: %s",
                self.name,
                os.getpid(),
                self._scheduler.how_tasks_end,
            )

    def _call(self, function: Callable[[], object]) -> None:
        try:
            function()
        except GreenletExit:
            raise
        except BaseException:
            # gevent would end the whole worker at a SystemExit
            self._log.exception("passenger.once(%r): the program's function raised an error", self.name)

    @property
    def _scheduler(self) -> Scheduler:
        assert registry.scheduler is not None
        return registry.scheduler

    @property
    def _log(self) -> Any:
        return registry.log or logging.getLogger("gunicorn.error")


_names: set[str] = set()


def once(name: str, start: Callable[[], object], stop: Callable[[], object] | None = None) -> None:
    """Run a function in one worker of the application at a time: a scheduler, a consumer of a queue.

    When the worker drains or dies, or an operator restarts the function (``gunicorn-passenger restart
    NAME``), it runs in another worker. Under plain Python it runs in ``serve_forever()``.

    :param name: the same in every worker; ``gunicorn-passenger status`` lists it.
    :param start: called without arguments, in a greenlet of its own, when the worker is ready. It may return
        (a scheduler that has its own threads) or run until it is stopped. An error is logged. Under a worker
        class that is not gevent's it has a native thread.
    :param stop: called without arguments when the worker is to end it; it has 5 s. Afterwards ``start`` is
        ended with ``GreenletExit``, if it still runs. A native thread cannot be ended: there ``start`` must
        return when ``stop`` is called.
    :raises SettingError: for a name that cannot be used, or is used twice.
    :raises TypeError: when ``start`` or ``stop`` cannot be called.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        raise errors.SettingError(f"once({name!r}): a name is a string of 1 to {MAX_NAME} characters")
    if name in _names:
        raise server_errors.once_twice(name)
    if not callable(start) or not (stop is None or callable(stop)):
        raise TypeError(f"once({name!r}): start and stop must be functions without arguments")
    _names.add(name)
    task = OnceTask(name, start, stop)
    events.on("exit", task.end)
    if registry.started:
        task.request(None)
    else:
        events.on("ready", task.request)
