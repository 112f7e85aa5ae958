"""Caches for the header sections of responses: header lines, header blocks and status lines.

Process: a serving process, in the greenlet that calls the application.
Never: hold a header line that was not checked, or grow without a limit.
"""

from __future__ import annotations

import time
from typing import Any

from gunicorn import SERVER, util
from gunicorn.http.errors import InvalidHeader, InvalidHeaderName

from gunicorn_passenger.http.grammar import FIELD_VALUE, STATUS, TOKEN

try:
    from gunicorn.http.errors import InvalidResponseHeader, InvalidResponseHeaderName
except ImportError:  # gunicorn 23
    InvalidResponseHeader, InvalidResponseHeaderName = InvalidHeader, InvalidHeaderName

#: How many header lines and status lines are cached, and how long the value of a cached one may be.
_REMEMBER = 1000
_SHORT = 100
#: The most headers of a response whose header block is cached as a whole.
_FEW = 12

_PLAIN, _LENGTH, _UPGRADE, _DROPPED = "plain", "length", "upgrade", "dropped"
statuses: dict[str, tuple[int, bool]] = {}


class HeaderLine:
    """A header of a response, checked and ready to be sent."""

    __slots__ = ("kind", "length", "line")

    def __init__(self, name: Any, value: Any) -> None:
        """
        :raises InvalidResponseHeaderName: when the name is not a token (RFC 9110 section 5.1).
        :raises InvalidResponseHeader: when the value would end the line (RFC 9110 section 5.5).
        """
        for part in name, value:
            if not isinstance(part, str):
                raise TypeError(f"{part!r} is not a string")
        if not TOKEN.fullmatch(name):
            raise InvalidResponseHeaderName(repr(name))
        if not FIELD_VALUE.fullmatch(value):
            # only the name: the value may be a secret
            raise InvalidResponseHeader(repr(name))
        stripped = value.strip(" \t")
        self.line = f"{name}: {stripped}\r\n".encode("latin-1")
        self.length = 0
        self.kind = _PLAIN
        lower = name.lower()
        if lower == "content-length":
            self.kind = _LENGTH
            self.length = _length(stripped)
        elif lower == "connection" and stripped.lower() == "upgrade":
            self.kind = _UPGRADE
        elif util.is_hoppish(name) and (lower != "upgrade" or stripped.lower() != "websocket"):
            # hop-by-hop headers belong to the server, not to the application (PEP 3333)
            self.kind = _DROPPED


class _HeaderLineCache(dict[tuple[str, str], HeaderLine]):
    """Headers that the application has sent: most of them repeat."""

    def __missing__(self, pair: tuple[str, str]) -> HeaderLine:
        name, value = pair
        field = HeaderLine(name, value)
        if len(value) <= _SHORT:
            if len(self) >= _REMEMBER:
                self.clear()
            self[pair] = field
        return field


_fields = _HeaderLineCache()


def header_block_of(headers: Any) -> tuple[bytes, int | None, bool]:
    """The header lines of a response as they are sent.

    :returns: the lines, the value of ``Content-Length``, and whether they switch protocols.
    """
    block = b""
    length = None
    upgrade = False
    for pair in headers:
        try:
            field = _fields[pair]
        except TypeError:
            field = HeaderLine(*pair)
        if field.kind is not _PLAIN:
            if field.kind is not _LENGTH:
                if field.kind is _UPGRADE:
                    upgrade = True
                continue
            if length is not None:
                if length != field.length:
                    raise InvalidResponseHeader("'Content-Length'")
                continue
            length = field.length
        block += field.line
    return block, length, upgrade


class _HeaderBlockCache(dict[tuple[tuple[str, str], ...], tuple[bytes, "int | None", bool]]):
    """All headers of a response: many applications repeat them with each response."""

    def __missing__(self, headers: tuple[tuple[str, str], ...]) -> tuple[bytes, int | None, bool]:
        # a block with a header that was never sent before is unlikely to repeat
        known = len(headers) <= _FEW and all(pair in _fields for pair in headers)
        made = header_block_of(headers)
        if known:
            if len(self) >= _REMEMBER:
                self.clear()
            self[headers] = made
        return made


header_blocks = _HeaderBlockCache()


def check_status(status: Any) -> tuple[int, bool]:
    """Check a status line, and cache the result.

    :returns: the code, and whether it never has a body (RFC 9110 section 6.4.1).
    """
    if not isinstance(status, str):
        raise TypeError(f"{status!r} is not a string")
    if not STATUS.fullmatch(status):
        raise ValueError(f"Invalid status {status!r}")
    code = int(status[:3])
    found = code, code in (204, 304) or 100 <= code < 200
    if len(statuses) >= _REMEMBER:
        statuses.clear()
    statuses[status] = found
    return found


class _StatusLineCache:
    """The beginnings of header sections, built once a second: status line, Server, Date and Connection."""

    def __init__(self) -> None:
        self._until = 0.0
        self._date = ""
        self._made: dict[tuple[str, str, str], bytes] = {}

    def begin(self, protocol: str, status: str, connection: str) -> bytes:
        now = time.time()
        if not self._until - 1.0 <= now < self._until:
            self._until = int(now) + 1.0
            self._date = util.http_date(int(now))
            self._made.clear()
        made = self._made.get((protocol, status, connection))
        if made is None:
            lines = f"Server: {SERVER}\r\nDate: {self._date}\r\nConnection: {connection}\r\n"
            made = f"{protocol} {status}\r\n{lines}".encode("latin-1")
            if len(self._made) < _REMEMBER:
                self._made[protocol, status, connection] = made
        return made


begin_head = _StatusLineCache().begin


def _length(value: str) -> int:
    """RFC 9110 section 8.6: Content-Length = 1*DIGIT."""
    if not (value.isascii() and value.isdecimal()):
        raise ValueError(f"Content-Length {value!r} is not a number of bytes")
    return int(value)
