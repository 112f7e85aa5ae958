"""``from gunicorn_passenger.hooks import *``, for ``gunicorn.conf.py`` with any worker class.

The names that this brings are those of gunicorn's hooks. Each of them only installs the package's own
handlers in all of gunicorn's hooks, so a hook of the user's own by the same name does no harm.

Process: the master. Never: do anything but install those handlers.
"""

from __future__ import annotations

from typing import Any

from gunicorn_passenger.arbiter import integration

#: what ``import *`` brings to gunicorn.conf.py; the earliest of them that gunicorn calls is enough
__all__ = ["nworkers_changed", "on_reload", "on_starting", "when_ready"]


def nworkers_changed(server: Any, _new_value: int, _old_value: int | None) -> None:
    """gunicorn has read its configuration, at the start or a reload, or has another number of workers."""
    integration.install_hooks_for_other_workers(server)


def on_starting(server: Any) -> None:
    integration.install_hooks_for_other_workers(server)


def when_ready(server: Any) -> None:
    if integration.install_hooks_for_other_workers(server):
        integration.ready(server)


def on_reload(server: Any) -> None:
    if integration.install_hooks_for_other_workers(server):
        integration.reloaded(server)
