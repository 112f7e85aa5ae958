"""What a stream of bytes means: to our connection loop, and to gunicorn's Python parser.

Both run in this process, without a socket: whatever a client may send can be tried by the thousand.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from gevent import getcurrent
from gunicorn.config import Config
from gunicorn.http import errors
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader
from gunicorn.http.wsgi import create
from gunicorn.workers.base import Worker

from gunicorn_passenger.config.settings import Timeouts
from gunicorn_passenger.http import connection_output as output_module
from gunicorn_passenger.http.connection import Connection
from gunicorn_passenger.http.grammar import AUTHORITY
from gunicorn_passenger.http.listener_context import ListenerContext, StandaloneWorker

SOCKNAME = "/run/app.sock"

#: how a stream ends: cleanly, inside a message, or with this status
EOF, BROKEN = "eof", "broken"

#: environ keys that are objects of the server, not facts of the request
_OBJECTS = {
    "gunicorn.socket",
    "wsgi.errors",
    "wsgi.early_hints",
    "wsgi.file_wrapper",
    "wsgi.input",
    "wsgi.multithread",
}


def facts(environ: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environ.items() if key not in _OBJECTS}


class _Raw:
    """A socket that has been sent these pieces, and then a FIN."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = [piece for piece in pieces if piece]
        self.sent = bytearray()

    def recv(self, most: int) -> bytes:
        if not self.pieces:
            return b""
        piece = self.pieces[0]
        if len(piece) > most:
            self.pieces[0] = piece[most:]
            return piece[:most]
        return self.pieces.pop(0)

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def sendmsg(self, buffers: Any) -> int:
        return sum(self.send(buffer) for buffer in buffers)

    def shutdown(self, how: int) -> None:
        self.pieces.clear()

    def fileno(self) -> int:
        return -1


class _Sock:
    def __init__(self, raw: _Raw) -> None:
        self._sock = raw
        self._read_event = _Nothing()
        self.early = b""
        self.taken = self.is_closed = False
        self.error: OSError | None = None

    def fileno(self) -> int:
        return -1

    def gettimeout(self) -> float:
        return 0.0

    def send(self, data: bytes) -> int:
        return self._sock.send(data)

    sendall = send

    def close(self) -> None:
        pass


class _Nothing:
    """Stands for the hub, its loop and its watchers, where no greenlet ever waits."""

    active = False

    def __getattr__(self, name: str) -> Any:
        return lambda *args: _Nothing() if name in ("io", "timer") else None

    @property
    def loop(self) -> Any:
        return self


class _Ended:
    def on_connection_closed(self, connection: Any) -> None:
        pass


def gateway(cfg: Config, app: Any = None, sockname: Any = SOCKNAME) -> ListenerContext:
    log = cfg.logger_class(cfg)
    log.error_log.setLevel(logging.CRITICAL + 1)
    return ListenerContext(app, cfg, log, StandaloneWorker(), sockname, Timeouts())


def ours(
    gate: ListenerContext, pieces: list[bytes], peer: Any = ""
) -> tuple[list[tuple[dict[str, Any], bytes]], Any, bytes]:
    """Our connection loop on a stream.

    :param peer: what ``accept()`` gave for the client; on a UNIX socket any bytes that the client chose.
    :returns: environ and body of each request that the application got whole, how it ended, and
        what the client was sent.
    """
    got: list[tuple[dict[str, Any], bytes]] = []
    end: list[Any] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        try:
            body = environ["wsgi.input"].read()
        except (errors.ParseException, OSError) as error:
            end.append(_status(error) or BROKEN)
            raise
        got.append((facts(environ), body))
        start_response("200 OK", [("Content-Length", "0")])
        return []

    gate.app = app
    raw = _Raw(pieces)
    nothing = _Nothing()
    real = output_module.get_hub
    output_module.get_hub = lambda: nothing
    try:
        connection = Connection(_Ended(), gate, _Sock(raw), peer)
    finally:
        output_module.get_hub = real
    refused: list[BaseException] = []
    with (
        mock.patch.object(
            Worker, "handle_error", lambda self, request, sock, addr, error: refused.append(error)
        ),
        contextlib.suppress(OSError),
    ):
        connection.serve_requests(getcurrent())
    if not end:
        end.append(_status(refused[0]) if refused else EOF)
    return got, end[0], bytes(raw.sent)


def theirs(cfg: Config, data: bytes) -> tuple[list[tuple[dict[str, Any], bytes]], Any]:
    """gunicorn's Python parser and its way to make an environ, on the same stream."""
    unreader = IterUnreader([data])
    got: list[tuple[dict[str, Any], bytes]] = []
    while True:
        try:
            request = _PythonRequest(cfg, unreader, "")
        except (StopIteration, errors.NoMoreData):
            return got, EOF
        except errors.ParseException as error:
            return got, _status(error)
        if not _absolute_form(request):
            return got, 400
        request._expected_100_continue = False  # it would be sent here
        try:
            _, environ = create(request, _Sock(_Raw([])), "", SOCKNAME, cfg)
        except errors.ConfigurationProblem:
            return got, 500
        try:
            body = request.body.read()
        except errors.NoMoreData:
            return got, BROKEN
        except errors.ParseException as error:
            return got, _status(error)
        except OSError as error:
            return got, _status(error) or BROKEN
        reader = request.body.reader
        if isinstance(reader, LengthReader) and len(body) < int(environ.get("CONTENT_LENGTH", 0)):
            return got, BROKEN
        assert isinstance(reader, LengthReader | ChunkedReader)
        if environ.get("CONTENT_LENGTH"):
            environ["CONTENT_LENGTH"] = str(int(environ["CONTENT_LENGTH"]))
        got.append((facts(environ), body))
        if request.should_close() or not _keeps(environ):
            return got, EOF


def _absolute_form(request: Any) -> bool:
    """Where ours is stricter: the host of a target in absolute form counts (RFC 9112 section 3.2.2).

    :returns: whether the target is one that RFC 9110 sections 4.2.1 to 4.2.4 allow.
    """
    if request.uri.startswith("/") or "://" not in request.uri:
        return True
    parts = urlsplit(request.uri)
    if (
        parts.scheme not in ("http", "https")
        or request.method == "CONNECT"
        or not AUTHORITY.fullmatch(parts.netloc)
    ):
        return False
    request.headers = [
        ("HOST", parts.netloc),
        *((name, value) for name, value in request.headers if name != "HOST"),
    ]
    return True


def _keeps(environ: dict[str, Any]) -> bool:
    """Where ours is stricter: every option of every Connection field counts (RFC 9112 section 9.3)."""
    options = environ.get("HTTP_CONNECTION", "").lower().split(",")
    return "close" not in (option.strip(" \t") for option in options)


class _PythonRequest(Request):
    _use_fast = property(lambda self: False, lambda self, value: None)


def _status(error: BaseException) -> int | None:
    if isinstance(error, errors.LimitRequestLine):
        return 414
    if isinstance(error, errors.LimitRequestHeaders):
        return 431
    if isinstance(error, errors.UnsupportedTransferCoding):
        return 501
    if isinstance(error, getattr(errors, "ExpectationFailed", ())):
        return 417
    if isinstance(error, errors.ConfigurationProblem):
        return 500
    if isinstance(error, errors.NoMoreData):
        return None
    kinds = (
        errors.ParseException,
        errors.ChunkMissingTerminator,
        errors.InvalidChunkSize,
        getattr(errors, "InvalidChunkExtension", errors.InvalidChunkSize),
    )
    return 400 if isinstance(error, kinds) else None


def disagreement(gate: ListenerContext, cfg: Config, data: bytes, cuts: list[int], peer: Any = "") -> str:
    """Where the two differ on a stream; empty if nowhere.

    Ours may refuse earlier what gunicorn would still wait for, or for what it sees first then.
    """
    pieces = []
    at = 0
    for cut in sorted({cut for cut in cuts if 0 < cut < len(data)}):
        pieces.append(data[at:cut])
        at = cut
    pieces.append(data[at:])
    mine, my_end, _ = ours(gate, pieces, peer)
    other, other_end = theirs(cfg, data)
    if mine != other:
        return f"requests: ours {mine!r}, gunicorn's {other!r}"
    if my_end == other_end or (my_end == BROKEN and other_end == 400):
        return ""
    early = (400, 414, 431)
    if my_end in early and (
        other_end in (EOF, BROKEN) or (other_end in (*early, 417, 501) and len(pieces) > 1)
    ):
        return ""
    return f"end: ours {my_end!r}, gunicorn's {other_end!r}"
