"""Which header fields a proxy hands on, in both directions. Functions without I/O.

Runs in: wherever the proxy is mounted. Must never: let a field of one connection reach another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Fields = list[tuple[str, str]]

#: Fields that speak of one connection (RFC 9110 section 7.6.1), and those that older peers use so.
#: Content-Length and Transfer-Encoding are written anew from the parsed message (RFC 9112 section 6).
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def end_to_end(fields: Iterable[tuple[str, str]]) -> Fields:
    """The fields that are meant for the other end: none that is hop-by-hop or that Connection names."""
    fields = list(fields)
    named = {
        token.strip().lower()
        for name, value in fields
        if name.lower() == "connection"
        for token in value.split(",")
    }
    return [(name, value) for name, value in fields if name.lower() not in HOP_BY_HOP | named]


def request_fields(environ: Mapping[str, Any]) -> Fields:
    """The header fields of a WSGI request, without its framing."""
    fields = []
    for key, value in environ.items():
        if key.startswith("HTTP_") and isinstance(value, str):
            fields.append((key[5:].replace("_", "-").title(), value))
    if environ.get("CONTENT_TYPE"):
        fields.append(("Content-Type", environ["CONTENT_TYPE"]))
    # Expect is answered by the server that the proxy is mounted in
    return [(n, v) for n, v in end_to_end(fields) if n.lower() not in ("content-length", "expect")]


def forwarded_fields(environ: Mapping[str, Any], fields: Fields) -> Fields:
    """``X-Forwarded-*``: appended to what is there, since a web server in front has written it.

    On a UNIX socket the client has no address; then it is this machine's own.
    """
    own = {
        "X-Forwarded-For": environ.get("REMOTE_ADDR") or "127.0.0.1",
        "X-Forwarded-Port": environ.get("SERVER_PORT") or "80",
        "X-Forwarded-Proto": environ.get("wsgi.url_scheme") or "http",
    }
    present = {name.lower(): value for name, value in fields}
    result = [(n, v) for n, v in fields if n.title() not in own]
    for name, value in own.items():
        before = present.get(name.lower())
        result.append((name, f"{before}, {value}" if before else value))
    if "x-forwarded-host" not in present and environ.get("HTTP_HOST"):
        result.append(("X-Forwarded-Host", environ["HTTP_HOST"]))
    return result
