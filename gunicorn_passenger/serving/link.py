"""A worker's end of the channel to the master's port broker.

Runs in: a worker. Must never: block the gevent hub, or go on as if a lost master had answered.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import gevent
from gevent import socket as gsocket
from gevent.event import AsyncResult

from gunicorn_passenger import channel, errors, native
from gunicorn_passenger.address import Address, Auto, SockAddr, Tcp, Unix, format_tcp, resolve
from gunicorn_passenger.channel import Close, Fault, Message, Noted, Open, Opened, Ready, Refused, Rejected

#: Seconds that a worker waits for the broker; it answers within milliseconds or it hangs.
ANSWER_TIMEOUT = 10.0

T = TypeVar("T")


class Link:
    """Asks the master for ports; used by any greenlet, and by threads of the system."""

    def __init__(self, end: Any, log: Any) -> None:
        """:param end: the worker's end of the channel, or ``None`` where the broker has failed."""
        self.log = log
        self._lost = "" if end is not None else "could not be reached when the worker started"
        self._numbers = itertools.count(1)
        self._waiting: dict[int, AsyncResult] = {}
        self._pid = os.getpid()
        self._hub = gevent.get_hub()
        self._thread = native.original("_thread", "get_ident")()
        self._sock: Any = None
        if end is not None:
            self._sock = gsocket.socket(end.family, end.type, end.proto, fileno=end.detach())
            os.register_at_fork(after_in_child=self._forked)
            gevent.spawn(self._read)

    def _forked(self) -> None:
        """A child of the worker must not keep the worker's channel open."""
        if self._sock is not None:
            os.close(self._sock.detach())
            self._sock = None
            self._lost = "answers the worker, not its child processes"

    def open(
        self, want: Address, name: str, backlog: int = 0, v6only: bool = False, within: str = ""
    ) -> tuple[int, str, SockAddr | str]:
        """Get the listening socket of an address from the master.

        :returns: a descriptor that the caller owns, the key for :meth:`close`, and what the socket
            is bound to.
        :raises errors.ListenError: when the address is not to be had.
        """
        number = next(self._numbers)
        if isinstance(want, Unix):
            ask = Open(number, "unix", path=want.path, backlog=backlog)
        elif isinstance(want, Tcp | Auto):
            auto = isinstance(want, Auto)
            port = 0 if isinstance(want, Auto) else want.port
            _, host = resolve(want.host, port)
            ask = Open(
                number, "auto" if auto else "tcp", host, port, "", name, backlog, v6only, within=within
            )
        else:
            raise TypeError(f"{want!r} is not the master's to open")
        label = format_tcp(ask.host, ask.port) if isinstance(want, Tcp) else str(want)
        answer, fd = self._ask(ask, label)
        if isinstance(answer, Refused):
            kind = errors.REFUSALS.get(answer.kind, errors.ListenError)
            raise kind(answer.errno, answer.text)
        if not isinstance(answer, Opened) or fd is None:
            raise errors.broker_lost(label, "did not understand this worker (different versions?)")
        bound: SockAddr | str = answer.path or (
            (answer.host, answer.port, 0, 0) if ":" in answer.host else (answer.host, answer.port)
        )
        return fd, answer.key, bound

    def close(self, key: str) -> None:
        """The worker no longer accepts on ``key``."""
        self._tell(Close(0, key))

    def ready(self) -> None:
        self._tell(Ready(0))

    def fault(self, text: str) -> bool:
        """Have the master log, once for all workers, why this one cannot start.

        :returns: whether this worker's exit is to halt gunicorn.
        :raises errors.BrokerLost: when the master cannot be reached.
        """
        answer, _ = self._ask(Fault(next(self._numbers), text), "the worker")
        return not isinstance(answer, Noted) or answer.halt

    # --- the wire ---------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the worker's own thread, whichever thread asks; its result."""
        if native.original("_thread", "get_ident")() == self._thread:
            return function()
        # The hub belongs to the worker's thread: let it work, and wait here without a hub.
        done = native.lock()
        done.acquire()
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.extend((function(), None))
            except BaseException as error:
                outcome.extend((None, error))
            finally:
                done.release()

        self._hub.loop.run_callback_threadsafe(gevent.spawn, run)
        done.acquire()
        result, error = outcome
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _tell(self, message: Message) -> bool:
        if self._lost:
            return False
        try:
            self.call(lambda: self._send(message))
        except (channel.Closed, OSError):
            return False
        return True

    def _send(self, message: Message) -> None:
        # a packet goes whole or not at all, so greenlets need no lock
        channel.send(self._sock, message)

    def _ask(self, ask: Message, label: str) -> tuple[Message, int | None]:
        if self._lost:
            raise errors.broker_lost(label, self._lost)
        return self.call(lambda: self._exchange(ask, label))

    def _exchange(self, ask: Message, label: str) -> tuple[Message, int | None]:
        result = self._waiting[ask.id] = AsyncResult()
        try:
            self._send(ask)
            answer: tuple[Message, int | None] = result.get(timeout=ANSWER_TIMEOUT)
            return answer
        except gevent.Timeout:
            raise errors.broker_lost(label, f"did not answer within {ANSWER_TIMEOUT:g} s") from None
        except (channel.Closed, OSError) as error:
            if isinstance(error, errors.ListenError):
                raise
            raise errors.broker_lost(label, "has closed the channel") from None
        finally:
            self._waiting.pop(ask.id, None)

    def _read(self) -> None:
        """Hand each answer to the greenlet that waits for it."""
        while True:
            try:
                message, fd = channel.receive(self._sock)
            except channel.Malformed as error:
                self.log.warning("gunicorn-passenger: the master sent a message that is none: %s", error)
                continue
            except (channel.Closed, OSError):
                break
            if isinstance(message, Rejected):
                self.log.error("gunicorn-passenger: the master rejected a message: %s", message.text)
            waiting = self._waiting.get(message.id)
            if waiting is not None:
                waiting.set((message, fd))
            elif fd is not None:
                os.close(fd)  # answered too late
        if os.getpid() != self._pid:
            return
        self._lost = "has closed the channel"
        for waiting in list(self._waiting.values()):
            waiting.set_exception(errors.broker_lost("the port", self._lost))
