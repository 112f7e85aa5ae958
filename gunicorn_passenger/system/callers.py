"""Which function, package or file a call comes from, where no argument tells.

Process: all. Never: use anything of a caller except the names of its functions and modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def called_in(function: str, module: str) -> bool:
    """Whether this call comes, directly or not, from a function of a module."""
    return any(
        frame.f_code.co_name == function and frame.f_globals.get("__name__") == module
        for frame in frames(sys._getframe(1))
    )


def called_in_packages(names: tuple[str, ...]) -> bool:
    """Whether this call comes, directly or not, from one of the packages."""
    callers = frames(sys._getframe(1))
    return any(str(frame.f_globals.get("__name__")).partition(".")[0] in names for frame in callers)
