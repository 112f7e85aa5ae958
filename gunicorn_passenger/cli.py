"""The command line: ``gunicorn-passenger start``, ``ports``, ``status``, ``restart`` and ``stop``.

Process: the command line; ``start`` becomes the gunicorn master. Never: show a traceback for an error that
the user can correct.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from gunicorn_passenger._version import __version__
from gunicorn_passenger.config.port_allocation import format_ports
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.errors import PassengerError
from gunicorn_passenger.status import control_client, terminal
from gunicorn_passenger.system import port_owner
from gunicorn_passenger.system.text import printable

_USAGE = """usage: gunicorn-passenger start SCRIPT [gunicorn's options]
       gunicorn-passenger ports [--json]
       gunicorn-passenger status [--json] [--watch]
       gunicorn-passenger restart|stop NAME [--app PID|NAME]

start   run an unmodified script (its last line is serve_forever(), app.run() ...) under gunicorn:
        the first server that listens becomes the one that the web server reaches, on a UNIX socket
        (-b; by default a socket in the runtime directory)
ports   list the ports allocated to this account: which are free, and which process holds each of the others
status  show the running applications of this account: master and workers, servers, daemons, ports and
        recent events
restart, stop
        restart or stop a daemon or a server, by its name (--app chooses the application where several
        have one of that name)
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else ""
    try:
        if command == "start":
            return _start(arguments[1:])
        if command == "ports":
            return _ports(arguments[1:])
        if command == "status":
            return _status(arguments[1:])
        if command in ("restart", "stop"):
            return _command(command, arguments[1:])
    except PassengerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
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

    # gunicorn reads sys.argv, also when it starts itself again on USR2
    ScriptApplication("gunicorn-passenger start SCRIPT [OPTIONS]", prog="gunicorn-passenger").run()
    return 0


def _ports(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gunicorn-passenger ports", description="List the ports allocated to this account."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = port_report()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        # other users choose the names of the processes that hold ports
        print("\n".join(printable(line) for line in _port_lines(found)))
    return 0


def _status(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gunicorn-passenger status", description="Show the running applications of this account."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", action="store_true", help="update every second, until Ctrl-C")
    options = parser.parse_args(arguments)
    return terminal.status(options.json, options.watch)


def _command(verb: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"gunicorn-passenger {verb}", description=f"{verb.capitalize()} a daemon or a server."
    )
    parser.add_argument("name", metavar="NAME", help="as 'gunicorn-passenger status' lists it")
    parser.add_argument(
        "--app", default="", metavar="PID|NAME", help="the application, where several use that name"
    )
    options = parser.parse_args(arguments)
    print(control_client.command(verb, options.name, options.app))
    return 0


def port_report() -> dict[str, Any]:
    """What ``ports`` prints: the account, its port allocation, and which of those ports are taken.

    Without a port allocation, ``taken`` lists the ports that this account's own programs hold.

    :raises PassengerError: when the system's file or the environment has a value that cannot be used.
    """
    allocation = settings.operator_allocation(os.geteuid())
    listening = port_owner.listening()
    taken = set(listening)
    mine = {port for port, entries in listening.items() if any(u == os.geteuid() for _, u in entries)}
    shown = taken & allocation.ports if allocation.limited else mine
    found = port_owner.owners_of(shown)
    return {
        "account": allocation.account,
        "limited": allocation.limited,
        "allocated": format_ports(allocation.ports) if allocation.limited else None,
        "set_by": [layer.source for layer in allocation.layers],
        "free": format_ports(allocation.ports - taken) if allocation.limited else None,
        "taken": [
            {"port": port, "by": owner.name or None, "pid": owner.pid, "user": owner.user}
            for port, owner in sorted(found.items())
        ],
    }


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
        lines.append(f"{'taken' if index == 0 else '':9}  {entry['port']}  by {owner}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
