"""The grace timer of ports and daemons, and the one function that opens a port."""

import contextlib
import socket

import pytest
from free_ports import free_port

from gunicorn_passenger import errors
from gunicorn_passenger.config.port_allocation import AllocationSource, PortAllocation
from gunicorn_passenger.master.grace_timer import GraceTimer
from gunicorn_passenger.system import port_owner
from gunicorn_passenger.system.port_opening import ListenRequest, open_listener


def test_what_is_unused_for_the_grace_period_expires_once():
    timer = GraceTimer()
    assert timer.expired(["a"], 100, 10, settled=True) == []
    assert timer.deadline(10) == 110
    assert timer.expired(["a", "b"], 109, 10, settled=True) == []
    assert timer.expired(["a", "b"], 110, 10, settled=True) == ["a"]
    assert timer.deadline(10) == 119


def test_the_timer_begins_again_when_a_worker_uses_the_thing():
    timer = GraceTimer()
    timer.expired(["a", "b"], 100, 10, settled=True)
    timer.restart("a")
    assert timer.expired(["a", "b"], 110, 10, settled=True) == ["b"]
    assert timer.deadline(10) == 120


def test_the_timer_is_paused_while_workers_come_and_go():
    """Workers that are replaced all the time must not keep an unused port open for ever."""
    timer = GraceTimer()
    timer.expired(["a"], 100, 10, settled=True)
    assert timer.expired(["a"], 106, 10, settled=False) == []
    assert timer.deadline(10) is None
    assert timer.expired(["a"], 200, 10, settled=True) == []
    assert timer.deadline(10) == 204
    assert timer.expired(["a"], 204, 10, settled=False) == []
    assert timer.expired(["a"], 300, 10, settled=True) == ["a"]


def allocation(*ports):
    return PortAllocation("me", (AllocationSource(frozenset(ports), "test", "ask"),))


def test_auto_opens_the_preferred_port_and_skips_those_in_use():
    first, second = sorted([free_port(), free_port()])
    request = ListenRequest("auto", "127.0.0.1", within=f"{first},{second}")
    allowed = allocation(first, second)
    with contextlib.closing(open_listener(request, allowed, preferred=second)) as sock:
        assert sock.getsockname()[1] == second
    with contextlib.closing(open_listener(request, allowed, {first})) as sock:
        assert sock.getsockname()[1] == second
    with pytest.raises(errors.PortInUse):
        open_listener(request, allowed, {first, second})
    with pytest.raises(errors.ListenError, match="needs 3 more ports"):
        open_listener(request, allowed, needed=3)


def test_auto_looks_for_no_holder_of_the_ports_that_it_tries(monkeypatch):
    """The search reads all of /proc, with the lock held: 300 searches would lose the server."""
    searched = []
    monkeypatch.setattr(port_owner, "describe_owner", lambda *args: searched.append(args) or "a test")
    with contextlib.ExitStack() as stack:
        numbers = [free_port() for _ in range(5)]
        for number in numbers[:-1]:
            stack.enter_context(socket.create_server(("127.0.0.1", number)))
        request = ListenRequest("auto", "127.0.0.1")
        with contextlib.closing(open_listener(request, allocation(*numbers))) as sock:
            assert sock.getsockname()[1] == numbers[-1]
            with pytest.raises(errors.PortInUse):
                open_listener(request, allocation(*numbers))
        assert not searched
        with pytest.raises(errors.PortInUse, match="by a test"):
            open_listener(ListenRequest("tcp", "127.0.0.1", numbers[0]), allocation(*numbers))


def test_a_fixed_port_must_be_allocated():
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        with pytest.raises(errors.PortInUse):
            open_listener(ListenRequest("tcp", "127.0.0.1", number), allocation(number))
        with pytest.raises(errors.PortNotAllocated):
            open_listener(ListenRequest("tcp", "127.0.0.1", number), allocation(number + 1))
