"""Text from outside, made safe for a log line or a terminal.

Runs in: every process. Must never: raise, or change text that is harmless.

A client, a program or a worker chooses the bytes of paths, header values and names. Printed as they are, they
could end a log line and forge the next one, or send commands to the terminal that shows the log.
"""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

#: C0 and C1 controls, the line and paragraph separators, the controls that reorder text, lone surrogates
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: the same, but for the line feed and the tab of a text that has several lines
_UNSAFE_IN_LINES = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable(text: str) -> str:
    """The text in one line, each unsafe character as ``\\xNN`` or ``\\uNNNN``."""
    return text if text.isprintable() else _UNSAFE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """The same for a text that may have several lines, such as a traceback."""
    return _UNSAFE_IN_LINES.sub(_escape, text)


class EscapingFormatter(logging.Formatter):
    """The last step before a line leaves for the error log: escape what could forge one or command a terminal.

    It wraps the formatter that gunicorn has set up. Arguments of gunicorn's own records are one line each,
    since a client can choose them; a traceback keeps its lines.
    """

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "gunicorn.error" and isinstance(record.args, tuple):
            record = copy.copy(record)
            record.args = tuple(printable(arg) if isinstance(arg, str) else arg for arg in record.args or ())
        return printable_lines(self._inner.format(record))


def escape_error_log(log: Any) -> None:
    """Have gunicorn's error log written through :class:`EscapingFormatter`.

    A formatter that is not the standard library's own, such as one that writes JSON, is left alone.

    :param log: gunicorn's logger; one without ``error_log`` is left alone, too.
    """
    for handler in getattr(getattr(log, "error_log", None), "handlers", ()):
        if type(handler.formatter) is logging.Formatter:
            handler.setFormatter(EscapingFormatter(handler.formatter))
