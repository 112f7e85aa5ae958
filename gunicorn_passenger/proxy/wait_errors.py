"""Why a wait for an upstream ends without what was waited for.

Process: any process in which the proxy is mounted.
Never: hold more than the reason.
"""

from __future__ import annotations


class DownstreamDisconnected(Exception):
    """The client has disconnected while the proxy waited for the upstream."""


class WaitTimeout(TimeoutError):
    """The timeout of a wait has passed.

    Python raises ``TimeoutError`` also for ``ETIMEDOUT``: the kernel has given the connection up, because the
    upstream's host has vanished.
    """
