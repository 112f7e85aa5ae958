"""Writes WebSocket frames, and finds where they end (RFC 6455 section 5).

Process: a serving process. It does no I/O.
Never: read or change the payload of a frame that passes through.
"""

from __future__ import annotations

import os
from struct import pack

# RFC 6455 section 11.8
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
OPCODES = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG})
# RFC 6455 section 7.4.1; 1001 is "such as a server going down"
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_STATUS, NOT_UTF8, TOO_LARGE = 1000, 1001, 1002, 1005, 1007, 1009


def frame(opcode: int, payload: bytes) -> bytes:
    """One frame of a server, which is the whole message (RFC 6455 section 5.2)."""
    length = len(payload)
    if length < 126:
        return pack("!BB", 0x80 | opcode, length) + payload
    if length < 65536:
        return pack("!BBH", 0x80 | opcode, 126, length) + payload
    return pack("!BBQ", 0x80 | opcode, 127, length) + payload


def close_frame(code: int, masked: bool = False) -> bytes:
    """A Close frame (RFC 6455 section 5.5.1).

    :param code: why; with ``NO_STATUS`` the frame does not say it.
    :param masked: as a client sends it.
    """
    payload = b"" if code == NO_STATUS else pack("!H", code)
    if not masked:
        return frame(CLOSE, payload)
    key = os.urandom(4)
    return pack("!BB", 0x80 | CLOSE, 0x80 | len(payload)) + key + mask(key, payload)


def mask(key: bytes, payload: bytes) -> bytes:
    """Mask a payload, or unmask it (RFC 6455 section 5.3)."""
    length = len(payload)
    keys = (key * (length // 4 + 1))[:length]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(keys, "little")).to_bytes(length, "little")


class FrameTracker:
    """Knows where a WebSocket's frames end (RFC 6455 section 5.2)."""

    __slots__ = ("_head", "_left")

    def __init__(self) -> None:
        #: bytes of the present frame that are still to come, and the beginning of its head
        self._left = 0
        self._head = b""

    @property
    def between(self) -> bool:
        """Whether a frame has just ended."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> int:
        """
        :returns: how many of these bytes belong to the frame that had begun before.
        """
        size = len(data)
        if not self._left and not self._head and size > 1:
            # most reads get exactly one small frame
            second = data[1]
            if second < 126:
                if second + 2 == size:
                    return 0
            elif 128 <= second < 254 and second - 122 == size:
                return 0
        first = -1
        at = 0
        if self._left:
            taken = min(self._left, size)
            self._left -= taken
            at = taken
            if self._left:
                return size
            first = at
        elif not self._head:
            first = 0
        while at < size:
            begun = len(self._head)
            head = self._head + data[at : at + 14 - begun]
            need = _head_size(head)
            if need is None or len(head) < need[0]:
                self._head = head
                return size if first < 0 else first
            at += need[0] - begun
            self._head = b""
            taken = min(need[1], size - at)
            at += taken
            self._left = need[1] - taken
            if self._left:
                return size if first < 0 else first
            if first < 0:
                first = at
        return size if first < 0 else first


def _head_size(head: bytes) -> tuple[int, int] | None:
    """Of a frame's head that has begun: its size, and the payload's."""
    if len(head) < 2:
        return None
    length = head[1] & 127
    size = 2 + (4 if head[1] & 128 else 0)
    if length == 126:
        if len(head) < 4:
            return None
        return size + 2, int.from_bytes(head[2:4], "big")
    if length == 127:
        if len(head) < 10:
            return None
        return size + 8, int.from_bytes(head[2:10], "big")
    return size, length
