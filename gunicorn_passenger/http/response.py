"""A response: ``start_response``, and what goes over the wire after it.

Runs in: a worker, in the greenlet that calls the application. Must never: let a field through that
would end the head or begin another, or put two framings on one message.

Attributes that gunicorn's hooks and loggers read are gunicorn's: ``status``, ``status_code``,
``headers``, ``headers_sent``, ``response_length``, ``sent``, ``chunked``, ``must_close``, ``upgrade``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

from gunicorn import SERVER, util
from gunicorn.http.errors import InvalidHeader, InvalidHeaderName
from gunicorn.http.message import TOKEN_RE

from gunicorn_passenger.errors import AnswerBrokeOff

try:
    from gunicorn.http.errors import InvalidResponseHeader, InvalidResponseHeaderName
except ImportError:  # gunicorn 23
    InvalidResponseHeader, InvalidResponseHeaderName = InvalidHeader, InvalidHeaderName

# RFC 9110 section 5.5: field-vchar = VCHAR / obs-text
_VALUE = re.compile(r"[ \t\x21-\x7e\x80-\xff]*")
# RFC 9112 section 4: status-code SP [ reason-phrase ]
_STATUS = re.compile(r"[0-9]{3}(?: [ \t\x21-\x7e\x80-\xff]*)?")

#: A body longer than this goes to the kernel beside its head instead of being copied behind it.
_JOIN = 32768
#: The most of a list of pieces that is sent as one.
_GATHER = 65536
#: How many names and status lines are remembered as checked; programs have a few dozen.
_REMEMBER = 1000

_PLAIN, _LENGTH, _CONNECTION, _UPGRADE, _HOP = range(5)
_names: dict[str, int] = {}
_statuses: dict[str, tuple[int, bool]] = {}


def _kind_of(name: Any) -> int:
    """Check a field's name, once.

    :raises InvalidResponseHeaderName: when it is no token (RFC 9110 section 5.1).
    """
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a string")
    if not TOKEN_RE.fullmatch(name):
        raise InvalidResponseHeaderName(repr(name))
    lower = name.lower()
    if lower == "content-length":
        kind = _LENGTH
    elif lower == "connection":
        kind = _CONNECTION
    elif lower == "upgrade":
        kind = _UPGRADE
    elif util.is_hoppish(name):
        kind = _HOP
    else:
        kind = _PLAIN
    if len(_names) >= _REMEMBER:
        _names.clear()
    _names[name] = kind
    return kind


def _code_of(status: Any) -> tuple[int, bool]:
    """Check a status line, once.

    :returns: the code, and whether it never has a body (RFC 9110 section 6.4.1).
    """
    if not isinstance(status, str):
        raise TypeError(f"{status!r} is not a string")
    if not _STATUS.fullmatch(status):
        raise ValueError(f"Invalid status {status!r}")
    code = int(status[:3])
    found = code, code in (204, 304) or 100 <= code < 200
    if len(_statuses) >= _REMEMBER:
        _statuses.clear()
    _statuses[status] = found
    return found


def _check_value(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    if not _VALUE.fullmatch(value):
        # the name only: the value may be a secret
        raise InvalidResponseHeader(repr(name))


class _Clock:
    """The Date field, made once a second."""

    def __init__(self) -> None:
        self.second = 0
        self.text = ""

    def date(self) -> str:
        now = int(time.time())
        if now != self.second:
            self.second, self.text = now, util.http_date(now)
        return self.text


_date = _Clock().date


class Response:
    """The answer to one request."""

    __slots__ = (
        "_block",
        "_bodiless",
        "_connection",
        "_protocol",
        "_warned",
        "chunked",
        "headers",
        "headers_sent",
        "method",
        "must_close",
        "req",
        "response_length",
        "sent",
        "status",
        "status_code",
        "upgrade",
    )

    #: what gunicorn calls its own name
    version = SERVER

    def __init__(self, connection: Any, environ: dict[str, Any], must_close: bool, req: Any) -> None:
        """
        :param connection: where it goes.
        :param must_close: whether the connection is to end with it.
        :param req: gunicorn's request object, where there is one.
        """
        self._connection = connection
        self._protocol = environ["SERVER_PROTOCOL"]
        self.method = environ["REQUEST_METHOD"]
        self.must_close = must_close
        self.req = req
        self.status: str | None = None
        self.status_code: int | None = None
        self.headers: list[tuple[str, str]] = []
        self.headers_sent = False
        self.response_length: int | None = None
        self.sent = 0
        self.chunked = False
        self.upgrade = False
        self._warned = False

    # --- what the application calls --------------------------------------------------------------

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's ``start_response``.

        :raises AssertionError: when it was called before, without ``exc_info``.
        :raises ValueError: for a status or a field that cannot be sent.
        """
        if exc_info:
            try:
                if self.headers_sent:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        elif self.status is not None:
            raise AssertionError("Response headers already set!")

        code, bodiless = _statuses.get(status) or _code_of(status)
        length: int | None = None
        upgrade = False
        kept = []
        lines = []
        for name, value in headers:
            kind = _names[name] if name in _names else _kind_of(name)
            # most values are plain ASCII; the others are looked at closer
            if value.__class__ is not str or not value.isascii() or not value.isprintable():
                _check_value(name, value)
            value = value.strip(" \t")  # noqa: PLW2901
            if kind:
                if kind == _LENGTH:
                    announced = _length(value)
                    if length is not None and length != announced:
                        raise InvalidResponseHeader(repr(name))
                    if length is not None:
                        continue
                    length = announced
                elif kind == _UPGRADE and value.lower() == "websocket":
                    pass
                else:
                    if kind == _CONNECTION and value.lower() == "upgrade":
                        upgrade = True
                    # hop-by-hop fields are the server's, not the application's (PEP 3333)
                    continue
            kept.append((name, value))
            lines.append(f"{name}: {value}\r\n")
        block = "".join(lines)
        if length is not None and bodiless and code != 304:
            # RFC 9110 section 8.6: no Content-Length with 1xx and 204
            kept = [(name, value) for name, value in kept if _names.get(name) != _LENGTH]
            block = "".join([f"{name}: {value}\r\n" for name, value in kept])
            length = None

        self.status = status
        self.status_code = code
        self.headers = kept
        self.response_length = length
        self.upgrade = upgrade
        self._block = block
        self._bodiless = bodiless or self.method == "HEAD"
        self.chunked = length is None and not self._bodiless and self._protocol != "HTTP/1.0"
        return self.write

    def early_hints(self, headers: Any) -> None:
        """``wsgi.early_hints``: send "103 Early Hints" (RFC 8297), as often as wanted before the head.

        :param headers: pairs of name and value, such as ``[("Link", "</a.css>; rel=preload")]``.
        """
        if self.headers_sent or self._protocol == "HTTP/1.0":
            return
        lines = ["HTTP/1.1 103 Early Hints\r\n"]
        for field in headers:
            name, value = (part.decode("latin-1") if isinstance(part, bytes) else part for part in field)
            _kind_of(name)
            _check_value(name, value)
            stripped = value.strip(" \t")
            lines.append(f"{name}: {stripped}\r\n")
        lines.append("\r\n")
        self._connection.send("".join(lines).encode("latin-1"))

    def write(self, data: bytes) -> None:
        """Send a piece of the body; the head goes with the first.

        :raises gunicorn_passenger.errors.ClientDisconnected: (an ``OSError``) when the client is gone.
        """
        if not isinstance(data, bytes):
            raise TypeError(f"{data!r} is not a byte")
        if not data:
            # PEP 3333: the head waits for the first piece that is not empty
            if self.status is None:
                raise AssertionError("write() before start_response()")
            return
        if self._bodiless_now(data):
            return
        length = self.response_length
        if length is not None:
            left = length - self.sent
            if len(data) > left:
                # never more than was announced: the rest would be read as another answer
                data = data[:left]
                if not data:
                    if not self.headers_sent:
                        self._send_head(b"")
                    return
        self.sent += len(data)
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self.headers_sent:
            self._connection.send(data)
        else:
            self._send_head(data)

    # --- what the gateway calls ------------------------------------------------------------------

    def send_all(self, pieces: Any) -> None:
        """Send a body that is there as a whole: a list or a tuple of pieces.

        The head, the body and the end of it are one piece then, and one call of the system.
        """
        if len(pieces) == 1:
            data = pieces[0]
        elif sum(map(len, pieces)) <= _GATHER:
            data = b"".join(pieces)
        else:
            for piece in pieces:
                self.write(piece)
            self.close()
            return
        if not data or not self.chunked or self.headers_sent or not isinstance(data, bytes):
            self.write(data)
            self.close()
            return
        self.sent += len(data)
        self._send_head(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    def close(self) -> None:
        """The body is over.

        :raises AnswerBrokeOff: when less was written than announced.
        """
        if not self.headers_sent:
            if self.status is None:
                raise AssertionError("start_response() was not called before the body ended")
            self._send_head(b"0\r\n\r\n" if self.chunked else b"")
        elif self.chunked:
            self._connection.send(b"0\r\n\r\n")
        length = self.response_length
        if length is not None and self.sent < length and not self._bodiless:
            raise AnswerBrokeOff(
                f"the application announced {length} bytes and wrote {self.sent}: the connection is closed, "
                "so that the client does not wait for the rest"
            )

    def should_close(self) -> bool:
        """Whether the connection ends with this response (RFC 9112 sections 6.3 and 9.3)."""
        if self.must_close or self.status_code == 101:
            return True
        if self.response_length is not None or self.chunked:
            return False
        return not self._bodiless

    def force_close(self) -> None:
        self.must_close = True

    def send_file(self, wrapper: Any, sendfile: bool) -> None:
        """Send what ``wsgi.file_wrapper`` was given; by the kernel, where it is a file.

        :param sendfile: gunicorn's setting.
        """
        span = self._span(wrapper.filelike) if sendfile else None
        if span is None:
            for piece in wrapper:
                self.write(piece)
            self.close()
            return
        file, offset, count = span
        if self.status is None:
            raise AssertionError("start_response() was not called before the body")
        if self._bodiless or not count:
            if count:
                self._warn()
            self.close()
            return
        if not self.headers_sent:
            self._send_head(b"%x\r\n" % count if self.chunked else b"")
        elif self.chunked:
            self._connection.send(b"%x\r\n" % count)
        done = self._connection.send_file(file, offset, count)
        self.sent += done
        if done < count:
            raise AnswerBrokeOff(f"the file ended {count - done} bytes too soon")
        if self.chunked:
            self._connection.send(b"\r\n")
        self.close()

    def _span(self, file: Any) -> tuple[int, int, int] | None:
        """Descriptor, offset and length of what is left in a file; ``None`` when it is no file."""
        try:
            fd = file.fileno()
            offset = os.lseek(fd, 0, os.SEEK_CUR)
            left = max(os.fstat(fd).st_size - offset, 0)
        except (AttributeError, OSError, ValueError):
            return None
        if not left:
            return None  # /proc and the like say 0 for what can be read all the same
        if self.response_length is not None:
            left = min(left, self.response_length - self.sent)
        return fd, offset, left

    # --- the wire --------------------------------------------------------------------------------

    def _bodiless_now(self, data: bytes) -> bool:
        if self.status is None:
            raise AssertionError("write() before start_response()")
        if not self._bodiless:
            return False
        if not self.headers_sent:
            self._send_head(b"")
        self._warn()
        return True

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            self._connection.gateway.log.warning(
                "WSGI app sent body bytes on a no-body response (method=%s status=%s); "
                "dropping per RFC 9110.",
                self.method,
                self.status_code,
            )

    def _send_head(self, body: bytes) -> None:
        connection = self._connection
        if connection.body.unread or not connection.gateway.worker.alive:
            self.must_close = True
        if self.upgrade:
            word = "upgrade"
        elif self.should_close():
            word = "close"
        else:
            word = "keep-alive"
        head = (
            f"{self._protocol} {self.status}\r\nServer: {SERVER}\r\nDate: {_date()}\r\nConnection: {word}\r\n"
            f"{'Transfer-Encoding: chunked' if self.chunked else ''}"
        )
        head = f"{head}\r\n{self._block}\r\n" if self.chunked else f"{head}{self._block}\r\n"
        self.headers_sent = True
        if len(body) < _JOIN:
            connection.send(head.encode("latin-1") + body)
        else:
            connection.send_two(head.encode("latin-1"), body)


def _length(value: str) -> int:
    """RFC 9110 section 8.6: Content-Length = 1*DIGIT."""
    if not (value.isascii() and value.isdecimal()):
        raise ValueError(f"Content-Length {value!r} is no number of bytes")
    return int(value)
