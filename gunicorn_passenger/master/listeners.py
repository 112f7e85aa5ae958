"""The ports that the master holds: opening, adopting, handing over, closing.

Runs in: the master, in the broker's thread (or before it starts). Must never: resolve a name,
wait for anything, or open what the port allocation does not name.

A port lives in the arbiter's own ``LISTENERS``, so that ``USR2`` hands it to the next master and a
shutdown closes it. gunicorn also closes every listener there when a reload changes ``bind``; a
:class:`BrokerOwnedListener` listener survives that (see :meth:`Held.close`).
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gunicorn.sock import TCP6Socket, TCPSocket, UnixSocket

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import format_sockname, format_tcp
from gunicorn_passenger.config.port_allocation import PortAllocation, format_ports, parse_ports
from gunicorn_passenger.ipc.channel import OpenPort
from gunicorn_passenger.ipc.scoreboard import SLOTS
from gunicorn_passenger.system import listening_sockets

#: Marks, for the next master, a port of an "each" server.
_EACH = "each "
#: How many ports one application may hold: a runaway program must not use up the master.
MAX_PORTS = 1024


class BrokerOwnedListener:
    """Mixin for gunicorn's socket classes: a listener that the broker opened.

    gunicorn calls ``close()`` in two places: when it stops, and when a reload changes ``bind``. The
    broker must tell them apart, since a port outlives a reload; so ``close()`` only reports, and the
    broker closes by :meth:`close_now`.
    """

    surrendered: Callable[[], None] | None = None
    sock: Any

    def close(self) -> None:
        if self.surrendered is not None and self.sock is not None:
            self.surrendered()
        else:
            self.close_now()

    def close_now(self) -> None:
        sock, self.sock = self.sock, None
        if sock is not None:
            with suppress(OSError):
                sock.close()


class BrokerOwnedTCP(BrokerOwnedListener, TCPSocket):
    """A run-time port on IPv4."""


class BrokerOwnedTCP6(BrokerOwnedListener, TCP6Socket):
    """A run-time port on IPv6."""


class BrokerOwnedUnix(BrokerOwnedListener, UnixSocket):
    """A run-time UNIX socket."""

    def getsockname(self) -> tuple[str, str]:
        """No path: gunicorn would remove whatever stands there when it stops. The broker does it."""
        return "unix", self.cfg_addr


@dataclass
class Port:
    """One open address and the workers that want it."""

    key: str
    listener: Any
    host: str = ""
    port: int = 0
    path: str = ""
    family: int = socket.AF_INET
    #: opened by the operator (gunicorn's bind, systemd): stays open whether wanted or not
    bound: bool = False
    #: device and inode of a UNIX socket's file, so that only our own file is removed
    file: tuple[int, int] | None = None
    backlog: int = 0
    #: workers that want it: age to the number of their Open, in the order in which they asked
    wanted_by: dict[int, int] = field(default_factory=dict)
    placement: str = "shared"
    #: the placement that was asked for last; it holds when nobody accepts by another
    next_placement: str = "shared"
    v6only: bool = False
    #: those of them that may accept
    accepting: set[int] = field(default_factory=set)
    #: with "each": which of its kind it is, from 1
    position: int = 0
    #: what the program calls the server
    name: str = ""
    #: where workers count what they do (see ipc/scoreboard.py)
    slot: int = -1
    #: whether workers count its requests
    counts: bool = True
    #: the worker that it was opened for
    opened_for: int = -1
    #: why nobody may accept, "stop" or "restart", while that is so
    paused: str = ""

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.name or self.key}.{self.position}" if self.position else self.name or self.key

    #: when it was last wanted (monotonic seconds); None while it is
    idle_since: float | None = None
    claimed: bool = False


def tcp_key(host: str, port: int) -> str:
    return format_tcp(host, port)


class Listeners:
    """All ports of this application, by key. Changed by the broker alone."""

    def __init__(self, cfg: Any, log: Any) -> None:
        self.cfg = cfg
        self.log = log
        self.ports: dict[str, Port] = {}
        #: the arbiter's list, which also has the primary's own listeners
        self.binds: list[Any] = []
        #: servers that asked for "auto", by name and host -> key
        self._autos: dict[str, str] = {}
        #: ports of "each" servers, by what was asked for -> keys by position
        self._each: dict[str, dict[int, str]] = {}
        self._slots: set[int] = set()
        #: slots of closed ports, on which these workers have written
        self._cooling: dict[int, set[int]] = {}
        #: keys of servers that an operator stopped under the master before
        self.stopped: set[str] = set()
        self.surrendered: Callable[[], None] = lambda: None

    # --- adopting -----------------------------------------------------------------------------

    def adopt(self, listener: Any, bound: bool, now: float, auto: str = "") -> None:
        """Take over a socket that is open already: from ``bind``, systemd, or the master before.

        :param auto: what an ``"auto"`` server of the master before asked for it as.
        """
        name = listening_sockets.sockname(listener.sock)
        if not isinstance(name, tuple):
            port = Port(format_sockname(name), listener, path=str(name), family=socket.AF_UNIX, bound=bound)
            port.file = listening_sockets.inode_id(str(name))
        else:
            family = socket.AF_INET6 if len(name) == 4 else socket.AF_INET
            port = Port(
                tcp_key(name[0], name[1]), listener, host=name[0], port=name[1], family=family, bound=bound
            )
        if not bound:
            port.listener = self._held(listener)
            port.idle_since = now
        self._add(port)
        if auto.startswith(_EACH):
            label, _, position = auto[len(_EACH) :].rpartition(" ")
            port.placement = port.next_placement = "each"
            port.position = int(position) if position.isdecimal() else 1
            self._each.setdefault(label, {})[port.position] = port.key
        elif auto:
            self._autos[auto] = port.key

    def _add(self, port: Port) -> None:
        self.ports[port.key] = port
        # the first is the primary's
        free = (n for n in range(1, SLOTS) if n not in self._slots and n not in self._cooling)
        port.slot = next(free, -1)
        self._slots.add(port.slot)
        if port.key in self.stopped:
            self.stopped.discard(port.key)
            port.paused = "stop"

    def cool(self, port: Port, ages: Iterable[int]) -> None:
        """A port is closed: nobody counts in its slot before these workers are gone."""
        self._slots.discard(port.slot)
        if port.slot > 0:
            self._cooling[port.slot] = set(ages)
            self.cooled(-1)

    def cooled(self, age: int) -> None:
        """A worker is gone."""
        for ages in self._cooling.values():
            ages.discard(age)
        self._cooling = {slot: ages for slot, ages in self._cooling.items() if ages}

    def rebuild(self, listening: list[Any]) -> None:
        """Make the table anew: of the listeners that are open, and what is still known of each.

        :param listening: the arbiter's list.
        """
        before, self.ports = self.ports, {}
        known = {id(port.listener): port for port in before.values()}
        for listener in listening:
            port = known.pop(id(listener), None)
            if port is not None:
                self.ports[port.key] = port
            elif isinstance(listener, BrokerOwnedListener) and listener.sock is not None:
                self.adopt(listener, False, time.monotonic())
        # those that an operator has stopped are open nowhere
        self.ports |= {port.key: port for port in known.values() if port.paused}
        self._slots = {port.slot for port in self.ports.values()}

    def export_state(self) -> dict[str, Any]:
        """The run-time ports for the next master.

        :returns: ``open``: pairs of a key and what an ``"auto"`` or ``"each"`` server asked for it as (see
            :meth:`adopt`); ``stopped``: keys of servers that an operator has stopped.
        """
        autos = {key: auto for auto, key in self._autos.items()}
        for label, keys in self._each.items():
            autos |= {key: f"{_EACH}{label} {position}" for position, key in keys.items()}
        ports = self.ports.values()
        return {
            "open": [
                [p.key, autos.get(p.key, "")] for p in ports if not p.bound and p.listener.sock is not None
            ],
            "stopped": [p.key for p in ports if p.paused == "stop"],
        }

    def _held(self, listener: Any) -> Any:
        """The same socket as a listener of our own class, so that a reload does not close it."""
        if isinstance(listener, BrokerOwnedListener):
            return listener
        sock = listener.sock
        classes = {
            socket.AF_INET: BrokerOwnedTCP,
            socket.AF_INET6: BrokerOwnedTCP6,
            socket.AF_UNIX: BrokerOwnedUnix,
        }
        name = listening_sockets.sockname(sock)
        return self._wrap(classes[listener.FAMILY], name, sock.detach())

    def _wrap(self, cls: Any, name: Any, fd: int) -> Any:
        listener = cls(name, self.cfg, self.log, fd=fd)
        listener.surrendered = self.surrendered
        return listener

    # --- opening ------------------------------------------------------------------------------

    def open(self, ask: OpenPort, allocation: PortAllocation, same_user: bool) -> Port:
        """The port that a worker asked for, opened now if it is not open yet.

        :raises errors.ListenError: when it may not have it or it cannot be opened.
        """
        if ask.kind == "unix":
            return self._open_unix(ask, allocation, same_user)
        if ask.kind == "auto":
            return self._open_auto(ask, allocation)
        if ask.kind == "tcp":
            return self._open_tcp(ask, allocation)
        raise listen_errors.bad_address(ask.kind[:40], "the worker asked for an unknown kind of address")

    def open_each(
        self, ask: OpenPort, allocation: PortAllocation, workers: int, age: int, waits: bool = False
    ) -> Port | None:
        """With the placement "each": a port that no other worker has.

        One that a worker has left is used again before another is opened, the lowest first.

        :param workers: how many workers there are to be, and so how many such ports.
        :param age: the worker that asks.
        :param waits: whether it has asked before.
        :returns: ``None`` when all of them are taken.
        :raises errors.ListenError: when there cannot be as many ports as workers.
        """
        if ask.kind == "unix":
            raise listen_errors.each_needs_tcp(ask.path)
        label = f"{ask.host}/{ask.port}/{ask.name}"
        keys = self._each.get(label, {})
        for key in keys.values():
            if age in self.ports[key].wanted_by:
                raise listen_errors.duplicate_listen(key)
        for position in sorted(keys):
            if not self.ports[keys[position]].wanted_by:
                return self.ports[keys[position]]
        if len(keys) >= workers:
            return None
        try:
            port = self._create_free(_family(ask.host), ask, allocation, workers - len(keys))
        except errors.ListenError as error:
            if keys:
                # there are more workers than at the start: this one waits for another's port
                if not waits:
                    self.log.warning("gunicorn-passenger: a worker waits for a port: %s", error)
                return None
            raise
        port.placement = port.next_placement = "each"
        port.position = next(n for n in range(1, workers + 1) if n not in keys)
        self._each.setdefault(label, {})[port.position] = port.key
        return port

    def _create_free(self, family: int, ask: OpenPort, allocation: PortAllocation, needed: int = 0) -> Port:
        """Open the first of the ports in question that nobody has.

        :param needed: how many of them must be free.
        """
        within = parse_ports(ask.within, "the worker") if ask.within else None
        if ask.kind == "auto" and not allocation.limited and within is None:
            return self._create_tcp(family, ask.host, 0, ask)
        if allocation.limited:
            ports = allocation.ports & within if within is not None else allocation.ports
        else:
            ports = within if within is not None else frozenset(range(max(ask.port, 1), 65536))
        if ask.kind == "tcp":
            allocation.check(ask.port)
            ports = frozenset(number for number in ports if number >= ask.port)
        taken = {p.port for p in self.ports.values()} | self._primary_ports()
        free = sorted(ports - taken)
        if len(free) < needed:
            raise listen_errors.too_few_ports(format_ports(ports), needed, len(free), allocation.sources)
        for number in free:
            allocation.check(number)
            try:
                return self._create_tcp(family, ask.host, number, ask)
            except errors.PortInUse:
                continue
        raise listen_errors.no_port_free(format_ports(ports), allocation.sources)

    def _open_tcp(self, ask: OpenPort, allocation: PortAllocation) -> Port:
        family = _family(ask.host)
        if not 1 <= ask.port <= 65535:
            raise listen_errors.bad_port(ask.port)
        port = self.ports.get(tcp_key(ask.host, ask.port)) or self._bound_elsewhere(ask.port)
        if port is None or not port.bound:
            allocation.check(ask.port)
        if port is None:
            port = self._create_tcp(family, ask.host, ask.port, ask)
        self._raise_backlog(port, _backlog(ask))
        return port

    def _bound_elsewhere(self, number: int) -> Port | None:
        """The operator's word on the host wins: a port that ``bind`` opened serves any listen on it."""
        return next((p for p in self.ports.values() if p.bound and p.port == number), None)

    def _create_tcp(self, family: int, host: str, number: int, ask: OpenPort) -> Port:
        self._check_room()
        own = next((p for p in self.ports.values() if number and p.port == number), None)
        backlog = max(self.cfg.backlog, _backlog(ask))
        try:
            sock = listening_sockets.open_tcp(family, host, number, backlog, ask.v6only)
        except errors.PortInUse:
            holder = "this application itself, "
            if own is not None:
                holder += f"which holds it as {own.key}"
            elif number in self._primary_ports():
                holder += "whose primary it is (gunicorn's bind)"
            else:
                raise
            raise listen_errors.in_use(format_tcp(host, number), holder) from None
        name = sock.getsockname()
        listener = self._wrap(
            BrokerOwnedTCP6 if family == socket.AF_INET6 else BrokerOwnedTCP, name, sock.detach()
        )
        port = Port(
            tcp_key(name[0], name[1]), listener, host=name[0], port=name[1], family=family, backlog=backlog
        )
        port.v6only = ask.v6only
        self._add(port)
        return port

    def _primary_ports(self) -> set[int]:
        names = [
            li.getsockname()
            for li in self.binds
            if li.sock is not None and not isinstance(li, BrokerOwnedListener)
        ]
        return {name[1] for name in names if isinstance(name, tuple)}

    @staticmethod
    def room() -> int:
        """How many ports there may be: a master without a descriptor left could not even start workers."""
        return min(MAX_PORTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def _check_room(self) -> None:
        limit = self.room()
        if len(self.ports) >= limit:
            raise listen_errors.too_many_ports(limit)

    def check_share(self, age: int, workers: int) -> None:
        """One worker may not have all of the ports: its siblings need some that do not depend on it.

        Those count that were opened for it and that no worker wants any more: they stay for the grace period.

        :param age: the worker that asks for one more.
        :param workers: how many there are to be.
        :raises errors.ListenError: when it has as many as one worker may have.
        """
        if workers < 2:
            return
        room = self.room()
        limit = room - room // 4
        ports = self.ports.values()
        if sum(age in p.wanted_by or (p.opened_for == age and not p.wanted_by) for p in ports) >= limit:
            raise listen_errors.too_many_ports_of_worker(limit)

    def _open_auto(self, ask: OpenPort, allocation: PortAllocation) -> Port:
        family = _family(ask.host)
        label = f"{ask.host}/{ask.name}"
        port = self.ports.get(self._autos.get(label, ""))
        if port is None:
            port = self._create_free(family, ask, allocation)
            self._autos[label] = port.key
        return port

    def _open_unix(self, ask: OpenPort, allocation: PortAllocation, same_user: bool) -> Port:
        port = self.ports.get(f"unix:{ask.path}")
        if port is not None:
            return port
        # The path is the worker's word: a master with more rights than the worker touches none. One with the
        # same rights may still work in a directory that others can write: see sockets.open_unix and
        # sockets.remove.
        if not same_user:
            raise listen_errors.unix_other_user(ask.path, allocation.account)
        if not os.path.isabs(ask.path) or "\0" in ask.path:
            raise listen_errors.bad_address(ask.path[:100], "the path of the UNIX socket is not absolute")
        self._check_room()
        mode = 0o666 & ~self.cfg.umask if self.cfg.umask else 0o600
        sock = listening_sockets.open_unix(ask.path, mode, max(self.cfg.backlog, _backlog(ask)))
        listener = self._wrap(BrokerOwnedUnix, ask.path, sock.detach())
        port = Port(f"unix:{ask.path}", listener, path=ask.path, family=socket.AF_UNIX)
        port.file = listening_sockets.inode_id(ask.path)
        self._add(port)
        return port

    def _raise_backlog(self, port: Port, backlog: int) -> None:
        """A program that asks for a longer queue gets it; a shorter one would rob its siblings."""
        if port.backlog and backlog > port.backlog and port.listener.sock is not None:
            with suppress(OSError):
                port.listener.sock.listen(backlog)
                port.backlog = backlog

    def reopen(self, port: Port) -> None:
        """Open again what was closed on the operator's word.

        :raises OSError: when somebody else has taken the address.
        """
        backlog = max(self.cfg.backlog, port.backlog)
        if port.path:
            mode = 0o666 & ~self.cfg.umask if self.cfg.umask else 0o600
            sock = listening_sockets.open_unix(port.path, mode, backlog)
            port.listener = self._wrap(BrokerOwnedUnix, port.path, sock.detach())
            port.file = listening_sockets.inode_id(port.path)
            return
        sock = listening_sockets.open_tcp(port.family, port.host, port.port, backlog, port.v6only)
        cls = BrokerOwnedTCP6 if port.family == socket.AF_INET6 else BrokerOwnedTCP
        port.listener = self._wrap(cls, sock.getsockname(), sock.detach())

    # --- closing ------------------------------------------------------------------------------

    def drop(self, key: str, unlink: bool, ages: Iterable[int] = ()) -> None:
        """Close a port that nobody wants any more.

        :param ages: the workers that there are.
        """
        port = self.ports.pop(key)
        self.cool(port, ages)
        self._autos = {label: k for label, k in self._autos.items() if k != key}
        for keys in self._each.values():
            if keys.get(port.position) == key:
                del keys[port.position]
        self._each = {label: keys for label, keys in self._each.items() if keys}
        port.listener.close_now()
        if unlink and port.file is not None:
            listening_sockets.remove(port.path, port.file)


def _backlog(ask: OpenPort) -> int:
    return min(max(ask.backlog, 0), 65535)


def _family(host: str) -> int:
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return family
    raise listen_errors.bad_address(host[:100], "the worker asked for a host that is no numeric address")
