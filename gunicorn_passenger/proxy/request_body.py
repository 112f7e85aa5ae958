"""Sends the body of a request to its upstream while the response is awaited.

Process: any process in which the proxy is mounted: in a greenlet of its own, or in the thread of the request.
Never: collect a body in memory, or let a truncated body look whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gevent

from gunicorn_passenger.errors import BadRequestBody, BodyTimeout, ClientDisconnected
from gunicorn_passenger.http.chunked import CHUNKED, encode_chunk, last_chunk
from gunicorn_passenger.proxy import wire
from gunicorn_passenger.proxy.downstream import WsgiDownstream
from gunicorn_passenger.proxy.events import HandlerFailed
from gunicorn_passenger.proxy.mirror import MirroredRequest
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.pool import UpstreamConnection
from gunicorn_passenger.proxy.response_head import is_trailer
from gunicorn_passenger.proxy.upstream_io import Stream, runtime

#: The size of one read of a long body, in bytes.
_READ = 262144
#: A body that has come with its head and is no longer than this is sent together with the head, in bytes.
_INLINE = 65536
#: How much of a body is read after the upstream has stopped reading it, in bytes; and how long a client that
#: has its response may take to send the rest of its body, in seconds.
_DISCARD, _LINGER = 1 << 20, 2.0


_READ_BEFORE = (
    "the program has read the request's body, or a part of it, before the proxy: pass all of it on with "
    "buffer=io.BytesIO(body), or let the proxy read it"
)


class _Abandoned(Exception):
    """Ends a read of the body.

    Not ``GreenletExit``: gunicorn closes the connection after a read that has failed, so that the rest of the
    body is not taken for a request, but only an ``Exception`` counts as a failure.
    """


class RequestBodySender:
    """The body of a request, on its way to an upstream."""

    def __init__(self, client: WsgiDownstream, length: int, options: Options) -> None:
        """
        :param length: in bytes, or ``CHUNKED``.
        """
        self.client = client
        self.length = length
        self._stream = client.body
        # a thread without a hub cannot be woken
        may_interrupt = runtime().concurrent and client.may_interrupt_reads
        self._seconds = options.timeout if may_interrupt else None
        self._upstream_timeout = options.upstream_timeout
        self._max_body = options.max_body
        #: the mirrored request, which gets the same body; feeding it does not block
        self.mirror: MirroredRequest | None = None
        self._mirrored = False
        #: a body that is sent with the head; it is kept for the case that the request is sent again
        self.held: bytes | None = None
        #: whether the program has replaced the client's body
        self.replaced = False
        self.started = False
        #: whether the body was read and sent to its end
        self.finished = not length
        self.error: BaseException | None = None
        #: whether it waits for the client, and how many chunks the upstream has taken
        self.waiting = False
        self.chunks_sent = 0
        #: whether it has stopped before the end, because the upstream responds
        self.paused = False
        self._upstream: UpstreamConnection | None = None
        self._source: Iterator[bytes] = iter(())
        #: what of a chunk is still to be sent, framed
        self._unsent = b""
        self._task: Any = None

    def replace(self, body: Any, length: int) -> None:
        """Send another body in place of the client's.

        :param body: bytes, or a file.
        :param length: in bytes, or ``CHUNKED``.
        """
        self.length = length
        self.finished = not length
        self.replaced = True
        if isinstance(body, bytes):
            self.held = body
            self.started = True
        else:
            self._stream = body

    def check_untouched(self) -> None:
        """
        :raises HandlerFailed: when the program has read the body, or a part of it, before the proxy.
        """
        if self.length and not (self.started or self.replaced) and self.client.body_was_read:
            raise HandlerFailed(_READ_BEFORE)

    def take_small(self) -> bytes:
        """A small body that has come with its head; otherwise an empty text."""
        if (
            not self.started
            and not self.replaced
            and 0 < self.length <= min(_INLINE, self.client.buffered_bytes())
        ):
            self.held = self._read(self.length)
            self.started = True
        if self.held is not None and self.mirror is not None and not self._mirrored:
            # a retry sends the body again, but not to the mirror
            self._mirrored = True
            self.mirror.feed(self.held)
            self.mirror.end()
        return self.held or b""

    @property
    def replayable(self) -> bool:
        """Whether the request can be sent again."""
        return not self.started or self.held is not None

    def start(self, upstream: UpstreamConnection, concurrent: bool) -> None:
        """Send it: where gevent runs, while the response is read; elsewhere until a response comes."""
        self.started = True
        self._upstream = upstream
        self._source = self.chunks()
        if concurrent:
            self.client.set_reading_body(True)
            self._task = gevent.spawn(self._run)
        else:
            self._run(until_response=True)

    def resume(self) -> None:
        """Send more of it where nothing runs beside the request: the upstream may still read."""
        if self.paused:
            self._run(until_response=True)

    def _read(self, most: int) -> bytes:
        """
        :raises BadRequestBody: when the body is malformed, too short or too slow.
        :raises ClientDisconnected: when the client disconnects.
        """
        read = getattr(self._stream, "read1", self._stream.read)
        self.waiting = True
        try:
            if self._seconds is None:
                return bytes(read(most))
            with gevent.Timeout(self._seconds, BodyTimeout(self._seconds)):
                return bytes(read(most))
        except BodyTimeout as error:
            self.client.close_after_response()
            raise BadRequestBody(str(error), 408) from None
        except _Abandoned:
            raise
        except ClientDisconnected as error:
            if error.incomplete:
                raise BadRequestBody(str(error)) from None
            raise
        except OSError as error:
            raise ClientDisconnected(error.errno or 0, f"the client disconnected: {error.strerror}") from None
        except Exception as error:
            # a server reports a malformed body with an exception of its own
            raise BadRequestBody(f"the request's body is broken: {error}") from error
        finally:
            self.waiting = False

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes.

        WSGI's ``read(n)`` waits for all n bytes, so a client that sends a little and waits for the
        response would wait forever behind a proxy. Our own server and most others have ``read1``, which
        returns what has come.
        """
        if self.held is not None:
            yield self.held
            return
        left = self.length
        most = None if self.replaced else self._max_body
        while left:
            data = self._read(_READ if left < 0 else min(_READ, left))
            if not data:
                if left > 0:
                    if self.client.reports_disconnects:
                        raise HandlerFailed(_READ_BEFORE)
                    raise BadRequestBody(
                        f"{left} bytes of the request's body are missing: the client has not sent them, or "
                        "the program has read them and has to pass them on with buffer="
                    )
                return
            if left > 0:
                left -= len(data)
            if most is not None:
                most -= len(data)
                if most < 0:
                    raise BadRequestBody(f"the request's body has more than {self._max_body} bytes", 413)
            yield data

    def _run(self, until_response: bool = False) -> None:
        assert self._upstream is not None
        self.paused = False
        try:
            self.paused = not self._send(self._upstream.stream, until_response)
        except _Abandoned:
            pass
        except OSError as error:
            if isinstance(error, ClientDisconnected):
                self._abort(error)
        except Exception as error:
            self._abort(error)
        finally:
            if not self.paused:
                if self.mirror is not None:
                    self.mirror.end(self.finished)
                self.client.set_reading_body(False)

    def _send(self, stream: Stream, until_response: bool) -> bool:
        """
        :param until_response: whether to stop when the upstream sends something.
        :returns: whether nothing is left to be sent.
        """
        chunked = self.length == CHUNKED
        discarded = 0
        while True:
            if not self._unsent:
                chunk = next(self._source, b"")
                if not chunk:
                    break
                if self.mirror is not None:
                    self.mirror.feed(chunk)
                self._unsent = encode_chunk(chunk) if chunked else chunk
            try:
                if discarded == 0:
                    if until_response:
                        sent = stream.send_while_quiet(self._unsent, self._upstream_timeout)
                        self._unsent = self._unsent[sent:]
                        if self._unsent:
                            return False
                    else:
                        stream.send(self._unsent, self._upstream_timeout)
                        self._unsent = b""
                    self.chunks_sent += 1
                    continue
            except OSError:
                pass
            # The upstream has responded without reading the whole body, and its response decides. The
            # client may still be sending: we read the rest, within a bound, so that it can read that.
            discarded += len(self._unsent)
            self._unsent = b""
            if discarded > _DISCARD:
                return True
        if discarded:
            return True
        if chunked:
            stream.send(self._last_chunk(), self._upstream_timeout)
        self.finished = True
        return True

    def _abort(self, error: BaseException) -> None:
        """Reset the connection, so that the upstream does not take a truncated body for the whole."""
        assert self._upstream is not None
        self.error = error
        self._upstream.stream.shutdown()

    def _last_chunk(self) -> bytes:
        trailers = getattr(self._stream, "trailers", None) if self.client.connection is not None else None
        lines = wire.lines_of([(name.lower(), value) for name, value in trailers or () if is_trailer(name)])
        return last_chunk(lines)

    def join(self) -> None:
        """The response was sent: let the client finish its body, within bounds."""
        if self._task is not None:
            self._task.join(timeout=_LINGER)
            self.abandon()

    def abandon(self) -> None:
        """Stop sending: the request is over."""
        if self._task is not None:
            if self.waiting:
                if self.client.may_interrupt_reads:
                    self.client.close_after_response()
                else:
                    self._task.join()
            self._task.kill(_Abandoned, block=True)
        elif self.mirror is not None and (self.paused or not self.started):
            self.mirror.end(whole=False)

    @property
    def is_cut_off(self) -> bool:
        """Whether the client is likely to send more than is read after the upstream has stopped reading."""
        return self.length > _DISCARD and not self.sent

    @property
    def sent(self) -> bool:
        """Whether the upstream was sent all of it."""
        return self.finished or self.held is not None


#: the sender of all requests without a body; nothing of it changes
NO_BODY_SENDER = RequestBodySender(
    WsgiDownstream({"REQUEST_METHOD": "GET", "wsgi.input": None}, lambda *_: None), 0, Options()
)
