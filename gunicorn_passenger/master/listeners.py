"""The ports that the master holds: opens, registers, exports and closes them.

Process: the master, in the broker's thread (or before it starts). Never: resolve a name, wait, or open a
port that the allocation does not name; one that was open before it was narrowed may be opened again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from functools import partial
from typing import Any
from zlib import crc32

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import SockAddr, format_sockname, format_tcp
from gunicorn_passenger.config.gunicorn_types import Config, Listener, Log
from gunicorn_passenger.config.port_allocation import PortAllocation
from gunicorn_passenger.ipc.messages import OpenPort
from gunicorn_passenger.ipc.scoreboard import SLOTS
from gunicorn_passenger.master.grace_timer import GraceTimer
from gunicorn_passenger.master.owned_listener import OWNED_LISTENERS, BrokerOwnedListener
from gunicorn_passenger.master.port import Port
from gunicorn_passenger.system import listening_sockets, port_opening, runtime_dir
from gunicorn_passenger.system.port_opening import ListenRequest

#: Marks, for the new master, a port of an "each" server.
_EACH = "each "


class Listeners:
    """All ports of this application, by key. Changed by the broker alone."""

    def __init__(self, cfg: Config, log: Log, stopped: Iterable[str] = ()) -> None:
        """:param stopped: keys of servers that an operator has stopped under the previous master."""
        self.cfg = cfg
        self.log = log
        self.allocation = PortAllocation("")
        self.ports: dict[str, Port] = {}
        #: the arbiter's list, which also has the primary's own listeners
        self.listening: list[Listener] = []
        #: measures for how long ports have been unused, by key
        self.idle = GraceTimer[str]()
        #: "auto" servers, by host and name -> key
        self._autos: dict[str, str] = {}
        #: ports of "each" servers, by host, port and name -> keys by position
        self._each: dict[str, dict[int, str]] = {}
        self._slots: set[int] = set()
        #: slots of closed ports, and the workers that may still count there
        self._quarantined: dict[int, set[int]] = {}
        self._stopped = set(stopped)
        #: called when gunicorn closes a listener of the broker
        self.on_close_request: Callable[[], None] = lambda: None
        #: whether a bind stays open that gunicorn closes (see :class:`.ListenerSync`)
        self.keeps_bind: Callable[[str], bool] = lambda key: False
        self._pid = os.getpid()

    # --- registering ----------------------------------------------------------------------------

    def register(self, listener: Listener, from_config: bool, auto: str = "") -> None:
        """Take over a socket that is open already: from ``bind``, systemd, or the previous master.

        :param auto: the label of an ``"auto"`` or ``"each"`` server of the previous master (see
            :meth:`export_state`).
        """
        assert listener.sock is not None
        port = _port(listener, listener.sock.getsockname())
        port.from_config = from_config
        if from_config:
            vars(listener)["close"] = partial(self._close_bind, listener, port.key)
        else:
            port.listener = self._as_owned(listener)
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
        free = (n for n in range(1, SLOTS) if n not in self._slots and n not in self._quarantined)
        port.slot = next(free, -1)
        self._slots.add(port.slot)
        if port.key in self._stopped:
            self._stopped.discard(port.key)
            port.paused = "stop"

    def quarantine_slot(self, port: Port, ages: Iterable[int]) -> None:
        """A port is closed: its slot is not used again until these workers have exited."""
        self._slots.discard(port.slot)
        if port.slot > 0 and (remaining := set(ages)):
            self._quarantined[port.slot] = remaining

    def on_worker_gone(self, age: int) -> None:
        for ages in self._quarantined.values():
            ages.discard(age)
        self._quarantined = {slot: ages for slot, ages in self._quarantined.items() if ages}

    def rebuild(self, listening: list[Listener]) -> None:
        """Rebuild the table from the open listeners and what is still known of each.

        :param listening: the arbiter's list.
        """
        before, self.ports = self.ports, {}
        known = {id(port.listener): port for port in before.values()}
        for listener in listening:
            port = known.pop(id(listener), None)
            if port is not None:
                self.ports[port.key] = port
            elif isinstance(listener, BrokerOwnedListener) and listener.sock is not None:
                self.register(listener, False)
        # a port that an operator has stopped has no open listener
        self.ports |= {port.key: port for port in known.values() if port.paused}
        self._slots = {port.slot for port in self.ports.values()}

    def export_state(self) -> dict[str, Any]:
        """The run-time ports for the new master.

        :returns: ``open``: pairs of a key and the label of an ``"auto"`` or ``"each"`` server (see
            :meth:`register`); ``stopped``: keys of servers that an operator has stopped.
        """
        autos = {key: auto for auto, key in self._autos.items()}
        for label, keys in self._each.items():
            autos |= {key: f"{_EACH}{label} {position}" for position, key in keys.items()}
        ports = self.ports.values()
        return {
            "open": [
                [p.key, autos.get(p.key, "")]
                for p in ports
                if not p.from_config and p.listener.sock is not None
            ],
            "stopped": [p.key for p in ports if p.paused == "stop"],
        }

    def _close_bind(self, listener: Listener, key: str) -> None:
        """gunicorn closes a bind. A reload could not open it again while the old workers have it."""
        if os.getpid() != self._pid or not self.keeps_bind(key):
            vars(listener).pop("close", None)
            listener.close()

    def _as_owned(self, listener: Listener) -> Listener:
        """The same socket as a listener of our own class, so that a reload does not close it."""
        if isinstance(listener, BrokerOwnedListener):
            return listener
        assert listener.sock is not None
        name = listener.sock.getsockname()
        owned: Listener = self._wrap(listener.FAMILY, name, listener.sock.detach())
        return owned

    def _wrap(self, family: int, name: SockAddr | str, fd: int) -> Any:
        listener = OWNED_LISTENERS[family](name, self.cfg, self.log, fd=fd)
        listener.on_close_request = self.on_close_request
        return listener

    # --- opening ------------------------------------------------------------------------------

    def open(self, request: OpenPort, same_user: bool, opened: int | None = None) -> Port:
        """The port of a worker's request, opened now if it is not open yet.

        :param opened: a descriptor of a socket that listens there already; it remains the caller's.
        :raises errors.ListenError: when the worker may not have it, or it cannot be opened.
        """
        if request.kind == "unix":
            return self._open_unix(request, same_user)
        if request.kind == "auto":
            return self._open_auto(request)
        if request.kind == "once":
            return self._open_once(request)
        if request.kind == "tcp":
            return self._open_tcp(request, opened)
        raise listen_errors.bad_address(request.kind[:40], "the worker asked for an unknown kind of address")

    def open_each(self, request: OpenPort, workers: int, age: int, waits: bool = False) -> Port | None:
        """With the placement "each": a port that no other worker has.

        A port whose worker has exited is used again before another is opened, the lowest position first.

        :param workers: the number of workers that gunicorn should run, and so of such ports.
        :param age: the worker that asks.
        :param waits: whether it has asked before.
        :returns: ``None`` when all of them are taken.
        :raises errors.ListenError: when there cannot be as many ports as workers.
        """
        if request.kind == "unix":
            raise listen_errors.each_needs_tcp(request.path)
        label = f"{request.host}/{request.port}/{request.name}"
        keys = self._each.get(label, {})
        for key in keys.values():
            if age in self.ports[key].wanted_by:
                raise listen_errors.duplicate_listen(key)
        for position in sorted(keys):
            if not self.ports[keys[position]].wanted_by:
                return self.ports[keys[position]]
        if len(keys) >= workers:
            return None
        first = 0
        try:
            if request.kind == "tcp":
                port_opening.address_family(request.host)
                self.allocation.check(request.port)
                first = max(request.port, 1)
            port = self._create_auto(request, first, workers - len(keys))
        except errors.ListenError as error:
            if keys:
                # there are more workers than at the start: this one waits for another worker's port
                if not waits:
                    self.log.warning(
                        "gunicorn-passenger: a worker waits until another worker's port is free: %s", error
                    )
                return None
            raise
        port.placement = port.next_placement = "each"
        port.position = next(n for n in range(1, workers + 1) if n not in keys)
        self._each.setdefault(label, {})[port.position] = port.key
        return port

    def _open_tcp(self, request: OpenPort, opened: int | None) -> Port:
        port_opening.address_family(request.host)
        if not 1 <= request.port <= 65535:
            raise listen_errors.bad_port(request.port)
        port = self.ports.get(format_tcp(request.host, request.port))
        if port is None:
            port = self._bound_port(request.host, request.port)
        if port is None or not port.from_config:
            self.allocation.check(request.port)
        if port is None:
            try:
                wanted = self._listen_request(request, "tcp", request.port)
                port = self._create(wanted, opened=opened)
            except errors.PortInUse:
                self._explain_own_port(request.host, request.port)
                raise
        self._raise_backlog(port, _backlog(request))
        return port

    def _bound_port(self, host: str, number: int) -> Port | None:
        """The port of gunicorn's ``bind`` that a server for another host of the same family gets."""
        if number in self._primary_ports():
            return None  # the primary's number, on another address
        bound = [p for p in self.ports.values() if p.from_config and p.port == number]
        family = port_opening.address_family(host)
        # a socket for all IPv6 addresses may serve those of IPv4, too
        return next((p for p in bound if p.family == family or _serves_ipv4(p)), None)

    def _explain_own_port(self, host: str, number: int) -> None:
        """Name the server, where this application itself has the port that is in use.

        :raises errors.PortInUse: with the name.
        """
        own = next((p for p in self.ports.values() if p.port == number), None)
        if number in self._primary_ports():
            owner = "this application itself, whose primary it is (gunicorn's bind)"
        elif own is not None:
            owner = f"this application itself, which holds it as {own.key}"
        else:
            return
        raise listen_errors.in_use(format_tcp(host, number), owner) from None

    def _open_auto(self, request: OpenPort) -> Port:
        label = f"{request.host}/{request.name}"
        port = self.ports.get(self._autos.get(label, ""))
        if port is None:
            port = self._create_auto(request)
            self._autos[label] = port.key
        return port

    def _create_auto(self, request: OpenPort, first: int = 0, needed: int = 0) -> Port:
        in_use = {port.port for port in self.ports.values()} | self._primary_ports()
        return self._create(self._listen_request(request, "auto", first), in_use, needed)

    def _open_once(self, request: OpenPort) -> Port:
        """The right to run a function: a UNIX socket on which no worker accepts stands for it."""
        application = repr((self.cfg.address, self.cfg.chdir, request.name))
        path = os.path.join(runtime_dir.ensure(), f"once-{crc32(application.encode()):08x}.sock")
        return self._open_unix(request.replace(kind="unix", path=path), True)

    def _open_unix(self, request: OpenPort, same_user: bool) -> Port:
        port = self.ports.get(f"unix:{request.path}")
        if port is not None:
            return port
        # The worker chooses the path: a master with more rights than the worker opens none. A master with the
        # same rights may still work in a directory that others can write: see listening_sockets.open_unix
        # and listening_sockets.remove.
        if not same_user:
            raise listen_errors.unix_other_user(request.path, self.allocation.account)
        if not os.path.isabs(request.path) or "\0" in request.path:
            raise listen_errors.bad_address(request.path[:100], "the path of the UNIX socket is not absolute")
        return self._create(self._listen_request(request, "unix", 0))

    def _listen_request(self, request: OpenPort, kind: str, port: int) -> ListenRequest:
        backlog = max(self.cfg.backlog, _backlog(request))
        mode = port_opening.unix_mode(self.cfg.umask)
        return ListenRequest(
            kind, request.host, port, request.path, backlog, request.v6only, mode, request.within
        )

    def _create(
        self,
        request: ListenRequest,
        in_use: Set[int] = frozenset(),
        needed: int = 0,
        opened: int | None = None,
    ) -> Port:
        limit = self.limit()
        if len(self.ports) >= limit:
            raise listen_errors.too_many_ports(limit)
        if opened is None:
            sock = port_opening.open_listener(request, self.allocation, in_use, needed=needed)
        else:
            sock = listening_sockets.listener_of(opened, request.host, request.port)
        family, name = sock.family, sock.getsockname()
        port = _port(self._wrap(family, name, sock.detach()), name)
        port.backlog, port.v6only = request.backlog, request.v6only
        self._add(port)
        return port

    def _primary_ports(self) -> set[int]:
        """The ports on which the primary is served for good."""
        others = [port.listener for port in self.ports.values()]
        names = [
            listener.getsockname()
            for listener in self.listening
            if listener.sock is not None
            and not isinstance(listener, BrokerOwnedListener)
            and listener not in others
        ]
        return {name[1] for name in names if isinstance(name, tuple)}

    @staticmethod
    def limit() -> int:
        """How many ports there may be."""
        return port_opening.port_limit(2)

    def check_share(self, age: int, workers: int) -> None:
        """One worker may not have all of the ports: its siblings need some that do not depend on it.

        Ports that were opened for the worker, and that no worker wants any more, count during their grace
        period.

        :param age: the worker that requests another port.
        :param workers: the number of workers that gunicorn should run.
        :raises errors.ListenError: when it has as many as one worker may have.
        """
        if workers < 2:
            return
        limit = self.limit()
        limit -= limit // 4
        ports = self.ports.values()
        if sum(age in p.wanted_by or (p.opened_for == age and not p.wanted_by) for p in ports) >= limit:
            raise listen_errors.too_many_ports_of_worker(limit)

    def _raise_backlog(self, port: Port, backlog: int) -> None:
        """A program that asks for a longer queue gets it; a shorter one would take from its siblings."""
        if port.backlog and backlog > port.backlog and port.listener.sock is not None:
            with suppress(OSError):
                port.listener.sock.listen(backlog)
                port.backlog = backlog

    def reopen(self, port: Port) -> None:
        """Open a port again that an operator's command has closed.

        :raises OSError: when another program has taken the address.
        """
        kind = "unix" if port.path else "tcp"
        backlog = max(self.cfg.backlog, port.backlog)
        mode = port_opening.unix_mode(self.cfg.umask)
        request = ListenRequest(kind, port.host, port.port, port.path, backlog, port.v6only, mode)
        sock = port_opening.open_listener(request, None)
        port.listener = self._wrap(port.family, sock.getsockname(), sock.detach())
        if port.path:
            port.file = listening_sockets.inode_id(port.path)

    # --- closing ------------------------------------------------------------------------------

    def close(self, key: str, unlink: bool, for_all: bool = False, ages: Iterable[int] = ()) -> None:
        """Close a port that no worker wants any more.

        :param unlink: whether to remove the file of a UNIX socket.
        :param for_all: see :meth:`.BrokerOwnedListener.close_now`.
        :param ages: all workers, which may still count there.
        """
        port = self.ports.pop(key)
        self.idle.restart(key)
        self.quarantine_slot(port, ages)
        self._autos = {label: k for label, k in self._autos.items() if k != key}
        for keys in self._each.values():
            if keys.get(port.position) == key:
                del keys[port.position]
        self._each = {label: keys for label, keys in self._each.items() if keys}
        assert isinstance(port.listener, BrokerOwnedListener)
        port.listener.close_now(for_all)
        if unlink and port.file is not None:
            listening_sockets.remove(port.path, port.file)


def _port(listener: Listener, name: SockAddr | str) -> Port:
    if isinstance(name, tuple):
        family = socket.AF_INET6 if len(name) == 4 else socket.AF_INET
        return Port(format_tcp(name[0], name[1]), listener, host=name[0], port=name[1], family=family)
    port = Port(format_sockname(name), listener, path=str(name), family=socket.AF_UNIX)
    port.file = listening_sockets.inode_id(str(name))
    return port


def _serves_ipv4(port: Port) -> bool:
    """Whether a socket for all IPv6 addresses serves those of IPv4, too (ipv6(7))."""
    sock = port.listener.sock
    if port.host != "::" or sock is None:
        return False
    return not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def _backlog(request: OpenPort) -> int:
    return min(max(request.backlog, 0), 65535)
