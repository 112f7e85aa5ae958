"""How a worker waits for the master, and runs what the master's messages bring about.

Process: a worker.
Never: imports gevent. :mod:`.gevent_scheduler` is for our own worker class and for gunicorn's gevent workers,
:class:`ThreadScheduler` for all others.
"""

from __future__ import annotations

import _socket
import heapq
import itertools
import os
from _queue import Empty, SimpleQueue
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

from gunicorn_passenger.system import unpatched

T = TypeVar("T")

#: Seconds between two ticks.
_TICK = 1.0


class Result(Protocol):
    """A value or an error that one task sets and another one waits for (``gevent.event.AsyncResult``)."""

    value: Any
    exception: BaseException | None

    def set(self, value: Any) -> None: ...
    def set_exception(self, error: BaseException) -> None: ...
    def ready(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> object: ...


class Scheduler(Protocol):
    """Runs functions in greenlets or in threads."""

    def run(self, function: Callable[[], T]) -> T:
        """Run a function where the worker's sockets belong; wait for its result."""

    def spawn(self, function: Callable[..., object], *args: Any) -> None:
        """Run a function soon. Functions begin in the order in which they were given."""

    def spawn_later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        """Run a function after so many seconds."""

    def start_task(self, function: Callable[[], object]) -> None:
        """Run a function that may wait for long."""

    def run_all(self, functions: Iterable[Callable[[], object]]) -> None:
        """Run functions at the same time; wait until all have returned."""

    def sleep(self, seconds: float) -> None: ...

    def result(self) -> Result: ...

    def own_socket(self, end: _socket.socket) -> Any:
        """The end of a channel as a socket whose calls wait as this scheduler does; it owns the end."""


class ThreadResult:
    """A :class:`Result` between threads."""

    def __init__(self) -> None:
        self.value: Any = None
        self.exception: BaseException | None = None
        self._unset = unpatched.lock()
        self._unset.acquire()

    def set(self, value: Any) -> None:
        self.value = value
        self._wake()

    def set_exception(self, error: BaseException) -> None:
        self.exception = error
        self._wake()

    def _wake(self) -> None:
        if not self.ready():
            self._unset.release()

    def ready(self) -> bool:
        return not self._unset.locked()

    def wait(self, timeout: float | None = None) -> object:
        """:param timeout: seconds; ``None`` for no limit."""
        if self._unset.acquire(timeout=-1 if timeout is None else timeout):
            self._unset.release()
        return self.value


class ThreadScheduler:
    """Runs functions in a thread beside the worker's own, which starts with the first of them.

    A worker that never asks the master for a port has no thread of ours.
    """

    def __init__(self, log: Any, on_tick: Callable[[], object]) -> None:
        """:param on_tick: called about once a second by the thread."""
        self._log = log
        self._on_tick = on_tick
        self._order = itertools.count()
        self._added: SimpleQueue[tuple[float, int, Callable[[], object]]] = SimpleQueue()
        self._starting = unpatched.lock()
        self._started = False

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def spawn(self, function: Callable[..., object], *args: Any) -> None:
        self.spawn_later(0.0, function, *args)

    def spawn_later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        self._added.put((monotonic() + seconds, next(self._order), partial(function, *args)))
        self._start()

    def _start(self) -> None:
        if self._started:
            return  # without the lock, since a signal handler may come here
        with self._starting:
            if not self._started:
                unpatched.start_thread(self._work)
                self._started = True

    def start_task(self, function: Callable[[], object]) -> None:
        self._start()
        unpatched.start_thread(lambda: self._call(function))

    def run_all(self, functions: Iterable[Callable[[], object]]) -> None:
        results = []
        for function in functions:
            results.append(result := ThreadResult())
            unpatched.start_thread(partial(self._call, function, result))
        for result in results:
            result.wait()

    def sleep(self, seconds: float) -> None:
        unpatched.unpatched("time", "sleep")(seconds)

    def result(self) -> Result:
        return ThreadResult()

    def own_socket(self, end: _socket.socket) -> Any:
        end.setblocking(True)
        return end

    def _work(self) -> None:
        due = [(monotonic() + _TICK, next(self._order), self._on_tick)]
        while True:
            timeout = max(due[0][0] - monotonic(), 0.0)
            try:
                heapq.heappush(due, self._added.get(timeout=timeout))
            except Empty:
                function = heapq.heappop(due)[2]
                self._call(function)
                if function == self._on_tick:
                    heapq.heappush(due, (monotonic() + _TICK, next(self._order), function))

    def _call(self, function: Callable[[], object], done: ThreadResult | None = None) -> None:
        try:
            function()
        except Exception:
            self._log.exception("gunicorn-passenger: a task of the worker failed (pid:%s)", os.getpid())
        finally:
            if done is not None:
                done.set(None)
