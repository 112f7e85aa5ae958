"""One client connection: reads requests, calls the application, ends the connection.

Process: a worker, one greenlet per busy connection.
Never: read what follows a refused request, or wait without a deadline for a client that owes something.

A connection has a greenlet while it is busy. When its client pauses for a moment, the greenlet ends and the
hub alone waits: an idle connection costs its socket and little else. :mod:`.connection_state` has the states.

The loop waits for readability *before* it reads: right after a response there is rarely data, so a read would
cost a system call and an exception. And a client that always sends faster than it is served would keep the
greenlet running and starve the other connections, as happens to gunicorn's gevent worker with its access log
on.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import gevent
from gevent import getcurrent
from gunicorn.http.wsgi import FileWrapper
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import ClientDisconnected, client_disconnected
from gunicorn_passenger.http.body import EMPTY_BODY, RequestBody, incoming_body
from gunicorn_passenger.http.connection_state import ConnectionState, set_checked
from gunicorn_passenger.http.disconnect import DisconnectWatch
from gunicorn_passenger.http.failed_request import client_name, fail_request, send_error
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.http.listener_context import HookFailed, ListenerContext
from gunicorn_passenger.http.request_head import NO_HEAD
from gunicorn_passenger.http.response import RESPONSE_SENT, Response
from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.http.transport import READ_SIZE, Transport

#: Requests that came in one read, after which other greenlets get their turn.
_PIPELINED = 16

_WEBSOCKET = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

_ACTIVE, _IDLE, _PARKED = ConnectionState.ACTIVE, ConnectionState.IDLE, ConnectionState.PARKED


class _ConnectionGreenlet(gevent.Greenlet):
    """Serves one connection. gevent would note the stack that spawned it, which is always the same."""

    spawning_stack_limit = 0


class Connection(Transport):
    """A client's connection and its present request.

    The class is long because its loop is: each call that the loop made into another class would be made for
    each request.
    """

    __slots__ = (
        "_acceptor",
        "_disconnect",
        "_stop_waiting",
        "addr",
        "body",
        "context",
        "head",
        "idle_since",
        "is_new",
        "leaving",
        "parsed",
        "response",
        "state",
        "tracked",
    )

    if sys.flags.dev_mode:
        __setattr__ = set_checked

    def __init__(self, acceptor: Any, listener: ListenerContext, sock: Any, addr: Any) -> None:
        """
        :param acceptor: is told of the end.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        :param addr: what ``accept()`` gave.
        """
        Transport.__init__(self, listener, sock)
        self.state = ConnectionState.NEW
        self._acceptor = acceptor
        sock.connection = self
        # A client of a UNIX socket can bind its own end to a name of any bytes. That is not an address, so
        # it is dropped here.
        self.addr = addr if addr.__class__ is tuple else ""
        self.context = listener.new_context(self.addr, sock)
        self.head = b""
        self.body: RequestBody = EMPTY_BODY
        self.response: Response | None = None
        #: takes the connection out of the timeout queue in which it waits for a request
        self._stop_waiting: Any = listener.heads.remove
        #: made when it is first needed
        self._disconnect: DisconnectWatch | None = None
        #: whether it has had no request
        self.is_new = True
        #: for the :class:`~.timeouts.IdleTicker`: the tick since which it is idle, and whether it is tracked
        self.idle_since = 0
        self.tracked = False
        #: the headers of the last request
        self.parsed = NO_HEAD
        #: called when the worker drains, by the code that has upgraded the connection
        self.leaving: Any = None

    # --- between requests ------------------------------------------------------------------------

    def begin(self) -> None:
        """Serve it, in a greenlet of its own."""
        _ConnectionGreenlet(self._run).start()

    def _ready(self) -> None:
        """Called in the hub when there is something to read."""
        self._readable.stop()
        self._stop_waiting(self, None)
        self.state = _ACTIVE
        try:
            _ConnectionGreenlet(self._run).switch()
        except Exception as error:
            report_fault("an idle connection was closed", error)
            self.close()

    def _park(self, deadlines: TimeoutQueue) -> None:
        """Wait for a request without a greenlet."""
        self.state = _PARKED
        self.greenlet = self._waiting = None
        self._expired = False
        self.head = b""
        self.parsed = NO_HEAD
        self._stop_waiting = deadlines.remove
        deadlines.add(self)
        self._reader().start(self._ready)

    def expire(self) -> None:
        """Called in the hub when a deadline has passed."""
        if self.state is _PARKED:
            self.close()
        else:
            Transport.expire(self)

    # --- the loop --------------------------------------------------------------------------------

    def _run(self) -> None:
        """A greenlet's life: while the connection is busy."""
        linger: bool | None = False
        try:
            linger = self.serve(getcurrent())
            if linger:
                self._linger()
        except ClientDisconnected as error:
            self.listener.log.debug("%s", error)
        except gevent.GreenletExit:
            pass
        except BaseException:
            self.listener.log.exception("Error on a connection")
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
        if self.state is not _ACTIVE:
            self.state = _ACTIVE
        listener = self.listener
        read = listener.reader.read
        idle_ticker = listener.idle_ticker
        recv = self._raw.recv
        readable = self._readable
        wait = self._hub.switch
        switch = greenlet.switch
        pipelined = 0
        data = self.buf
        if not data:
            try:
                data = recv(READ_SIZE)
            except BlockingIOError:
                self._park(listener.heads if self.is_new else listener.idle)
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
            self.is_new = False
            self.response = None
            try:
                environ, parsed, request = read(head, self.context, self.parsed)
            except HookFailed as error:
                listener.refuse(error.request, self.sock, self.addr, error)
                self._after(error.request, {})
                return True
            except Exception as error:
                listener.refuse(None, self.sock, self.addr, error)
                return True
            self.parsed = parsed
            length = parsed.length
            if length:
                self.body = incoming_body(self, environ, length, self.request_of(request))
            else:
                self.body = EMPTY_BODY
            upgrade = self.buf and not length and "HTTP_UPGRADE" in environ
            if upgrade:
                # who takes the connection reads from the socket: what came with the request is there, too
                self.sock.early, self.buf = self.buf, b""

            if not self._respond(environ, parsed.persist, request):
                self._send_pending()
                return self._unread() or (parsed.persist and self.has_input())

            if length and not self._next_begins():
                return True
            if upgrade:
                self.buf, self.sock.early = self.sock.early, b""
            data = self.buf[self.at :] if self.at else self.buf
            self.buf, self.at = data, 0
            if self.pending and (data or self._blocked):
                self._send_pending()
            if data:
                pipelined += 1
                if pipelined % _PIPELINED == 0:
                    gevent.sleep(0)
                continue
            if readable is None:
                readable = self._reader()
            while True:
                # where a busy connection spends its life
                self.idle_since = idle_ticker.tick
                self.state = _IDLE
                if not self.tracked:
                    idle_ticker.track(self)
                readable.start(switch)
                try:
                    wait()
                finally:
                    readable.stop()
                if self.pending:
                    self.state = _ACTIVE
                    self._send_pending()
                if self._expired:
                    self._park(listener.idle)
                    return None
                try:
                    data = recv(READ_SIZE)
                except BlockingIOError:
                    continue  # woken without data
                except OSError as error:
                    raise client_disconnected(error) from None
                self.state = _ACTIVE
                break
        return False

    def _respond(self, environ: dict[str, Any], persist: bool, request: Any) -> bool:
        """Call the application and send what it says.

        :returns: whether the connection can go on.
        """
        listener = self.listener
        worker = listener.worker
        worker.nr += 1
        listener.requests += 1
        if worker.nr >= worker.max_requests:
            listener.on_max_requests()
        response = self.response = Response(self, environ, request)
        if not (persist and listener.keepalive):
            response.must_close = True
        environ["wsgi.input"] = self.body
        environ["wsgi.early_hints"] = response.early_hints
        coalescer = listener.coalescer
        began = coalescer.begin_request(worker.nr, listener.logs, listener.is_proxy)
        result: Any = None
        try:
            try:
                result = listener.app(environ, response.start_response)
                if result.__class__ is list or result.__class__ is tuple:
                    response.send_all(result)
                elif result is RESPONSE_SENT:
                    pass  # the proxy has sent it
                elif isinstance(result, FileWrapper):
                    response.send_file(result, listener.sendfile)
                elif result is ALREADY_HANDLED:
                    return False
                else:
                    for piece in result:
                        response.write(piece)
                    response.close()
            finally:
                if listener.logs and response.headers_sent:
                    took = perf_counter() - began
                    listener.access.write(response, self.request_of(request), environ, took, self.head)
                if result.__class__ is not list and hasattr(result, "close"):
                    result.close()
        except StopIteration as error:
            # Flask-Sock's way to say that it has taken the connection and is done with it
            if not self.sock.taken and not response.headers_sent:
                fail_request(self, error, environ, request)
            return False
        except gevent.GreenletExit:
            raise
        except BaseException as error:
            fail_request(self, error, environ, request)
            return False
        finally:
            if listener.after is not None:
                self._after(request, environ)
            if began and result is not RESPONSE_SENT:
                coalescer.record_duration(perf_counter() - began)
        return not response.must_close

    # --- what is rare ----------------------------------------------------------------------------

    def _rest_of_head(self, data: bytes) -> bytes:
        """Wait for the rest of a request's head, until one deadline for the whole of it.

        :returns: nothing when the client has disconnected or was sent an error.
        """
        listener = self.listener
        context = self.context
        try:
            return self.read_until_empty_line(
                data, lambda came, seen: listener.reader.check_partial(came, seen, context)
            )
        except ClientDisconnected as error:
            listener.log.debug("%s", error)
        except TimeoutError:
            listener.log.info(
                "A request's head was not complete after %g s (%s)",
                listener.heads.seconds,
                client_name(self.addr),
            )
            send_error(self.sock, 408, "Request Timeout", "The request took too long.")
        except Exception as error:
            listener.refuse(None, self.sock, self.addr, error)
            self._linger()
        return b""

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

    def request_of(self, request: Any) -> Callable[[], Any]:
        """Gives gunicorn's request object, which is made where it does not exist."""
        reader, head, context = self.listener.reader, self.head, self.context
        return lambda: reader.request(head, context) if request is None else request

    def _after(self, request: Any, environ: dict[str, Any]) -> None:
        listener = self.listener
        if listener.after is None:
            return
        try:
            listener.after(listener.worker, request, environ, self.response)
        except Exception:
            listener.log.exception("Exception in post_request hook")

    def reset(self) -> None:
        """Let the end of the connection be a reset: the client sees that the response is not complete."""
        if isinstance(self.addr, tuple):
            # and do not wait for the rest of the body, which would end the connection cleanly first
            self.body.end()
            self.body = EMPTY_BODY
            with contextlib.suppress(OSError):
                self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # --- what the proxy calls --------------------------------------------------------------------

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
        self.state = ConnectionState.UPGRADED
        self.parsed = NO_HEAD
        response.switch_protocols(status, fields)
        self.send(answer)
        return early

    def watch(self, gone: Any, argument: Any, body: bool = False) -> None:
        """Until :meth:`unwatch`, while the response is made: tell when the client disconnects.

        :param gone: called in the hub, with ``argument``.
        :param body: whether the request's body is being read. Then only a reset counts: a client that sends
            no more may have sent all.
        """
        if self._disconnect is None:
            tcp = isinstance(self.addr, tuple)
            self._disconnect = DisconnectWatch(self._hub.loop, self._raw.fileno(), self._reader(), tcp)
        self._disconnect.start(gone, argument, self.at < len(self.buf) or self.sock.taken, body)

    def unwatch(self) -> None:
        """The response goes on: sending it tells when the client has disconnected."""
        if self._disconnect is not None:
            self._disconnect.cancel()

    def send_continue(self) -> None:
        """The application reads, and the client waits for that (RFC 9110 section 10.1.1)."""
        if self.response is None or not self.response.headers_sent:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # --- the end ---------------------------------------------------------------------------------

    def begin_shutdown(self) -> None:
        """The worker drains: a client that has not sent a request gets as long as an idle one."""
        if self.leaving is not None:
            self.leaving()
        elif self.sock.switched and self.listener.closes_websockets_on_exit and _WEBSOCKET.search(self.head):
            gevent.spawn(self.sock.close_websocket)
        elif self.is_new and self.state is _PARKED:
            self._stop_waiting(self, None)
            self._stop_waiting = self.listener.idle.remove
            self.listener.idle.add(self)

    def is_idle(self) -> bool:
        """Whether the hub alone waits for the connection's next request. A new connection is not idle yet."""
        return self.state is _PARKED

    def detach(self) -> tuple[Any, Any]:
        """Stop serving an idle connection.

        :returns: its socket and its client's address, which are the caller's from now on.
        """
        assert self.is_idle()
        self._stop()
        return self.sock, self.addr

    def _wake(self) -> None:
        if self.state is _IDLE:
            self.greenlet.switch()

    def close(self) -> None:
        """End the connection, whatever it is doing."""
        if self.state is ConnectionState.CLOSED:
            return
        self._stop()
        self.sock.release()

    def _linger(self) -> None:
        self.state = ConnectionState.LINGERING
        self.lingering_close()

    def _stop(self) -> None:
        try:
            self._end()
        except Exception as error:
            report_fault("a connection was closed in the middle of its end", error)
        self._acceptor.on_connection_closed(self)

    def _end(self) -> None:
        """Stop everything that waits for this connection."""
        self.state = ConnectionState.CLOSED
        self._stop_waiting(self, None)
        if self.tracked:
            self.listener.idle_ticker.untrack(self)
        if self._disconnect is not None:
            self._disconnect.cancel()
        self.body.end()
        self._release()
        self.leaving = self.response = None
