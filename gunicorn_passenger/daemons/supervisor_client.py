"""The client of the supervisor: starts it, sends it commands, reads its events.

Process: the master, and plain Python. Never: block, or leave a daemon behind without a supervisor.
"""

from __future__ import annotations

import _socket
import array
import json
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.daemons import process_tree
from gunicorn_passenger.daemons.run_as import RunAs
from gunicorn_passenger.daemons.spec import DaemonSpec
from gunicorn_passenger.system import procfs, unpatched

if TYPE_CHECKING:
    from gunicorn_passenger.daemons.daemon_exec import DaemonSettings

_SUPERVISOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervisor.py")
#: Bytes of an event: lines of output, each character as the longest JSON escape.
_MAX_PACKET = 1 << 18

#: Variables of gunicorn's, systemd's and our own that a daemon does not get.
_PRIVATE = frozenset(
    {
        "GUNICORN_PID",
        "GUNICORN_FD",
        "SERVER_SOFTWARE",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "PASSENGER_UPGRADE",
        "PASSENGER_DAEMON",
        process_tree.KEY_VARIABLE,
        "PASSENGER_REPORT_FD",
        "PASSENGER_CALL",
    }
)


class SupervisorClient:
    """The supervisor's process, and the channel to it. The supervisor exits when the channel closes."""

    def __init__(self) -> None:
        """
        :raises OSError: when the system gives no socketpair or no process.
        """
        ours, theirs = _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = _spawn(theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._sock = ours
        self._keys: list[str] = []

    def fileno(self) -> int:
        return int(self._sock.fileno())

    def start(
        self,
        spec: DaemonSpec,
        run_as: RunAs,
        listening: Iterable[_socket.socket],
        environ: Mapping[str, str],
        report: _socket.socket | None = None,
    ) -> str:
        """Start a daemon, which the supervisor restarts from now on.

        :param report: a socket that the daemon gets for reports.
        :returns: the daemon's key in the supervisor's events.
        :raises OSError: when the supervisor does not read its channel.
        """
        key = os.urandom(8).hex()
        listening = list(listening)
        env = {name: value for name, value in environ.items() if name not in _PRIVATE}
        if run_as.changes:
            env |= run_as.environment()
        env |= dict(spec.env)
        env["PASSENGER_DAEMON"] = spec.name
        settings: DaemonSettings = {
            "command": list(spec.command),
            "env": env,
            "cwd": spec.cwd,
            "ids": (run_as.uid, run_as.gid, list(run_as.groups)) if run_as.changes else None,
            "names": [spec.name for _ in listening],
            "stop_timeout": spec.stop_timeout,
            "kill_mode": spec.kill_mode,
            "give_up_after": spec.give_up_after,
        }
        with os.fdopen(os.memfd_create("gunicorn-passenger-daemon"), "wb") as file:
            # in a file: an environment may be longer than a packet
            file.write(json.dumps(settings).encode("utf-8", "surrogateescape"))
            file.flush()
            fds = [file.fileno(), *(sock.fileno() for sock in listening)]
            if report is not None:
                fds.append(report.fileno())
            self._send({"command": "start", "key": key}, fds)
        self._keys.append(key)
        return key

    def stop(self, waves: list[list[str]]) -> None:
        """Stop daemons, given by key; the event ``stopped`` follows for each.

        :param waves: the daemons of a wave stop together, when those of the wave before have stopped.
        """
        self._send({"command": "stop", "waves": waves})

    def exit(self) -> None:
        """Have the supervisor exit as soon as no daemon is left."""
        self._send({"command": "exit"})

    def _send(self, message: dict[str, Any], fds: Iterable[int] = ()) -> None:
        numbers = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        self._sock.sendmsg([json.dumps(message).encode()], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> dict[str, Any] | None:
        """The supervisor's next event.

        :returns: ``None`` when the supervisor has exited.
        :raises BlockingIOError: when no event is there yet.
        """
        try:
            data = self._sock.recv(_MAX_PACKET)
        except BlockingIOError:
            raise
        except OSError:
            return None
        message: dict[str, Any] | None = json.loads(data) if data else None
        return message

    def set_blocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def close(self) -> None:
        """In the parent this stops everything; in a forked child it closes only the child's copy."""
        self._sock.close()

    def kill_orphans(self) -> int:
        """The supervisor has died, and its daemons with it: kill the processes that they left behind.

        :returns: the number of these processes.
        """
        self._sock.close()
        with suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        found: set[int] = set()
        # one of them may start another while its siblings die
        for _ in range(3):
            left = process_tree.with_keys(self._keys, procfs.pids())
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            found |= left
            if not left:
                break
        return len(found)

    def forget(self, key: str) -> None:
        """A daemon has stopped, with all of its processes."""
        if key in self._keys:
            self._keys.remove(key)


def _spawn(channel: _socket.socket) -> int:
    """Start the supervisor; the caller, or gunicorn's master, reaps it.

    Not with ``os.fork``, which would call the registered fork handlers while the broker is locked, and not
    with ``subprocess``, parts of which gevent replaces where it has patched the master.
    """
    number = channel.fileno()
    os.set_inheritable(number, True)
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        # gunicorn's own listeners are inheritable
        *(
            (os.POSIX_SPAWN_CLOSE, fd)
            for fd in procfs.own_descriptors()
            if _is_inheritable(fd) and fd not in (0, 1, 2, number)
        ),
    ]
    spawn = unpatched.unpatched("os", "posix_spawn")
    command = [sys.executable, "-I", "-S", _SUPERVISOR, str(number)]
    # these signals wait until the supervisor ignores them
    mask = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
    # a session of its own: Ctrl-C in a terminal is for the master
    return int(spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True, setsigmask=mask))


def _is_inheritable(fd: int) -> bool:
    with suppress(OSError):
        return os.get_inheritable(fd)
    return False
