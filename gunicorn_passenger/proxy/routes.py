"""Chooses the target of a request: a fixed one, one of several, that of a function, or one by path prefix.

Process: any process in which the proxy is mounted. Its only I/O asks the master for a server.
Never: send a client to a target that the client names.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.target import ServerDirectory, Target, check_prefix, matches, parse_target

#: How many results of target functions are remembered.
_REMEMBER = 1024

_starts = itertools.count()


class Backend:
    """A target, and its state."""

    __slots__ = ("active", "failed_until", "healthy", "id", "target")

    def __init__(self, target: Target, key: bytes) -> None:
        """
        :param key: makes ids of which a client cannot tell the address.
        """
        self.target = target
        #: how many requests and tunnels it has now
        self.active = 0
        #: until when it is skipped, on the monotonic clock
        self.failed_until = 0.0
        #: whether the last health check has succeeded
        self.healthy = True
        #: its id in a sticky cookie
        self.id = hashlib.blake2s(target.text.encode(), key=key, digest_size=9).hexdigest()

    def failed(self, options: Options) -> None:
        """Skip it for ``fail_timeout``: it cannot be connected to."""
        self.failed_until = max(self.failed_until, time.monotonic() + options.fail_timeout)


class TargetGroup:
    """One or several targets that are equivalent."""

    def __init__(self, targets: list[Target]) -> None:
        unique = list(dict.fromkeys(targets))
        self._key = hashlib.blake2s("\n".join(target.text for target in unique).encode()).digest()
        self.backends = [Backend(target, self._key) for target in unique]
        #: the backends of servers that a target stands for, by their names
        self._members: dict[str, Backend] = {}
        #: identifies the health checks that are under way, if any
        self.checks: object | None = None
        #: whose turn it is. A program may make a proxy for each request, and they must not all begin with the
        #: same one of the "each" servers.
        self._next = next(_starts) if any(target.server for target in unique) else 0

    def __str__(self) -> str:
        return ", ".join(backend.target.text for backend in self.backends)

    def candidates(
        self, options: Options, cookie: str | None, servers: ServerDirectory | None
    ) -> list[Backend]:
        """The targets in the order in which they are to be tried.

        :param cookie: the id of the target that the client had before, with sticky targets.
        :param servers: the servers of the application: the name of an ``"each"`` server stands for several.
        """
        backends = self.members(servers)
        if len(backends) == 1:
            return backends
        at = self._next = (self._next + 1) % len(backends)
        order = backends[at - 1 :] + backends[: at - 1] if at else backends[-1:] + backends[:-1]
        if options.balance == "least_connections":
            order.sort(key=lambda backend: backend.active)
        now = time.monotonic()
        well = [backend for backend in order if backend.failed_until <= now]
        if cookie:
            well.sort(key=lambda backend: backend.id != cookie)
        if len(well) == len(order):
            return well
        # the one that failed first is the likeliest to be back
        failed = [backend for backend in order if backend.failed_until > now]
        return well + sorted(failed, key=lambda backend: backend.failed_until)

    def members(self, servers: ServerDirectory | None) -> list[Backend]:
        """The targets, with all servers that their names stand for."""
        if servers is None or not any(backend.target.server for backend in self.backends):
            return self.backends
        return [member for backend in self.backends for member in self._expanded(backend, servers)]

    def _expanded(self, backend: Backend, servers: ServerDirectory) -> list[Backend]:
        """The backends that a backend stands for."""
        target = backend.target
        names = servers.member_names(target.server) if target.server else []
        if not names or names == [target.server]:
            return [backend]
        found = []
        for name in names:
            member = self._members.get(name)
            if member is None:
                member = self._members[name] = Backend(Target(server=name), self._key)
            found.append(member)
        return found


class Route:
    """The target of some requests, their options, and the path prefix that is removed."""

    __slots__ = ("_known", "function", "group", "only", "options", "remove", "table")

    def __init__(self, target: Any, host: str | None, options: Options) -> None:
        """
        :raises SettingError: when ``target`` cannot be used.
        """
        self.options = options
        self.table: list[tuple[str, Route]] = []
        #: the path prefix that is removed
        self.remove = ""
        self.function: Callable[..., Any] | None = None
        self._known: dict[Any, TargetGroup] = {}
        self.group: TargetGroup | None = None
        #: the only target, as a list, where there is just one
        self.only: list[Backend] | None = None
        if target is None:
            if options.forward is None:
                raise SettingError("target=None needs forward=, a target that gets a copy of the requests")
        elif isinstance(target, Mapping):
            self._make_table(target, host)
        elif isinstance(target, (list, tuple)):
            if not target:
                raise SettingError("target=[] names no target")
            self.group = TargetGroup([parse_target(one, host) for one in target])
        elif callable(target) and not isinstance(target, type):
            self.function = target
        else:
            self.group = TargetGroup([parse_target(target, host)])
        backends = self.group.backends if self.group is not None else []
        if len(backends) == 1 and not (options.sticky or backends[0].target.server):
            self.only = backends

    def __str__(self) -> str:
        if self.table:
            return ", ".join(f"{prefix} → {route}" for prefix, route in self.table)
        if self.function is not None:
            return getattr(self.function, "__name__", "a function")
        return str(self.group) if self.group is not None else f"a mirror at {self.options.forward}"

    def always_targets(self, target: Target) -> bool:
        """Whether every request goes to this target, with its path unchanged."""
        return self.only is not None and self.only[0].target is target and not (self.table or self.remove)

    def server_names(self) -> set[str]:
        """The servers of this application that the fixed targets name."""
        targets = [backend.target for backend in self.group.backends] if self.group is not None else []
        if self.options.forward is not None:
            targets.append(self.options.forward)
        names = {target.server for target in targets if target.server}
        return names.union(*(route.server_names() for _, route in self.table))

    @property
    def mirror_only(self) -> bool:
        """Whether requests are mirrored only."""
        return self.group is None and self.function is None

    def _make_table(self, table: Mapping[Any, Any], host: str | None) -> None:
        if not table:
            raise SettingError("target={} names no target")
        for prefix, value in table.items():
            check_prefix(prefix)
            given = dict(value) if isinstance(value, Mapping) else {"target": value}
            if "target" not in given:
                raise SettingError(f"target: the entry of {prefix!r} has no 'target'")
            target = given.pop("target")
            if isinstance(target, Mapping):
                raise SettingError(f"target: the entry of {prefix!r} is another table; write one table")
            remove = given.pop("remove_prefix", False)
            route = Route(target, host, self.options.merged(given, f"target: the entry of {prefix!r}"))
            if not isinstance(remove, bool):
                raise SettingError(f"target: remove_prefix={remove!r} is neither True nor False")
            if remove:
                route.remove = prefix.rstrip("/")
            self.table.append((prefix, route))
        self.table.sort(key=lambda entry: len(entry[0]), reverse=True)

    def find(self, path: str) -> Route | None:
        """The route of a path."""
        if not self.table:
            return self
        for prefix, route in self.table:
            if matches(prefix, path):
                return route
        return None

    def find_group(self, make_request: Callable[[], Any]) -> TargetGroup | None:
        """The targets of a request; ``None`` when the function returns ``None``.

        :param make_request: gives the request for a function.
        :raises SettingError: when the function returns something that is not a target.
        """
        if self.function is None:
            return self.group
        said = self.function(make_request())
        return None if said is None else self._remembered(said)

    def close(self) -> None:
        """End the health checks; the next request starts them again."""
        for group in [*self._known.values(), *([self.group] if self.group is not None else [])]:
            group.checks = None
        for _, route in self.table:
            route.close()

    def with_target(self, target: Any, options: Options) -> Route:
        """The same route with another target, for one request."""
        if isinstance(target, Mapping) or callable(target):
            return Route(target, None, options)
        route = copy.copy(self)
        route.options = options
        route.table, route.remove, route.only, route.function = [], "", None, None
        route.group = self._remembered(target)
        return route

    def _remembered(self, said: Any) -> TargetGroup:
        key = tuple(said) if isinstance(said, list) else said
        try:
            found = self._known.get(key)
        except TypeError:
            raise SettingError(f"the target function returned {said!r}, which is not a target") from None
        if found is None:
            found = TargetGroup([parse_target(one) for one in (key if isinstance(key, tuple) else (key,))])
            if len(self._known) >= _REMEMBER:
                self._known.clear()
            self._known[key] = found
        return found
