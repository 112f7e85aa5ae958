"""Who may accept where: the placements.

Runs in: the master, in the broker's thread. Must never: let two workers accept where one may, wait, or trust
a worker with more than its own wishes.

- ``"shared"``: every worker that wants a port may accept on it.
- ``"one"``: one of them may, the youngest that serves; when it is gone, or has given the port back, the
  next. Between two masters (``USR2``) a lock decides (:mod:`.upgrade_lock`).
- ``"each"``: a port has one worker; who finds none free waits for another's.

A worker gets the listening socket when it may accept, and not before.
"""

from __future__ import annotations

from typing import Any, Protocol

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.port_allocation import PortAllocation
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.channel import AcceptGranted, OpenPort, PauseAccept, PortOpened
from gunicorn_passenger.master.event_log import EventLog
from gunicorn_passenger.master.listeners import Listeners, Port
from gunicorn_passenger.master.upgrade_lock import UpgradeLock
from gunicorn_passenger.system.text import printable

#: How often the lock of another master is tried, in seconds.
_TRY = 0.05
#: For how many ports a worker may wait.
_MOST = 64


class WorkerMessenger(Protocol):
    """What this module asks of the broker."""

    def serving(self, age: int) -> bool:
        """Whether a worker is ready and not leaving."""

    def tell(self, age: int, message: channel.Message, fd: int | None = None) -> bool:
        """Send a worker a message; false when it is gone."""

    def pid(self, age: int) -> object:
        """A worker's pid, for people."""

    def stopping(self) -> bool:
        """Whether gunicorn stops."""

    @property
    def log(self) -> Any:
        """gunicorn's logger."""

    def opened(self, port: Port) -> None:
        """A port was opened."""

    def shut(self, port: Port) -> None:
        """A port is to be closed, and to be remembered."""

    def reopen(self, port: Port) -> None:
        """Open it again."""


class PlacementScheduler:
    """Wishes and grants of all ports."""

    def __init__(
        self, listeners: Listeners, exclusive: UpgradeLock, history: EventLog, crew: WorkerMessenger
    ) -> None:
        self._listeners = listeners
        self.exclusive = exclusive
        self._history = history
        self._crew = crew
        #: workers whose "each" server has found no port free: age and question
        self._waiting: list[tuple[int, OpenPort]] = []
        #: "one" servers whose port is closed here, and who still accepts there: another master may have it
        self._ending: dict[str, set[int]] = {}
        #: sockets of a port that a worker has, and wants once more: key, age and question
        self._extra: list[tuple[str, int, int]] = []
        #: the last worker that accepted where one may: key to pid
        self._last: dict[str, object] = {}
        #: what the last round allowed and how many workers there are to be
        self._allocation = PortAllocation("")
        self._workers = 1

    def want(
        self, age: int, ask: OpenPort, allocation: PortAllocation, same_user: bool, workers: int
    ) -> PortOpened:
        """A worker wants to listen.

        :param workers: how many there are to be.
        :returns: the answer; a grant follows it at once, or later.
        :raises errors.ListenError: when it cannot.
        """
        self._allocation, self._workers = allocation, workers
        known = set(self._listeners.ports)
        self._listeners.check_share(age, workers)
        if ask.placement == "each":
            self._check_waiting(age, ask)
            port = self._listeners.open_each(ask, allocation, workers, age)
        elif ask.placement in ("shared", "one"):
            port = self._listeners.open(ask, allocation, same_user)
        else:
            raise listen_errors.bad_address(ask.placement[:40], "the worker asked for an unknown placement")
        if port is None:
            self._waiting.append((age, ask))
            return PortOpened(ask.id, "", granted=False)
        if port.key not in known:
            port.opened_for = age
            self._crew.opened(port)
        elif age in port.wanted_by:
            return self._again(port, age, ask)
        if ask.placement != "each":
            # what a reload changes holds when nobody accepts by the rule of before
            port.next_placement = ask.placement
            if not port.accepting:
                port.placement = ask.placement
        self._wanted(port, age, ask)
        at_once = port.placement == port.next_placement != "one" and not port.paused
        return PortOpened(ask.id, port.key, port.host, port.port, port.path, at_once)

    def _again(self, port: Port, age: int, ask: OpenPort) -> PortOpened:
        """A worker asks for what it has: right only for a program that shares the port with itself.

        :raises errors.PortInUse: where one socket of the worker's is all that there may be.
        """
        if not ask.again or port.placement != "shared" or ask.placement != "shared" or port.paused:
            raise listen_errors.duplicate_listen(port.key)
        self._extra.append((port.key, age, ask.id))
        return PortOpened(ask.id, port.key, port.host, port.port, port.path, True)

    def _check_waiting(self, age: int, ask: OpenPort) -> None:
        """One wish of a kind for each worker, and not too many."""
        mine = [other for a, other in self._waiting if a == age]
        if any((o.host, o.port, o.name) == (ask.host, ask.port, ask.name) for o in mine):
            raise listen_errors.duplicate_listen(f"{ask.host}:{ask.port}")
        if len(mine) >= _MOST:
            raise listen_errors.too_many_ports(_MOST)

    @staticmethod
    def _wanted(port: Port, age: int, ask: OpenPort) -> None:
        port.wanted_by[age] = ask.id
        port.idle_since = None
        port.claimed = True
        port.counts = ask.counts
        if ask.name:
            port.name = ask.name

    def release(self, age: int, key: str, number: int) -> None:
        """A worker no longer wants a port; without a key, what the question of that number waits for."""
        if not key:
            self._waiting = [(a, ask) for a, ask in self._waiting if (a, ask.id) != (age, number)]
            return
        self._ended(age, key)
        port = self._listeners.ports.get(key)
        if port is not None and number in (0, port.wanted_by.get(age)):
            port.wanted_by.pop(age, None)
            port.accepting.discard(age)

    def leaving(self, age: int) -> None:
        """A worker accepts nowhere any more."""
        self.gone(age)

    def dropped(self, port: Port) -> None:
        """A port is closed in this master; a worker may accept on it until it hears of it."""
        self._last.pop(port.key, None)
        if port.placement == "one" and port.accepting:
            self._ending[port.key] = set(port.accepting)
        else:
            self.exclusive.give(port.key)

    def _ended(self, age: int, key: str) -> None:
        ages = self._ending.get(key)
        if ages is not None:
            ages.discard(age)
            if not ages:
                del self._ending[key]
                self.exclusive.give(key)

    def stop(self) -> None:
        """gunicorn stops: nobody gets anything any more."""
        self._waiting.clear()
        self._extra.clear()

    def paused(self, age: int, key: str) -> None:
        """A worker has stopped to accept, as it was told."""
        port = self._listeners.ports.get(key)
        if port is not None:
            port.accepting.discard(age)

    def gone(self, age: int) -> None:
        """A worker is gone."""
        self._waiting = [(a, ask) for a, ask in self._waiting if a != age]
        for key in list(self._ending):
            self._ended(age, key)
        for port in self._listeners.ports.values():
            port.wanted_by.pop(age, None)
            port.accepting.discard(age)

    def settle(self, now: float) -> float | None:
        """Grant what can be granted. Called in every round.

        :returns: when to be called again (monotonic seconds), if no message will come.
        """
        due = None
        if self._crew.stopping():
            return None
        for age, ask in list(self._waiting):
            self._try_again(age, ask)
        extra, self._extra = self._extra, []
        for key, age, number in extra:
            again = self._listeners.ports.get(key)
            if again is not None and not again.paused:
                self._tell(again, age, number)
        for port in list(self._listeners.ports.values()):
            if not port.accepting and port.placement != "each":
                port.placement = port.next_placement
            if port.paused and not self._resumes(port):
                continue
            if port.placement not in (port.next_placement, "each"):
                continue
            if port.placement == "one":
                if not self._give_to_one(port):
                    due = now + _TRY
            else:
                for age in [a for a in port.wanted_by if a not in port.accepting]:
                    self._grant(port, age)
        return due

    def _try_again(self, age: int, ask: OpenPort) -> None:
        known = set(self._listeners.ports)
        try:
            port = self._listeners.open_each(ask, self._allocation, self._workers, age, waits=True)
        except errors.PassengerError:
            return
        if port is not None:
            self._waiting.remove((age, ask))
            if port.key not in known:
                port.opened_for = age
                self._crew.opened(port)
            self._wanted(port, age, ask)

    def _give_to_one(self, port: Port) -> bool:
        """:returns: false when another master has it."""
        if port.accepting:
            return True
        able = [age for age in port.wanted_by if self._crew.serving(age)]
        if not able:
            self.exclusive.give(port.key)
            return True
        if not self.exclusive.take(port.key):
            return False
        for age in sorted(able, reverse=True):
            if self._grant(port, age):
                before, pid = self._last.get(port.key), self._crew.pid(age)
                self._last[port.key] = pid
                if before is not None:
                    text = f"{port.title} ({port.key}): worker {pid} after worker {before}"
                    self._history.note("takeover", text)
                return True
        return False

    def _grant(self, port: Port, age: int) -> bool:
        port.accepting.add(age)
        return self._tell(port, age, port.wanted_by[age])

    def _tell(self, port: Port, age: int, number: int) -> bool:
        granted = AcceptGranted(number, port.key, port.host, port.port, port.path, port.slot, port.position)
        return self._crew.tell(age, granted, port.listener.fileno())

    # --- on an operator's word -------------------------------------------------------------------

    def command(self, verb: str, name: str) -> str | None:
        """``stop`` or ``restart`` all servers with a name or an address.

        :returns: what was done; ``None`` when there are none.
        :raises PassengerError: when it cannot be done.
        """
        ports = [
            p for p in self._listeners.ports.values() if name in (p.name, p.title, p.key, printable(p.key))
        ]
        for port in ports:
            if port.bound and verb == "stop":
                raise PassengerError(
                    f"{port.title} listens on {port.key}, which is in gunicorn's bind: take it out there "
                    "and reload"
                )
        for port in ports:
            if verb == "restart" and port.listener.sock is None:
                try:
                    self._crew.reopen(port)
                except OSError as error:
                    raise PassengerError(f"{port.title} cannot be opened again: {error}") from None
        for port in ports:
            port.paused = verb
            for age in list(port.accepting):
                self._crew.tell(age, PauseAccept(0, port.key))
            self._history.note(verb, f"{port.title} ({port.key})")
        done = {"stop": "stopped", "restart": "restarted"}[verb]
        return ", ".join(f"{done} {port.title} ({port.key})" for port in ports) or None

    def _resumes(self, port: Port) -> bool:
        """Whether workers may accept again: all have stopped, and it was to be a restart."""
        if port.accepting:
            return False
        closed = port.listener.sock is None
        if port.paused == "stop":
            if not closed:
                self._crew.shut(port)
            return False
        if closed:
            try:
                self._crew.reopen(port)
            except OSError as error:
                self._history.note("error", f"{port.title} cannot be opened again: {error}")
                self._crew.log.error("gunicorn-passenger: %s cannot be opened again: %s", port.title, error)
                port.paused = "stop"
                return False
        port.paused = ""
        return True
