"""How a process gets the report: a worker over its channel, the status daemon over a persistent connection.

Process: a worker, or the status daemon. Never: have two requests for the report on the way at a time.
"""

from __future__ import annotations

import json
import time
from typing import Any, cast

from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.ipc.report_types import Report
from gunicorn_passenger.serving.registry import registry

#: Seconds for which a report is used again.
FRESH = 0.2
#: Seconds that the master has for a report to the status daemon, which a probe waits for.
_REPORT_TIMEOUT = 3.0


class ReportUnavailable(Exception):
    """The process could not get a report; the text says why."""


class ChannelSource:
    """In a worker: asks the master over the worker's channel."""

    #: whether this process is a worker, which is healthy when it responds at all
    serves = True

    def report(self) -> Report:
        """:raises ReportUnavailable: when the master did not send a report."""
        try:
            return cast(Report, registry.report())
        except (PassengerError, OSError, ValueError) as error:
            raise ReportUnavailable(str(error)) from None


class PipeSource:
    """In the status daemon: asks the master over a persistent connection (``status/control_server.py``)."""

    serves = False

    def __init__(self, fd: int) -> None:
        """:param fd: a connected stream socket, which this object closes."""
        import gevent
        from gevent import socket as gsocket
        from gevent.event import Event

        self._sock = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM, fileno=fd)
        self._received = Event()
        self._requested = False
        self._response: dict[str, Any] = {}
        self._lost = False
        gevent.spawn(self._read)

    def report(self) -> Report:
        # requests that arrive in the meantime wait for the same response
        if not self._requested and not self._lost:
            self._requested = True
            self._received.clear()
            try:
                self._sock.sendall(b'{"command":"report"}\n')
            except OSError:
                self._lost = True
        if self._lost or not self._received.wait(timeout=_REPORT_TIMEOUT) or self._lost:
            raise ReportUnavailable(
                "the gunicorn master has exited"
                if self._lost
                else f"the gunicorn master did not send its report within {_REPORT_TIMEOUT:g} s"
            )
        if "report" not in self._response:
            raise ReportUnavailable(str(self._response.get("error", "the gunicorn master sent no report")))
        return cast(Report, self._response["report"])

    def _read(self) -> None:
        received = bytearray()
        while True:
            try:
                data = self._sock.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            received += data
            line, end, rest = received.partition(b"\n")
            if end:
                try:
                    self._response = dict(json.loads(line))
                except (ValueError, TypeError):
                    # the rest of a response to the previous status daemon, which was killed while it read
                    self._response = {"error": "the report was incomplete; try again"}
                received = rest
                self._requested = False
                self._received.set()
        self._lost = True
        self._received.set()


class NullSource:
    """In a status daemon without a master: the program was started with plain ``python``."""

    serves = False

    def report(self) -> Report:
        raise ReportUnavailable("this program does not run under gunicorn, which would send the report")


class ReportCache:
    """The report of this process's source, used again for :data:`FRESH` seconds."""

    def __init__(self) -> None:
        self.source: ChannelSource | PipeSource | NullSource = ChannelSource()
        self._report: Report | None = None
        self._at = 0.0

    def get(self) -> Report:
        """:raises ReportUnavailable: when the source has none."""
        if self._report is None or time.monotonic() - self._at > FRESH:
            report = self.source.report()
            self._report, self._at = {**report, "now": round(time.time(), 3)}, time.monotonic()
        return self._report


reports = ReportCache()
