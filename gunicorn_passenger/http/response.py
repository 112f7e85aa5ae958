"""A response: ``start_response``, and what is sent after it.

Process: a serving process, in the greenlet that calls the application.
Never: send a header that would end the header section, or frame a message in two ways.

gunicorn's hooks and loggers read these attributes, so they have gunicorn's names: ``status``,
``status_code``, ``headers``, ``headers_sent``, ``response_length``, ``sent``, ``chunked``, ``must_close``,
``upgrade``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from gunicorn import SERVER

from gunicorn_passenger.errors import TruncatedResponse
from gunicorn_passenger.http.chunked import LAST_CHUNK, chunk_line, encode_chunk
from gunicorn_passenger.http.downstream_api import UpstreamHead
from gunicorn_passenger.http.response_cache import (
    HeaderLine,
    begin_head,
    check_status,
    header_block_of,
    header_blocks,
    statuses,
)

#: A body of so many bytes or more is not copied behind its header section: the kernel gets both side by side.
_JOIN = 32768
#: The most bytes of a list of chunks that are joined before they are sent.
_GATHER = 65536


class _ResponseSent:
    """The type of :data:`RESPONSE_SENT`: an empty body, for a middleware that looks at it."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def __len__(self) -> int:
        return 0


#: The one value that an application returns when it has sent the response itself: the proxy does, with
#: :meth:`Response.begin_upstream_response` or :meth:`Response.send_upstream_response`.
RESPONSE_SENT = _ResponseSent()


class Response:
    """The response to one request."""

    #: gunicorn's name for the ``Server`` header
    version: ClassVar[str] = SERVER

    status: str | None = None
    status_code: int | None = None
    headers_sent = False
    response_length: int | None = None
    #: bytes of the body that have been sent
    sent = 0
    chunked = False
    upgrade = False
    must_close = False
    _bodiless = False
    #: whether the proxy has sent all of it, so that nothing may be written any more
    _complete = False
    #: the application's header lines
    _block = b""
    _warned = False

    def __init__(self, connection: Any, environ: dict[str, Any], req: Any) -> None:
        """
        :param connection: the connection that it is sent on.
        :param req: gunicorn's request object, where there is one.
        """
        self._connection = connection
        self._protocol = environ["SERVER_PROTOCOL"]
        self.method = environ["REQUEST_METHOD"]
        self.req = req

    # --- what the application calls --------------------------------------------------------------

    def start_response(
        self, status: str, headers: Iterable[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's ``start_response``.

        :raises AssertionError: when it was called before, without ``exc_info``.
        :raises ValueError: for a status or a header that cannot be sent.
        """
        if exc_info is not None or self.status is not None:
            self._started_before(exc_info)
        code, bodiless = statuses.get(status) or check_status(status)
        if code >= 500:
            self._connection.listener.errors += 1
        pairs = tuple(headers)
        try:
            block, length, upgrade = header_blocks[pairs]
        except TypeError:
            # a list instead of a tuple, or a value that is not a string
            block, length, upgrade = header_block_of(pairs)
        if length is not None and bodiless and code != 304:
            # RFC 9110 section 8.6: no Content-Length with 1xx and 204
            block, length, upgrade = header_block_of([p for p in pairs if p[0].lower() != "content-length"])
        self.status = status
        self.status_code = code
        self._block = block
        if upgrade:
            self.upgrade = True
        if bodiless or self.method == "HEAD":
            self._bodiless = True
            if not bodiless or code == 304:
                self.response_length = length
        elif length is not None:
            self.response_length = length
        else:
            self.chunked = self._protocol != "HTTP/1.0"
        return self.write

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The application's headers without those of the connection; for hooks and loggers."""
        lines = self._block.decode("latin-1").split("\r\n")[:-1]
        return [(name, value) for name, _, value in (line.partition(": ") for line in lines)]

    def _started_before(self, exc_info: Any) -> None:
        if not exc_info:
            if self.status is not None:
                raise AssertionError("Response headers already set!")
        elif self.headers_sent:
            try:
                raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        else:
            self._bodiless = self.chunked = self.upgrade = False
            self.response_length = None

    def early_hints(self, headers: Any) -> None:
        """``wsgi.early_hints``: send "103 Early Hints" (RFC 8297), any number of times before the response.

        :param headers: pairs of name and value, such as ``[("Link", "</a.css>; rel=preload")]``.
        """
        if self.headers_sent or self._protocol == "HTTP/1.0":
            return
        lines = [b"HTTP/1.1 103 Early Hints\r\n"]
        for header in headers:
            name, value = (part.decode("latin-1") if isinstance(part, bytes) else part for part in header)
            lines.append(HeaderLine(name, value).line)
        lines.append(b"\r\n")
        self._connection.send(b"".join(lines))

    def write(self, data: bytes) -> None:
        """Send a chunk of the body; the first one takes the header section with it.

        :raises gunicorn_passenger.errors.ClientDisconnected: (an ``OSError``) when the client is gone.
        """
        if (
            data.__class__ is bytes
            and self.response_length == len(data)
            and data
            and not self._bodiless
            and not self.headers_sent
        ):
            # the whole body in one chunk, as most frameworks send it
            self.sent = self.response_length
            self._send_head(data)
            return
        if not isinstance(data, bytes):
            raise TypeError(f"{data!r} is not a byte")
        if not data:
            # PEP 3333: the header section waits for the first chunk that is not empty
            if self.status is None:
                raise AssertionError("write() before start_response()")
            return
        if self._complete or self._bodiless_now(data):
            return
        length = self.response_length
        if length is not None:
            left = length - self.sent
            if len(data) > left:
                # never more than was announced: the client would read the rest as the next response
                data = data[:left]
                if not data:
                    if not self.headers_sent:
                        self._send_head(b"")
                    return
        self.sent += len(data)
        if self.chunked:
            data = encode_chunk(data)
        if self.headers_sent:
            self._connection.send(data)
            self._connection.share_loop()
        else:
            self._send_head(data)

    # --- what the connection calls ------------------------------------------------------------------

    def write_all(self, chunks: Any) -> None:
        """Send a body that is complete: a list or a tuple of chunks.

        Header section and body are then sent with one system call.
        """
        if len(chunks) == 1:
            data = chunks[0]
            if (
                self.response_length == len(data)
                and data
                and data.__class__ is bytes
                and not self._bodiless
                and not self.headers_sent
            ):
                self.sent = self.response_length
                self._send_head(data)
                return
        elif sum(map(len, chunks)) <= _GATHER:
            data = b"".join(chunks)
        else:
            for chunk in chunks:
                self.write(chunk)
            self.close()
            return
        if not data or not self.chunked or self.headers_sent or not isinstance(data, bytes):
            self.write(data)
            self.close()
            return
        self.sent += len(data)
        self._send_head(encode_chunk(data) + LAST_CHUNK)

    def close(self) -> None:
        """End the body.

        :raises TruncatedResponse: when less was written than announced.
        """
        if not self.headers_sent:
            if self.status is None:
                raise AssertionError("start_response() was not called before the body ended")
            self._send_head(LAST_CHUNK if self.chunked else b"")
        elif self._complete:
            return
        elif self.chunked:
            self._connection.send(LAST_CHUNK)
        length = self.response_length
        if length is not None and self.sent < length and not self._bodiless:
            raise TruncatedResponse(
                f"the application announced {length} bytes and wrote {self.sent}: the worker closes the "
                "connection, because the client would wait for the rest"
            )

    def should_close(self) -> bool:
        """Whether the connection ends with this response (RFC 9112 sections 6.3 and 9.3)."""
        if self.must_close or (self.status_code is not None and self.status_code < 200):
            return True  # what follows a 1xx is the final response, or another protocol
        if self.response_length is not None or self.chunked:
            return False
        return not self._bodiless

    def _decide_close(self, unread: bool) -> bool:
        """Decide whether the connection ends with this response, before its header section is sent.

        :param unread: whether too much of the request's body is unread to keep the connection.
        """
        listener = self._connection.listener
        if (
            self.must_close
            or unread
            or listener.closing
            or not listener.worker.alive
            or (self.response_length is None and self.should_close())
        ):
            self.must_close = True
        return self.must_close

    def force_close(self) -> None:
        self.must_close = True

    def send_file(self, wrapper: Any, sendfile: bool) -> None:
        """Send what ``wsgi.file_wrapper`` was given. The kernel sends it if it is a file.

        :param sendfile: gunicorn's setting.
        """
        span = _rest_of_file(wrapper.filelike) if sendfile and not self._complete else None
        if span is None:
            for chunk in wrapper:
                self.write(chunk)
            self.close()
            return
        file, offset, count = span
        if self.response_length is not None:
            count = min(count, self.response_length - self.sent)
        if self.status is None:
            raise AssertionError("start_response() was not called before the body")
        if self._bodiless or not count:
            if count:
                self._warn()
            self.close()
            return
        if not self.headers_sent:
            self._send_head(chunk_line(count) if self.chunked else b"")
        elif self.chunked:
            self._connection.send(chunk_line(count))
        done = self._connection.send_file(file, offset, count)
        self.sent += done
        if done < count:
            raise TruncatedResponse(f"the file ended {count - done} bytes too soon")
        if self.chunked:
            self._connection.send(b"\r\n")
        self.close()

    # --- what the proxy calls --------------------------------------------------------------------

    def begin_upstream_response(
        self, status: str, headers: bytes, length: int | None, body: bytes, whole: bool, unread: bool
    ) -> None:
        """Send the header section of another server's response. The caller has checked the headers.

        :param status: code and reason.
        :param headers: the lines of all headers except ``Connection`` and ``Transfer-Encoding``.
        :param length: the value of ``Content-Length``, where it is among them.
        :param body: the received part of the body; the caller has counted it in ``sent``.
        :param whole: whether that is the whole body.
        :param unread: whether the request body, if there is one, will not be read.
        """
        self.status = status
        self.status_code = code = int(status[:3])
        self._block = headers
        self.response_length = length
        if code in (204, 304) or self.method == "HEAD":
            self._bodiless = True
            body = b""
            self.sent = 0
        elif length is None:
            self.chunked = self._protocol != "HTTP/1.0"
        connection = self._connection
        word = b"close" if self._decide_close(unread and connection.body.too_much_unread) else b"keep-alive"
        version = b"HTTP/1.0" if self._protocol == "HTTP/1.0" else b"HTTP/1.1"
        framing: bytes = connection.extra_headers
        if self.chunked:
            framing += b"Transfer-Encoding: chunked\r\n"
            if body:
                body = encode_chunk(body)
            if whole:
                body += LAST_CHUNK
        line = status.encode("latin-1")
        if status.startswith("5"):
            connection.listener.errors += 1
        self.headers_sent = True
        head = b"%b %b\r\n%bConnection: %b\r\n%b\r\n" % (version, line, headers, word, framing)
        if len(body) < _JOIN:
            connection.send(head + body)
        else:
            connection.send_vector(head, body)
        if whole:
            self.mark_sent()

    def send_upstream_response(self, head: UpstreamHead, wire: bytes, body: bytes) -> None:
        """Send another server's complete response, at the end of the event-loop iteration.

        :param head: its ``status``, the ``line`` of code and reason, and the ``lines`` of its headers.
        :param wire: the header section as it is sent when the connection is kept. The request had HTTP/1.1
            and no body, and the response may have one.
        """
        connection = self._connection
        listener = connection.listener
        self.status = head.line
        self.status_code = head.status
        self._block = head.lines or b""
        self._complete = True
        self.response_length = self.sent = len(body)
        if head.line.startswith("5"):
            listener.errors += 1
        self.headers_sent = True
        if self._decide_close(False):
            wire = wire.removesuffix(b"keep-alive\r\n\r\n") + b"close\r\n\r\n"
        if connection.extra_headers:
            wire = b"%b%b\r\n" % (wire[:-2], connection.extra_headers)
        if len(body) < _JOIN:
            listener.coalescer.enqueue(connection, wire + body)
        else:
            connection.send_vector(wire, body)

    @property
    def bodiless(self) -> bool:
        """Whether it has no body, whatever its headers say (RFC 9110 section 6.4.1)."""
        return self._bodiless

    def mark_sent(self) -> None:
        """The proxy has sent the whole response."""
        self._complete = True

    def switch_protocols(self, status: str, headers: str) -> None:
        """Another protocol begins after this header section, which the caller sends."""
        self.status = status
        self.status_code = int(status[:3])
        self._block = headers.encode("latin-1")
        self.headers_sent = self.upgrade = self.must_close = True

    # --- the wire --------------------------------------------------------------------------------

    def _bodiless_now(self, data: bytes) -> bool:
        if self.status is None:
            raise AssertionError("write() before start_response()")
        if not self._bodiless:
            return False
        if not self.headers_sent:
            self._send_head(b"")
        self._warn()
        return True

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            self._connection.listener.log.warning(
                "WSGI app sent body bytes on a no-body response (method=%s status=%s); "
                "dropping per RFC 9110.",
                self.method,
                self.status_code,
            )

    def _send_head(self, body: bytes) -> None:
        connection = self._connection
        listener = connection.listener
        close = self._decide_close(connection.body.too_much_unread)
        word = "upgrade" if self.upgrade else "close" if close else "keep-alive"
        begin = begin_head(self._protocol, self.status or "", word)
        if self.chunked:
            begin += b"Transfer-Encoding: chunked\r\n"
        if connection.extra_headers:
            begin += connection.extra_headers
        self.headers_sent = True
        if len(body) < _JOIN:
            data = b"%b%b\r\n%b" % (begin, self._block, body)
            if (
                listener.coalescer.active
                and self.sent == self.response_length
                and not (self.upgrade or connection.sock.taken)
            ):
                listener.coalescer.enqueue(connection, data)
            else:
                connection.send(data)
        else:
            connection.send_vector(b"%b%b\r\n" % (begin, self._block), body)


def _rest_of_file(file: Any) -> tuple[int, int, int] | None:
    """Descriptor, offset and length of the rest of a file; ``None`` when it is not a file."""
    try:
        fd = file.fileno()
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        left = os.fstat(fd).st_size - offset
    except (AttributeError, OSError, ValueError):
        return None
    return (fd, offset, left) if left > 0 else None  # files in /proc say 0, and can be read all the same
