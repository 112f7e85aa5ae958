"""The applications of this account, as the command line shows them, and what it tells them.

Runs in: the command line. Must never: wait for a master without a bound, believe a socket that somebody
else could have made, or send a terminal what a program has put into a name.

The masters' side is :mod:`gunicorn_passenger.status.control_server`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gunicorn_passenger import errors
from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.system import runtime_dir
from gunicorn_passenger.system.text import printable

#: Seconds that a master has for its answer.
PATIENCE = 3.0
#: Bytes of an answer; a report has some hundred for each server and worker.
_MAX_ANSWER = 32 << 20
#: Columns, where there is no terminal to ask.
_COLUMNS = 100
#: Events that the table shows.
_EVENTS = 8
#: Seconds between two looks of ``--watch``.
_INTERVAL = 1.0


class Instance(NamedTuple):
    """A master that has a status socket: its report, or why there is none."""

    pid: int
    socket: str
    report: dict[str, Any] | None
    error: str = ""

    @property
    def name(self) -> str:
        return str(self.report["name"]) if self.report else ""


# --- asking ------------------------------------------------------------------------------------


def find() -> list[Instance]:
    """The running applications of this account, by pid. Sockets that dead masters have left are removed."""
    found = []
    for directory in runtime_dir.directories():
        for pid, path in runtime_dir.status_sockets(directory):
            try:
                answer = ask(path, {"command": "report"})
                found.append(Instance(pid, path, answer["report"]))
            except (ConnectionRefusedError, FileNotFoundError):
                runtime_dir.remove_if_stale(pid, path)
            except PassengerError as error:
                found.append(Instance(pid, path, None, str(error)))
            except (OSError, KeyError, TypeError) as error:
                found.append(Instance(pid, path, None, f"does not answer ({_why(error)})"))
    return sorted(found)


def ask(path: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask the master behind a status socket.

    :raises OSError: when it does not answer, or another user's process would.
    :raises PassengerError: when it says that it cannot do what it is asked for.
    """
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        _connect(sock, path, deadline)
        _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            raise PermissionError("another user listens there")
        sock.sendall(json.dumps(question).encode() + b"\n")
        received = bytearray()
        while not received.endswith(b"\n"):
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = sock.recv(1 << 16)
            if not data or len(received) > _MAX_ANSWER:
                raise ConnectionError("the answer broke off")
            received += data
    try:
        answer = json.loads(received)
    except (ValueError, RecursionError):
        raise ConnectionError("the answer is not JSON") from None
    if "error" in answer:
        raise PassengerError(printable(str(answer["error"])))
    return dict(answer)


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            # the queue is full: a socket with a timeout is told so and does not wait (unix(7))
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing within {PATIENCE:g} s"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


# --- telling -----------------------------------------------------------------------------------


def command(verb: str, name: str, app: str = "") -> str:
    """``restart`` or ``stop`` a server or a daemon.

    :param name: its name, or the address of a server.
    :param app: the pid or the name of the application, where several have that name.
    :returns: what was done, one line.
    :raises PassengerError: when it cannot be done, or it is not clear which is meant.
    """
    running = find()
    if not running:
        raise errors.nothing_runs(account_name(os.geteuid()))
    chosen = [a for a in running if app in (str(a.pid), a.name)] if app else running
    if not chosen:
        raise errors.no_such_application(app, [_label(a) for a in running])
    if len(chosen) > 1:
        chosen = [a for a in chosen if name in _names(a)]
        if not chosen:
            raise errors.in_no_application(name)
    if len(chosen) > 1:
        raise errors.in_several_applications(verb, name, [_label(a) for a in chosen])
    try:
        return printable(str(ask(chosen[0].socket, {"command": verb, "name": name})["done"]))
    except (OSError, KeyError) as error:
        raise errors.master_timeout(chosen[0].pid, _why(error)) from None


def _names(application: Instance) -> set[str]:
    report = application.report or {}
    servers = {str(server[key]) for server in report.get("servers", []) for key in ("name", "address")}
    return servers | {str(daemon["name"]) for daemon in report.get("daemons", [])}


def _label(application: Instance) -> str:
    return printable(f"{application.name or '?'} (pid {application.pid})")


# --- showing -----------------------------------------------------------------------------------


def status(as_json: bool = False, watch: bool = False) -> int:
    """Print what runs.

    :param as_json: one JSON object instead of tables; with ``watch`` one in a line.
    :param watch: again each second, until interrupted.
    :returns: the exit status: 1 when nothing runs.
    """
    redraw = watch and not as_json and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name may have letters that the terminal has not
    try:
        while True:
            running = find()
            account = account_name(os.geteuid())
            if as_json:
                _print_json(account, running, watch)
            elif redraw:
                _redraw(_screen(account, running))
            else:
                lines = _screen(account, running)
                print("\n".join(lines), file=sys.stdout if running or watch else sys.stderr, flush=True)
            if not watch:
                return 0 if running else 1
            time.sleep(_INTERVAL)
            if not as_json and not redraw:
                print()
    except KeyboardInterrupt:
        if redraw:
            print()
        return 0
    except BrokenPipeError:
        # the reader has enough; Python would complain of it once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_json(account: str, running: list[Instance], in_one_line: bool) -> None:
    applications = [a.report or {"pid": a.pid, "error": a.error} for a in running]
    found = {"account": account, "applications": applications}
    print(json.dumps(found, indent=None if in_one_line else 2), flush=True)


def _redraw(lines: list[str]) -> None:
    """Over what is there, so that nothing flickers."""
    height = max(4, shutil.get_terminal_size().lines)
    if len(lines) >= height:
        hidden = len(lines) - height + 2
        lines = [*lines[: height - 2], f"... {hidden} more lines; make the window larger"]
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def _screen(account: str, running: list[Instance]) -> list[str]:
    if not running:
        return [f"Nothing of account {account} runs under gunicorn-passenger"]
    width = max(80, shutil.get_terminal_size((_COLUMNS, 24)).columns if sys.stdout.isatty() else _COLUMNS)
    lines: list[str] = []
    for application in running:
        if lines:
            lines += ["", "-" * width]
        if application.report is None:
            lines.append(printable(f"pid {application.pid}: {application.error}"))
        else:
            lines += table(application.report, width)
    return lines


def table(report: dict[str, Any], width: int = _COLUMNS) -> list[str]:
    """An application as text.

    :param width: columns that a line may have, 80 or more.
    """
    now = time.time()
    title = (
        f"{report['name']}  {report['state']} for {_duration(now - report['started'])}, "
        f"as user {report['user']} (gunicorn-passenger {report['version']})"
    )
    lines = [
        _cut(printable(title), width),
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
    if report["servers"]:
        lines += ["", *_servers(report, width)]
    if report.get("daemons"):
        lines += ["", *_daemons(report["daemons"], now, width)]
    lines += ["", *_ports(report["ports"])]
    if report["events"]:
        lines += ["", "RECENT EVENTS"]
        lines += [_event(event, now, width) for event in report["events"][-_EVENTS:]]
    return lines


def _servers(report: dict[str, Any], width: int) -> list[str]:
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
    heads = ["SERVER", "ADDRESS", "PLACED", "NOW", "IN ALL", "REQUESTS", "SENT", "ERRORS", "WORKERS"]
    return _columns(heads, "<<<>>>>><", rows, width, (0, 1, 8))


def _daemons(daemons: list[dict[str, Any]], now: float, width: int) -> list[str]:
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
    heads = ["DAEMON", "PID", "STATE", "AGE", "MEMORY", "RESTARTS", "USER", "ADDRESS", "COMMAND"]
    return _columns(heads, "<><>>><<<", rows, width, (0, 7, 8))


def _ports(ports: dict[str, Any]) -> list[str]:
    allocated, opened, free = (ports[key] or "none" for key in ("allocated", "open", "free"))
    if not ports["limited"]:
        return [f"PORTS  open {opened}; no port allocation is set"]
    return [f"PORTS  allocated {allocated}; open {opened}; free {free}"]


def _event(event: dict[str, Any], now: float, width: int) -> str:
    form = "%H:%M:%S" if now - event["time"] < 43200 else "%d %b %H:%M"
    return _cut(printable(f"{time.strftime(form, time.localtime(event['time']))}  {event['text']}"), width)


# --- text --------------------------------------------------------------------------------------


def _columns(
    heads: Sequence[str],
    sides: str,
    rows: Iterable[Sequence[object]],
    width: int,
    elastic: Sequence[int] = (0,),
) -> list[str]:
    """Lines of a table.

    :param sides: ``<`` or ``>`` for each column.
    :param elastic: the columns that are cut where the line is too long.
    """
    cells = [list(heads), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(elastic, key=lambda i: widths[i] - len(heads[i]))
        if widths[widest] <= len(heads[widest]):
            break
        widths[widest] -= 1
    lines = []
    for row in cells:
        fitted = [f"{_cut(cell, w):{side}{w}}" for cell, w, side in zip(row, widths, sides, strict=True)]
        lines.append("  ".join(fitted).rstrip())
    return lines


def _cut(text: str, width: int) -> str:
    """A text that is too long loses its middle: both ends of a path or a name tell something."""
    if len(text) <= width:
        return text
    head = max(0, (width - 1) // 2)
    tail = max(0, width - 1 - head)
    return text[:head] + "…" + (text[-tail:] if tail else "")


def _age(entry: dict[str, Any], now: float) -> str:
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
