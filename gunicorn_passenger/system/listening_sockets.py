"""Opens listening sockets, removes their files, and lists the listening sockets of this process.

Process: the master, and plain Python; a worker gets its sockets from the master and only lists them.
Never: block, or decide whether a port is allowed.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gunicorn_passenger import errors
from gunicorn_passenger.config import listen_errors
from gunicorn_passenger.config.address import SockAddr, format_tcp
from gunicorn_passenger.system import port_owner, procfs


def open_tcp(family: int, host: str, port: int, backlog: int, v6only: bool = False) -> _socket.socket:
    """A TCP socket that listens on a numeric host; port 0 lets the kernel choose.

    :raises errors.PortInUse: names the process that has the port, where the system tells.
    :raises errors.ListenError: when the kernel refuses for another reason.
    """
    sock = open_tcp_if_free(family, host, port, backlog, v6only)
    if sock is None:
        raise listen_errors.in_use(format_tcp(host, port), port_owner.describe_owner(port, host))
    return sock


def open_tcp_if_free(
    family: int, host: str, port: int, backlog: int, v6only: bool = False
) -> _socket.socket | None:
    """As :func:`open_tcp`, but ``None`` when the port is in use.

    The search for the process that has a port reads all of /proc: a caller that tries many ports does not
    need it.
    """
    sock = None
    try:
        sock = _socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind((host, port))
        sock.listen(backlog)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise listen_errors.cannot_open(format_tcp(host, port), error) from None
    return sock


def listener_of(fd: int, host: str, port: int) -> _socket.socket:
    """A copy of a TCP socket that another process has opened, if it listens on this numeric address.

    :raises errors.ListenError: when it does not.
    """
    sock = _socket.socket(fileno=os.dup(fd))
    with suppress(OSError):
        if is_tcp_listener(sock) and sock.getsockname()[:2] == (host, port):
            return sock
    sock.close()
    raise listen_errors.bad_address(format_tcp(host, port), "the socket of the worker does not listen there")


def open_unix(path: str, mode: int, backlog: int) -> _socket.socket:
    """A UNIX socket that listens at an absolute path; the file of a server that has exited is replaced.

    :param mode: of the socket's file; a user that may write the file may connect (unix(7)).
    :raises errors.PortInUse: when another socket listens there.
    :raises errors.ListenError: when there is a file that is not a socket, or the kernel refuses.
    """
    sock = None
    try:
        _clear_stale(path)
        sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The file gets the mode of the socket's own inode without the bits of the process's umask, which
        # other threads use: so it is never too open, and the missing bits are set afterwards.
        os.fchmod(sock.fileno(), mode)
        sock.bind(path)
        with _own_file(path) as (file, info):
            if stat.S_IMODE(info.st_mode) != mode:
                os.chmod(file, mode)
        sock.listen(backlog)
    except OSError as error:
        if sock is not None:
            sock.close()
        if isinstance(error, errors.ListenError):
            raise
        raise listen_errors.cannot_open(f"unix:{path}", error) from None
    return sock


@contextmanager
def _own_file(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """The file of a socket that this process has just bound, by a name that no other user can redirect.

    A user that may write to the directory could have replaced the file with a symbolic or hard link to a file
    of this user's, or of root's. So the file is opened without following a link, checked, and then named by
    its descriptor.

    :raises OSError: (``EPERM``) when it is not a socket of this user's with this name only.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid() or info.st_nlink != 1:
            raise PermissionError(errno.EPERM, "the socket's file was replaced by another file")
        yield f"/proc/self/fd/{fd}", info
    finally:
        os.close(fd)


def give(path: str, uid: int, gid: int) -> None:
    """Give the file of a socket that this process has just bound to another user.

    :raises OSError: when the system refuses, or the file was replaced.
    """
    with _own_file(path) as (file, _):
        os.chown(file, uid, gid)


def remove(path: str, file: tuple[int, int] | None) -> None:
    """Remove the file of a socket, if it is still the one of ``file`` (see :func:`inode_id`).

    Both steps use one open directory, so renaming it in between has no effect.
    """
    with suppress(OSError, ValueError):
        directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            name = os.path.basename(path)
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if (info.st_dev, info.st_ino) == file:
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)


def inode_id(path: str) -> tuple[int, int] | None:
    """Device and inode of a file, so that only our own is removed later."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino


def _clear_stale(path: str) -> None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise listen_errors.unix_not_a_socket(path)
    if has_listener(path):
        raise listen_errors.in_use(f"unix:{path}", "another program")
    remove(path, (info.st_dev, info.st_ino))


def has_listener(path: str) -> bool:
    """Whether a process listens on a UNIX socket; never waits.

    A full backlog (EAGAIN) also has a listener; with ECONNREFUSED the socket has no listener (connect(2)).
    """
    probe = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)
    finally:
        probe.close()


def is_tcp_listener(sock: _socket.socket) -> bool:
    tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    return tcp and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@contextmanager
def borrowed_socket(fd: int) -> Iterator[_socket.socket]:
    """A socket object for a descriptor that stays the caller's; a copy would need another descriptor.

    :raises OSError: when it is closed, or not a socket.
    """
    sock = _socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def own_listeners() -> dict[int, SockAddr]:
    """The listening TCP sockets of this process: inode -> address."""
    found: dict[int, SockAddr] = {}
    for fd in procfs.own_descriptors():
        with suppress(OSError):
            info = os.fstat(fd)
            if stat.S_ISSOCK(info.st_mode):
                with borrowed_socket(fd) as sock:
                    if is_tcp_listener(sock):
                        found[info.st_ino] = sock.getsockname()
    return found
