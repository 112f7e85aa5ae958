"""TLS over a connection to a target.

Runs in: wherever the proxy is mounted. Must never: mix what two greenlets send, or take a connection that
was cut off for one that has ended.
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

from gunicorn_passenger.proxy.upstream_io import ANSWER, GeventStream, Stream


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
        try:
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()
            with contextlib.suppress(OSError, ValueError):
                self.sock.send(self._outgoing.read())
        finally:
            self.below.close()
