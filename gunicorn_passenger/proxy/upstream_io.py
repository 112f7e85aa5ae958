"""Connections to targets, byte by byte, and how the program around the proxy waits.

Runs in: wherever the proxy is mounted. Must never: block a gevent hub, or wait without the deadline it
was given.

The proxy is written as if everything blocked. Under gevent (our worker, gunicorn's gevent workers) a
wait lets the hub run; in a thread of another WSGI server it is a ``poll``. Which of the two holds is
asked for each connection: a thread that has a gevent hub waits through it.

The sockets are the C ones below Python's own and gevent's, so that it makes no difference whether the
program is monkey-patched.
"""

from __future__ import annotations

import _socket
import contextlib
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import gevent
from gevent import getcurrent, monkey
from gevent import socket as gsocket
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event as GeventEvent

from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.proxy.log import failed_callback

#: what a wait ends with
_READY, _LATE, _GONE = "ready", "late", "gone"

#: Bytes that one read of a head asks for.
ANSWER = 65536

#: The same, where mostly the whole of a small answer comes.
_ASKED = 16384

#: Requests up to this size are sent at the end of the loop's turn.
SOON = 8192

#: what a wait is for
READ, WRITE = 1, 2

#: the system's own: gevent's would let the hub run, which a thread does not have
_poll = monkey.get_original("select", "poll")


class DownstreamDisconnected(Exception):
    """The client has gone while its answer was awaited."""


class GeventRuntime:
    """How greenlets wait: one for each hub."""

    #: whether two parts of an exchange can run side by side
    concurrent = True

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self._deadlines: dict[float, TimeoutQueue] = {}
        #: what is sent at the end of the loop's turn
        self._soon: list[tuple[GeventStream, bytes]] = []

    def send_soon(self, stream: GeventStream, data: bytes) -> None:
        """Send a request at the end of the loop's turn, together with others.

        To send it wakes the target, which has answered and fallen asleep again before the next request
        is written: most of what a small request costs the kernel. Targets that get several at a time are
        woken once.
        """
        if not self._soon:
            self.hub.loop.run_callback(self._send_now)
        self._soon.append((stream, data))

    def _send_now(self) -> None:
        """Called in the hub."""
        soon, self._soon = self._soon, []
        for stream, data in soon:
            try:
                stream.send_now(data)
            except Exception as error:
                # the others are still to be sent; whoever reads this one hears that it has ended
                failed_callback("a connection to a target", error)
                stream.failed = True
                stream.shutdown()

    def deadlines(self, seconds: float) -> TimeoutQueue:
        """The deadlines of one duration."""
        found = self._deadlines.get(seconds)
        if found is None:
            if len(self._deadlines) > 100:
                self._deadlines = {k: v for k, v in self._deadlines.items() if len(v)}
            found = self._deadlines[seconds] = TimeoutQueue(seconds)
        return found

    def lock(self) -> Any:
        """Greenlets change places only where they wait."""
        return contextlib.nullcontext()

    def spawn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return gevent.spawn(function, *arguments)

    def event(self) -> Any:
        return GeventEvent()

    def resolve(self, host: str, port: int, seconds: float) -> list[Any]:
        """
        :raises TimeoutError: when it takes longer than ``seconds``.
        """
        with gevent.Timeout(max(seconds, 0.001), TimeoutError):
            return list(gsocket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))

    def open(self, sock: Any) -> Stream:
        return GeventStream(sock, self)


class ThreadRuntime:
    """How threads wait that know nothing of gevent: there is one of it."""

    concurrent = False

    def lock(self) -> Any:
        """What keeps two from changing the same connections at a time."""
        return threading.Lock()

    def spawn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        task = threading.Thread(target=function, args=arguments, daemon=True)
        task.start()
        return task

    def event(self) -> Any:
        return threading.Event()

    def resolve(self, host: str, port: int, seconds: float) -> list[Any]:
        """The system's resolver has its own idea of how long that may take."""
        return list(_socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))

    def open(self, sock: Any) -> Stream:
        return ThreadStream(sock)


Runtime = Any
_threads = ThreadRuntime()


def runtime() -> Runtime:
    """How the caller waits."""
    hub = get_hub_if_exists()
    if hub is None:
        return _threads
    try:
        return hub.passenger_runtime
    except AttributeError:
        hub.passenger_runtime = GeventRuntime(hub)
        return hub.passenger_runtime


class Stream:
    """A connected socket. What waits may raise ``TimeoutError`` and ``OSError``."""

    sock: Any
    tls = False
    #: whether a part of what was sent last was taken, and whether sending it failed later
    partly = failed = False
    #: whether a part of the last request is still to be sent
    unsent = False
    _poll: Any = None

    def recv(self, most: int, seconds: float | None = None, client: Any = None) -> bytes:
        """What comes next; empty at the end.

        :param seconds: how long to wait for it.
        :param client: a connection of ours; when its client goes, the wait ends.
        :raises DownstreamDisconnected: then.
        """
        while True:
            try:
                data: bytes = self.sock.recv(most)
                return data
            except BlockingIOError:
                self.wait(READ, seconds, client)

    def answer(self, seconds: float | None = None, client: Any = None) -> bytes:
        """What comes next, when it cannot be there yet: the same as :meth:`recv`, with a call less."""
        self.wait(READ, seconds, client)
        return self.recv(ANSWER, seconds, client)

    def send(self, data: Any, seconds: float | None = None) -> None:
        """Send all of it."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            view = memoryview(data)[sent:]
            self.partly = sent > 0
            while view:
                try:
                    view = view[self.sock.send(view) :]
                    self.partly = True
                except BlockingIOError:
                    self.wait(WRITE, seconds)

    def send_soon(self, data: bytes, seconds: float | None = None) -> None:
        """Send it now or a little later; when that fails, ``failed`` is set, and reading tells."""
        self.send(data, seconds)

    def wait(self, what: int, seconds: float | None = None, client: Any = None) -> None:
        raise NotImplementedError

    def silent(self) -> bool:
        """Whether nothing has come, not even the end: so a kept connection has to be."""
        if self._poll is None:
            if self.sock.fileno() < 0:
                return False  # it is closed
            self._poll = _poll()
            self._poll.register(self.sock.fileno(), select.POLLIN)
        return not self._poll.poll(0)

    def pending(self) -> bool:
        """Whether there are bytes to read."""
        try:
            return bool(self.sock.recv(1, _socket.MSG_PEEK))
        except OSError:
            return False

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Call this when something comes while nobody reads."""

    def rearm(self) -> None:
        """Nobody reads for some time: have the callback called again."""

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(how)

    def finish(self) -> None:
        """Send no more, and go on reading."""
        self.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


class ThreadStream(Stream):
    """Waits in ``poll``."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def wait(self, what: int, seconds: float | None = None, client: Any = None) -> None:
        poll = _poll()
        poll.register(self.sock.fileno(), select.POLLIN if what == READ else select.POLLOUT)
        if not poll.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError


class _TimedWait:
    """One wait that has a deadline: a stream may be read and written at the same time."""

    __slots__ = ("_switch",)

    def __init__(self, switch: Callable[..., Any]) -> None:
        self._switch = switch

    def expire(self) -> None:
        """Called in the hub by the deadline, which others share."""
        try:
            self._switch(_LATE)
        except Exception as error:
            failed_callback("a connection to a target", error)


class GeventStream(Stream):
    """Waits through the hub.

    The watcher stays active from request to request: to stop it for the time between two would cost a
    call of the system each time, and it tells at once when a connection that nobody uses is closed. When
    something comes while nobody reads, it stops by itself until somebody does.
    """

    def __init__(self, sock: Any, runtime: GeventRuntime) -> None:
        self.sock = sock
        self.runtime = runtime
        self._hub = runtime.hub
        self._readable = self._hub.loop.io(sock.fileno(), READ)
        self._writable: Any = None
        self._callback: Callable[[], None] | None = None
        self._closed = False
        #: whether a request is to be sent at the end of the turn
        self._sending = False

    def ask(self, data: bytes, seconds: float | None, client: Any) -> bytes | None:
        """Send a request at the end of the loop's turn, and receive what comes next.

        :param seconds: how long to wait for that.
        :param client: a connection of ours; when its client goes, the wait ends.
        :returns: nothing when something has come before the request was sent, which then is not.
        :raises TimeoutError, OSError, DownstreamDisconnected: as :meth:`recv`.
        """
        self.partly = False
        self._sending = True
        self.runtime.send_soon(self, data)
        if seconds is not None:
            self.wait(READ, seconds, client)
        else:
            # as there, with the calls that a busy proxy can do without
            switch = getcurrent().switch
            self._readable.start(switch, _READY)
            client.watch(switch, _GONE)
            try:
                ended = self._hub.switch()
            finally:
                self._readable.callback, self._readable.args = self._stray, ()
                client.unwatch()
            if ended is not _READY:
                raise DownstreamDisconnected
        if self._sending:
            self._closed = True
            return None
        try:
            came: bytes = self.sock.recv(_ASKED)
            return came
        except BlockingIOError:
            return self.recv(ANSWER, seconds, client)

    def wait(self, what: int, seconds: float | None = None, client: Any = None) -> None:
        switch = getcurrent().switch
        if what == READ:
            watcher = self._readable
            watcher.start(switch, _READY)
        else:
            watcher = self._writable
            if watcher is None:
                watcher = self._writable = self._hub.loop.io(self.sock.fileno(), WRITE)
            watcher.start(switch, _READY)
        late = None
        if seconds is not None:
            late = _TimedWait(switch)
            deadlines = self.runtime.deadlines(seconds)
            deadlines.add(late)
        if client is not None:
            client.watch(switch, _GONE)
        try:
            ended = self._hub.switch()
        finally:
            if what == READ:
                watcher.callback, watcher.args = self._stray, ()
            else:
                watcher.stop()
            if late is not None:
                deadlines.remove(late, None)
            if client is not None:
                client.unwatch()
        if ended is _READY:
            return
        if ended is _GONE:
            raise DownstreamDisconnected
        raise TimeoutError

    def send_soon(self, data: bytes, seconds: float | None = None) -> None:
        if len(data) > SOON:
            self.send(data, seconds)
        else:
            self.runtime.send_soon(self, data)

    def send_now(self, data: bytes) -> None:
        """Called in the hub: send what was to be sent soon."""
        self._sending = False
        if self._closed:
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.failed = True  # whoever reads hears why
            return
        if sent < len(data):
            self.partly = sent > 0
            self.unsent = True
            gevent.spawn(self._send_rest, data[sent:])

    def _send_rest(self, data: bytes) -> None:
        try:
            self.send(data)
            self.unsent = False
        except OSError:
            self.shutdown()
        except Exception as error:
            failed_callback("a connection to a target", error)
            self.shutdown()

    def _stray(self) -> None:
        """Called in the hub: something has come while nobody reads."""
        try:
            self._readable.stop()
            if self._callback is not None:
                self._callback()
        except Exception as error:
            failed_callback("a connection to a target", error)
            self.close()

    def watch(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def rearm(self) -> None:
        if not self._readable.active:
            self._readable.start(self._stray)

    def close(self) -> None:
        self._closed = True
        self._callback = None
        try:
            self._readable.close()
            if self._writable is not None:
                self._writable.close()
        finally:
            self.sock.close()
