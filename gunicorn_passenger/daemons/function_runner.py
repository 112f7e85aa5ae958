"""A daemon that is a Python function: imports the function in a new interpreter, and calls it.

Process: a daemon, which the supervisor starts by this file's path. Never: import anything of the package;
only the program does, if it needs to.

``PASSENGER_CALL`` names the function in a JSON object: ``module``, ``file`` (of a module that cannot be
imported by its name: a script, or gunicorn.conf.py), ``name``, ``args``, and ``path``, which is put before
the interpreter's own ``sys.path``.
"""

from __future__ import annotations

import sys

# the first entry is the directory of this file, which the program must not import from
del sys.path[0]

import functools  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from typing import Any  # noqa: E402

#: Tells the package, where the program imports it, that this process is a daemon.
IS_DAEMON = True


def main() -> None:
    call = json.loads(os.environ.pop("PASSENGER_CALL"))
    sys.path[:0] = call["path"]
    sys.argv = [call["file"] or call["module"]]
    for stream in (sys.stdout, sys.stderr):
        # a line appears in gunicorn's log when it is complete, not after some kilobytes
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    function = functools.reduce(getattr, call["name"].split("."), load(call["module"], call["file"]))
    function(*call["args"])


def load(module: str, file: str) -> Any:
    """The function's module; from its file where it cannot be imported by its name."""
    if not file:
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[module] = found
    spec.loader.exec_module(found)
    return found


if __name__ == "__main__":
    main()
