"""One request to a target and its answer.

Runs in: wherever the proxy is mounted, in the greenlet or thread that the request has. Must never:
collect a body, guess a framing, turn a truncated answer into a whole one, or ask twice for what may be
done once only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import gevent

from gunicorn_passenger.errors import (
    BadRequestBody,
    BadResponse,
    BodyTimeout,
    ClientDisconnected,
    UpstreamClosed,
    UpstreamTimeout,
)
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.agent import Pool, UpstreamConnection
from gunicorn_passenger.proxy.downstream import CHUNKED, WsgiDownstream
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.response_head import (
    HEAD_LIMIT,
    ChunkedDecoder,
    ResponseHead,
    is_trailer,
    parse_response_head,
)
from gunicorn_passenger.proxy.upstream_io import READ, runtime

#: Bytes that one read of a long body asks for.
_PIECE = 262144
#: A body that has arrived with its head and is no longer than this goes up with it in one piece.
_INLINE = 65536
#: Interim answers that one request may have.
_INTERIM = 32
#: Seconds that a target gets to say "100 Continue" before it is sent the body all the same.
_EXPECT = 1.0
#: How much of a request body is read after the target has stopped listening to it, in bytes, and how
#: long an answered client may take to send the rest of its body, in seconds.
_DISCARD, _LINGER = 1 << 20, 2.0

#: RFC 9110 section 9.2.2
IDEMPOTENT = {"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"}

#: answers without a body (RFC 9110 section 6.4.1)
_BODILESS = (204, 304)


class RequestBodySender:
    """The body of a request, on its way to a target."""

    def __init__(self, client: WsgiDownstream, length: int, options: Options, copy: Any = None) -> None:
        """
        :param length: in bytes, or ``CHUNKED``.
        :param copy: gets the same body, and must not block.
        """
        self.client = client
        self.length = length
        self._stream = client.body
        # a thread has nothing that would wake it
        self._seconds = options.timeout if runtime().concurrent else None
        self._proxy_timeout = options.proxy_timeout
        self.copy = copy
        #: a body that is sent with the head, and kept in case that has to be done twice
        self.held: bytes | None = None
        #: whether it is another body than the client's
        self.replaced = False
        self.begun = False
        #: whether the body was read to its end, and sent
        self.over = not length
        self.error: BaseException | None = None
        #: whether it waits for the client, and how many pieces the target has taken
        self.waits = False
        self.moved = 0
        self._link: UpstreamConnection | None = None
        self._task: Any = None

    def replace(self, body: Any, length: int) -> None:
        """Send another body.

        :param body: bytes, or a file.
        """
        self.length = length
        self.over = not length
        self.replaced = True
        if isinstance(body, bytes):
            self.held = body
            self.begun = True
        else:
            self._stream = body

    def hold(self) -> bytes:
        """A small body that has come with its head; else nothing."""
        if not self.begun and not self.replaced and 0 < self.length <= min(_INLINE, self.client.arrived()):
            self.held = self._read(self.length)
            self.begun = True
        if self.held is not None and self.copy is not None:
            self.copy.feed(self.held)
            self.copy.end()
        return self.held or b""

    @property
    def replayable(self) -> bool:
        """Whether the request can be sent once more."""
        return not self.begun or self.held is not None

    def start(self, link: UpstreamConnection, concurrent: bool) -> None:
        """Send it, beside what else happens, where that can be."""
        self.begun = True
        self._link = link
        if concurrent:
            self.client.uploading(True)
            self._task = gevent.spawn(self._run)
        else:
            self._run(stop_when_answered=True)

    def _read(self, most: int) -> bytes:
        """
        :raises BadRequestBody: when the client does not keep its side.
        :raises ClientDisconnected: when it has gone.
        """
        read = getattr(self._stream, "read1", self._stream.read)
        self.waits = True
        try:
            if self._seconds is None:
                return bytes(read(most))
            with gevent.Timeout(self._seconds, BodyTimeout(self._seconds)):
                return bytes(read(most))
        except BodyTimeout as error:
            raise BadRequestBody(str(error), 408) from None
        except ClientDisconnected as error:
            if error.incomplete:
                raise BadRequestBody(str(error)) from None
            raise
        except OSError as error:
            raise ClientDisconnected(error.errno or 0, f"the client has gone: {error.strerror}") from None
        except gevent.GreenletExit:
            raise
        except Exception as error:
            # the server's way to say that its client sends nonsense
            raise BadRequestBody(f"the request's body is broken: {error}") from error
        finally:
            self.waits = False

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives.

        WSGI's ``read(n)`` waits for all n bytes, so a client that sends a little and waits for the
        answer would wait for ever behind a proxy. Our own server and most others can ``read1``: it
        returns what has come in.
        """
        left = self.length
        while left:
            data = self._read(_PIECE if left < 0 else min(_PIECE, left))
            if not data:
                if left > 0:
                    raise BadRequestBody(f"{left} bytes of the request's body are missing")
                return
            if left > 0:
                left -= len(data)
            yield data

    def _run(self, stop_when_answered: bool = False) -> None:
        assert self._link is not None
        stream = self._link.stream
        chunked = self.length == CHUNKED
        discarded = 0
        try:
            for piece in self.pieces():
                if self.copy is not None:
                    self.copy.feed(piece)
                try:
                    if discarded == 0:
                        if stop_when_answered and not stream.silent():
                            return
                        stream.send(_chunk(piece) if chunked else piece, self._proxy_timeout)
                        self.moved += 1
                        continue
                except OSError:
                    pass
                # The target has answered without reading all, and its answer decides. The client may
                # still be sending: what is left is read, within a bound, so that it can read the answer.
                discarded += len(piece)
                if discarded > _DISCARD:
                    return
            if discarded:
                return
            if chunked:
                stream.send(self._last_chunk(), self._proxy_timeout)
            self.over = True
        except OSError as error:
            if isinstance(error, ClientDisconnected):
                self._abort(error)
        except Exception as error:
            self._abort(error)
        finally:
            if self.copy is not None:
                self.copy.end(self.over)
            self.client.uploading(False)

    def _abort(self, error: BaseException) -> None:
        """The target must not take what it got for the whole."""
        assert self._link is not None
        self.error = error
        self._link.stream.shutdown()

    def _last_chunk(self) -> bytes:
        trailers = getattr(self._stream, "trailers", None) if self.client.connection is not None else None
        lines = wire.lines_of([(name.lower(), value) for name, value in trailers or () if is_trailer(name)])
        return b"0\r\n%b\r\n" % lines

    def stop(self) -> None:
        """The answer was sent: let the client finish, within bounds."""
        if self._task is not None:
            self._task.join(timeout=_LINGER)
            self.abandon()

    def abandon(self) -> None:
        """Nobody wants it any more."""
        if self._task is not None:
            self._task.kill(block=True)
        elif self.copy is not None and not self.begun:
            self.copy.end(whole=False)

    @property
    def sent(self) -> bool:
        """Whether the target has got all of it."""
        return self.over or self.held is not None


class NoBodySender:
    """The upload of a request without a body. There is nothing in it to tell two of them apart."""

    length = moved = 0
    over = sent = replayable = True
    begun = replaced = waits = False
    held = error = copy = None

    def hold(self) -> bytes:
        return b""

    def start(self, link: UpstreamConnection, concurrent: bool) -> None:
        pass

    def stop(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def pieces(self) -> Iterator[bytes]:
        return iter(())


NO_BODY_SENDER = NoBodySender()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class RoundTrip:
    """One request on one connection, up to the end of the answer's body."""

    head: ResponseHead
    link: UpstreamConnection
    _interim = 0
    #: whether the body of the answer was read to its end
    complete = False
    #: whether it has a connection
    connected = False
    #: whether the target has ended it
    _ended = False
    _decoder: ChunkedDecoder | None = None
    #: bytes of the body that have not come, where it has a length
    left = 0
    #: whether the request asks for another protocol
    switching = False
    #: what reading the head of the answer has met already
    _met: BaseException | None = None

    def __init__(
        self,
        pool: Pool,
        options: Options,
        method: str,
        client: WsgiDownstream,
        upload: RequestBodySender | NoBodySender,
    ) -> None:
        self.pool = pool
        self.method = method
        self._seconds = options.proxy_timeout
        self._keep_case = options.preserve_header_key_case
        self.client = client
        self.upload = upload

    # --- the request -----------------------------------------------------------------------------

    def resume(
        self, link: UpstreamConnection, head: bytes, came: bytes, met: BaseException | None
    ) -> ResponseHead:
        """Go on with a request without a body that was sent: read the head of its answer.

        :param came: what has come of that.
        :param met: what reading on has met.
        """
        link.buf = came
        self._met = met
        return self.request(head, False, True, link)

    def request(
        self, head: bytes, expect: bool, wait: bool, sent: UpstreamConnection | None = None
    ) -> ResponseHead:
        """Send a request and read the head of its answer.

        A connection that was kept may be closed by the target at any time. A request that meets that is
        sent once more, on a new connection, when it does no harm: not a byte of it was taken, or it may
        be done twice (RFC 9110 section 9.2.2), and no body is lost.

        :param head: as it is sent.
        :param expect: whether the client waits for "100 Continue" before it sends the body.
        :param wait: whether to wait for a connection when all are in use.
        :param sent: where it was sent already.
        :raises ProxyError: when there is no answer.
        """
        upload = self.upload
        safe = self.method in IDEMPOTENT
        body = b"" if expect else upload.hold()
        fresh = False
        while True:
            link = self.link = sent or self._take(fresh, wait)
            self.connected = True
            untouched = False
            stream = link.stream
            try:
                if sent is not None:
                    sent = None
                else:
                    stream.partly = False
                    if body or not upload.length:
                        stream.send_soon(head + body, self._seconds)
                    else:
                        stream.send(head, self._seconds)
            except TimeoutError:
                raise UpstreamTimeout(f"it has not read the request for {self._seconds:g} s") from None
            except OSError:
                # it may have answered before it closed the connection
                untouched = not (stream.tls or stream.partly)
            if untouched and link.reused and not upload.begun and not link.stream.pending():
                # it was closed before anything was sent
                self._drop()
                fresh = True
                continue
            try:
                if not expect and upload.length and not body:
                    upload.start(link, self.pool.runtime.concurrent)
                self.head = self._read_head(expect)
                return self.head
            except UpstreamClosed:
                again = link.reused and not link.buf and not self._interim and upload.replayable
                if not again or not (safe or untouched or (stream.failed and not stream.partly)):
                    raise
                self._drop()
                fresh = True

    def _take(self, fresh: bool, wait: bool) -> UpstreamConnection:
        while True:
            link = self.pool.take(fresh, wait)
            if not link.reused or link.stream.silent():
                return link
            # something came that nobody asked for, or the end
            self.pool.drop(link)

    def _read_head(self, expect: bool) -> ResponseHead:
        """The head of the final answer; interim ones go to the client.

        :param expect: whether the body waits for "100 Continue".
        """
        link = self.link
        while True:
            data = self._receive_head(expect)
            if data is None:
                # it does not say so: RFC 9110 section 10.1.1 lets nobody wait for ever
                expect = False
                self.upload.start(link, self.pool.runtime.concurrent)
                continue
            head = parse_response_head(self.pool, data, self._keep_case)
            if head.status >= 200:
                break
            if head.status == 101:
                if head.upgrade and self.switching:
                    break
                raise BadResponse("101 Switching Protocols, which nobody asked for")
            self._interim += 1
            if self._interim > _INTERIM:
                raise BadResponse(f"more than {_INTERIM} interim answers")
            if head.status == 100:
                if expect:
                    expect = False
                    self.client.proceed()
                    self.upload.start(link, self.pool.runtime.concurrent)
            else:
                self.client.interim(head.status, head.reason, head.fields)
        if self.method == "HEAD" or head.status in _BODILESS or head.status == 101:
            self.complete = True
        elif head.chunked:
            self._decoder = ChunkedDecoder()
        elif head.length is not None:
            self.left = head.length
            self.complete = not head.length
        return head

    def _receive_head(self, expect: bool) -> bytes | None:
        link = self.link
        data = link.buf
        moved = self.upload.moved
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if (end if end > 3 else len(data)) > HEAD_LIMIT:
                raise BadResponse(f"its head has more than {HEAD_LIMIT} bytes")
            if end > 3:
                link.buf = data[end:]
                return data[:end]
            if data and (
                not data.startswith(b"HTTP/1."[: len(data)]) or data.count(b"\n") != data.count(b"\r\n")
            ):
                raise BadResponse(f"it begins with {data[:40]!r}, which is not a head of HTTP/1.x")
            try:
                self._raise_met()
                more = link.stream.answer(_EXPECT if expect else self._seconds, self.client)
            except TimeoutError:
                self._check_upload()
                if expect:
                    link.buf = data
                    return None
                if self._goes_on(moved):
                    moved = self.upload.moved
                    continue
                raise UpstreamTimeout(f"it has not answered for {self._seconds:g} s") from None
            except OSError as error:
                self._check_upload()
                link.buf = data
                raise UpstreamClosed(_reason("before it answered", error)) from None
            if not more:
                self._check_upload()
                link.buf = data
                where = "in the head of its answer" if data else "before it answered"
                raise UpstreamClosed(f"it closed the connection {where}")
            data = data + more if data else more

    def _raise_met(self) -> None:
        if self._met is not None:
            met, self._met = self._met, None
            raise met

    def _check_upload(self) -> None:
        if self.upload.error is not None:
            raise self.upload.error

    # --- the answer ------------------------------------------------------------------------------

    def receive(self, wait: bool = True) -> bytes:
        """The next bytes of the answer's body, as they come in; empty at its end.

        :param wait: whether to wait for some; else none may be there.
        :raises UpstreamClosed, UpstreamTimeout, BadResponse: when it breaks off.
        :raises DownstreamDisconnected: when nobody waits for it any more.
        """
        link = self.link
        while not self.complete:
            data, link.buf = link.buf, b""
            if not data:
                if not wait:
                    return b""
                data = self._more()
                if not data:
                    return b""
            decoder = self._decoder
            if decoder is not None:
                body = decoder.feed(data)
                if decoder.finished:
                    self.complete = True
                    link.buf = decoder.rest
            elif self.head.length is None:
                body = data
            else:
                body = data
                if len(body) >= self.left:
                    body, link.buf = data[: self.left], data[self.left :]
                    self.complete = True
                self.left -= len(body)
            if body:
                return body
        return b""

    def _more(self) -> bytes:
        while True:
            moved = self.upload.moved
            try:
                data = self.link.stream.recv(_PIECE, self._seconds, self.client)
                break
            except TimeoutError:
                if not self._goes_on(moved):
                    raise self._silent() from None
            except OSError as error:
                raise UpstreamClosed(_reason("inside its answer", error)) from None
        if data:
            return data
        if self._decoder is None and self.head.length is None:
            # the end is all that tells that it is whole (RFC 9112 section 6.3)
            self.complete = True
            self._ended = True
            return b""
        self._check_upload()
        raise UpstreamClosed("it closed the connection inside its answer")

    @property
    def whole(self) -> bool:
        """Whether all of the answer has come in, to be read without waiting."""
        return self.complete or (self.head.length is not None and len(self.link.buf) >= self.left)

    def _goes_on(self, moved: int) -> bool:
        """Whether the upload does: it waits for the client, or the target has taken more of it."""
        return self.upload.waits or self.upload.moved != moved

    def wait(self) -> None:
        """Wait until something has come."""
        try:
            self.link.stream.wait(READ, self._seconds, self.client)
        except TimeoutError:
            raise self._silent() from None

    def _silent(self) -> UpstreamTimeout:
        return UpstreamTimeout(f"it was silent for {self._seconds:g} s inside its answer")

    @property
    def concurrent(self) -> bool:
        """Whether greenlets serve it, which can do two things at a time."""
        return bool(self.pool.runtime.concurrent)

    @property
    def trailers(self) -> HeaderList:
        return self._decoder.trailers if self._decoder is not None else []

    def moved(self, count: int) -> None:
        """So many bytes of the body have gone another way."""
        self.left -= count
        self.complete = not self.left

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """The answer was read as far as anybody wants it."""
        if not self.connected:
            return
        upload = self.upload
        if not upload.sent:
            if not self.complete:
                self.link.stream.shutdown()
            try:
                upload.stop()
            except BaseException:
                self._drop()
                raise
        if self.complete and not self.head.close and not self._ended and upload.sent:
            self.connected = False
            self.pool.give(self.link)
        else:
            self._drop()

    def abort(self) -> None:
        """Something went wrong: the connection carries nothing any more."""
        if self.connected:
            self.link.stream.shutdown()
            self._drop()
        self.upload.abandon()

    def _drop(self) -> None:
        self.connected = False
        self.pool.drop(self.link)

    def detach(self) -> UpstreamConnection:
        """The connection becomes a tunnel's, which gives it back to the pool."""
        self.connected = False
        return self.link

    def body(self) -> Iterator[bytes]:
        """The answer's body, in pieces as they come in."""
        while data := self.receive():
            yield data


def _reason(when: str, error: OSError) -> str:
    if error.errno in (errno.ECONNRESET, errno.EPIPE):
        return f"it reset the connection {when}"
    return f"the connection failed {when}: {error.strerror or error}"
