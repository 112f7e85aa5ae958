"""One connection: requests in, responses out, until one side has had enough.

Runs in: a worker, one greenlet per busy connection. Must never: read what follows a refused request, or
wait without a deadline for a client that owes something.

A connection has a greenlet of its own while it is busy. When its client says nothing for a moment, the
greenlet ends and the hub alone waits: an idle connection costs its socket and little else.

The loop works on the non-blocking socket itself and lets the hub tell when there is something to
read. It asks the hub *before* it reads: after an answer there is mostly nothing there yet, so a read
would cost a call of the system and an exception; and a client that is always faster than that would
keep the greenlet running and starve the other connections, as happens to gunicorn's gevent worker
with its access log on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import struct
from fcntl import ioctl
from termios import FIONREAD
from time import monotonic, perf_counter
from typing import Any

import gevent
from gevent import get_hub, getcurrent, monkey
from gevent.exceptions import ConcurrentObjectUseError
from gunicorn import util
from gunicorn.http.wsgi import FileWrapper
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import (
    BodyTimeout,
    ClientDisconnected,
    TruncatedResponse,
    body_incomplete,
    client_disconnected,
)
from gunicorn_passenger.http.body import EMPTY_BODY, ChunkedBody, LengthBody, RequestBody
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.http.listener_context import HookFailed, ListenerContext
from gunicorn_passenger.http.request_head import CHUNKED
from gunicorn_passenger.http.response import RESPONSE_SENT, Response
from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.http.write_coalescing import SAMPLE

#: Bytes that one read of the socket asks for while a head is awaited.
_READ = 16384
#: Requests that came in one piece, after which others get their turn.
_PIPELINED = 16
#: Bytes that ``sendfile`` sends before others get their turn.
_SENDFILE = 1 << 20
#: Seconds that a closing connection reads what its client still sends.
_LINGER = 10.0

#: Seconds after which it is asked again whether a client is still there that has sent more than was read.
_LOOK = 0.4

#: A server's Close frame with 1001, "going away" (RFC 6455 sections 5.5.1 and 7.4.1).
_CLOSE_1001 = b"\x88\x02\x03\xe9"
#: Seconds that a client has to answer it.
_GOODBYE = 5.0
_WEBSOCKET = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

_READABLE, _WRITABLE = 1, 2
#: the system's own, which asks without the hub
_poll = monkey.get_original("select", "poll")
_CLIENT_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNABORTED}


class _ConnectionGreenlet(gevent.Greenlet):
    """Serves one connection. gevent would note the stack that spawned it, which is always the same."""

    spawning_stack_limit = 0


class Connection:
    """A client's connection and what is known of its present request."""

    __slots__ = (
        "_acceptor",
        "_bounded",
        "_budget",
        "_expired",
        "_given",
        "_hub",
        "_looking",
        "_raw",
        "_readable",
        "_sending",
        "_stop_waiting",
        "_stuck",
        "_taker",
        "_waiting",
        "_writable",
        "addr",
        "at",
        "body",
        "buf",
        "fresh",
        "gateway",
        "greenlet",
        "head",
        "held",
        "leaving",
        "memo",
        "peer",
        "response",
        "silent",
        "sock",
        "watched",
    )

    def __init__(
        self, acceptor: Any, gateway: ListenerContext, sock: Any, addr: Any, early: bytes = b""
    ) -> None:
        """
        :param acceptor: is told of the end.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        :param addr: what ``accept()`` gave.
        :param early: bytes that were read from it before.
        """
        self._acceptor = acceptor
        self.gateway = gateway
        self.sock = sock
        sock.connection = self
        self._raw = sock._sock
        # A client of a UNIX socket can bind its own end to a name of any bytes. That is not an address, so
        # it goes no further than here.
        self.addr = addr if addr.__class__ is tuple else ""
        self.peer = gateway.peer(self.addr, sock)
        #: bytes that have come in, and how many of them are used up
        self.buf = early
        self.at = 0
        self.head = b""
        self.body: RequestBody = EMPTY_BODY
        self.response: Response | None = None
        self._hub = get_hub()
        #: made when it is first waited for: most connections with one request never are
        self._readable: Any = None
        self._writable: Any = None
        self._looking: Any = None
        #: the greenlet that serves it; none while it waits for a request
        self.greenlet: Any = None
        #: which greenlet waits for the client inside a request, until when, and whether for too long
        self._waiting: Any = None
        self._stop_waiting: Any = gateway.heads.remove
        self._expired = False
        #: bytes of a body that may still be dropped, while one is
        self._budget: int | None = None
        #: whether one deadline holds for all that is read
        self._bounded = False
        #: a greenlet that waits until it can send
        self._sending: Any = None
        self._taker: Any = None
        self._given = False
        #: A whole answer that the loop's turn holds, or what it could not send of one: that is stuck.
        #: Whatever else happens on the connection sends it first.
        self.held = b""
        self._stuck = False
        #: whether it has had no request
        self.fresh = True
        #: for Silence: since which tick its greenlet waits for a request, and whether that is looked at
        self.silent = 0
        self.watched = False
        #: what the proxy remembers of the last request
        self.memo: Any = None
        #: called when the worker leaves, by whoever has made something else of the connection
        self.leaving: Any = None

    # --- between requests ------------------------------------------------------------------------

    def begin(self) -> None:
        """Serve it, in a greenlet of its own."""
        _ConnectionGreenlet(self._run).start()

    def _ready(self) -> None:
        """Called in the hub when there is something to read."""
        self._readable.stop()
        self._stop_waiting(self, None)
        try:
            _ConnectionGreenlet(self._run).switch()
        except Exception as error:
            report_fault("an idle connection was closed", error)
            self.close()

    def _park(self, deadlines: TimeoutQueue) -> None:
        """Wait for a request without a greenlet."""
        self.greenlet = self._waiting = None
        self._expired = False
        self.head = b""
        self.memo = None
        self.peer.forget()
        self._stop_waiting = deadlines.remove
        deadlines.add(self)
        self._reader().start(self._ready)

    def expire(self) -> None:
        """Called in the hub by a deadline."""
        if self.greenlet is None:
            self.close()
        else:
            self._expired = True
            self._waiting.switch()

    # --- the loop --------------------------------------------------------------------------------

    def _run(self) -> None:
        """A greenlet's life: while the connection is busy."""
        linger: bool | None = False
        try:
            linger = self.serve(getcurrent())
            if linger:
                self.linger()
        except ClientDisconnected as error:
            self.gateway.log.debug("%s", error)
        except gevent.GreenletExit:
            pass
        except BaseException:
            self.gateway.log.exception("Error on a connection")
        finally:
            if linger is not None:
                self.close()

    def serve(self, greenlet: Any) -> bool | None:  # noqa: PLR0915 - the hot loop is one, in one place
        """Answer the requests that there are, until it must wait for the next or is to end.

        :param greenlet: the current one.
        :returns: whether the client may still be sending when the connection ends; ``None`` when it
            does not end.
        """
        self.greenlet = self._waiting = greenlet
        gateway = self.gateway
        read = gateway.reader.read
        idle_ticker = gateway.idle_ticker
        recv = self._raw.recv
        readable = self._readable
        wait = self._hub.switch
        switch = greenlet.switch
        pipelined = 0
        data = self.buf
        if not data:
            try:
                data = recv(_READ)
            except BlockingIOError:
                self._park(gateway.heads if self.fresh else gateway.idle)
                return None
            except OSError as error:
                raise client_disconnected(error) from None

        while data:
            end = data.find(b"\r\n\r\n") + 4
            if end == 3:
                data = self._rest_of_head(data)
                if not data:
                    break
                end = data.find(b"\r\n\r\n") + 4
            if end == len(data):
                head, self.buf = data, b""
            else:
                head, self.buf = data[:end], data[end:]
            self.at = 0
            self.head = head
            self.fresh = False
            self.response = None
            try:
                environ, length, persist, request = read(head, self.peer)
            except HookFailed as error:
                self._refuse(error.request, error)
                self._after(error.request, {})
                return True
            except Exception as error:
                self._refuse(None, error)
                return True
            if length:
                self._take_body(environ, length, request)
            else:
                self.body = EMPTY_BODY
            upgrade = self.buf and not length and "HTTP_UPGRADE" in environ
            if upgrade:
                # who takes the connection reads from the socket: what came with the request is there, too
                self.sock.early, self.buf = self.buf, b""

            if not self._answer(environ, persist, request):
                self._send_held()
                return self._unread() or (persist and self._more_came())

            if length and not self._next_begins():
                return True
            if upgrade:
                self.buf, self.sock.early = self.sock.early, b""
            data = self.buf[self.at :] if self.at else self.buf
            self.buf, self.at = data, 0
            if self.held and (data or self._stuck or self._taker is not None):
                self._send_held()
            if self._taker is not None:
                self._given = True
                return False
            if data:
                pipelined += 1
                if pipelined % _PIPELINED == 0:
                    gevent.sleep(0)
                continue
            if readable is None:
                readable = self._reader()
            while True:
                # where a busy connection spends its life
                self.silent = idle_ticker.tick
                if not self.watched:
                    idle_ticker.watch(self)
                readable.start(switch)
                try:
                    wait()
                finally:
                    readable.stop()
                    self.silent = 0
                if self.held:
                    self._send_held()
                if self._taker is not None:
                    self._given = True
                    return False
                if self._expired:
                    self._park(gateway.idle)
                    return None
                try:
                    data = recv(_READ)
                except BlockingIOError:
                    continue  # woken for nothing
                except OSError as error:
                    raise client_disconnected(error) from None
                break
        return False

    def _answer(self, environ: dict[str, Any], persist: bool, request: Any) -> bool:  # noqa: PLR0915 - hot
        """Call the application and send what it says.

        :returns: whether the connection can go on.
        """
        gateway = self.gateway
        worker = gateway.worker
        worker.nr += 1
        gateway.requests += 1
        if worker.nr >= worker.max_requests:
            gateway.on_max_requests()
        response = self.response = Response(self, environ, request)
        if not (persist and gateway.keepalive):
            response.must_close = True
        environ["wsgi.input"] = self.body
        environ["wsgi.early_hints"] = response.early_hints
        turn = gateway.turn
        began = 0.0
        if turn.holding and not (turn.holds or gateway.forwards):
            turn.let_go()
        if turn.streak or gateway.logs or not worker.nr % SAMPLE:
            began = perf_counter()
            if began > turn.due:
                turn.let_go()
        result: Any = None
        try:
            try:
                result = gateway.app(environ, response.start_response)
                if result.__class__ is list or result.__class__ is tuple:
                    response.send_all(result)
                elif result is RESPONSE_SENT:
                    pass  # the proxy has sent it
                elif isinstance(result, FileWrapper):
                    response.send_file(result, gateway.sendfile)
                elif result is ALREADY_HANDLED:
                    return False
                else:
                    for piece in result:
                        response.write(piece)
                    response.close()
            finally:
                if gateway.logs and response.headers_sent:
                    took = perf_counter() - began
                    gateway.access.write(response, self._request_of(request), environ, took, self.head)
                if result.__class__ is not list and hasattr(result, "close"):
                    result.close()
        except StopIteration as error:
            # Flask-Sock's way to say that it has taken the connection and is done with it
            if not self.sock.taken and not response.headers_sent:
                self._failed(error, environ, request)
            return False
        except gevent.GreenletExit:
            raise
        except BaseException as error:
            self._failed(error, environ, request)
            return False
        finally:
            if gateway.after is not None:
                self._after(request, environ)
            if began and result is not RESPONSE_SENT:
                turn.took(perf_counter() - began)
        return not response.must_close

    # --- what is rare ----------------------------------------------------------------------------

    def _rest_of_head(self, data: bytes) -> bytes:
        """Wait for the rest of a head, until one deadline for the whole of it.

        :returns: nothing when the client has gone or been answered.
        """
        gateway = self.gateway
        try:
            return self._await_head(data)
        except ClientDisconnected as error:
            gateway.log.debug("%s", error)
        except TimeoutError:
            gateway.log.info(
                "A request's head was not complete after %g s (%s)", gateway.heads.seconds, self._from()
            )
            self._say(408, "Request Timeout", "The request took too long.")
        except Exception as error:
            self._refuse(None, error)
            self.linger()
        return b""

    def _await_head(self, data: bytes) -> bytes:
        self.buf = data
        heads = self.gateway.heads
        heads.add(self)
        came = bytearray(data)
        seen = 0
        try:
            while came.find(b"\r\n\r\n", max(seen - 3, 0)) < 0:
                self.gateway.reader.check_partial(came, seen, self.peer)
                seen = len(came)
                self._wait(None)
                more = b"" if self._expired else self._read(_READ)
                if self._expired:
                    raise TimeoutError
                if not more:
                    raise ClientDisconnected(0, "Ignored premature client disconnection in a request's head.")
                came += more
        finally:
            heads.remove(self, None)
        return bytes(came)

    def _take_body(self, environ: dict[str, Any], length: int, request: Any) -> None:
        expect = (
            "HTTP_EXPECT" in environ
            and environ["SERVER_PROTOCOL"] != "HTTP/1.0"
            and environ["HTTP_EXPECT"].lower() == "100-continue"
        )
        if length == CHUNKED:
            limit = self.gateway.reader.field_limit
            self.body = ChunkedBody(self, expect, limit, self._request_of(request))
        else:
            self.body = LengthBody(self, length, expect)

    def _next_begins(self) -> bool:
        """Whether the next request can begin: the body of this one is read, or small enough to be."""
        body = self.body
        if not body.finish():
            return False
        body.end()
        return True

    def _unread(self) -> bool:
        """Whether the client may still be sending when the connection ends."""
        body = self.body
        over = body is EMPTY_BODY or (not body.unread and body.finish())
        body.end()
        return not over

    def _more_came(self) -> bool:
        """Whether the client has sent more than the request after which the connection ends."""
        if self.buffered():
            return True
        if self.sock.taken:
            return False  # it may be closed
        with contextlib.suppress(OSError):
            return bool(ioctl(self._raw.fileno(), FIONREAD, b"\0\0\0\0") != b"\0\0\0\0")
        return False

    def _request_of(self, request: Any) -> Any:
        """gunicorn's request object, made where it does not exist and somebody asks for it."""
        reader, head, peer = self.gateway.reader, self.head, self.peer
        return lambda: reader.request(head, peer) if request is None else request

    def _refuse(self, request: Any, error: BaseException) -> None:
        """A request that never reaches the application; nothing after it is read as a request."""
        self.gateway.refuse(request, self.sock, self.addr, error)

    def _failed(self, error: BaseException, environ: dict[str, Any], request: Any) -> None:
        """The application has failed, or its client has."""
        gateway = self.gateway
        response = self.response
        assert response is not None
        begun = response.headers_sent
        if error is self.sock.error:
            gateway.log.debug("the client has gone from an application that took its connection: %s", error)
        elif isinstance(error, ClientDisconnected):
            gateway.log.debug("%s", error)
            if error.incomplete and not begun:
                self._turn_away(400, "Bad Request", "The request's body is not complete.", environ, request)
        elif isinstance(error, TruncatedResponse):
            gateway.log.warning("%s", error)
        elif isinstance(error, BodyTimeout):
            gateway.log.info("%s (%s)", error, self._from())
            if not begun:
                self._turn_away(408, "Request Timeout", "The request took too long.", environ, request)
        elif begun or self.sock.taken:
            # a 500 now would be read as more of the body, or as another protocol
            gateway.log.exception("Error handling request", exc_info=error)
        else:
            self._refuse(self._request_of(request)(), error)
        if begun and not response.chunked and response.response_length is None:
            # its end is all that tells the client that it is whole: make that a reset
            self._reset()

    def _after(self, request: Any, environ: dict[str, Any]) -> None:
        gateway = self.gateway
        if gateway.after is None:
            return
        try:
            gateway.after(gateway.worker, request, environ, self.response)
        except Exception:
            gateway.log.exception("Exception in post_request hook")

    def _from(self) -> str:
        return str(self.addr[0]) if isinstance(self.addr, tuple) else "unix:"

    def _turn_away(self, status: int, reason: str, text: str, environ: dict[str, Any], request: Any) -> None:
        """Answer a client that has not kept its side; the access log has it, too."""
        self._say(status, reason, text)
        if self.gateway.logs:
            response = Response(self, environ, request)
            response.status = f"{status} {reason}"
            response.sent = len(text)
            self.gateway.access.write(response, self._request_of(request), environ, 0.0, self.head)

    def _say(self, status: int, reason: str, text: str) -> None:
        with contextlib.suppress(OSError):
            util.write_error(self.sock, status, reason, text)

    def _reset(self) -> None:
        if isinstance(self.addr, tuple):
            # and nothing is waited for, which would end it cleanly first
            self.body.end()
            self.body = EMPTY_BODY
            with contextlib.suppress(OSError):
                self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # --- reading ---------------------------------------------------------------------------------

    def buffered(self) -> int:
        """Bytes that have come in and are not used up."""
        return len(self.buf) - self.at

    def receive(self, most: int) -> bytes:
        """The next bytes, at most so many; empty when the client sends no more.

        :raises BodyTimeout: when nothing comes for too long.
        """
        at = self.at
        if at == len(self.buf):
            if most >= _READ:
                return self._await(most)
            self.buf, self.at = self._await(_READ), 0
            at = 0
        data = self.buf[at : at + most]
        self.at = at + len(data)
        return data

    def more(self) -> bytes:
        """Wait for more bytes and put them behind those that there are; empty when there come none."""
        data = self._await(_READ)
        self.buf = self.buf[self.at :] + data
        self.at = 0
        return data

    def _await(self, most: int) -> bytes:
        while True:
            try:
                data: bytes = self._raw.recv(most)
            except BlockingIOError:
                self._wait(None if self._bounded else self.gateway.bodies)
                if self._expired:
                    self._expired = False
                    queue = self.gateway.heads if self._bounded else self.gateway.bodies
                    raise BodyTimeout(queue.seconds) from None
                continue
            except OSError as error:
                raise client_disconnected(error) from None
            if self._budget is not None:
                self._budget -= len(data)
                if self._budget < 0:
                    raise BodyTimeout(0.0)
            return data

    def drain(self, body: RequestBody, most: int) -> bool:
        """Read and drop the rest of a body.

        :param most: bytes that it may have on the wire, framing included. All of it has the time of
            a request's head.
        :returns: whether that was all.
        """
        self._send_held()  # the client may wait for it with the rest
        self._budget = most - self.buffered()
        self.begin_deadline()
        try:
            while body.read1():
                pass
        except Exception:
            return False
        finally:
            self._budget = None
            self.end_deadline()
        return True

    def begin_deadline(self) -> bool:
        """Until :meth:`end_deadline`, one deadline holds for all that is read: that of a request's head.

        :returns: whether there was none before.
        """
        if self._bounded:
            return False
        self._bounded = True
        self.gateway.heads.add(self)
        return True

    def end_deadline(self) -> None:
        self._bounded = False
        self.gateway.heads.remove(self, None)

    def _read(self, most: int) -> bytes:
        """What there is to read, when the hub has said that there is something."""
        while True:
            try:
                data: bytes = self._raw.recv(most)
                return data
            except BlockingIOError:
                self._wait(None)
                if self._expired:
                    return b""
            except OSError as error:
                raise client_disconnected(error) from None

    def _reader(self) -> Any:
        """The watcher that tells when there is something to read."""
        if self._readable is None:
            self._readable = self._hub.loop.io(self._raw.fileno(), _READABLE)
        return self._readable

    def _wait(self, deadlines: TimeoutQueue | None) -> None:
        """Wait until there is something to read, or until it is too late (``_expired``)."""
        readable = self._reader()
        if readable.active:
            raise ConcurrentObjectUseError("another greenlet reads the request's body already")
        self._waiting = getcurrent()
        self._expired = False
        if deadlines is not None:
            deadlines.add(self)
        readable.start(self._waiting.switch)
        try:
            self._hub.switch()
        finally:
            readable.stop()
            if deadlines is not None:
                deadlines.remove(self, None)
            self._waiting = self.greenlet

    def hijack(self, answer: bytes, status: str, fields: str) -> bytes:
        """Another protocol begins, for which the caller works on the socket.

        :param answer: the head that says so, and its parts for the hooks and the log.
        :returns: the bytes that the client has sent already.
        """
        response = self.response
        assert response is not None
        early: bytes = self.sock.early + self.buf[self.at :]
        self.sock.early = self.buf = b""
        self.at = 0
        self.sock.taken = True
        self.memo = None
        self.peer.forget()
        response.switch_protocols(status, fields)
        self.send(answer)
        return early

    def watch(self, gone: Any, argument: Any, body: bool = False) -> None:
        """Until :meth:`unwatch`, while the answer is made: tell when the client goes.

        :param gone: called in the hub, with ``argument``.
        :param body: whether somebody reads the request's body. Then only a reset counts: a client that
            sends no more may have sent all.
        """
        if body or self.at < len(self.buf) or self.sock.taken:
            self._look_again(gone, argument, body)
        else:
            self._reader().start(self._look, gone, argument)

    def unwatch(self) -> None:
        """The answer goes on; who sends it will hear when the client has gone."""
        if self._readable is not None and self._waiting is self.greenlet:
            self._readable.stop()
        if self._looking is not None:
            self._looking.close()
            self._looking = None

    def _look(self, gone: Any, argument: Any) -> None:
        """Called in the hub: the client has gone, or has sent the next request."""
        self._readable.stop()
        try:
            if self._hung_up(not isinstance(self.addr, tuple)):
                gone(argument)
            else:
                # what it has sent stays there, and hides what comes behind it
                self._look_again(gone, argument, False)
        except Exception as error:
            report_fault("a client that disconnects will not be noticed before it is sent to", error)

    def _look_again(self, gone: Any, argument: Any, body: bool) -> None:
        """Ask from time to time."""

        def look() -> None:
            try:
                if self._hung_up(body or not isinstance(self.addr, tuple)):
                    gone(argument)
            except Exception as error:
                report_fault("a client that disconnects will not be noticed before it is sent to", error)

        self._looking = self._hub.loop.timer(_LOOK, _LOOK)
        self._looking.start(look)

    def _hung_up(self, wholly: bool) -> bool:
        """Whether the client has gone.

        :param wholly: whether one that just sends no more is still there. On a UNIX socket the two can be
            told apart.
        """
        poll = _poll()
        poll.register(self._raw.fileno(), 0 if wholly else select.POLLRDHUP)
        return bool(poll.poll(0))

    # --- writing ---------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send all of it.

        :raises ClientDisconnected: when the client is gone.
        """
        try:
            sent = self._raw.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise client_disconnected(error) from None
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:])
        self.gateway.sent += len(data)

    def let_go(self) -> None:
        """The turn is over: send what is held. Called in any greenlet: it must not wait."""
        if not self.held:
            return
        # the greenlet waits until it can send the rest, or meets the error again
        with contextlib.suppress(OSError):
            self.held = self.held[self._raw.send(self.held) :]
        if self.held:
            self._stuck = True
            self._hub.loop.run_callback(self._wake)

    def forget(self) -> None:
        """It is not ours to send."""
        self.held = b""

    def _send_held(self) -> None:
        held, self.held, self._stuck = self.held, b"", False
        if held:
            self.gateway.sent -= len(held)  # it was counted when it was held
            self.send(held)

    def send_vector(self, head: bytes, body: bytes) -> None:
        """Send two pieces without copying the second."""
        try:
            sent = self._raw.sendmsg((head, body))
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise client_disconnected(error) from None
        if sent < len(head):
            self._send_rest(memoryview(head)[sent:])
            sent = len(head)
        self._send_rest(memoryview(body)[sent - len(head) :])
        self.gateway.sent += len(head) + len(body)

    def _send_rest(self, data: memoryview) -> None:
        while data:
            try:
                data = data[self._raw.send(data) :]
            except BlockingIOError:
                self.wait_writable()
            except OSError as error:
                raise client_disconnected(error) from None

    def send_file(self, file: int, offset: int, count: int) -> int:
        """Send a part of a file.

        :returns: how much there was of it.
        """
        done = 0
        while done < count:
            try:
                sent = os.sendfile(self._raw.fileno(), file, offset + done, min(count - done, _SENDFILE))
            except BlockingIOError:
                self.wait_writable()
                continue
            except OSError as error:
                if error.errno in _CLIENT_GONE:
                    raise client_disconnected(error) from None
                raise  # the file's
            if not sent:
                break
            done += sent
            self.gateway.sent += sent
            if done < count:
                gevent.sleep(0)
        return done

    def count_sent(self, count: int) -> None:
        """Somebody else has sent this to the client."""
        self.gateway.sent += count

    def raw_fileno(self) -> int:
        """The descriptor, for the kernel to send to."""
        return int(self._raw.fileno())

    def wait_writable(self) -> None:
        """Wait until the client takes more."""
        if self._writable is None:
            self._writable = self._hub.loop.io(self._raw.fileno(), _WRITABLE)
        if self._writable.active:
            raise ConcurrentObjectUseError("another greenlet sends the response's body already")
        self._sending = getcurrent()
        self._writable.start(self._sending.switch)
        try:
            self._hub.switch()
        finally:
            self._writable.stop()

    def send_continue(self) -> None:
        """The application reads, and the client waits for that (RFC 9110 section 10.1.1)."""
        if self.response is None or not self.response.headers_sent:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # --- the end ---------------------------------------------------------------------------------

    def begin_shutdown(self) -> None:
        """The worker leaves: a client that has not begun gets as long as an idle one."""
        if self.leaving is not None:
            self.leaving()
        elif self.sock.switched and self.gateway.closes_websockets_on_exit and _WEBSOCKET.search(self.head):
            gevent.spawn(self._end_websocket)
        elif self.fresh and self._parked():
            self._stop_waiting(self, None)
            self._stop_waiting = self.gateway.idle.remove
            self.gateway.idle.add(self)

    def _end_websocket(self) -> None:
        """The application speaks WebSocket over the connection: say goodbye for it (RFC 6455 section 7.1.1).

        The library that speaks it hears the client's answer, as if the client had ended it.
        """
        sock = self.sock
        with contextlib.suppress(OSError):
            sock.send_last(_CLOSE_1001)
            gevent.sleep(_GOODBYE)
            if sock.connection is self:
                sock.shutdown(socket.SHUT_RDWR)

    def give_up(self, taker: Any) -> None:
        """Give the connection away between two requests: at once when it waits for one.

        It is not given when it is to end after the request that it serves.

        :param taker: called with the socket, the peer's address and the bytes read ahead.
        """
        self._taker = taker
        if self._parked():
            self._given = True
            self.close()
        else:
            self._hub.loop.run_callback(self._wake)

    def waits(self) -> bool:
        """Whether it waits for a request, and is nothing else yet."""
        return self.leaving is None and self._parked()

    def _parked(self) -> bool:
        """Whether the hub alone waits for it. One that was just accepted waits for its greenlet instead."""
        return self.greenlet is None and self._readable is not None and bool(self._readable.active)

    def _wake(self) -> None:
        if self.silent:
            self.silent = 0
            self.greenlet.switch()

    def linger(self) -> None:
        """Let the client read its answer although it may still be sending (RFC 9112 section 9.6).

        A close now would make the kernel answer what comes with a reset, which can overtake the
        answer.
        """
        try:
            self._send_held()
            self._raw.shutdown(socket.SHUT_WR)
            end = monotonic() + _LINGER
            while monotonic() < end:
                self._wait(self.gateway.lingering)
                if self._expired or not self._raw.recv(1 << 20):
                    return
        except OSError:
            return

    def close(self) -> None:
        """The end, whatever it was doing."""
        try:
            self._end()
        except Exception as error:
            report_fault("a connection was closed in the middle of its end", error)
        self._acceptor.ended(self)
        if self._given:
            self._taker(self.sock, self.addr, self.buf)
        else:
            self.sock.release()

    def _end(self) -> None:
        """Stop everything that waits for this connection."""
        self._stop_waiting(self, None)
        if self.watched:
            self.gateway.idle_ticker.forget(self)
        if self.held:  # it was killed
            with contextlib.suppress(OSError):
                self._raw.send(self.held)
            self.forget()
        self.body.end()
        if self._readable is not None:
            if self._waiting is not self.greenlet:
                self._strand(self._readable, self._waiting)
            self._readable.close()
            self._readable = None
        if self._writable is not None:
            if self._writable.active:
                self._strand(self._writable, self._sending)
            self._writable.close()
        self.sock.error = self.sock.connection = self.leaving = self.response = self.greenlet = (
            self._waiting
        ) = self._sending = None

    def _strand(self, watcher: Any, greenlet: Any) -> None:
        """A greenlet of the application still uses the body or the response."""
        watcher.stop()
        self._hub.loop.run_callback(greenlet.throw, body_incomplete())
