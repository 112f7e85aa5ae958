"""Waits for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: Seconds that any condition may take to come true on a loaded machine.
PATIENCE = 60.0


def wait_for(condition: Callable[[], Any], what: object = "the condition", timeout: float = PATIENCE) -> Any:
    """Call ``condition`` until it returns something true, and return that; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s for {what() if callable(what) else what}")
        time.sleep(0.02)
