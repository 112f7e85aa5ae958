"""What an import brings, and what it says is missing: each in a Python of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gunicorn_passenger

PACKAGE = "gunicorn_passenger"
ROOT = Path(gunicorn_passenger.__file__).parent


def python(*arguments: str) -> str:
    """What a Python of its own writes; it must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def failure(code: str) -> str:
    """What a program writes that must fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gunicorn_passenger", ["gevent", "gunicorn", "werkzeug"]),
        ("import gunicorn_passenger; gunicorn_passenger.__version__", ["gevent", "gunicorn", "werkzeug"]),
        ("import gunicorn_passenger.cli", ["gevent", "werkzeug", f"{PACKAGE}.proxy", f"{PACKAGE}.http"]),
        ("import gunicorn_passenger.config.address", ["gevent", "gunicorn"]),
        ("import gunicorn_passenger.hooks", [f"{PACKAGE}.proxy", f"{PACKAGE}.http", "gevent"]),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement: str, absent: list[str]) -> None:
    code = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    assert python("-c", code) == "[]"


def test_the_supervisor_imports_only_the_standard_library_and_this_package() -> None:
    """It would otherwise run code of other packages, perhaps as root, and need their memory."""
    program = ROOT / "daemons" / "supervisor.py"
    code = f"import runpy, sys; runpy.run_path({str(program)!r}); print(*{{n.split('.')[0] for n in sys.modules}})"
    imported = set(python("-I", "-S", "-c", code).split())
    assert imported - {PACKAGE, "__main__"} <= sys.stdlib_module_names


def test_public_modules_need_no_import_of_their_own() -> None:
    code = (
        "import gunicorn_passenger as p; print(p.http_proxy.create_server, p.status.spawn, p.spawn, p.Worker)"
        "; print(sorted(set(p.__all__) - set(dir(p))))"
    )
    assert python("-c", code).splitlines()[1] == "[]"


def test_the_master_has_imported_all_that_a_program_uses_before_it_forks() -> None:
    code = (
        "import sys, gunicorn_passenger as p; p.Worker; before = set(sys.modules)"
        "; [getattr(p, name) for name in p.__all__]"
        f"; print([name for name in set(sys.modules) - before if name.startswith('{PACKAGE}')])"
    )
    assert python("-c", code) == "[]"


def test_messages_in_plain_python_need_no_gevent() -> None:
    code = (
        "import sys, gunicorn_passenger as p; s = p.channel('x').subscribe(); p.channel('x').publish('y'); "
        "print(next(s), 'gevent' in sys.modules)"
    )
    assert python("-c", code) == "y False"


def test_gevent_is_missing() -> None:
    said = failure("import sys; sys.modules['gevent'] = None; import gunicorn_passenger as p; p.Worker")
    assert re.fullmatch(r"Error: Worker of gunicorn_passenger needs gevent, .*pip install gevent.*\n", said)


def test_python_socketio_is_missing() -> None:
    said = failure("import sys; sys.modules['socketio'] = None; import gunicorn_passenger.socketio")
    assert "pip install 'gunicorn-passenger[socketio]'" in said.splitlines()[-1]


def test_python_socketio_is_too_old() -> None:
    said = failure(
        "from importlib import metadata; real = metadata.version; metadata.version = lambda name: "
        "'5.16.0' if name == 'python-socketio' else real(name); import gunicorn_passenger.socketio"
    )
    assert "needs python-socketio 5.16.1 or newer, and this Python has 5.16.0: pip" in said
