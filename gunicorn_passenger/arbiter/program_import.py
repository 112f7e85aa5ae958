"""Which application gunicorn serves: the program may say so by ``listen("passenger")`` alone.

Process: the master (with ``--preload``) and a worker.
Never: hides an error in the program itself.
"""

from __future__ import annotations

from typing import Any

from gunicorn import util
from gunicorn.errors import AppImportError

from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server

_import_app = util.import_app


def import_app(uri: str) -> Any:
    """gunicorn's ``util.import_app``, for programs whose module has no ``application``.

    The server that called ``listen("passenger")`` is the primary in any case, so the name that gunicorn looks
    for is needed only when no server did.

    :raises AppImportError: as gunicorn does.
    """
    try:
        return _import_app(uri)
    except AppImportError:
        if not isinstance(registry.primary, Server):
            raise
        return registry.primary


def install() -> None:
    """Have gunicorn load programs with :func:`import_app`."""
    util.import_app = import_app
