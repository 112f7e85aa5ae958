"""gunicorn's request object.

Process: a serving process.
Never: parse anything by itself.
"""

from __future__ import annotations

from gunicorn.http import message


class GunicornRequest(message.Request):
    """gunicorn's request object, which always uses the Python parser."""

    @property
    def _use_fast(self) -> bool:
        return False

    @_use_fast.setter
    def _use_fast(self, value: bool) -> None:
        pass
