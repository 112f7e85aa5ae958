"""``wsgi.errors``: what an application writes for the operator.

Process: a serving process.
Never: let an application write what a terminal would obey.
"""

from __future__ import annotations

import io
from typing import Any

from gunicorn.http.wsgi import WSGIErrorsWrapper

from gunicorn_passenger.system.text import printable


class ErrorStream(io.RawIOBase):
    """``wsgi.errors``: gunicorn's error log, which may be reopened at any time."""

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: the log belongs to the server, not to the application."""

    def write(self, data: Any) -> int:
        # created for each text: the log may have been reopened since
        text = data.decode("utf-8", "backslashreplace") if isinstance(data, bytes) else str(data)
        # the application chooses the lines, and a client may have chosen their content
        WSGIErrorsWrapper(self._cfg).write(printable(text, keep="\t\n"))
        return len(data)
