"""The socket that tells what runs, and takes an operator's word: ``<runtime directory>/<pid>.sock``.

Runs in: the master, in the broker's thread. Must never: wait for a client, or answer another user.

The protocol: a line of JSON in, a line of JSON out.

- ``{"command": "report"}`` is answered by ``{"report": {...}}`` (its keys: :mod:`.report`);
- ``{"command": "restart" | "stop", "name": "..."}`` by ``{"done": "what was done"}``;
- whatever cannot be done by ``{"error": "why"}``.

A connection to the socket has one question, and :data:`PATIENCE` seconds. A standing line
(:meth:`Control.watch_reports`) has as many as it likes, for reports only. The socket's mode is 0600 from the
moment it exists, its directory is the user's alone, and the kernel says who connects (``SO_PEERCRED``,
unix(7)): this user and root, nobody else.
"""

from __future__ import annotations

import _socket
import errno
import json
import os
import select
import socket
import struct
import time
from typing import Any, Protocol

from gunicorn_passenger import errors
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc.channel import Message
from gunicorn_passenger.master.descriptors import Closer
from gunicorn_passenger.master.event_log import EventLog
from gunicorn_passenger.system import listening_sockets, runtime_dir

#: Seconds that a client has for its question and for reading the answer.
PATIENCE = 5.0
#: How many clients are served at a time; more wait in the backlog.
MAX_CLIENTS = 16
_BACKLOG = 64
#: Bytes of a question.
MAX_QUESTION = 4096
#: How many standing lines there may be.
MAX_LINES = 64
#: Seconds without accepting when the system has no descriptor for a client.
_PAUSE = 1.0

#: The client has gone before it was accepted.
_GONE = {errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO}


class ControlBackend(Protocol):
    """What this module asks of the broker."""

    log: Any
    history: EventLog

    def report(self) -> dict[str, Any]: ...
    def command(self, verb: str, name: str) -> str: ...


class ControlConnection:
    """One connection, and what of its question and its answer is there."""

    def __init__(self, sock: Any, deadline: float | None) -> None:
        """:param deadline: monotonic seconds; ``None`` for a standing line."""
        self.sock = sock
        self.deadline = deadline
        self.received = bytearray()
        self.answer = memoryview(b"")
        #: closes descriptors that the client sends, which no question needs
        self.closer = Closer()

    @property
    def standing(self) -> bool:
        return self.deadline is None

    def wanted(self) -> int:
        """What to poll for: an answer goes out before the next question is read.

        A question that came with the one before waits for the next turn: each turn answers one.
        """
        return select.POLLOUT if self.answer or b"\n" in self.received else select.POLLIN


class ControlServer:
    """The control socket of one master: a :class:`~.service.BrokerService`."""

    def __init__(self, broker: ControlBackend) -> None:
        self._broker = broker
        self._listener: Any = None
        self._path = ""
        self._file: tuple[int, int] | None = None
        self._clients: dict[int, ControlConnection] = {}  # by descriptor
        #: until when nothing is accepted (monotonic seconds)
        self._paused_until = 0.0
        self._complained = False

    def open(self) -> None:
        """Make the socket; without one the log says so and the application goes on."""
        try:
            directory = runtime_dir.ensure(
                lambda text: self._broker.log.warning("gunicorn-passenger: %s", text)
            )
            # by path: the directory is this user's alone, and for root so is each one above it
            runtime_dir.clear(directory)
            path = os.path.join(directory, f"{os.getpid()}.sock")
            self._listener = listening_sockets.open_unix(path, 0o600, _BACKLOG)
        except (PassengerError, OSError) as error:
            self._broker.log.warning("gunicorn-passenger: %s", errors.status_unavailable(error))
            return
        self._listener.setblocking(False)
        self._path = path
        self._file = listening_sockets.inode_id(path)

    def watch_reports(self, sock: Any) -> None:
        """Answer on a connected stream socket for as long as it is open: reports and nothing else.

        :param sock: one end of a pair, for a daemon of ours; it is owned from now on. Gate held.
        :raises OSError: when there are too many.
        """
        if sum(client.standing for client in self._clients.values()) >= MAX_LINES:
            sock.close()
            raise OSError(errno.EMFILE, f"the master answers {MAX_LINES} standing lines, which is the limit")
        sock.setblocking(False)
        self._clients[sock.fileno()] = ControlConnection(sock, None)

    # --- the broker's loop -----------------------------------------------------------------------

    def descriptors(self) -> dict[int, int]:
        wanted = {fd: client.wanted() for fd, client in self._clients.items()}
        if self._listener is not None and self._accepts(time.monotonic()):
            wanted[self._listener.fileno()] = select.POLLIN
        return wanted

    def _accepts(self, now: float) -> bool:
        passing = sum(not client.standing for client in self._clients.values())
        return passing < MAX_CLIENTS and now >= self._paused_until

    def serve(self, fd: int, events: int) -> None:
        client = self._clients.get(fd)
        if client is None:
            if self._listener is not None and fd == self._listener.fileno():
                self._accept()
            return
        try:
            if events & select.POLLOUT and client.answer:
                self._send(client)
            elif events & select.POLLOUT:
                self._answer_next(client)
            elif not self._read(client):
                self._drop(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
        except Exception:
            # a mistake of ours; this client would lead to it again in each round
            self._broker.log.exception("gunicorn-passenger: a client of the status socket is given up")
            self._drop(client)

    def tick(self, now: float) -> float | None:
        for client in list(self._clients.values()):
            if client.deadline is not None and now >= client.deadline:
                self._drop(client)
        due = [client.deadline for client in self._clients.values() if client.deadline is not None]
        if self._paused_until > now:
            due.append(self._paused_until)
        return min(due, default=None)

    # --- clients ---------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()
        except OSError as error:
            if error.errno not in _GONE:
                self._pause(error)
            return
        sock = _socket.socket(fileno=fd)
        sock.setblocking(False)
        if not _may_ask(sock):
            sock.close()
            return
        self._clients[fd] = ControlConnection(sock, time.monotonic() + PATIENCE)

    def _pause(self, error: OSError) -> None:
        # the connection stays in the backlog, so the listener would be ready again at once
        self._paused_until = time.monotonic() + _PAUSE
        if not self._complained:
            self._complained = True
            self._broker.log.error(
                "gunicorn-passenger: the status socket cannot accept: %s; raise the limit of open files "
                "(ulimit -n)",
                error.strerror,
            )

    def _read(self, client: ControlConnection) -> bool:
        """:returns: whether the client is still there."""
        data = client.closer.receive(client.sock, MAX_QUESTION + 1 - len(client.received))
        if not data:
            return False
        if client.closer.full:
            return False
        client.received += data
        self._answer_next(client)
        return True

    def _answer_next(self, client: ControlConnection) -> None:
        """Answer the question that is whole, if one is."""
        line, end, rest = client.received.partition(b"\n")
        if end:
            client.received = rest
            answer = self._answer(bytes(line), client)
        elif len(client.received) > MAX_QUESTION:
            client.received.clear()
            answer = {"error": f"the question is longer than {MAX_QUESTION} bytes"}
        else:
            return
        client.answer = memoryview(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        self._send(client)

    def _send(self, client: ControlConnection) -> None:
        while client.answer:
            try:
                sent = client.sock.send(client.answer, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            client.answer = client.answer[sent:]
        if not client.standing:
            self._drop(client)

    def _drop(self, client: ControlConnection) -> None:
        self._clients.pop(client.sock.fileno(), None)
        client.closer.close_socket(client.sock)

    # --- questions -------------------------------------------------------------------------------

    def _answer(self, line: bytes, client: ControlConnection) -> dict[str, Any]:
        try:
            question = json.loads(line)
        except (ValueError, RecursionError):
            question = None
        if not isinstance(question, dict):
            return {"error": "a question is one line with a JSON object"}
        verb, name = question.get("command"), question.get("name")
        try:
            if verb == "report":
                return {"report": self._broker.report()}
            if verb not in ("restart", "stop"):
                return {"error": "there is no such command; there are: report, restart, stop"}
            if client.standing:
                return {"error": f"{verb} is not for this line, which is for reports"}
            if not isinstance(name, str) or not name:
                return {"error": f"{verb} needs a name"}
            return {"done": self._broker.command(verb, name)}
        except PassengerError as error:
            return {"error": str(error)}
        except Exception:
            self._broker.log.exception("gunicorn-passenger: %s failed", verb)
            return {"error": f"the master failed at {verb}; its log tells why"}

    # --- the other occasions of a part -----------------------------------------------------------

    def started(self, arbiter: Any) -> None:
        pass

    def reloaded(self) -> None:
        """Somebody may have removed the file, or mended what was wrong with the directory."""
        self._broker.history.note(
            "reload", "gunicorn has read its configuration again and replaces its workers"
        )
        if self._file is None or listening_sockets.inode_id(self._path) != self._file:
            self._close_listener()
            self.open()

    def message(self, age: int, message: Message) -> Message | None:
        return None

    def left(self, age: int) -> None:
        pass

    def report(self) -> dict[str, Any]:
        return {}

    def command(self, verb: str, name: str) -> str | None:
        return None

    def stop(self) -> None:
        """Remove the file, if it is still ours."""
        if self._file is not None:
            listening_sockets.remove(self._path, self._file)
        self._close_listener()

    def forked(self) -> None:
        self._close_listener()
        for client in self._clients.values():
            client.sock.close()
        self._clients.clear()

    def _close_listener(self) -> None:
        listener, self._listener, self._file = self._listener, None, None
        if listener is not None:
            listener.close()


def _may_ask(sock: Any) -> bool:
    """Whether the kernel says that it is this user who connects, or root."""
    try:
        _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError:
        return False
    return uid in (os.geteuid(), 0)
