"""Runs our handlers before or after a gunicorn hook of the user's own.

Process: the master. Never: swallow or reorder what the user's own hooks do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def chain(cfg: Any, name: str, ours: Callable[..., object], first: bool = True) -> None:
    """Run ``ours`` before the user's gunicorn hook ``name``, or after it, once for each configuration."""
    users = getattr(cfg, name)
    if getattr(users, "_passenger", False):
        return
    hooks = (ours, users) if first else (users, ours)

    # gunicorn checks how many arguments a hook takes, so the wrapper has to name them
    def pair(server: Any, worker: Any) -> None:
        for hook in hooks:
            hook(server, worker)

    def single(server: Any) -> None:
        for hook in hooks:
            hook(server)

    wrapper: Any = pair if name in ("pre_fork", "post_fork", "child_exit") else single
    wrapper._passenger = True
    cfg.set(name, wrapper)
