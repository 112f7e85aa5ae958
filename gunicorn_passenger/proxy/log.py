"""The log of the proxy: the one place where its lines are made safe to read.

Process: any process in which the proxy is mounted.
Never: let a client, a target or a handler begin a log line of its own.
"""

from __future__ import annotations

import logging
from typing import Any

from gunicorn_passenger.http.faults import report_fault
from gunicorn_passenger.system.text import printable

_logger = logging.getLogger("gunicorn.error")


class _Log:
    """gunicorn's error log; the arguments may hold what clients, targets and handlers have said."""

    def error(self, text: str, *arguments: Any, exc_info: Any = None) -> None:
        _logger.error("%s", printable(text % arguments), exc_info=exc_info)

    def warning(self, text: str, *arguments: Any) -> None:
        _logger.warning("%s", printable(text % arguments))


log = _Log()


def failed_callback(what: str, error: BaseException) -> None:
    """An exception in a callback of the event loop has cost one connection.

    :param what: the connection that is closed, for the operator.
    """
    report_fault(f"proxy: {printable(what)} was closed", error)
