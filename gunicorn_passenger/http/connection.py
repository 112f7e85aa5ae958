"""One client connection: reads requests, calls the application, closes the connection.

Process: a serving process, one greenlet for each busy connection.
Never: read what follows a refused request, or wait without a timeout for the client.

A connection has a greenlet while it is busy. When its client is idle for a moment, the greenlet ends and only
the hub waits: an idle connection costs its socket and little else. The exception is an application that keeps
something in a ``threading.local``, such as a connection to a database: gevent makes that local to the
greenlet, so the greenlet stays as long as the connection. :mod:`.connection_state` has the states.

The loop waits for readability *before* it reads: right after a response there is rarely data, so a
speculative read would cost a system call and an exception. And a client that always sends faster than it is
served would keep the greenlet running and starve the other connections, as happens to gunicorn's gevent
worker with its access log on.

On a UNIX socket, the hub receives from all busy connections that are readable in one event-loop iteration
before their requests are served, unless those are so quick that clients hardly fall asleep. To receive wakes
a client that waits until it can send more, as nginx always does; one that is awake is not woken again.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import gevent
from gevent.local import all_local_dicts_for_greenlet
from gunicorn.http.wsgi import FileWrapper
from gunicorn.workers.base_async import ALREADY_HANDLED

from gunicorn_passenger.errors import ClientDisconnected, client_disconnected
from gunicorn_passenger.http.body import EMPTY_BODY, incoming_body
from gunicorn_passenger.http.connection_life import ConnectionLife
from gunicorn_passenger.http.connection_state import ConnectionState
from gunicorn_passenger.http.failed_request import client_name, fail_request, send_error
from gunicorn_passenger.http.listener_context import Sticky
from gunicorn_passenger.http.request_head import ParsedHead, RequestFailed
from gunicorn_passenger.http.response import RESPONSE_SENT, Response
from gunicorn_passenger.http.transport import READ_SIZE

#: How many pipelined requests are served before other greenlets run.
_PIPELINED = 16

_ACTIVE, _IDLE = ConnectionState.ACTIVE, ConnectionState.IDLE


class Connection(ConnectionLife):
    """A client's connection and its current request.

    The class is long because its loop is: a call from the loop into another class would cost each request.
    """

    __slots__ = ()

    # --- the loop --------------------------------------------------------------------------------

    def serve(self, greenlet: gevent.Greenlet) -> None:
        """Serve the connection in this greenlet until it is idle or ends."""
        if self.state is ConnectionState.CLOSED:
            return  # before the greenlet has begun
        linger: bool | None = False
        try:
            if self.state is ConnectionState.FLUSHING:
                self.greenlet = self._waiting = greenlet
                self._send_pending()
            else:
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
            connection is parked, or ends when its last response is flushed.
        """
        self.greenlet = self._waiting = greenlet
        if self.state is not _ACTIVE:
            self.state = _ACTIVE
        listener = self.listener
        read = listener.reader.read
        sticky = listener.sticky
        recv = self._raw.recv
        readable: Any = None
        pipelined = 0
        data = self.buf
        if not data:
            try:
                data = recv(READ_SIZE)
            except BlockingIOError:
                # the server may have been closed since this connection was accepted
                self._park(listener.new if self.is_new and not listener.closing else listener.idle)
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
                # an application that takes over the connection reads from the socket, also these bytes
                self.sock.early, self.buf = self.buf, b""

            if not self._respond(environ, parsed, request):
                if self.pending and (parsed.persist or self._blocked):
                    self._send_pending()
                unread = self.body is not EMPTY_BODY and self._unread()
                if self.pending and not unread:
                    self.end_with_flush()
                    return None
                return unread or (parsed.persist and self.has_input())

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
                # most connections of a server behind nginx never come here
                readable, wait = self._reader(), self._hub.switch
                switch = greenlet.switch
                idle_ticker = listener.idle_ticker
            keeps_greenlet = False
            while True:
                # where a busy connection spends its life
                self.idle_since = idle_ticker.tick
                self.state = _IDLE
                if keeps_greenlet:
                    listener.idle.add(self)
                elif not self.tracked:
                    idle_ticker.track(self)
                readable.start(self._arrive if listener.receives_ahead() else switch)
                try:
                    wait()
                finally:
                    readable.stop()
                    if keeps_greenlet:
                        listener.idle.remove(self, None)
                if self.pending:
                    self.state = _ACTIVE
                    self._send_pending()
                data = self.buf
                if data:
                    self._expired = False
                    break
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

    def _respond(self, environ: dict[str, Any], parsed: ParsedHead, request: Any) -> bool:
        """Call the application and send its response.

        :param parsed: what was found in the request's headers.
        :param request: gunicorn's request object, where there is one.
        :returns: whether the connection can serve another request.
        """
        listener = self.listener
        worker = listener.worker
        worker.nr += 1
        listener.requests += 1
        if worker.nr >= worker.max_requests:
            listener.on_max_requests()
        response = self.response = Response(self, environ, request)
        if not (parsed.persist and listener.keepalive):
            response.must_close = True
        environ["gunicorn.socket"] = self.sock
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
                coalescer.record_duration(perf_counter() - began, parsed.template is not None)
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
                "The headers of a request were not complete after %g s (%s): the client gets 408",
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
        over = not body.too_much_unread and body.drain()
        body.detach()
        return not over

    def request_of(self, request: Any) -> Callable[[], Any]:
        """A function that returns gunicorn's request object, and creates it when it is missing."""
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


def _has_locals(greenlet: Any) -> bool:
    """Whether the application has left something in a ``threading.local``."""
    return any(values for _, values in all_local_dicts_for_greenlet(greenlet))
