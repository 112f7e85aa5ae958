"""Upgraded connections through the proxy: the handshake, and WebSocket frames as bytes."""

import contextlib
import struct

import pytest
from proxy_harness import PLACES, Message, get, request_of, upstream_for
from upstream_sockets import connect

MB = 1 << 20

#: ``inside_ws`` is an app that calls ``proxy.ws``.
EVERYWHERE = pytest.mark.parametrize("where", [*PLACES, "to_unix", "inside_ws"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["websocket", "tcp"])


def upgrading(target="/chat", protocol="websocket", *fields, method="GET", version="1.1"):
    return get(
        target, "Connection: keep-alive, Upgrade", f"Upgrade: {protocol}", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Origin: http://client.example", *fields,
        method=method, version=version,
    )  # fmt: skip


def switching(protocol="websocket"):
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + protocol.encode() + b"\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nX-Answer: 1\r\n\r\n"
    )


@contextlib.contextmanager
def tunnel(px, where="primary", protocol="websocket", target="/chat"):
    """Both ends of an upgraded connection."""
    with upstream_for(px, where) as upstream, connect(px[where]) as client:
        yield client, dial(client, upstream, protocol, target)


def dial(client, upstream, protocol="websocket", target="/chat"):
    client.send(upgrading(target, protocol))
    wire = upstream.accept()
    request_of(wire)
    wire.send(switching(protocol))
    assert Message(client.head()).status == 101
    return wire


def frame(payload=b"", opcode=1, mask=False, fin=True):
    bit, key = (0x80, b"\x11\x22\x33\x44") if mask else (0, b"")
    head = bytes([(0x80 if fin else 0) | opcode])
    size = len(payload)
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    return head + key + masked(payload, key)


def masked(data, key):
    return bytes(byte ^ key[n % 4] for n, byte in enumerate(data)) if key else data


def frames(data):
    """All frames of a stream: opcode, payload, whether it was masked; and what is left of one."""
    found = []
    while True:
        if len(data) < 2:
            return found, data
        size, at = data[1] & 0x7F, 2
        if size == 126:
            if len(data) < 4:
                return found, data
            (size,), at = struct.unpack(">H", data[2:4]), 4
        elif size == 127:
            if len(data) < 10:
                return found, data
            (size,), at = struct.unpack(">Q", data[2:10]), 10
        key = b""
        if data[1] & 0x80:
            key, at = data[at : at + 4], at + 4
        if len(data) < at + size:
            return found, data
        found.append((data[0] & 0x0F, masked(data[at : at + size], key), bool(data[1] & 0x80)))
        data = data[at + size :]
