"""One open port: its address, the workers that want it, and those that may accept on it.

Process: the master. Never: open or close anything; it is only data.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from gunicorn_passenger.config.gunicorn_types import Listener


@dataclass
class Port:
    """One open address and the workers that want it."""

    key: str
    listener: Listener
    host: str = ""
    port: int = 0
    path: str = ""
    family: int = socket.AF_INET
    #: opened by the operator (gunicorn's bind, systemd): stays open whether a worker wants it or not
    from_config: bool = False
    #: device and inode of a UNIX socket's file, so that only our own file is removed
    file: tuple[int, int] | None = None
    backlog: int = 0
    #: workers that want it: age to the ``id`` of their OpenPort, in the order of their requests
    wanted_by: dict[int, int] = field(default_factory=dict)
    placement: str = "shared"
    #: the placement of the last request; it takes effect once no worker accepts under the old one
    next_placement: str = "shared"
    v6only: bool = False
    #: those of them that may accept
    accepting: set[int] = field(default_factory=set)
    #: with "each": its position among the ports of the server, from 1
    position: int = 0
    #: what the program calls the server
    name: str = ""
    #: where workers count connections and requests (see ipc/scoreboard.py); -1 for nowhere
    slot: int = -1
    #: whether workers count its requests
    counts: bool = True
    #: the worker that it was opened for
    opened_for: int = -1
    #: why no worker may accept: "stop", "restart", or an empty text when they may
    paused: str = ""
    #: whether a server of the program has ever listened on it
    claimed: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether every worker that wants the port accepts on it, and nothing is about to change.

        An application may have a thousand ports, and each of them is checked for every message.
        """
        return (
            len(self.accepting) == len(self.wanted_by)
            and self.placement == self.next_placement != "one"
            and not self.paused
        )

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.name or self.key}.{self.position}" if self.position else self.name or self.key
