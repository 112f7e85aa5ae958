"""Rewrites the Location and Set-Cookie headers of responses. Functions without I/O.

Process: any process in which the proxy is mounted.
Never: resolve a URL of the target against a host that the client has named.
"""

from __future__ import annotations

import re
from urllib.parse import urljoin, urlsplit, urlunsplit

from gunicorn_passenger.proxy.options import Options
from gunicorn_passenger.proxy.request_headers import ForwardedInfo, HeaderList
from gunicorn_passenger.proxy.target import Target, matches

#: the status codes of responses whose Location is rewritten
_RELOCATING = {201, 301, 302, 303, 307, 308}

_SECURE = re.compile(r";[ \t]*secure[ \t]*(?:=[^;]*)?(?=;|$)", re.IGNORECASE)
_SAMESITE = re.compile(r";[ \t]*samesite[ \t]*(?:=[^;]*)?(?=;|$)", re.IGNORECASE)
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
            result.append((name, cookie(value, options, origin.prefix)))
        else:
            result.append((name, value))
    return result


def location(value: str, options: Options, target: Target, origin: ForwardedInfo) -> str:
    """A redirect to the target itself is made to lead through the proxy; others stay unchanged."""
    try:
        parts = urlsplit(value)
    except ValueError:
        return value
    netloc, scheme, path = parts.netloc, parts.scheme, parts.path
    if netloc and _same_host(netloc, scheme, target):
        if options.host_rewrite:
            netloc = options.host_rewrite
        elif options.auto_rewrite and origin.host:
            netloc = origin.host
        if options.protocol_rewrite:
            scheme = options.protocol_rewrite
    if origin.prefix and path.startswith("/") and netloc in ("", origin.host, options.host_rewrite):
        path = _prefixed(path, origin.prefix, target.base)
    if (scheme, netloc, path) == (parts.scheme, parts.netloc, parts.path):
        return value
    return urlunsplit((scheme, netloc, path, parts.query, parts.fragment))


def _prefixed(path: str, prefix: str, base: str = "") -> str:
    """A path of the target as the client has to write it.

    :param base: what the proxy puts before the path of a request.
    """
    if matches(prefix, path):
        return path  # the target knows the prefix, such as from X-Forwarded-Prefix
    if base and matches(base, path):
        path = path[len(base) :]
    return prefix + path


def _same_host(netloc: str, scheme: str, target: Target) -> bool:
    scheme = scheme or target.scheme
    return _authority(netloc, scheme) == _authority(target.authority, scheme)


def _authority(netloc: str, scheme: str) -> str:
    """A host and port to compare, without the default port of the scheme (RFC 3986 section 6.2.3)."""
    return netloc.lower().removesuffix({"http": ":80", "https": ":443"}.get(scheme, ""))


def cookie(value: str, options: Options, prefix: str = "") -> str:
    """A ``Set-Cookie`` with its attributes rewritten (RFC 6265 section 5.2).

    :param prefix: the prefix that was removed from the path of the request.
    """
    rules = {"domain": options.cookie_domain_rewrite, "path": options.cookie_path_rewrite}

    def replace(found: re.Match[str]) -> str:
        attribute = found[2].lower()
        mapping = rules[attribute] or {}
        old = found[3].strip(" \t")
        new = mapping.get(old.lower() if attribute == "domain" else old, mapping.get("*"))
        if new is None:
            if attribute == "domain" or not prefix or not old.startswith("/"):
                return found[0]
            new = _prefixed(old, prefix).rstrip("/")
        return f"{found[1]}{found[2]}={new}" if new else ""

    value = _ATTRIBUTE.sub(replace, value)
    if options.cookie_samesite:
        value = _SAMESITE.sub("", value) + f"; SameSite={options.cookie_samesite}"
    if options.cookie_secure is not None:
        value = _SECURE.sub("", value) + ("; Secure" if options.cookie_secure else "")
    return value


def redirect(value: str, target: Target, path: str, host: str | None = None) -> tuple[Target, str] | None:
    """Where a redirect of the target leads: resolved against the target, not against the client's Host.

    :param path: the path of the request that the target redirects.
    :param host: the host that the client asked for. A target which names it means itself: to connect to what
        a client names would let the client choose the target.
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
    asked = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not re.fullmatch(r"[\x21-\x7e]*", asked):
        return None
    if said.netloc and host and _authority(parts.netloc, parts.scheme) == _authority(host, parts.scheme):
        return target, asked
    if target.tls and parts.scheme != "https":
        return None  # a redirect must not lead out of TLS
    if (parts.scheme, parts.netloc) == (target.scheme, target.authority):
        return target, asked
    return Target(parts.hostname, port, scheme=parts.scheme), asked
