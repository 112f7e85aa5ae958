"""Finds mistakes of a deployment that gunicorn reports late, or not at all.

Process: the master, before gunicorn opens its sockets. Never: end a start that may succeed,
or change anything.

Each line names the page that says more.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

from gunicorn_passenger.config.gunicorn_types import Log
from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.system.peer_credentials import peercred

_COMM = Path("/proc/1/comm")
_SHELLS = frozenset({"sh", "dash", "bash", "ash"})
#: each configuration is read again in a reload, when the sockets are open
_checked: set[object] = set()


def check(cfg: Any, log: Log) -> None:
    """Log what will go wrong with this configuration.

    :param log: the logger of gunicorn's errors.
    :raises SettingError: where gunicorn would end with a traceback.
    """
    # with either of them, gunicorn gets its sockets from systemd or from the previous master
    if not os.environ.keys() & {"LISTEN_FDS", "GUNICORN_FD"}:
        for address in cfg.address:
            # the path of a UNIX socket; others are a tuple or a descriptor
            if isinstance(address, str) and address not in _checked:
                _checked.add(address)
                _check_unix_socket(os.path.abspath(address), log)
    directory = cfg.worker_tmp_dir
    if directory and not os.path.isdir(directory):
        raise SettingError(
            f"the directory {directory} of --worker-tmp-dir does not exist; mount it (docker run --tmpfs "
            f"{directory}), or omit the option (docs/how-to/debugging.md)"
        )
    if not cfg.daemon and "shell" not in _checked:
        _checked.add("shell")
        _check_first_process(log)


def _check_unix_socket(path: str, log: Log) -> None:
    directory, account = os.path.dirname(path), account_name(os.geteuid())
    remedy = f"use systemd's RuntimeDirectory=, or 'install -d -o {account} -m 0750 {directory}' as root"
    if not os.path.isdir(directory):
        why = f"the directory {directory} does not exist; {remedy}"
    elif not os.access(directory, os.W_OK | os.X_OK):
        why = f"{account} cannot write to {directory}; {remedy}"
    elif os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        why = "the path exists and is not a socket; remove the file, or use another path"
    else:
        _warn_if_served(path, log)
        return
    log.error(
        "gunicorn cannot open the socket %s: %s: docs/how-to/debugging.md",
        path,
        why,
    )


def _warn_if_served(path: str, log: Log) -> None:
    """gunicorn removes a socket's file without asking, even if another process serves it."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        if client.connect_ex(path) not in (0, errno.EAGAIN):
            return
        pid = peercred(client).pid
    log.warning(
        "Another process (pid %s) serves the socket %s. gunicorn takes its place, and the other process gets "
        "no more clients. Stop the other process, or give each gunicorn its own path: "
        "docs/how-to/debugging.md",
        pid or "unknown",
        path,
    )


def _check_first_process(log: Log) -> None:
    """In a container whose first process is a shell, gunicorn gets no signals, and zombies stay."""
    if os.getpid() == 1 or os.getppid() != 1:
        return
    name = _COMM.read_text().strip()
    if name in _SHELLS:
        log.warning(
            "Process 1 is %s, which does not forward signals or reap orphaned processes: the runtime kills "
            "gunicorn when the container stops. Start gunicorn with exec: docs/how-to/debugging.md",
            name,
        )
