"""Turns a forked child of the supervisor into a daemon: its session, its descriptors, its user, its program.

Process: the child of the supervisor, between fork and exec. Never: return, or import a module, which the
daemon's user may not be able to read.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, TypedDict

from gunicorn_passenger.daemons.process_tree import KEY_VARIABLE

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


class DaemonSettings(TypedDict):
    """How the supervisor runs a daemon; the master sends it as JSON."""

    command: list[str]
    env: dict[str, str]
    cwd: str
    #: uid, gid and the list of groups; ``None`` for those of the supervisor
    ids: tuple[int, int, list[int]] | None
    #: the name of each socket (``LISTEN_FDNAMES``)
    names: list[str]
    #: seconds
    stop_timeout: float
    kill_mode: str
    #: quick exits in a row; 0 for no limit
    give_up_after: int


def prctl(option: int, value: int) -> None:
    """:raises OSError: when the kernel refuses."""
    if _libc.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0) for _ in range(3))) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def exec_daemon(
    key: str,
    settings: DaemonSettings,
    sockets: Sequence[int],
    report: int | None,
    supervisor: int,
    null: int,
    output: int,
    failure: int,
) -> NoReturn:
    """Execute the program, or report why that fails and exit.

    :param key: the supervisor's key for the daemon.
    :param report: the socket on which the daemon receives reports.
    :param supervisor: the pid of the supervisor.
    :param failure: the pipe for the reason; the kernel closes it when the program runs.
    """
    what = "cannot be started"
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        wanted = [null, output, output, *sockets]
        for fd in sockets:
            os.set_blocking(fd, True)  # whatever an earlier program has set
        env = settings["env"]
        env[KEY_VARIABLE] = key
        if sockets:
            env["LISTEN_PID"] = str(os.getpid())
            env["LISTEN_FDS"] = str(len(sockets))
            env["LISTEN_FDNAMES"] = ":".join(settings["names"])
        if report is not None:
            env["PASSENGER_REPORT_FD"] = str(len(wanted))
            wanted.append(report)
        # first to high numbers: a source may have the number of another's target
        spare = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(wanted)) for fd in wanted]
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, len(wanted))
        for place, fd in enumerate(spare):
            os.dup2(fd, place, inheritable=True)
        if settings["ids"]:
            uid, gid, groups = settings["ids"]
            what = f"cannot run as user {uid} and group {gid}"
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        what = "cannot be started"
        # after the change of user, which would clear it
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(0)
        what = f"cannot enter its directory {settings['cwd']}"
        os.chdir(settings["cwd"])
        what = f"cannot run {settings['command'][0]}"
        _exec(settings["command"], env)
    except BaseException as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        with suppress(OSError):
            os.write(failure, f"{what}: {reason}".encode()[:2000])
    finally:
        os._exit(127)


def _exec(command: list[str], env: dict[str, str]) -> NoReturn:
    """Execute the command, found in ``PATH`` as by execvp(3). ``os.execvpe`` would import modules only now.

    :raises OSError: when it cannot be run.
    """
    name = command[0]
    if "/" in name:
        os.execve(name, command, env)  # noqa: S606 - the operator or the program has named the command
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in env.get("PATH", os.defpath).split(":"):
        try:
            os.execve(f"{directory or '.'}/{name}", command, env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            failure = error  # another directory may have an executable one
    raise failure
