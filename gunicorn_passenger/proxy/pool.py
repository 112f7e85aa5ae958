"""The connections to one upstream that are kept from request to request.

Process: any process in which the proxy is mounted.
Never: hand out a connection on which unsolicited data has come, or make more connections than allowed.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from greenlet import getcurrent

from gunicorn_passenger.errors import PoolExhausted
from gunicorn_passenger.http.downstream_api import DisconnectNotifier
from gunicorn_passenger.proxy.dial import Dialer
from gunicorn_passenger.proxy.log import failed_callback
from gunicorn_passenger.proxy.upstream_io import GeventRuntime, Stream
from gunicorn_passenger.proxy.wait_errors import DownstreamDisconnected


class PoolLimits(Protocol):
    """What bounds a pool; the times are in seconds. :class:`~.agent.Agent` documents them."""

    max_connections: int | None
    max_idle: int
    idle_timeout: float
    connect_timeout: float
    max_age: float | None


class UpstreamConnection:
    """A connection to an upstream: its stream, and the bytes that were read ahead."""

    __slots__ = ("buffer", "expires_at", "idle", "idle_since", "pool", "reused", "stream")

    def __init__(self, pool: Pool, stream: Stream) -> None:
        self.pool = pool
        self.stream = stream
        self.buffer = b""
        #: whether it has carried a request before
        self.reused = False
        #: whether no request uses it, and since when on the pool's clock
        self.idle = False
        self.idle_since = 0.0
        #: when it has reached its maximum age, on the pool's clock
        age = pool.limits.max_age
        self.expires_at = float("inf") if age is None else pool.clock() + age
        stream.on_unsolicited(self.on_unsolicited_data)

    def on_unsolicited_data(self) -> None:
        """Called in the hub when an idle connection becomes readable: mostly the upstream closes it."""
        if not self.idle:
            return
        try:
            if self.stream.is_quiet():
                self.stream.rearm()
                return
        except Exception as error:
            failed_callback(f"an unused connection to {self.pool.target}", error)
        self.pool.evict(self)


@contextlib.contextmanager
def _watched(client: DisconnectNotifier | None) -> Iterator[None]:
    """End what the calling greenlet waits for when a client disconnects."""
    if client is None:
        yield
        return
    client.watch(getcurrent().throw, DownstreamDisconnected)
    try:
        yield
    finally:
        client.unwatch()


class _PoolWaiter:
    """A request that waits for a connection."""

    __slots__ = ("event", "upstream")

    def __init__(self, event: Any) -> None:
        self.event = event
        self.upstream: UpstreamConnection | None = None


class Pool:
    """The connections to one upstream."""

    def __init__(self, limits: PoolLimits, dialer: Dialer) -> None:
        self.limits = limits
        self._dialer = dialer
        self.target = dialer.target
        self.runtime = runtime = dialer.runtime
        #: the idle connections; the one that was used last is at the end
        self._idle: list[UpstreamConnection] = []
        #: seconds for which the upstream keeps an idle connection
        self._kept_by_upstream = float("inf")
        #: how many connections are in use, or being made
        self.used = 0
        #: the last response head, which :func:`~.response_head.parse_response_head` keeps here
        self.last_head: Any = None
        self._waiters: deque[_PoolWaiter] = deque()
        #: whether the agent has forgotten this pool
        self.forgotten = False
        #: the hub's loop, where there is one, and one timer for all idle connections
        self._loop: Any = runtime.hub.loop if isinstance(runtime, GeventRuntime) else None
        self.clock = self._loop.now if self._loop is not None else time.monotonic
        self._timer: Any = None
        self._lock = runtime.lock()

    # --- use -------------------------------------------------------------------------------------

    def acquire(
        self, new: bool = False, wait: bool = True, client: DisconnectNotifier | None = None
    ) -> UpstreamConnection:
        """Take a connection for one request. The caller ends its use with :meth:`release` or :meth:`discard`.

        :param new: whether an idle connection will not do.
        :param wait: whether to wait when the pool has no room for another connection.
        :param client: the client of the request; the wait ends when that disconnects.
        :raises PoolExhausted: when no connection becomes free within ``connect_timeout``, or at once with
            ``wait=False``.
        :raises UpstreamRefused, UpstreamTimeout: when the upstream cannot be connected to.
        :raises DownstreamDisconnected: when the client disconnects meanwhile.
        """
        while self._idle and not new:
            if self._loop is not None:
                # no lock: greenlets switch only where they wait
                upstream = self._idle.pop()
                upstream.idle = False
                self.used += 1
            else:
                found = self._pop_idle_in_thread()
                if found is None:
                    break
                upstream = found
            if upstream.stream.is_quiet():
                return upstream
            # the upstream has closed it, or has sent what no request asked for
            self.discard(upstream)
        with _watched(client if self.runtime.concurrent else None):
            return self._wait_or_connect(new, wait)

    def release(self, upstream: UpstreamConnection) -> None:
        """Give back a connection whose response was read to its end: it may carry another request."""
        now = self.clock()
        if (
            upstream.buffer
            or now >= upstream.expires_at
            or upstream.stream.flush_incomplete
            or not self.limits.max_idle
            or (len(self._idle) >= self.limits.max_idle and not self._waiters)
        ):
            self.discard(upstream)
            return
        upstream.reused = True
        if self._loop is None:
            with self._lock:
                if self._serve_waiter(upstream):
                    return
                upstream.idle = True
                upstream.idle_since = now
                self._idle.append(upstream)
                self.used -= 1
            self.evict_expired()
            return
        if self._waiters and self._serve_waiter(upstream):
            return
        upstream.idle = True
        upstream.idle_since = now
        self._idle.append(upstream)
        self.used -= 1
        upstream.stream.rearm()
        if self._timer is None:
            self._start_timer(self.idle_timeout)

    def discard(self, upstream: UpstreamConnection) -> None:
        """Close a connection that is in use."""
        try:
            upstream.stream.close()
        finally:
            self._free_place()

    # --- waiting and connecting ------------------------------------------------------------------

    def _wait_or_connect(self, new: bool, wait: bool) -> UpstreamConnection:
        most = self.limits.max_connections
        waiter = None
        with self._lock:
            if most is not None and self.used + len(self._idle) >= most:
                if self._idle:
                    self.evict(self._idle[0])
                elif not wait:
                    raise PoolExhausted(f"all {most} connections are in use")
                else:
                    waiter = _PoolWaiter(self.runtime.event())
                    self._waiters.append(waiter)
            if waiter is None:
                self.used += 1
        if waiter is not None and (given := self._wait_for(waiter)) is not None:
            if not new:
                if given.stream.is_quiet():
                    return given
                self.discard(given)
                return self.acquire(new, wait)
            given.stream.close()
        try:
            stream = self._dialer.connect(self.limits.connect_timeout)
        except BaseException:
            self._free_place()
            raise
        return UpstreamConnection(self, stream)

    def _pop_idle_in_thread(self) -> UpstreamConnection | None:
        """An idle connection that has not expired. Threads have no timer: they look when they need one."""
        with self._lock:
            while self._idle:
                upstream = self._idle.pop()
                if self.clock() - upstream.idle_since > self.idle_timeout:
                    upstream.stream.close()
                    continue
                upstream.idle = False
                self.used += 1
                return upstream
        return None

    def _wait_for(self, waiter: _PoolWaiter) -> UpstreamConnection | None:
        """Wait until another request gives its connection back.

        :returns: the connection, or ``None`` when that was closed and its place is free.
        """
        try:
            if waiter.event.wait(self.limits.connect_timeout):
                return waiter.upstream
        except BaseException:
            if not self._remove_waiter(waiter):
                if waiter.upstream is not None:
                    waiter.upstream.stream.close()
                self._free_place()
            raise
        if self._remove_waiter(waiter):
            raise PoolExhausted(f"all {self.limits.max_connections} connections are in use")
        return waiter.upstream

    def _remove_waiter(self, waiter: _PoolWaiter) -> bool:
        """Remove a waiter from the queue; false when it was served just before."""
        try:
            self._waiters.remove(waiter)
        except ValueError:
            return False
        return True

    def _serve_waiter(self, upstream: UpstreamConnection | None) -> bool:
        """Give a connection, or the place of one, to the request that has waited longest."""
        try:
            waiter = self._waiters.popleft()
        except IndexError:
            return False
        waiter.upstream = upstream
        waiter.event.set()
        return True

    def _free_place(self) -> None:
        with self._lock:
            if self._waiters and self._serve_waiter(None):
                return
            self.used -= 1

    # --- idle connections ------------------------------------------------------------------------

    @property
    def idle_timeout(self) -> float:
        """Seconds after which an idle connection is closed."""
        return min(self.limits.idle_timeout, self._kept_by_upstream)

    def keep_idle(self, seconds: float | None) -> None:
        """Keep idle connections no longer than the upstream does.

        :param seconds: what its ``Keep-Alive`` says, if anything.
        """
        before = self.idle_timeout
        # we close it first, so that it does not close it just when a request is sent
        self._kept_by_upstream = float("inf") if seconds is None else max(seconds - 1.0, seconds / 2)
        if self.idle_timeout < before and self._timer is not None:
            self._timer.close()
            self._start_timer(self.idle_timeout)

    @property
    def empty(self) -> bool:
        """Whether it has no connection, and no request waits for one."""
        return not (self.used or self._idle or self._waiters)

    def evict_expired(self) -> None:
        """Close the connections that were idle for too long. Threads have no timer, and call this."""
        limit = self.clock() - self.idle_timeout + 0.001
        with self._lock:
            while self._idle and self._idle[0].idle_since <= limit:
                self.evict(self._idle[0])

    def _start_timer(self, seconds: float) -> None:
        self._timer = self._loop.timer(max(seconds, 0.001))
        self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        """Called in the hub when the connection that was idle longest may have expired."""
        try:
            self._timer.close()
            self._timer = None
            self.evict_expired()
        except Exception as error:
            failed_callback(f"an unused connection to {self.target}", error)
        finally:
            self._timer = None
            if self._idle:
                self._start_timer(self._idle[0].idle_since + self.idle_timeout - self.clock())

    def evict(self, upstream: UpstreamConnection) -> None:
        """Close an idle connection. A failure is logged: it must not keep the caller from the others."""
        try:
            self._idle.remove(upstream)
        except ValueError:
            return
        try:
            upstream.stream.close()
        except Exception as error:
            failed_callback(f"an unused connection to {self.target}", error)

    def close_idle(self) -> None:
        """Close every connection that no request uses."""
        for upstream in list(self._idle):
            self.evict(upstream)
