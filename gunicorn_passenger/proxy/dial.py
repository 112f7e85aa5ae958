"""Connects to a target.

Process: any process in which the proxy is mounted.
Never: take longer than the caller allows, or leave a socket behind.
"""

from __future__ import annotations

import _socket
import errno
import itertools
import os
import select
import socket
import ssl
import time
from collections import deque
from typing import Any, NamedTuple

from gunicorn_passenger.errors import UpstreamRefused, UpstreamTimeout
from gunicorn_passenger.proxy.resolver import Address
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.tls import TlsStream
from gunicorn_passenger.proxy.upstream_io import Runtime, Stream
from gunicorn_passenger.system.tcp_keepalive import enable_tcp_keepalive

#: error codes of a connection that is being made
_CONNECTING = {0, errno.EINPROGRESS, errno.EWOULDBLOCK}

#: Seconds after which the next address is tried beside the one that is silent (RFC 8305 section 5).
_ATTEMPT_DELAY = 0.25
#: How many failed addresses of a target are remembered.
_MAX_FAILED = 64


class DialSettings(NamedTuple):
    """The options that decide how a target is connected to."""

    #: whether certificates are verified
    secure: bool = True
    #: the address to connect from
    local_address: str | None = None
    #: the name that certificates must have, and that TLS tells the target (RFC 6066 section 3)
    servername: str | None = None
    #: seconds for which an address that has failed is tried last
    fail_timeout: float = 10.0


class _Attempt(NamedTuple):
    """A connection that is being made."""

    sock: Any
    address: Address
    began: float


class Dialer:
    """Makes the connections to one target."""

    def __init__(
        self, target: Target, runtime: Runtime, settings: DialSettings, context: ssl.SSLContext | None
    ) -> None:
        """
        :param context: for TLS.
        """
        self.target = target
        self.runtime = runtime
        self._settings = settings
        self._context = context
        #: when addresses have failed, on the monotonic clock
        self._failed_at: dict[Address, float] = {}

    def connect(self, seconds: float) -> Stream:
        """
        :param seconds: how long connecting may take, name resolution and TLS included.
        :raises UpstreamRefused: when the target cannot be reached.
        :raises UpstreamTimeout: when that takes too long.
        """
        end = time.monotonic() + seconds
        try:
            stream = self.runtime.open(
                self._connect_unix(end) if self.target.path else self._connect_tcp(end)
            )
        except TimeoutError:
            raise UpstreamTimeout("no connection was made in time") from None
        except socket.gaierror as error:
            raise UpstreamRefused(f"the host name does not resolve: {error.strerror}") from None
        except OSError as error:
            raise UpstreamRefused(_reason(error)) from None
        return stream if self._context is None else self._secured(stream, self._context, end)

    def _secured(self, stream: Stream, context: ssl.SSLContext, end: float) -> Stream:
        try:
            secured = TlsStream(stream, context, self._settings.servername or self.target.host)
            secured.handshake(max(end - time.monotonic(), 0.001))
            return secured
        except BaseException as error:
            stream.close()
            if isinstance(error, TimeoutError):
                raise UpstreamTimeout("the TLS handshake was not over in time") from None
            if isinstance(error, ssl.SSLCertVerificationError):
                raise UpstreamRefused(f"the certificate is not trusted: {error.verify_message}") from None
            if isinstance(error, (OSError, ValueError)):
                raise UpstreamRefused(f"the TLS handshake failed: {_reason(error)}") from None
            raise

    def _connect_unix(self, end: float) -> Any:
        sock = _new_socket(socket.AF_UNIX)
        try:
            pause = 0.001
            while (code := sock.connect_ex(self.target.path)) == errno.EAGAIN:
                # its backlog is full, and the kernel does not report when there is room again
                if time.monotonic() > end:
                    raise TimeoutError
                self.runtime.event().wait(pause)
                pause = min(pause * 2, 0.05)
            if code:
                raise OSError(code, os.strerror(code))
            return sock
        except BaseException:
            sock.close()
            raise

    def _connect_tcp(self, end: float) -> Any:
        target, resolver = self.target, self.runtime.resolver
        addresses = resolver.addresses(target.host, target.port, end - time.monotonic())
        try:
            return self._connect_first(deque(self._in_order(addresses)), end)
        except OSError:
            resolver.expire(target.host)
            raise

    def _in_order(self, addresses: list[Address]) -> list[Address]:
        """The addresses as they are tried: the families in turn, and last what has failed a short time ago.

        :raises OSError: when ``local_address`` is of a family other than all of theirs.
        """
        local = self._settings.local_address
        if local is not None:
            family = socket.AF_INET6 if ":" in local else socket.AF_INET
            addresses = [address for address in addresses if address.family == family]
        if not addresses:
            raise OSError(errno.EADDRNOTAVAIL, f"no address of {self.target.host} fits local_address")
        preferred = [address for address in addresses if address.family == addresses[0].family]
        others = [address for address in addresses if address.family != addresses[0].family]
        order = [one for pair in itertools.zip_longest(preferred, others) for one in pair if one is not None]
        if self._failed_at:
            limit = time.monotonic() - self._settings.fail_timeout
            if len(self._failed_at) > _MAX_FAILED:
                self._failed_at = {key: at for key, at in self._failed_at.items() if at > limit}
            order.sort(key=lambda one: max(self._failed_at.get(one, 0.0), limit))
        return order

    def _connect_first(self, addresses: deque[Address], end: float) -> Any:
        """The first connection that succeeds: "Happy Eyeballs" (RFC 8305 section 5).

        The next address is tried when the one before has failed, or was silent for a moment; whichever
        connects first is used.

        :raises OSError: when none can be connected to; ``TimeoutError`` when that takes too long.
        """
        attempts: dict[int, _Attempt] = {}
        failure: OSError | None = None
        next_start = 0.0
        try:
            while True:
                now = time.monotonic()
                if addresses and (not attempts or now >= next_start):
                    address = addresses.popleft()
                    next_start = now + _ATTEMPT_DELAY
                    try:
                        sock = self._begin(address)
                    except OSError as error:
                        failure = failure or error
                        self._failed_at[address] = now
                        next_start = 0.0
                        continue
                    attempts[sock.fileno()] = _Attempt(sock, address, now)
                elif not attempts:
                    assert failure is not None
                    raise failure
                elif now >= end:
                    self._failed_at.update((attempt.address, now) for attempt in attempts.values())
                    raise TimeoutError
                for fd in self._wait(attempts, (min(next_start, end) if addresses else end) - now):
                    attempt = attempts.pop(fd)
                    code = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        self._note_success(attempt, attempts)
                        return attempt.sock
                    attempt.sock.close()
                    failure = failure or OSError(code, os.strerror(code))
                    self._failed_at[attempt.address] = now
                    next_start = 0.0
        finally:
            for attempt in attempts.values():
                attempt.sock.close()

    def _begin(self, address: Address) -> Any:
        sock = _new_socket(address.family)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # an idle WebSocket has no other sign of a host that has vanished
            enable_tcp_keepalive(sock)
            if self._settings.local_address is not None:
                sock.bind((self._settings.local_address, 0))
            code = sock.connect_ex(address.sockaddr)
            if code not in _CONNECTING:
                raise OSError(code, os.strerror(code))
            return sock
        except BaseException:
            sock.close()
            raise

    def _wait(self, attempts: dict[int, _Attempt], seconds: float) -> list[int]:
        """The descriptors of the attempts that are over, with or without success."""
        poll = self.runtime.poll()
        for fd in attempts:
            poll.register(fd, select.POLLOUT)
        return [fd for fd, _ in poll.poll(max(seconds, 0.001) * 1000)]

    def _note_success(self, winner: _Attempt, others: dict[int, _Attempt]) -> None:
        now = time.monotonic()
        self._failed_at.pop(winner.address, None)
        for attempt in others.values():
            if now - attempt.began >= _ATTEMPT_DELAY:
                self._failed_at[attempt.address] = now


def _new_socket(family: int) -> Any:
    sock = _socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    sock.setblocking(False)
    return sock


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
