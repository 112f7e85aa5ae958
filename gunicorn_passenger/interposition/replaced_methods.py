"""Replaces the methods of Python's sockets by which :class:`.socket_patch.SocketPatch` learns what they do.

Process: a worker, from just after the fork; the master has only the watch for gevent.
Never: decide anything.

The two classes get the replacements from which all Python sockets derive their system calls: the standard
library's ``socket.socket`` and gevent's inner socket. So they also hold for names that were imported before.
"""

from __future__ import annotations

import _socket
import errno
import functools
import os
import socketserver
import sys
from collections.abc import Callable
from typing import Any

from gunicorn_passenger.interposition import inet_facade
from gunicorn_passenger.interposition.own_fds import keep_spare
from gunicorn_passenger.interposition.socket_options import FOREVER, keep_nonblocking
from gunicorn_passenger.interposition.socket_patch import SocketPatch
from gunicorn_passenger.serving.registry import ServerRegistry
from gunicorn_passenger.system.import_watch import call_when_imported

_installed: list[SocketPatch] = []
_gevents_replaced: list[bool] = []


def install(registry: ServerRegistry, inherited: set[int]) -> SocketPatch:
    """Replace the calls in this process.

    :param inherited: inodes of the sockets on which the master listened at the fork.
    """
    keep_spare()
    patch = SocketPatch(registry, inherited)
    if not _installed:
        os.register_at_fork(after_in_child=_after_fork_in_child)
        _installed.append(patch)
        _replace(inet_facade.NATIVE)
        _replace_gevents()
        _never_wait_after_a_selector()
        for name in ("serve_forever", "handle_request"):
            _notice_waiting(name)
    _installed[:] = [patch]
    return patch


def _after_fork_in_child() -> None:
    _installed[0].leased.after_fork_in_child()


def _replace(cls: Any) -> None:
    _replace_calls(cls)
    _replace_connection_calls(cls)


def watch_gevent() -> None:
    """Notice in a worker that the program imports gevent, which it may have patch a worker of another class.

    Called in the master: in a worker it would copy memory that both share.
    """
    call_when_imported("gevent._socket3", _replace_gevents)


def _replace_gevents() -> None:
    gevents: Any = sys.modules.get("gevent._socket3")
    if gevents is not None and _installed and not _gevents_replaced:
        _gevents_replaced.append(True)
        _replace(gevents._wrefsocket)
        _notice_deferred_closes(gevents)


def _notice_deferred_closes(gevents: Any) -> None:
    """gevent may close a descriptor in its next loop iteration; for the program the socket is closed now."""
    close_later = gevents.socket._drop_events_and_close

    def _drop_events_and_close(self: Any, closefd: bool = True, *args: Any) -> None:
        if closefd:
            _installed[0].leased.on_deferred_close(_socket.socket.fileno(self._sock))
        close_later(self, closefd, *args)

    gevents.socket._drop_events_and_close = _drop_events_and_close


def _never_wait_after_a_selector() -> None:
    """Let socketserver's ``accept`` fail where a sibling was faster; socketserver ignores that OSError.

    It accepts when its selector reports a connection. A server that waited for the next one could not be
    shut down.
    """
    accept = socketserver.TCPServer.get_request

    def get_request(self: Any) -> Any:
        if not _installed[0].leased.has(self.socket.fileno()):
            return accept(self)
        before = self.socket.gettimeout()
        self.socket.settimeout(0.0)
        try:
            return accept(self)
        finally:
            self.socket.settimeout(before)

    socketserver.TCPServer.get_request = get_request  # type: ignore[method-assign]


def _notice_waiting(name: str) -> None:
    """Notice that socketserver waits in its selector; it calls ``accept`` only when there is a connection."""
    wait = getattr(socketserver.BaseServer, name)

    @functools.wraps(wait)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (entry := _installed[0].leased.find(self.fileno())) is not None:
            entry.accepts = True
        return wait(self, *args, **kwargs)

    setattr(socketserver.BaseServer, name, waiting)


def _set_method(cls: Any, function: Callable[..., Any]) -> None:
    function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
    setattr(cls, function.__name__, function)


def _replace_connection_calls(cls: Any) -> None:
    def connect(self: Any, address: Any) -> None:
        if not _installed[0].connect(self, address):
            _socket.socket.connect(self, address)

    def connect_ex(self: Any, address: Any) -> int:
        try:
            if _installed[0].connect(self, address):
                return 0
        except OSError as error:
            return error.errno or errno.ECONNREFUSED
        return _socket.socket.connect_ex(self, address)

    def shutdown(self: Any, how: int) -> None:
        if not _installed[0].shutdown(self):
            _socket.socket.shutdown(self, how)

    for function in (connect, connect_ex, shutdown):
        _set_method(cls, function)


def _accept_nonblocking(sock: Any) -> tuple[int, Any]:
    """``accept`` as the program asks for it, on a socket whose description does not block."""
    while True:
        try:
            return _socket.socket._accept(sock)  # type: ignore[attr-defined, no-any-return]
        except BlockingIOError:
            # a blocking copy that was made after listen(), and that does not poll yet
            if _socket.socket.gettimeout(sock) is not None or not _installed[0].leased.has(sock.fileno()):
                raise
            keep_nonblocking(sock)


def _replace_calls(cls: Any) -> None:
    def bind(self: Any, address: Any) -> None:
        if not _installed[0].bind(self, address):
            _socket.socket.bind(self, address)

    def listen(self: Any, *args: int) -> None:
        if not _installed[0].listen(self, args[0] if args else 128):
            _socket.socket.listen(self, *args)

    def _accept(self: Any) -> tuple[int, Any]:
        leased = _installed[0].leased
        entry = leased.on_accept_call(_socket.socket.fileno(self))
        try:
            fd, peer = _accept_nonblocking(self)
            leased.on_accept(entry, fd)
        finally:
            leased.connections.on_accept_end()
        if not isinstance(peer, tuple) and self.family in inet_facade.INET:
            peer = leased.connections.client_address(fd, self.family)
        return fd, peer

    def getsockname(self: Any) -> Any:
        return _installed[0].sockname(self, _socket.socket.getsockname(self))

    def settimeout(self: Any, value: Any) -> None:
        if value is None and _installed[0].leased.has(_socket.socket.fileno(self)):
            value = FOREVER  # the description that the siblings share must never block
        _socket.socket.settimeout(self, value)

    def setblocking(self: Any, flag: bool) -> None:
        settimeout(self, None if flag else 0.0)

    # gevent's inner socket is closed by close(), the standard library's by _real_close()
    if cls is inet_facade.NATIVE:
        real_close = cls._real_close

        def _real_close(self: Any, *args: Any, **kwargs: Any) -> None:
            _installed[0].on_close(_socket.socket.fileno(self))
            real_close(self, *args, **kwargs)

        cls._real_close = _real_close
        cls.settimeout = settimeout
        cls.setblocking = setblocking
    else:

        def close(self: Any) -> None:
            _installed[0].on_close(_socket.socket.fileno(self))
            _socket.socket.close(self)

        cls.close = close
    for function in (bind, listen, getsockname, _accept):
        _set_method(cls, function)
