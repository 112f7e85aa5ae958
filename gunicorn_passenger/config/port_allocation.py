"""The port allocation: which ports an account may listen on, from which sources.

Process: the master, which decides, and plain Python; a worker, which refuses what its program does not allow;
and the command line, which only reads. Never: open a port, or let a source widen
what an earlier one allows.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import sys
from collections.abc import Iterable

from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.record import Record
from gunicorn_passenger.errors import SettingError

#: The system's file: account -> ports. Read by the master; never taken from the environment,
#: or an account could name a file of its own.
SYSTEM_FILE = "/etc/gunicorn-passenger/ports.toml"

_MAX_SYSTEM_FILE = 1 << 20

Ports = frozenset[int]


def parse_ports(value: object, where: str) -> Ports:
    """Read a set of ports.

    :param value: ``"9000-9019,9100"``, a number, or an iterable of these; an empty string is
        the empty set.
    :param where: names the source in the error.
    :raises SettingError: says which part cannot be read.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return frozenset(_range(str(value), str(value), where, 1))
    if isinstance(value, str):
        if not value.strip():
            return frozenset()
        parts = value.split(",")
        ranges = sorted({_range(p, value, where, i) for i, p in enumerate(parts, 1)}, key=_ends)
        found: list[int] = []
        for each in ranges:
            # overlapping ranges count once: a worker may send many of them
            found.extend(range(max(each.start, found[-1] + 1 if found else 0), each.stop))
        return frozenset(found)
    if isinstance(value, Iterable) and not isinstance(value, bytes | dict):
        return frozenset().union(*(parse_ports(item, where) for item in value))
    raise SettingError(f"{where}: {value!r} is not a set of ports; write it as '9000-9019,9100'")


def _ends(ports: range) -> tuple[int, int]:
    return ports.start, ports.stop


def _range(part: str, whole: str, where: str, index: int) -> range:
    first, dash, last = (p.strip() for p in part.partition("-"))
    ends = (first, last) if dash else (first, first)
    if not all(e.isascii() and e.isdigit() and len(e) <= 20 for e in ends):
        raise SettingError(
            f"{where}: cannot read {part.strip()!r} (item {index} of {whole!r}) as a port or a range; "
            "write ports as '9000-9019,9100'"
        )
    low, high = (int(e) for e in ends)
    if not (1 <= low <= 65535 and 1 <= high <= 65535):
        raise SettingError(f"{where}: {part.strip()!r} (item {index} of {whole!r}) is outside 1-65535")
    if low > high:
        raise SettingError(
            f"{where}: {part.strip()!r} (item {index} of {whole!r}) runs backwards; write "
            "the lower port first"
        )
    return range(low, high + 1)


def format_ports(ports: Iterable[int]) -> str:
    """``"9000-9019,9100"``; ``"none"`` for an empty set."""
    runs: list[list[int]] = []
    for port in sorted(ports):
        if runs and port == runs[-1][1] + 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) or "none"


class AllocationSource(Record):
    """One source of the port allocation, and how the operator changes it."""

    ports: Ports
    source: str
    remedy: str


class PortAllocation(Record):
    """The ports that an account may listen on: the intersection of all sources.

    The sources are in order, from the strongest (the system's file) to the weakest (the program). Each can
    narrow what the previous ones allow, and none can widen it.
    """

    account: str
    layers: tuple[AllocationSource, ...] = ()

    @property
    def limited(self) -> bool:
        """Whether any source is set."""
        return bool(self.layers)

    @property
    def ports(self) -> Ports:
        """The allocated ports; meaningful when :attr:`limited`."""
        if not self.layers:
            return frozenset()
        return frozenset.intersection(*(layer.ports for layer in self.layers))

    @property
    def sources(self) -> str:
        return " and ".join(layer.source for layer in self.layers) or "nothing"

    def narrowed(self, layer: AllocationSource | None) -> PortAllocation:
        """This port allocation with another source."""
        return PortAllocation(self.account, (*self.layers, layer)) if layer else self

    def check(self, port: int) -> None:
        """Refuse a port that is not allocated.

        Without a port allocation, every unprivileged port is allowed. A privileged port is not, even where
        the master runs as root.

        :raises errors.PortNotAllocated: names the port, the port allocation, where it was set, what to do.
        """
        if not self.layers:
            first = first_unprivileged_port()
            if port < first:
                raise listen_errors.privileged(port, first, self.account)
            return
        for layer in self.layers:
            if port not in layer.ports:
                raise listen_errors.not_allocated(
                    port, self.account, format_ports(self.ports), layer.source, layer.remedy
                )

    def ineffective_ports(self) -> list[str]:
        """One sentence for each source that names ports which an earlier one does not allow."""
        found = []
        for index, layer in enumerate(self.layers[1:], 1):
            given = frozenset.intersection(*(earlier.ports for earlier in self.layers[:index]))
            if beyond := layer.ports - given:
                found.append(
                    f"{layer.source} names ports {format_ports(beyond)}, which {self.layers[0].source} does "
                    f"not allocate to account {self.account}; these ports are refused"
                )
        return found


def first_unprivileged_port() -> int:
    """The first port that needs no privilege (``net.ipv4.ip_unprivileged_port_start``)."""
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024


def account_name(uid: int) -> str:
    """The account's name, or its number where the system has no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def system_layer(account: str, uid: int, path: str = SYSTEM_FILE) -> AllocationSource | None:
    """What the system's file allocates to an account.

    The file maps accounts to ports, at its top level or in a table ``[accounts]``; an account
    is a name or a number in quotes::

        alice = "9000-9019,9100"
        bob = ["9200-9209", 9300]

    An account that is not in an existing file has no ports.

    :returns: ``None`` where the file does not exist.
    :raises SettingError: when root does not own it, others may write it, or it cannot be read.
    """
    text = _read_trusted(path)
    if text is None:
        return None
    # imported late: most machines have no such file, and every worker would keep the parser in memory
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{path}: not valid TOML: {error}") from None
    if isinstance(table.get("accounts"), dict):
        table = {**table, **table["accounts"]}
    for name, value in table.items():
        if not isinstance(value, dict):
            parse_ports(value, f"{path}, account {name}")
    value = table.get(account, table.get(str(uid), ""))
    return AllocationSource(
        parse_ports(value, f"{path}, account {account}"), path, f"ask root to add it to {path}"
    )


def _read_trusted(path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        above = os.path.dirname(path)
        if os.path.lexists(path) or (os.path.lexists(above) and not os.path.isdir(above)):
            raise SettingError(f"{path}: a link on this path has no target; correct or remove it") from None
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SettingError(
                f"{path}: is a symbolic link, which is not followed; put the file itself there "
                f"(cp --remove-destination {os.path.realpath(path)} {path})"
            ) from None
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise SettingError(f"{path}: is not a regular file")
    with open(fd, "rb") as file:
        if info.st_uid != 0:
            raise SettingError(
                f"{path}: is owned by {account_name(info.st_uid)}, but must be owned by root "
                f"(chown root {path})"
            )
        if info.st_mode & 0o022:
            raise SettingError(
                f"{path}: has mode {stat.S_IMODE(info.st_mode):04o}, but only root may write it "
                f"(chmod go-w {path})"
            )
        if info.st_size > _MAX_SYSTEM_FILE:
            raise SettingError(f"{path}: is larger than {_MAX_SYSTEM_FILE} bytes")
        try:
            return file.read(_MAX_SYSTEM_FILE).decode()
        except UnicodeDecodeError as error:
            raise SettingError(f"{path}: not valid UTF-8: {error.reason} at byte {error.start}") from None
