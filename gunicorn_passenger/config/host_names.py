"""Host names of a ``Host`` header: reading a list of them, and matching one against it.

Process: every process. Never: resolve a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gunicorn_passenger.config.address import is_ip
from gunicorn_passenger.errors import SettingError

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def parse_host_names(value: object, where: str) -> frozenset[str]:
    """Read a list of host names.

    :param value: a list of names, or a string with commas; ``".example.org"`` stands for all names below it,
        ``"*"`` for every name.
    :param where: names the setting in the error.
    :raises SettingError: names the item that is not a host name.
    """
    names = value.split(",") if isinstance(value, str) else value
    if (
        not isinstance(names, Iterable)
        or isinstance(names, bytes)
        or not all(isinstance(name, str) for name in names)
    ):
        raise SettingError(f"{where}: {value!r} is not a list of host names, such as ['status.example.org']")
    found = frozenset(normalized for name in names if (normalized := normalize(name)))
    for name in sorted(found):
        if name != "*" and not is_host_name(name.removeprefix(".")) and not is_ip_address(name):
            raise SettingError(
                f"{where}: {name[:80]!r} is not a host name; write names without a scheme, a port or a path, "
                "such as 'status.example.org', or '.example.org' for all names below it"
            )
    return found


def normalize(name: str) -> str:
    """The name in lower case, without the final dot of the DNS root."""
    return name.strip().lower().rstrip(".")


def is_host_name(name: str) -> bool:
    """Whether a normalized name consists of labels of letters, digits, ``-`` and ``_``."""
    return _NAME.fullmatch(name) is not None


def is_ip_address(host: str) -> bool:
    """Whether a host is an IP address; an IPv6 address may be in brackets."""
    return is_ip(host.removeprefix("[").removesuffix("]"))


def host_of(header: str) -> str:
    """The normalized host in a ``Host`` header (RFC 9110, section 7.2); empty when malformed."""
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?", header)
    return normalize(match.group(1)) if match else ""


def matches(host: str, names: frozenset[str]) -> bool:
    """Whether a normalized host is one of ``names`` (see :func:`parse_host_names`)."""
    return "*" in names or host in names or any(name[0] == "." and host.endswith(name) for name in names)
