"""The layers of the package: which part may import which, lazily or for types included."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sources import nodes, syntax

import gunicorn_passenger

PACKAGE = "gunicorn_passenger"
ROOT = Path(gunicorn_passenger.__file__).parent

#: From the bottom up: a layer imports only from layers that stand before it. The names on one line may not import
#: each other.
LAYERS = [
    ["_version", "errors"],
    ["config"],
    ["system"],
    ["ipc"],
    ["http"],
    ["proxy"],
    ["serving"],
    ["interposition"],
    ["master"],
    ["daemons"],
    ["status"],
    ["arbiter"],
    ["http_proxy", "socketio", "channels", "hooks"],
    ["worker"],
    ["script_runner"],
    ["cli", ""],
]

#: Function-level imports, each with its reason.
LAZY = {
    (
        "arbiter.hooked_worker",
        "serving.gevent_scheduler",
    ): "only a worker of a gevent class, or with a server of ours, has a hub",
    ("cli", "script_runner"): "only `start` runs a program; the other commands do not import gunicorn",
    (
        "serving.acceptor_table",
        "serving.acceptors",
    ): "a worker without a server of ours does not import gevent",
    ("serving.acceptor_table", "serving.threaded_app"): "the same",
    ("serving.acceptor_table", "serving.stickiness"): "the same",
    ("serving.registry", "serving.connection_migration"): "the same",
    ("serving.registry", "serving.mailboxes"): "the same",
    (
        "serving.standalone",
        "serving.gevent_scheduler",
    ): "the same: workers of other classes import standalone",
    (
        "serving.asgi_thread",
        "serving.gevent_asyncio",
    ): "importing asgi_thread must not import gevent, which a native thread does not need",
    ("serving.acceptor_table", "serving.asgi_thread"): "only an ASGI server needs asyncio and uvicorn",
    (
        "socketio",
        "serving.engineio_websocket",
    ): "the master, and workers without a server of ours, have no hub",
    ("status", "status.web"): "importing the package must not import what serves the application",
    ("status.web", "daemons.api"): "only spawn() needs it, in gunicorn.conf.py or the program",
    ("status.web", "http.listener_context"): "only the daemon's own process serves",
    ("status.web", "serving.acceptors"): "only the daemon's own process serves",
}


class Import(NamedTuple):
    module: str
    target: str
    line: int
    lazy: bool
    for_types: bool


def modules() -> dict[str, Path]:
    """Dotted name below the package ("" is the package itself) to file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    """Every import of the package's own modules that a module has, wherever it stands."""

    def visit(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # an import is a statement
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{module}: relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            for name in names:
                if name == PACKAGE or name.startswith(PACKAGE + "."):
                    target = name[len(PACKAGE) + 1 :]
                    while target not in MODULES:
                        target = target.rpartition(".")[0]
                    yield Import(module, target, child.lineno, lazy, types)
            yield from visit(child, inside, types)

    return tuple(visit(syntax(MODULES[module]), False, False))


def layer(module: str) -> int:
    top = module.partition(".")[0]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def test_a_module_imports_only_from_the_layers_below() -> None:
    wrong = []
    for module in sorted(MODULES):
        top = module.partition(".")[0]
        for found in imports(module):
            if module == "" and found.for_types:
                continue  # what the public interface offers
            if layer(found.target) >= layer(module) and found.target.partition(".")[0] != top:
                wrong.append(
                    f"{ROOT.name}/{MODULES[module].relative_to(ROOT)}:{found.line} imports {found.target}, "
                    "which stands in a higher layer (see LAYERS)"
                )
    assert not wrong, "\n".join(wrong)


def test_there_is_no_cycle() -> None:
    """Not even one with imports inside functions or for types."""
    graph = {
        module: {
            found.target
            for found in imports(module)
            if found.target != module and not (module == "" and found.for_types)
        }
        for module in MODULES
    }
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, " imports ".join((*path[path.index(module) :], module))
        state[module] = 1
        for target in sorted(graph[module]):
            visit(target, (*path, module))
        state[module] = 2
        order.append(module)

    for module in sorted(graph):
        visit(module, ())
    assert len(order) == len(MODULES)


def test_imports_inside_functions_are_few_and_have_a_reason() -> None:
    found = {(one.module, one.target) for module in MODULES for one in imports(module) if one.lazy}
    assert found == set(LAZY)


def test_the_top_level_is_small() -> None:
    own = [path.name for path in ROOT.glob("*.py")]
    assert len(own) <= 10, own


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{module}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, twice


def test_no_module_or_class_is_too_large() -> None:
    for module, path in MODULES.items():
        assert path.read_text().count("\n") <= 500, module
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) for one in node.body)
                assert (node.end_lineno or 0) - node.lineno < 400, f"{module}.{node.name}"
                assert methods <= 30, f"{module}.{node.name}"


def test_each_module_says_which_process_runs_it_and_what_it_never_does() -> None:
    for module, path in MODULES.items():
        said = ast.get_docstring(syntax(path)) or ""
        assert re.search(r"\bProcess(es)?: ", said), module
        if module:
            assert re.search(r"\bNever: ", said), module


def test_docstrings_and_comments_refer_to_what_exists() -> None:
    known = {PACKAGE, "dataclasses"}.union(*(module.split(".") for module in MODULES))
    for path in MODULES.values():
        known.update(re.findall(r"(?:class|def) (\w+)", path.read_text()))
        known.update(re.findall(r"^\s*(?:self\.)?(\w+)(?:: .+)? = ", path.read_text(), re.MULTILINE))
    for module, path in MODULES.items():
        for target in re.findall(r":(?:class|meth|func|mod|attr|data):`~?\.?([\w.]+)", path.read_text()):
            assert target.startswith("werkzeug.") or set(target.split(".")) <= known, (module, target)


def test_unit_tests_start_no_program() -> None:
    """They can be run alone, in seconds; a test may fork its own process."""
    for path in Path(__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"^(import|from) (subprocess|multiprocessing|processes)\b", text, re.MULTILINE
        ), path
        assert not re.search(r"^def test_\w+\([^)]*\b(start|home|obedient)\b", text, re.MULTILINE), path
