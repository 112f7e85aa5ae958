"""Notices that a client disconnects while its response is made.

Process: a serving process, in the hub.
Never: read what the client has sent, or treat a client that only shut down its sending side as disconnected
where the two can be distinguished.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from gevent import monkey

from gunicorn_passenger.http.faults import report_fault

#: Seconds between two polls of a client that has sent more than was read: the kernel reports its connection
#: as readable whether the client is still there or not.
_POLL_INTERVAL = 0.4

#: the poll of the kernel, which does not go through the hub
_poll = monkey.get_original("select", "poll")


class DisconnectWatch:
    """Watches one connection, for one caller at a time."""

    __slots__ = ("_argument", "_armed", "_callback", "_fd", "_loop", "_readable", "_tcp", "_timer")

    def __init__(self, loop: Any, fd: int, readable: Any, tcp: bool) -> None:
        """
        :param loop: the event loop.
        :param fd: the connection's descriptor.
        :param readable: the connection's watcher for reading; nothing else may use it meanwhile.
        :param tcp: whether it is a TCP connection. Over TCP, a client that only shut down its sending side
            looks like one that has disconnected; on a UNIX socket it does not.
        """
        self._loop = loop
        self._fd = fd
        self._readable = readable
        self._tcp = tcp
        self._armed = False
        self._timer: Any = None
        self._callback: Callable[[Any], object] | None = None
        self._argument: Any = None

    def start(self, callback: Callable[[Any], object], argument: Any, unread: bool, body: bool) -> None:
        """Watch until :meth:`cancel`.

        :param callback: called in the hub, with ``argument``, when the client has disconnected.
        :param unread: whether a readable socket means nothing, because it holds bytes that are not read
            now, or because the application uses it.
        :param body: whether a greenlet reads the request's body. Then only a reset counts: a client that
            sends no more may have sent all.
        """
        self._callback = callback
        self._argument = argument
        if body or unread:
            self._start_polling(body)
        else:
            self._armed = True
            self._readable.start(self._on_readable)

    def cancel(self) -> None:
        if self._armed:
            self._armed = False
            self._readable.stop()
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._callback = self._argument = None

    def _on_readable(self) -> None:
        """The client has disconnected, or has sent the next request."""
        self._armed = False
        self._readable.stop()
        if not self._check(not self._tcp):
            # the next request stays unread, so the socket stays readable
            self._start_polling(False)

    def _start_polling(self, body: bool) -> None:
        self._timer = self._loop.timer(_POLL_INTERVAL, _POLL_INTERVAL)
        self._timer.start(self._check, body or not self._tcp)

    def _check(self, only_gone: bool) -> bool:
        """Call back when the client has disconnected.

        :param only_gone: whether a client that shut down its sending side counts as connected.
        """
        callback = self._callback
        if callback is None:
            return True
        try:
            poll = _poll()
            poll.register(self._fd, 0 if only_gone else select.POLLRDHUP)
            if not poll.poll(0):
                return False
            callback(self._argument)
        except Exception as error:
            report_fault("a client that disconnects is noticed only when the response is sent", error)
        return True
