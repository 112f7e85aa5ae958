"""Names the function of the program that blocks a worker's event loop.

Process: a worker, in a thread of the system.
Never: interrupt or end anything.

While one greenlet runs and does not wait, the worker serves no other client. So the thread asks the event
loop for a sign of life from time to time. If none comes, the thread looks at what the loop's thread executes.
"""

from __future__ import annotations

import os
import signal
import sys
from threading import get_ident
from time import monotonic
from types import CodeType, FrameType

import gevent
from gevent.hub import Hub

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.ipc.scoreboard import Blocking, Scoreboard
from gunicorn_passenger.system.callers import frames, is_program_file
from gunicorn_passenger.system.unpatched import start_thread, unpatched


class BlockingWatch:
    """Logs once for each function of the program that blocks the loop for too long."""

    def __init__(self, seconds: float, log: Log, scoreboard: Scoreboard | None) -> None:
        """
        :param seconds: for which the loop may be blocked.
        :param scoreboard: the worker's, which shows how often and for how long it was blocked.
        """
        self._seconds = seconds
        self._log = log
        self._scoreboard = scoreboard
        self._blocking = Blocking()
        self._loop_thread = get_ident()
        self._question = gevent.get_hub().loop.async_(ref=False)
        self._answered = False
        self._answered_at = 0.0
        self._reported: set[CodeType] = set()

    def start(self) -> None:
        """Watch the loop of the calling thread until the process exits.

        :raises RuntimeError: when the system cannot start a thread.
        """
        self._question.start(self._answer)
        start_thread(self._watch)

    def _answer(self) -> None:
        self._answered_at = monotonic()
        self._answered = True

    def _watch(self) -> None:
        # A signal for the process goes to any of its threads that lets it through. The worker's own thread
        # blocks further stops while it exits.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        sleep = unpatched("time", "sleep")
        asked_at, counted = 0.0, False
        self._answered = True
        while True:
            if self._answered:
                self._answered = False
                asked_at, counted = monotonic(), False
                self._question.send()
            sleep(self._seconds / 2)
            greenlet = None if self._answered else self._outermost_frame()
            sleep(self._seconds / 2)
            # a loop with much to do may respond late; it is blocked if the same greenlet still runs
            if greenlet is not None and not self._answered and greenlet == self._outermost_frame():
                self._report()
                self._blocking = self._blocking.plus(Blocking(0 if counted else 1))
                counted = True
            if counted:
                self._count(asked_at)

    def _count(self, asked_at: float) -> None:
        seconds = (self._answered_at if self._answered else monotonic()) - asked_at
        self._blocking = self._blocking.plus(Blocking(0, round(seconds * 1000)))
        if self._scoreboard is not None:
            self._scoreboard.write_blocking(self._blocking)

    def _frame(self) -> FrameType | None:
        """The innermost frame of the loop's thread, or ``None`` while the loop itself runs."""
        frame = sys._current_frames().get(self._loop_thread)
        return None if frame is None or frame.f_code is Hub.run.__code__ else frame

    def _outermost_frame(self) -> int | None:
        """The identity of the frame in which the greenlet began; its locals must not live any longer."""
        frame = self._frame()
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        return None if frame is None else id(frame)

    def _report(self) -> None:
        innermost = self._frame()
        frame = next((f for f in frames(innermost) if is_program_file(f.f_code.co_filename)), None)
        blocking = frame or innermost
        if blocking is None or innermost is None or blocking.f_code in self._reported:
            return
        self._reported.add(blocking.f_code)
        within = "" if blocking is innermost else f", which runs {_describe(innermost)},"
        advice = (
            "Run the call in a thread with gevent.get_hub().threadpool.apply(), or in a daemon "
            "(passenger.spawn())"
            if frame is not None
            else "The program's own code is not involved"
        )
        self._log.warning(
            "The worker has served no client for %g s (pid:%s): %s%s blocks its event loop. %s. If that is "
            "expected, raise the setting max_blocking_time",
            self._seconds,
            os.getpid(),
            _describe(blocking),
            within,
            advice,
        )


def _describe(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name}() at {os.path.relpath(code.co_filename)}:{frame.f_lineno}"
