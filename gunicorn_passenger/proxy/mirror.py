"""Copies of requests for a second target, whose answers nobody waits for (the option ``forward``).

Runs in: wherever the proxy is mounted, in a greenlet or thread of its own for each copy. Must never:
delay or break the request that it copies.
"""

from __future__ import annotations

import queue
from typing import Any

from gunicorn_passenger.errors import ProxyError
from gunicorn_passenger.proxy.agent import Pool
from gunicorn_passenger.proxy.downstream import CHUNKED
from gunicorn_passenger.proxy.log import failed_callback, log
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.response_head import HEAD_LIMIT
from gunicorn_passenger.proxy.target import Target

#: Copies that are under way at a time, in each worker; what comes on top is not copied.
_COPIES = 256
#: Bytes of a body that wait for the target, in one copy and in all of them; when it is slower than that,
#: a copy is given up.
_WAITING, _WAITING_IN_ALL = 1 << 20, 16 << 20
#: Seconds that the target may be silent, where ``proxy_timeout`` does not say.
_SECONDS = 60.0

_under_way: set[Any] = set()


class _MirrorTotal:
    """Bytes that wait in all copies."""

    waiting = 0


class MirroredRequest:
    """One request, copied."""

    def __init__(self, target: Target, pool: Pool, head: bytes, length: int, options: Options) -> None:
        """
        :param head: as it is sent.
        :param length: of the body, or ``CHUNKED``.
        """
        self._target = target
        self._pool = pool
        self._head = head
        self._length = length
        self._seconds = options.proxy_timeout or _SECONDS
        # under gevent the queue's locks would block the hub, so the pieces wait in a plain list
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stirred = pool.runtime.event()
        self._waiting = 0
        self._given_up = False
        self._ended = False

    def start(self) -> None:
        if len(_under_way) >= _COPIES:
            self._given_up = True
            log.warning("proxy: %s: %d copies are under way, this one is left out", self._target, _COPIES)
            return
        _under_way.add(self)
        self._pool.runtime.spawn(self._run)

    def feed(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._given_up or self._ended:
            return
        if self._waiting > _WAITING or _MirrorTotal.waiting > _WAITING_IN_ALL:
            self._give_up()
            log.warning("proxy: %s: it is slower than the request, the copy is given up", self._target)
            return
        self._waiting += len(piece)
        _MirrorTotal.waiting += len(piece)
        self._pieces.put(piece)
        self._stirred.set()

    def _give_up(self) -> None:
        self._given_up = True
        _MirrorTotal.waiting -= self._waiting
        self._waiting = 0
        self._pieces = queue.SimpleQueue()
        self._stirred.set()

    def end(self, whole: bool = True) -> None:
        """The body is over; only the first call counts.

        :param whole: whether all of it was fed.
        """
        if self._ended:
            return
        self._ended = True
        if self._length and not whole:
            self._give_up()
        else:
            self._pieces.put(None)
            self._stirred.set()

    def _next(self) -> bytes | None:
        while True:
            if self._given_up:
                raise ProxyError("the request broke off")
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                self._stirred.clear()
                if self._pieces.empty() and not self._given_up:
                    self._stirred.wait()
                continue
            if piece is not None and not self._given_up:
                self._waiting -= len(piece)
                _MirrorTotal.waiting -= len(piece)
            return piece

    def _run(self) -> None:
        link = None
        try:
            link = self._pool.take(fresh=True)
            stream = link.stream
            stream.send(self._head, self._seconds)
            if self._length:
                while (piece := self._next()) is not None:
                    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if self._length == CHUNKED else piece
                    stream.send(framed, self._seconds)
                if self._length == CHUNKED:
                    stream.send(b"0\r\n\r\n", self._seconds)
            # what it answers is ignored, but it may not be cut off for having answered
            came = b""
            while b"\r\n\r\n" not in came and len(came) < HEAD_LIMIT:
                data = stream.recv(65536, self._seconds)
                if not data:
                    break
                came += data
        except TimeoutError:
            log.warning("proxy: %s: the copy of a request took too long", self._target)
        except (ProxyError, OSError) as error:
            if not self._given_up:
                log.warning("proxy: %s: a request was not copied: %s", self._target, error)
        except Exception as error:
            failed_callback(f"the copy of a request to {self._target}", error)
        finally:
            self._give_up()
            _under_way.discard(self)
            if link is not None:
                self._pool.drop(link)
