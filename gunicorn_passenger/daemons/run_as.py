"""The user and the groups that a daemon runs as.

Process: the master, plain Python. Never: give a daemon of the application other rights than the workers'.
"""

from __future__ import annotations

import grp
import os
import pwd
from typing import NamedTuple

from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.daemons import daemon_errors
from gunicorn_passenger.daemons.spec import DaemonSpec


class RunAs(NamedTuple):
    """The user and the groups of a daemon."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @property
    def changes(self) -> bool:
        """Whether they differ from this process's own."""
        return (self.uid, self.gid) != (os.geteuid(), os.getegid())

    @property
    def user(self) -> str:
        return account_name(self.uid)

    def environment(self) -> dict[str, str]:
        """The variables that describe the user to a program."""
        try:
            entry = pwd.getpwuid(self.uid)
        except KeyError:
            return {"HOME": "/"}
        return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}


def resolve_run_as(spec: DaemonSpec, uid: int, gid: int, initgroups: bool, trusted: bool) -> RunAs:
    """Resolve the user and the group of a spec.

    :param uid: the workers' user, ``gid`` their group.
    :param initgroups: whether workers have all groups of their user.
    :param trusted: whether the operator requests it, and so may name any user that this process can become.
    :raises errors.DaemonError: when the user does not exist, or the daemon may not run as that user.
    """
    user, primary = _user(spec, uid)
    group = _group(spec, gid if user == uid or primary is None else primary)
    if not trusted and (user, group) != (uid, gid):
        raise daemon_errors.other_user(spec.name, spec.user or spec.group, account_name(uid))
    if (user, group) != (os.geteuid(), os.getegid()) and os.geteuid() != 0:
        raise daemon_errors.cannot_switch_user(spec.name, account_name(user), account_name(os.geteuid()))
    groups: tuple[int, ...] = (group,)
    if initgroups or (spec.user and trusted):
        groups = tuple(os.getgrouplist(account_name(user), group))
    return RunAs(user, group, groups)


def _user(spec: DaemonSpec, uid: int) -> tuple[int, int | None]:
    """The user's id, and its primary group where the system knows one."""
    if not spec.user:
        return uid, None
    try:
        entry = pwd.getpwuid(int(spec.user)) if spec.user.isdecimal() else pwd.getpwnam(spec.user)
    except (KeyError, OverflowError):
        if not spec.user.isdecimal() or int(spec.user) >= 1 << 32:
            raise daemon_errors.no_account(spec.name, "user", spec.user) from None
        return int(spec.user), None
    return entry.pw_uid, entry.pw_gid


def _group(spec: DaemonSpec, gid: int) -> int:
    if not spec.group:
        return gid
    if spec.group.isdecimal() and int(spec.group) < 1 << 32:
        return int(spec.group)
    try:
        return grp.getgrnam(spec.group).gr_gid
    except KeyError:
        raise daemon_errors.no_account(spec.name, "group", spec.group) from None
