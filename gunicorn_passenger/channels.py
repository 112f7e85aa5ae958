"""``gunicorn_passenger.channel()``: publish and subscribe between all processes of an application.

Process: a worker; a daemon, or another process of the application; plain Python, where the process is alone;
and the master with ``--preload``, where a handler waits for the fork.
Never: wait for a subscriber.

A worker's messages go to its siblings by their mailboxes, as those of Socket.IO do. A process that is not a
worker publishes by way of the master, and has a mailbox of its own (:mod:`.status.message_client`).
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar, overload

from gunicorn_passenger.daemons.process_tree import KEY_VARIABLE
from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.ipc.subscribers import Receive, Subscribers
from gunicorn_passenger.serving import events, server_errors, sibling_messages, standalone
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.status import control_client
from gunicorn_passenger.status.message_client import MessageClient

Message = str | bytes
F = TypeVar("F", bound=Callable[[Any], object])

#: Messages that wait for a handler.
_MAX_PENDING = 1000
#: Characters of a name.
_MAX_NAME = 100
#: The first byte of a message.
_TEXT, _BYTES = b"t", b"b"


class _Messages:
    """The messages that wait for one subscriber."""

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._waiting: deque[bytes] = deque()
        self._ended = False
        #: how many were not kept, since too many waited
        self.dropped = 0
        #: free when there is something to take. A lock of the program's own kind: whatever has patched it, a
        #: thread that waits lets others run.
        self._wake = threading.Lock()
        self._wake.acquire()

    def receive(self, data: bytes) -> None:
        """:raises queue.Full: when too many wait."""
        if len(self._waiting) >= self._max_pending:
            self.dropped += 1
            raise queue.Full
        self._waiting.append(data)
        self._release()

    def end(self) -> None:
        self._ended = True
        self._release()

    def _release(self) -> None:
        with suppress(RuntimeError):
            self._wake.release()

    def take(self, timeout: float | None) -> Message | None:
        """Wait for the next message.

        :returns: ``None`` when there was none for so many seconds.
        :raises StopIteration: after the last one.
        """
        while not (self._waiting or self._ended):
            if not self._wake.acquire(timeout=-1 if timeout is None else timeout):
                return None
        try:
            data = self._waiting.popleft()
        except IndexError:
            self._release()  # for another thread that waits here
            raise StopIteration from None
        if self._waiting or self._ended:
            self._release()
        return data[1:].decode() if data[:1] == _TEXT else data[1:]


class Subscription:
    """The messages of a channel from the call of ``subscribe()`` on, as an iterator.

    It ends when it is closed, when its worker begins to drain, and when the application has ended. So a
    response that lasts for as long as its client stays does not delay a reload. An iterator that is not used
    any more closes itself.
    """

    def __init__(
        self, messages: _Messages, subscribers: Subscribers, topic: str, timeout: float | None
    ) -> None:
        self._messages = messages
        self._timeout = timeout
        self._leave = weakref.finalize(self, subscribers.remove, topic, messages.receive)

    @property
    def dropped(self) -> int:
        """How many messages it has missed, since too many waited for it."""
        return self._messages.dropped

    def __iter__(self) -> Iterator[Message | None]:
        return self

    def __next__(self) -> Message | None:
        """Wait for the next message; ``None`` when there is none for the ``timeout`` of ``subscribe()``."""
        return self._messages.take(self._timeout)

    def close(self) -> None:
        """End the iteration, after the messages that wait. Any thread may call."""
        self._leave()
        self._messages.end()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Channel:
    """Messages between all processes of an application."""

    def __init__(self, name: str, app: str = "") -> None:
        if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > _MAX_NAME:
            raise SettingError(
                f"channel({name!r}): a name is a string of 1 to {_MAX_NAME} characters without a zero byte"
            )
        self.name = name
        self._app = str(app)
        self._topic = f"channel {name}"

    def publish(self, message: Message) -> None:
        """Send a message to all subscribers, those of this process included. It does not wait for them.

        :param message: text or bytes. A worker can send 64 MB, another process 0.75 MB.
        :raises TypeError: for anything else.
        :raises ValueError: when the message is too long.
        :raises PassengerError: when this process cannot reach the application.
        """
        if isinstance(message, str):
            data = _TEXT + message.encode()
        elif isinstance(message, bytes):
            data = _BYTES + message
        else:
            raise TypeError(
                f"channel({self.name!r}).publish() takes a str or bytes, not {type(message).__name__}; "
                "json.dumps() makes a str of most values"
            )
        _source(self._app).publish(self._topic, data)

    def subscribe(self, timeout: float | None = None, max_pending: int = _MAX_PENDING) -> Subscription:
        """Receive the messages that are published from now on, in the order in which each process sends them.

        :param timeout: seconds; the iterator returns ``None`` when no message came for so long.
        :param max_pending: how many messages wait for this subscriber; it misses further ones.
        :raises PassengerError: when this process cannot reach the application.
        """
        if max_pending < 1:
            raise SettingError(f"subscribe(max_pending={max_pending!r}): use 1 or more")
        messages = _Messages(max_pending)
        subscribers = _source(self._app).subscribe(self._topic, messages.receive)
        _iterated.add(messages)
        if registry.draining:
            messages.end()
        return Subscription(messages, subscribers, self._topic, timeout)

    @overload
    def on(self) -> Callable[[F], F]: ...
    @overload
    def on(self, fn: F) -> F: ...
    def on(self, fn: F | None = None) -> F | Callable[[F], F]:
        """Call ``fn`` with each message from now on; without ``fn``, a decorator.

        The calls come one after the other, in a thread (under gevent, a greenlet) of their own. An error is
        logged. 1,000 messages may wait; ``fn`` misses further ones. A worker calls it until it exits.

        :raises TypeError: when ``fn`` cannot be called.
        :raises PassengerError: when this process cannot reach the application.
        """
        if fn is None:
            return self.on
        if not callable(fn):
            raise TypeError(f"channel({self.name!r}).on() takes a function; {fn!r} is not")
        if _waits_for_fork():
            events.on("ready", lambda _: self._start(fn))
        else:
            self._start(fn)
        return fn

    def _start(self, fn: Callable[[Any], object]) -> None:
        messages = _Messages(_MAX_PENDING)
        _source(self._app).subscribe(self._topic, messages.receive)
        threading.Thread(
            target=self._call, args=(fn, messages), name=f"channel {self.name}", daemon=True
        ).start()

    def _call(self, fn: Callable[[Any], object], messages: _Messages) -> None:
        while True:
            message = messages.take(None)
            try:
                fn(message)
            except Exception:
                logging.getLogger("gunicorn.error").exception(
                    "gunicorn-passenger: the program's function for the channel %r raised an error", self.name
                )


def channel(name: str, app: str = "") -> Channel:
    """A channel: what one process of the application publishes on it reaches the subscribers of all.

    Under plain Python, and in no application, it connects the threads of one process.

    :param name: the same in every process.
    :param app: the pid or the name of an application, for a process that is not its own, such as a cron job.
    :raises SettingError: (a ``ValueError``) for a name that cannot be used.
    """
    return Channel(name, app)


# --- the calling process ----------------------------------------------------------------------------------


class _InProcess:
    """A worker, or plain Python."""

    def __init__(self) -> None:
        registry.before_drain.append(_end_iterators)

    def publish(self, topic: str, data: bytes) -> None:
        sibling_messages.publish(topic, data, here=True)

    def subscribe(self, topic: str, receive: Receive) -> Subscribers:
        return sibling_messages.subscribe(topic, receive)


#: by the pid, since a child has the objects of its parent, and the application's name
_sources: dict[tuple[int, str], _InProcess | MessageClient] = {}
#: what the iterators of this process wait for
_iterated: weakref.WeakSet[_Messages] = weakref.WeakSet()


def _end_iterators() -> None:
    for messages in list(_iterated):
        messages.end()


def _source(app: str) -> _InProcess | MessageClient:
    key = os.getpid(), app
    found = _sources.get(key)
    if found is None:
        found = _sources[key] = _find_source(app)
    return found


def _find_source(app: str) -> _InProcess | MessageClient:
    if app:
        return MessageClient(app, _end_iterators)
    if sibling_messages.in_worker():
        return _InProcess()
    if _waits_for_fork():
        raise server_errors.channel_in_master()
    if control_client.parent_application() is not None:
        return MessageClient("", _end_iterators)
    if _in_daemon() or registry.worker is not None:
        raise server_errors.channel_without_master()
    if (worker_class := standalone.worker_class()) is not None:
        raise server_errors.channel_without_hooks(worker_class)
    return _InProcess()


def _waits_for_fork() -> bool:
    """Whether this process is a gunicorn master."""
    return registry.active and registry.worker is None and not _in_daemon()


def _in_daemon() -> bool:
    return bool(os.environ.get(KEY_VARIABLE))
