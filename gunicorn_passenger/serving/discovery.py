"""Where the servers of the application are, in this process and in others.

Process: a worker, plain Python, and the master with ``--preload``.
Never: ask the master about a name more often than once a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import count
from time import monotonic
from typing import Any, NamedTuple

from gunicorn_passenger import errors
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.serving.server import Server
from gunicorn_passenger.serving.third_party import ThirdPartyServer

#: Seconds for which the addresses of other processes' servers are remembered.
_CACHE_SECONDS = 1.0


#: servers in other processes: their own names, and their addresses
_Members = tuple[tuple[str, tuple[str, int] | str], ...]


class _ServerInfo(NamedTuple):
    name: str
    address: tuple[str, int] | str | None
    placement: str
    state: str


class ServerInfo(_ServerInfo):
    """One server of the application, as :func:`gunicorn_passenger.servers` lists it.

    A named tuple of ``name``, ``address``, ``placement`` and ``state``.
    """

    #: the pid of the worker that serves it, with the placement "each"
    worker: int | None = None


class ServerDiscovery:
    """Lists the servers of the application and finds them by name."""

    def __init__(
        self, servers: list[Server | ThirdPartyServer], report: Callable[[], dict[str, Any]]
    ) -> None:
        """
        :param servers: those of this process; the list changes as they come and go.
        :param report: gets the report of the whole application from the master.
        """
        self._servers = servers
        self._report = report
        #: by name: the servers in other processes, and the time at which they are asked for again
        self._remembered: dict[str, tuple[_Members, float]] = {}
        self._turns = count()
        #: the servers that proxies of the program name as their targets
        self.named_by_proxies: set[str] = set()

    def list_servers(self) -> list[ServerInfo]:
        """The servers of this process, and those with the placement "each" of the other workers."""
        found = []
        for server in self._servers:
            info = ServerInfo(server.name, server.address, server.placement, server.state)
            if server.placement == "each" and server.position:
                info.worker = os.getpid()
            found.append(info)
        base_names = {server.base_name for server in self._servers if server.placement == "each"}
        if base_names:
            found.extend(self._of_other_workers(base_names, {info.name for info in found}))
        return found

    def resolve_server(self, name: str) -> tuple[str, int] | str:
        """The address of a server of the application, in whichever process it is.

        :param name: its name; the base name of an ``"each"`` server means each of them in turn.
        :raises LookupError: when no server has the name, or it listens nowhere yet.
        """
        for server in self._servers:
            if server.name == name and server.address:
                return server.address
        found = self._members(name)
        if not found:
            raise LookupError(name)
        return found[next(self._turns) % len(found)][1]

    def member_names(self, name: str) -> list[str]:
        """The own names of the servers that a name stands for: with ``"each"``, one in each worker.

        :param name: as for :meth:`resolve_server`; the list is empty when no server has it.
        """
        if any(server.name == name for server in self._servers):
            return [name]
        return sorted({member for member, _ in self._members(name)})

    def explain_missing(self, log: Log) -> None:
        """Name the targets of proxies that are the name of no server and no daemon.

        :param log: gunicorn's.
        """
        known = {server.name for server in self._servers}
        if not self.named_by_proxies - known:
            return
        with suppress(errors.BrokerUnavailable):
            report = self._report()
            for entry in [*report["servers"], *report.get("daemons", ())]:
                known.add(entry["name"])
                if entry.get("placement") == "each":
                    known.add(entry["name"].rpartition(".")[0])
            for name in sorted(self.named_by_proxies - known):
                similar = get_close_matches(name, known, 1)
                log.warning(
                    "A proxy sends requests to the server %r, which does not exist%s; they fail until a "
                    "server or daemon has that name, or the target is corrected (pid:%s). "
                    "'gunicorn-passenger status' lists the names",
                    name,
                    f" (did you mean {similar[0]!r}?)" if similar else "",
                    os.getpid(),
                )

    def _members(self, name: str) -> _Members:
        """The servers in other processes that a name stands for, as the master knows them."""
        now = monotonic()
        found, until = self._remembered.get(name, ((), 0.0))
        if now >= until:
            with suppress(errors.BrokerUnavailable):  # an old address is better than none
                found = tuple(self._members_in_report(name))
            self._remembered[name] = found, now + _CACHE_SECONDS
        if not found:
            self._remembered.pop(name, None)
        return found

    def _members_in_report(self, name: str) -> Iterator[tuple[str, tuple[str, int] | str]]:
        report = self._report()
        for entry in [*report["servers"], *report.get("daemons", ())]:
            own_name, address = entry["name"], entry["address"]
            known = own_name
            if entry.get("placement") == "each" and name != own_name:
                known = own_name.rpartition(".")[0]
            served = entry["state"] == "running" or (entry["state"] == "listening" and entry.get("workers"))
            if known == name and address and served:
                yield own_name, address if address.startswith("unix:") else _host_and_port(address)

    def _of_other_workers(self, base_names: set[str], known: set[str]) -> Iterator[ServerInfo]:
        try:
            servers = self._report()["servers"]
        except errors.BrokerUnavailable:
            return
        for entry in servers:
            name = entry["name"]
            if entry["placement"] == "each" and name not in known and name.rpartition(".")[0] in base_names:
                info = ServerInfo(name, _host_and_port(entry["address"]), "each", entry["state"])
                info.worker = next(iter(entry["workers"]), None)
                yield info


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
