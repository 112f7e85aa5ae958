"""Connections to targets that are kept from request to request.

Runs in: wherever the proxy is mounted. Must never: hand out a connection on which something came that
nobody asked for, or make more connections than allowed.
"""

from __future__ import annotations

import ssl
import time
from collections import deque
from typing import Any

from gunicorn_passenger.errors import PoolExhausted, SettingError
from gunicorn_passenger.proxy.dial import connect
from gunicorn_passenger.proxy.log import failed_callback
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.upstream_io import Runtime, Stream, runtime

#: Targets whose pools are kept although they are empty.
_POOLS = 64


class Agent:
    """Keeps connections to targets open and bounds their number.

    One agent may be shared by several proxies.
    """

    def __init__(
        self,
        max_connections: int | None = None,
        max_idle: int = 256,
        idle_timeout: float = 30.0,
        connect_timeout: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """
        :param max_connections: for each target at most, in each worker; ``None``: as many as there are
            requests. When all are in use a request waits ``connect_timeout`` for one.
        :param max_idle: how many stay open for each target while no request uses them.
        :param idle_timeout: seconds for which they do.
        :param connect_timeout: seconds that connecting may take.
        :param ssl_context: for ``https`` targets; client certificates and private authorities go there.
        :raises ValueError: for a value that cannot be used.
        """
        if max_connections is not None:
            _count("max_connections", max_connections, 1)
        _count("max_idle", max_idle, 0)
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
            raise SettingError(f"Agent: ssl_context={ssl_context!r} is no ssl.SSLContext")
        self.max_connections = max_connections
        self.max_idle = max_idle
        self.idle_timeout = _seconds("idle_timeout", idle_timeout)
        self.connect_timeout = _seconds("connect_timeout", connect_timeout)
        self._contexts: dict[bool, ssl.SSLContext] = {}
        #: whether its TLS context was given, so that the option ``secure`` cannot change what it verifies
        self.has_context = ssl_context is not None
        if ssl_context is not None:
            self._contexts = {True: ssl_context, False: ssl_context}
        self._pools: dict[Any, Pool] = {}

    def __repr__(self) -> str:
        return (
            f"Agent(max_connections={self.max_connections}, max_idle={self.max_idle}, "
            f"idle_timeout={self.idle_timeout:g}, connect_timeout={self.connect_timeout:g})"
        )

    def pool(self, target: Target, secure: bool, local_address: str | None) -> Pool:
        """The connections to a target that the caller can use."""
        waits = runtime()
        key = (target.host, target.port, target.path, target.scheme, secure, local_address, waits)
        found = self._pools.get(key)
        if found is None:
            if len(self._pools) >= _POOLS:
                # a function may name ever new targets
                for old in [key for key, pool in self._pools.items() if pool.empty]:
                    self._pools.pop(old).gone = True
            context = self.context(secure) if target.tls else None
            found = self._pools.setdefault(key, Pool(self, target, waits, local_address, context))
        return found

    def context(self, secure: bool) -> ssl.SSLContext:
        """For TLS; made when it is first needed.

        :param secure: whether certificates are verified.
        """
        found = self._contexts.get(secure)
        if found is None:
            found = ssl.create_default_context()
            if not secure:
                found.check_hostname = False
                found.verify_mode = ssl.CERT_NONE
            self._contexts[secure] = found
        return found

    def close(self) -> None:
        """Close the connections that no request uses."""
        for pool in list(self._pools.values()):
            pool.clear()


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"Agent: {name}={value!r} is no number from {least}")


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise SettingError(f"Agent: {name}={value!r} is no positive number of seconds")
    return float(value)


class UpstreamConnection:
    """A connection to a target: its stream, and the bytes that were read ahead."""

    __slots__ = ("buf", "idle", "pool", "reused", "since", "stream")

    def __init__(self, pool: Pool, stream: Stream) -> None:
        self.pool = pool
        self.stream = stream
        self.buf = b""
        #: whether it has carried a request before
        self.reused = False
        #: whether nobody uses it, and since when
        self.idle = False
        self.since = 0.0
        stream.watch(self.stray)

    def stray(self) -> None:
        """Called in the hub while nobody reads: was it closed, or does it say what nobody asked for?"""
        if not self.idle:
            return
        try:
            if self.stream.silent():
                self.stream.rearm()
                return
        except Exception as error:
            failed_callback(f"an unused connection to {self.pool.target}", error)
        self.pool.retire(self)


class _PoolWaiter:
    """A request that waits for a connection."""

    __slots__ = ("event", "link")

    def __init__(self, event: Any) -> None:
        self.event = event
        self.link: UpstreamConnection | None = None


class Pool:
    """The connections to one target."""

    def __init__(
        self,
        agent: Agent,
        target: Target,
        waits: Runtime,
        local_address: str | None,
        context: ssl.SSLContext | None,
    ) -> None:
        self.agent = agent
        self.target = target
        self.runtime = waits
        self._local_address = local_address
        self._context = context
        #: those that nobody uses, the one used last at the end
        self._idle: list[UpstreamConnection] = []
        #: those in use, or being made
        self.used = 0
        #: what :func:`~.response_head.parse_response_head` remembers of the last answer
        self.memo: Any = None
        self._waiting: deque[Any] = deque()
        #: whether the agent has forgotten it
        self.gone = False
        #: the hub's loop, where there is one, and one timer for all that are idle
        self._loop: Any = waits.hub.loop if waits.concurrent else None
        self.clock = self._loop.now if self._loop is not None else time.monotonic
        self._timer: Any = None
        self._lock = waits.lock()

    def take(self, fresh: bool = False, wait: bool = True) -> UpstreamConnection:
        """A connection for one request, to be given back with :meth:`give` or :meth:`drop`.

        :param fresh: whether it has to be a new one.
        :param wait: whether to wait when there are too many in use.
        :raises PoolExhausted: when there are too many in use, for too long.
        :raises UpstreamRefused, UpstreamTimeout: when none can be made.
        """
        most = self.agent.max_connections
        ticket = None
        with self._lock:
            if not fresh and (link := self._take_idle()) is not None:
                return link
            if most is not None and self.used + len(self._idle) >= most:
                if self._idle:
                    self.retire(self._idle[0])
                elif not wait:
                    raise PoolExhausted(f"all {most} connections are in use")
                else:
                    ticket = _PoolWaiter(self.runtime.event())
                    self._waiting.append(ticket)
            if ticket is None:
                self.used += 1
        if ticket is not None and (handed := self._wait_for(ticket)) is not None:
            if not fresh:
                return handed
            handed.stream.close()
        try:
            stream = connect(
                self.target, self.runtime, self.agent.connect_timeout, self._local_address, self._context
            )
        except BaseException:
            self._free()
            raise
        return UpstreamConnection(self, stream)

    def _take_idle(self) -> UpstreamConnection | None:
        while self._idle:
            try:
                link = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            if self._loop is None and self.clock() - link.since > self.agent.idle_timeout:
                link.stream.close()
                continue
            link.idle = False
            self.used += 1
            return link
        return None

    def kept(self) -> UpstreamConnection | None:
        """A connection that was kept, if there is one: :meth:`take` in a hub, at its simplest."""
        try:
            link = self._idle.pop()
        except IndexError:
            return None
        link.idle = False
        self.used += 1
        return link

    def _wait_for(self, ticket: _PoolWaiter) -> UpstreamConnection | None:
        """Wait until another request gives its connection back.

        :returns: the connection, or ``None`` when the other has dropped it and its place is free.
        """
        try:
            if ticket.event.wait(self.agent.connect_timeout):
                return ticket.link
        except BaseException:
            if not self._left(ticket):
                if ticket.link is not None:
                    ticket.link.stream.close()
                self._free()
            raise
        if self._left(ticket):
            raise PoolExhausted(f"all {self.agent.max_connections} connections are in use")
        return ticket.link

    def _left(self, ticket: _PoolWaiter) -> bool:
        """Leave the queue; false when the ticket was called just before."""
        try:
            self._waiting.remove(ticket)
        except ValueError:
            return False
        return True

    def _call(self, link: UpstreamConnection | None) -> bool:
        """Hand a connection, or the place of one, to the request that waits longest."""
        try:
            ticket = self._waiting.popleft()
        except IndexError:
            return False
        ticket.link = link
        ticket.event.set()
        return True

    def keep(self, link: UpstreamConnection) -> None:
        """A request is over: :meth:`give` in a hub, at its simplest."""
        if (
            self._waiting
            or self._timer is None
            or link.stream.unsent
            or len(self._idle) >= self.agent.max_idle
        ):
            self.give(link)
            return
        link.reused = link.idle = True
        link.since = self.clock()
        self._idle.append(link)
        self.used -= 1
        link.stream.rearm()

    def give(self, link: UpstreamConnection) -> None:
        """A request is over, and its connection can carry another."""
        if link.buf or link.stream.unsent or not self.agent.max_idle:
            self.drop(link)
            return
        link.reused = True
        if len(self._idle) >= self.agent.max_idle and not self._waiting:
            self.drop(link)
            return
        with self._lock:
            if self._waiting and self._call(link):
                return
            link.idle = True
            link.since = self.clock()
            self._idle.append(link)
            self.used -= 1
        if self._loop is None:
            self._retire_old()
            return
        link.stream.rearm()
        if self._timer is None:
            self._start_timer(self.agent.idle_timeout)

    def drop(self, link: UpstreamConnection) -> None:
        """A request is over, and so is its connection."""
        try:
            link.stream.close()
        finally:
            self._free()

    def _free(self) -> None:
        with self._lock:
            if self._waiting and self._call(None):
                return
            self.used -= 1

    @property
    def empty(self) -> bool:
        """Whether it has no connection, and nobody waits for one."""
        return not (self.used or self._idle or self._waiting)

    def _retire_old(self) -> None:
        """Close what nobody has used for too long.

        Threads have no timers: there it happens when a younger connection is given back.
        """
        limit = self.clock() - self.agent.idle_timeout + 0.001
        while self._idle and self._idle[0].since <= limit:
            self.retire(self._idle[0])

    def _start_timer(self, seconds: float) -> None:
        self._timer = self._loop.timer(max(seconds, 0.001))
        self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        """Called in the hub: the connection that is idle for longest may be so for too long."""
        try:
            self._timer.close()
            self._timer = None
            self._retire_old()
        except Exception as error:
            failed_callback(f"an unused connection to {self.target}", error)
        finally:
            self._timer = None
            if self._idle:
                self._start_timer(self._idle[0].since + self.agent.idle_timeout - self.clock())

    def retire(self, link: UpstreamConnection) -> None:
        """Close a connection that no request uses; others are not kept from it when that fails."""
        try:
            self._idle.remove(link)
        except ValueError:
            return
        try:
            link.stream.close()
        except Exception as error:
            failed_callback(f"an unused connection to {self.target}", error)

    def clear(self) -> None:
        for link in list(self._idle):
            self.retire(link)
