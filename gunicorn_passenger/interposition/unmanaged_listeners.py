"""Finds the ports that the program opens without Python's socket module, which the master cannot share.

Process: a worker.
Never: touch such a socket.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic

from gunicorn_passenger.config.address import SockAddr, format_sockname
from gunicorn_passenger.config.settings import OFF, settings
from gunicorn_passenger.interposition.own_fds import fds_of
from gunicorn_passenger.interposition.socket_options import shares_port
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.system import listening_sockets

#: Seconds between the first two searches; each pause is twice as long as the one before, up to the last.
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 300.0


class UnmanagedListeners:
    """Names each such port once in the log."""

    def __init__(self, registry: ServerRegistry, inherited: set[int]) -> None:
        """:param inherited: inodes of the sockets on which the master listened at the fork."""
        self._registry = registry
        self._known = set(inherited)
        self._due = 0.0
        self._pause = _FIRST_PAUSE
        self._servers = -1
        #: those that the last search has found: another thread may have been about to make them managed
        self._suspects: set[int] = set()

    def check(self, managed: Callable[[], set[int]]) -> None:
        """Search now and then, and whenever the program has opened or closed a server.

        :param managed: returns the inodes of the sockets that are not looked for.
        """
        servers = len(self._registry.servers)
        if self._registry.worker.cfg.workers < 2 or (monotonic() < self._due and servers == self._servers):
            return
        self._servers = servers
        self._due = monotonic() + self._pause
        self._pause = min(2 * self._pause, _LAST_PAUSE)
        own = {self._registry.worker.primary_name(), *(server.address for server in self._registry.servers)}
        found = listening_sockets.own_listeners()
        # in this order: another thread may have opened a server in the meantime
        suspects = found.keys() - managed() - self._known
        for inode in suspects & self._suspects:
            name = found[inode]
            self._known.add(inode)
            if not {name, name[:2]} & own and settings.placement(name[1], "") != OFF:
                self._warn(inode, name)
        self._suspects = suspects - self._known
        if self._suspects:
            self._due = 0.0  # search again at the next call

    def _warn(self, inode: int, name: SockAddr) -> None:
        fds = fds_of(inode)
        if not fds:
            return  # closed meanwhile
        with listening_sockets.borrowed_socket(fds[0]) as sock:
            if shares_port(sock):
                consequence = (
                    "each worker has its own queue there (SO_REUSEPORT), which is lost when the worker exits"
                )
            else:
                consequence = "only this worker accepts there"
        self._registry.log.warning(
            "%s was opened without Python's socket module, so the master cannot share it: %s (pid:%s); run "
            "gunicorn with --workers 1, or open the socket in Python",
            format_sockname(name),
            consequence,
            os.getpid(),
        )
