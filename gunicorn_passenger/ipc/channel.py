"""The channel between the master and a worker: named messages, one list, with a version.

Runs in: the master (its end of each channel) and a worker (the other end).
Must never: decide anything; it packs, unpacks and carries.

Facts and rules:

- A channel is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socketpair made before the fork: one message is
  one packet, an end that closes is an end-of-file for the other (unix(7)).
- A packet is a JSON object ``{"v": 1, "type": "Open", ...}``, at most ``MAX_MESSAGE`` bytes, and
  at most one file descriptor rides on it (``SCM_RIGHTS``).
- Neither side trusts the other's packets: whatever is not a known message raises
  :class:`MalformedPacket`, and every descriptor that came with it is closed.
"""

from __future__ import annotations

import _socket
import array
import dataclasses
import json
import os
import socket
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

VERSION = 1
MAX_MESSAGE = 16384
MAX_TEXT = 4096
#: Characters of a key: a UNIX path or a host with a port, and what else names a listener.
MAX_KEY = 300
#: Room for all descriptors that one message can have (SCM_MAX_FD, unix(7)): the kernel itself would close
#: those that find none, and closing may wait (see master/descriptors.py).
ROOM = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class MalformedPacket(Exception):
    """A packet that is no message of this version; ``id`` is its number, where it had one."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.id = number


class ChannelClosed(Exception):
    """The other end is gone."""


@dataclass(frozen=True)
class Message:
    """Base of all messages. ``id`` pairs a question with its answer; 0 for what needs none."""

    id: int

    types: ClassVar[dict[str, type[Message]]] = {}

    def __init_subclass__(cls) -> None:
        Message.types[cls.__name__] = cls


# --- from a worker to the master --------------------------------------------------------------


@dataclass(frozen=True)
class OpenPort(Message):
    """The worker wants to accept on an address. Answered by Opened or Refused.

    ``kind`` is ``"tcp"`` (numeric ``host``, ``port``), ``"auto"`` (numeric ``host``; ``name`` tells
    the workers' equal servers from others) or ``"unix"`` (absolute ``path``).
    """

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    name: str = ""
    backlog: int = 0
    v6only: bool = False
    #: with "auto": the ports that the program allows itself; empty for all that are allocated
    within: str = ""
    placement: str = "shared"
    #: whether the worker counts the server's requests
    counts: bool = True
    #: whether the worker may have it already, in a program that shares the port with itself (SO_REUSEPORT)
    again: bool = False


@dataclass(frozen=True)
class ReleasePort(Message):
    """The worker no longer wants ``key``. Not answered.

    Without a key: it no longer waits for what its Open with this ``id`` asked for.
    """

    key: str


@dataclass(frozen=True)
class AcceptPaused(Message):
    """The worker accepts on ``key`` no more, as a Command said, and waits for a Granted. Not answered."""

    key: str


@dataclass(frozen=True)
class WorkerReady(Message):
    """The worker has loaded the program and serves. Not answered."""

    #: the name of the primary's server
    primary: str = ""


@dataclass(frozen=True)
class WorkerLeaving(Message):
    """The worker accepts nowhere any more, and finishes what it has.

    Answered by Noted, after which no connection of a sibling comes.
    """


@dataclass(frozen=True)
class OfferConnection(Message):
    """A leaving worker gives a connection away that waits for a request: the packet's descriptor.

    Answered by Noted when a sibling serves it from now on, else by Returned: then it is still the worker's.
    """

    #: which server's it is: the key of a port, or "primary" and the listener's name
    key: str
    #: the client's address, as JSON
    addr: str


@dataclass(frozen=True)
class AssignResult(Message):
    """Whether the worker serves the connection that came with the Adopt of this ``id``. Not answered."""

    taken: bool


@dataclass(frozen=True)
class GetReport(Message):
    """What does the application look like? Answered by Told."""


@dataclass(frozen=True)
class SpawnDaemon(Message):
    """The program wants a daemon. Answered by Spawned or Refused."""

    #: a JSON object, see daemons/manager.py
    spec: str


@dataclass(frozen=True)
class BootFailure(Message):
    """The worker cannot start; the master logs the text once. Answered by Noted."""

    text: str


# --- from the master to a worker --------------------------------------------------------------


@dataclass(frozen=True)
class PortOpened(Message):
    """The worker will be told when it may accept.

    ``key`` names the port in Close; it is empty while none is free.
    """

    key: str
    host: str = ""
    port: int = 0
    path: str = ""
    #: whether a Granted follows at once
    granted: bool = True


@dataclass(frozen=True)
class AcceptGranted(Message):
    """The worker whose Open had this ``id`` may accept from now on, on the packet's descriptor."""

    key: str
    host: str = ""
    port: int = 0
    path: str = ""
    #: where the worker counts what it does there (see ipc/scoreboard.py)
    slot: int = -1
    #: with "each": the how-many-eth of its kind it is
    position: int = 0


@dataclass(frozen=True)
class SuccessorReady(Message):
    """There is a sibling that can take the connections of this worker, which leaves. Not answered."""


@dataclass(frozen=True)
class OfferRejected(Message):
    """Nobody can take the connection now."""


@dataclass(frozen=True)
class AssignConnection(Message):
    """A sibling's connection, which waits for a request: the packet's descriptor. Answered by Adopted."""

    key: str
    addr: str


@dataclass(frozen=True)
class ReportSent(Message):
    """The report of the application, a JSON object in the file that is the packet's descriptor."""


@dataclass(frozen=True)
class DaemonSpawned(Message):
    """The daemon runs, or will. ``host`` and ``port``, or ``path``: where it listens, if it does."""

    name: str
    host: str = ""
    port: int = 0
    path: str = ""


@dataclass(frozen=True)
class PauseAccept(Message):
    """Accept on ``key`` no more, and finish what was accepted. Answered by Paused."""

    key: str


@dataclass(frozen=True)
class RequestDenied(Message):
    """The address is not to be had; ``kind`` is a key of ``errors.REFUSALS``."""

    kind: str
    errno: int
    text: str


@dataclass(frozen=True)
class Acknowledged(Message):
    """A fault was logged. ``halt`` tells the one worker that is to exit with gunicorn's status for it.

    gunicorn halts on the first such status; a second one while it halts would break the halt off.
    """

    halt: bool


@dataclass(frozen=True)
class PacketRejected(Message):
    """The packet with that ``id`` was no message that the receiver knows."""

    text: str


# --- packing ----------------------------------------------------------------------------------


def pack(message: Message) -> bytes:
    """The packet of a message; texts are cut to ``MAX_TEXT`` characters."""
    fields: dict[str, Any] = {"v": VERSION, "type": type(message).__name__}
    for name, value in dataclasses.asdict(message).items():
        fields[name] = value[:MAX_TEXT] if isinstance(value, str) else value
    data = json.dumps(fields, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a {type(message).__name__} message of {len(data)} bytes is too long")
    return data


def unpack(data: bytes) -> Message:
    """The message of a packet.

    :raises Malformed: when it is none: no JSON object, another version, an unknown type, a field
        that is missing, unknown, of the wrong type or too long.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise MalformedPacket("not a JSON packet") from None
    if not isinstance(fields, dict):
        raise MalformedPacket("not a JSON object")
    number = fields.get("id")
    number = number if isinstance(number, int) and not isinstance(number, bool) else 0
    if fields.pop("v", None) != VERSION:
        raise MalformedPacket(f"not of version {VERSION}", number)
    name = fields.pop("type", None)
    kind = Message.types.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MalformedPacket(f"unknown type {str(name)[:40]!r}", number)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in fields:
            _check(fields[field.name], hints[field.name], f"{name}.{field.name}", number)
        elif field.default is dataclasses.MISSING:
            raise MalformedPacket(f"{name} without {field.name}", number)
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(kind)}:
        raise MalformedPacket(f"{name} with unknown field {str(min(unknown))[:40]!r}", number)
    return kind(**fields)


def _check(value: object, hint: Any, where: str, number: int) -> None:
    allowed = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    if type(value) not in allowed:
        raise MalformedPacket(f"{where} is no {hint}", number)
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise MalformedPacket(f"{where} is too long", number)
    if isinstance(value, int) and not -(1 << 62) < value < (1 << 62):
        raise MalformedPacket(f"{where} is out of range", number)


# --- carrying ---------------------------------------------------------------------------------


def pair() -> tuple[_socket.socket, _socket.socket]:
    """A channel: the master's end and the worker's end, neither inheritable by other programs."""
    return _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: Any, message: Message, fd: int | None = None) -> None:
    """Send one message, with a descriptor if given.

    :raises BlockingIOError: the socket does not block and the other end does not read.
    :raises Closed: the other end is gone.
    """
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:
        sock.sendmsg([pack(message)], ancillary, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        raise ChannelClosed from None


def receive(sock: Any, close: Callable[[int], object] = os.close) -> tuple[Message, int | None]:
    """Receive one message and the descriptor that came with it, which the caller owns.

    :param close: closes descriptors that are not to be had.
    :raises Closed: the other end is gone.
    :raises Malformed: the packet was no message; its descriptors are closed.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, ROOM, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        raise ChannelClosed from None
    fds = sent(ancillary)
    try:
        if not data:
            raise ChannelClosed
        if flags & socket.MSG_TRUNC:
            raise MalformedPacket(f"longer than {MAX_MESSAGE} bytes")
        message = unpack(data)
        # one that was cut off whole is missing because this process has no room for it (EMFILE)
        if len(fds) > 1 or (flags & socket.MSG_CTRUNC and fds):
            raise MalformedPacket("more than one descriptor", message.id)
    except BaseException:
        for fd in fds:
            close(fd)
        raise
    return message, fds[0] if fds else None


def sent(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what ``recvmsg`` has received beside the data; they are the caller's to close."""
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)
