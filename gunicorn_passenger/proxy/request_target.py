"""The target of a request (RFC 9112 section 3.2): what the client has written, and what the upstream is sent.

Process: any process in which the proxy is mounted. Functions without I/O.
Never: take the host of a request from anything but ``HTTP_HOST``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from gunicorn_passenger.proxy.events import HandlerFailed
from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import HOST, PORT
from gunicorn_passenger.proxy.target import Target

#: RFC 9112 section 3.2.2, for the schemes that a proxy of HTTP serves
_ABSOLUTE = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_VISIBLE = re.compile(r"[\x21-\x22\x24-\x7e]*")


class BadTarget(ValueError):
    """A request has a target that no server may take; the text is for the client."""


def request_path(environ: dict[str, Any], unmodified: bool = False) -> tuple[str, str]:
    """The path and query of a request, as the client has written them.

    A target in absolute form has a host, too. It is not asked here for which host the request is: the server
    has put that into ``HTTP_HOST`` (RFC 9112 section 3.2.2), and a program may have put another one there.

    An application that mounts the proxy somewhere has moved a part of the path to ``SCRIPT_NAME``, or has
    changed ``PATH_INFO`` or ``QUERY_STRING``: what it has left in these is what counts.

    :param unmodified: whether the proxy is all of the application.
    :returns: path and query; and the scheme of a target in absolute form, in lower case.
    :raises BadTarget: for a target that has none of the forms of RFC 9112 section 3.2, or has no host, user
        information or another scheme (RFC 9110 sections 4.2.1 to 4.2.4).
    """
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    if unmodified and raw[:1] == "/" and _VISIBLE.fullmatch(raw):
        return raw, ""
    scheme = ""
    method = environ["REQUEST_METHOD"]
    if raw and raw[0] != "/" and method != "CONNECT" and not (raw == "*" and method == "OPTIONS"):
        scheme, rest = _absolute(raw)
        # RFC 9112 section 3.2.4
        raw = "*" if method == "OPTIONS" and not rest else "/" + rest.removeprefix("/")
    if raw == "*" and method == "OPTIONS":
        return raw, scheme
    raw = raw.partition("#")[0]
    if not unmodified or raw[:1] != "/":
        raw = _inside(environ, raw)
    if not _VISIBLE.fullmatch(raw):
        raw = quote(raw.encode("latin-1", "replace"), safe="/%?:@!$&'()*+,;=~-._[]\"<>\\^`{|}")
    return raw, scheme


def _absolute(raw: str) -> tuple[str, str]:
    """A target in absolute form: its scheme, and what follows the host, except for a fragment.

    :raises BadTarget: when it is not one of http or https with a host and without a user.
    """
    found = _ABSOLUTE.fullmatch(raw)
    if found is None:
        raise BadTarget("The request's target is neither a path nor a URL of http or https.")
    scheme, authority, rest = found.groups()
    if "@" in authority:
        raise BadTarget("The request's target has user information, which RFC 9110 section 4.2.4 forbids.")
    port = PORT.search(authority)
    if (
        not authority
        or authority[0] == ":"
        or not HOST.fullmatch(authority)
        or (port and not 0 < int(port[1].lstrip("0")[:6] or "0") < 65536)
    ):
        raise BadTarget("The request's target has no valid host.")
    return scheme.lower(), rest.partition("#")[0]


def _inside(environ: dict[str, Any], raw: str) -> str:
    """``PATH_INFO`` and the query, spelt as the client has where they are unchanged."""
    mount = environ.get("SCRIPT_NAME", "")
    path = environ.get("PATH_INFO", "")
    query = environ.get("QUERY_STRING", "")
    raw_path, _, raw_query = raw.partition("?")
    written = unquote_to_bytes(raw_path).decode("latin-1")
    if written == mount + path and raw_query == query and raw_path.startswith(mount):
        inside = raw[len(mount) :]
    else:
        inside = quote(path.encode("latin-1", "replace"), safe="/:@!$&'()*+,;=~-._")
        if query:
            inside += "?" + query
    return inside if inside[:1] == "/" else "/" + inside


def rewritten_path(rewrite: Any, path: str, make_request: Callable[[], Any]) -> str:
    """The path and query of a request after the option ``rewrite``.

    :param rewrite: a function of the path and the request, or pairs of a pattern and its replacement, of
        which the first that matches counts.
    :param path: path and query; the query is kept.
    :raises HandlerFailed: when the result cannot be sent.
    """
    path, mark, query = path.partition("?")
    if callable(rewrite):
        try:
            result = rewrite(path, make_request())
        except Exception as error:
            raise HandlerFailed("the function of rewrite= failed", error) from error
    else:
        result = path
        for pattern, replacement in rewrite:
            result, count = pattern.subn(replacement, path)
            if count:
                break
    if not isinstance(result, str) or not result.startswith("/") or not _VISIBLE.fullmatch(result):
        raise HandlerFailed(
            f"rewrite= turns the path {path!r} into {result!r}: a path begins with '/' and has only visible "
            "ASCII characters"
        )
    return result + ("&" if mark and "?" in result else mark) + query


def target_path(options: Options, target: Target, asked: str, before: str) -> str:
    """The path and query that the target is sent.

    :param asked: path and query of the client's request.
    :param before: the prefix for ``to_proxy``, such as ``http://host``.
    """
    if asked == "*":
        return asked
    if options.to_proxy and before and not options.ignore_path:
        return before + asked
    if options.prepend_path:
        base, query = (target.whole if options.ignore_path else target.base), target.query
    else:
        base = query = ""
    path = base if options.ignore_path else base + asked
    path = path or "/"
    if query:
        path += ("&" if "?" in path else "?") + query
    return path
