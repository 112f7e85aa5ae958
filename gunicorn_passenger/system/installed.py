"""Which version of an optional package is installed.

Process: every process. Never: import the package.
"""

from __future__ import annotations

import re
from importlib import metadata


def outdated(distribution: str, needed: str) -> str | None:
    """
    :param needed: the oldest version that can be used.
    :returns: that version when it is older, empty when it is missing, ``None`` when it can be used.
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
    return found if _numbers(found) < _numbers(needed) else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
