"""Shows what runs, to people and programs: the report, the control socket, the status application.

``gunicorn_passenger.status`` is itself a WSGI application, so ``passenger.listen(9100, status)`` works, and
has ``application`` and ``spawn()``. Both are imported on first use.

Process: the master (``report``, ``control_server``, ``prometheus_multiproc``), a worker or the status daemon
(``web``, ``sources``, ``metrics``, ``health``), the command line (``control_client``, ``terminal``,
``health``), a process that is not a worker (``message_client``). Never: change what it shows, except by a
command that ``control_server`` takes from the account itself.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from gunicorn_passenger.status.web import StatusApplication, application, spawn

__all__ = ["application", "spawn"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gunicorn_passenger.status import web

        return getattr(web, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallableModule(types.ModuleType):
    """Makes the module itself a WSGI application, for ``passenger.listen(9100, status)``."""

    @overload
    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]: ...
    @overload
    def __call__(self, *, hosts: object) -> StatusApplication: ...
    def __call__(
        self,
        environ: WSGIEnvironment | None = None,
        start_response: StartResponse | None = None,
        *,
        hosts: object = None,
    ) -> Iterable[bytes] | StatusApplication:
        """The application itself, or with ``hosts`` one that also serves these names.

        :raises SettingError: for a value that is not a host name.
        """
        from gunicorn_passenger.status import web

        if environ is None or start_response is None:
            return web.StatusApplication(() if hosts is None else hosts)
        return web.application(environ, start_response)


# the name that its server has in the report
_CallableModule.__module__, _CallableModule.__qualname__ = "gunicorn_passenger", "status"
sys.modules[__name__].__class__ = _CallableModule
