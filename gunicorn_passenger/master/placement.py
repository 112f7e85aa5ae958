"""Placement: which worker may accept on which port.

Process: the master, in the broker's thread. Never: let two workers accept where one may, wait, or trust a
worker with more than its own requests.

- ``"shared"``: every worker that wants a port may accept on it.
- ``"one"``: one of them may, the youngest that serves; when it has exited, or released the port, the
  next one. Between two masters (``USR2``) a lock decides (:mod:`.upgrade_lock`).
- ``"each"``: a port has one worker; a worker that finds no free port waits for another worker's.

A worker gets the listening socket when it may accept, and not before.
"""

from __future__ import annotations

from typing import Protocol

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc.messages import (
    AcceptGranted,
    BindClaimed,
    Message,
    OpenPort,
    PauseAccept,
    PortOpened,
)
from gunicorn_passenger.master.event_log import EventLog
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.port import Port
from gunicorn_passenger.master.upgrade_lock import UpgradeLock
from gunicorn_passenger.master.worker_channels import WorkerChannels
from gunicorn_passenger.system.text import printable

#: Seconds between two attempts to acquire the lock that another master holds.
_LOCK_INTERVAL = 0.05
#: What an operator does with the primary on one of gunicorn's binds.
_OF_PRIMARY = {"stop": "remove it from bind and reload", "restart": "reload gunicorn (HUP)"}
#: For how many ports a worker may wait.
_MAX_WAITING = 64


class WorkerMessenger(Protocol):
    """What this module needs of the broker."""

    def send(self, age: int, message: Message, fd: int | None = None) -> bool:
        """Send a worker a message; false when it has exited."""

    def stopping(self) -> bool:
        """Whether gunicorn stops."""

    @property
    def log(self) -> Log:
        """gunicorn's logger."""

    def on_port_opened(self, port: Port) -> None:
        """A port was opened."""

    def close_port(self, port: Port) -> None:
        """Close a port that an operator has stopped; its entry stays."""

    def reopen_port(self, port: Port) -> None:
        """Open it again.

        :raises OSError: when another program has taken the address.
        """


class PlacementScheduler:
    """The requests and grants of all ports."""

    def __init__(
        self,
        listeners: Listeners,
        workers: WorkerChannels,
        upgrade_lock: UpgradeLock,
        event_log: EventLog,
        broker: WorkerMessenger,
    ) -> None:
        self._listeners = listeners
        self._workers = workers
        self.upgrade_lock = upgrade_lock
        self._event_log = event_log
        self._broker = broker
        #: workers whose "each" server has found no free port: age and request
        self._waiting: list[tuple[int, OpenPort]] = []
        #: "one" servers whose port is closed here, and the workers that may still accept there: no other
        #: master may have it yet
        self._draining: dict[str, set[int]] = {}
        #: requests for another socket of a port that the worker has: key, age and ``id``
        self._extra: list[tuple[str, int, int]] = []
        #: the last worker that accepted where one may: key to pid
        self._last: dict[str, object] = {}

    def request(self, age: int, request: OpenPort, same_user: bool, opened: int | None = None) -> PortOpened:
        """A worker wants to listen.

        :param same_user: whether the worker runs as the master's user.
        :param opened: a descriptor of a socket that the worker listens on there; it remains the caller's.
        :returns: the response; an AcceptGranted follows it at once, or later.
        :raises errors.ListenError: when the worker cannot have the port.
        """
        workers = self._workers.planned
        known = set(self._listeners.ports)
        self._listeners.check_share(age, workers)
        if request.placement == "each":
            self._check_waiting(age, request)
            port = self._listeners.open_each(request, workers, age)
        elif request.placement in ("shared", "one"):
            port = self._listeners.open(request, same_user, opened)
        else:
            raise listen_errors.bad_address(
                request.placement[:40], "the worker asked for an unknown placement"
            )
        if port is None:
            self._waiting.append((age, request))
            return PortOpened(request.id, "", granted=False)
        worker = self._workers.by_age(age)
        if worker is not None and worker.primary_binds.get(port.key):
            raise listen_errors.serves_primary(port.key)
        if port.key not in known:
            port.opened_for = age
            self._broker.on_port_opened(port)
        elif age in port.wanted_by:
            return self._share_again(port, age, request)
        if request.placement != "each":
            # a placement changed by a reload takes effect once no worker accepts under the old one
            port.next_placement = request.placement
            if not port.accepting:
                port.placement = request.placement
        self._add_request(port, age, request)
        at_once = port.placement == port.next_placement != "one" and not port.paused
        return PortOpened(request.id, port.key, port.host, port.port, port.path, at_once)

    def _share_again(self, port: Port, age: int, request: OpenPort) -> PortOpened:
        """A worker asks for a port that it has: allowed only for a program that shares the port with itself.

        :raises errors.PortInUse: where the worker may have only one socket.
        """
        if not request.again or port.placement != "shared" or request.placement != "shared" or port.paused:
            raise listen_errors.duplicate_listen(port.key)
        self._extra.append((port.key, age, request.id))
        return PortOpened(request.id, port.key, port.host, port.port, port.path, True)

    def _check_waiting(self, age: int, request: OpenPort) -> None:
        """A worker may wait for one port of a server, and not for too many ports."""
        mine = [other for a, other in self._waiting if a == age]
        if any((o.host, o.port, o.name) == (request.host, request.port, request.name) for o in mine):
            raise listen_errors.duplicate_listen(f"{request.host}:{request.port}")
        if len(mine) >= _MAX_WAITING:
            raise listen_errors.too_many_waiting(_MAX_WAITING)

    def _add_request(self, port: Port, age: int, request: OpenPort) -> None:
        port.wanted_by[age] = request.id
        self._listeners.idle.restart(port.key)
        port.claimed = True
        port.counts = request.counts
        if request.name:
            port.name = request.name
        if port.from_config:
            for other in self._workers:
                if other.primary_binds.get(port.key) is False:
                    del other.primary_binds[port.key]
                    self._broker.send(other.age, BindClaimed(0, port.key))

    def release(self, age: int, key: str, number: int) -> None:
        """A worker no longer wants a port; without a key, the one that its request ``number`` waits for."""
        if not key:
            self._waiting = [(a, request) for a, request in self._waiting if (a, request.id) != (age, number)]
            return
        self._on_drained(age, key)
        port = self._listeners.ports.get(key)
        if port is not None and number in (0, port.wanted_by.get(age)):
            port.wanted_by.pop(age, None)
            port.accepting.discard(age)

    def on_port_closed(self, port: Port) -> None:
        """A port is closed in this master; a worker may accept on it until the message reaches it."""
        self._last.pop(port.key, None)
        if port.placement == "one" and port.accepting:
            self._draining[port.key] = set(port.accepting)
        else:
            self.upgrade_lock.release(port.key)

    def _on_drained(self, age: int, key: str) -> None:
        ages = self._draining.get(key)
        if ages is not None:
            ages.discard(age)
            if not ages:
                del self._draining[key]
                self.upgrade_lock.release(key)

    def stop(self) -> None:
        """gunicorn stops: no worker gets a grant any more."""
        self._waiting.clear()
        self._extra.clear()

    def on_accept_paused(self, age: int, key: str) -> None:
        """A worker has stopped accepting, as PauseAccept requested."""
        port = self._listeners.ports.get(key)
        if port is not None:
            port.accepting.discard(age)

    def on_worker_gone(self, age: int) -> None:
        """A worker has exited, or has stopped accepting for good."""
        self._waiting = [(a, request) for a, request in self._waiting if a != age]
        for key in list(self._draining):
            self._on_drained(age, key)
        for port in self._listeners.ports.values():
            port.wanted_by.pop(age, None)
            port.accepting.discard(age)

    def schedule(self, now: float) -> float | None:
        """Grant what can be granted. Called in every iteration of the broker's loop.

        :returns: when to call it again (monotonic seconds); ``None`` when only a message matters.
        """
        due = None
        if self._broker.stopping():
            return None
        for age, request in list(self._waiting):
            self._retry_each(age, request)
        extra, self._extra = self._extra, []
        for key, age, number in extra:
            again = self._listeners.ports.get(key)
            if again is not None and not again.paused:
                self._send_grant(again, age, number)
        for port in list(self._listeners.ports.values()):
            if port.is_settled:
                continue
            if not port.accepting and port.placement != "each":
                port.placement = port.next_placement
            if port.paused and not self._may_resume(port):
                continue
            if port.placement not in (port.next_placement, "each"):
                continue
            if port.placement == "one":
                if not self._grant_to_one(port):
                    due = now + _LOCK_INTERVAL
            else:
                for age in [a for a in port.wanted_by if a not in port.accepting]:
                    self._grant(port, age)
        return due

    def _retry_each(self, age: int, request: OpenPort) -> None:
        known = set(self._listeners.ports)
        try:
            port = self._listeners.open_each(request, self._workers.planned, age, waits=True)
        except errors.PassengerError:
            return
        if port is not None:
            self._waiting.remove((age, request))
            if port.key not in known:
                port.opened_for = age
                self._broker.on_port_opened(port)
            self._add_request(port, age, request)

    def _grant_to_one(self, port: Port) -> bool:
        """:returns: false when another master holds its lock."""
        if port.accepting:
            return True
        able = [age for age in port.wanted_by if self._workers.is_serving(age)]
        if not able:
            self.upgrade_lock.release(port.key)
            return True
        if not self.upgrade_lock.acquire(port.key):
            return False
        for age in sorted(able, reverse=True):
            if self._grant(port, age):
                before, pid = self._last.get(port.key), self._workers.pid(age)
                self._last[port.key] = pid
                if before is not None:
                    text = f"{port.title} ({port.key}): worker {pid} after worker {before}"
                    self._event_log.record("takeover", text)
                return True
        return False

    def _grant(self, port: Port, age: int) -> bool:
        port.accepting.add(age)
        return self._send_grant(port, age, port.wanted_by[age])

    def _send_grant(self, port: Port, age: int, number: int) -> bool:
        granted = AcceptGranted(number, port.key, port.host, port.port, port.path, port.slot, port.position)
        return self._broker.send(age, granted, port.listener.fileno())

    # --- commands of an operator -----------------------------------------------------------------

    def command(self, verb: str, name: str) -> str | None:
        """``stop`` or ``restart`` all servers with a name, an address or a port.

        :returns: what was done; ``None`` when no server has that name.
        :raises PassengerError: when it cannot be done.
        """
        ports = [
            p
            for p in self._listeners.ports.values()
            if name in (p.name, p.title, p.key, printable(p.key), str(p.port or p.key))
        ]
        for port in ports:
            if port.from_config and not port.wanted_by:
                raise PassengerError(
                    f"{port.key} is in gunicorn's bind, and no server of the program listens there: the "
                    f"primary does; to {verb} it, {_OF_PRIMARY[verb]}"
                )
            if port.from_config and verb == "stop":
                raise PassengerError(
                    f"{port.title} listens on {port.key}, which is in gunicorn's bind: remove it from bind "
                    "and reload"
                )
        for port in ports:
            if verb == "restart" and port.listener.sock is None:
                try:
                    self._broker.reopen_port(port)
                except OSError as error:
                    raise PassengerError(f"{port.title} cannot be opened again: {error}") from None
        done = {"stop": "stopped", "restart": "restarted"}[verb]
        for port in ports:
            port.paused = verb
            for age in list(port.accepting):
                self._broker.send(age, PauseAccept(0, port.key))
            self._event_log.record(verb, f"{port.title} ({port.key}) was {done} by an operator")
        return ", ".join(f"{done} {port.title} ({port.key})" for port in ports) or None

    def _may_resume(self, port: Port) -> bool:
        """Whether workers may accept again: all have stopped accepting, and the command was ``restart``."""
        if port.accepting:
            return False
        closed = port.listener.sock is None
        if port.paused == "stop":
            if not closed:
                self._broker.close_port(port)
            return False
        if closed:
            try:
                self._broker.reopen_port(port)
            except OSError as error:
                self._event_log.record("error", f"{port.title} cannot be opened again: {error}")
                self._broker.log.error(
                    "gunicorn-passenger: %s cannot be opened again: %s; it stays stopped", port.title, error
                )
                port.paused = "stop"
                return False
        port.paused = ""
        return True
