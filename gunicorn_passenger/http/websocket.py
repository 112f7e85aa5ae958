"""The server's side of a WebSocket (RFC 6455), without extensions.

Process: a worker, in the greenlets of the application.
Never: hold more of what a client sends than one message and one read, or more for it than the messages of one
event-loop iteration.

The messages of one iteration are sent together at its end: an event for all clients is often one of several,
and a system call costs more than all the rest of a message.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from contextlib import suppress
from hashlib import sha1
from socket import SHUT_RDWR
from struct import pack
from typing import Any

import gevent
from gevent import get_hub

from gunicorn_passenger.http.client_socket import ClientSocket

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
#: Bytes that are read at once.
_READ_SIZE = 65536
#: Bytes of messages that wait for the end of the iteration.
_MAX_UNSENT = 16384
#: Seconds that a client has to reply to a Close frame.
_CLOSE_TIMEOUT = 5.0
#: Seconds in which a client must read something of a message.
_SEND_TIMEOUT = 60.0

# RFC 6455 section 11.8
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_OPCODES = frozenset({_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG})
# RFC 6455 section 7.4.1
NORMAL, PROTOCOL_ERROR, NOT_UTF8, TOO_LARGE = 1000, 1002, 1007, 1009
_NO_STATUS = 1005
#: Codes that an endpoint may not send.
_RESERVED = frozenset({1004, _NO_STATUS, 1006, 1015})


class InvalidFrame(Exception):
    """What a client has sent is not a message that this server accepts."""

    def __init__(self, code: int, why: str) -> None:
        """:param code: the status code for the Close frame."""
        super().__init__(why)
        self.code = code


def handshake_error(environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], str] | None:
    """What is wrong with a request for a WebSocket (RFC 6455 section 4.2.1).

    :returns: status, headers and reason of a response that refuses it; ``None`` for a valid request.
    """
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != "13":
        return "426 Upgrade Required", [("Sec-WebSocket-Version", "13")], "Sec-WebSocket-Version is not 13\n"
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    with suppress(binascii.Error, UnicodeEncodeError):
        if environ["REQUEST_METHOD"] == "GET" and len(b64decode(key.encode("ascii"), validate=True)) == 16:
            return None
    return "400 Bad Request", [], "Sec-WebSocket-Key is not 16 bytes in base64\n"


def frame(opcode: int, payload: bytes) -> bytes:
    """One frame of a server, which is the whole message (RFC 6455 section 5.2)."""
    length = len(payload)
    if length < 126:
        return pack("!BB", 0x80 | opcode, length) + payload
    if length < 65536:
        return pack("!BBH", 0x80 | opcode, 126, length) + payload
    return pack("!BBQ", 0x80 | opcode, 127, length) + payload


def unmask(mask: bytes, payload: bytes) -> bytes:
    """RFC 6455 section 5.3."""
    length = len(payload)
    key = (mask * (length // 4 + 1))[:length]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(length, "little")


class _LastFrame:
    """The frame of the message that was sent last: a broadcast sends one object to many clients."""

    message: object = None
    frame = b""


class WebSocket:
    """A WebSocket on a client's connection. One greenlet receives; any may send."""

    def __init__(self, sock: ClientSocket, environ: dict[str, Any], max_message: int) -> None:
        """Accept the client's request.

        :param environ: of a request in which :func:`handshake_error` finds nothing.
        :param max_message: bytes that a message of the client may have.
        :raises OSError: when the client has disconnected.
        """
        self._sock = sock
        self._max_message = max_message
        self._buf = bytearray()
        #: the message whose frames are arriving: opcode and content
        self._opcode = 0
        self._parts: list[bytes] = []
        self._size = 0
        self._loop = get_hub().loop
        #: the frames that are sent at the end of this iteration, and their size
        self._unsent: list[bytes] = []
        self._unsent_size = 0
        #: sends what the kernel has not taken then
        self._sender: gevent.Greenlet | None = None
        self._close_sent = False
        #: whether the application is done with it, or the client
        self._ended = False
        digest = sha1(environ["HTTP_SEC_WEBSOCKET_KEY"].encode() + _GUID, usedforsecurity=False).digest()
        self._send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % b64encode(digest)
        )

    def send(self, message: str | bytes) -> None:
        """Send a message at the end of the event-loop iteration. Wait while the client is slow.

        :param message: text, or bytes.
        :raises OSError: when the WebSocket is closed, and when the client reads nothing for 60 s.
        """
        if self._sender is not None:
            self._sender.join()
        if self._close_sent or self._ended:
            raise BrokenPipeError("the WebSocket is closed")
        last = _LastFrame
        if message is not last.message:
            if isinstance(message, str):
                last.frame = frame(_TEXT, message.encode())
            else:
                # a copy, since the caller may change what it has
                message = bytes(message)
                last.frame = frame(_BINARY, message)
            last.message = message
        self._unsent.append(last.frame)
        self._unsent_size += len(last.frame)
        if len(last.frame) > _MAX_UNSENT:
            # not kept
            last.message = None
            last.frame = b""
        if self._unsent_size > _MAX_UNSENT:
            self._send(b"")
        elif len(self._unsent) == 1:
            self._loop.run_callback(self._flush)

    def receive(self) -> str | bytes | None:
        """The next message of the client.

        :returns: ``None`` when the WebSocket is closed.
        """
        try:
            while not self._ended:
                opcode, final, payload = self._frame()
                if opcode & 0x8:
                    self._control(opcode, payload)
                elif (message := self._message(opcode, final, payload)) is not None:
                    return message
        except InvalidFrame as error:
            self.close(error.code)
            self._discard_rest()
        except OSError:
            self._ended = True
        return None

    def close(self, code: int = NORMAL) -> None:
        """Send a Close frame. What the client has not read until its reply is lost."""
        if self._close_sent or self._ended:
            return
        self._close_sent = True
        with suppress(OSError):
            self._send(frame(_CLOSE, pack("!H", code)))
            # a client that does not reply must not keep a greenlet in receive()
            gevent.spawn_later(_CLOSE_TIMEOUT, self._abort)

    def _discard_rest(self) -> None:
        """Read what the client still sends, for as long as it has to reply to the Close frame.

        A connection that is closed with unread bytes is reset, and the client may not see why.
        """
        with suppress(OSError):
            while not self._ended and self._sock.recv(_READ_SIZE):
                pass
        self._ended = True

    def end(self) -> None:
        """Send what waits; the connection is closed next."""
        if not self._ended:
            with suppress(OSError):
                self._send(b"")
            self._ended = True

    # --- frames ----------------------------------------------------------------------------------

    def _message(self, opcode: int, final: bool, payload: bytes) -> str | bytes | None:
        """:returns: the message that is complete with this frame."""
        if (opcode == _CONTINUATION) != bool(self._opcode):
            raise InvalidFrame(PROTOCOL_ERROR, "a message begins in another one, or in its middle")
        if not final:
            self._opcode = self._opcode or opcode
            self._parts.append(payload)
            self._size += len(payload)
            return None
        if opcode == _CONTINUATION:
            opcode, payload = self._opcode, b"".join([*self._parts, payload])
            self._opcode, self._size = 0, 0
            self._parts.clear()
        if opcode == _BINARY:
            return payload
        try:
            return payload.decode()
        except UnicodeDecodeError:
            raise InvalidFrame(NOT_UTF8, "a text is not UTF-8") from None

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == _PING:
            if not self._close_sent:
                self._send(frame(_PONG, payload))
        elif opcode == _CLOSE:
            code = _close_code(payload)
            if not self._close_sent:
                self._close_sent = True
                self._send(frame(_CLOSE, b"" if code == _NO_STATUS else pack("!H", code)))
            self._ended = True

    def _frame(self) -> tuple[int, bool, bytes]:
        """The next frame: opcode, whether it ends its message, payload.

        :raises OSError: when the client has disconnected.
        """
        buf = self._buf
        need = 2
        while True:
            while len(buf) < need:
                data = self._sock.recv(_READ_SIZE)
                if not data:
                    raise ConnectionResetError("the client has disconnected")
                buf += data
            size, length = self._sizes()
            need = size + length
            if len(buf) >= need:
                first = buf[0]
                payload = unmask(bytes(buf[size - 4 : size]), bytes(buf[size:need]))
                del buf[:need]
                return first & 0xF, first >= 0x80, payload

    def _sizes(self) -> tuple[int, int]:
        """The sizes of the head and of the payload of the frame that has begun; 0 for the second until its
        head is complete.
        """
        buf = self._buf
        first, length = buf[0], buf[1] & 0x7F
        opcode = first & 0xF
        if first & 0x70 or opcode not in _OPCODES:
            raise InvalidFrame(PROTOCOL_ERROR, "a frame of an extension")
        if not buf[1] & 0x80:
            raise InvalidFrame(PROTOCOL_ERROR, "a frame without a mask")
        if opcode & 0x8 and (length > 125 or first < 0x80):
            raise InvalidFrame(PROTOCOL_ERROR, "a control frame that is too large, or is fragmented")
        size = 8 if length == 126 else 14 if length == 127 else 6
        if size > 6:
            if len(buf) < size:
                return size, 0
            length = int.from_bytes(buf[2 : size - 4], "big")
        if not opcode & 0x8 and self._size + length > self._max_message:
            raise InvalidFrame(TOO_LARGE, "a message that is too large")
        return size, length

    # --- the connection --------------------------------------------------------------------------

    def _take_unsent(self, data: bytes) -> bytes:
        """What waits for the end of the iteration, and ``data`` behind it."""
        self._unsent.append(data)
        data = b"".join(self._unsent)
        self._unsent.clear()
        self._unsent_size = 0
        return data

    def _flush(self) -> None:
        """Called in the hub, at the end of an iteration."""
        if not self._unsent or self._ended:
            return
        data = self._take_unsent(b"")
        try:
            if not self._sock.send_at_once(data):
                self._sender = gevent.spawn(self._send_rest)
        except OSError:
            # the greenlet that receives learns the same
            self._ended = True

    def _send_rest(self) -> None:
        try:
            with suppress(OSError):
                self._send(b"")
        finally:
            self._sender = None

    def _send(self, data: bytes) -> None:
        """Send this at once, behind what waits."""
        if self._unsent:
            data = self._take_unsent(data)
        try:
            if not self._sock.send_at_once(data):
                self._sock.send_rest(_SEND_TIMEOUT)
        except TimeoutError:
            # a part of a frame is gone
            self._abort()
            raise

    def _abort(self) -> None:
        if not self._ended:
            self._ended = True
            with suppress(OSError):
                self._sock.shutdown(SHUT_RDWR)


def _close_code(payload: bytes) -> int:
    """The status code in a client's Close frame (RFC 6455 section 5.5.1)."""
    if not payload:
        return _NO_STATUS
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or code in _RESERVED or not (1000 <= code <= 1014 or 3000 <= code <= 4999):
        raise InvalidFrame(PROTOCOL_ERROR, "a Close frame with a code that is not one")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise InvalidFrame(NOT_UTF8, "the reason for the close is not UTF-8") from None
    return code
