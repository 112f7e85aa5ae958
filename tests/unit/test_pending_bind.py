"""What becomes of a bind, in a process that is short of something, or asks for two ports at a time."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from gunicorn_passenger.interposition import pending_bind as module
from gunicorn_passenger.interposition.pending_bind import BindLocks, PendingBind, PendingBinds, pending_bind


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def _pending(sock: socket.socket) -> PendingBind:
    return pending_bind(sock, sock.getsockname())


def test_without_the_file_in_memory_no_port_has_an_owner() -> None:
    locks = BindLocks()
    assert locks.acquire(9000)
    assert locks.owner(9000) == 0


def test_a_port_is_recognized_as_a_lock_when_the_process_has_no_descriptor_left(sock: socket.socket) -> None:
    became_locks: list[PendingBind] = []
    binds = PendingBinds(lambda _: None, became_locks.append)
    bind = _pending(sock)
    bind.since = time.monotonic() - 3600
    binds.add(bind)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert not binds.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert became_locks == [bind]
    assert sock.getsockname()[1] == bind.port  # its descriptor is still open


def test_a_socket_is_shared_once_by_two_checks_at_a_time(sock: socket.socket) -> None:
    shared: list[PendingBind] = []

    def share(bind: PendingBind) -> None:
        binds.take(bind)
        shared.append(bind)
        binds.check()  # while the master is asked for a port, another greenlet checks

    binds = PendingBinds(share, lambda _: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        for listening in (sock, other):
            listening.listen()
            binds.add(_pending(listening))
        binds.check()
    assert len(shared) == 2


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_the_masters_socket_is_not_taken_for_the_programs(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch, family: int
) -> None:
    """The program's thread listens while another one checks: the master's socket, or an unreachable one, comes
    under the descriptor.
    """
    borrow = module.borrowed_socket
    with socket.socket(family) as masters:
        masters.bind(("127.0.0.1", 0) if family == socket.AF_INET else "")
        masters.listen()

        def replace_and_borrow(fd: int) -> object:
            os.dup2(masters.fileno(), fd)
            return borrow(fd)

        monkeypatch.setattr(module, "borrowed_socket", replace_and_borrow)
        binds = PendingBinds(
            lambda _: pytest.fail("the master's socket"), lambda _: pytest.fail("not a lock")
        )
        bind = _pending(sock)
        binds.add(bind)
        assert binds.check()
    assert binds.of_port(bind.port) == [bind]  # which the program's thread removes
