"""The thread in which an ASGI application runs: its asyncio loop, its lifespan, and its acceptors.

Process: a worker, or plain Python; methods that other threads call say so.
Never: stop other servers while the loop waits.

The thread is one as the program would start it: one of the system or, where gevent has patched the process, a
greenlet.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.serving.asgi_acceptor import AsgiAcceptor, make_config
from gunicorn_passenger.serving.interface import AsgiApp
from gunicorn_passenger.serving.scheduler import Scheduler, ThreadResult
from gunicorn_passenger.system import unpatched

if TYPE_CHECKING:
    from gunicorn_passenger.serving.gevent_asyncio import HubSelector

#: Seconds between two checks whether the connections are finished.
_POLL_INTERVAL = 0.05


class AsgiThread:
    """Runs one ASGI application. Its methods may be called in any thread but its own."""

    def __init__(
        self,
        app: AsgiApp,
        name: str,
        cfg: Any,
        log: Log,
        scheduler: Scheduler,
        on_death: Callable[[], object] | None = None,
        is_needed: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        :param name: of the server, for errors.
        :param cfg: gunicorn's configuration.
        :param on_death: called when the thread has ended although nothing told it to, and the server with it.
        :param is_needed: whether it must not end yet, although its connections have ended.
        """
        self._app = app
        self._name = name
        self._cfg = cfg
        self._log = log
        self._scheduler = scheduler
        self._on_death = on_death
        self._is_needed = is_needed
        self._loop: asyncio.AbstractEventLoop | None = None
        #: what the loop waits in, if that is a hub
        self._selector: HubSelector | None = None
        self._leaving = asyncio.Event()
        self._acceptors: list[AsgiAcceptor] = []
        self._started = scheduler.result()
        #: what the application's lifespan has made for its requests
        self._state: dict[str, Any] = {}
        #: the reason of the application for a lifespan that failed
        self._reason = ""
        self.finishing = self.finished = self._killed = self._cancelled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the thread; wait until the lifespan of the application has started.

        :raises errors.PassengerError: when it fails.
        """
        _configure_logging(self._log)
        try:
            threading.Thread(target=self._run, name=f"ASGI {self._name}", daemon=True).start()
        except RuntimeError as error:
            self.finished = True
            raise server_errors.asgi_thread_failed(self._name, str(error)) from None
        while not self._started.ready():
            self._started.wait(1.0)  # a hub does not wait for another thread without a timer
        if self._started.exception is not None:
            raise self._started.exception

    def make_acceptor(self, sock: Any) -> AsgiAcceptor:
        """:param sock: a listening socket; the acceptor owns it."""
        assert self._loop is not None
        acceptor = AsgiAcceptor(
            sock,
            self._app,
            self._state,
            self._loop,
            self._cfg,
            self._log,
            self._scheduler,
            settings.closes_websockets_on_exit(),
        )
        # a server that is paused and resumed has a new one each time
        self._acceptors = [*(a for a in self._acceptors if not a.is_drained()), acceptor]
        return acceptor

    def finish(self) -> None:
        """End the application when it has started and its connections have ended. Harmless when repeated."""
        self.finishing = True
        self._in_loop(self._leaving.set)

    def _in_loop(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)

    def leave_to_parent(self) -> None:
        """In a forked child: the application runs in the parent only."""
        if self._selector is not None:
            self._selector.leave_to_parent()

    def idle(self) -> bool:
        """Whether the application, if it was told to, has ended."""
        return self.finished or not self.finishing

    def kill(self, timeout: float) -> None:
        """End the application, whether or not its connections have ended. Its lifespan is shut down.

        :param timeout: seconds after which a shutdown that has not ended is cancelled.
        """
        self._killed = True
        self.finish()
        self.wait(timeout)
        if not self.finished:
            self._log.warning(
                "The lifespan of the ASGI server %r has not ended within the graceful timeout, so its "
                "shutdown is cancelled; raise --graceful-timeout if it needs more time",
                self._name,
            )
            self._in_loop(self._cancel)

    def wait(self, seconds: float) -> None:
        """Wait until the thread has ended, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while not self.finished and time.monotonic() < deadline:
            self._scheduler.sleep(0.01)

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            loop = self._loop = self._new_loop()
            if self.finishing:
                self._leaving.set()
            self._task = loop.create_task(self._serve())
            loop.run_until_complete(self._task)
        except BaseException as error:
            if not self._cancelled:
                self._report(error)
        finally:
            try:
                for acceptor in self._acceptors:
                    acceptor.abort()  # after an error, a sibling serves the clients that wait
                if self._loop is not None:
                    _close(self._loop)
            except BaseException:  # also what another task of the application raises at the end
                self._log.exception("gunicorn-passenger: closing the asyncio loop of %r failed", self._name)
            self.finished = True

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        """An asyncio loop that waits as this thread does."""
        if unpatched.threads_are_greenlets():
            from gunicorn_passenger.serving.gevent_asyncio import new_event_loop

            loop, self._selector = new_event_loop()
            return loop
        try:
            import uvloop
        except ImportError:
            return asyncio.SelectorEventLoop(unpatched.unpatched("selectors", "EpollSelector")())
        return uvloop.new_event_loop()

    def _report(self, error: BaseException) -> None:
        """An error that ends the thread, such as a task of the application that has stopped the loop."""
        if not self._started.ready():
            if not isinstance(error, Exception):
                error = server_errors.lifespan_failed(self._name, repr(error))
            self._tell_start(self._started.set_exception, error)
            return
        on_death = None if self.finishing else self._on_death
        self._log.error(
            "gunicorn-passenger: the thread of the ASGI server %r has ended (%r)%s",
            self._name,
            error,
            ": gunicorn replaces this worker; correct what ends the server's event loop" if on_death else "",
            exc_info=error,
        )
        if on_death is not None:
            self._scheduler.spawn(on_death)

    def _tell_start(self, tell: Callable[[Any], object], outcome: Any) -> None:
        if isinstance(self._started, ThreadResult):
            tell(outcome)  # the scheduler's thread may be the one that waits
        else:
            self._scheduler.spawn(tell, outcome)

    async def _serve(self) -> None:
        lifespan = make_config(self._call_lifespan, self._cfg, lifespan="auto")
        lifespan.load()
        events = lifespan.lifespan_class(lifespan)
        events.logger = logging.Logger("unused", logging.CRITICAL)  # the errors are reported here
        await events.startup()
        if events.should_exit:
            raise server_errors.lifespan_failed(self._name, self._reason)
        self._state = events.state
        self._tell_start(self._started.set, None)
        await self._leaving.wait()
        while not (self._killed or await self._is_over()):
            await asyncio.sleep(_POLL_INTERVAL)
        await events.shutdown()

    async def _is_over(self) -> bool:
        """Whether all connections have ended, and no sibling can pass one any more."""
        if self._is_needed() or not all(acceptor.is_drained() for acceptor in self._acceptors):
            return False
        if not any(acceptor.takes_connections for acceptor in self._acceptors):
            return True
        # the hub takes the connections of siblings: there is none between its look and its decision
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def tell(is_over: bool) -> None:
            if not over.done():
                over.set_result(is_over)

        def shut() -> None:
            drained = [acceptor.shut() for acceptor in self._acceptors]
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, all(drained))

        self._scheduler.spawn(shut)
        return bool(await over)

    async def _call_lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, as uvicorn calls it for the lifespan."""

        async def send_and_remember(message: Any) -> None:
            text = str(message.get("message", ""))
            if message["type"] == "lifespan.startup.failed":
                self._reason = _reason(text)
                self._log.debug("The lifespan of %r failed at startup: %s", self._name, text)
            elif message["type"] == "lifespan.shutdown.failed" and not self._cancelled:
                self._log.error("The lifespan of the ASGI server %r failed at shutdown: %s", self._name, text)
            await send(message)

        await self._app(scope, receive, send_and_remember)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()


def _close(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _reason(text: str) -> str:
    """A framework sends a traceback: its last line, and the last place that it names."""
    last = text.strip().rpartition("\n")[2] or "no reason"
    places = re.findall(r'File "(.+?)", line (\d+)', text)
    return f"{last}, {os.path.relpath(places[-1][0])}:{places[-1][1]}" if places else last


def _configure_logging(log: Log) -> None:
    """uvicorn's lines go where gunicorn's go, if the program has not configured uvicorn's loggers."""
    error_log = getattr(log, "error_log", None)
    if error_log is None or logging.getLogger("uvicorn").handlers:
        return
    # what uvicorn says of every start and stop, gunicorn's log has already
    level = logging.DEBUG if error_log.isEnabledFor(logging.DEBUG) else logging.WARNING
    _send_lines("uvicorn.error", error_log, level)
    _send_lines("uvicorn.access", getattr(log, "access_log", error_log), logging.INFO)


def _send_lines(name: str, target: logging.Logger, level: int) -> None:
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.handlers = target.handlers
        logger.propagate = False
        logger.setLevel(level)
