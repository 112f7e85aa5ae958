"""One request to a target and its response, on one connection: the headers, and the body as it comes.

Process: any process in which the proxy is mounted, in the greenlet or thread of the request.
Never: collect a body, guess a framing, or let a truncated response look whole.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from gunicorn_passenger.errors import BadResponse, UpstreamClosed, UpstreamTimeout
from gunicorn_passenger.proxy.downstream import WsgiDownstream
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.pool import UpstreamConnection
from gunicorn_passenger.proxy.request_body import RequestBodySender
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.response_head import (
    HEAD_LIMIT,
    ResponseChunks,
    ResponseHead,
    parse_response_head,
)
from gunicorn_passenger.proxy.upstream_io import READ
from gunicorn_passenger.proxy.wait_errors import WaitTimeout

#: The size of one read of a long body, in bytes.
_BODY_READ = 262144
#: The most interim responses to one request.
_MAX_INTERIM = 32
#: How long an upstream may take to say "100 Continue" before it is sent the body all the same, in seconds.
_EXPECT = 1.0

#: RFC 9110 section 9.2.2
IDEMPOTENT = {"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"}

#: Status codes of responses without a body (RFC 9110 section 6.4.1).
_BODILESS = (204, 304)


class RoundTrip:
    """One request on one connection, up to the end of the body of its response.

    It owns the connection from the moment when the request was sent.
    """

    head: ResponseHead
    #: whether the body of the response was read to its end
    complete = False
    #: whether it has the connection
    connected = True
    #: how many bytes of a body with a known length are still to come
    left = 0
    _interim = 0
    #: whether the upstream has ended the connection
    _ended = False
    _decoder: ResponseChunks | None = None

    def __init__(
        self,
        upstream: UpstreamConnection,
        options: Options,
        method: str,
        client: WsgiDownstream,
        sender: RequestBodySender,
        switching: bool,
    ) -> None:
        """
        :param upstream: the connection; its buffer holds the beginning of the response that has come.
        :param method: of the request that the upstream got.
        :param switching: whether the request asks for another protocol.
        """
        self.upstream = upstream
        self.pool = upstream.pool
        self.method = method
        self.client = client
        self.sender = sender
        self._switching = switching
        self._seconds = options.upstream_timeout
        self._keep_case = options.preserve_header_key_case

    # --- the request -----------------------------------------------------------------------------

    def send_in_parts(self, head: bytes, expect: bool) -> None:
        """Send a request whose body follows its head, while the response is read.

        :param head: the request head.
        :param expect: whether the client waits for "100 Continue" before it sends the body.
        :raises UpstreamClosed: when the connection was closed before the body was touched.
        """
        stream = self.upstream.stream
        stream.send_head(head, self._seconds)
        if stream.failed and self.upstream.reused and not stream.partially_sent and not stream.pending():
            raise UpstreamClosed("it closed the connection before it responded")
        if not expect:
            self.sender.start(self.upstream, self.pool.runtime.concurrent)

    def may_repeat(self) -> bool:
        """Whether the request may be sent again after the upstream has closed a reused connection.

        It does no harm when no byte of the request was sent, or when the method is idempotent (RFC 9110
        section 9.2.2); and the body must still be there.
        """
        stream = self.upstream.stream
        return (
            self.upstream.reused
            and not self.upstream.buffer
            and not self._interim
            and self.sender.replayable
            and (self.method in IDEMPOTENT or (stream.failed and not stream.partially_sent))
        )

    # --- the head of the response ----------------------------------------------------------------

    def read_head(self, expect: bool = False) -> ResponseHead:
        """The head of the final response; interim responses go to the client.

        :param expect: whether the body waits for "100 Continue".
        :raises ProxyError: when it does not come, or is malformed.
        :raises DownstreamDisconnected: when the client disconnects first.
        """
        upstream = self.upstream
        while True:
            data = self._receive_head(expect)
            if data is None:
                # RFC 9110 section 10.1.1: a client must not wait forever for "100 Continue"
                expect = False
                self.sender.start(upstream, self.pool.runtime.concurrent)
                continue
            head = parse_response_head(self.pool, data, self._keep_case)
            if head.status >= 200:
                break
            if head.status == 101:
                if head.upgrade and self._switching:
                    break
                raise BadResponse("101 Switching Protocols, which the request did not ask for")
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                raise BadResponse(f"more than {_MAX_INTERIM} interim responses")
            if head.status == 100:
                if expect:
                    expect = False
                    self.client.send_continue()
                    self.sender.start(upstream, self.pool.runtime.concurrent)
            else:
                self.client.send_informational(head.status, head.reason, head.headers)
            self.sender.resume()
        self.head = head
        if self.method == "HEAD" or head.status in _BODILESS or head.status == 101:
            self.complete = True
        elif head.chunked:
            self._decoder = ResponseChunks()
        elif head.length is not None:
            self.left = head.length
            self.complete = not head.length
        return head

    def _receive_head(self, expect: bool) -> bytes | None:
        """The bytes of the next head; ``None`` when the upstream does not say "100 Continue" in time."""
        upstream = self.upstream
        data = upstream.buffer
        chunks_sent = self.sender.chunks_sent
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if (end if end > 3 else len(data)) > HEAD_LIMIT:
                raise BadResponse(f"its header section has more than {HEAD_LIMIT} bytes")
            if end > 3:
                upstream.buffer = data[end:]
                return data[:end]
            if data and (
                not data.startswith(b"HTTP/1."[: len(data)]) or data.count(b"\n") != data.count(b"\r\n")
            ):
                raise BadResponse(f"it begins with {data[:40]!r}, which is not an HTTP/1.x response")
            upstream.buffer = data
            try:
                more = upstream.stream.recv_response(_EXPECT if expect else self._seconds, self.client)
            except WaitTimeout:
                self._check_sender()
                if expect:
                    return None
                if self._body_advances(chunks_sent):
                    chunks_sent = self.sender.chunks_sent
                    continue
                raise no_response_in(self._seconds) from None
            except OSError as error:
                self._check_sender()
                raise closed_by_upstream("before it responded", error) from None
            if not more:
                self._check_sender()
                where = "in the head of its response" if data else "before it responded"
                raise UpstreamClosed(f"it closed the connection {where}")
            data = data + more if data else more

    def _check_sender(self) -> None:
        if self.sender.error is not None:
            raise self.sender.error

    # --- the body of the response ----------------------------------------------------------------

    def receive(self, wait: bool = True) -> bytes:
        """The next bytes of the body; empty at its end.

        :param wait: whether to wait for them; without that, empty also when none have come.
        :raises UpstreamClosed, UpstreamTimeout, BadResponse: when the body is truncated or malformed.
        :raises DownstreamDisconnected: when the client disconnects.
        """
        upstream = self.upstream
        while not self.complete:
            data, upstream.buffer = upstream.buffer, b""
            if not data:
                if not wait:
                    return b""
                data = self._receive_more()
                if not data:
                    return b""
            decoder = self._decoder
            if decoder is not None:
                body = decoder.feed(data)
                if decoder.finished:
                    self.complete = True
                    upstream.buffer = decoder.rest
            elif self.head.length is None:
                body = data
            else:
                body = data
                if len(body) >= self.left:
                    body, upstream.buffer = data[: self.left], data[self.left :]
                    self.complete = True
                self.left -= len(body)
            if body:
                return body
        return b""

    def _receive_more(self) -> bytes:
        while True:
            if self.sender.paused and self.head.status < 400:
                self.sender.resume()
            chunks_sent = self.sender.chunks_sent
            try:
                data = self.upstream.stream.recv(_BODY_READ, self._seconds, self.client)
                break
            except WaitTimeout:
                if not self._body_advances(chunks_sent):
                    raise self._silent() from None
            except OSError as error:
                raise closed_by_upstream("inside its response", error) from None
        if data:
            return data
        if self._decoder is None and self.head.length is None:
            # only the end of the connection frames this body (RFC 9112 section 6.3)
            self._check_sender()  # which may have ended it
            self.complete = True
            self._ended = True
            return b""
        self._check_sender()
        raise UpstreamClosed("it closed the connection inside its response")

    @property
    def has_whole_body(self) -> bool:
        """Whether the rest of the body can be read without waiting."""
        return self.complete or (self.head.length is not None and len(self.upstream.buffer) >= self.left)

    def _body_advances(self, chunks_sent: int) -> bool:
        """Whether the request body is being sent: it waits for the client, or the upstream has taken more."""
        return self.sender.waiting or self.sender.chunks_sent != chunks_sent

    def wait(self) -> None:
        """Wait until more of the response has come."""
        try:
            self.upstream.stream.wait(READ, self._seconds, self.client)
        except WaitTimeout:
            raise self._silent() from None

    def _silent(self) -> UpstreamTimeout:
        return UpstreamTimeout(f"it was silent for {self._seconds:g} s inside its response")

    @property
    def trailers(self) -> HeaderList:
        return self._decoder.trailers if self._decoder is not None else []

    def count_spliced(self, count: int) -> None:
        """The kernel has moved so many bytes of the body."""
        self.left -= count
        self.complete = not self.left

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """The response was read as far as it is needed: release the connection, or close it."""
        if not self.connected:
            return
        sender = self.sender
        if not sender.sent:
            if not self.complete:
                self.upstream.stream.shutdown()
            try:
                sender.join()
            except BaseException:
                self.drop()
                raise
        if self.complete and not self.head.close and not self._ended and sender.sent:
            self.connected = False
            self.pool.release(self.upstream)
        else:
            self.drop()

    def abort(self) -> None:
        """Close the connection: the request has failed."""
        if self.connected:
            self.upstream.stream.shutdown()
            self.drop()
        self.sender.abandon()

    def drop(self) -> None:
        """Close the connection, and leave the request as it is: it is sent again."""
        self.connected = False
        self.pool.discard(self.upstream)

    def detach(self) -> UpstreamConnection:
        """Leave the connection to a tunnel, which discards it at its end."""
        self.connected = False
        return self.upstream

    def body(self) -> Iterator[bytes]:
        """The body, in chunks as they come."""
        while data := self.receive():
            yield data


def closed_by_upstream(when: str, error: OSError) -> UpstreamClosed:
    """What a failed read says about the upstream.

    :param when: such as "before it responded".
    """
    if error.errno in (errno.ECONNRESET, errno.EPIPE):
        return UpstreamClosed(f"it reset the connection {when}")
    return UpstreamClosed(f"the connection failed {when}: {error.strerror or error}")


def no_response_in(seconds: float | None) -> UpstreamTimeout:
    """The error for an upstream that stays silent."""
    return UpstreamTimeout(f"it has not responded for {seconds:g} s")
