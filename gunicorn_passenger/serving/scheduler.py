"""How a worker waits for the master, and runs what the master's messages bring about.

Process: a worker.
Never: import gevent before there is a server of ours. :mod:`.gevent_scheduler` is for our own worker class
and for gunicorn's gevent workers, :class:`ThreadScheduler` for all others.
"""

from __future__ import annotations

import _socket
import heapq
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

from gunicorn_passenger.config.gunicorn_types import Log
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


class Task(Protocol):
    """A function that runs (``gevent.Greenlet``)."""

    def join(self, timeout: float | None = None) -> object: ...
    def ready(self) -> bool: ...
    def kill(self, *, block: bool) -> object: ...


class Scheduler(Protocol):
    """Runs functions in greenlets or in threads."""

    def run(self, function: Callable[[], T]) -> T:
        """Run a function where the worker's sockets belong; wait for its result."""

    def call(self, function: Callable[[], object]) -> None:
        """As :meth:`run`, but where that is in another thread, do not wait for it. Functions that one thread
        gives to both methods begin in their order.
        """

    def run_in_hub(self, function: Callable[[], T]) -> T:
        """Run a function in a greenlet, for a server of ours; wait for its result.

        :raises Exception: as the function does, or when gevent cannot make a hub.
        """

    def spawn(self, function: Callable[..., object], *args: Any) -> None:
        """Run a function soon. Functions begin in the order in which they were given."""

    def spawn_later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        """Run a function after so many seconds."""

    #: what a program must do so that its tasks end, for the log
    how_tasks_end: str

    def start_task(self, function: Callable[[], object]) -> Task:
        """Run a function that may wait for long."""

    def run_all(self, functions: Iterable[Callable[[], object]]) -> None:
        """Run functions at the same time; wait until all have returned."""

    def sleep(self, seconds: float) -> None: ...

    def result(self) -> Result: ...

    def own_socket(self, end: _socket.socket) -> Any:
        """The end of a channel as a socket whose calls wait as this scheduler does; it owns the end."""


class HubScheduler(Scheduler, Protocol):
    """Runs functions in the greenlets of one thread."""

    def wait_for(self, result: ThreadResult, timeout: float | None) -> None:
        """Let other greenlets run until another thread sets a result.

        :param timeout: seconds; ``None`` for no limit.
        """


class ThreadResult:
    """A :class:`Result` between threads, one of which may have a hub."""

    def __init__(self, scheduler: ThreadScheduler) -> None:
        self.value: Any = None
        self.exception: BaseException | None = None
        self._scheduler = scheduler
        self._unset = unpatched.lock()
        self._unset.acquire()
        #: called when it is set
        self._watchers: list[Callable[[], object]] = []

    def set(self, value: Any) -> None:
        self.value = value
        self._wake()

    def set_exception(self, error: BaseException) -> None:
        self.exception = error
        self._wake()

    def _wake(self) -> None:
        if not self.ready():
            self._unset.release()
            for watcher in self._watchers:
                watcher()

    def ready(self) -> bool:
        return not self._unset.locked()

    def watch(self, watcher: Callable[[], object]) -> None:
        """Call a function when it is set; never, if it is set already."""
        self._watchers.append(watcher)

    def wait(self, timeout: float | None = None) -> object:
        """:param timeout: seconds; ``None`` for no limit."""
        hub = self._scheduler.own_hub()
        if hub is not None:
            hub.wait_for(self, timeout)
        elif self._unset.acquire(timeout=-1 if timeout is None else timeout):
            self._unset.release()
        return self.value


class ThreadTask(ThreadResult):
    """A function in a native thread."""

    def join(self, timeout: float | None = None) -> object:
        return self.wait(timeout)

    def kill(self, *, block: bool) -> None:
        """Do nothing: no thread can be ended from outside."""


class ThreadScheduler:
    """Runs functions in a thread beside the worker's own, which starts with the first of them.

    A worker that never asks the master for a port has no thread of ours. The first server of ours gives the
    thread a hub: the functions then run in its greenlets.
    """

    how_tasks_end = "its start function must return soon after its stop function was called"

    def __init__(self, log: Log, on_tick: Callable[[], object], make_hub: Callable[[], HubScheduler]) -> None:
        """
        :param on_tick: called about once a second by the thread.
        :param make_hub: called by the thread when it needs a hub.
        """
        self._log = log
        self._on_tick = on_tick
        self._order = itertools.count()
        #: when a function is due (monotonic seconds), its place among those that are due then, the function
        self._added: deque[tuple[float, int, Callable[[], object]]] = deque()
        #: released when functions were added. (SimpleQueue.get() of Python 3.10 may take longer than its
        #: timeout, without a limit.)
        self._nothing_added = unpatched.lock()
        self._nothing_added.acquire()
        #: held from the start of the thread on
        self._started = unpatched.lock()
        self._thread = 0
        self._new_hub = make_hub
        self._hub: HubScheduler | None = None

    def run(self, function: Callable[[], T]) -> T:
        return function() if self._hub is None else self._hub.run(function)

    def call(self, function: Callable[[], object]) -> None:
        if self._hub is None:
            function()
        else:
            self._hub.call(function)

    def run_in_hub(self, function: Callable[[], T]) -> T:
        if self._hub is None:
            if self._in_own_thread():
                self._make_hub()
            else:
                made = self.result()
                self.spawn(self._make_hub_for, made)
                made.wait()
                if made.exception is not None:
                    raise made.exception
        assert self._hub is not None
        return self._hub.run(function)

    def _make_hub(self) -> None:
        if self._hub is None:
            self._hub = self._new_hub()

    def _make_hub_for(self, made: Result) -> None:
        """Make the hub for a thread that waits for it."""
        try:
            self._make_hub()
        except BaseException as error:
            made.set_exception(error)
        else:
            made.set(None)

    def own_hub(self) -> HubScheduler | None:
        """The scheduler of the calling thread's hub, if that is the thread of the servers."""
        return self._hub if self._in_own_thread() else None

    def _in_own_thread(self) -> bool:
        return bool(self._thread == unpatched.unpatched("_thread", "get_ident")())

    def spawn(self, function: Callable[..., object], *args: Any) -> None:
        self.spawn_later(0.0, function, *args)

    def spawn_later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        self._added.append((monotonic() + seconds, next(self._order), partial(function, *args)))
        if self._hub is None:
            with suppress(RuntimeError):  # it was released before
                self._nothing_added.release()
            self._start()
        else:
            self._hub.spawn(self._take_added)

    def _start(self) -> None:
        # without waiting, since a signal handler may come here in the midst of it
        if not self._started.acquire(False):
            return
        try:
            unpatched.start_thread(self._work)
        except BaseException:
            self._started.release()
            raise

    def start_task(self, function: Callable[[], object]) -> Task:
        self._start()
        return self._start_thread(function)

    def _start_thread(self, function: Callable[[], object]) -> ThreadTask:
        task = ThreadTask(self)
        unpatched.start_thread(partial(self._call, function, task))
        return task

    def run_all(self, functions: Iterable[Callable[[], object]]) -> None:
        for task in [self._start_thread(function) for function in functions]:
            task.join()

    def sleep(self, seconds: float) -> None:
        if (hub := self.own_hub()) is not None:
            hub.sleep(seconds)
        else:
            unpatched.unpatched("time", "sleep")(seconds)

    def result(self) -> Result:
        return ThreadResult(self)

    def own_socket(self, end: _socket.socket) -> Any:
        end.setblocking(True)
        return end

    def _work(self) -> None:
        self._thread = unpatched.unpatched("_thread", "get_ident")()
        due = [(monotonic() + _TICK, next(self._order), self._on_tick)]
        while self._hub is None:
            self._nothing_added.acquire(timeout=max(due[0][0] - monotonic(), 0.0))
            while self._added:
                heapq.heappush(due, self._added.popleft())
            if due[0][0] <= monotonic():
                function = heapq.heappop(due)[2]
                self._call(function)
                if function == self._on_tick:
                    heapq.heappush(due, (monotonic() + _TICK, next(self._order), function))
        self._added.extend(entry for entry in due if entry[2] != self._on_tick)
        self._take_added()
        while True:
            self._hub.sleep(_TICK)
            self._call(self._on_tick)

    def _take_added(self) -> None:
        """In the hub: start what was added."""
        assert self._hub is not None
        while self._added:
            due, _, function = self._added.popleft()
            self._hub.spawn_later(max(due - monotonic(), 0.0), self._call, function)

    def _call(self, function: Callable[[], object], done: Result | None = None) -> None:
        try:
            function()
        except Exception:
            self._log.exception("gunicorn-passenger: a task of the worker failed (pid:%s)", os.getpid())
        finally:
            if done is not None:
                done.set(None)
