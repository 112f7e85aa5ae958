"""The listening sockets of all daemons, which the master opens and holds.

Process: the master, in the broker's thread. Never: put a socket into the arbiter's ``LISTENERS``; a worker of
gunicorn's own classes would accept from it.
"""

from __future__ import annotations

import _socket
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.daemon_socket import DaemonSocket, daemon_socket, open_daemon_socket
from gunicorn_passenger.daemons.spec import DaemonListen, DaemonSpec
from gunicorn_passenger.daemons.state import DaemonState
from gunicorn_passenger.master import upgrade_state
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.system import listening_sockets, port_opening


class DaemonSockets:
    """Opens, keeps and closes the sockets of the daemons, and hands them to the next master (``USR2``)."""

    def __init__(self, broker: Broker, daemons: Mapping[str, DaemonState]) -> None:
        self._broker = broker
        self._daemons = daemons
        #: sockets of the previous master: name of the daemon, index of the socket, the socket
        self.inherited = _inherited()

    def open(
        self, spec: DaemonSpec, held: list[DaemonSocket], places: Sequence[tuple[str, int, str]] = ()
    ) -> list[DaemonSocket]:
        """The sockets of a spec. Those of ``held`` and of the previous master are used again.

        :param places: where they were bound before they were closed.
        :raises errors.ListenError: when one of them cannot be opened; then nothing has changed.
        """
        free = list(held)
        found: list[DaemonSocket] = []
        opened: list[DaemonSocket] = []
        try:
            for want in spec.listen:
                one = next((each for each in free if each.want == want), None)
                if one is not None:
                    free.remove(one)
                else:
                    one = self._take_inherited(spec, len(found))
                    if one is None:
                        before = places[len(found)][1] if len(found) < len(places) else 0
                        one = self._open_one(spec, want, before)
                        self._broker.log.info("Opened %s for the daemon %s", one, spec.name)
                    opened.append(one)
                found.append(one)
        except BaseException:
            for one in opened:
                one.close(unlink=True)
            raise
        return found

    def _take_inherited(self, spec: DaemonSpec, index: int) -> DaemonSocket | None:
        want = spec.listen[index]
        for entry in self.inherited:
            name, place, one = entry
            same = one.want == want and (want.kind != "auto" or (name, place) == (spec.name, index))
            if same:
                self.inherited.remove(entry)
                if one.path:
                    # the last of the masters removes its file
                    one = daemon_socket(want, one.sock)
                # a port outside this master's own port allocation is refused, even when it is inherited
                if want.kind != "unix":
                    try:
                        self._broker.allocation.check(one.port)
                    except errors.ListenError:
                        one.close(unlink=False)
                        raise
                return one
        return None

    def _open_one(self, spec: DaemonSpec, want: DaemonListen, before: int) -> DaemonSocket:
        broker = self._broker
        # a master without a free descriptor could not even start workers
        limit = port_opening.port_limit(4)
        if sum(len(daemon.sockets) for daemon in self._daemons.values()) >= limit:
            raise listen_errors.too_many_ports(limit)
        cfg = broker.cfg
        if want.kind == "tcp":
            broker.allocation.check(want.port)
            if user := self._port_user(want.port):
                raise daemon_errors.daemon_port_taken(str(want), user)
        in_use = {one.port for daemon in self._daemons.values() for one in daemon.sockets}
        in_use |= {port.port for port in broker.listeners.ports.values()}
        mode = port_opening.unix_mode(cfg.umask)
        one = open_daemon_socket(want, spec.within, broker.allocation, cfg.backlog, mode, in_use, before)
        if one.path and (cfg.uid, cfg.gid) != (os.geteuid(), os.getegid()):
            # As gunicorn does for its own sockets: the workers have to reach it. The operator has named the
            # path, but its directory may still be another user's: give() does not follow links.
            with suppress(OSError):
                listening_sockets.give(one.path, cfg.uid, cfg.gid)
        return one

    def _port_user(self, number: int) -> str:
        """The daemon or server of this application that has a port; empty when none has."""
        for daemon in self._daemons.values():
            if any(one.port == number for one in daemon.sockets):
                return f"its daemon {daemon.name!r}"
        for port in self._broker.listeners.ports.values():
            if port.port == number:
                return f"its server on {port.key}"
        return ""

    def close(self, sockets: Iterable[DaemonSocket]) -> None:
        """Close sockets. Their files stay while another master (``USR2``) has the sockets, too."""
        arbiter = self._broker.arbiter
        shared = arbiter is not None and (arbiter.reexec_pid or self.previous_master_runs())
        for one in sockets:
            one.close(unlink=not shared)

    def previous_master_runs(self) -> bool:
        """Whether the master that started this one (``USR2``) still runs; gunicorn itself notices later."""
        before = self._broker.arbiter.master_pid
        return bool(before) and os.getppid() == before

    def close_inherited(self) -> None:
        """Close the sockets of the previous master that no daemon uses any more."""
        for _, _, one in self.inherited:
            one.close(unlink=False)
        self.inherited = []

    def close_in_child(self) -> None:
        """Close the master's sockets."""
        for daemon in self._daemons.values():
            for one in daemon.sockets:
                one.sock.close()
        for _, _, one in self.inherited:
            one.sock.close()

    def export_state(self, lowest: int) -> list[list[Any]]:
        """In the child that is about to become the next master: the sockets for it.

        :param lowest: the lowest number that their descriptors may have.
        :returns: of each: the daemon's name, index, descriptor, kind, host, port and path.
        :raises OSError: when this process has no free descriptor for them.
        """
        entries: list[list[Any]] = []
        for daemon in self._daemons.values():
            for index, one in enumerate(daemon.sockets):
                number = upgrade_state.inheritable(one.sock.fileno(), lowest)
                want = one.want
                entries.append([daemon.name, index, number, want.kind, want.host, want.port, want.path])
        return entries


def _inherited() -> list[tuple[str, int, DaemonSocket]]:
    found = []
    with suppress(ValueError, TypeError):
        for name, index, number, kind, host, port, path in upgrade_state.inherited().pop("daemons", []):
            with suppress(OSError):
                sock = _socket.socket(fileno=number)
                os.set_inheritable(number, False)
                found.append((name, index, daemon_socket(DaemonListen(kind, host, port, path), sock)))
    return found
