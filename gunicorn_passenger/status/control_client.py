"""The client of the masters' control sockets: finds the running applications of this account, and sends them
requests.

Process: the command line. Never: wait for a master without a limit, or trust a socket that another user
could have made.

The server is :mod:`gunicorn_passenger.status.control_server`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any, NamedTuple

from gunicorn_passenger.config.address import tcp_ports
from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc.report_types import DaemonEntry, Report, ServerEntry
from gunicorn_passenger.system import procfs, runtime_dir
from gunicorn_passenger.system.peer_credentials import peercred
from gunicorn_passenger.system.text import printable

#: Seconds that a master has for its response, also to the status daemon.
PATIENCE = 3.0
#: Bytes of a response; a report has some hundred for each server and worker.
_MAX_RESPONSE = 32 << 20


class Instance(NamedTuple):
    """A running master with a control socket: its report, or why it has sent none."""

    pid: int
    socket: str
    report: Report | None
    error: str = ""

    @property
    def name(self) -> str:
        return str(self.report["name"]) if self.report else ""

    @property
    def label(self) -> str:
        """How an error names it."""
        return printable(f"{self.name or '?'} (pid {self.pid})")

    def has(self, name: str) -> bool:
        """Whether a server or a daemon has this name, address or port."""
        entries: list[ServerEntry | DaemonEntry] = []
        if self.report is not None:
            entries += [*self.report["servers"], *self.report.get("daemons", ())]
        return any(
            name in (str(entry["name"]), entry["address"])
            or (name.isdecimal() and int(name) in tcp_ports(entry["address"] or ""))
            for entry in entries
        )


def find() -> list[Instance]:
    """The running applications of this account, by pid. Removes the sockets of masters that were killed."""
    found = []
    for directory in runtime_dir.directories():
        for pid, path in runtime_dir.status_sockets(directory):
            try:
                response = ask(path, {"command": "report"})
                found.append(Instance(pid, path, response["report"]))
            except (ConnectionRefusedError, FileNotFoundError):
                runtime_dir.remove_if_stale(pid, path)
            except PassengerError as error:
                found.append(Instance(pid, path, None, str(error)))
            except (OSError, KeyError, TypeError) as error:
                found.append(Instance(pid, path, None, f"does not respond ({_reason(error)})"))
    return sorted(found)


def running(app: str = "") -> list[Instance]:
    """The running applications of this account.

    :param app: only those with this pid or name.
    :raises PassengerError: when applications run, but none has that pid or name.
    """
    found = find()
    chosen = [one for one in found if app in ("", str(one.pid), one.name)]
    if found and not chosen:
        labels = ", ".join(one.label for one in found)
        raise PassengerError(f"--app {app}: no such application; running: {labels} (use a name or a pid)")
    return chosen


def ask(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request to the master behind a control socket.

    :returns: its response.
    :raises OSError: when it does not respond, or another user's process listens there.
    :raises PassengerError: when the master reports an error.
    """
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        _connect(sock, path, deadline)
        if peercred(sock).uid != os.geteuid():
            raise PermissionError("a process of another user listens on its socket")
        sock.sendall(json.dumps(request).encode() + b"\n")
        received = bytearray()
        while not received.endswith(b"\n"):
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = sock.recv(1 << 16)
            if not data or len(received) > _MAX_RESPONSE:
                raise ConnectionError("the response is incomplete")
            received += data
    try:
        response = json.loads(received)
    except (ValueError, RecursionError):
        raise ConnectionError("the response is not JSON") from None
    if "error" in response:
        raise PassengerError(printable(str(response["error"])))
    return dict(response)


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            # the backlog is full: connect() fails at once on a UNIX socket with a timeout (unix(7))
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no response within {PATIENCE:g} s"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def command(verb: str, name: str, app: str = "") -> str:
    """``restart`` or ``stop`` a server or a daemon.

    :param name: its name, address or port.
    :param app: the pid or the name of the application, where several applications use that name.
    :returns: one line that says what the master did.
    :raises PassengerError: when the master cannot do it, or the name is ambiguous.
    """
    instance = _choose(verb, name, app)
    try:
        return printable(str(ask(instance.socket, {"command": verb, "name": name})["done"]))
    except (OSError, KeyError) as error:
        raise PassengerError(
            f"the master with pid {instance.pid} did not respond ({_reason(error)}); see its error log"
        ) from None


def own_application(app: str = "") -> Instance:
    """The application that this process belongs to, as a daemon of ``spawn()`` does; else the only one that
    runs.

    :param app: the pid or the name of another one.
    :raises PassengerError: when no application runs, or it is not clear which.
    """
    found = running(app)
    pid, ancestors = os.getpid(), set()
    while (stat := procfs.stat(pid)) is not None and pid > 1:
        ancestors.add(pid)
        pid = stat.parent
    chosen = [one for one in found if one.pid in ancestors] or found
    if len(chosen) == 1:
        return chosen[0]
    account = account_name(os.geteuid())
    if not chosen:
        raise PassengerError(f"no application of account {account} runs under gunicorn-passenger")
    labels = ", ".join(one.label for one in chosen)
    raise PassengerError(f"several applications of account {account} run: {labels}; name one (app=...)")


def publish(instance: Instance, topic: str, text: str) -> int:
    """Send the workers of an application a message.

    :returns: how many workers get it.
    :raises OSError: when the master does not respond.
    :raises PassengerError: when the message is too long.
    """
    request = {"command": "publish", "topic": topic, "text": text}
    return int(ask(instance.socket, request).get("reached", 0))


def _choose(verb: str, name: str, app: str) -> Instance:
    chosen = running(app)
    if not chosen:
        raise PassengerError(
            f"no application of account {account_name(os.geteuid())} runs under gunicorn-passenger"
        )
    if len(chosen) > 1:
        chosen = [one for one in chosen if one.has(name)]
        if not chosen:
            raise PassengerError(
                f"no application has a server or a daemon {name!r}; 'gunicorn-passenger status' lists them"
            )
    if len(chosen) > 1:
        labels = ", ".join(one.label for one in chosen)
        raise PassengerError(
            f"{name!r} is in several applications: {labels}; choose one with "
            f"'gunicorn-passenger {verb} {name} --app PID'"
        )
    return chosen[0]
