"""The client of a proxied request, as a WSGI server shows it, or as our own connection does.

Runs in: wherever the proxy is mounted. Must never: use more of our connection than was asked for, or
trust what a middleware may have changed less than the middleware.

Under our own server the proxy speaks to the connection: fields keep their order, letter case and
repetition, 1xx and trailers pass, large bodies are moved by the kernel. That holds while nobody stands
between: a ``start_response`` of somebody else, or another ``wsgi.input``, is used as WSGI has it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable
from typing import Any

from gunicorn_passenger.errors import BadRequestBody
from gunicorn_passenger.http.body import EMPTY_BODY
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import (
    UNKNOWN,
    ForwardedInfo,
    HeaderList,
    RequestHeaders,
    environ_headers,
    ip_address_of,
    number_of_bytes,
    present_fields,
)
from gunicorn_passenger.proxy.upstream_io import runtime

#: the length of a body that is sent in chunks
CHUNKED = -1

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# the fields of a head, without what only gunicorn's compatibility settings let in
_STRICT = re.compile(rb"((?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n")


class WsgiDownstream:
    """A client behind any WSGI server."""

    #: our connection, where the proxy may use it
    connection: Any = None
    #: whether no application can have changed the environ
    pristine = False

    def __init__(
        self, environ: dict[str, Any], start_response: Callable[..., Any], carrier: Any = None
    ) -> None:
        """
        :param carrier: our connection that the request has come over, though the proxy may not use it.
        """
        self.environ = environ
        self._carrier = carrier
        self.start_response = start_response
        self.method: str = environ["REQUEST_METHOD"]
        self.body = environ["wsgi.input"]
        self.protocol: str = environ.get("SERVER_PROTOCOL", "HTTP/1.1")

    def fields(self, keep_case: bool) -> RequestHeaders:
        """The fields of the request.

        :param keep_case: whether names keep their letter case.
        """
        fields = present_fields(self.environ, self._came())
        # An application may have written any of them, also with the value that the client has sent. So none
        # is taken away because the client's Connection names it.
        own = set() if self.pristine else {name.lower() for name, _ in fields}
        return RequestHeaders(fields, keep_case, self.protocol, own)

    def _came(self) -> HeaderList | None:
        """The headers as the client has sent them; ``None`` when that is not known."""
        if self._carrier is None:
            return None
        head = self._carrier.head
        found = _STRICT.fullmatch(head, head.find(b"\r\n") + 2)
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
        """Of the request's body, in bytes; ``CHUNKED`` when it tells its end by itself.

        :raises BadRequestBody: when it cannot be known.
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

    def arrived(self) -> int:
        """Bytes of the body that are there already."""
        return 0

    def origin(self, options: Options, host: str | None) -> ForwardedInfo:
        """Where the request comes from."""
        environ = self.environ
        address = self._address()
        trusted = self._trusted(address) if options.trusted is None else options.trusts(address)
        scheme = environ.get("wsgi.url_scheme", "http")
        return ForwardedInfo(address, scheme, scheme if self.connection is None else "http", host, trusted)

    @property
    def tunnels(self) -> bool:
        """Whether its connection can become a tunnel."""
        return "gunicorn.socket" in self.environ and bool(runtime().concurrent)

    def _address(self) -> str:
        """The client's IP address: empty on a UNIX socket, ``unknown`` for any other text.

        The name of a UNIX peer is the client's to choose, down to one that looks like an address.
        """
        said = self.environ.get("REMOTE_ADDR") or ""
        if not said:
            return ""
        if self._carrier is not None:
            addr = self._carrier.peer.addr
            name = None if isinstance(addr, tuple) else addr
        else:
            name = _unix_name(self.environ.get("gunicorn.socket"))
        address = ip_address_of(said)
        if name is None:
            return address
        # a program may have taken an address from a header that it believes
        return "" if address == UNKNOWN or said == os.fsdecode(name) else address

    def _trusted(self, address: str) -> bool:
        if not address:
            return True
        try:
            return ipaddress.ip_address(address).is_loopback
        except ValueError:
            return False

    # what only our own connection can do

    def interim(self, status: int, reason: str, fields: HeaderList) -> None:
        """An interim answer (RFC 9110 section 15.2); WSGI has a way for 103 at most."""
        hints = self.environ.get("wsgi.early_hints")
        if status == 103 and hints is not None:
            hints(wire.checked(list(fields)))

    def proceed(self) -> None:
        """The target wants the body: the server says so to the client when the body is read."""

    def watch(self, callback: Callable[..., Any], argument: Any) -> None:
        """Call back in the hub when the client goes."""

    def unwatch(self) -> None:
        """Do so no more."""

    def uploading(self, active: bool) -> None:
        """While the body is read, reading tells that the client has gone."""


class NativeDownstream(WsgiDownstream):
    """A client of our own server."""

    def __init__(self, environ: dict[str, Any], start_response: Any, connection: Any, pristine: bool) -> None:
        """
        :param connection: the :class:`~gunicorn_passenger.http.connection.Connection`.
        :param pristine: whether no application can have changed the environ.
        """
        super().__init__(environ, start_response, connection)
        self.connection = connection
        self.pristine = pristine
        self._callback: Any = None
        self._uploading = False

    def fields(self, keep_case: bool) -> RequestHeaders:
        if not self.pristine or self.environ["RAW_URI"][:1] != "/":
            # with a target in absolute form, the host is not that of the header
            return super().fields(keep_case)
        connection = self.connection
        head = connection.head
        block = head[head.find(b"\r\n") + 2 :]
        memo = connection.memo
        if memo is not None and memo[0] == block and memo[1] is keep_case and memo[2] == self.protocol:
            known: RequestHeaders = memo[3]
            if known.kept is not None and known.kept.straight and connection.response.req is None:
                known.kept.known = connection.peer.known
            return known
        came = self._came()
        if came is None:
            came = environ_headers(self.environ)
        fields = RequestHeaders(came, keep_case, self.protocol)
        connection.memo = block, keep_case, self.protocol, fields
        return fields

    def length(self) -> int:
        if self.body is EMPTY_BODY:
            # an announced length of zero is told from none by the field, which is handed on
            return 0
        return super().length()

    def arrived(self) -> int:
        if self.body is not self.connection.body:
            return 0
        return int(self.connection.buffered())

    def _trusted(self, address: str) -> bool:
        return bool(self.connection.peer.trusted)

    def interim(self, status: int, reason: str, fields: HeaderList) -> None:
        if self.environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            return
        self.connection.send(wire.status_line(status, reason) + wire.lines_of(fields) + b"\r\n")

    def proceed(self) -> None:
        if getattr(self.body, "expect", False):
            self.body.expect = False
            self.connection.send_continue()

    def watch(self, callback: Callable[..., Any], argument: Any) -> None:
        if self._uploading:
            self._callback = callback, argument
        self.connection.watch(callback, argument, self._uploading)

    def unwatch(self) -> None:
        self._callback = None
        self.connection.unwatch()

    def uploading(self, active: bool) -> None:
        self._uploading = active
        if not active and self._callback is not None:
            self.connection.unwatch()
            self.connection.watch(*self._callback)


def _unix_name(sock: Any) -> Any:
    """What the peer of a UNIX socket has bound its own end to; ``None`` on any other socket."""
    try:
        return sock.getpeername() if sock.family == socket.AF_UNIX else None
    except (AttributeError, OSError):
        return None


def downstream_for(environ: dict[str, Any], start_response: Any, proxy: Any) -> WsgiDownstream:
    """The client of a WSGI request."""
    connection: Any = getattr(environ.get("gunicorn.socket"), "connection", None)
    if connection is None:
        return WsgiDownstream(environ, start_response)
    response: Any = connection.response
    if response is None:
        return WsgiDownstream(environ, start_response)
    if (
        response.status is not None
        or getattr(start_response, "__self__", None) is not response
        or environ.get("wsgi.input") is not connection.body
    ):
        return WsgiDownstream(environ, start_response, connection)
    return NativeDownstream(environ, start_response, connection, is_sole_app(connection.gateway.app, proxy))


def is_sole_app(app: Any, proxy: Any) -> bool:
    """Whether an application is the proxy and nothing else, which may so take requests as they came in."""
    return app is proxy or (getattr(type(app), "only_proxy", False) and app.app is proxy)
