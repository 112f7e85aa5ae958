"""What an upstream is sent of a request: the headers, their framing, and the body.

Process: any process in which the proxy is mounted. It reads at most the length of a file.
Never: let a handler frame the message.
"""

from __future__ import annotations

from typing import Any

from gunicorn_passenger.http.chunked import CHUNKED
from gunicorn_passenger.http.grammar import TOKEN
from gunicorn_passenger.proxy import request_headers as rules
from gunicorn_passenger.proxy import sticky, wire
from gunicorn_passenger.proxy.events import HandlerFailed, UpstreamRequest, checked
from gunicorn_passenger.proxy.forwarded_request import ForwardedRequest
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_body import NO_BODY_SENDER, RequestBodySender
from gunicorn_passenger.proxy.request_headers import HeaderList
from gunicorn_passenger.proxy.target import Target


def expects_continue(request: ForwardedRequest) -> bool:
    """Whether the client waits for "100 Continue" before it sends the body (RFC 9110 section 10.1.1).

    A body of the program's own is there already.
    """
    return (
        request.headers.expect
        and request.sender.length != 0
        and not request.sender.replaced
        and request.environ.get("SERVER_PROTOCOL") != "HTTP/1.0"
    )


def upstream_headers(request: ForwardedRequest, target: Target, foreign: bool) -> HeaderList:
    options = request.options
    lines = rules.upstream_headers(request.headers, options, target, request.forwarded_info, foreign)
    return sticky.without_cookie(lines, options.sticky_name) if options.sticky else lines


def serialize(request: ForwardedRequest, lines: HeaderList, expect: bool, unframed: bool) -> bytes:
    """The headers as they are sent, with the framing of the body that there is.

    :param unframed: whether the length of the body has to be written.
    """
    headers = request.headers
    sender = request.sender
    options = request.options
    own: HeaderList = []
    if sender.length == CHUNKED:
        own.append(("Transfer-Encoding", "chunked"))
    elif sender.replaced or (unframed and (headers.measured or sender.length)):
        own.append(("Content-Length", str(sender.length)))
    if sender.length == CHUNKED or sender.replaced:
        lines = [line for line in lines if line[0].lower() != "content-length"]
    if expect:
        own.append(("Expect", "100-continue"))
    connection = []
    if headers.te_trailers and request.connection is not None:
        own.append(("TE", "trailers"))
        connection.append("TE")
    if headers.upgrade:
        own.append(("Upgrade", headers.upgrade))
        connection.append("Upgrade")
    elif not options.agent.max_idle:
        connection.append("close")
    if connection:
        own.append(("Connection", ", ".join(connection)))
    if not options.preserve_header_key_case:
        own = [(name.lower(), value) for name, value in own]
    return wire.lines_of(lines + own) + b"\r\n"


def replace_body(request: ForwardedRequest, body: Any) -> None:
    """Send a body other than the client's.

    :param body: bytes, or a file.
    :raises HandlerFailed: when it is something else.
    """
    sender = request.sender
    if sender is NO_BODY_SENDER:
        sender = request.sender = RequestBodySender(request.downstream, 0, request.options)
    if sender.mirror is not None:
        # the mirrored request was to have the client's body, which is not read now
        sender.mirror.end(whole=False)
        sender.mirror = None
    if isinstance(body, (bytes, bytearray)):
        sender.replace(bytes(body), len(body))
        return
    if isinstance(body, str) or not callable(getattr(body, "read", None)):
        raise HandlerFailed(f"proxy_req: the body {type(body).__name__} is neither bytes nor a file")
    try:
        at = body.tell()
        length = body.seek(0, 2) - at
        body.seek(at)
    except (AttributeError, OSError, ValueError):
        length = CHUNKED
    sender.replace(body, length)


def checked_request(changed: UpstreamRequest, event: str) -> tuple[str, str]:
    """
    :raises HandlerFailed: when a handler has left a method or a path that cannot be sent.
    """
    method, path = changed.method, changed.path
    if not isinstance(method, str) or not TOKEN.fullmatch(method):
        raise HandlerFailed(f"{event}: the method {method!r} is not a token")
    if not isinstance(path, str) or not path or not path.isascii() or not path.isprintable() or " " in path:
        raise HandlerFailed(f"{event}: the path {path!r} is not valid in a request line")
    return method, path


def checked_lines(changed: UpstreamRequest, event: str, target: Target, options: Options) -> HeaderList:
    """The headers that a handler has left, with one Host. The handler does not frame the message.

    :raises HandlerFailed: when they cannot be sent.
    """
    lines = [
        (name, value)
        for name, value in checked(changed.headers, event)
        if name.lower() not in rules.ASIDE or name.lower() == "trailer"
    ]
    hosts = [value for name, value in lines if name.lower() == "host"]
    if len(hosts) > 1:
        raise HandlerFailed(f"{event}: the request has more than one Host: {', '.join(hosts)}")
    return lines if hosts else rules.with_host(lines, target.authority, options.preserve_header_key_case)
