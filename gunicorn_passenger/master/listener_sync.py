"""Keeps the broker's ports and gunicorn's list of listeners (``LISTENERS``) in agreement.

Process: the master, in the broker's thread and the arbiter's. Never: close a port because of a reload.

gunicorn closes every listener of its list in two cases: when it stops, and when a reload changes ``bind``.
Our listeners only report such a close (:class:`.BrokerOwnedListener`). Which case it was is known when the
arbiter has replaced its list: by an empty one when it stops (then the ports are closed), by the new binds
after a reload (then they stay, and join that list before the next worker is forked). So do the binds
beside the primary's own that are in the new configuration, too (:meth:`.Listeners.register`).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress

from gunicorn_passenger.config.address import format_sockname, is_unix
from gunicorn_passenger.config.gunicorn_types import Arbiter, Config, Listener
from gunicorn_passenger.ipc.scoreboard import RetiredCounters
from gunicorn_passenger.master.listeners import Listeners
from gunicorn_passenger.master.owned_listener import BrokerOwnedListener
from gunicorn_passenger.master.placement import PlacementScheduler
from gunicorn_passenger.master.port import Port
from gunicorn_passenger.master.worker_channels import WorkerChannels


def primary_listeners(listening: list[Listener]) -> list[Listener]:
    """The listeners of the primary alone: the UNIX ones, or else the first.

    On gunicorn's other binds the primary is served until a server of the program listens there.
    """
    binds = [listener for listener in listening if not isinstance(listener, BrokerOwnedListener)]
    unix = [listener.sock is not None and is_unix(listener.getsockname()) for listener in binds]
    return [listener for listener, primary in zip(binds, primary_among(unix), strict=True) if primary]


def primary_among(unix: list[bool]) -> list[bool]:
    """Which of gunicorn's binds are the primary's alone.

    :param unix: whether each is a UNIX socket.
    """
    return unix if any(unix) else [position == 0 for position in range(len(unix))]


class ListenerSync:
    """The arbiter's list, and the ports in it that are the broker's."""

    def __init__(
        self,
        listeners: Listeners,
        placement: PlacementScheduler,
        workers: WorkerChannels,
        retired_counters: RetiredCounters,
        wake: Callable[[], None],
    ) -> None:
        """
        :param wake: wakes the broker's thread.
        """
        self._listeners = listeners
        self._placement = placement
        self._workers = workers
        self._retired_counters = retired_counters
        self._wake = wake
        #: whether gunicorn has closed a listener of the broker, for a reason that is not known yet
        self.pending = False
        #: gunicorn's bind setting, during a reload without the part of it that is open already
        self._bind: list[str] | None = None
        #: the keys of that part
        self._unopened: set[str] = set()
        listeners.on_close_request = self._on_close_request
        listeners.keeps_bind = self._keeps_bind

    @property
    def _arbiter(self) -> Arbiter | None:
        return self._workers.arbiter

    @property
    def listening(self) -> list[Listener]:
        """The arbiter's list, as far as the broker has seen it."""
        return self._listeners.listening

    def primary(self) -> list[Listener]:
        return primary_listeners(self.listening)

    # --- synchronizing --------------------------------------------------------------------------------

    def reconcile(self, listening: list[Listener], inherited: dict[str, str]) -> None:
        """Make the table of ports and the arbiter's list agree.

        Sockets in the list that are not the primary's come from ``bind``, from systemd, or from programs of
        the previous master; ports that a program opened and that a reload has dropped return to the list.

        :param inherited: the ports of the previous master's programs (see :meth:`.Listeners.export_state`).
        """
        table = self._listeners.ports
        # the reload has removed it from ``bind``
        for key in [k for k, p in table.items() if p.from_config and p.listener.sock is None]:
            self._listeners.quarantine_slot(table.pop(key), self._workers.ages())
            self._retired_counters.forget(key)
        ours = [port.listener for port in table.values()]
        for listener in listening:
            assert listener.sock is not None
            key = format_sockname(listener.sock.getsockname())
            if listener not in ours and key in inherited:
                self._listeners.register(listener, False, inherited[key])
        # registering has replaced some of them
        listening[:] = [listener for listener in listening if listener.sock and listener.sock.fileno() >= 0]
        listening.extend(
            port.listener
            for port in table.values()
            if port.listener not in listening and port.listener.sock is not None
        )
        primary = primary_listeners(listening)
        for listener in listening:
            known = listener in primary or listener in ours or isinstance(listener, BrokerOwnedListener)
            if not known:
                self._listeners.register(listener, True)
        self._listeners.listening = listening

    def on_new_list(self, listening: list[Listener]) -> None:
        """Before the fork of a worker: a reload may have made a new list, without our ports."""
        if listening is not self.listening:
            self.reconcile(listening, {})
            # it was a reload
            self.pending = False
            self._unopened.clear()
            if self._bind is not None and self._arbiter is not None:
                self._arbiter.cfg.set("bind", self._bind)
                self._bind = None

    def add(self, port: Port) -> None:
        self.listening.append(port.listener)

    def remove(self, port: Port) -> None:
        with suppress(ValueError):
            self.listening.remove(port.listener)

    def number_for_systemd(self) -> None:
        """In the child that becomes the new master: systemd's protocol numbers the listeners from 3 on
        (sd_listen_fds(3))."""
        arbiter = self._arbiter
        if arbiter is not None and arbiter.systemd:
            first, count = 3, len(arbiter.LISTENERS)
            spare = [fcntl.fcntl(li.fileno(), fcntl.F_DUPFD, first + count) for li in arbiter.LISTENERS]
            for number, fd in enumerate(spare, first):
                os.dup2(fd, number, inheritable=True)
                os.close(fd)

    # --- stop or reload --------------------------------------------------------------------------

    def _on_close_request(self) -> None:
        """The arbiter closes a listener of the broker: to stop, or because a reload changes ``bind``."""
        arbiter = self._arbiter
        if not self.pending and arbiter is not None and arbiter.cfg is not self._listeners.cfg:
            self._strip_owned_binds(arbiter.cfg)
        self.pending = True
        self._wake()

    def _keeps_bind(self, key: str) -> bool:
        """Whether a bind that gunicorn closes stays open, since it is in the new configuration, too."""
        self._on_close_request()
        return key in self._unopened

    def _strip_owned_binds(self, cfg: Config) -> None:
        """Remove the ports that are open already from ``bind``, until gunicorn has opened the rest.

        gunicorn could not open them, since the old workers still hold them.
        """
        named = [format_sockname(a) if isinstance(a, tuple | str) else "" for a in cfg.address]
        binds = cfg.settings["bind"].get()
        ports = self._listeners.ports
        primary = primary_among([isinstance(a, str) for a in cfg.address])
        # a bind that becomes the primary's has to be the first of gunicorn's own
        stays = [
            key in ports and not (first and ports[key].from_config)
            for key, first in zip(named, primary, strict=True)
        ]
        kept = [bind for bind, open_already in zip(binds, stays, strict=True) if not open_already]
        if kept and kept != binds:
            self._bind = binds
            self._unopened = {key for key, open_already in zip(named, stays, strict=True) if open_already}
            cfg.set("bind", kept)

    def stopping(self) -> bool:
        """Whether the arbiter has closed everything and waits for its workers to exit."""
        arbiter = self._arbiter
        return arbiter is not None and not arbiter.LISTENERS and self.listening is not arbiter.LISTENERS

    def decide_stop_or_reload(self) -> None:
        """Act on a close request, once the arbiter has replaced its list."""
        if not self.pending or self._arbiter is None or self.listening is self._arbiter.LISTENERS:
            return
        self.pending = False
        if not self._arbiter.LISTENERS:
            self.close_all()

    # --- closing ---------------------------------------------------------------------------------

    def close_all(self) -> None:
        """gunicorn stops: close the ports that the broker has opened."""
        unlink = not (self._is_shared() or (self._arbiter is not None and self._arbiter.systemd))
        for key, port in list(self._listeners.ports.items()):
            if isinstance(port.listener, BrokerOwnedListener):
                self._placement.on_port_closed(port)
                # not for all: a worker may accept until gunicorn stops it
                self._listeners.close(key, unlink, ages=self._workers.ages())
        self._placement.stop()

    def close_port(self, port: Port) -> None:
        """Close a port that no worker wants any more."""
        self.remove(port)
        self._placement.on_port_closed(port)
        last = not self._is_shared()
        self._listeners.close(port.key, last, last, self._workers.ages())
        self._retired_counters.forget(port.key)

    def close_stopped(self, port: Port) -> None:
        """Close a port that an operator has stopped; its entry stays."""
        self.remove(port)
        assert isinstance(port.listener, BrokerOwnedListener)
        port.listener.close_now(for_all=not self._is_shared())

    def _is_shared(self) -> bool:
        """Whether another master (``USR2``) may have the same ports."""
        arbiter = self._arbiter
        return arbiter is not None and bool(arbiter.reexec_pid or arbiter.master_pid)

    def close_in_child(self) -> None:
        """In a child that the master has forked, and that is neither a worker nor the new master: close the
        ports, which would stay open as long as the child runs."""
        for port in self._listeners.ports.values():
            if isinstance(port.listener, BrokerOwnedListener):
                self.remove(port)
                port.listener.close_now()

    def close_unused(self, now: float, grace: float) -> list[str]:
        """Close the ports that no worker has wanted for the grace period.

        :param now: monotonic seconds.
        :param grace: the grace period in seconds.
        :returns: the keys of the ports that were closed.
        """
        ports = self._listeners.ports
        unused = [key for key, port in ports.items() if not port.from_config and not port.wanted_by]
        closed = self._listeners.idle.expired(unused, now, grace, self._workers.settled)
        for key in closed:
            self.close_port(ports[key])
        return closed
