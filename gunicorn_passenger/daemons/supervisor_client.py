"""The other end of the supervisor: starting it, talking to it, and what a daemon is given.

Runs in: the master, and plain Python. Must never: block, or leave a daemon behind that has no supervisor.
"""

from __future__ import annotations

import _socket
import array
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import format_tcp
from gunicorn_passenger.config.port_allocation import PortAllocation, format_ports, parse_ports
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.spec import DaemonListen, DaemonSpec, RunAs
from gunicorn_passenger.system import listening_sockets, unpatched

_SUPERVISOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervisor.py")
#: Bytes of a packet of the supervisor's: its lines, with all that JSON may make of them.
_MAX_PACKET = 1 << 18

#: What is gunicorn's, systemd's and our own, and no daemon's.
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
        "PASSENGER_DAEMON_KEY",
        "PASSENGER_REPORT_FD",
        "PASSENGER_CALL",
    }
)


class SupervisorClient:
    """The supervisor's process, and the channel to it. It ends when the channel closes."""

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
        who: RunAs,
        listening: Iterable[Any],
        environ: Mapping[str, str],
        report: Any = None,
    ) -> str:
        """Start a daemon, and keep it alive from now on.

        :param report: an end of a pair that the daemon is given.
        :returns: the key under which the supervisor speaks of it.
        :raises OSError: when the supervisor does not listen.
        """
        key = os.urandom(8).hex()
        listening = list(listening)
        env = {name: value for name, value in environ.items() if name not in _PRIVATE}
        if who.changes:
            env |= who.environment()
        env |= dict(spec.env)
        env["PASSENGER_DAEMON"] = spec.name
        facts = {
            "command": spec.command,
            "env": env,
            "cwd": spec.cwd,
            "ids": [who.uid, who.gid, who.groups] if who.changes else [],
            "names": [spec.name for _ in listening],
            "stop_timeout": spec.stop_timeout,
            "give_up_after": spec.give_up_after,
        }
        with os.fdopen(os.memfd_create("gunicorn-passenger-daemon"), "wb") as file:
            # in a file, since an environment may be longer than a packet
            file.write(json.dumps(facts).encode("utf-8", "surrogateescape"))
            file.flush()
            fds = [file.fileno(), *(sock.fileno() for sock in listening)]
            if report is not None:
                fds.append(report.fileno())
            self._send({"do": "start", "key": key}, fds)
        self._keys.append(key)
        return key

    def stop(self, key: str) -> None:
        """End a daemon; the supervisor says when it is gone."""
        self._send({"do": "stop", "key": key})

    def end(self) -> None:
        """End all daemons; then the supervisor exits."""
        self._send({"do": "end"})

    def _send(self, message: dict[str, str], fds: Iterable[int] = ()) -> None:
        numbers = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        self._sock.sendmsg([json.dumps(message).encode()], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> dict[str, Any] | None:
        """What the supervisor says next.

        :returns: ``None`` when it is gone.
        :raises BlockingIOError: when it says nothing.
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
        """In the parent this ends everything; in a forked child it is the child's copy alone."""
        self._sock.close()

    def clear(self) -> int:
        """The supervisor is dead, its daemons with it: kill what they have left.

        :returns: how many processes there were.
        """
        self._sock.close()
        with suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        marks = {f"PASSENGER_DAEMON_KEY={key}".encode() for key in self._keys}
        found: set[int] = set()
        # a process that sees its siblings die may just be starting another
        for _ in range(3):
            left = _marked(marks)
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            found |= left
            if not left:
                break
        return len(found)

    def forget(self, key: str) -> None:
        """A daemon is gone, with all of its processes."""
        if key in self._keys:
            self._keys.remove(key)


def _spawn(channel: Any) -> int:
    """Start the supervisor; the caller, or gunicorn's master, reaps it.

    Not by a fork of Python's: it would call what is registered for forks, and the broker's gate is held.
    ``subprocess`` will not do either: gevent, where it has patched the master, replaces its inner parts.
    """
    number = channel.fileno()
    os.set_inheritable(number, True)
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        # gunicorn's own listeners are inheritable
        *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in (0, 1, 2, number)),
    ]
    spawn = unpatched.unpatched("os", "posix_spawn")
    command = [sys.executable, "-I", "-S", _SUPERVISOR, str(number)]
    # a session of its own: the Ctrl-C of a terminal is the master's to hear
    # signals that would end it wait until it has said that they do not
    mask = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
    return int(spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True, setsigmask=mask))


def _inheritable() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def _marked(marks: set[bytes]) -> set[int]:
    """The processes that live and have one of the marks in their environment."""
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if marks & set(file.read(1 << 20).split(b"\0")):
                found.add(int(name))
    return found


# --- sockets ---------------------------------------------------------------------------------------


@dataclass
class DaemonSocket:
    """A listening socket of a daemon, held for it."""

    want: DaemonListen
    sock: Any
    #: what it is bound to
    host: str = ""
    port: int = 0
    path: str = ""
    #: device and inode of a UNIX socket's file, so that only our own is removed
    file: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else format_tcp(self.host, self.port)

    def close(self, unlink: bool) -> None:
        with suppress(OSError):
            self.sock.close()
        if unlink and self.file is not None:
            listening_sockets.remove(self.path, self.file)


def daemon_socket(want: DaemonListen, sock: Any) -> DaemonSocket:
    """:param sock: a socket that listens."""
    name = listening_sockets.sockname(sock)
    if isinstance(name, tuple):
        return DaemonSocket(want, sock, host=name[0], port=name[1])
    return DaemonSocket(want, sock, path=name, file=listening_sockets.inode_id(name))


def open_daemon_socket(
    want: DaemonListen,
    within: str,
    allocation: PortAllocation,
    backlog: int,
    mode: int,
    holder: Callable[[int], str],
    before: int = 0,
) -> DaemonSocket:
    """Open a socket for a daemon, after the same rules as one for a server.

    :param within: the ports that the program allows itself; empty for all that are allocated.
    :param mode: of a UNIX socket's file.
    :param holder: who in this application holds a port; an empty text for nobody.
    :param before: the port that an "auto" had last, which it gets again if that can be.
    :raises errors.ListenError: when it may not be had, or cannot be opened.
    """
    if want.kind == "unix":
        return daemon_socket(want, listening_sockets.open_unix(want.path, mode, backlog))
    own = parse_ports(within, "the application") if within else None
    family = socket.AF_INET6 if ":" in want.host else socket.AF_INET
    if want.kind == "tcp":
        allocation.check(want.port)
        if who := holder(want.port):
            raise daemon_errors.daemon_port_taken(str(want), who)
        return daemon_socket(want, listening_sockets.open_tcp(family, want.host, want.port, backlog))
    if not allocation.limited and own is None:
        if before and not holder(before):
            with suppress(errors.ListenError):
                return daemon_socket(want, listening_sockets.open_tcp(family, want.host, before, backlog))
        return daemon_socket(want, listening_sockets.open_tcp(family, want.host, 0, backlog))
    ports = allocation.ports if allocation.limited else own or frozenset()
    if own is not None:
        ports &= own
    for number in sorted(ports, key=lambda number: (number != before, number)):
        allocation.check(number)
        if holder(number):
            continue
        try:
            return daemon_socket(want, listening_sockets.open_tcp(family, want.host, number, backlog))
        except errors.PortInUse:
            continue
    raise listen_errors.no_port_free(format_ports(ports), allocation.sources)
