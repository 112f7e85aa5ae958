"""Which process holds a port, where the system tells.

Process: the master (for the text of an error) and the command line. Never: decide anything; the kernel may
hide the descriptors of another user's processes.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

from gunicorn_passenger.config.port_allocation import account_name
from gunicorn_passenger.config.record import Record
from gunicorn_passenger.system import procfs

#: States in /proc/net/tcp (proc(5)); the second is that of a connection which its listener has yet to accept.
_LISTEN, _SYN_RECV = "0A", "03"


class PortOwner(Record):
    """The process that holds a port, or only its user where the kernel hides the process."""

    pid: int | None
    name: str
    user: str

    def __str__(self) -> str:
        if self.pid is None:
            return f"a program of user {self.user}"
        return f"{self.name} (pid {self.pid}, user {self.user})"


def listening(host: str = "") -> dict[int, list[tuple[int, int]]]:
    """Port -> (inode, uid) of every TCP socket that listens on this machine.

    :param host: only sockets that a bind to this numeric host would collide with.
    """
    table: dict[int, list[tuple[int, int]]] = {}
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path, encoding="ascii") as file:
                next(file, "")
                for line in file:
                    fields = line.split()
                    if len(fields) <= 9 or fields[3] not in (_LISTEN, _SYN_RECV):
                        break  # the kernel lists listening sockets before connections: there may be very many
                    local, _, number = fields[1].rpartition(":")
                    if fields[3] == _LISTEN and (not host or _collide(host, _host(local))):
                        table.setdefault(int(number, 16), []).append((int(fields[9]), int(fields[7])))
        except OSError:
            continue
    return table


def _host(text: str) -> str:
    """The address of /proc/net/tcp: words of 32 bits in the machine's order, in hexadecimal."""
    words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _collide(one: str, other: str) -> bool:
    """Whether two binds to the same port collide: equal hosts, or one of them is unspecified (tcp(7))."""
    a, b = ipaddress.ip_address(one), ipaddress.ip_address(other)
    if a.version == b.version:
        return a == b or a.is_unspecified or b.is_unspecified
    return (a if a.version == 6 else b).is_unspecified  # "::" takes IPv4 as well


def _sockets(pid: int) -> Iterator[int]:
    directory = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(directory)
    except OSError:
        return
    for number in numbers:
        with suppress(OSError, ValueError):
            target = os.readlink(f"{directory}/{number}")
            if target.startswith("socket:["):
                yield int(target[8:-1])


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "a program"


def owners_of(ports: set[int], host: str = "") -> dict[int, PortOwner]:
    """The owner of each of ``ports`` that is taken; the lowest pid where several processes share it."""
    taken = {port: entries for port, entries in listening(host).items() if port in ports}
    wanted = {inode: port for port, entries in taken.items() for inode, _ in entries}
    found: dict[int, PortOwner] = {}
    if wanted:
        for pid in sorted(procfs.pids()):
            for inode in _sockets(pid):
                port = wanted.get(inode)
                if port is not None and port not in found:
                    found[port] = PortOwner(pid, _name(pid), account_name(taken[port][0][1]))
            if len(found) == len(taken):
                break
    for port, entries in taken.items():
        found.setdefault(port, PortOwner(None, "", account_name(entries[0][1])))
    return found


def describe_owner(port: int, host: str = "") -> str:
    """One phrase for an error: ``nginx (pid 17, user www-data)`` or ``another program``."""
    try:
        owner = owners_of({port}, host).get(port)
    except (OSError, ValueError):
        owner = None
    return str(owner) if owner else "another program"
