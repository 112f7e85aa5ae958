"""``gunicorn.socket``: the connection of a client, for an application that takes it over.

Process: a serving process, in the application's greenlets.
Never: take part in a plain request: for that the HTTP core uses the socket below it.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
from collections import deque
from typing import Any

import gevent
from gevent import get_hub
from gevent import socket as gsocket
from gevent.lock import RLock

from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.http.websocket_frames import GOING_AWAY, close_frame

_NOT_GIVEN = object()

#: Without what the package adds to the sockets of programs.
_close = _socket.socket.close

#: Seconds that the application's frames, if they have to come first, and the client's reply may take.
_CLOSE_TIMEOUT = 5.0
#: How often the application has to send something before a Close frame, at most.
_MOST_SENDS = 2
#: Seconds between two checks whether it has.
_POLL = 0.02
#: Seconds in which a client must read some of what waits for it.
_PATIENCE = 60.0
#: Bytes of waiting messages that are sent by one call.
_JOINED = 65536


class ClientSocket(gsocket.socket):
    """The connection, for an application that speaks another protocol over it.

    While it has no timeout, ``send`` sends all data, as the kernel's blocking sockets do and as WebSocket
    libraries expect. The data of two greenlets is not interleaved.
    """

    # Class attributes, not slots: most sockets keep these values, and a new one has to be made quickly.
    #: whether it lacks gevent's watchers, which only code that waits for it needs
    _bare = False
    #: bytes that were read ahead; ``recv`` returns them first
    early = b""
    #: whether the application has used the socket
    taken = False
    #: the last error that the application got from it
    error: OSError | None = None
    #: the :class:`.connection.Connection`, while it has one
    connection: Any = None
    _turn: Any = None
    #: whether the application has sent "101 Switching Protocols" over it; ``None`` before it sent anything
    switched: bool | None = None
    #: how often it has sent something behind that; not counted any further than a Close frame may wait for
    sends = 0
    _muted = False
    #: what is sent before anything else: the messages of this iteration, and what the kernel has not taken
    _queue: Any = ()
    _queued = 0
    #: whether the hub or a greenlet will send it
    _is_flushed = False
    #: whether a message could not be sent
    _broken = False

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        if fileno is None:
            super().__init__(family, type, proto)
        else:
            # gevent's watchers alone would cost more than the socket does, and few applications use them
            self._bare = True
            slots: Any = self
            slots._sock = raw = self._gevent_sock_class(family, type, proto, fileno)
            raw.setblocking(False)
            slots._closed = False
            slots._io_refs = 0
            slots.timeout = gsocket.getdefaulttimeout()

    def __getattr__(self, name: str) -> Any:
        """Called for missing attributes: gevent's hub and watchers, and those of the socket below."""
        if self._bare:
            self._bare = False
            slots: Any = self
            slots.hub = get_hub()
            slots._read_event = slots._write_event = None
            if not slots._closed:
                io, fd = slots.hub.loop.io, slots._sock.fileno()
                slots._read_event, slots._write_event = io(fd, 1), io(fd, 2)
            return getattr(self, name)
        return super().__getattr__(name)

    def release(self) -> None:
        """Close the socket at the end of its connection."""
        if self._bare and not self._io_refs:
            # no other code has used it, so no greenlet waits that gevent's close() would have to wake
            slots: Any = self
            slots._closed = True
            _close(slots._sock)
        else:
            self.close()

    def leave_to_parent(self) -> None:
        """In a forked child: close the child's copy, without waking the greenlets that wait for it."""
        slots: Any = self
        if not self._bare:
            for event in slots._read_event, slots._write_event:
                if event is not None:
                    event.stop()
        slots._sock.close()

    def _take(self) -> None:
        """The application uses the socket: what it has given to the server to send goes first.

        :raises OSError: when the client has disconnected.
        """
        self.taken = True
        if self.connection is not None:
            self.connection.send_pending()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed or detached. gevent closes the descriptor some callbacks later."""
        return bool(self._closed)

    def _leave_connection(self) -> None:
        """The application has closed the socket or keeps its descriptor: there is no further request."""
        if self.connection is not None:
            self.connection.end_without_socket()

    def shutdown(self, how: int) -> None:
        if not self.taken:
            self._take()
        super().shutdown(how)

    def close(self) -> None:
        if not self.taken:
            with contextlib.suppress(OSError):
                self._take()
        super().close()
        self._leave_connection()

    def detach(self) -> int:
        """Give up the descriptor, and end the connection.

        :returns: the descriptor, which the caller owns.
        :raises OSError: while bytes are to be read that the client sent with its request.
        """
        if self.early:
            raise OSError(
                errno.EBUSY,
                f"the client sent {len(self.early)} bytes with its request, which are read already: "
                "call recv() until it has returned them, then detach()",
            )
        if not self.taken:
            with contextlib.suppress(OSError):
                self._take()
        fd = int(super().detach())
        self._leave_connection()
        return fd

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        if not self.taken:
            self._take()
        if self.early and not flags:
            data, self.early = self.early[:bufsize], self.early[bufsize:]
            return data
        try:
            return bytes(super().recv(bufsize, flags))
        except OSError as error:
            self.error = error
            raise

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        if not self.taken:
            self._take()
        if self.early and not flags:
            view = memoryview(buffer).cast("B")
            data = self.recv(min(nbytes, len(view)) if nbytes else len(view))
            view[: len(data)] = data
            return len(data)
        try:
            return int(super().recv_into(buffer, nbytes, flags))
        except OSError as error:
            self.error = error
            raise

    def send_last(self, data: bytes) -> None:
        """Send this between two messages of the application, and discard what it sends afterwards.

        :raises OSError: when the client has disconnected.
        """
        with self._lock():
            self.send_queue()
            if not self._muted:
                super().sendall(data)
                self.mute()

    def close_websocket(self, sends: int) -> None:
        """Close the WebSocket that the application speaks over it (RFC 6455 section 7.1.1).

        The application's library reads the client's Close frame as if the client had begun it.

        :param sends: how often the application sends something before, see
            :func:`.engineio.sends_before_close`. If it sends nothing, the connection ends without a Close
            frame.
        """
        connection = self.connection
        with contextlib.suppress(OSError):
            # a client that reads nothing holds up the greenlet that sends to it, and this one
            with gevent.Timeout(_CLOSE_TIMEOUT, False):
                while self.sends < sends:
                    gevent.sleep(_POLL)
            with gevent.Timeout(_CLOSE_TIMEOUT, False):
                if self.sends or not sends:
                    self.send_last(close_frame(GOING_AWAY))
                    gevent.sleep(_CLOSE_TIMEOUT)
            if self.connection is connection:
                self.shutdown(gsocket.SHUT_RDWR)

    def send(self, data: Any, flags: int = 0, timeout: Any = _NOT_GIVEN) -> int:
        if not self.taken:
            self._take()
        if self.sends < _MOST_SENDS and timeout is _NOT_GIVEN:  # sendall() gives one, and has seen the data
            self._see(data)
        if self._muted:
            return memoryview(data).nbytes
        try:
            if timeout is not _NOT_GIVEN:
                return int(super().send(data, flags, timeout))
            if self.timeout is not None:
                return int(super().send(data, flags))
            view = memoryview(data).cast("B")
            count = len(view)
            with self._lock():
                self.send_queue()
                while view:
                    view = view[super().send(view, flags) :]
            self._count(count)
            return count
        except OSError as error:
            self.error = error
            raise

    def sendall(self, data: Any, flags: int = 0) -> None:
        if self.timeout is None:
            self.send(data, flags)
            return
        if not self.taken:
            self._take()
        if self.sends < _MOST_SENDS:
            self._see(data)
        with self._lock():
            self.send_queue()
            if not self._muted:
                super().sendall(data, flags)
                self._count(memoryview(data).nbytes)

    def send_soon(self, data: bytes) -> int:
        """Send a message at the end of the event-loop iteration, with those that follow until then.

        :returns: how many bytes wait. A caller with much to send uses :meth:`send_queue` now and then.
        :raises OSError: when the client has disconnected.
        """
        if not self.taken:
            self._take()
        if self.sends < _MOST_SENDS:
            self._see(data)
        if self._muted:
            return 0
        if self._broken:
            raise BrokenPipeError(errno.EPIPE, "a message could not be sent before")
        if self._queue == ():
            self._queue = deque()
        self._queue.append(data)
        self._queued += len(data)
        if not self._is_flushed:
            self._is_flushed = True
            get_hub().loop.run_callback(self._flush)
        return self._queued

    def send_queue(self) -> None:
        """Send what waits.

        :raises OSError: when the client has disconnected, or reads nothing for 60 s, which ends the
            connection.
        """
        with self._lock():
            while self._queue and not self._muted:
                late = TimeoutError(f"the client reads nothing for {_PATIENCE:g} s")
                try:
                    with gevent.Timeout(_PATIENCE, late):
                        taken = super().send(self._first())
                except OSError as error:
                    self._break(error)
                    raise
                self._sent(taken)
        if self._broken:
            raise BrokenPipeError(errno.EPIPE, "a message could not be sent before")

    def mute(self) -> None:
        """Discard what is sent from now on."""
        self._muted = True

    def _flush(self) -> None:
        """Called in the hub, at the end of an iteration."""
        turn = self._turn
        if self._queue and (turn is None or turn.acquire(blocking=False)):
            # most messages go this way, past gevent's wrapper
            slots: Any = self
            try:
                if not self._muted:
                    self._sent(slots._sock.send(self._first()))
            except BlockingIOError:
                pass
            except OSError as error:
                self._break(error)
            except Exception as error:
                report_fault("what waited for a client was not sent, and its connection was closed", error)
                self._break(ConnectionAbortedError(errno.ECONNABORTED, "an error in the worker"))
            finally:
                if turn is not None:
                    turn.release()
        if self._queue and not self._muted:
            gevent.spawn(self._finish)
        else:
            self._is_flushed = False

    def _finish(self) -> None:
        try:
            with contextlib.suppress(OSError):
                self.send_queue()
        finally:
            self._is_flushed = False

    def _first(self) -> Any:
        """The first bytes of the queue: all of it, unless that is much."""
        if len(self._queue) > 1 and self._queued <= _JOINED:
            data = b"".join(self._queue)
            self._queue.clear()
            self._queue.append(data)
        return self._queue[0]

    def _sent(self, taken: int) -> None:
        self._queued -= taken
        self._count(taken)
        first = self._queue[0]
        if taken == len(first):
            self._queue.popleft()
        else:
            self._queue[0] = memoryview(first)[taken:]

    def _break(self, error: OSError) -> None:
        self.error = error
        self._broken = True
        self._queue.clear()
        self._queued = 0
        # a part of a message may be sent, so nothing else can be
        with contextlib.suppress(OSError):
            self.shutdown(gsocket.SHUT_RDWR)

    def _count(self, count: int) -> None:
        if self.connection is not None:
            self.connection.count_sent(count)

    def _see(self, data: Any) -> None:
        """Called when the application sends for the first times."""
        if self.switched is None:
            self.switched = bytes(memoryview(data).cast("B")[:12]) == b"HTTP/1.1 101"
            connection = self.connection
            if self.switched and connection is not None and connection.listener.closing:
                get_hub().loop.run_callback(connection.begin_shutdown)
        else:
            self.sends += 1

    def _lock(self) -> Any:
        if self._turn is None:
            self._turn = RLock()
        return self._turn


def adopt(fd: int) -> tuple[ClientSocket, Any]:
    """A client's connection that another worker has accepted.

    :param fd: a connected stream socket, owned from now on.
    :returns: the connection, and its client's address as ``accept()`` gives it; ``None`` for that when the
        client is gone.
    :raises OSError: when it is not a stream socket; it is closed.
    """
    probe = _socket.socket(fileno=fd)
    try:
        if probe.type != _socket.SOCK_STREAM:
            raise OSError("not a stream socket")
        addr = None
        with contextlib.suppress(OSError):
            addr = probe.getpeername()
        probe.setblocking(False)
        made = ClientSocket(probe.family, probe.type, probe.proto, fd)
    except BaseException:
        probe.close()
        raise
    probe.detach()
    return made, addr
