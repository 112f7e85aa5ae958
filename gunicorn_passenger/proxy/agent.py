"""The public settings of the connections to upstreams, and one pool for each upstream.

Process: any process in which the proxy is mounted.
Never: let two event loops share a pool.
"""

from __future__ import annotations

import ssl
import weakref
from typing import Any

from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.proxy.dial import Dialer, DialSettings
from gunicorn_passenger.proxy.pool import Pool
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.upstream_io import Runtime, runtime

#: the agents of this process
_agents: weakref.WeakSet[Agent] = weakref.WeakSet()

#: How many pools an agent keeps although they are empty.
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
        max_age: float | None = None,
    ) -> None:
        """
        :param max_connections: the most connections to each target, in each worker; ``None``: no bound.
            When all are in use, a request waits ``connect_timeout`` for one.
        :param max_idle: how many connections to each target stay open while no request uses them.
        :param idle_timeout: seconds after which an idle connection is closed; sooner, when the target says so
            (``Keep-Alive: timeout=5``).
        :param connect_timeout: seconds that connecting may take.
        :param max_age: seconds after which a connection carries no further request; ``None``: no limit.
        :param ssl_context: for ``https`` targets, with client certificates and private authorities.
        :raises ValueError: for a value that cannot be used.
        """
        if max_connections is not None:
            _count("max_connections", max_connections, 1)
        _count("max_idle", max_idle, 0)
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
            raise SettingError(f"Agent: ssl_context={ssl_context!r} is not an ssl.SSLContext")
        self.max_connections = max_connections
        self.max_idle = max_idle
        self.idle_timeout = positive("Agent: idle_timeout", idle_timeout)
        self.connect_timeout = positive("Agent: connect_timeout", connect_timeout)
        self.max_age = None if max_age is None else positive("Agent: max_age", max_age)
        self._contexts: dict[bool, ssl.SSLContext] = {}
        #: whether the program gave the TLS context: the option ``secure`` then has no effect on it
        self.has_context = ssl_context is not None
        if ssl_context is not None:
            self._contexts = {True: ssl_context, False: ssl_context}
        self._pools: dict[Any, Pool] = {}
        _agents.add(self)

    def __repr__(self) -> str:
        return (
            f"Agent(max_connections={self.max_connections}, max_idle={self.max_idle}, "
            f"idle_timeout={self.idle_timeout:g}, connect_timeout={self.connect_timeout:g})"
        )

    def pool(self, target: Target, settings: DialSettings) -> Pool:
        """The pool of a target in the caller's event loop, or that of all threads without one."""
        here = runtime()
        key = (target.host, target.port, target.path, target.scheme, settings, here)
        found = self._pools.get(key)
        if found is None:
            if len(self._pools) >= _POOLS:
                # a target function may return new targets without end
                for old, pool in list(self._pools.items()):
                    if old[-1] is here:
                        pool.evict_expired()
                    if pool.empty:
                        self._pools.pop(old, pool).forgotten = True
            context = self.context(settings.secure) if target.tls else None
            found = self._pools.setdefault(key, Pool(self, Dialer(target, here, settings, context)))
        return found

    def context(self, secure: bool) -> ssl.SSLContext:
        """The TLS context; it is made when it is first needed.

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

    def close(self, only: Runtime | None = None) -> None:
        """Close the connections that no request uses.

        :param only: those of this runtime; ``None`` for all.
        """
        for pool in list(self._pools.values()):
            if only is None or pool.runtime is only:
                pool.close_idle()


def keep_no_connections() -> None:
    """This worker drains: close the connections of its event loop that no request uses, and keep no other.

    The upstream may be a server of a sibling that drains, too, and waits for its clients to leave.
    """
    here = runtime()
    for agent in list(_agents):
        agent.max_idle = 0
        agent.close(here)


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"Agent: {name}={value!r} is not a whole number of at least {least}")


def positive(name: str, value: Any) -> float:
    """A number of seconds above zero.

    :raises SettingError: names the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise SettingError(f"{name}={value!r} is not a positive number of seconds")
    return float(value)
