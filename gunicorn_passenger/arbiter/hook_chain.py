"""Runs our handlers before or after a gunicorn hook of the user's own.

Process: the master. Never: swallow or reorder what the user's own hooks do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def before(cfg: Any, name: str, ours: Callable[..., object]) -> None:
    """Run ``ours`` before the user's gunicorn hook ``name``, once for each configuration."""
    _wrap(cfg, name, ours, first=True)


def after(cfg: Any, name: str, ours: Callable[..., object]) -> None:
    """Run ``ours`` after the user's gunicorn hook ``name``, once for each configuration."""
    _wrap(cfg, name, ours, first=False)


def _wrap(cfg: Any, name: str, ours: Callable[..., object], first: bool) -> None:
    users = getattr(cfg, name)
    if getattr(users, "_passenger", False):
        return

    # gunicorn checks how many arguments a hook takes, so the wrapper has to name them
    if name in ("pre_fork", "post_fork", "child_exit"):

        def pair(server: Any, worker: Any) -> None:
            if first:
                ours(server, worker)
            users(server, worker)
            if not first:
                ours(server, worker)

        wrapper: Callable[..., None] = pair
    else:

        def single(server: Any) -> None:
            if first:
                ours(server)
            users(server)
            if not first:
                ours(server)

        wrapper = single
    wrapper._passenger = True  # type: ignore[attr-defined]
    cfg.set(name, wrapper)
