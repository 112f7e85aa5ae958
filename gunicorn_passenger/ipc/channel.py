"""The channel between the master and a worker: packs, sends and receives messages.

Process: the master (its end of each channel) and a worker (the other end). Never: decide anything.

- A channel is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socketpair made before the fork: one message is
  one packet, an end that closes is an end-of-file for the other (unix(7)).
- A packet is a JSON object ``{"v": 1, "type": "OpenPort", ...}``, at most ``MAX_MESSAGE`` bytes, with as many
  file descriptors (``SCM_RIGHTS``) as the message may have: one, for most.
- Neither side trusts the other's packets: a packet that is not a known message raises
  :class:`MalformedPacket`, and every descriptor that came with it is closed.
"""

from __future__ import annotations

import _socket
import array
import json
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

from gunicorn_passenger.ipc.messages import MAX_TEXT, VERSION, Message

MAX_MESSAGE = 16384
#: Room for all descriptors that one message can have (SCM_MAX_FD, unix(7)): the kernel itself would close
#: those that do not fit, and closing may wait (see master/descriptors.py).
ROOM = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class MalformedPacket(Exception):
    """A packet that is not a message of this version; ``id`` is its number, where it had one."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.id = number


class ChannelClosed(Exception):
    """The other end is closed."""


# --- packing ----------------------------------------------------------------------------------

_encode = json.JSONEncoder(separators=(",", ":")).encode


def pack(message: Message) -> bytes:
    """The packet of a message; texts are cut to ``MAX_TEXT`` characters."""
    fields: dict[str, Any] = {"v": VERSION, "type": type(message).__name__}
    for name, value in vars(message).items():
        fields[name] = value[:MAX_TEXT] if isinstance(value, str) else value
    data = _encode(fields).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a {type(message).__name__} message of {len(data)} bytes is too long")
    return data


def unpack(data: bytes) -> Message:
    """The message of a packet.

    :raises MalformedPacket: when it is not a message: not a JSON object, of another version or an unknown
        type, or with a field that is missing, unknown, of the wrong type or too long.
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
    for field, annotation in kind.fields.items():
        if field in fields:
            _check(fields[field], annotation, f"{name}.{field}", number)
        elif field not in kind.defaults:
            raise MalformedPacket(f"{name} without {field}", number)
    if unknown := fields.keys() - kind.fields.keys():
        raise MalformedPacket(f"{name} with unknown field {str(min(unknown))[:40]!r}", number)
    return kind(**fields)


def _check(value: object, annotation: str, where: str, number: int) -> None:
    if type(value).__name__ != annotation:
        raise MalformedPacket(f"{where} is not a value of type {annotation}", number)
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise MalformedPacket(f"{where} is too long", number)
    if isinstance(value, int) and not -(1 << 62) < value < (1 << 62):
        raise MalformedPacket(f"{where} is out of range", number)


# --- carrying ---------------------------------------------------------------------------------


def pair() -> tuple[_socket.socket, _socket.socket]:
    """A channel: the master's end and the worker's end, neither inheritable by other programs."""
    return _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: Any, message: Message, *fds: int) -> None:
    """Send one message, with descriptors if given.

    :raises BlockingIOError: the socket is non-blocking and the other end does not read.
    :raises ChannelClosed: the other end is closed.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([pack(message)], ancillary, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        raise ChannelClosed from None


def receive(sock: Any, close: Callable[[int], object] = os.close) -> tuple[Message, list[int]]:
    """Receive one message and the descriptors that came with it, which the caller owns.

    They are fewer than were sent when this process had no room for them (EMFILE); the sender is not at fault.

    :param close: closes the descriptors of a packet that is rejected.
    :raises ChannelClosed: the other end is closed.
    :raises MalformedPacket: the packet was not a message; its descriptors are closed.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, ROOM, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        raise ChannelClosed from None
    fds = received_fds(ancillary)
    try:
        if not data:
            raise ChannelClosed
        if flags & socket.MSG_TRUNC:
            raise MalformedPacket(f"longer than {MAX_MESSAGE} bytes")
        message = unpack(data)
        most = message.max_descriptors
        if len(fds) > most or (most == 1 and flags & socket.MSG_CTRUNC and fds):
            raise MalformedPacket("more descriptors than the message may have", message.id)
    except BaseException:
        for fd in fds:
            close(fd)
        raise
    return message, fds


def received_fds(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in the ancillary data of ``recvmsg``, which the caller owns."""
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)
