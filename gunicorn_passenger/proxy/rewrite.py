"""Rewrites the Location and Set-Cookie headers of responses. Functions without I/O.

Process: any process in which the proxy is mounted.
Never: resolves a URL of the target against a host that the client has named.
"""

from __future__ import annotations

import re
from urllib.parse import urljoin, urlsplit, urlunsplit

from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import ForwardedInfo, HeaderList
from gunicorn_passenger.proxy.target import Target

#: the status codes of responses whose Location is rewritten
_RELOCATING = {201, 301, 302, 303, 307, 308}

_ATTRIBUTE = re.compile(r"(;[ \t]*)(domain|path)[ \t]*=([^;]*)", re.IGNORECASE)


def rewrite_headers(
    headers: HeaderList, status: int, options: Options, target: Target, origin: ForwardedInfo
) -> HeaderList:
    """The headers of a response as the client gets them."""
    result = []
    for name, value in headers:
        low = name.lower()
        if low == "location" and status in _RELOCATING:
            result.append((name, location(value, options, target, origin)))
        elif low == "set-cookie":
            result.append((name, cookie(value, options)))
        else:
            result.append((name, value))
    return result


def location(value: str, options: Options, target: Target, origin: ForwardedInfo) -> str:
    """A redirect to the target itself is made to lead through the proxy; others stay unchanged."""
    if not (options.host_rewrite or options.auto_rewrite or options.protocol_rewrite):
        return value
    try:
        parts = urlsplit(value)
        if not parts.netloc or not _same_host(parts.netloc, parts.scheme, target):
            return value
    except ValueError:
        return value
    netloc, scheme = parts.netloc, parts.scheme
    if options.host_rewrite:
        netloc = options.host_rewrite
    elif options.auto_rewrite and origin.host:
        netloc = origin.host
    if options.protocol_rewrite:
        scheme = options.protocol_rewrite
    return urlunsplit((scheme, netloc, parts.path, parts.query, parts.fragment))


def _same_host(netloc: str, scheme: str, target: Target) -> bool:
    usual = {"http": ":80", "https": ":443"}.get(scheme or target.scheme, "")
    return netloc.lower().removesuffix(usual) == target.authority.lower().removesuffix(usual)


def cookie(value: str, options: Options) -> str:
    """A ``Set-Cookie`` with its Domain and Path rewritten (RFC 6265 section 5.2)."""
    rules = {"domain": options.cookie_domain_rewrite, "path": options.cookie_path_rewrite}

    def replace(found: re.Match[str]) -> str:
        mapping = rules[found[2].lower()]
        if not mapping:
            return found[0]
        old = found[3].strip(" \t")
        new = mapping.get(old.lower() if found[2].lower() == "domain" else old, mapping.get("*"))
        if new is None:
            return found[0]
        return f"{found[1]}{found[2]}={new}" if new else ""

    return _ATTRIBUTE.sub(replace, value)


def redirect(value: str, target: Target, path: str) -> tuple[Target, str] | None:
    """Where a redirect of the target leads: resolved against the target, not against the client's Host.

    :param path: the path of the request that the target redirects.
    :returns: the target and the path; ``None`` when it cannot be followed.
    """
    base = f"{'https' if target.tls else 'http'}://{target.authority}{path}"
    try:
        said = urlsplit(value)
        if said.scheme in ("http", "https") and not said.hostname:
            return None
        url = urljoin(base, value)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            return None
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None
    if target.tls and parts.scheme != "https":
        return None  # a redirect must not lead out of TLS
    asked = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not re.fullmatch(r"[\x21-\x7e]*", asked):
        return None
    if (parts.scheme, parts.netloc) == (target.scheme, target.authority):
        return target, asked
    return Target(parts.hostname, port, scheme=parts.scheme), asked
