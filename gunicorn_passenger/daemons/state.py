"""A daemon as the master knows it: what was requested, and what has become of it.

Process: the master. Never: start or stop a process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gunicorn_passenger.config.address import format_tcp
from gunicorn_passenger.daemons.daemon_socket import DaemonSocket
from gunicorn_passenger.daemons.run_as import RunAs
from gunicorn_passenger.daemons.spec import DaemonSpec

#: ``DaemonState.state``: what the report shows.
WAITING, RUNNING, PAUSING, FAILED, STOPPING, STOPPED = (
    "waiting", "running", "pausing", "failed", "stopping", "stopped",
)  # fmt: skip


@dataclass
class DaemonState:
    """One daemon, whether it runs or not."""

    spec: DaemonSpec
    run_as: RunAs
    #: whether workers requested it; else the operator did, or a program that was preloaded
    by_workers: bool
    sockets: list[DaemonSocket] = field(default_factory=list)
    #: Host, port and path of each of its sockets. They stay while its sockets are closed after a stop, so
    #: that the address that workers know is valid again after the next start.
    places: list[tuple[str, int, str]] = field(default_factory=list)
    #: the workers that use it, by age
    wanted_by: set[int] = field(default_factory=set)
    #: the number of reloads before it was last requested
    generation: int = 0
    state: str = WAITING
    #: the supervisor's key for it; empty while the supervisor does not run it
    key: str = ""
    pid: int = 0
    #: Unix time
    started: float | None = None
    restarts: int = 0
    #: what to do when it has stopped: "start", "stop" or "forget"
    then: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    def goes_by(self, name: str) -> bool:
        """Whether an operator means this daemon by its name, address or port."""
        addresses = [f"unix:{path}" if path else format_tcp(host, port) for host, port, path in self.places]
        return name in (self.name, *addresses, *(str(port) for _, port, _ in self.places if port))

    def set_sockets(self, sockets: list[DaemonSocket]) -> None:
        self.sockets = sockets
        self.places = [(one.host, one.port, one.path) for one in sockets]

    def set_process(self, pid: int = 0, started: float | None = None) -> None:
        """:param started: Unix time; without a ``pid`` no process runs."""
        self.pid, self.started = pid, started
