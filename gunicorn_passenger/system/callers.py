"""Which function or package a call comes from, where no argument tells.

Process: all. Never: use anything of a caller except the names of its functions and modules.
"""

from __future__ import annotations

import sys
from types import FrameType


def called_in(function: str, module: str) -> bool:
    """Whether this call comes, directly or not, from a function of a module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def called_in_packages(names: tuple[str, ...]) -> bool:
    """Whether this call comes, directly or not, from one of the packages."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in names:
            return True
        frame = frame.f_back
    return False
