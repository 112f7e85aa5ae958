"""The straight way: a request about which nothing is left to decide, carried without asking anew.

Runs in: a worker, in the request's greenlet. Must never: decide anything. What is not as it was for the
requests before goes through :class:`~.forward.ForwardedRequest`, from the start or from where it has got to.

A client mostly sends the same fields again, and one passage has found out what becomes of them: which target,
which fields it is sent, from which pool its connection comes. When that depends on nothing else, it is noted
here (:class:`ForwardPlan`), and the next such request takes a kept connection, is sent, and its answer, where
it has come as a whole, is sent on. That is the same exchange on the same connections; whatever happens
otherwise (no connection is free, the answer comes in parts, has a framing of its own, or does not come) is
the passage's to deal with, which takes over the connection with what has come in.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from gunicorn_passenger.errors import ProxyError
from gunicorn_passenger.http.body import EMPTY_BODY
from gunicorn_passenger.http.response import RESPONSE_SENT
from gunicorn_passenger.proxy.agent import Pool
from gunicorn_passenger.proxy.copy_response import serialize_headers
from gunicorn_passenger.proxy.downstream import is_sole_app
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import RequestHeaders, target_path
from gunicorn_passenger.proxy.response_head import ResponseHead, parse_response_head
from gunicorn_passenger.proxy.target import Target
from gunicorn_passenger.proxy.upstream_io import SOON
from gunicorn_passenger.proxy.wire import status_line

#: Answers that have no body, whatever they say (RFC 9110 section 6.4.1), or are none.
_SPECIAL = (101, 204, 304)


class ForwardPlan:
    """What becomes of the requests with some fields: it is kept with those."""

    __slots__ = ("known", "options", "pool", "straight", "target", "text")

    def __init__(self, options: Options, target: Target, text: bytes, pool: Pool) -> None:
        """
        :param text: the fields as the target is sent them, with the empty line.
        """
        self.options = options
        self.target = target
        self.text = text
        self.pool = pool
        #: whether all of it holds for every GET without a body that has the same fields, and which those
        #: are: the reader's environ of them, which it keeps as long as they come again
        self.straight = False
        self.known: dict[str, Any] | None = None

    def holds(self, options: Options, target: Target) -> bool:
        return self.options is options and self.target is target and not self.pool.gone


def is_cacheable(options: Options, target: Target, fields: RequestHeaders, pool: Pool) -> bool:
    """Whether requests and answers go through as they are, but for the fields of each connection."""
    return (
        pool.runtime.concurrent
        and not target.tls
        and options.plain_response
        and fields.valid
        and not (
            options.via
            or options.self_handle_response
            or options.follow_redirects
            or options.sticky
            or options.buffer is not None
            or options.forward is not None
            or options.to_proxy
            or fields.upgrade
            or fields.expect
        )
        and target_path(options, target, "/x?y", "") == "/x?y"
    )


def carry(proxy: Any, connection: Any, environ: dict[str, Any], start_response: Any) -> Any:
    """Carry a request if it can go the straight way.

    :param proxy: the :class:`~.handler.Proxy`.
    :param connection: the client's :class:`~gunicorn_passenger.http.connection.Connection`.
    :returns: nothing when nothing has been done, else as a WSGI application.
    """
    fields: RequestHeaders = connection.memo[3]
    way = fields.kept
    response = connection.response
    path: str = environ["RAW_URI"]
    if (
        way is None
        or way.known is None
        or way.known is not connection.peer.known
        or not is_sole_app(connection.gateway.app, proxy)
        or response.req is not None
        or response.method != "GET"
        or environ["SERVER_PROTOCOL"] != "HTTP/1.1"
        or connection.body is not EMPTY_BODY
        or not path.isprintable()
        or proxy.events.any
        or way.pool.gone
    ):
        return None
    pool = way.pool
    sent = b"GET %b HTTP/1.1\r\n%b" % (path.encode(), way.text)
    link = pool.kept() if len(sent) <= SOON else None
    if link is None:
        return None
    stream = link.stream
    if not stream.silent():
        # it may have been kept in this turn of the loop: then nobody was there yet to hear what came behind
        # the answer
        pool.drop(link)
        return None
    began = monotonic()
    came = b""
    try:
        asked = stream.ask(sent, way.options.proxy_timeout, connection)
        if asked is None:
            # something came before the request was sent: nobody asked for it
            pool.drop(link)
            return None
        came = asked
        head, end = _head_of(pool, came, way.options.preserve_header_key_case)
    except ProxyError:
        head = None  # it is bad: who reads it again says so
    except BaseException as error:
        return proxy.resume(environ, start_response, way, fields, link, sent, came, error, began)
    if head is not None and not proxy.events.any:
        wire = wire_of(head) if head.wire is None else head.wire
        if wire and head.length == len(came) - end:
            pool.keep(link)
            response.relay_whole(head, wire, came[end:])
            return RESPONSE_SENT
    return proxy.resume(environ, start_response, way, fields, link, sent, came, None, began)


def _head_of(pool: Pool, came: bytes, keep_case: bool) -> tuple[ResponseHead | None, int]:
    """The head of an answer, if all of it has come, and where its body begins."""
    memo = pool.memo
    if memo is not None and came.startswith(memo[0]) and memo[1] is keep_case:
        # mostly that of the answer before it
        return memo[2], len(memo[0])
    end = came.find(b"\r\n\r\n") + 4
    return (parse_response_head(pool, came[:end], keep_case) if end > 3 else None), end


def wire_of(head: ResponseHead) -> bytes:
    """The head of an answer as most clients are sent it, made once.

    :returns: nothing when its body is not simply so many bytes as it says.
    """
    head.wire = b""
    if head.length is not None and head.dated and not head.close and head.status not in _SPECIAL:
        head.lines = head.lines or serialize_headers(head.fields, head.status)
        line = status_line(head.status, head.reason)
        head.wire = line + head.lines + b"Connection: keep-alive\r\n\r\n"
    return head.wire
