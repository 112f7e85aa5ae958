"""Resolves the host names of targets, each name by itself.

Process: any process in which the proxy is mounted; each look-up runs in a native thread of its own.
Never: let a name whose name server is silent delay the connections to other targets.

The system's resolver blocks its thread for many seconds when a name server does not respond. gevent asks
it in ten threads that the whole worker shares, so a few requests for such a name would stop all others.
"""

from __future__ import annotations

import _socket
import contextlib
import socket
import time
from typing import Any, NamedTuple

from gunicorn_passenger.errors import UpstreamRefused
from gunicorn_passenger.system import unpatched

#: Seconds for which the addresses of a name are used without another look-up.
_FRESH = 5.0
#: Seconds for which they are used while another look-up is under way, or fails.
_USABLE = 60.0
#: The most look-ups at a time, each of another name.
_MAX_LOOKUPS = 64
#: How many names are remembered.
_MAX_NAMES = 1024


class Address(NamedTuple):
    """Where a TCP connection can be made to."""

    family: int
    #: as ``connect()`` takes it
    sockaddr: tuple[Any, ...]


class _Name:
    """What is known of one host name."""

    __slots__ = ("addresses", "done", "error", "found_at")

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        #: when they were found, on the monotonic clock
        self.found_at = float("-inf")
        #: why the last look-up has failed
        self.error: OSError | None = None
        #: the end of the look-up that is under way
        self.done: Any = None


class Resolver:
    """The host names that the connections of one runtime lead to."""

    def __init__(self, runtime: Any) -> None:
        """
        :param runtime: how the callers wait.
        """
        self._runtime = runtime
        self._names: dict[str, _Name] = {}
        self._lock = runtime.lock()

    def addresses(self, host: str, port: int, seconds: float) -> list[Address]:
        """The addresses of a host, in the order in which the system prefers them.

        :param host: a name, or an address, which needs no look-up.
        :param seconds: how long a look-up may take for this caller.
        :raises TimeoutError: when it takes longer.
        :raises socket.gaierror: when the name has no address.
        :raises UpstreamRefused: when too many look-ups are under way.
        """
        with contextlib.suppress(socket.gaierror, UnicodeError):
            return _with_port(_look_up(host, socket.AI_NUMERICHOST), port)
        with self._lock:
            name = self._names.get(host) or self._add(host)
            age = time.monotonic() - name.found_at
            if age > _FRESH and name.done is None:
                self._start(host, name, age <= _USABLE)
            if age <= _USABLE:
                return _with_port(name.addresses, port)
            done = name.done
        if not done.wait(max(seconds, 0.001)):
            raise TimeoutError
        if name.error is not None:
            raise name.error
        return _with_port(name.addresses, port)

    def expire(self, host: str) -> None:
        """Look this name up before long: none of its addresses can be connected to."""
        name = self._names.get(host)
        if name is not None:
            name.found_at = min(name.found_at, time.monotonic() - _FRESH)

    def _add(self, host: str) -> _Name:
        if len(self._names) >= _MAX_NAMES:
            # a target function may return new names without end
            self._names = {key: name for key, name in self._names.items() if name.done is not None}
        return self._names.setdefault(host, _Name())

    def _start(self, host: str, name: _Name, usable: bool) -> None:
        """Start a look-up.

        :param usable: whether the addresses of the last one will do meanwhile.
        """
        if sum(other.done is not None for other in self._names.values()) >= _MAX_LOOKUPS:
            if usable:
                return
            raise UpstreamRefused(
                f"its host name was not looked up: {_MAX_LOOKUPS} look-ups of other names are under way"
            )
        name.done = self._runtime.event()

        def in_native_thread() -> None:
            addresses: list[Address] = []
            error: OSError | None = None
            try:
                addresses = _look_up(host)
            except OSError as failure:
                error = failure
            except Exception as failure:  # such as a name that IDNA cannot encode
                error = socket.gaierror(socket.EAI_NONAME, str(failure))
            self._runtime.call_from_thread(self._finish, name, addresses, error)

        try:
            unpatched.start_thread(in_native_thread)
        except RuntimeError as error:
            name.done = None
            if not usable:
                raise UpstreamRefused(f"its host name was not looked up: {error}") from None

    def _finish(self, name: _Name, addresses: list[Address], error: OSError | None) -> None:
        """Called where the callers run, in the hub or with the lock."""
        with self._lock:
            if addresses:
                name.addresses, name.found_at = addresses, time.monotonic()
            name.error = error
            done, name.done = name.done, None
        done.set()


def _look_up(host: str, flags: int = 0) -> list[Address]:
    found = _socket.getaddrinfo(host, 0, 0, socket.SOCK_STREAM, 0, flags)
    return [Address(family, sockaddr) for family, _, _, _, sockaddr in found]


def _with_port(addresses: list[Address], port: int) -> list[Address]:
    return [Address(family, (name[0], port, *name[2:])) for family, name in addresses]
