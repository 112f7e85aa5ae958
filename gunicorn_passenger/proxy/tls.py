"""TLS over a connection to an upstream.

Process: any process in which the proxy is mounted.
Never: mix the records of two greenlets, or take a connection that was cut off for one that has ended.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from gevent.lock import Semaphore

from gunicorn_passenger.http.downstream_api import DisconnectNotifier
from gunicorn_passenger.proxy.upstream_io import HEAD_READ, GeventStream, Stream

#: The most plain text in a record, in bytes (RFC 8446 section 5.1).
_RECORD = 16384


class TlsStream(Stream):
    """TLS over another stream."""

    tls = True

    def __init__(self, below: Stream, context: ssl.SSLContext, name: str) -> None:
        """
        :param name: the host that the certificate must name.
        """
        self.below = below
        self.sock = below.sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        #: a byte that is_quiet() has read
        self._ahead = b""
        # a reader may have to send, too, and records must not mix
        self._lock: Any = Semaphore() if isinstance(below, GeventStream) else contextlib.nullcontext()
        #: whether records are being sent
        self._flushing = False

    def recv_response(self, seconds: float | None = None, client: DisconnectNotifier | None = None) -> bytes:
        return self.recv(HEAD_READ, seconds, client)

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
        with self._lock:
            self._flushing = True
            try:
                while data := self._outgoing.read():
                    self.below.send(data, seconds)
            finally:
                self._flushing = False

    def _fill(self, seconds: float | None, client: DisconnectNotifier | None) -> None:
        data = self.below.recv(65536, seconds, client)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def recv(
        self, most: int, seconds: float | None = None, client: DisconnectNotifier | None = None
    ) -> bytes:
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            return ahead
        while True:
            try:
                return self._tls.read(most)
            except ssl.SSLWantReadError:
                # a sender that waits for the upstream sends the reader's records, too: the upstream may
                # read no more until it is read from
                if not self._flushing:
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

    def send_while_quiet(self, data: bytes, seconds: float | None = None) -> int:
        sent = 0
        while sent < len(data) and self.is_quiet():
            part = data[sent : sent + _RECORD]
            self.send(part, seconds)
            sent += len(part)
        return sent

    def wait(self, what: int, seconds: float | None = None, client: DisconnectNotifier | None = None) -> None:
        self.below.wait(what, seconds, client)

    def is_quiet(self) -> bool:
        # a TLS 1.3 server may send session tickets at any time: they are not a response
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

    def shutdown_write(self) -> None:
        """Send no more; reading continues."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        with contextlib.suppress(OSError, ValueError):
            self._flush(None)
        self.below.shutdown(socket.SHUT_WR)

    def on_unsolicited(self, callback: Callable[[], None] | None) -> None:
        self.below.on_unsolicited(callback)

    def rearm(self) -> None:
        self.below.rearm()

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        self.below.shutdown(how)

    def close(self) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()
            with contextlib.suppress(OSError, ValueError):
                self.sock.send(self._outgoing.read())
        finally:
            self.below.close()
