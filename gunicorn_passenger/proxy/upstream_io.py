"""Reads and writes the sockets of upstream connections, in greenlets and in threads.

Process: any process in which the proxy is mounted.
Never: block a gevent hub, or wait longer than the timeout that the caller gave.

The proxy is written as if everything blocked. Under gevent (our worker, gunicorn's gevent workers) a
wait lets the hub run; in a thread of another WSGI server it is a ``poll``. That is decided for each
connection: a thread that has a gevent hub waits through it.

The sockets are the C type below those of Python and of gevent, so that it makes no difference whether
the program is monkey-patched.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import gevent
from gevent import getcurrent
from gevent import select as gevent_select
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event as GeventEvent

from gunicorn_passenger.errors import UpstreamTimeout
from gunicorn_passenger.http.downstream_api import DisconnectNotifier
from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.proxy.log import failed_callback
from gunicorn_passenger.proxy.resolver import Resolver
from gunicorn_passenger.proxy.wait_errors import DownstreamDisconnected, WaitTimeout
from gunicorn_passenger.system import unpatched

#: what a wait ends with
_READY, _LATE, _GONE = "ready", "late", "gone"

#: The size of one read of a response head, in bytes.
HEAD_READ = 65536

#: The size of the first read, which mostly gets the whole of a small response.
_SMALL_RESPONSE = 16384

#: Requests up to this size, in bytes, are sent at the end of the event-loop iteration.
SMALL_REQUEST = 8192

#: what a wait is for
READ, WRITE = 1, 2


class GeventRuntime:
    """How greenlets wait: one for each hub."""

    #: whether the request body can be sent while the response is read
    concurrent = True

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self.resolver = Resolver(self)
        self._timeouts: dict[float, TimeoutQueue] = {}
        #: requests to be sent at the end of the iteration
        self._pending_sends: list[tuple[GeventStream, bytes]] = []

    def send_at_end_of_iteration(self, stream: GeventStream, data: bytes) -> None:
        """Send a request at the end of the event-loop iteration, together with others.

        Sending wakes the upstream, which would have responded and fallen asleep again before the next
        request is written: most of what a small request costs the kernel. An upstream that gets several
        requests at a time is woken once.
        """
        if not self._pending_sends:
            self.hub.loop.run_callback(self._send_now)
        self._pending_sends.append((stream, data))

    def _send_now(self) -> None:
        """Called in the hub."""
        pending, self._pending_sends = self._pending_sends, []
        for stream, data in pending:
            try:
                stream.send_now(data)
            except Exception as error:
                # the others are still to be sent; the reader of this stream sees its end
                failed_callback("a connection to an upstream", error)
                stream.failed = True
                stream.shutdown()

    def timeouts(self, seconds: float) -> TimeoutQueue:
        """The queue of all waits with this timeout."""
        found = self._timeouts.get(seconds)
        if found is None:
            if len(self._timeouts) > 100:
                self._timeouts = {k: v for k, v in self._timeouts.items() if len(v)}
            found = self._timeouts[seconds] = TimeoutQueue(seconds)
        return found

    def lock(self) -> Any:
        """No lock: greenlets switch only where they wait."""
        return contextlib.nullcontext()

    def spawn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return gevent.spawn(function, *arguments)

    def event(self) -> Any:
        return GeventEvent()

    def poll(self) -> Any:
        """An object with the interface of :func:`select.poll`; its wait lets the hub run."""
        return gevent_select.poll()

    def call_from_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        """Called in a native thread: call a function in the hub."""
        with contextlib.suppress(Exception):  # the hub has ended meanwhile
            self.hub.loop.run_callback_threadsafe(function, *arguments)

    def open(self, sock: Any) -> Stream:
        return GeventStream(sock, self)


class ThreadRuntime:
    """How threads without a gevent hub wait; there is one instance."""

    concurrent = False

    def __init__(self) -> None:
        self.resolver = Resolver(self)

    def lock(self) -> Any:
        """Keeps two threads from changing the same pool at a time."""
        return threading.Lock()

    def spawn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        task = threading.Thread(target=function, args=arguments, daemon=True)
        task.start()
        return task

    def event(self) -> Any:
        return threading.Event()

    def poll(self) -> Any:
        return unpatched.poll()  # gevent's would need a hub, which a thread does not have

    def call_from_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments)

    def open(self, sock: Any) -> Stream:
        return ThreadStream(sock)


#: how a pool and its connections wait
Runtime = GeventRuntime | ThreadRuntime
_threads = ThreadRuntime()


def runtime() -> Runtime:
    """How the calling thread waits: through its gevent hub, where it has one."""
    hub = get_hub_if_exists()
    if hub is None:
        return _threads
    try:
        found: GeventRuntime = hub.passenger_runtime
    except AttributeError:
        found = hub.passenger_runtime = GeventRuntime(hub)
    return found


class Stream:
    """A connected socket. The methods that wait may raise :class:`WaitTimeout` and other ``OSError``."""

    sock: Any
    tls = False
    #: whether the kernel took a part of what was sent last, and whether sending it failed
    partially_sent = False
    failed = False
    #: whether a part of the last request is still to be sent
    flush_incomplete = False
    _poll: Any = None

    def recv(
        self, most: int, seconds: float | None = None, client: DisconnectNotifier | None = None
    ) -> bytes:
        """The next bytes; empty at the end of the stream.

        :param seconds: how long to wait for them.
        :param client: the client of the request; the wait ends when that disconnects.
        :raises DownstreamDisconnected: when it does.
        """
        while True:
            try:
                data: bytes = self.sock.recv(most)
                return data
            except BlockingIOError:
                self.wait(READ, seconds, client)

    def recv_response(self, seconds: float | None = None, client: DisconnectNotifier | None = None) -> bytes:
        """The same as :meth:`recv`, for data that cannot be there yet: it waits first, which saves a call."""
        self.wait(READ, seconds, client)
        return self.recv(HEAD_READ, seconds, client)

    def request(self, data: bytes, seconds: float | None, client: DisconnectNotifier) -> bytes | None:
        """Send a whole request, and receive the first bytes of its response.

        :param seconds: how long to wait for them.
        :param client: the client of the request; the wait ends when that disconnects.
        :returns: ``None`` when data came before the request was sent: it is not part of a response to it. The
            request is sent only if the caller continues to read.
        :raises UpstreamTimeout: as :meth:`send_head`.
        :raises WaitTimeout, OSError, DownstreamDisconnected: as :meth:`recv`.
        """
        self.send_head(data, seconds)
        return self.recv_response(seconds, client)

    def send_head(self, data: bytes, seconds: float | None) -> None:
        """Send the beginning of a request now. When that fails, reading tells why: a response may have come.

        :raises UpstreamTimeout: when the upstream does not read it in time.
        """
        self.partially_sent = False
        try:
            self.send(data, seconds)
        except WaitTimeout:
            raise UpstreamTimeout(f"it has not read the request for {seconds:g} s") from None
        except OSError:
            # under TLS it is not known how much of it has arrived
            self.failed = not self.tls

    def send(self, data: Any, seconds: float | None = None) -> None:
        """Send all of it."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            view = memoryview(data)[sent:]
            self.partially_sent = sent > 0
            while view:
                try:
                    view = view[self.sock.send(view) :]
                    self.partially_sent = True
                except BlockingIOError:
                    self.wait(WRITE, seconds)

    def send_while_quiet(self, data: bytes, seconds: float | None = None) -> int:
        """Send what the upstream takes before it sends something itself. For threads.

        :returns: how many bytes.
        """
        sent = 0
        view = memoryview(data)
        while sent < len(data) and self.is_quiet():
            try:
                sent += self.sock.send(view[sent:])
            except BlockingIOError:
                self.wait(READ | WRITE, seconds)
        return sent

    def wait(self, what: int, seconds: float | None = None, client: DisconnectNotifier | None = None) -> None:
        """
        :param what: ``READ`` or ``WRITE``; in threads also both.
        """
        raise NotImplementedError

    def is_quiet(self) -> bool:
        """Whether nothing has come, not even the end, as it must be on an idle connection."""
        if self._poll is None:
            if self.sock.fileno() < 0:
                return False  # it is closed
            self._poll = unpatched.poll()
            self._poll.register(self.sock.fileno(), select.POLLIN)
        return not self._poll.poll(0)

    def pending(self) -> bool:
        """Whether there are bytes to read."""
        try:
            return bool(self.sock.recv(1, _socket.MSG_PEEK))
        except OSError:
            return False

    def on_unsolicited(self, callback: Callable[[], None] | None) -> None:
        """Set the callback for data that comes while no greenlet reads."""

    def rearm(self) -> None:
        """Have the callback called again: the connection becomes idle."""

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(how)

    def shutdown_write(self) -> None:
        """Send no more; reading continues."""
        self.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


class ThreadStream(Stream):
    """Waits in ``poll``."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def wait(self, what: int, seconds: float | None = None, client: DisconnectNotifier | None = None) -> None:
        poll = unpatched.poll()
        events = (select.POLLIN if what & READ else 0) | (select.POLLOUT if what & WRITE else 0)
        poll.register(self.sock.fileno(), events)
        if not poll.poll(None if seconds is None else seconds * 1000):
            raise WaitTimeout


class _TimedWait:
    """One wait with a timeout: a stream may be read and written at the same time."""

    __slots__ = ("_switch",)

    def __init__(self, switch: Callable[..., Any]) -> None:
        self._switch = switch

    def expire(self) -> None:
        """Called in the hub by the queue of this timeout."""
        try:
            self._switch(_LATE)
        except Exception as error:
            failed_callback("a connection to an upstream", error)


class GeventStream(Stream):
    """Waits through the hub.

    The watcher stays active from request to request: to stop it between two requests would cost a system
    call each time, and it tells at once when the upstream closes an idle connection. When data comes while
    no greenlet reads, the watcher stops until one does.
    """

    def __init__(self, sock: Any, runtime: GeventRuntime) -> None:
        self.sock = sock
        self.runtime = runtime
        self._hub = runtime.hub
        self._readable = self._hub.loop.io(sock.fileno(), READ)
        self._writable: Any = None
        self._callback: Callable[[], None] | None = None
        self._closed = False
        #: whether a request waits for the end of the iteration
        self._sending = False
        _gevent_streams.add(self)

    def leave_to_parent(self) -> None:
        """In a forked child: the connection is the parent's. Close the copy, and wake no greenlet for it."""
        self._readable.stop()
        if self._writable is not None:
            self._writable.stop()
        self.sock.close()

    def request(self, data: bytes, seconds: float | None, client: DisconnectNotifier) -> bytes | None:
        if len(data) > SMALL_REQUEST:
            return super().request(data, seconds, client)
        self.partially_sent = False
        self._sending = True
        self.runtime.send_at_end_of_iteration(self, data)
        self.wait(READ, seconds, client)
        if self._sending:
            return None
        try:
            received: bytes = self.sock.recv(_SMALL_RESPONSE)
            return received
        except BlockingIOError:
            return self.recv_response(seconds, client)

    def wait(self, what: int, seconds: float | None = None, client: DisconnectNotifier | None = None) -> None:
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
            timeouts = self.runtime.timeouts(seconds)
            timeouts.add(late)
        if client is not None:
            client.watch(switch, _GONE)
        try:
            ended = self._hub.switch()
        finally:
            if what == READ:
                watcher.callback, watcher.args = self._on_readable, ()
            else:
                watcher.stop()
            if late is not None:
                timeouts.remove(late, None)
            if client is not None:
                client.unwatch()
        if ended is _READY:
            return
        if ended is _GONE:
            raise DownstreamDisconnected
        raise WaitTimeout

    def send_now(self, data: bytes) -> None:
        """Called in the hub at the end of the iteration."""
        self._sending = False
        if self._closed:
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.failed = True  # the reader finds out why
            return
        if sent < len(data):
            self.partially_sent = sent > 0
            self.flush_incomplete = True
            gevent.spawn(self._send_rest, data[sent:])

    def _send_rest(self, data: bytes) -> None:
        try:
            self.send(data)
            self.flush_incomplete = False
        except OSError:
            self.shutdown()
        except Exception as error:
            failed_callback("a connection to an upstream", error)
            self.shutdown()

    def _on_readable(self) -> None:
        """Called in the hub: data has come while no greenlet reads."""
        try:
            self._readable.stop()
            if self._callback is not None:
                self._callback()
        except Exception as error:
            failed_callback("a connection to an upstream", error)
            self.close()

    def on_unsolicited(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def rearm(self) -> None:
        if not self._readable.active:
            self._readable.start(self._on_readable)

    def close(self) -> None:
        self._closed = True
        self._callback = None
        try:
            self._readable.close()
            if self._writable is not None:
                self._writable.close()
        finally:
            self.sock.close()


#: all streams of this process that wait through a hub
_gevent_streams: WeakSet[GeventStream] = WeakSet()


def _leave_to_parent() -> None:
    for stream in list(_gevent_streams):
        stream.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
