"""The log of the proxy: the one place where its lines are made safe to read.

Runs in: wherever the proxy is mounted. Must never: let a client, a target or a handler begin a line of its
own.
"""

from __future__ import annotations

import logging
from typing import Any

_logger = logging.getLogger("gunicorn.error")


def shown(text: str) -> str:
    """A text that stays on its line: what does not print is written as an escape, such as ``\\n``."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


class _Log:
    """gunicorn's error log; the arguments may hold what clients, targets and handlers have said."""

    def error(self, text: str, *arguments: Any, exc_info: Any = None) -> None:
        _logger.error("%s", shown(text % arguments), exc_info=exc_info)

    def warning(self, text: str, *arguments: Any) -> None:
        _logger.warning("%s", shown(text % arguments))


log = _Log()


def failed_callback(what: str, error: BaseException) -> None:
    """An exception in a callback of the event loop has cost one connection.

    :param what: the connection that is closed, for the operator.
    """
    log.error(
        "proxy: %s is closed after an unexpected error: %s: %s",
        what,
        type(error).__name__,
        error,
        exc_info=error,
    )
