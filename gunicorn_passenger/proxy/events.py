"""What the handlers of a proxy's events get, and how they are called.

Runs in: wherever the proxy is mounted, in the request's greenlet or thread. Must never: let a handler
send what would end a line or a message.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from werkzeug.datastructures import Headers

from gunicorn_passenger.errors import ClientDisconnected, ProxyError, SettingError
from gunicorn_passenger.http.grammar import FIELD_VALUE
from gunicorn_passenger.proxy.options import check_field
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.upstream_io import DownstreamDisconnected

EVENTS = (
    "start",
    "proxy_req",
    "proxy_req_ws",
    "proxy_res",
    "end",
    "open",
    "close",
    "error",
    "econnreset",
)


class HandlerFailed(Exception):
    """A handler has raised, or has changed something so that it cannot be sent."""


class Events:
    """The handlers of one proxy."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Callable[..., Any]]] = {}
        #: whether there is any
        self.any = False

    def on(self, event: str, handler: Callable[..., Any]) -> None:
        """
        :raises SettingError: for an event that there is not.
        """
        self.check(event)
        if not callable(handler):
            raise SettingError(f"the handler of {event!r} is not callable: {handler!r}")
        self._handlers.setdefault(event, []).append(handler)
        self.any = True

    def check(self, event: Any) -> None:
        """
        :raises SettingError: for an event that there is not.
        """
        if event not in EVENTS:
            raise SettingError(f"there is no event {event!r}; there are: {', '.join(EVENTS)}")

    def off(self, event: str, handler: Callable[..., Any]) -> None:
        """Take a handler away; harmless when it is none."""
        if handler in self._handlers.get(event, ()):
            self._handlers[event].remove(handler)

    def has(self, *events: str) -> bool:
        return self.any and any(self._handlers.get(event) for event in events)

    def emit(self, event: str, *arguments: Any) -> Any:
        """Call the handlers of an event in their order.

        :returns: what the last of them returned that returned something.
        :raises HandlerFailed: when one raises.
        """
        result = None
        for handler in list(self._handlers.get(event, ())):
            try:
                returned = handler(*arguments)
            except (ProxyError, ClientDisconnected, DownstreamDisconnected):
                raise  # it has read the answer's body, and the target or the client has failed
            except Exception as error:
                raise HandlerFailed(f"a handler of {event!r} failed") from error
            if returned is not None:
                result = returned
        return result


class UpstreamRequest:
    """The request as it will be sent."""

    def __init__(self, method: str, path: str, fields: HeaderList, target: Target) -> None:
        self.method = method
        #: path and query
        self.path = path
        self.headers = Headers(fields)
        self.target = target
        #: bytes to send in place of the client's body
        self.body: bytes | None = None

    def __repr__(self) -> str:
        return f"<UpstreamRequest {self.method} {self.path} to {self.target}>"


class UpstreamResponse:
    """The answer of a target, before it is sent to the client."""

    def __init__(
        self, status: int, reason: str, fields: HeaderList, target: Target, body: Iterator[bytes]
    ) -> None:
        self.status_code = status
        self.reason = reason
        self.headers = Headers(fields)
        self.target = target
        self._body = body
        self._stream: io.BufferedReader | None = None

    def __repr__(self) -> str:
        return f"<UpstreamResponse {self.status} from {self.target}>"

    @property
    def stream(self) -> io.BufferedReader:
        """The body, as it comes in: a file with ``read``, ``read1`` and ``readline``."""
        if self._stream is None:
            self._stream = io.BufferedReader(_ResponseBodyFile(self._body), 65536)
        return self._stream

    def left(self) -> Iterator[bytes]:
        """What of the body no handler has read."""
        if self._stream is None:
            yield from self._body
        else:
            while piece := self._stream.read1(65536):
                yield piece

    @property
    def status(self) -> str:
        """Code and reason, as WSGI has them."""
        return f"{self.status_code} {self.reason}".rstrip() + (" " if not self.reason else "")


class _ResponseBodyFile(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def checked(headers: Headers, event: str) -> HeaderList:
    """The fields that a handler has left.

    :raises HandlerFailed: when one of them cannot be sent.
    """
    try:
        return [check_field(name, value, event, framing=True) for name, value in headers]
    except SettingError as error:
        raise HandlerFailed(str(error)) from None


def check_reason(reason: Any) -> str:
    if not isinstance(reason, str) or not FIELD_VALUE.fullmatch(reason):
        raise HandlerFailed(f"proxy_res: the reason {reason!r} holds what no status line may")
    return reason
