"""Which modules the program has imported, and a function that is called when it has imported one.

Process: every process. Never: import the module itself, or change how it is found.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def imported(name: str) -> Any:
    """A module, or ``None`` until it is imported completely: another thread may be importing it."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def call_when_imported(name: str, function: Callable[[], object]) -> None:
    """Call the function at once if the module is imported, otherwise before its import ends."""
    if name in sys.modules:
        function()
    elif not any(isinstance(finder, _ImportWatch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatch(name, function))


class _ImportWatch:
    """Has a module found as ever, and executed with a function behind it."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self.name = name
        self._function = function

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            # the program may add the directory in which it is installed, and try again
            sys.meta_path.insert(0, self)
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._function()

        loader.exec_module = exec_module
        return spec
