"""A server of the program with an ASGI application.

Process: a worker, plain Python, or the master with ``--preload``, where a server waits for the fork.
Never: import uvicorn or asyncio before the worker has loaded the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gunicorn_passenger.serving import server_errors
from gunicorn_passenger.serving.interface import AsgiApp
from gunicorn_passenger.serving.server import Server, ServerHost
from gunicorn_passenger.system import unpatched
from gunicorn_passenger.system.installed import outdated

if TYPE_CHECKING:
    from gunicorn_passenger.serving.asgi_thread import AsgiThread

#: The oldest uvicorn whose protocols the package can drive.
_UVICORN = "0.30"


class AsgiServer(Server):
    """Serves one ASGI application on one address, in a thread of its own in every worker."""

    def __init__(self, app: Any, host: ServerHost) -> None:
        """
        :raises PassengerError: when uvicorn is not installed, or too old.
        """
        _check_uvicorn()
        super().__init__(app, host)
        self.asgi_app: AsgiApp = app
        #: the thread with the asyncio loop; ``None`` until the worker has loaded the program
        self.thread: AsgiThread | None = None

    @property
    def needs_hub(self) -> bool:
        """Whether its thread is a greenlet."""
        return unpatched.threads_are_greenlets()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise server_errors.asgi_as_wsgi(self.name)


def _check_uvicorn() -> None:
    found = outdated("uvicorn", _UVICORN)
    if found is not None:
        raise server_errors.uvicorn_missing(found, _UVICORN)
