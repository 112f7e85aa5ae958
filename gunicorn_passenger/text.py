"""Text that came from outside: names that programs choose, output of daemons, names of processes.

Runs in: every process. Must never: change text that is printable already.

A worker, a daemon or another user chooses such text, and an operator reads it in a terminal, in the log or on
a page. Control characters could steer a terminal, a line break could forge a log line, bidirectional
formatting could make text read as something else, and a lone surrogate cannot be encoded as UTF-8 at all.
"""

from __future__ import annotations

import traceback
from typing import Any

#: Characters of a server's name.
MAX_NAME = 200


def printable(text: str, keep: str = "") -> str:
    """The text with an escape in place of each character that is not printable.

    :param keep: characters that stay all the same, such as a tab.

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


class SafeLog:
    """gunicorn's logger for the master: each record is one line of printable text, an exception several.

    It is the one place where the master's log lines are escaped, so that the code that logs need not think of
    it.
    """

    def __init__(self, log: Any) -> None:
        """:param log: gunicorn's logger object, whatever its class."""
        self.log = log

    def debug(self, message: str, *args: object) -> None:
        self.log.debug(_line(message, args))

    def info(self, message: str, *args: object) -> None:
        self.log.info(_line(message, args))

    def warning(self, message: str, *args: object) -> None:
        self.log.warning(_line(message, args))

    def error(self, message: str, *args: object) -> None:
        self.log.error(_line(message, args))

    def exception(self, message: str, *args: object) -> None:
        """As :meth:`error`, with the exception that is being handled."""
        trace = "\n".join(printable(line) for line in traceback.format_exc().splitlines())
        # not its own exception(): that would add the text of the exception as it is
        self.log.error(f"{_line(message, args)}\n{trace}")


def safe(log: Any) -> SafeLog:
    """:class:`SafeLog` of a logger, which may be one already."""
    return log if isinstance(log, SafeLog) else SafeLog(log)


def _line(message: str, args: tuple[object, ...]) -> str:
    return printable(message % args if args else message, keep="\t")
