"""The tables of ``gunicorn-passenger status``.

Process: the command line. Never: send a terminal an unescaped name that a program has chosen.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence

from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.ipc.report_types import (
    BlockingEntry,
    DaemonEntry,
    EventEntry,
    MailboxesEntry,
    PortsEntry,
    Report,
    WorkerEntry,
)
from gunicorn_passenger.status import health
from gunicorn_passenger.status.control_client import Instance, nothing_runs, running
from gunicorn_passenger.system.text import printable

#: Columns of a line where the output is not a terminal: a program reads it, and wants every name whole.
_UNLIMITED = 1 << 16
#: Events that the table shows.
_EVENTS = 8
#: Seconds between two updates of ``--watch``.
_INTERVAL = 1.0


def status(as_json: bool = False, watch: bool = False, app: str = "") -> int:
    """Print the running applications of this account.

    :param as_json: one JSON object instead of tables; with ``watch`` one on each line.
    :param watch: again each second, until interrupted.
    :param app: only the application with this pid or name.
    :returns: the exit status: 1 when no application runs.
    :raises PassengerError: when no application has that pid or name.
    """
    redraw = watch and not as_json and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name may contain letters that the terminal cannot show
    try:
        while True:
            found = running(app)
            if as_json:
                _print_json(found, watch)
            elif redraw:
                _redraw(_screen(found))
            else:
                lines = _screen(found)
                print("\n".join(lines), file=sys.stdout if found or watch else sys.stderr, flush=True)
            if not watch:
                return 0 if found else 1
            time.sleep(_INTERVAL)
            if not as_json and not redraw:
                print()
    except KeyboardInterrupt:
        if redraw:
            print()
        return 0


def health_check(app: str = "") -> int:
    """Print one line for each application: whether at least one worker serves.

    :param app: only the application with this pid or name.
    :returns: the exit status: 1 when an application has no worker that serves, or none runs. Of several
        masters with one name (``USR2``), one has to serve.
    :raises PassengerError: when no application has that pid or name.
    """
    found = running(app)
    if not found:
        print(f"No {nothing_runs()}", file=sys.stderr)
    healthy: dict[str, bool] = {}
    for instance in found:
        serves = False
        if instance.report is None:
            print(printable(f"pid {instance.pid}: {instance.error}"))
        else:
            counts = health.count_workers(instance.report)
            serves = health.serves(counts)
            states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
            print(f"{instance.label}: {'healthy' if serves else 'not healthy'}; workers: {states or 'none'}")
        healthy[instance.name] = serves or healthy.get(instance.name, False)
    return 0 if healthy and all(healthy.values()) else 1


def _print_json(instances: list[Instance], in_one_line: bool) -> None:
    applications = [a.report or {"pid": a.pid, "error": a.error} for a in instances]
    found = {"account": account_name(os.geteuid()), "applications": applications}
    print(json.dumps(found, indent=None if in_one_line else 2), flush=True)


def _redraw(lines: list[str]) -> None:
    """Overwrite the previous lines, so that nothing flickers."""
    height = max(4, shutil.get_terminal_size().lines)
    if len(lines) >= height:
        hidden = len(lines) - height + 2
        lines = [*lines[: height - 2], f"... {hidden} more lines: enlarge the window"]
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def _screen(instances: list[Instance]) -> list[str]:
    if not instances:
        return [f"No {nothing_runs()}"]
    width = max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else _UNLIMITED
    lines: list[str] = []
    for instance in instances:
        if lines:
            lines += ["", "-" * min(width, 100)]
        if instance.report is None:
            lines.append(printable(f"pid {instance.pid}: {instance.error}"))
        else:
            lines += table(instance.report, width)
    return lines


def table(report: Report, width: int) -> list[str]:
    """The tables of one application.

    :param width: columns of a line, 80 or more.
    """
    now = time.time()
    title = (
        f"{report['name']}  {report['state']} for {_duration(now - report['started'])}, "
        f"as user {report['user']} (gunicorn-passenger {report['version']})"
    )
    lines = [
        _cut(printable(title), width),
        *([_cut(printable(report["failure"]), width)] if report.get("failure") else []),
        "",
        *_columns(
            ["PROCESS", "PID", "STATE", "AGE", "MEMORY"],
            "<><>>",
            [
                ["master", report["pid"], report["state"], _age(report, now), _bytes(report["memory"])],
                *(
                    [
                        f"worker {worker['number']}",
                        worker["pid"],
                        worker["state"],
                        _age(worker, now),
                        _bytes(worker["memory"]),
                    ]
                    for worker in report["workers"]
                ),
            ],
            width,
        ),
    ]
    if (blocking := report.get("blocking", {})).get("times"):
        lines += ["", _blocking(blocking)]
    if any((mailboxes := report.get("mailboxes", {})).values()):
        lines += ["", _mailboxes(mailboxes)]
    if report["servers"]:
        lines += ["", *_servers(report, width)]
    if report.get("daemons"):
        lines += ["", *_daemons(report["daemons"], now, width)]
    lines += ["", *_ports(report["ports"])]
    if report["events"]:
        lines += ["", "RECENT EVENTS"]
        lines += [_event(event, now, width) for event in report["events"][-_EVENTS:]]
    return lines


def _blocking(blocking: BlockingEntry) -> str:
    times, longest = _number(blocking["times"]), blocking["longest"]
    return f"EVENT LOOPS  blocked {times} times, for up to {longest:.1f} s; the log names the functions"


def _mailboxes(mailboxes: MailboxesEntry) -> str:
    passed, kept = _number(mailboxes["passed"]), _number(mailboxes["kept"])
    published, dropped = _number(mailboxes["published"]), _number(mailboxes["dropped"])
    sessions, unknown = _number(mailboxes["sessions"]), _number(mailboxes["unknown"])
    return (
        f"SIBLINGS  {passed} connections passed, {kept} not taken in time; "
        f"{published} messages published, {dropped} dropped; {sessions} Socket.IO sessions, "
        f"{unknown} requests for unknown ones"
    )


def _servers(report: Report, width: int) -> list[str]:
    serving = sorted(worker["pid"] for worker in report["workers"] if worker["state"] != "booting")
    rows = []
    for server in report["servers"]:
        workers = sorted(server["workers"])
        where = ",".join(map(str, workers)) or "-"
        if len(workers) > 1 and workers == serving:
            where = f"all {len(workers)}"
        placement = server["placement"] if server["state"] == "listening" else server["state"]
        rows.append(
            [
                server["name"],
                server["address"],
                placement,
                _number(server["connections"]),
                _number(server["accepted"]),
                _number(server["requests"]),
                _bytes(server["bytes"]),
                _number(server["errors"]),
                where,
            ]
        )
    header = ["SERVER", "ADDRESS", "PLACED", "NOW", "IN ALL", "REQUESTS", "SENT", "ERRORS", "WORKERS"]
    return _columns(header, "<<<>>>>><", rows, width, (0, 1, 8))


def _daemons(daemons: list[DaemonEntry], now: float, width: int) -> list[str]:
    rows = [
        [
            daemon["name"],
            daemon["pid"] or "-",
            daemon["state"],
            _age(daemon, now),
            _bytes(daemon["memory"]),
            _number(daemon["restarts"]),
            daemon["user"],
            daemon["address"] or "-",
            daemon["command"],
        ]
        for daemon in daemons
    ]
    header = ["DAEMON", "PID", "STATE", "AGE", "MEMORY", "RESTARTS", "USER", "ADDRESS", "COMMAND"]
    return _columns(header, "<><>>><<<", rows, width, (0, 7, 8))


def _ports(ports: PortsEntry) -> list[str]:
    allocated, opened, free = (ports[key] or "none" for key in ("allocated", "open", "free"))
    if not ports["limited"]:
        return [f"PORTS  open {opened}; no port allocation is set"]
    return [f"PORTS  allocated {allocated}; open {opened}; free {free}"]


def _event(event: EventEntry, now: float, width: int) -> str:
    at = time.localtime(event["time"])
    today = at[:3] == time.localtime(now)[:3]
    clock = time.strftime("%H:%M:%S" if today else "%d %b %H:%M", at)
    return _cut(printable(f"{clock}  {event['text']}"), width)


# --- layout --------------------------------------------------------------------------------------


def _columns(
    header: Sequence[str],
    alignments: str,
    rows: Iterable[Sequence[object]],
    width: int,
    elastic: Sequence[int] = (0,),
) -> list[str]:
    """Lines of a table.

    :param alignments: ``<`` or ``>`` for each column.
    :param elastic: the columns that are shortened where the line is too long.
    """
    cells = [list(header), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(elastic, key=lambda i: widths[i] - len(header[i]))
        if widths[widest] <= len(header[widest]):
            break
        widths[widest] -= 1
    lines = []
    for row in cells:
        fitted = [f"{_cut(cell, w):{side}{w}}" for cell, w, side in zip(row, widths, alignments, strict=True)]
        lines.append("  ".join(fitted).rstrip())
    return lines


def _cut(text: str, width: int) -> str:
    """Shorten a text in its middle: both ends of a path or a name are informative."""
    if len(text) <= width:
        return text
    start = max(0, (width - 1) // 2)
    end = max(0, width - 1 - start)
    return text[:start] + "…" + (text[-end:] if end else "")


def _age(entry: Report | WorkerEntry | DaemonEntry, now: float) -> str:
    return _duration(now - entry["started"]) if entry["started"] else "-"


def _duration(seconds: float) -> str:
    seconds = max(0, int(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02} h"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}".replace(",", " ")


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
