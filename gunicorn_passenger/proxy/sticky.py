"""The cookie that keeps a client with one of several targets. Functions without I/O.

Process: any process in which the proxy is mounted.
Never: tell a client the address of a target.
"""

from __future__ import annotations

from gunicorn_passenger.proxy.request_headers import HeaderList


def target_id_in(cookies: str, name: str) -> str:
    """The id of the target that this client had before; empty when it had none.

    :param cookies: the value of the request's ``Cookie``.
    :param name: the name of the proxy's own cookie.
    """
    found = ""
    for part in cookies.split(";"):
        key, _, value = part.partition("=")
        if key.strip() == name:
            found = value.strip()
    return found


def set_cookie(name: str, target_id: str, scheme: str) -> str:
    """The ``Set-Cookie`` that keeps a client with a target.

    :param scheme: ``http`` or ``https``, as the client has it.
    """
    secure = "; Secure" if scheme == "https" else ""
    return f"{name}={target_id}; Path=/; HttpOnly; SameSite=Lax{secure}"


def without_cookie(headers: HeaderList, name: str) -> HeaderList:
    """The headers of a request without the proxy's own cookie."""
    result = []
    for key, value in headers:
        if key.lower() == "cookie" and name in value:
            parts = [part for part in value.split(";") if part.partition("=")[0].strip() != name]
            rest = ";".join(parts).strip()
            if rest:
                result.append((key, rest))
        else:
            result.append((key, value))
    return result
