"""Calls the handlers of a proxy's events, with the request and the response as they may change them.

Process: any process in which the proxy is mounted, in the greenlet or thread of the request.
Never: let a handler send text that would end a line or a message.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from werkzeug.datastructures import Headers

from gunicorn_passenger.errors import ClientDisconnected, ProxyError, SettingError, snake_case
from gunicorn_passenger.http.grammar import FIELD_VALUE
from gunicorn_passenger.proxy.options import check_field
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.wait_errors import DownstreamDisconnected

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
    """A handler has raised an exception, or has left something that cannot be sent."""

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        """:param cause: the exception that the handler has raised, for the log."""
        super().__init__(text)
        self.cause = cause


class Events:
    """The handlers of one proxy."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Callable[..., Any]]] = {}
        #: whether it has any handler
        self.any = False

    def on(self, event: str, handler: Callable[..., Any]) -> None:
        """
        :raises SettingError: for an unknown event.
        """
        self.check(event)
        if not callable(handler):
            raise SettingError(f"the handler of {event!r} is not callable: {handler!r}")
        self._handlers.setdefault(event, []).append(handler)
        self.any = True

    def check(self, event: Any) -> None:
        """
        :raises SettingError: for an unknown event.
        """
        if event not in EVENTS:
            meant = snake_case(str(event))
            hint = f"did you mean {meant!r}?" if meant in EVENTS else f"the events are: {', '.join(EVENTS)}"
            raise SettingError(f"unknown event {event!r}; {hint}")

    def off(self, event: str, handler: Callable[..., Any]) -> None:
        """Take a handler away; harmless when it is not registered."""
        if handler in self._handlers.get(event, ()):
            self._handlers[event].remove(handler)

    def has(self, *events: str) -> bool:
        return self.any and any(self._handlers.get(event) for event in events)

    def emit(self, event: str, *arguments: Any) -> Any:
        """Call the handlers of an event in their order.

        :returns: the last value other than ``None`` that a handler returned.
        :raises HandlerFailed: when a handler raises.
        """
        result = None
        for handler in list(self._handlers.get(event, ())):
            try:
                returned = handler(*arguments)
            except (ProxyError, ClientDisconnected, DownstreamDisconnected):
                raise  # it has read the body of the response, and the upstream or the client has failed
            except Exception as error:
                raise HandlerFailed(f"a handler of {event!r} failed", error) from error
            if returned is not None:
                result = returned
        return result


class UpstreamRequest:
    """The request as it will be sent."""

    def __init__(self, method: str, path: str, headers: HeaderList, target: Target) -> None:
        # what a handler may write has any type until it is checked, even where the package is compiled
        self.method: Any = method
        #: path and query
        self.path: Any = path
        self.headers = Headers(headers)
        self.target = target
        #: bytes to send in place of the client's body
        self.body: Any = None

    def __repr__(self) -> str:
        return f"<UpstreamRequest {self.method} {self.path} to {self.target}>"


class UpstreamResponse:
    """The response of a target, before it is sent to the client."""

    def __init__(
        self, status: int, reason: str, headers: HeaderList, target: Target, body: Iterator[bytes]
    ) -> None:
        # as in UpstreamRequest
        self.status_code: Any = status
        self.reason: Any = reason
        self.headers = Headers(headers)
        self.target = target
        self._body = body
        self._stream: io.BufferedReader | None = None

    def __repr__(self) -> str:
        return f"<UpstreamResponse {self.status} from {self.target}>"

    @property
    def stream(self) -> io.BufferedReader:
        """The body as it comes: a file with ``read``, ``read1`` and ``readline``."""
        if self._stream is None:
            self._stream = io.BufferedReader(_ResponseBodyFile(self._body), 65536)
        return self._stream

    def left(self) -> Iterator[bytes]:
        """The part of the body that the handlers have not read."""
        if self._stream is None:
            yield from self._body
        else:
            while chunk := self._stream.read1(65536):
                yield chunk

    @property
    def status(self) -> str:
        """Status code and reason, as WSGI has them."""
        return f"{self.status_code} {self.reason}".rstrip() + (" " if not self.reason else "")


class _ResponseBodyFile(io.RawIOBase):
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def checked(headers: Headers, event: str) -> HeaderList:
    """The headers that a handler has left.

    :raises HandlerFailed: when one of them cannot be sent.
    """
    try:
        return [check_field(name, value, event, framing=True) for name, value in headers]
    except SettingError as error:
        raise HandlerFailed(str(error)) from None


def check_reason(reason: Any) -> str:
    if not isinstance(reason, str) or not FIELD_VALUE.fullmatch(reason):
        raise HandlerFailed(
            f"proxy_res: the reason {reason!r} holds a character that a status line cannot have"
        )
    return reason
