"""Mirrors requests to a second target and ignores its responses (the option ``forward``).

Process: any process in which the proxy is mounted; each mirrored request has a greenlet or thread of its own.
Never: delay or break the request that it mirrors.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from gunicorn_passenger.errors import ProxyError, UpstreamClosed, UpstreamTimeout
from gunicorn_passenger.http.chunked import CHUNKED, LAST_CHUNK, encode_chunk
from gunicorn_passenger.proxy.log import failed_callback, log
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.pool import Pool
from gunicorn_passenger.proxy.response_head import HEAD_LIMIT
from gunicorn_passenger.proxy.target import Target

#: The most mirrored requests at a time in each worker; requests beyond that are not mirrored.
_MOST = 256
#: How many bytes of a body may wait for the target, in one mirrored request and in all of them. Mirroring is
#: given up beyond that.
_WAITING, _WAITING_IN_ALL = 1 << 20, 16 << 20
#: Seconds that the target may be silent, where the options set no limit.
_SECONDS = 60.0

_under_way: set[Any] = set()


class _MirrorTotal:
    """The bytes that wait in all mirrored requests."""

    waiting = 0


class MirroredRequest:
    """One mirrored request."""

    def __init__(
        self,
        target: Target,
        pool: Pool,
        head: bytes,
        length: int,
        options: Options,
        failed: Callable[[ProxyError, Target], None],
    ) -> None:
        """
        :param head: as it is sent.
        :param length: of the body, or ``CHUNKED``.
        :param failed: called when the target does not take it.
        """
        self._failed = failed
        self._target = target
        self._pool = pool
        self._head = head
        self._length = length
        self._seconds = options.upstream_timeout or _SECONDS
        # SimpleQueue never blocks here: it is read with get_nowait(), as its locks would block the hub
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._changed = pool.runtime.event()
        self._waiting = 0
        self._given_up = False
        self._ended = False

    def start(self) -> None:
        if len(_under_way) >= _MOST:
            self._given_up = True
            log.warning(
                "proxy: %s: %d requests are being mirrored already, so this one is not", self._target, _MOST
            )
            return
        _under_way.add(self)
        self._pool.runtime.spawn(self._run)

    def feed(self, chunk: bytes) -> None:
        """Add a chunk of the body; it never blocks."""
        if self._given_up or self._ended:
            return
        if self._waiting > _WAITING or _MirrorTotal.waiting > _WAITING_IN_ALL:
            self._give_up()
            log.warning(
                "proxy: %s: it is slower than the client, so this request is not mirrored to its end",
                self._target,
            )
            return
        self._waiting += len(chunk)
        _MirrorTotal.waiting += len(chunk)
        self._chunks.put(chunk)
        self._changed.set()

    def _give_up(self) -> None:
        self._given_up = True
        _MirrorTotal.waiting -= self._waiting
        self._waiting = 0
        self._chunks = queue.SimpleQueue()
        self._changed.set()

    def end(self, whole: bool = True) -> None:
        """End the body; only the first call has an effect.

        :param whole: whether all of the body was fed.
        """
        if self._ended:
            return
        self._ended = True
        if self._length and not whole:
            self._give_up()
        else:
            self._chunks.put(None)
            self._changed.set()

    def _next(self) -> bytes | None:
        while True:
            if self._given_up:
                raise ProxyError("the request was truncated")
            try:
                chunk = self._chunks.get_nowait()
            except queue.Empty:
                self._changed.clear()
                if self._chunks.empty() and not self._given_up:
                    self._changed.wait()
                continue
            if chunk is not None and not self._given_up:
                self._waiting -= len(chunk)
                _MirrorTotal.waiting -= len(chunk)
            return chunk

    def _run(self) -> None:
        upstream = None
        try:
            upstream = self._pool.acquire(new=True)
            stream = upstream.stream
            stream.send(self._head, self._seconds)
            if self._length:
                while (chunk := self._next()) is not None:
                    framed = encode_chunk(chunk) if self._length == CHUNKED else chunk
                    stream.send(framed, self._seconds)
                if self._length == CHUNKED:
                    stream.send(LAST_CHUNK, self._seconds)
            # the response is ignored, but the upstream must be able to send it
            received = b""
            while b"\r\n\r\n" not in received and len(received) < HEAD_LIMIT:
                data = stream.recv(65536, self._seconds)
                if not data:
                    raise UpstreamClosed("it closed the connection before it responded")
                received += data
        except TimeoutError:
            self._failed(UpstreamTimeout(f"it was silent for {self._seconds:g} s"), self._target)
        except (ProxyError, OSError) as error:
            if not self._given_up:
                failure = error if isinstance(error, ProxyError) else UpstreamClosed(str(error.strerror))
                self._failed(failure, self._target)
        except Exception as error:
            failed_callback(f"a request that was mirrored to {self._target}", error)
        finally:
            self._give_up()
            _under_way.discard(self)
            if upstream is not None:
                self._pool.discard(upstream)
