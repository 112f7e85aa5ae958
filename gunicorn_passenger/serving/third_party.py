"""A server that is not ours: one of the program's that called ``bind`` and ``listen`` itself.

Process: a worker.
Never: touch the server; all that is known of it is its socket.
"""

from __future__ import annotations

from gunicorn_passenger.serving.port_lease import PortLease
from gunicorn_passenger.serving.server import LISTENING


class ThirdPartyServer:
    """An unmodified server, of which only the listening socket is known."""

    def __init__(
        self,
        base_name: str,
        address: tuple[str, int] | str | None,
        key: str,
        state: str = LISTENING,
        placement: str = "shared",
    ) -> None:
        self.base_name = base_name
        self.address = address
        self.key = key
        self.state = state
        self.placement = placement
        self.position = 0
        #: the right to accept that the master manages; ``None`` for the primary
        self.lease: PortLease | None = None
        #: the slot of the scoreboard in which the worker counts its connections
        self.slot = -1
        #: how many connections it has accepted
        self.accepted = 0

    @property
    def name(self) -> str:
        return f"{self.base_name}.{self.position}" if self.position else self.base_name

    @property
    def listening(self) -> bool:
        return self.state == LISTENING

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.state}>"
