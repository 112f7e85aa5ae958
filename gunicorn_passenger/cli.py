"""The command line: ``gunicorn-passenger start``, ``ports``, ``status``, ``health``, ``restart``, ``stop``.

Process: the command line; ``start`` becomes the gunicorn master. Never: show a traceback for an error that
the user can correct.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gunicorn_passenger._version import __version__
from gunicorn_passenger.config.address import tcp_ports
from gunicorn_passenger.config.port_allocation import format_ports
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.status import control_client, terminal
from gunicorn_passenger.system import port_owner
from gunicorn_passenger.system.text import printable

_USAGE = """usage: gunicorn-passenger start SCRIPT [--primary PORT] [gunicorn's options]
       gunicorn-passenger ports [--json]
       gunicorn-passenger status [--json] [--watch] [--app PID|NAME]
       gunicorn-passenger health [--app PID|NAME]
       gunicorn-passenger restart|stop NAME [--app PID|NAME]

start   run an unmodified script (its last line is serve_forever(), app.run() ...) under gunicorn:
        the first server that listens becomes the one that the web server reaches, on a UNIX socket
        (-b; by default a socket in the runtime directory). With --primary PORT it is the server that
        listens on that port, and the others get ports of their own
ports   list the ports allocated to this account: which are free, and which server, daemon or process
        holds each of the others
status  show the running applications of this account: master and workers, servers, daemons, ports and
        recent events
health  exit with status 0 while each running application has a worker that serves, otherwise with 1
restart, stop
        restart or stop a daemon or a server, given by its name, address or port (--app chooses the
        application where several have one of that name)
"""

_APP = "only the application with this pid or name"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        status = _run(arguments[0] if arguments else "", arguments[1:])
        sys.stdout.flush()
        return status
    except PassengerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader (head, less) has closed the pipe; Python would report that again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(command: str, arguments: list[str]) -> int:
    commands = {"start": _start, "ports": _ports, "status": _status, "health": _health}
    if command in commands:
        return commands[command](arguments)
    if command in ("restart", "stop"):
        return _command(command, arguments)
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if command in ("-V", "--version"):
        print(f"gunicorn-passenger {__version__}")
        return 0
    problem = f"Error: unknown command {command!r}\n" if command else ""
    print(problem + _USAGE, end="", file=sys.stderr)
    return 2


def _start(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(
            "Error: start needs the script first: gunicorn-passenger start server.py [gunicorn's options]",
            file=sys.stderr,
        )
        return 2
    from gunicorn_passenger.script_runner import ScriptApplication

    # gunicorn reads sys.argv, even when it starts itself again on USR2
    ScriptApplication("gunicorn-passenger start SCRIPT [OPTIONS]", prog="gunicorn-passenger").run()
    return 0


def _ports(arguments: list[str]) -> int:
    options = _parse("ports", "List the ports allocated to this account.", arguments, "json")
    found = port_report()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        # programs and other users choose the names of what holds ports
        print("\n".join(printable(line) for line in _port_lines(found)))
    return 0


def _status(arguments: list[str]) -> int:
    text = "Show the running applications of this account."
    options = _parse("status", text, arguments, "json", "watch", "app")
    return terminal.status(options.json, options.watch, options.app)


def _health(arguments: list[str]) -> int:
    text = "Exit with status 0 while each running application has a worker that serves, otherwise with 1."
    return terminal.health_check(_parse("health", text, arguments, "app").app)


def _command(verb: str, arguments: list[str]) -> int:
    options = _parse(verb, f"{verb.capitalize()} a daemon or a server.", arguments, "name", "app")
    print(control_client.command(verb, options.name, options.app))
    return 0


def _parse(command: str, text: str, arguments: list[str], *wanted: str) -> argparse.Namespace:
    """:param wanted: the options and arguments that the command takes."""
    parser = argparse.ArgumentParser(prog=f"gunicorn-passenger {command}", description=text)
    if "name" in wanted:
        parser.add_argument(
            "name", metavar="NAME", help="its name, address or port, as 'gunicorn-passenger status' lists it"
        )
    if "json" in wanted:
        parser.add_argument("--json", action="store_true", help="print JSON")
    if "watch" in wanted:
        parser.add_argument("--watch", action="store_true", help="update every second, until Ctrl-C")
    if "app" in wanted:
        parser.add_argument("--app", default="", metavar="PID|NAME", help=_APP)
    return parser.parse_args(arguments)


def port_report() -> dict[str, Any]:
    """What ``ports`` prints: the account, its port allocation, which of those ports are taken, and by what.

    Without a port allocation, ``taken`` lists the ports that this account's own programs hold.

    :raises PassengerError: when the system's file or the environment has a value that cannot be used.
    """
    allocation = settings.operator_allocation(os.geteuid())
    listening = port_owner.listening()
    taken = set(listening)
    mine = {port for port, entries in listening.items() if any(u == os.geteuid() for _, u in entries)}
    shown = taken & allocation.ports if allocation.limited else mine
    found = port_owner.owners_of(shown)
    holders = _holders(found)
    return {
        "account": allocation.account,
        "limited": allocation.limited,
        "allocated": format_ports(allocation.ports) if allocation.limited else None,
        "set_by": [layer.source for layer in allocation.layers],
        "free": format_ports(allocation.ports - taken) if allocation.limited else None,
        "taken": [
            {
                "port": port,
                "by": owner.name or None,
                "pid": owner.pid,
                "user": owner.user,
                **holders.get(port, {"application": None, "server": None, "daemon": None}),
            }
            for port, owner in sorted(found.items())
        ],
    }


def _holders(owners: Mapping[int, port_owner.PortOwner]) -> dict[int, dict[str, str | None]]:
    """Which server or daemon of which running application has a port.

    A daemon may have opened its port itself: then it belongs to a process of the daemon's session.
    """
    found: dict[int, dict[str, str | None]] = {}
    sessions = {port: _session(owner.pid) for port, owner in owners.items() if owner.pid is not None}
    for instance in control_client.running():
        report = instance.report
        if report is None:
            continue
        held = [("server", server["name"], tcp_ports(server["address"])) for server in report["servers"]]
        for daemon in report.get("daemons", ()):
            own = {port for port, session in sessions.items() if session and session == daemon["pid"]}
            held.append(("daemon", daemon["name"], own | tcp_ports(daemon["address"] or "")))
        for kind, name, ports in held:
            holder = {"application": instance.name, "server": None, "daemon": None, kind: name}
            found |= dict.fromkeys(ports & set(owners), holder)
    return found


def _session(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


def _port_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"account    {report['account']}"]
    if report["limited"]:
        lines.append(f"allocated  {report['allocated']}  (set by {' and '.join(report['set_by'])})")
        lines.append(f"free       {report['free']}")
    else:
        lines.append("allocated  no port allocation is set: any unprivileged port is allowed")
    if not report["taken"]:
        lines.append("taken      none")
    for index, entry in enumerate(report["taken"]):
        owner = f"{entry['by']} (pid {entry['pid']}, user {entry['user']})" if entry["pid"] else entry["user"]
        for kind in ("server", "daemon"):
            if entry[kind]:
                owner = f"{kind} {entry[kind]} of {entry['application']}: {owner}"
        lines.append(f"{'taken' if index == 0 else '':9}  {entry['port']}  by {owner}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
