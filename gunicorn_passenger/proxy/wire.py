"""Text becomes bytes: where the proxy writes header and trailer sections, and checks them once more.

Process: any process in which the proxy is mounted. It does no I/O.
Never: write a line that holds more than its caller meant.

Whatever a request or a response is made of (the environ, options, handlers, the name of a peer, another
server's headers), it passes through one of these functions right before it is sent. An ordinary GET is the
exception: :mod:`.plain_headers` copies header lines of the plainest form alone, and :mod:`.handler` a target
that was checked when it was parsed. A text that two parsers could understand differently is never sent: the
request ends with 500. Bytes that were made here may be kept and sent again without another check.
"""

from __future__ import annotations

from contextlib import suppress

from gunicorn_passenger.http.grammar import FIELD_VALUE, REQUEST_TARGET, TOKEN

Fields = list[tuple[str, str]]

#: how much of a bad text an error shows
_SHOWN = 80


class Unsendable(Exception):
    """A request or a response would hold a text that must not be sent."""


def request_line(method: str, target: str) -> bytes:
    """The first line of a request (RFC 9112 section 3).

    :raises Unsendable: when the method is not a token, or the target has other characters than visible
        ASCII ones.
    """
    if not isinstance(method, str) or not TOKEN.fullmatch(method):
        raise Unsendable(f"the request has the method {_cut(method)}, which is not a token")
    if not isinstance(target, str) or not REQUEST_TARGET.fullmatch(target):
        raise Unsendable(f"the request has the target {_cut(target)}, which is not valid in a request line")
    return f"{method} {target} HTTP/1.1\r\n".encode("ascii")


def status_line(status: int, reason: str) -> bytes:
    """The first line of a response (RFC 9112 section 4).

    :raises Unsendable: when the reason holds a character that a status line must not have.
    """
    return b"HTTP/1.1 %b\r\n" % status_text(status, reason).encode("latin-1")


def status_text(status: int, reason: str) -> str:
    """Code and reason of a response, as WSGI has them.

    :raises Unsendable: as :func:`status_line`.
    """
    if isinstance(status, bool) or not isinstance(status, int) or not 100 <= status <= 999:
        raise Unsendable(f"the response has the status {_cut(status)}, which is not a number from 100 to 999")
    if not isinstance(reason, str) or not FIELD_VALUE.fullmatch(reason):
        raise Unsendable(f"the response has the reason {_cut(reason)}, which is not valid in a status line")
    return f"{status} {reason}"


def checked(headers: Fields) -> Fields:
    """Headers, unchanged, when each of them is one line (RFC 9110 sections 5.1 and 5.5).

    :raises Unsendable: names the header that is not.
    """
    with suppress(TypeError, ValueError):
        # all of them at once: what is true of two tokens or values is true of one behind the other
        names, values = zip(*headers, strict=True)
        if TOKEN.fullmatch("".join(names)) and all(names) and FIELD_VALUE.fullmatch("".join(values)):
            return headers
    for name, value in headers:
        if not isinstance(name, str) or not TOKEN.fullmatch(name):
            raise Unsendable(f"a header has the name {_cut(name)}, which is not a token")
        if not isinstance(value, str) or not FIELD_VALUE.fullmatch(value):
            raise Unsendable(
                f"the header {name!r} has the value {_cut(value)}, which holds a line break or another "
                "character that a header must not have"
            )
    return headers


def lines_of(headers: Fields) -> bytes:
    """The lines of headers or trailers, without the empty line behind them.

    :raises Unsendable: as :func:`checked`.
    """
    return "".join([f"{name}: {value}\r\n" for name, value in checked(headers)]).encode("latin-1")


def _cut(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
