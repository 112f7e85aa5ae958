"""The report, and the program's own counters, in the Prometheus text format or as OpenMetrics.

Process: a worker, or the status daemon. Never: let the program's own metrics spoil the page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from gunicorn_passenger.ipc.report_types import DaemonEntry, MailboxesEntry, ServerEntry
from gunicorn_passenger.serving import program_metrics
from gunicorn_passenger.status.sources import ReportUnavailable, reports
from gunicorn_passenger.system.text import printable

_Count = Literal["connections", "accepted", "requests", "bytes", "errors"]

#: Kinds of events whose counters exist from the start, so that the first event is an increase.
_KINDS = ("boot_failure", "crash", "reload", "takeover")


def render(accept: str) -> tuple[str, bytes]:
    """The metrics page.

    :param accept: the request's ``Accept`` header, which chooses the format.
    :returns: content type and body.
    :raises ImportError: when ``prometheus_client`` is not installed.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()
    registry.register(_Collector(_families))
    if os.environ.get(program_metrics.VARIABLE):
        registry.register(_Collector(program_metrics.sum_metrics))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):
        # the encoder rejects some Accept headers, such as one with an unknown version
        encode, content_type = choose_encoder("")
    try:
        return content_type, encode(registry)
    except (ValueError, TypeError, ArithmeticError) as error:
        # a label or a value of the program's own that the format cannot express, such as a lone surrogate
        program_metrics.log_omitted(error)
        registry = CollectorRegistry()
        registry.register(_Collector(_families))
        return content_type, encode(registry)


class _Collector:
    """A collector, as ``prometheus_client`` calls it, made of a function."""

    def __init__(self, families: Callable[[], Iterable[Any]]) -> None:
        self.collect = families


class _MetricFamily:
    """One metric. Samples with equal labels are added up: a duplicate would make the whole page invalid."""

    def __init__(self, kind: Any, name: str, text: str, *labels: str) -> None:
        self._family = kind(f"gunicorn_passenger_{name}", text, labels=labels)
        self._samples: dict[tuple[str, ...], float] = {}

    def add(self, value: float | None, *labels: str) -> None:
        """:param value: ``None`` where the value is not counted; then the sample is left out."""
        if value is not None:
            labels = tuple(printable(label) for label in labels)
            self._samples[labels] = self._samples.get(labels, 0) + value

    def finish(self) -> Any:
        for labels, value in self._samples.items():
            self._family.add_metric(labels, value)
        return self._family


def _families() -> Iterator[Any]:
    """The report as metrics. Totals include workers that have exited, so they never decrease."""
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge

    up = _MetricFamily(Gauge, "up", "Whether the gunicorn master sent its report")
    try:
        report = reports.get()
    except ReportUnavailable:
        up.add(0)
        yield up.finish()
        return
    up.add(1)
    info = _MetricFamily(Gauge, "info", "Name and version of the application; always 1", "name", "version")
    info.add(1, report["name"], report["version"])
    failing = _MetricFamily(Gauge, "boot_failing", "Whether new workers cannot start (a failed reload)")
    failing.add(bool(report.get("failure")))
    started = _MetricFamily(Gauge, "start_time_seconds", "Start of the master, in Unix time")
    started.add(report["started"])
    workers = _MetricFamily(Gauge, "workers", "Worker processes", "state")
    for state in ("booting", "ready", "leaving"):
        workers.add(0, state)
    memory = _MetricFamily(Gauge, "memory_bytes", "Resident memory", "process")
    memory.add(report["memory"], "master")
    memory.add(0, "workers")
    for worker in report["workers"]:
        workers.add(1, worker["state"])
        memory.add(worker["memory"], "workers")
    events = _MetricFamily(Counter, "events", "Reloads, crashes, takeovers and other events", "kind")
    for kind in _KINDS:
        events.add(0, kind)
    for kind, count in report["totals"].items():
        events.add(count, kind)
    blocked = _MetricFamily(Counter, "blocked", "How often a worker's event loop was blocked for too long")
    blocked.add(report["blocking"]["times"])
    longest = _MetricFamily(Gauge, "longest_block_seconds", "The longest time of that")
    longest.add(report["blocking"]["longest"])
    for family in (up, info, failing, started, workers, memory, events, blocked, longest):
        yield family.finish()
    yield from _mailbox_families(report["mailboxes"], Gauge, Counter)
    yield from _server_families(report["servers"], Gauge, Counter)
    yield from _daemon_families(report.get("daemons", []), Gauge, Counter)


def _mailbox_families(mailboxes: MailboxesEntry, gauge: Any, counter: Any) -> Iterator[Any]:
    sessions = _MetricFamily(gauge, "sessions", "Open Socket.IO sessions")
    sessions.add(mailboxes["sessions"])
    yield sessions.finish()
    for name, value, text in (
        ("connections_passed", mailboxes["passed"], "Connections passed to the worker they belong to"),
        ("connections_kept", mailboxes["kept"], "Connections that such a worker did not take in time"),
        ("messages_published", mailboxes["published"], "Messages that were sent to all workers"),
        (
            "messages_dropped",
            mailboxes["dropped"],
            "Messages that a slow worker or subscriber has missed",
        ),
        (
            "unknown_sessions",
            mailboxes["unknown"],
            "Requests with a Socket.IO session of another machine, or of a worker that is gone",
        ),
    ):
        family = _MetricFamily(counter, name, text)
        family.add(value)
        yield family.finish()


def _server_families(servers: list[ServerEntry], gauge: Any, counter: Any) -> Iterator[Any]:
    by_key: dict[_Count, tuple[Any, str, str]] = {
        "connections": (gauge, "server_connections", "Open connections"),
        "accepted": (counter, "server_accepted", "Accepted connections"),
        "requests": (counter, "server_requests", "Completed requests"),
        "bytes": (counter, "server_sent_bytes", "Bytes sent to clients"),
        "errors": (counter, "server_errors", "Responses with a status of 500 and above, and incomplete ones"),
    }
    for key, (kind, name, text) in by_key.items():
        family = _MetricFamily(kind, name, text, "server", "address")
        for server in servers:
            family.add(server[key], server["name"], server["address"])
        yield family.finish()
    accepting = _MetricFamily(gauge, "server_workers", "Workers that accept connections", "server", "address")
    for server in servers:
        accepting.add(len(server["workers"]), server["name"], server["address"])
    yield accepting.finish()


def _daemon_families(daemons: list[DaemonEntry], gauge: Any, counter: Any) -> Iterator[Any]:
    up = _MetricFamily(gauge, "daemon_up", "Whether the daemon runs", "daemon")
    restarts = _MetricFamily(counter, "daemon_restarts", "Restarts after the daemon had exited", "daemon")
    memory = _MetricFamily(gauge, "daemon_memory_bytes", "Resident memory", "daemon")
    for daemon in daemons:
        up.add(daemon["state"] == "running", daemon["name"])
        restarts.add(daemon["restarts"], daemon["name"])
        memory.add(daemon["memory"], daemon["name"])
    for family in (up, restarts, memory):
        yield family.finish()
