"""The syntax of Python files. A file is parsed once for all tests of a module (:func:`forget`)."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.cache
def syntax(path: Path) -> ast.Module:
    """The syntax tree of a file; the tests only read it."""
    return ast.parse(path.read_text(), path)


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree."""
    return tuple(ast.walk(syntax(path)))


def forget() -> None:
    """Free all syntax trees: every garbage collection would visit their half a million nodes."""
    syntax.cache_clear()
    nodes.cache_clear()
