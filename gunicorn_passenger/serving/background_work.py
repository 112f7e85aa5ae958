"""Finishes what the program does in threads of its own, before a worker exits.

Process: a worker that has drained.
Never: wait for longer than it is told, or for a thread that has no end.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from time import monotonic
from types import FrameType

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.serving.scheduler import Scheduler
from gunicorn_passenger.system import callers
from gunicorn_passenger.system.live_objects import live_objects

#: Seconds that it may take when connections have used up the graceful timeout; mostly it has nothing to do.
_LEAST_SECONDS = 0.5
#: Seconds between two heartbeats.
_HEARTBEAT_INTERVAL = 1.0


def finish_background_work(
    seconds: float,
    log: Log,
    scheduler: Scheduler,
    on_tick: Callable[[], object],
    endless: Collection[threading.Thread],
) -> None:
    """Let the program's threads finish, as the end of a Python program does.

    First the callbacks of ``threading._register_atexit`` run: with them, ``ThreadPoolExecutor`` finishes the
    work that was submitted. Then the threads that are not daemons are waited for.

    :param seconds: how long all that may take.
    :param on_tick: called once a second meanwhile.
    :param endless: threads that are not waited for.
    """
    deadline = monotonic() + max(seconds, _LEAST_SECONDS)
    finished = scheduler.result()

    def finish() -> None:
        _finish(log, endless)
        finished.set(None)

    scheduler.start_task(finish)
    while not finished.ready() and (left := deadline - monotonic()) > 0:
        finished.wait(min(left, _HEARTBEAT_INTERVAL))
        on_tick()
    if not finished.ready():
        names = ", ".join(sorted(thread.name for thread in _unfinished(endless)))
        log.warning(
            "Worker graceful timeout: the worker exits although the program's work in threads is not "
            "finished: %s; raise --graceful-timeout if it may take longer",
            names or "a pool of threads, or another callback at exit",
        )


def do_not_wait_for_threads() -> None:
    """The interpreter would wait for a server in a non-daemon thread, until the master kills the worker."""
    threading._shutdown = lambda: None  # type: ignore[attr-defined]


def _finish(log: Log, endless: Collection[threading.Thread]) -> None:
    callbacks: list[Callable[[], object]] = getattr(threading, "_threading_atexits", [])
    for callback in reversed(callbacks):
        try:
            callback()
        except Exception:
            log.exception("A callback that the program runs at its exit raised an error")
    pause = 0.05
    while (thread := next(_unfinished(endless), None)) is not None:
        thread.join(timeout=pause)  # it may become idle, and not end
        pause = min(2 * pause, _HEARTBEAT_INTERVAL)


def _unfinished(endless: Collection[threading.Thread]) -> Iterator[threading.Thread]:
    """The threads that Python waits for at its end, without those that have no end."""
    threads = [
        thread
        for thread in threading.enumerate()
        if not (thread.daemon or isinstance(thread, threading._DummyThread))
        and thread not in (threading.main_thread(), threading.current_thread(), *endless)
    ]
    if threads:
        frames, idle = _frames_and_idle()
        for thread in threads:
            ident = thread.ident or 0
            if thread.is_alive() and ident not in idle and not _serves_forever(frames.get(ident)):
                yield thread


def _frames_and_idle() -> tuple[dict[int, FrameType], set[int]]:
    """The innermost frame of each thread, by its identity, and the threads that wait for work at an empty
    queue, as those of a server's pool do. Under gevent most threads are greenlets, and queues are its own."""
    frames: dict[int, FrameType] = dict(sys._current_frames())
    idle: set[int] = set()
    if "gevent.queue" not in sys.modules:
        return frames, idle
    import greenlet
    from gevent.queue import Queue, SimpleQueue

    for candidate in live_objects(greenlet.greenlet, SimpleQueue, Queue):
        if isinstance(candidate, greenlet.greenlet):
            if candidate.gr_frame is not None:
                frames[id(candidate)] = candidate.gr_frame
        elif candidate.empty():
            # gevent does not publish its waiters; at an empty queue they wait to get
            waiters = [w for d in gc.get_referents(candidate) if isinstance(d, deque) for w in d]
            idle |= {id(o) for w in waiters for o in gc.get_referents(w) if isinstance(o, greenlet.greenlet)}
    return frames, idle


def _serves_forever(frame: FrameType | None) -> bool:
    """Whether a thread is in ``serve_forever()``, as most servers call their loop."""
    return any(outer.f_code.co_name == "serve_forever" for outer in callers.frames(frame))
