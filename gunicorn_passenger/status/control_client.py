"""The client of the masters' control sockets: finds the running applications of this account, and sends them
requests.

Process: the command line, and other processes that are not workers. Never: wait for a master without a limit,
or trust a socket that another user could have made.

The server is :mod:`gunicorn_passenger.status.control_server`.
"""

from __future__ import annotations

import _socket
import base64
import errno
import json
import os
import socket
import time
from typing import Any, NamedTuple

from gunicorn_passenger.config.address import tcp_ports
from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc import channel
from gunicorn_passenger.ipc.report_types import DaemonEntry, Report, ServerEntry
from gunicorn_passenger.system import procfs, runtime_dir
from gunicorn_passenger.system.peer_credentials import peercred
from gunicorn_passenger.system.text import printable

#: Seconds that a master has for its response: more than a busy machine takes, and a person waits that long.
PATIENCE = 10.0
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
    with socket.socket(socket.AF_UNIX) as sock:
        response, fds = _exchange(sock, path, request)
        for fd in fds:
            os.close(fd)
    return response


def _exchange(sock: socket.socket, path: str, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Connect, and send one request.

    :returns: the response, and the descriptors that came with it, which the caller owns.
    """
    deadline = time.monotonic() + PATIENCE
    sock.settimeout(PATIENCE)
    _connect(sock, path, deadline)
    if peercred(sock).uid != os.geteuid():
        raise PermissionError("a process of another user listens on its socket")
    sock.sendall(json.dumps(request).encode() + b"\n")
    received, fds = bytearray(), list[int]()
    try:
        while not received.endswith(b"\n"):
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            fds += channel.received_fds(ancillary)
            if not data or len(received) > _MAX_RESPONSE:
                raise ConnectionError("the response is incomplete")
            received += data
        try:
            response = json.loads(received)
        except (ValueError, RecursionError):
            raise ConnectionError("the response is not JSON") from None
        if "error" in response:
            raise PassengerError(printable(str(response["error"])))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return dict(response), fds


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


def parent_application() -> Instance | None:
    """The application that has started this process, as a daemon of ``spawn()`` or as a child of a worker."""
    pid, ancestors = os.getppid(), set()
    while pid > 0 and (stat := procfs.stat(pid)) is not None:
        ancestors.add(pid)
        pid = stat.parent
    for directory in runtime_dir.directories():
        for pid, path in runtime_dir.status_sockets(directory):
            if pid in ancestors:
                return Instance(pid, path, None)
    return None


def own_application(app: str = "") -> Instance:
    """The application that has started this process; else the only one that runs.

    :param app: the pid or the name of another one.
    :raises PassengerError: when no application runs, or it is not clear which.
    """
    if not app and (parent := parent_application()) is not None:
        return parent
    found = running(app)
    if len(found) == 1:
        return found[0]
    if not found:
        raise PassengerError(f"no {nothing_runs()}")
    labels = ", ".join(one.label for one in found)
    account = account_name(os.geteuid())
    raise PassengerError(f"several applications of account {account} run: {labels}; name one (app=...)")


def nothing_runs() -> str:
    """What a person is told, behind "no"."""
    return f"application of account {account_name(os.geteuid())} runs under gunicorn-passenger"


def publish(path: str, topic: str, data: bytes) -> int:
    """Send the workers of an application a message.

    :param path: its control socket.
    :returns: how many mailboxes have it.
    :raises OSError: when the master does not respond.
    :raises PassengerError: when the message is too long.
    """
    request = {"command": "publish", "topic": topic, "data": base64.b64encode(data).decode()}
    return int(ask(path, request).get("reached", 0))


def subscribe(path: str) -> tuple[socket.socket, _socket.socket]:
    """Have a mailbox for the messages of an application's workers.

    :param path: its control socket.
    :returns: the connection, which the caller keeps open for as long as it reads the mailbox, and the
        receiving end of the mailbox.
    :raises OSError: when the master does not respond.
    :raises PassengerError: when it cannot make a mailbox.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        _, fds = _exchange(sock, path, {"command": "subscribe"})
        if not fds:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        sock.settimeout(None)
        return sock, _socket.socket(fileno=fds[0])
    except BaseException:
        sock.close()
        raise


def _choose(verb: str, name: str, app: str) -> Instance:
    chosen = running(app)
    if not chosen:
        raise PassengerError(f"no {nothing_runs()}")
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
