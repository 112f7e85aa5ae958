"""Drains third-party HTTP servers: closes their connections after a response, or while they are idle.

Process: a worker that drains.
Never: end a connection that has an open request, or cost time before the drain.

It knows gevent's ``pywsgi`` and the servers based on ``http.server`` (``wsgiref``, ``socketserver``'s HTTP
servers, Werkzeug and Flask). Their next response says ``Connection: close``. A connection is idle when the
innermost frame of its greenlet or thread is the function that waits for a request.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

from gunicorn_passenger.system.callers import frames
from gunicorn_passenger.system.import_watch import imported
from gunicorn_passenger.system.live_objects import live_objects

#: How many times as long as a search the worker does without one.
_SEARCH_PAUSE = 50


def force_connection_close() -> None:
    """From now on every response is the last of its connection (RFC 9112 section 9.6)."""
    pywsgi = imported("gevent.pywsgi")
    if pywsgi is not None:
        finalize = pywsgi.WSGIHandler.finalize_headers

        def finalize_headers(self: Any) -> None:
            finalize(self)
            self.close_connection = True
            if self.code != 101 and not any(
                name.lower() == b"connection" for name, _ in self.response_headers
            ):
                self.response_headers.append((b"Connection", b"close"))

        pywsgi.WSGIHandler.finalize_headers = finalize_headers
    server = imported("http.server")
    if server is not None:
        end = server.BaseHTTPRequestHandler.end_headers

        def end_headers(self: Any) -> None:
            lines = getattr(self, "_headers_buffer", [])
            interim = bool(lines) and lines[0].split(b" ")[1:2] in ([b"100"], [b"101"], [b"103"])
            if not interim and self.request_version != "HTTP/0.9":
                self.close_connection = True
                if not any(line.lower().startswith(b"connection:") for line in lines):
                    self.send_header("Connection", "close")
            end(self)

        server.BaseHTTPRequestHandler.end_headers = end_headers


class IdleConnections:
    """The connections on which such a server waits for a request."""

    def __init__(self) -> None:
        self._greenlets: list[weakref.ref[Any]] = []
        #: when to search all objects of the process again (monotonic seconds)
        self._search_at = 0.0

    def shutdown(self) -> None:
        """End them: the server reads an end-of-file, as it would if the client had closed the connection."""
        for sock in list(self._sockets()):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RD)

    def _sockets(self) -> Iterator[Any]:
        waiting = _functions_that_wait()
        for outer in (*self._greenlet_frames(), *sys._current_frames().values()):
            frame = _innermost_server_frame(outer)
            if frame is not None and frame.f_code in waiting:
                handler = frame.f_locals.get("self")
                sock = getattr(handler, "socket", None) or getattr(handler, "connection", None)
                if sock is not None:
                    yield sock

    def _greenlet_frames(self) -> Iterator[FrameType]:
        greenlets = imported("greenlet")
        if greenlets is None:
            return
        began = time.monotonic()
        if began >= self._search_at:
            # there may be millions of objects, and a request in progress waits meanwhile
            found = [weakref.ref(found) for found in live_objects(greenlets.greenlet)]
            self._greenlets = found
            ended = time.monotonic()
            self._search_at = ended + (ended - began) * _SEARCH_PAUSE
        for reference in self._greenlets:
            candidate = reference()
            if candidate is not None and candidate.gr_frame is not None:
                yield candidate.gr_frame


def _functions_that_wait() -> set[CodeType]:
    """The functions in which a server waits for the request line."""
    found = set()
    if (pywsgi := imported("gevent.pywsgi")) is not None:
        found.add(pywsgi.WSGIHandler.read_requestline.__code__)
    if (server := imported("http.server")) is not None:
        found.add(server.BaseHTTPRequestHandler.handle_one_request.__code__)
    return found


_GEVENT = os.path.join("gevent", "")
_SOCKETS = ("socket.py", "selectors.py", "ssl.py")


def _innermost_server_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside gevent and the socket modules."""
    for outer in frames(frame):
        name = outer.f_code.co_filename
        in_gevent = _GEVENT in name and not name.endswith("pywsgi.py")
        if not (in_gevent or os.path.basename(name) in _SOCKETS):
            return outer
    return None
