"""Which header fields a proxy hands on, in both directions. Functions without I/O.

Runs in: wherever the proxy is mounted. Must never: let a field of one connection reach another.
"""

from __future__ import annotations

import re
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
    gone = HOP_BY_HOP | (named - {"host"})  # nobody may take the host away (RFC 9112 section 3.2)
    return [(name, value) for name, value in fields if name.lower() not in gone]


class BadResponse(Exception):
    """An answer of the target that a proxy must not hand on."""


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_FOLD = re.compile(r"[ \t]*\r?\n[ \t]+")


def response_fields(fields: Iterable[tuple[str, str]]) -> Fields:
    """The header fields of an answer, checked, with one framing or none.

    Folded lines are unfolded (RFC 9112 section 5.2). An answer that two readers could cut in two ways
    is refused: both Transfer-Encoding and Content-Length, lengths that differ or are no number, codings
    other than chunked (RFC 9112 section 6.3).

    :raises BadResponse: says why.
    """
    checked = [(name, _FOLD.sub(" ", value).strip(" \t")) for name, value in fields]
    for name, value in checked:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadResponse(f"a malformed header field {name[:40]!r}")
    codings = [value.lower() for name, value in checked if name.lower() == "transfer-encoding"]
    lengths = {value for name, value in checked if name.lower() == "content-length"}
    if codings and codings != ["chunked"]:
        raise BadResponse(f"transfer coding {', '.join(codings)[:40]!r}")
    if codings and lengths:
        raise BadResponse("both Transfer-Encoding and Content-Length")
    if len(lengths) > 1 or not all(v.isascii() and v.isdigit() and len(v) < 20 for v in lengths):
        raise BadResponse(f"Content-Length {', '.join(sorted(lengths))[:40]!r}")
    result = [(name, value) for name, value in end_to_end(checked) if name.lower() != "content-length"]
    return result + [("Content-Length", length) for length in lengths]


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
