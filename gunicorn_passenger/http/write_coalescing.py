"""Write coalescing: the finished responses of one event-loop iteration are sent together at its end.

Process: a serving process; one coalescer for each event loop.
Never: wait for a client, or delay a response while requests are known to be slow.

Waking a sleeping client can cost more than handling its request, and a client that is awake stays awake while
more responses arrive. So a busy worker keeps the responses of one event-loop iteration until its end, and
then sends one after the other.

But then a finished response waits for the code of other requests, and how long that runs is not known in
advance. So responses are coalesced only when 200 requests have been quick. A slow request takes 5 of them
back for each millisecond that it took. So one that took a little longer among many (the machine was busy with
something else, or Python collected garbage) hardly matters, and a server whose requests are often slow does
not coalesce. Responses are flushed

- at the end of the iteration, before the loop waits for anything;
- when a request begins and the first of them has waited for 3 ms (``_MAX_DELAY``);
- when there are 32 (``_MAX_PENDING``);
- when one request has taken more than 1 ms.

A response that ends its connection as its client wishes waits, too: the coalescer closes the connection when
the response is sent.

One case remains: the slow request itself. The responses that were finished in the 3 ms before it wait until
its code ends or waits for something. The same holds for greenlets in the middle of a request that wake up in
that iteration. The clients' next requests would have waited for that code in any case.
"""

from __future__ import annotations

import os
from math import ceil, inf
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

from gevent import get_hub

from gunicorn_passenger.http.faults import report_fault

#: One request of so many is timed while none has been quick.
_SAMPLE = 16
#: Seconds that a quick request takes, at least and at most. When requests are quicker, and their headers need
#: not be parsed either, clients hardly have the time to fall asleep, and coalescing costs more than it saves.
#: When they are slower, the delay would be long and the gain small.
_QUICKEST, _SLOWEST = 25e-6, 1e-3
#: How many quick requests it takes before responses are coalesced, and how many of them each second of a slow
#: request takes back.
_REQUIRED = 200
_LOST_PER_SECOND = 5000
#: How many responses are pending at most, and for how many seconds, before the next request begins.
_MAX_PENDING = 32
_MAX_DELAY = 3e-3


class WriteCoalescer:
    """The pending responses of the current event-loop iteration, and whether responses are coalesced."""

    __slots__ = ("_due", "_loop", "active", "clients_sleep", "pending", "quick")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        #: the connections with a pending response
        self.pending: list[Any] = []
        #: how many requests were quick, less those that slow ones have taken back: at most ``_REQUIRED``
        self.quick = 0
        #: whether responses are coalesced: while ``quick`` is as much as it can be
        self.active = False
        #: whether the last timed request took so long that a client has the time to fall asleep
        self.clients_sleep = False
        #: from when on (by ``perf_counter``) a request that begins flushes first
        self._due = inf

    def begin_request(self, number: int, timed: bool, proxied: bool) -> float:
        """A request begins: flush the responses that must not wait for its code.

        :param number: the number of the request in this worker.
        :param timed: whether the caller needs the time in any case.
        :param proxied: whether the application is a proxy, whose own code is short.
        :returns: the time (by ``perf_counter``); 0.0 when the duration of the request does not matter.
        """
        if self.pending and not (self.active or proxied):
            self.flush()
        if self.quick or timed or not number % _SAMPLE:
            began = perf_counter()
            if began > self._due:
                self.flush()
            return began
        return 0.0

    def record_duration(self, seconds: float, repeated: bool) -> None:
        """A request has ended.

        :param seconds: from the call of the application to the end of its result's ``close()``.
        :param repeated: whether its headers repeated those of the request before, and were not parsed.
        """
        self.clients_sleep = seconds > _QUICKEST
        if seconds < _SLOWEST and (self.clients_sleep or not repeated):
            if self.quick < _REQUIRED:
                self.quick += 1
            self.active = self.quick == _REQUIRED
        else:
            lost = ceil(seconds * _LOST_PER_SECOND) if seconds >= _SLOWEST else _REQUIRED
            self.quick = max(self.quick - lost, 0)
            self.active = False
            self.flush()

    def enqueue(self, connection: Any, response: bytes) -> None:
        """Send a response at the end of the iteration.

        :param connection: keeps the response as ``pending``; ``flush_pending()`` sends it without waiting.
        """
        connection.pending = response
        connection.listener.sent += len(response)
        self.pending.append(connection)
        if len(self.pending) == 1:
            self._due = perf_counter() + _MAX_DELAY
            self._loop.run_callback(self.flush)
        elif len(self.pending) >= _MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Send all pending responses."""
        pending, self.pending = self.pending, []
        self._due = inf
        for connection in pending:
            try:
                connection.flush_pending()
            except Exception as error:
                report_fault("a response was not sent", error)
                connection.close()

    def drop(self) -> None:
        """In a forked child: the parent process sends the pending responses."""
        for connection in self.pending:
            connection.drop_pending()
        self.pending.clear()


_coalescers: WeakKeyDictionary[Any, WriteCoalescer] = WeakKeyDictionary()


def coalescer_for_hub() -> WriteCoalescer:
    """The coalescer of the current thread's event loop, which all listeners in it share."""
    hub = get_hub()
    coalescer = _coalescers.get(hub)
    if coalescer is None:
        coalescer = _coalescers[hub] = WriteCoalescer(hub.loop)
    return coalescer


def _drop_in_child() -> None:
    for coalescer in _coalescers.values():
        coalescer.drop()


os.register_at_fork(after_in_child=_drop_in_child)
