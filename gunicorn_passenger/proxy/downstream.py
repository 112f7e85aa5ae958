"""The client of a forwarded request: behind any WSGI server, or on a connection of our own.

Process: any process in which the proxy is mounted.
Never: bypass a middleware: what that has changed counts.

Under our own server the proxy speaks to the connection (:mod:`gunicorn_passenger.http.downstream_api`):
headers keep their order, letter case and repetition, 1xx responses and trailers pass, and the kernel moves
large bodies. When a middleware has replaced ``start_response`` or ``wsgi.input``, the proxy uses WSGI alone.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.errors import BadRequestBody
from gunicorn_passenger.http.body import EMPTY_BODY
from gunicorn_passenger.http.chunked import CHUNKED
from gunicorn_passenger.http.downstream_api import DownstreamConnection
from gunicorn_passenger.http.grammar import FIELD_SECTION_BYTES
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import (
    UNKNOWN,
    ForwardedInfo,
    HeaderList,
    RequestHeaders,
    environ_headers,
    normal_address,
    number_of_bytes,
    present_headers,
)
from gunicorn_passenger.proxy.upstream_io import runtime

if TYPE_CHECKING:
    from gunicorn_passenger.http.connection import Connection

    def _implements_the_contract(connection: Connection) -> DownstreamConnection:
        return connection


class WsgiDownstream:
    """A client behind any WSGI server."""

    #: our connection, where the proxy may use it
    connection: DownstreamConnection | None = None
    #: whether no middleware can have changed the environ
    unmodified = False

    def __init__(
        self,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        carrier: DownstreamConnection | None = None,
    ) -> None:
        """
        :param carrier: our connection that the request came over, although the proxy may not use it.
        """
        self.environ = environ
        self._carrier = carrier
        self.start_response = start_response
        self.method: str = environ["REQUEST_METHOD"]
        self.body = environ["wsgi.input"]
        self.protocol: str = environ.get("SERVER_PROTOCOL", "HTTP/1.1")
        self._watch: tuple[Callable[..., Any], Any] | None = None
        self._reading_body = False

    def headers(self, keep_case: bool) -> RequestHeaders:
        """The headers of the request.

        :param keep_case: whether names keep their letter case.
        """
        headers = present_headers(self.environ, self._sent_headers())
        # An application may have written any of them, also with the value that the client has sent. So none
        # is taken away because the client's Connection names it.
        own = set() if self.unmodified else {name.lower() for name, _ in headers}
        return RequestHeaders(headers, keep_case, self.protocol, own)

    def _sent_headers(self) -> HeaderList | None:
        """The headers as the client has sent them; ``None`` when that is not known."""
        if self._carrier is None:
            return None
        head = self._carrier.head
        # without what only gunicorn's compatibility settings let in
        found = FIELD_SECTION_BYTES.fullmatch(head, head.find(b"\r\n") + 2)
        if found is None:
            return None
        pairs = []
        for line in found[1].decode("latin-1").split("\r\n"):
            name, colon, value = line.partition(":")
            # names with an underscore can stand for others (gunicorn's header_map)
            if colon and "_" not in name:
                pairs.append((name, value.strip(" \t")))
        return pairs

    def length(self) -> int:
        """The length of the request body in bytes, or ``CHUNKED``.

        :raises BadRequestBody: when it is not known.
        """
        environ = self.environ
        if environ.get("HTTP_TRANSFER_ENCODING"):
            if environ["HTTP_TRANSFER_ENCODING"].strip().lower() != "chunked":
                raise BadRequestBody("the only transfer coding is chunked", 501)
            if environ.get("wsgi.input_terminated"):
                return CHUNKED
            if not environ.get("CONTENT_LENGTH"):
                raise BadRequestBody("the server does not say where a chunked body ends", 411)
        text = environ.get("CONTENT_LENGTH") or "0"
        length = number_of_bytes(text)
        if length is None:
            raise BadRequestBody(f"Content-Length {text[:20]!r} is not a number of bytes below 2**63")
        return length

    def buffered_bytes(self) -> int:
        """How many bytes of the body have come already."""
        return 0

    def forwarded_info(self, options: Options, host: str | None, prefix: str = "") -> ForwardedInfo:
        """Where the request comes from.

        :param prefix: the beginning of the path that the target is not sent.
        """
        environ = self.environ
        address = self._address()
        trusted = self._trusted(address) if options.trusted is None else options.trusts(address)
        scheme = environ.get("wsgi.url_scheme", "http")
        own_scheme = scheme if self.connection is None else "http"
        return ForwardedInfo(address, scheme, own_scheme, host, trusted, prefix)

    @property
    def tunnels(self) -> bool:
        """Whether its connection can become a tunnel."""
        return "gunicorn.socket" in self.environ and bool(runtime().concurrent)

    def _address(self) -> str:
        """The client's IP address: empty on a UNIX socket, ``unknown`` for any other text.

        A client on a UNIX socket chooses its own name, which may look like an address.
        """
        text = self.environ.get("REMOTE_ADDR") or ""
        if not text:
            return ""
        if self._carrier is not None:
            addr = self._carrier.context.addr
            name = None if isinstance(addr, tuple) else addr
        else:
            name = _unix_name(self.environ.get("gunicorn.socket"))
        address = normal_address(text)
        if name is None:
            return address
        # a program may have taken an address from a header that it believes
        return "" if address == UNKNOWN or text == os.fsdecode(name) else address

    def _trusted(self, address: str) -> bool:
        if not address:
            return True
        try:
            return ipaddress.ip_address(address).is_loopback
        except ValueError:
            return False

    # what only our own connection can do

    def send_informational(self, status: int, reason: str, headers: HeaderList) -> None:
        """Send an interim response (RFC 9110 section 15.2); WSGI servers can send 103 at most."""
        hints = self.environ.get("wsgi.early_hints")
        if status == 103 and hints is not None:
            hints(wire.checked(list(headers)))

    def send_continue(self) -> None:
        """Ask the client for the body; a WSGI server does that when the body is read."""

    # what our own connection tells, even where the proxy may not send over it

    @property
    def body_was_read(self) -> bool:
        """Whether the program has read a part of the body, as far as that is known."""
        return bool(getattr(self.body, "was_read", False))

    @property
    def reports_disconnects(self) -> bool:
        """Whether reading the body raises an exception when the client does not send all of it."""
        return self._carrier is not None

    @property
    def may_interrupt_reads(self) -> bool:
        """Whether a read of the body may be interrupted: the connection is then closed after the response.

        Otherwise the server would take the rest of the body for the next request (RFC 9112 section 11.2).
        """
        return self._carrier is not None or self._server is not None or hasattr(self.body, "failed")

    def close_after_response(self) -> None:
        """Keep the server from reading another request from the connection.

        Our own connection closes by itself, and gunicorn 27 does, too, when a read of the body has failed.
        """
        server = self._server
        if hasattr(server, "force_close"):  # gunicorn's response
            server.force_close()
        elif server is not None:
            server.close_connection = True

    @property
    def _server(self) -> Any:
        """The server's object for this request, where no middleware stands before it."""
        server = getattr(self.start_response, "__self__", None)
        if hasattr(server, "force_close") or hasattr(server, "close_connection"):
            return server
        return None

    def watch(self, gone: Callable[..., Any], argument: Any) -> None:
        """Call ``gone(argument)`` in the hub when the client disconnects."""
        if self._carrier is not None:
            if self._reading_body:
                self._watch = gone, argument
            self._carrier.watch(gone, argument, self._reading_body)

    def unwatch(self) -> None:
        """Do not call it any more."""
        if self._carrier is not None:
            self._watch = None
            self._carrier.unwatch()

    def set_reading_body(self, active: bool) -> None:
        """Whether a greenlet reads the body: reading then detects a disconnect, and nothing else may read."""
        self._reading_body = active
        if self._carrier is not None and not active and self._watch is not None:
            self._carrier.unwatch()
            self._carrier.watch(*self._watch)


class NativeDownstream(WsgiDownstream):
    """A client of our own server."""

    def __init__(
        self,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        connection: DownstreamConnection,
        unmodified: bool,
    ) -> None:
        """
        :param connection: the :class:`~gunicorn_passenger.http.connection.Connection`.
        :param unmodified: whether no middleware can have changed the environ.
        """
        super().__init__(environ, start_response, connection)
        self.connection = self._connection = connection
        self.unmodified = unmodified

    def headers(self, keep_case: bool) -> RequestHeaders:
        if not self.unmodified or self.environ["RAW_URI"][:1] != "/":
            # with a target in absolute form, the host is not that of the header
            return super().headers(keep_case)
        sent = self._sent_headers()
        return RequestHeaders(
            environ_headers(self.environ) if sent is None else sent, keep_case, self.protocol
        )

    def length(self) -> int:
        if self.body is EMPTY_BODY:
            # "Content-Length: 0" is among the headers, where the client has sent it
            return 0
        return super().length()

    def buffered_bytes(self) -> int:
        if self.body is not self._connection.body:
            return 0
        return int(self._connection.buffered())

    def _trusted(self, address: str) -> bool:
        return bool(self._connection.context.trusted)

    def send_informational(self, status: int, reason: str, headers: HeaderList) -> None:
        if self.environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            return
        self._connection.send(wire.status_line(status, reason) + wire.lines_of(headers) + b"\r\n")

    def send_continue(self) -> None:
        if getattr(self.body, "expect", False):
            self.body.expect = False
            self._connection.send_continue()


def _unix_name(sock: Any) -> Any:
    """The name that the peer of a UNIX socket has bound; ``None`` on any other socket."""
    try:
        return sock.getpeername() if sock.family == socket.AF_UNIX else None
    except (AttributeError, OSError):
        return None


def downstream_for(
    environ: dict[str, Any], start_response: Callable[..., Any], proxy: object
) -> WsgiDownstream:
    """The client of a WSGI request."""
    connection: DownstreamConnection | None = getattr(environ.get("gunicorn.socket"), "connection", None)
    if connection is None:
        return WsgiDownstream(environ, start_response)
    response = connection.response
    if response is None:
        return WsgiDownstream(environ, start_response)
    if (
        response.status is not None
        or getattr(start_response, "__self__", None) is not response
        or environ.get("wsgi.input") is not connection.body
    ):
        return WsgiDownstream(environ, start_response, connection)
    return NativeDownstream(environ, start_response, connection, is_sole_app(connection.listener.app, proxy))


def is_sole_app(app: Any, proxy: object) -> bool:
    """Whether an application is the proxy and nothing else: no middleware can have changed its requests."""
    return app is proxy or (getattr(type(app), "only_proxy", False) and app.app is proxy)
