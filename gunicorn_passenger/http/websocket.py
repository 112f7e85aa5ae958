"""The server's side of a WebSocket (RFC 6455), without extensions.

Process: a serving process, in the greenlets of the application.
Never: hold more of what a client sends than one message, one frame and one read, or keep other clients
waiting for one that floods.

The messages of one event-loop iteration are sent together at its end: an event for all clients is often one
of several, and a system call costs more than all the rest of a message.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from contextlib import suppress
from hashlib import sha1
from socket import SHUT_RDWR
from typing import Any

import gevent

from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.websocket_frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    NO_STATUS,
    NORMAL,
    NOT_UTF8,
    OPCODES,
    PING,
    PONG,
    PROTOCOL_ERROR,
    TEXT,
    TOO_LARGE,
    close_frame,
    frame,
    mask,
)

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
#: Bytes that are read at once.
_READ_SIZE = 65536
#: Bytes that may wait for the end of the iteration, or for a slow client.
_MAX_QUEUED = 16384
#: How many frames are read before other greenlets run.
_EAGER = 64
#: Seconds that a client has to reply to a Close frame.
_CLOSE_TIMEOUT = 5.0

#: Codes that an endpoint may not send.
_RESERVED = frozenset({1004, NO_STATUS, 1006, 1015})


class InvalidFrame(Exception):
    """What a client has sent is not a message that this server accepts."""

    def __init__(self, code: int, why: str) -> None:
        """:param code: the status code for the Close frame."""
        super().__init__(why)
        self.code = code


def handshake_error(environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], str] | None:
    """What is wrong with the WebSocket's own headers in a request (RFC 6455 section 4.2.1).

    :returns: status, headers and reason of a response that refuses it; ``None`` for a valid request.
    """
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != "13":
        return "426 Upgrade Required", [("Sec-WebSocket-Version", "13")], "Sec-WebSocket-Version is not 13\n"
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    with suppress(binascii.Error, UnicodeEncodeError):
        if environ["REQUEST_METHOD"] == "GET" and len(b64decode(key.encode("ascii"), validate=True)) == 16:
            return None
    return "400 Bad Request", [], "Sec-WebSocket-Key is not 16 bytes in base64\n"


class _LastFrame:
    """The frame of the message that was sent last: a broadcast sends one object to many clients."""

    message: object = None
    frame = b""


class WebSocket:
    """A WebSocket on a client's connection. One greenlet receives; any may send."""

    def __init__(self, sock: ClientSocket, environ: dict[str, Any], max_message: int) -> None:
        """Accept the client's request.

        :param environ: of a request in which :func:`handshake_error` finds nothing.
        :param max_message: bytes that a binary message of the client may have, or characters of a text.
        :raises OSError: when the client has disconnected.
        """
        self._sock = sock
        self._max_message = max_message
        self._buf = bytearray()
        #: the message whose frames are arriving: opcode and content
        self._opcode = 0
        self._message = bytearray()
        #: frames since the greenlet has let others run
        self._eager = 0
        self._close_sent = False
        #: whether the client has broken the protocol
        self._refused = False
        #: whether the client is gone, or the application is done with it
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
        if self._close_sent or self._ended:
            raise BrokenPipeError("the WebSocket is closed")
        last = _LastFrame
        if message is last.message:
            self._send(last.frame)
            return
        if isinstance(message, str):
            data = frame(TEXT, message.encode())
        else:
            # a copy, since the caller may change what it has
            message = bytes(message)
            data = frame(BINARY, message)
        if len(data) <= _MAX_QUEUED:
            last.message, last.frame = message, data
        self._send(data)

    def receive(self) -> str | bytes | None:
        """The next message of the client.

        :returns: ``None`` when the WebSocket is closed.
        """
        try:
            while not (self._ended or self._refused):
                opcode, final, payload = self._frame()
                if opcode & 0x8:
                    self._control(opcode, payload)
                elif (message := self._add(opcode, final, payload)) is not None:
                    return message
        except InvalidFrame as error:
            self._refused = True
            self.close(error.code)
        except OSError:
            self._ended = True
        return None

    def close(self, code: int = NORMAL) -> None:
        """Send a Close frame, and nothing behind it."""
        if self._ended or self._close_sent:
            return
        self._send_close(code)
        # a client that does not reply must not keep a greenlet in receive()
        gevent.spawn_later(_CLOSE_TIMEOUT, self._abort)

    def end(self) -> None:
        """Send what waits; the connection is closed next.

        To a client that has broken the protocol the Close frame says so. A connection that is closed with
        unread bytes is reset, and the client may not get the frame: what it still sends is discarded, for as
        long as it has to reply.
        """
        if self._ended:
            return
        with suppress(OSError):
            self._sock.send_queue()
            while self._refused and not self._ended:
                data = self._sock.recv(_READ_SIZE)
                if not data or _ends_with_close(data):
                    break
                self._let_others_run()
        self._ended = True

    # --- frames ----------------------------------------------------------------------------------

    def _add(self, opcode: int, final: bool, payload: bytes) -> str | bytes | None:
        """:returns: the message that is complete with this frame."""
        if (opcode == CONTINUATION) != bool(self._opcode):
            raise InvalidFrame(PROTOCOL_ERROR, "a message begins in another one, or in its middle")
        if not final:
            self._opcode = self._opcode or opcode
            self._message += payload
            return None
        if opcode == CONTINUATION:
            opcode, payload = self._opcode, bytes(self._message + payload)
            self._opcode = 0
            self._message.clear()
        if opcode == BINARY:
            return payload
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            raise InvalidFrame(NOT_UTF8, "a text is not UTF-8") from None
        if len(text) > self._max_message:
            raise InvalidFrame(TOO_LARGE, "a message that is too large")
        return text

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            if not self._close_sent:
                self._send(frame(PONG, payload))
        elif opcode == CLOSE:
            code = _close_code(payload)
            self._send_close(code)
            self._ended = True

    def _frame(self) -> tuple[int, bool, bytes]:
        """The next frame: opcode, whether it ends its message, payload.

        :raises OSError: when the client has disconnected.
        """
        self._let_others_run()
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
                payload = mask(bytes(buf[size - 4 : size]), bytes(buf[size:need]))
                del buf[:need]
                return first & 0xF, first >= 0x80, payload

    def _sizes(self) -> tuple[int, int]:
        """The sizes of the head and of the payload of the frame that has begun; 0 for the second until its
        head is complete.
        """
        buf = self._buf
        first, length = buf[0], buf[1] & 0x7F
        opcode = first & 0xF
        if first & 0x70 or opcode not in OPCODES:
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
            if length < 126 or (size > 8 and length < 65536) or length >> 63:
                raise InvalidFrame(PROTOCOL_ERROR, "a length in more bytes than it needs")
        # a character has up to four bytes; where a message continues, its first frame says what it is
        limit = self._max_message * (4 if (self._opcode or opcode) == TEXT else 1)
        if not opcode & 0x8 and len(self._message) + length > limit:
            raise InvalidFrame(TOO_LARGE, "a message that is too large")
        return size, length

    def _let_others_run(self) -> None:
        """Reading does not wait while a client sends faster than its frames are read."""
        self._eager += 1
        if self._eager == _EAGER:
            self._eager = 0
            gevent.sleep(0)

    # --- the connection --------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        if self._sock.send_soon(data) > _MAX_QUEUED:
            self._sock.send_queue()

    def _send_close(self, code: int) -> None:
        """Send the Close frame, the last one (RFC 6455 section 5.5.1)."""
        if not self._close_sent:
            self._close_sent = True
            with suppress(OSError):
                self._sock.send_soon(close_frame(code))
                self._sock.send_queue()
            self._sock.mute()

    def _abort(self) -> None:
        if not self._ended:
            self._ended = True
            with suppress(OSError):
                self._sock.shutdown(SHUT_RDWR)


def _ends_with_close(data: bytes) -> bool:
    """Whether a read ends with a client's Close frame, as far as can be seen where frames are not read."""
    alone = len(data) > 1 and data[0] == 0x88 and data[1] - 0x80 == len(data) - 6
    return alone or data[-8:-6] == b"\x88\x82" or data[-6:-4] == b"\x88\x80"


def _close_code(payload: bytes) -> int:
    """The status code in a client's Close frame (RFC 6455 section 5.5.1)."""
    if not payload:
        return NO_STATUS
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or code in _RESERVED or not (1000 <= code <= 1014 or 3000 <= code <= 4999):
        raise InvalidFrame(PROTOCOL_ERROR, "a Close frame with a code that is not one")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise InvalidFrame(NOT_UTF8, "the reason for the close is not UTF-8") from None
    return code
