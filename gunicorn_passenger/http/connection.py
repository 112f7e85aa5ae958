"""One client connection: reads requests, calls the application, closes the connection.

Process: a worker, one greenlet for each busy connection.
Never: read what follows a refused request, or wait without a timeout for the client.

A connection has a greenlet while it is busy. When its client is idle for a moment, the greenlet ends and only
the hub waits: an idle connection costs its socket and little else. The exception is an application that keeps
something in a ``threading.local``, such as a connection to a database: gevent makes that local to the
greenlet, so the greenlet stays as long as the connection. :mod:`.connection_state` has the states.

The loop waits for readability *before* it reads: right after a response there is rarely data, so a
speculative read would cost a system call and an exception. And a client that always sends faster than it is
served would keep the greenlet running and starve the other connections, as happens to gunicorn's gevent
worker with its access log on.
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
from gevent.local import all_local_dicts_for_greenlet
from gunicorn.http.wsgi import FileWrapper
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import ClientDisconnected, client_disconnected
from gunicorn_passenger.http.body import EMPTY_BODY, RequestBody, incoming_body
from gunicorn_passenger.http.connection_state import ConnectionState, set_checked
from gunicorn_passenger.http.disconnect import DisconnectWatch
from gunicorn_passenger.http.failed_request import client_name, fail_request, send_error
from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.http.listener_context import ListenerContext, Sticky
from gunicorn_passenger.http.request_head import NO_HEAD, RequestFailed
from gunicorn_passenger.http.response import RESPONSE_SENT, Response
from gunicorn_passenger.http.timeouts import TimeoutQueue
from gunicorn_passenger.http.transport import READ_SIZE, Transport

#: How many pipelined requests are served before other greenlets run.
_PIPELINED = 16

_WEBSOCKET = re.compile(rb"\r\nupgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)

_ACTIVE, _IDLE, _PARKED = ConnectionState.ACTIVE, ConnectionState.IDLE, ConnectionState.PARKED


class Connection(Transport):
    """A client's connection and its current request.

    The class is long because its loop is: a call from the loop into another class would cost each request.
    """

    __slots__ = (
        "_acceptor",
        "_disconnect",
        "_stop_waiting",
        "addr",
        "body",
        "context",
        "extra_headers",
        "head",
        "idle_since",
        "is_new",
        "on_drain",
        "parsed",
        "response",
        "state",
        "tracked",
        "was_passed",
    )

    if sys.flags.dev_mode:
        __setattr__ = set_checked

    def __init__(self, acceptor: Any, listener: ListenerContext, sock: Any, addr: Any) -> None:
        """
        :param acceptor: the :class:`~.acceptor.Acceptor`, which is told when the connection ends or is idle.
        :param sock: a :class:`~.client_socket.ClientSocket`, owned from now on.
        :param addr: what ``accept()`` gave.
        """
        Transport.__init__(self, listener, sock)
        self.state = ConnectionState.NEW
        self._acceptor = acceptor
        sock.connection = self
        # A client of a UNIX socket can bind its own end to a name of any bytes, which is not an address.
        self.addr = addr if addr.__class__ is tuple else ""
        self.context = listener.new_context(self.addr, sock)
        self.head = b""
        self.body: RequestBody = EMPTY_BODY
        self.response: Response | None = None
        #: removes the connection from the timeout queue in which it waits for a request
        self._stop_waiting: Any = listener.new.remove
        #: created when it is first needed
        self._disconnect: DisconnectWatch | None = None
        #: whether it has had no request yet
        self.is_new = True
        #: for the :class:`~.timeouts.IdleTicker`: the tick since which it is idle, and whether it is tracked
        self.idle_since = 0
        self.tracked = False
        #: the headers of the last request
        self.parsed = NO_HEAD
        #: called when the worker drains, by the code that has upgraded the connection
        self.on_drain: Any = None
        #: whether a sibling has passed it here with a request, which is not passed on again
        self.was_passed = False
        #: header lines that the listener adds to the response
        self.extra_headers = b""

    # --- between requests ------------------------------------------------------------------------

    def start(self) -> None:
        """Serve the connection in a greenlet."""
        self.listener.greenlets.serve(self)

    def _ready(self) -> None:
        """Called in the hub when a parked connection is readable."""
        self._readable.stop()
        self._stop_waiting(self, None)
        self.state = _ACTIVE
        self.listener.greenlets.serve(self)

    def _park(self, queue: TimeoutQueue) -> None:
        """Wait for a request without a greenlet.

        :param queue: closes the connection, or calls :meth:`wait_longer`, after its time.
        """
        self.state = _PARKED
        self.greenlet = self._waiting = None
        self._expired = False
        self.head = b""
        self.parsed = NO_HEAD
        self._stop_waiting = queue.remove
        queue.add(self)
        self._reader().start(self._ready)
        if queue is not self.listener.new:
            self._acceptor.on_connection_idle()

    def wait_longer(self) -> None:
        """Called in the hub: a new connection has sent nothing for the keep-alive time."""
        silent = self.listener.silent
        self._stop_waiting = silent.remove
        silent.add(self)
        self._acceptor.on_connection_idle()

    def expire(self) -> None:
        """Called in the hub when a timeout has passed, or when an idle connection has to make room."""
        if self.state is _PARKED:
            self.close()
        else:
            Transport.expire(self)

    # --- the loop --------------------------------------------------------------------------------

    def serve(self, greenlet: gevent.Greenlet) -> None:
        """Serve the connection in this greenlet until it is idle or ends."""
        if self.state is ConnectionState.CLOSED:
            return  # before the greenlet has begun
        linger: bool | None = False
        try:
            linger = self.serve_requests(greenlet)
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

    def serve_requests(self, greenlet: Any) -> bool | None:  # noqa: PLR0915 - the hot loop is one, in one place
        """Serve requests until the connection is idle or ends.

        :param greenlet: the current greenlet.
        :returns: whether the client may still be sending when the connection ends; ``None`` when the
            connection is parked.
        """
        self.greenlet = self._waiting = greenlet
        if self.state is not _ACTIVE:
            self.state = _ACTIVE
        listener = self.listener
        read = listener.reader.read
        sticky = listener.sticky
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
                self._park(listener.new if self.is_new else listener.idle)
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
            if sticky is not None and self._pass_on(sticky, data, end):
                return False
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
            except RequestFailed as error:
                listener.refuse(error.request, self.sock, self.addr, error.cause)
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
                # an application that takes over the connection reads from the socket: also what came with
                # the request
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
            keeps_greenlet = False
            while True:
                # where a busy connection spends its life
                self.idle_since = idle_ticker.tick
                self.state = _IDLE
                if keeps_greenlet:
                    listener.idle.add(self)
                elif not self.tracked:
                    idle_ticker.track(self)
                readable.start(switch)
                try:
                    wait()
                finally:
                    readable.stop()
                    if keeps_greenlet:
                        listener.idle.remove(self, None)
                if self.pending:
                    self.state = _ACTIVE
                    self._send_pending()
                if self._expired:
                    if listener.closing or not (keeps_greenlet or _has_locals(greenlet)):
                        self._park(listener.idle)
                        return None
                    if keeps_greenlet:
                        return False
                    self._expired, keeps_greenlet = False, True
                    self._acceptor.on_connection_idle()
                    continue
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
        """Call the application and send its response.

        :returns: whether the connection can serve another request.
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
                    response.write_all(result)
                elif result is RESPONSE_SENT:
                    pass  # the proxy has sent it
                elif isinstance(result, FileWrapper):
                    response.send_file(result, listener.sendfile)
                elif result is ALREADY_HANDLED:
                    return False
                else:
                    for chunk in result:
                        response.write(chunk)
                    response.close()
            finally:
                if listener.logs and response.headers_sent:
                    seconds = perf_counter() - began
                    listener.access.write(response, self.request_of(request), environ, seconds, self.head)
                if result.__class__ is not list and hasattr(result, "close"):
                    result.close()
        except StopIteration as error:
            # Flask-Sock raises it when it has taken over the connection and is done with it
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

    # --- rare cases ------------------------------------------------------------------------------

    def _rest_of_head(self, data: bytes) -> bytes:
        """Wait for the rest of a header section, within one timeout for the whole of it.

        :returns: empty when the client has disconnected or was sent an error.
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
                "The headers of a request were not complete after %g s (%s)",
                listener.heads.seconds,
                client_name(self.addr),
            )
            send_error(self.sock, 408, "Request Timeout", "The request took too long.")
        except Exception as error:
            listener.refuse(None, self.sock, self.addr, error)
            self._linger()
        return b""

    def _pass_on(self, sticky: Sticky, data: bytes, end: int) -> bool:
        """Let the sibling that a request belongs to serve the connection from now on.

        :param data: what was read, from the request on.
        :param end: the length of its header section.
        :returns: whether the sibling does; if not, the request is served here.
        """
        was_passed, self.was_passed = self.was_passed, False
        give = sticky(self, data[:end])
        if give is None or was_passed:
            return False
        if self.pending:
            self._send_pending()
        return give(self._raw.fileno(), data)

    def _next_begins(self) -> bool:
        """Whether the next request can begin: the body of this one is read, or can be discarded."""
        body = self.body
        if not body.drain():
            return False
        body.detach()
        return True

    def _unread(self) -> bool:
        """Whether the client may still be sending when the connection ends."""
        body = self.body
        over = body is EMPTY_BODY or (not body.too_much_unread and body.drain())
        body.detach()
        return not over

    def request_of(self, request: Any) -> Callable[[], Any]:
        """A function that returns gunicorn's request object, and creates it where there is none."""
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
        """Make the close of the connection a reset: then the client sees that the response is incomplete."""
        if isinstance(self.addr, tuple):
            # the rest of the body is not discarded, because that would close the connection cleanly first
            self.body.detach()
            self.body = EMPTY_BODY
            with contextlib.suppress(OSError):
                self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def abort(self) -> None:
        response = self.response
        self.reset()
        self.close()
        if response is not None:
            # the application continues, and its request ends as others do
            response.must_close = True
            self.response = response

    # --- what the proxy calls --------------------------------------------------------------------

    def hijack(self, head: bytes, status: str, headers: str) -> bytes:
        """Switch to another protocol. The caller then reads and writes the socket.

        :param head: the response that announces the protocol.
        :param status: its status, for the hooks and the log.
        :param headers: its header lines, likewise.
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
        response.switch_protocols(status, headers)
        self.send(head)
        return early

    def watch(self, gone: Any, argument: Any, body: bool = False) -> None:
        """Until :meth:`unwatch`, while the response is made: watch whether the client disconnects.

        :param gone: called in the hub, with ``argument``, when it does.
        :param body: whether a greenlet reads the request's body. Then only a reset counts: a client that
            sends no more may have sent all.
        """
        if self._disconnect is None:
            tcp = isinstance(self.addr, tuple)
            self._disconnect = DisconnectWatch(self._hub.loop, self._raw.fileno(), self._reader(), tcp)
        self._disconnect.start(gone, argument, self.at < len(self.buf) or self.sock.taken, body)

    def unwatch(self) -> None:
        """Stop watching: a client that disconnects is noticed when the response is sent."""
        if self._disconnect is not None:
            self._disconnect.cancel()

    def send_continue(self) -> None:
        """Ask the client for the body that the application reads (RFC 9110 section 10.1.1)."""
        if self.response is None or not self.response.headers_sent:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # --- the end ---------------------------------------------------------------------------------

    def begin_shutdown(self) -> None:
        """The worker drains. A client that has sent nothing gets as much time as an idle one."""
        if self.on_drain is not None:
            self.on_drain()
        elif self.sock.switched and self.listener.closes_websockets_on_exit and _WEBSOCKET.search(self.head):
            gevent.spawn(self.sock.close_websocket)
        elif self.is_new and self.state is _PARKED:
            self._stop_waiting(self, None)
            self._stop_waiting = self.listener.idle.remove
            self.listener.idle.add(self)
        elif self.state is _IDLE and not self.tracked:
            # it has kept its greenlet; only a parked connection can migrate
            self._expired = True
            self._hub.loop.run_callback(self._wake)

    def is_idle(self) -> bool:
        """Whether only the hub waits for the next request. A connection is not idle before its first wait."""
        return self.state is _PARKED

    def detach(self) -> tuple[Any, Any]:
        """Stop serving an idle connection.

        :returns: its socket and its client's address. The caller owns the socket.
        """
        assert self.is_idle()
        self._stop()
        return self.sock, self.addr

    def _wake(self) -> None:
        if self.state is _IDLE:
            self.greenlet.switch()

    def close(self) -> None:
        """Close the connection, whatever it is doing."""
        if self.state is ConnectionState.CLOSED:
            return
        self._stop()
        self.sock.release()

    def _linger(self) -> None:
        if self.state is ConnectionState.CLOSED:
            return  # the response was interrupted
        self.state = ConnectionState.LINGERING
        self.lingering_close()

    def _stop(self) -> None:
        try:
            self._end()
        except Exception as error:
            report_fault("a connection was closed without its clean-up", error)
        self._acceptor.on_connection_closed(self)

    def leave_to_parent(self) -> None:
        if self._disconnect is not None:
            self._disconnect.cancel()
        Transport.leave_to_parent(self)

    def _end(self) -> None:
        """Stop everything that waits for this connection."""
        self.state = ConnectionState.CLOSED
        self._stop_waiting(self, None)
        if self.tracked:
            self.listener.idle_ticker.untrack(self)
        if self._disconnect is not None:
            self._disconnect.cancel()
        self.body.detach()
        self._release()
        self.on_drain = self.response = None


def _has_locals(greenlet: Any) -> bool:
    """Whether the application has left something in a ``threading.local``."""
    return any(values for _, values in all_local_dicts_for_greenlet(greenlet))
