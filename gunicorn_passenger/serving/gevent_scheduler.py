"""The scheduler of the thread in which a worker runs gevent's hub.

Process: a worker, and plain Python. In our own class and in gunicorn's gevent classes that is the main
thread; in all others it is that of :class:`.scheduler.ThreadScheduler`, once there is a server of ours.
Never: block the hub.
"""

from __future__ import annotations

import _socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar, cast

import gevent
from gevent import socket as gsocket
from gevent.event import AsyncResult, Event

from gunicorn_passenger.serving.scheduler import Result, Task, ThreadResult
from gunicorn_passenger.system import unpatched

T = TypeVar("T")


class _Outcome(Generic[T]):
    """What a function returns or raises in one thread, for another one."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T | None = None
        self._error: BaseException | None = None

    def call(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


class GeventScheduler:
    """Runs functions in greenlets of the thread that has made it, whichever thread asks for that."""

    how_tasks_end = "its functions must not catch GreenletExit, as a bare 'except:' does"

    def __init__(self) -> None:
        self._hub = gevent.get_hub()

    def _in_own_thread(self) -> bool:
        return bool(self._hub.thread_ident == unpatched.unpatched("_thread", "get_ident")())

    def run(self, function: Callable[[], T]) -> T:
        if self._in_own_thread():
            return function()
        # the hub belongs to its own thread: let that work, and wait here without a hub
        done = unpatched.lock()
        done.acquire()
        outcome = _Outcome(function)

        def call() -> None:
            outcome.call()
            done.release()

        self.spawn(call)
        done.acquire()
        return outcome.result()

    def call(self, function: Callable[[], object]) -> None:
        if self._in_own_thread():
            function()
        else:
            self.spawn(function)

    def run_in_hub(self, function: Callable[[], T]) -> T:
        return self.run(function)

    def run_beside(self, function: Callable[[], T]) -> T:
        """Call a function in a thread of its own; the greenlets of this thread run meanwhile.

        The threads of gevent's pool are the program's, which may keep all of them busy.

        :raises Exception: as the function does.
        """
        done = Event()
        outcome = _Outcome(function)
        finished = self._hub.loop.async_()
        finished.start(done.set)

        def call() -> None:
            outcome.call()
            finished.send()

        try:
            unpatched.start_thread(call)
        except RuntimeError:
            # the system has no thread for it: the greenlets have to wait
            outcome.call()
        else:
            done.wait()
        finished.close()
        return outcome.result()

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in the hub's thread; it must not wait."""
        self._start(function)

    def spawn(self, function: Callable[..., object], *args: Any) -> None:
        self._start(gevent.spawn, function, *args)

    def spawn_later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        self._start(partial(gevent.spawn_later, seconds) if seconds else gevent.spawn, function, *args)

    def start_task(self, function: Callable[[], object]) -> Task:
        task: Task = self.run(lambda: gevent.spawn(function))
        return task

    def _start(self, start: Callable[..., object], *args: Any) -> None:
        if self._in_own_thread():
            start(*args)
        else:
            self._hub.loop.run_callback_threadsafe(start, *args)

    def run_all(self, functions: Iterable[Callable[[], object]]) -> None:
        gevent.joinall([gevent.spawn(function) for function in functions])

    def sleep(self, seconds: float) -> None:
        """Let other greenlets run, where the caller has any."""
        if self._in_own_thread() and gevent.getcurrent() is not self._hub:
            gevent.sleep(seconds)
        else:
            unpatched.unpatched("time", "sleep")(seconds)

    def wait_for(self, result: ThreadResult, timeout: float | None) -> None:
        """Let other greenlets run until another thread sets a result.

        :param timeout: seconds; ``None`` for no limit.
        """
        event = Event()
        result.watch(partial(self.call_soon, event.set))
        if not result.ready():
            event.wait(timeout)

    def result(self) -> Result:
        made: Result = AsyncResult()
        return made

    def own_socket(self, end: _socket.socket) -> Any:
        return gsocket.socket(end.family, end.type, end.proto, fileno=end.detach())
