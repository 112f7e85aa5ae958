"""What Engine.IO's server uses as the WebSocket of a client, on a connection of ours.

Process: a worker, in the greenlet of the connection; the writer of Engine.IO is another one.
Never: serve a client of another server, such as gunicorn's own handler: the driver of Engine.IO does.

Engine.IO's drivers use simple-websocket, which takes one more greenlet for each client and the pure Python of
wsproto for each message. Another difference that clients see: messages are not compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gunicorn_passenger.http.client_socket import ClientSocket
from gunicorn_passenger.http.websocket import WebSocket, handshake_error


class EngineIOWebSocket:
    """The interface of ``engineio.async_drivers``: a WSGI application that calls a handler with itself."""

    def __init__(self, sock: ClientSocket, handler: Callable[[Any], object], server: Any) -> None:
        """
        :param handler: serves the client until it disconnects.
        :param server: that of Engine.IO.
        """
        self._client = sock
        self._handler = handler
        self._max_message = int(server.max_http_buffer_size)
        self._websocket: Any = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """
        :returns: a response that refuses the client.
        :raises StopIteration: when the client is gone; gunicorn sends no response then.
        """
        refused = handshake_error(environ)
        if refused is not None:
            status, headers, reason = refused
            start_response(status, [*headers, ("Content-Type", "text/plain")])
            # not a list, which Engine.IO's server takes for packets
            return (reason.encode(),)
        self._websocket = WebSocket(self._client, environ, self._max_message)
        try:
            self._handler(self)
        finally:
            self._websocket.end()
        raise StopIteration

    def send(self, message: str | bytes) -> None:
        """:raises OSError: when the client is gone."""
        self._websocket.send(message)

    def wait(self) -> str | bytes | None:
        """The next message; ``None`` when the client is gone."""
        received: str | bytes | None = self._websocket.receive()
        return received

    def close(self) -> None:
        self._websocket.close()


def engineio_websocket(driver: Any, handler: Callable[[Any], object], server: Any) -> Any:
    """What Engine.IO calls for the WebSocket of a client.

    :param driver: of Engine.IO, for connections of other servers.
    """

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        sock = environ.get("gunicorn.socket")
        if isinstance(sock, ClientSocket):
            return EngineIOWebSocket(sock, handler, server)(environ, start_response)
        return driver(handler, server)(environ, start_response)

    return serve
