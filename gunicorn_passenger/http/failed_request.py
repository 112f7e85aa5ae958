"""Logs a request that fails after its headers were read, and sends an error to the client.

Process: a serving process, in the connection's greenlet.
Never: send a second response, or make a truncated response look complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from gunicorn import util

from gunicorn_passenger.errors import BodyTimeout, ClientDisconnected, TruncatedResponse
from gunicorn_passenger.http.listener_context import ListenerContext
from gunicorn_passenger.http.response import Response


class FailingConnection(Protocol):
    """What is used of a :class:`.connection.Connection`."""

    listener: ListenerContext
    sock: Any
    addr: Any
    head: bytes
    response: Response | None

    def request_of(self, request: Any) -> Callable[[], Any]: ...
    def reset(self) -> None: ...


def fail_request(
    connection: FailingConnection, error: BaseException, environ: dict[str, Any], request: Any
) -> None:
    """The application has raised an error, or its client has disconnected.

    :param environ: of the request.
    :param request: gunicorn's request object, where there is one.
    """
    listener = connection.listener
    response = connection.response
    assert response is not None
    begun = response.headers_sent
    if error is connection.sock.error:
        listener.log.debug(
            "the client of an application that took over its connection disconnected: %s", error
        )
    elif isinstance(error, ClientDisconnected):
        listener.log.debug("%s", error)
        if error.incomplete and not begun:
            _send_and_log(
                connection, 400, "Bad Request", "The request's body is not complete.", environ, request
            )
    elif isinstance(error, TruncatedResponse):
        listener.log.warning("%s", error)
    elif isinstance(error, BodyTimeout):
        listener.log.info("%s (%s)", error, client_name(connection.addr))
        if not begun:
            _send_and_log(connection, 408, "Request Timeout", "The request took too long.", environ, request)
    elif begun or connection.sock.taken:
        # the client would read a 500 as a part of the body, or of another protocol
        listener.log.exception("Error handling request", exc_info=error)
    else:
        listener.refuse(connection.request_of(request)(), connection.sock, connection.addr, error)
    if begun and not response.chunked and response.response_length is None:
        # a clean close would tell the client that the body is complete
        connection.reset()


def _send_and_log(
    connection: FailingConnection, status: int, reason: str, text: str, environ: dict[str, Any], request: Any
) -> None:
    """Send an error to a client whose request is incomplete, and write it to the access log."""
    send_error(connection.sock, status, reason, text)
    if connection.listener.logs:
        response = Response(connection, environ, request)
        response.status = f"{status} {reason}"
        response.sent = len(text)
        get_request = connection.request_of(request)
        connection.listener.access.write(response, get_request, environ, 0.0, connection.head)


def send_error(sock: Any, status: int, reason: str, text: str) -> None:
    """Send an error page as gunicorn does, if the client is still there."""
    with contextlib.suppress(OSError):
        util.write_error(sock, status, reason, text)


def client_name(addr: Any) -> str:
    """A client's address for the log."""
    return str(addr[0]) if isinstance(addr, tuple) else "unix:"
