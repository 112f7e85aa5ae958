"""WebSocket frames as bytes (RFC 6455 section 5.2)."""

from __future__ import annotations

import struct


def frame(size: int, masked: bool) -> bytes:
    mask = 128 if masked else 0
    if size < 126:
        head = bytes([0x82, mask | size])
    elif size < 65536:
        head = bytes([0x82, mask | 126]) + struct.pack("!H", size)
    else:
        head = bytes([0x82, mask | 127]) + struct.pack("!Q", size)
    return head + (b"mask" if masked else b"") + b"x" * size
