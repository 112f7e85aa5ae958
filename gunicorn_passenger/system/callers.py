"""Which function, package or file a call comes from, where no argument tells.

Process: all. Never: use anything of a caller except the names of its functions and modules.
"""

from __future__ import annotations

import os
import sys
from types import FrameType

_LIBRARIES = (
    os.path.dirname(os.__file__),
    os.path.dirname(os.path.dirname(__file__)),
    sys.prefix,
    "<",
)


def is_program_file(path: str) -> bool:
    """Whether a source file belongs to the program, not to Python, to this package or to a library."""
    return not path.startswith(_LIBRARIES) and "site-packages" not in path


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
