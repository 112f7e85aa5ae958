"""gunicorn's parser in C: whether a listener can use it.

Process: a serving process.
Never: let it read what gunicorn's own parser would read in another way.
"""

from __future__ import annotations

from typing import Any

try:
    import gunicorn_h1c
except ImportError:
    gunicorn_h1c = None

#: How many headers the C parser takes. gunicorn's parser reads a section that has more of them.
_C_FIELDS = 100

#: gunicorn's compatibility settings, which the C parser does not know; all are off by default.
_COMPATIBILITY = (
    "permit_obsolete_folding",
    "strip_header_spaces",
    "permit_unconventional_http_method",
    "permit_unconventional_http_version",
    "casefold_http_method",
)

#: Header sections that must be refused (RFC 9112 sections 2.2, 5.1, 5.2 and 6.3). Older versions of the C
#: parser accept some of them, and are not used.
_MUST_BE_REFUSED = (
    b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (_C_FIELDS + 1) + b"\r\n",
)


def c_parser() -> Any:
    """The C parser; ``None`` when it is not installed, or accepts what must be refused."""
    parse = getattr(gunicorn_h1c, "parse_to_wsgi_environ", None)
    for head in _MUST_BE_REFUSED:
        try:
            if parse is None or parse(head):
                return None
        except gunicorn_h1c.ParseError:
            continue
    return parse


def c_parser_for(cfg: Any, sockname: Any, always_request: bool, fields_limit: int) -> tuple[Any, str]:
    """The C parser for a listener, or ``None`` and why it is not used.

    :param cfg: gunicorn's configuration.
    :param sockname: the listener's name; a string for a UNIX socket.
    :param always_request: whether a hook needs gunicorn's request object for each request.
    :param fields_limit: how many headers a request may have.
    """
    parse = c_parser()
    flags = [name for name in _COMPATIBILITY if getattr(cfg, name, False)]
    unix = isinstance(sockname, str)
    reason = ""
    if parse is None:
        reason = "gunicorn_h1c is missing or older than 0.6.10"
    elif getattr(cfg, "http_parser", "auto") == "python":
        reason = "http_parser is python"
    elif flags:
        reason = f"{flags[0]} is set"
    elif always_request:
        reason = "pre_request or post_request is set"
    elif fields_limit < _C_FIELDS:
        reason = f"limit_request_fields is below {_C_FIELDS}"
    elif not isinstance(sockname, tuple) and (not unix or ":" in sockname):
        reason = "the socket's name is not a plain path"
    return (None if reason else parse), reason
