"""The report of an application: what ``gunicorn-passenger status`` shows and the status app serves.

Process: the master, in the broker's thread. Never: trust a number that a worker wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

from gunicorn_passenger._version import __version__
from gunicorn_passenger.config.address import format_sockname, tcp_ports
from gunicorn_passenger.config.port_allocation import account_name, format_ports
from gunicorn_passenger.ipc.report_types import (
    BlockingEntry,
    DaemonEntry,
    MailboxesEntry,
    PortsEntry,
    Report,
    ServerCounts,
    ServerEntry,
    WorkerEntry,
)
from gunicorn_passenger.ipc.scoreboard import PRIMARY_KEY, PRIMARY_SLOT, Counters, Scoreboard
from gunicorn_passenger.master.broker import Broker
from gunicorn_passenger.master.worker_channels import WorkerChannel
from gunicorn_passenger.system import port_owner, procfs
from gunicorn_passenger.system.text import printable_all


def build(broker: Broker) -> Report:
    """The application as it is now, for people and for programs. Called with the broker's lock held."""
    by_age = {worker.age: worker for worker in broker.workers}
    pids = broker.workers.pids()
    ready = any(worker.ready for worker in by_age.values())
    report: Report = {
        "version": __version__,
        "name": _name(broker),
        "pid": os.getpid(),
        "user": account_name(os.geteuid()),
        "started": round(broker.started, 3),
        "state": "stopping" if broker.stopping() else "running" if ready or not by_age else "starting",
        "failure": broker.boot_failures.text,
        "memory": procfs.memory(os.getpid()),
        "workers": [_worker(age, pid, by_age.get(age)) for age, pid in sorted(pids.items())],
        "servers": _servers(broker, by_age, pids),
        "blocking": _blocking(broker, by_age),
        "mailboxes": _mailboxes(broker, by_age),
        "events": broker.event_log.list(),
        "totals": dict(broker.event_log.totals),
    }
    for service in broker.loop.services:
        daemons = service.daemons()
        if daemons is not None:
            report["daemons"] = daemons
    report["ports"] = _ports(broker, report.get("daemons", ()))
    # the one place that makes the texts of a report fit for terminals, pages and UTF-8
    cleaned: Report = printable_all(report)
    return cleaned


def _worker(age: int, pid: int, worker: WorkerChannel | None) -> WorkerEntry:
    state = "running"
    if worker is not None:
        state = "leaving" if worker.draining else "ready" if worker.ready else "booting"
    return {
        "pid": pid,
        "number": age,
        "started": round(worker.started, 3) if worker is not None else procfs.started(pid),
        "state": state,
        "memory": procfs.memory(pid),
    }


def _blocking(broker: Broker, by_age: dict[int, WorkerChannel]) -> BlockingEntry:
    total = broker.retired_counters.blocking(_scoreboards(by_age))
    return {"times": total.times, "longest": total.milliseconds / 1000}


def _mailboxes(broker: Broker, by_age: dict[int, WorkerChannel]) -> MailboxesEntry:
    total = broker.retired_counters.mailboxes(_scoreboards(by_age)).plus(broker.mailboxes.counts())
    return cast(MailboxesEntry, total._asdict())


def _scoreboards(by_age: dict[int, WorkerChannel]) -> list[Scoreboard]:
    return [worker.scoreboard for worker in by_age.values() if worker.scoreboard is not None]


def _servers(broker: Broker, by_age: dict[int, WorkerChannel], pids: dict[int, int]) -> list[ServerEntry]:
    scoreboards = _scoreboards(by_age)
    primary = broker.sync.primary()
    ports = broker.listeners.ports.values()
    serving = [age for age, worker in by_age.items() if worker.serving]
    # the binds that no server of the program listens on
    unclaimed = {key for age in serving for key in by_age[age].primary_binds}
    unclaimed -= {port.key for port in ports if port.wanted_by}
    found: list[ServerEntry] = []
    if by_age and primary:
        total = broker.retired_counters.total(PRIMARY_KEY, PRIMARY_SLOT, scoreboards)
        names = [format_sockname(li.sock.getsockname()) for li in primary if li.sock is not None]
        found.append(
            {
                "name": broker.workers.primary_name or "primary",
                "address": ", ".join([*names, *sorted(unclaimed)]),
                "placement": "shared",
                "state": "listening",
                **_counts(total, broker.workers.primary_counts),
                "workers": sorted(pids[age] for age in serving if age in pids),
            }
        )
    for port in sorted(ports, key=lambda p: (p.port, p.key)):
        if port.key in unclaimed:
            continue  # the primary is served there
        total = broker.retired_counters.total(port.key, port.slot, scoreboards)
        found.append(
            {
                "name": port.title,
                "address": port.key,
                "placement": port.placement,
                "state": "stopped" if port.paused == "stop" else "listening",
                **_counts(total, port.counts and port.slot >= 0),
                "workers": sorted(pids[age] for age in port.accepting if age in pids),
            }
        )
    return found


def _counts(total: Counters, complete: bool) -> ServerCounts:
    """:param complete: whether requests are counted; of a third-party server only connections are."""
    return {
        "connections": total.connections,
        "accepted": total.accepted,
        "requests": total.requests if complete else None,
        "bytes": total.bytes if complete else None,
        "errors": total.errors if complete else None,
    }


def _ports(broker: Broker, daemons: Iterable[DaemonEntry]) -> PortsEntry:
    """The ports of the application: those of its servers, and of its daemons.

    A port is free when no process listens on it. That includes daemons which open a port themselves.
    """
    allocation = broker.allocation
    held = {p.port for p in broker.listeners.ports.values() if p.port and p.listener.sock is not None}
    for daemon in daemons:
        held |= tcp_ports(daemon["address"] or "")
    return {
        "limited": allocation.limited,
        "allocated": format_ports(allocation.ports) if allocation.limited else None,
        "open": format_ports(frozenset(held)),
        "free": format_ports(allocation.ports - held - set(port_owner.listening()))
        if allocation.limited
        else None,
    }


def _name(broker: Broker) -> str:
    return str(getattr(broker.arbiter, "proc_name", "") or broker.cfg.proc_name)
