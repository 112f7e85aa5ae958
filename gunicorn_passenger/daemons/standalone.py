"""The daemons of a program that runs with plain ``python``: children of its process, which end with it.

Process: plain Python. Never: run under gunicorn.
"""

from __future__ import annotations

import atexit
import os
from contextlib import suppress

from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.daemon_socket import DaemonSocket, open_daemon_socket
from gunicorn_passenger.daemons.run_as import resolve_run_as
from gunicorn_passenger.daemons.spec import DaemonSpec, check_after, stop_waves
from gunicorn_passenger.daemons.supervisor_client import SupervisorClient
from gunicorn_passenger.serving import standalone
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.port_opening import DEFAULT_BACKLOG
from gunicorn_passenger.system.text import printable


class StandaloneDaemons:
    """The daemons of this process."""

    def __init__(self) -> None:
        self._supervisor: SupervisorClient | None = None
        self._sockets: list[DaemonSocket] = []
        #: by the supervisor's key, in the order of spawn()
        self._specs: dict[str, DaemonSpec] = {}

    def spawn(self, spec: DaemonSpec) -> tuple[str, int] | str | None:
        """Start a daemon.

        :returns: the address of its first socket.
        :raises PassengerError: when it cannot be started.
        """
        names = [known.name for known in self._specs.values()]
        if spec.name in names:
            raise daemon_errors.duplicate_daemon_name(spec.name)
        check_after(spec, names)
        spec.find_command(dict(spec.env).get("PATH", os.environ.get("PATH")))
        run_as = resolve_run_as(spec, os.geteuid(), os.getegid(), False, True)
        listening: list[DaemonSocket] = []
        try:
            for item in spec.listen:
                listening.append(
                    open_daemon_socket(
                        item, spec.within, standalone.program_allocation(), DEFAULT_BACKLOG, 0o600
                    )
                )
            if self._supervisor is None:
                self._supervisor = self._start_supervisor()
            key = self._supervisor.start(spec, run_as, [one.sock for one in listening], os.environ)
        except BaseException:
            for one in listening:
                one.close(unlink=True)
            raise
        self._specs[key] = spec
        self._sockets += listening
        first = listening[0] if listening else None
        return None if first is None else str(first) if first.path else (first.host, first.port)

    def _start_supervisor(self) -> SupervisorClient:
        supervisor = SupervisorClient()
        supervisor.set_blocking(True)
        atexit.register(self._stop, supervisor)
        os.register_at_fork(after_in_child=lambda: self._forked(supervisor))
        unpatched.start_thread(lambda: self._print_output(supervisor))
        return supervisor

    def _print_output(self, supervisor: SupervisorClient) -> None:
        """The thread that prints the daemons' output to standard error."""
        while (event := supervisor.receive()) is not None:
            spec = self._specs.get(event.get("key", ""))
            name = spec.name if spec is not None else ""
            lines = event.get("lines", [])
            if event["event"] == "exited":
                lines = [f"{event['how']}; it is started again"] if "pause" in event else [event["how"]]
            elif event["event"] == "given_up":
                lines = ["it is not started again: it has exited too often within seconds"]
            for line in lines:
                with suppress(OSError, ValueError):
                    os.write(2, f"[{name}] {printable(line.rstrip(chr(13)), keep=chr(9))}\n".encode())

    def _stop(self, supervisor: SupervisorClient) -> None:
        """Stop the daemons and wait for the supervisor: their ports are free when the program has exited."""
        keys = {spec.name: key for key, spec in self._specs.items()}
        with suppress(OSError):
            supervisor.stop([[keys[spec.name] for spec in wave] for wave in stop_waves(self._specs.values())])
            supervisor.exit()
        for one in self._sockets:
            one.close(unlink=True)
        with suppress(OSError, ChildProcessError):
            unpatched.unpatched("os", "waitpid")(supervisor.pid, 0)

    def _forked(self, supervisor: SupervisorClient) -> None:
        atexit.unregister(self._stop)
        supervisor.close()
        for one in self._sockets:
            one.close(unlink=False)


standalone_daemons = StandaloneDaemons()
