"""The contract between the HTTP server and the proxy: what the proxy may use of a connection.

Process: a serving process. Types only.
Never: have code.

:class:`~gunicorn_passenger.http.connection.Connection` and its response, request body, listener context and
connection context implement these protocols. ``proxy`` imports ``http``; ``http`` does not import ``proxy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol


class DisconnectNotifier(Protocol):
    """Tells a greenlet that waits for another server that its own client has disconnected."""

    def watch(self, gone: Callable[..., Any], argument: Any) -> None:
        """Call ``gone(argument)`` in the hub when the client disconnects."""

    def unwatch(self) -> None:
        """Do not call it any more."""


class UpstreamHead(Protocol):
    """The head of another server's response, for :meth:`DownstreamResponse.send_upstream_response`."""

    status: int
    #: status code and reason
    line: str
    #: the header lines, without ``Connection``
    lines: bytes | None


class DownstreamResponse(Protocol):
    """The response to the request that a connection has now."""

    #: status code and reason; ``None`` before the application has begun the response
    status: str | None
    headers_sent: bool
    #: bytes of the body that were sent
    sent: int
    chunked: bool
    #: whether gunicorn's own parser has read the request
    req: Any

    @property
    def bodiless(self) -> bool:
        """Whether it has no body, whatever its headers say (RFC 9110 section 6.4.1)."""

    def start_response(
        self, status: str, headers: Iterable[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's ``start_response``."""

    def force_close(self) -> None:
        """End the connection with this response."""

    def begin_upstream_response(
        self, status: str, headers: bytes, length: int | None, body: bytes, whole: bool, unread: bool
    ) -> None:
        """Send the head of another server's response, and the first part of its body."""

    def send_upstream_response(self, head: UpstreamHead, wire: bytes, body: bytes) -> None:
        """Send another server's response that has come as a whole."""

    def mark_sent(self) -> None:
        """The proxy has sent the response to its end."""

    def switch_protocols(self, status: str, headers: str) -> None:
        """The connection is a tunnel from now on."""


class GunicornWorker(Protocol):
    """gunicorn's worker."""

    alive: bool


class DownstreamListener(Protocol):
    """The listener that a connection was accepted on."""

    #: the WSGI callable of the listener
    app: Any
    #: whether the server accepts no more connections
    closing: bool
    #: whether the application only forwards requests: a pending response then does not wait for its code
    is_proxy: bool

    @property
    def worker(self) -> GunicornWorker: ...


class DownstreamContext(Protocol):
    """What all requests of a connection share."""

    #: a tuple as ``accept()`` gives it, or an empty string on a UNIX socket
    addr: Any
    #: whether gunicorn believes its forwarding headers
    trusted: bool


class ParsedHeaders(Protocol):
    """The headers of a request: the same object while the client repeats the same bytes."""

    #: what the application has decided about them
    plan: Any


class DownstreamConnection(DisconnectNotifier, Protocol):
    """A connection of our own HTTP server."""

    #: the request line and the header section as they came
    head: bytes
    #: called when the worker drains, while the connection is a tunnel
    on_drain: Any

    @property
    def body(self) -> Any: ...

    @property
    def parsed(self) -> ParsedHeaders: ...

    @property
    def context(self) -> DownstreamContext: ...

    @property
    def listener(self) -> DownstreamListener: ...

    @property
    def response(self) -> DownstreamResponse | None: ...

    def watch(self, gone: Callable[..., Any], argument: Any, body: bool = False) -> None:
        """:param body: whether a greenlet reads the request body meanwhile."""

    def buffered(self) -> int:
        """How many bytes of the request body have come already."""

    def send(self, data: bytes) -> None: ...

    def send_continue(self) -> None: ...

    def hijack(self, head: bytes, status: str, headers: str) -> bytes: ...

    def share_loop(self) -> None:
        """Let other greenlets run when this connection has kept the loop busy for too long."""

    def count_sent(self, count: int) -> None: ...

    def raw_fileno(self) -> int: ...

    def wait_writable(self) -> None: ...
