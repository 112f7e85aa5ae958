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
import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent import getcurrent, monkey
from gevent import socket as gsocket
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event as GeventEvent
from gevent.lock import Semaphore

from gunicorn_passenger.errors import UpstreamRefused, UpstreamTimeout
from gunicorn_passenger.http.deadlines import Deadlines
from gunicorn_passenger.proxy.target import Target

#: what a wait ends with
_READY, _LATE, _GONE = "ready", "late", "gone"

#: Bytes that one read of a head asks for.
ANSWER = 65536

#: Requests up to this size are sent at the end of the loop's turn.
_SOON = 8192

#: what a wait is for
READ, WRITE = 1, 2

#: the system's own: gevent's would let the hub run, which a thread does not have
_poll = monkey.get_original("select", "poll")

#: what a connection says that is being made
_CONNECTING = {errno.EINPROGRESS, errno.EWOULDBLOCK}


class ClientGone(Exception):
    """The client has gone while its answer was awaited."""


class GeventRuntime:
    """How greenlets wait: one for each hub."""

    #: whether two parts of an exchange can run side by side
    concurrent = True

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self._deadlines: dict[float, Deadlines] = {}
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
        soon, self._soon = self._soon, []
        for stream, data in soon:
            stream.send_now(data)

    def deadlines(self, seconds: float) -> Deadlines:
        """The deadlines of one duration."""
        found = self._deadlines.get(seconds)
        if found is None:
            if len(self._deadlines) > 100:
                self._deadlines = {k: v for k, v in self._deadlines.items() if len(v)}
            found = self._deadlines[seconds] = Deadlines(seconds)
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
    _poll: Any = None

    def recv(self, most: int, seconds: float | None = None, client: Any = None) -> bytes:
        """What comes next; empty at the end.

        :param seconds: how long to wait for it.
        :param client: a connection of ours; when its client goes, the wait ends.
        :raises ClientGone: then.
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


class _Late:
    """One wait that has a deadline: a stream may be read and written at the same time."""

    __slots__ = ("_switch",)

    def __init__(self, switch: Callable[..., Any]) -> None:
        self._switch = switch

    def expire(self) -> None:
        """Called in the hub by the deadline."""
        self._switch(_LATE)


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
            late = _Late(switch)
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
            raise ClientGone
        raise TimeoutError

    def send_soon(self, data: bytes, seconds: float | None = None) -> None:
        if len(data) > _SOON:
            self.send(data, seconds)
        else:
            self.runtime.send_soon(self, data)

    def send_now(self, data: bytes) -> None:
        """Called in the hub: send what was to be sent soon."""
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
            gevent.spawn(self._send_rest, data[sent:])

    def _send_rest(self, data: bytes) -> None:
        try:
            self.send(data)
        except OSError:
            self.shutdown()

    def _stray(self) -> None:
        """Called in the hub: something has come while nobody reads."""
        self._readable.stop()
        if self._callback is not None:
            self._callback()

    def watch(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def rearm(self) -> None:
        if not self._readable.active:
            self._readable.start(self._stray)

    def close(self) -> None:
        self._closed = True
        self._callback = None
        self._readable.close()
        if self._writable is not None:
            self._writable.close()
        self.sock.close()


class TlsStream(Stream):
    """TLS over another stream."""

    tls = True

    def __init__(self, below: Stream, context: ssl.SSLContext, name: str) -> None:
        """
        :param name: the host that the certificate has to be for.
        """
        self.below = below
        self.sock = below.sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        #: a byte that was read to see whether there is one
        self._ahead = b""
        # who reads may have to send, too, and records must not mix
        self._turn: Any = Semaphore() if isinstance(below, GeventStream) else contextlib.nullcontext()

    def answer(self, seconds: float | None = None, client: Any = None) -> bytes:
        return self.recv(ANSWER, seconds, client)

    def handshake(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                self._tls.do_handshake()
                self._flush(None)
                return
            except ssl.SSLWantReadError:
                self._flush(None)
                self._fill(max(end - time.monotonic(), 0.001), None)
            except ssl.SSLError:
                self._flush(None)  # an alert says why
                raise

    def _flush(self, seconds: float | None) -> None:
        with self._turn:
            while data := self._outgoing.read():
                self.below.send(data, seconds)

    def _fill(self, seconds: float | None, client: Any) -> None:
        data = self.below.recv(65536, seconds, client)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def recv(self, most: int, seconds: float | None = None, client: Any = None) -> bytes:
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            return ahead
        while True:
            try:
                return self._tls.read(most)
            except ssl.SSLWantReadError:
                self._flush(seconds)
                self._fill(seconds, client)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError:
                raise ConnectionResetError(errno.ECONNRESET, "the TLS connection was cut off") from None

    def send(self, data: Any, seconds: float | None = None) -> None:
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view[:65536]) :]
            self._flush(seconds)

    def wait(self, what: int, seconds: float | None = None, client: Any = None) -> None:
        self.below.wait(what, seconds, client)

    def silent(self) -> bool:
        # a TLS 1.3 server may send session tickets at any time: they are no answer
        while True:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                return False
            if not data:
                return False
            self._incoming.write(data)
        if self._ahead:
            return False
        try:
            self._ahead = self._tls.read(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def finish(self) -> None:
        """Send no more, and go on reading."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        with contextlib.suppress(OSError, ValueError):
            self._flush(None)
        self.below.shutdown(socket.SHUT_WR)

    def watch(self, callback: Callable[[], None] | None) -> None:
        self.below.watch(callback)

    def rearm(self) -> None:
        self.below.rearm()

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        self.below.shutdown(how)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        with contextlib.suppress(OSError, ValueError):
            self.sock.send(self._outgoing.read())
        self.below.close()


def connect(
    target: Target,
    runtime: Runtime,
    seconds: float,
    local_address: str | None = None,
    context: ssl.SSLContext | None = None,
) -> Stream:
    """Connect to a target.

    :param seconds: how long that may take, TLS included.
    :param local_address: the address to connect from.
    :param context: for TLS.
    :raises UpstreamRefused: when it cannot be reached.
    :raises UpstreamTimeout: when that takes too long.
    """
    end = time.monotonic() + seconds
    try:
        stream = _connect_any(target, runtime, end, local_address)
    except TimeoutError:
        raise UpstreamTimeout("no connection was made in time") from None
    except socket.gaierror as error:
        raise UpstreamRefused(f"the host name does not resolve: {error.strerror}") from None
    except OSError as error:
        raise UpstreamRefused(_reason(error)) from None
    if context is None:
        return stream
    try:
        secured = TlsStream(stream, context, target.host)
        secured.handshake(max(end - time.monotonic(), 0.001))
        return secured
    except TimeoutError:
        stream.close()
        raise UpstreamTimeout("the TLS handshake was not over in time") from None
    except ssl.SSLCertVerificationError as error:
        stream.close()
        raise UpstreamRefused(f"the certificate is not trusted: {error.verify_message}") from None
    except (OSError, ValueError) as error:
        stream.close()
        raise UpstreamRefused(f"the TLS handshake failed: {_reason(error)}") from None
    except BaseException:
        stream.close()
        raise


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def _connect_any(target: Target, runtime: Runtime, end: float, local_address: str | None) -> Stream:
    if target.path:
        return _connect_one(runtime, socket.AF_UNIX, target.path, end, None)
    failure: OSError | None = None
    for family, _, _, _, address in runtime.resolve(target.host, target.port, end - time.monotonic()):
        if local_address is not None and (family == socket.AF_INET6) != (":" in local_address):
            continue
        try:
            return _connect_one(runtime, family, address, end, local_address)
        except TimeoutError:
            raise
        except OSError as error:
            failure = failure or error
    raise failure or OSError(errno.EADDRNOTAVAIL, f"no address of {target.host} fits local_address")


def _connect_one(runtime: Runtime, family: int, address: Any, end: float, local: str | None) -> Stream:
    sock = _socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    sock.setblocking(False)
    stream: Stream | None = None
    try:
        if local is not None:
            sock.bind((local, 0))
        code = sock.connect_ex(address)
        if family == socket.AF_UNIX and code == errno.EAGAIN:
            # its backlog is full; the kernel tells nobody when there is room again
            code = _connect_patiently(sock, address, runtime, end)
        stream = runtime.open(sock)
        if code in _CONNECTING:
            stream.wait(WRITE, max(end - time.monotonic(), 0.001))
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream
    except BaseException:
        (stream or sock).close()
        raise


def _connect_patiently(sock: Any, address: Any, runtime: Runtime, end: float) -> int:
    pause = 0.001
    while True:
        runtime.event().wait(pause)
        code: int = sock.connect_ex(address)
        if code != errno.EAGAIN:
            return code
        if time.monotonic() > end:
            raise TimeoutError
        pause = min(pause * 2, 0.05)
