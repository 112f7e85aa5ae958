"""Escapes text from outside: names that programs choose, output of daemons, names of processes.

Process: every process. Never: change text that is already printable.

A worker, a daemon or another user chooses such text, and an operator reads it in a terminal, in the log or on
a page. Control characters could steer a terminal, a line break could forge a log line, bidirectional
formatting could make text read as something else, and a lone surrogate cannot be encoded as UTF-8 at all.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

#: Characters of a server's name.
MAX_NAME = 200


def printable(text: str, keep: str = "") -> str:
    """The text with an escape in place of each character that is not printable.

    :param keep: characters that are not escaped, such as a tab.

    ``str.isprintable`` is false for control characters (C0 and C1), format characters (the bidirectional ones
    included), surrogates, and every kind of white space but the space.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable_all(value: Any) -> Any:
    """The same for every string in what JSON can carry, keys included."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_all(key): printable_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable_all(item) for item in value]
    return value


class EscapingFormatter(logging.Formatter):
    """The last step of a line on its way into gunicorn's error log: escape what is not printable.

    It wraps gunicorn's own formatter. A record of gunicorn's or ours with arguments becomes one line, since a
    client, a program or a worker may have chosen them. Other records, and tracebacks, keep
    their lines.
    """

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "gunicorn.error" and record.args:
            text = record.getMessage()
            shown = printable(text, keep="\t")
            if shown != text:
                record = copy.copy(record)
                record.msg, record.args = shown, None
        return printable(self._inner.format(record), keep="\t\n")


def escape_error_log(log: Any) -> None:
    """Write gunicorn's error log through :class:`EscapingFormatter`.

    A formatter that is not the standard library's own, such as one that writes JSON, is left alone.

    :param log: gunicorn's logger; one without ``error_log`` is left alone, too.
    """
    for handler in getattr(getattr(log, "error_log", None), "handlers", ()):
        if type(handler.formatter) is logging.Formatter:
            handler.setFormatter(EscapingFormatter(handler.formatter))
