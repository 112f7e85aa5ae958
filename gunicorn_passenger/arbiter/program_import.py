"""Which application gunicorn serves: the program may say so by ``listen("passenger")`` alone.

Process: the master (with ``--preload``) and a worker.
Never: hide an error in the program itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container
from typing import Any

from gunicorn import util
from gunicorn.errors import AppImportError

from gunicorn_passenger.config.address import format_sockname
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.serving.server import Server
from gunicorn_passenger.system import listening_sockets

_import_app = util.import_app


def import_app(uri: str) -> Any:
    """gunicorn's ``util.import_app``, for programs whose module has no ``application``.

    The server that called ``listen("passenger")`` is the primary in any case, so the name that gunicorn looks
    for is needed only when no server did.

    :raises AppImportError: as gunicorn does.
    """
    before = listening_sockets.own_listeners() if registry.worker is None else None
    try:
        return _import_app(uri)
    except ModuleNotFoundError as error:
        module = uri.partition(":")[0]
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise AppImportError(
            f"The module {error.name!r} was not found in {os.getcwd()}: correct the name of the program, or "
            "set gunicorn's --chdir to the program's directory (docs/how-to/debugging.md)"
        ) from None
    except AppImportError:
        if not isinstance(registry.primary, Server):
            raise
        return registry.primary
    finally:
        if before is not None:
            _explain_preloaded_listeners(before)


def _explain_preloaded_listeners(before: Container[int]) -> None:
    """:param before: inodes of the listening sockets that the master had before it loaded the program."""
    opened = {name for inode, name in listening_sockets.own_listeners().items() if inode not in before}
    for address in sorted(map(format_sockname, opened)):
        logging.getLogger("gunicorn.error").warning(
            "%s was opened in the master, by a server that the program starts while it is preloaded. The "
            "server's threads stay in the master, and workers serve the port only if it is a gevent server. "
            "Open the port in post_worker_init or with passenger.create_server(), or run without --preload",
            address,
        )


def install() -> None:
    """Have gunicorn load programs with :func:`import_app`."""
    util.import_app = import_app
