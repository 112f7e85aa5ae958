"""The benchmarks share one harness: what one file defines, no other file defines again.

Runs in: the tests; it reads ``bench/`` and starts nothing.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from sources import nodes

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
FILES = sorted(path for path in BENCH.rglob("*.py") if "node_modules" not in path.parts)


def definitions(path: Path, *kinds: type) -> set[str]:
    """The names of the functions or classes that a file defines, nested ones and methods included."""
    return {node.name for node in nodes(path) if isinstance(node, kinds) and not node.name.startswith("__")}


@pytest.mark.parametrize(
    "kinds", [(ast.FunctionDef, ast.AsyncFunctionDef), (ast.ClassDef,)], ids=["functions", "classes"]
)
def test_a_name_is_defined_in_one_file_of_the_benchmarks(kinds):
    found = defaultdict(list)
    for path in FILES:
        for name in definitions(path, *kinds):
            found[name].append(str(path.relative_to(BENCH)))
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_every_benchmark_uses_the_harness():
    programs = sorted(BENCH.glob("*.py"))
    assert {path.stem for path in programs} >= {"boot", "listen", "proxy", "storm", "takeover", "wsgi"}
    for path in programs:
        modules = {node.module for node in nodes(path) if isinstance(node, ast.ImportFrom)}
        assert "harness.program" in modules, f"{path.name} has a command line of its own"


def test_one_file_of_the_benchmarks_imports_what_is_inside_the_package():
    """Names inside the package change; the benchmarks run the package as its users do."""
    inside = set()
    for path in FILES:
        for node in nodes(path):
            module = (isinstance(node, ast.ImportFrom) and node.module) or ""
            public = ("gunicorn_passenger.hooks", "gunicorn_passenger.socketio")
            if module.startswith("gunicorn_passenger.") and module not in public:
                inside.add(str(path.relative_to(BENCH)))
    assert inside <= {"apps/broker_app.py"}
