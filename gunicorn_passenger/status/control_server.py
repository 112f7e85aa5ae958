"""The control socket of a master, ``<runtime directory>/<pid>.sock``: sends the report, takes commands.

Process: the master, in the broker's thread. Never: wait for a client, or respond to another user.

The protocol: a request is a line of JSON, and so is its response.

- ``{"command": "report"}``: ``{"report": {...}}`` (its keys: :mod:`.report`);
- ``{"command": "restart" | "stop", "name": "..."}``: ``{"done": "what the master did"}``;
- ``{"command": "publish", "topic": "...", "data": "..."}``, which sends the workers a message, in base64:
  ``{"reached": 4}``, the number of mailboxes that have it;
- ``{"command": "subscribe"}``: ``{"subscribed": true}`` with the descriptor of a mailbox, in which the
  workers put their messages for as long as the client keeps the connection open;
- a request that fails: ``{"error": "why"}``.

A connection to the socket has one request, and :data:`PATIENCE` seconds. A persistent connection
(:meth:`ControlServer.watch_reports`) has any number of them, for reports only. A client that has subscribed
keeps its connection. The socket has the mode 0600 from the moment it exists, only this user may enter its
directory, and the kernel says which user connects (``SO_PEERCRED``, unix(7)): only this user and root may.
"""

from __future__ import annotations

import _socket
import array
import base64
import errno
import json
import os
import select
import socket
import time
from typing import Any

from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.descriptors import Closer
from gunicorn_passenger.master.service import BrokerService
from gunicorn_passenger.system import listening_sockets, runtime_dir
from gunicorn_passenger.system.peer_credentials import peercred

#: Seconds that a client has for sending its request and for reading the response.
PATIENCE = 5.0
#: How many clients are served at a time; more wait in the backlog.
MAX_CLIENTS = 16
_BACKLOG = 64
#: Bytes of a request, and of one on a persistent connection, which is for reports only.
MAX_REQUEST = 1 << 20
MAX_PERSISTENT_REQUEST = 4096
_READ_SIZE = 1 << 16
#: Limit of persistent connections.
MAX_PERSISTENT = 64
#: Seconds without accepting after the process has run out of descriptors.
_PAUSE = 1.0

#: The client closed its connection before it was accepted.
_GONE = {errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO}


class ControlConnection:
    """One connection, with what it has received of a request and not yet sent of a response."""

    def __init__(self, sock: _socket.socket, deadline: float | None) -> None:
        """:param deadline: monotonic seconds; ``None`` for a persistent connection."""
        self.sock = sock
        self.deadline = deadline
        self.received = bytearray()
        self.response = memoryview(b"")
        #: the client's mailbox, and its receiving end until that is sent
        self.tag = ""
        self.mailbox: _socket.socket | None = None
        #: closes descriptors that the client sends, which no request needs
        self.closer = Closer()

    @property
    def persistent(self) -> bool:
        return self.deadline is None or bool(self.tag)

    @property
    def max_request(self) -> int:
        return MAX_PERSISTENT_REQUEST if self.persistent else MAX_REQUEST

    def wanted(self) -> int:
        """What to poll for: a response is sent before the next request is read.

        Each round of the loop serves one request of a client; a second one waits for the next round.
        """
        return select.POLLOUT if self.response or b"\n" in self.received else select.POLLIN


class ControlServer(BrokerService):
    """The control socket of one master: a :class:`~.service.BrokerService`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._listener: Any = None
        self._path = ""
        self._file: tuple[int, int] | None = None
        self._clients: dict[int, ControlConnection] = {}  # by descriptor
        #: until when nothing is accepted (monotonic seconds)
        self._paused_until = 0.0
        self._logged_pause = False

    def open(self) -> None:
        """Make the socket; when that fails, the log says so and the application runs without one."""
        try:
            directory = runtime_dir.ensure(
                lambda text: self._broker.log.warning("gunicorn-passenger: %s", text)
            )
            # by path: only this user may write the directory, and for root also each one above it
            runtime_dir.clear(directory)
            path = os.path.join(directory, f"{os.getpid()}.sock")
            self._listener = listening_sockets.open_unix(path, 0o600, _BACKLOG)
        except (PassengerError, OSError) as error:
            self._broker.log.warning(
                "gunicorn-passenger: 'gunicorn-passenger status' will not find this application, which "
                "otherwise runs normally: %s",
                error,
            )
            return
        self._listener.setblocking(False)
        self._path = path
        self._file = listening_sockets.inode_id(path)

    def watch_reports(self, sock: _socket.socket) -> None:
        """Send reports, and nothing else, on a connected stream socket for as long as it is open.

        Called with the broker locked.

        :param sock: one end of a pair, for a status daemon; this object closes it.
        :raises OSError: when there are too many of them.
        """
        if self._is_full():
            sock.close()
            raise OSError(errno.EMFILE, f"{MAX_PERSISTENT} daemons already get reports, which is the limit")
        sock.setblocking(False)
        self._clients[sock.fileno()] = ControlConnection(sock, None)

    def _is_full(self) -> bool:
        return sum(client.persistent for client in self._clients.values()) >= MAX_PERSISTENT

    # --- the broker's loop -----------------------------------------------------------------------

    def descriptors(self) -> dict[int, int]:
        wanted = {fd: client.wanted() for fd, client in self._clients.items()}
        if self._listener is not None and self._accepts(time.monotonic()):
            wanted[self._listener.fileno()] = select.POLLIN
        return wanted

    def _accepts(self, now: float) -> bool:
        transient = sum(not client.persistent for client in self._clients.values())
        return transient < MAX_CLIENTS and now >= self._paused_until

    def serve(self, fd: int, events: int) -> None:
        client = self._clients.get(fd)
        if client is None:
            if self._listener is not None and fd == self._listener.fileno():
                self._accept()
            return
        try:
            if events & select.POLLOUT and client.response:
                self._send(client)
            elif events & select.POLLOUT:
                self._serve_next(client)
            elif not self._read(client):
                self._drop(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
        except Exception:
            # a bug in this package; this client would trigger it again in each round
            self._broker.log.exception(
                "gunicorn-passenger: internal error in the control socket; the client's connection is closed"
            )
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
        if not self._logged_pause:
            self._logged_pause = True
            self._broker.log.error(
                "gunicorn-passenger: the control socket cannot accept connections: %s; raise the limit on "
                "open files (ulimit -n)",
                error.strerror,
            )

    def _read(self, client: ControlConnection) -> bool:
        """:returns: whether the client is still connected."""
        data = client.closer.receive(
            client.sock, min(_READ_SIZE, client.max_request + 1 - len(client.received))
        )
        if not data:
            return False
        if client.closer.full:
            return False
        client.received += data
        self._serve_next(client)
        return True

    def _serve_next(self, client: ControlConnection) -> None:
        """Respond to the next complete request, if there is one."""
        line, end, rest = client.received.partition(b"\n")
        if end:
            client.received = rest
            response = self._respond(bytes(line), client)
        elif len(client.received) > client.max_request:
            client.received.clear()
            response = {"error": f"the request is longer than {client.max_request} bytes"}
        else:
            return
        client.response = memoryview(json.dumps(response, separators=(",", ":")).encode() + b"\n")
        self._send(client)

    def _send(self, client: ControlConnection) -> None:
        while client.response:
            fds = [] if client.mailbox is None else [client.mailbox.fileno()]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = client.sock.sendmsg([client.response], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            client.response = client.response[sent:]
            if client.mailbox is not None:
                client.mailbox.close()
                client.mailbox = None
        if client.tag:
            client.deadline = None
        elif not client.persistent:
            self._drop(client)

    def _drop(self, client: ControlConnection) -> None:
        self._clients.pop(client.sock.fileno(), None)
        client.closer.close_socket(client.sock)
        if client.mailbox is not None:
            client.mailbox.close()
        if client.tag:
            self._broker.mailboxes.close_outside(client.tag)

    # --- requests -------------------------------------------------------------------------------

    def _respond(self, line: bytes, client: ControlConnection) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            return {"error": "a request is one line with a JSON object"}
        verb, name = request.get("command"), request.get("name")
        try:
            if verb == "report":
                return {"report": self._broker.report()}
            if verb not in ("restart", "stop", "publish", "subscribe"):
                return {"error": "unknown command; use report, restart, stop, publish or subscribe"}
            if client.persistent:
                return {"error": f"{verb} is not allowed on this connection, which is for reports"}
            if verb == "publish":
                return self._publish(request.get("topic"), request.get("data"))
            if verb == "subscribe":
                return self._subscribe(client)
            if not isinstance(name, str) or not name:
                return {"error": f"{verb} needs a name"}
            return {"done": self._broker.command(verb, name)}
        except PassengerError as error:
            return {"error": str(error)}
        except Exception:
            self._broker.log.exception("gunicorn-passenger: internal error in the command %s", verb)
            return {"error": f"{verb} failed in the master; see its error log"}

    def _publish(self, topic: object, data: object) -> dict[str, Any]:
        if not isinstance(topic, str) or not isinstance(data, str):
            return {"error": "publish needs a topic and data"}
        try:
            return {"reached": self._broker.mailboxes.publish(topic, base64.b64decode(data, validate=True))}
        except ValueError as error:
            return {"error": f"the message cannot be sent: {error}"}

    def _subscribe(self, client: ControlConnection) -> dict[str, Any]:
        if self._is_full():
            return {
                "error": f"{MAX_PERSISTENT} processes already get messages or reports, which is the limit"
            }
        try:
            client.tag, client.mailbox = self._broker.mailboxes.open_outside()
        except OSError as error:
            return {"error": f"the master cannot make a mailbox: {error.strerror}"}
        return {"subscribed": True}

    # --- the other events of a service -----------------------------------------------------------

    def reloaded(self) -> None:
        """Open the socket again where its file was removed, or its directory was not usable."""
        self._broker.event_log.record(
            "reload", "gunicorn has read its configuration again and replaces its workers"
        )
        if self._file is None or listening_sockets.inode_id(self._path) != self._file:
            self._close_listener()
            self.open()

    def stop(self) -> None:
        """Remove the socket's file, if it is still our own."""
        if self._file is not None:
            listening_sockets.remove(self._path, self._file)
        self._close_listener()

    def forked(self, upgrades: bool) -> None:
        self._close_listener()
        for client in self._clients.values():
            client.sock.close()
            if client.mailbox is not None:
                client.mailbox.close()
        self._clients.clear()

    def _close_listener(self) -> None:
        listener, self._listener, self._file = self._listener, None, None
        if listener is not None:
            listener.close()


def _may_ask(sock: _socket.socket) -> bool:
    """Whether the client runs as this user or as root, according to the kernel."""
    try:
        return peercred(sock).uid in (os.geteuid(), 0)
    except OSError:
        return False
