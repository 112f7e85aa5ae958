"""A worker that exits waits until its connections are finished.

Process: a worker; plain Python.
Never: interrupt a request before the graceful timeout, minus the time that ASGI applications need to shut
down.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from gunicorn_passenger.config.gunicorn_types import Log

#: Seconds between two searches for idle connections of third-party servers.
_IDLE_CHECK_INTERVAL = 0.5
#: Seconds between two checks whether all connections are finished.
_POLL_INTERVAL = 0.1
#: Seconds that the connections which the graceful timeout ends may take to clean up.
_KILL_TIMEOUT = 1.0


class Drainable(Protocol):
    """Servers whose connections a drain finishes."""

    def idle(self) -> bool:
        """Whether no connection is open."""

    def shutdown_seconds(self, graceful_timeout: float) -> float:
        """How long before the graceful timeout the connections that are left must be ended."""

    def kill(self, timeout: float) -> None:
        """End the connections that are left, within so many seconds."""


class ThirdPartyDrainable(Protocol):
    """Third-party servers, whose connections can be counted, and ended while they are idle."""

    def idle(self) -> bool:
        """Whether no connection is open."""

    def shutdown_idle_connections(self) -> None:
        """End the connections that wait for a request."""


def finish_connections(
    servers: Drainable,
    seconds: float,
    log: Log,
    sleep: Callable[[float], object],
    on_tick: Callable[[], object] = lambda: None,
    third_party: ThirdPartyDrainable | None = None,
    keepalive: float = 0.0,
    on_idle: Callable[[], object] = lambda: None,
) -> None:
    """Wait until no connection is open; end those that are left after the graceful timeout.

    :param seconds: what is left of the graceful timeout.
    :param sleep: waits for so many seconds, and lets the connections proceed.
    :param on_tick: called in each round of the wait.
    :param third_party: its idle connections are ended after the keep-alive time, since no sibling takes them.
    :param keepalive: seconds.
    :param on_idle: called once, when no connection is open; those that it brings are finished, too.
    """
    now = monotonic()
    deadline, idle_check_at = now + seconds, now + keepalive
    was_idle = False
    while True:
        if servers.idle() and (third_party is None or third_party.idle()):
            if was_idle:
                return
            was_idle = True
            on_idle()
            continue
        if monotonic() >= deadline - servers.shutdown_seconds(seconds):
            log.warning(
                "Worker graceful timeout (pid:%s): the connections that are still open are closed; raise "
                "--graceful-timeout if requests may take longer",
                os.getpid(),
            )
            servers.kill(_KILL_TIMEOUT)
            return
        on_tick()
        if third_party is not None and monotonic() >= idle_check_at and not third_party.idle():
            third_party.shutdown_idle_connections()
            idle_check_at = monotonic() + _IDLE_CHECK_INTERVAL
        sleep(_POLL_INTERVAL)
