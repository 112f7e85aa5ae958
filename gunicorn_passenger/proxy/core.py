"""The reverse proxy as a WSGI application: one target, plain requests, streamed both ways.

Runs in: wherever it is mounted. Must never: collect a body, guess a framing, or turn a truncated
answer into a whole one.
"""

from __future__ import annotations

import http.client
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import gevent
from gevent import socket as gsocket
from werkzeug.exceptions import BadGateway, GatewayTimeout, HTTPException, NotImplemented

from gunicorn_passenger.proxy.body import PIECE, BrokenOff, pieces
from gunicorn_passenger.proxy.headers import (
    BadResponse,
    Fields,
    forwarded_fields,
    request_fields,
    response_fields,
)

log = logging.getLogger("gunicorn.error")

#: Statuses whose answers have no body (RFC 9110 section 6.4.1).
_BODILESS = (204, 304)

#: How much of a request body is read after the target has stopped listening to it, in bytes.
_DISCARD = 1 << 20
#: How long an answered client may take to send the rest of its body, in seconds.
_LINGER = 2.0


@dataclass(frozen=True)
class Target:
    """Where requests go: a TCP address or a UNIX socket, and a base path."""

    host: str
    port: int
    path: str = ""
    base: str = ""

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"http://{_bracketed(self.host)}:{self.port}{self.base}"

    @property
    def authority(self) -> str:
        """The Host field for ``change_origin``."""
        if self.path:
            return "localhost"
        return _bracketed(self.host) + (f":{self.port}" if self.port != 80 else "")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_target(target: object, host: str | None = None) -> Target:
    """:raises ValueError: says what a target may be."""
    if isinstance(target, int) and not isinstance(target, bool):
        if not 1 <= target <= 65535:
            raise ValueError(f"target={target!r} is no port from 1 to 65535")
        return Target(host or "localhost", target)
    if isinstance(target, str):
        if target.startswith("unix:") and len(target) > len("unix:"):
            return Target("localhost", 0, path=target[len("unix:") :])
        parts = urlsplit(target)
        try:
            port = parts.port or 80
        except ValueError:
            raise ValueError(f"target={target!r} has no port from 1 to 65535") from None
        if parts.scheme == "http" and parts.hostname and not (parts.query or parts.fragment):
            return Target(parts.hostname, port, base=parts.path.rstrip("/"))
    raise ValueError(f"target={target!r} is neither a port, an 'http://host:port/base' URL nor 'unix:/path'")


class Proxy:
    """Carries requests to a target. A WSGI callable."""

    def __init__(
        self,
        target: object,
        host: str | None = None,
        *,
        xfwd: bool = False,
        change_origin: bool = False,
        headers: dict[str, str] | None = None,
        proxy_timeout: float | None = None,
    ) -> None:
        """See :func:`gunicorn_passenger.http_proxy.create_server`."""
        self.target = parse_target(target, host)
        self._xfwd = xfwd
        self._change_origin = change_origin
        self._headers = _checked_headers(headers or {})
        if proxy_timeout is not None and not proxy_timeout > 0:
            raise ValueError(f"proxy_timeout={proxy_timeout!r} is no positive number of seconds")
        self._timeout = proxy_timeout

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return self.web(environ, start_response)

    def web(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Carry one request to the target and its answer back."""
        started = time.monotonic()
        if environ.get("HTTP_UPGRADE", "").lower() == "websocket":
            return _answer(NotImplemented("This proxy does not carry upgrades."), environ, start_response)
        if environ.get("HTTP_TRANSFER_ENCODING", "chunked").strip().lower() != "chunked":
            return _answer(NotImplemented("The only transfer coding is chunked."), environ, start_response)
        exchange = None
        try:
            exchange = Exchange(self.target, self._timeout)
            response = exchange.send(environ, self._fields(environ))
            fields = response_fields(response.getheaders())
            if response.msg.defects:
                raise BadResponse("malformed header lines")
        except (OSError, http.client.HTTPException, BadResponse, BrokenOff, ValueError) as error:
            if exchange is not None:
                exchange.close()
            log.error(
                "proxy: %s for %s %s failed after %.3f s: %s",
                self.target,
                environ["REQUEST_METHOD"],
                environ.get("PATH_INFO", ""),
                time.monotonic() - started,
                error or type(error).__name__,
            )
            late = isinstance(error, TimeoutError)
            return _answer(GatewayTimeout() if late else BadGateway(), environ, start_response)
        start_response(f"{response.status} {response.reason or 'Unknown'}", fields)
        return Answer(exchange)

    def _fields(self, environ: dict[str, Any]) -> Fields:
        fields = request_fields(environ)
        if self._xfwd:
            fields = forwarded_fields(environ, fields)
        if self._change_origin:
            fields = [(n, v) for n, v in fields if n.lower() != "host"]
            fields.insert(0, ("Host", self.target.authority))
        fields = [(n, v) for n, v in fields if n.lower() not in self._headers]
        return fields + list(self._headers.values())


def _checked_headers(headers: dict[str, str]) -> dict[str, tuple[str, str]]:
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str) or set("\r\n\0") & set(name + value):
            raise ValueError(f"headers: {name!r}: {value!r} is no header field")
    return {name.lower(): (name, value) for name, value in headers.items()}


def _answer(
    error: HTTPException, environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    return error.get_response(environ)(environ, start_response)


def request_target(environ: dict[str, Any], base: str = "") -> str:
    """The path and query to ask the target for: as the client wrote them, below the base path."""
    raw = environ.get("RAW_URI", "")
    if raw.startswith(("http://", "https://")):  # absolute-form (RFC 9112 section 3.2.2)
        parts = urlsplit(raw)
        raw = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not raw.startswith("/"):
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "/")
        raw = quote(path.encode("latin-1"), safe="/%:@!$&'()*+,;=~-._")
        if environ.get("QUERY_STRING"):
            raw += "?" + environ["QUERY_STRING"]
    return base + str(raw).partition("#")[0]


class Exchange:
    """One request to the target and its answer, on a connection of its own."""

    def __init__(self, target: Target, timeout: float | None) -> None:
        self._target = target
        if target.path:
            sock = gsocket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout)
            try:
                sock.connect(target.path)
            except BaseException:
                sock.close()
                raise
        else:
            sock = gsocket.create_connection((target.host, target.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._connection = http.client.HTTPConnection(target.host, target.port or 80)
        self._connection.sock = sock
        self._client: Any = None
        self._sender: Any = None
        #: the client's body was read to its end (or there is none)
        self._body_read = True
        self._response: http.client.HTTPResponse
        self._broken: BaseException | None = None

    def send(self, environ: dict[str, Any], fields: Fields) -> http.client.HTTPResponse:
        """Send the request; its body goes on being sent while the answer is read.

        :raises BadResponse: for an answer that nobody asked for.
        """
        try:
            self._send_request(environ, fields)
            self._response = self._connection.getresponse()
            while 100 <= self._response.status < 200:
                self._next_response()
        except (OSError, http.client.HTTPException, ValueError):
            if self._broken is not None:
                raise self._broken from None
            raise
        return self._response

    def _send_request(self, environ: dict[str, Any], fields: Fields) -> None:
        connection = self._connection
        connection.putrequest(
            environ["REQUEST_METHOD"],
            request_target(environ, self._target.base),
            skip_host=True,
            skip_accept_encoding=True,
        )
        for name, value in fields:
            connection.putheader(name, value.encode("latin-1"))
        connection.putheader("Connection", "close")
        length = environ.get("CONTENT_LENGTH")
        chunked = bool(environ.get("HTTP_TRANSFER_ENCODING"))
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        elif length:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        if chunked or (length and int(length)):
            self._client = environ.get("gunicorn.socket")
            self._body_read = False
            body = pieces(environ["wsgi.input"], None if chunked else int(length or 0))
            self._sender = gevent.spawn(self._send_body, body, chunked)

    def _next_response(self) -> None:
        """Read on after an interim answer (RFC 9110 section 15.2)."""
        response = self._response
        if response.status == http.client.SWITCHING_PROTOCOLS:
            raise BadResponse("101 Switching Protocols, which nobody asked for")
        response.headers = response.msg = None  # type: ignore[assignment]
        response.begin()

    def _send_body(self, body: Iterator[bytes], chunked: bool) -> None:
        discarded = 0
        try:
            for piece in body:
                try:
                    self._sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                except OSError:
                    # The target has answered without reading all, and its answer decides. The client may
                    # still be sending: what is left is read, within a bound, so that it can read the answer.
                    discarded += len(piece)
                    if discarded > _DISCARD:
                        return
            self._body_read = True
            if chunked:
                with suppress(OSError):
                    self._sock.sendall(b"0\r\n\r\n")
        except Exception as error:
            # the client's body is broken: the target must not take what it got for the whole
            self._broken = error if isinstance(error, BrokenOff) else BrokenOff(f"the request body: {error}")
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def stream(self) -> Iterator[bytes]:
        """The body of the answer, as it arrives.

        :raises http.client.IncompleteRead: when the target ends it early; the client then sees a
            truncated message, never a clean end.
        """
        response = self._response
        while data := response.read1(PIECE):
            yield data
        if response.length and response.status not in _BODILESS and response._method != "HEAD":  # type: ignore[attr-defined]
            raise http.client.IncompleteRead(b"", response.length)

    def close(self) -> None:
        """End the exchange; a client whose body was not read to its end cannot use its connection again."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._sender is not None:
            self._sender.join(timeout=_LINGER)
            self._sender.kill(block=True)
            if not self._body_read and self._client is not None:
                with suppress(OSError):
                    self._client.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._sock.close()


class Answer:
    """The body of an answer as WSGI wants it: closing it ends the exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        return self._exchange.stream()

    def close(self) -> None:
        self._exchange.close()
