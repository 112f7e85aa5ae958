"""Which function, package or file a call comes from, where no argument tells.

Process: all. Never: use anything of a caller except the names of its functions and modules.
"""

from __future__ import annotations

import os
import sys
from types import FrameType

#: Python's own files, this package, and the scripts that start programs
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in (
        os.path.dirname(os.__file__),
        os.path.dirname(os.path.dirname(__file__)),
        *(os.path.join(prefix, "bin") for prefix in {sys.prefix, sys.base_prefix}),
    )
)


def is_program_file(path: str) -> bool:
    """Whether a source file belongs to the program, not to Python, to this package or to a library."""
    installed = "site-packages" in path or "dist-packages" in path
    return not (installed or path.startswith(("<", *_LIBRARIES)))


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
