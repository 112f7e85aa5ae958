"""Greenlets that serve one connection after another: what the next connection must not see."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import gevent
import gevent.local
import greenlet
import pytest
from conditions import wait_for

from gunicorn_passenger.http import greenlet_pool
from gunicorn_passenger.http.greenlet_pool import GreenletPool
from gunicorn_passenger.serving import gevent_asyncio

local = gevent.local.local()
variable: ContextVar[str] = ContextVar("variable", default="empty")


class Connection:
    """Stands in for a connection: calls a function in its greenlet."""

    def __init__(self, function: Callable[[], object] = lambda: None) -> None:
        self._function = function
        self.greenlet = 0
        self.from_hub = False
        self.done = False

    def serve(self, greenlet: Any) -> None:
        self.greenlet = id(greenlet)
        self._function()
        self.done = True

    def close(self) -> None:
        self.done = True


#: coverage.py has a weak reference to each greenlet, which the pool then does not use again
reuses = pytest.mark.skipif(sys.gettrace() is not None, reason="coverage.py knows the greenlets")


@pytest.fixture
def pool() -> Iterator[GreenletPool]:
    pool = GreenletPool()
    yield pool
    trim(pool)
    trim(pool)


def trim(pool: GreenletPool) -> None:
    gevent.get_hub().loop.run_callback(pool.trim)
    gevent.sleep(0)


def serve(pool: GreenletPool, function: Callable[[], object] = lambda: None) -> Connection:
    """Serve one connection to its end; returns it."""
    connection = Connection(function)
    pool.serve(connection)
    wait_for(lambda: gevent.sleep(0) or connection.done, "the connection to end")
    gevent.sleep(0)
    return connection


def serve_in_turn(pool: GreenletPool, together: bool, *functions: Callable[[], object]) -> list[Connection]:
    """Serve one connection for each function to its end; returns them.

    :param together: whether they are there at the same time, as clients that wait to be accepted are.
    """
    if not together:
        return [serve(pool, function) for function in functions]
    connections = [Connection(function) for function in functions]
    waiting = iter(connections)

    def next_connection() -> Connection | None:
        connection = next(waiting, None)
        if connection is not None:
            connection.from_hub = gevent.getcurrent() is gevent.get_hub()
        return connection

    gevent.get_hub().loop.run_callback(pool.serve_each, next_connection, next_connection)
    wait_for(lambda: gevent.sleep(0) or all(c.done for c in connections), "the connections to end")
    gevent.sleep(0)
    return connections


def nothing() -> None:
    """What a connection does that leaves nothing."""


together = pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])


@together
def test_a_greenlet_serves_one_connection_after_another(pool, together):
    connections = serve_in_turn(pool, together, *[nothing] * 6)
    assert len({c.greenlet for c in connections}) == 1
    assert len(pool) == 1
    if together:
        assert [c.from_hub for c in connections] == [True, *[False] * 5]


def leave_attribute() -> None:
    gevent.getcurrent().attribute = "left"


def leave_for_spawned() -> None:
    gevent.getcurrent().spawn_tree_locals["value"] = "left"


def leave_reference() -> None:
    known.append(gevent.getcurrent())


def leave_weak_reference() -> None:
    known.append(weakref.ref(gevent.getcurrent()))


def leave_local() -> None:
    local.value = "left"


known: list[Any] = []


@pytest.mark.parametrize(
    "leave",
    [
        leave_attribute,
        leave_for_spawned,
        leave_reference,
        leave_weak_reference,
        leave_local,
        lambda: variable.set("left"),
        lambda: gevent.sleep(0),
    ],
    ids=["attribute", "spawned", "reference", "weak reference", "local", "context", "wait"],
)
def test_only_a_greenlet_in_which_nothing_was_left_accepts(pool, leave):
    _, second, third = serve_in_turn(pool, True, leave, nothing, nothing)
    assert second.from_hub
    assert not third.from_hub
    known.clear()


def test_a_finalizer_does_not_reach_the_next_connection(pool):
    """What an application has left may run its code when it goes."""

    class Left:
        def __del__(self) -> None:
            variable.set("by the finalizer")

    def leave() -> None:
        gevent.getcurrent().attribute = Left()

    seen: list[str] = []
    serve_in_turn(pool, True, leave, lambda: seen.append(variable.get()))
    assert seen == ["empty"]


def test_a_running_event_loop_does_not_reach_the_next_connection(pool):
    """The trace function of our event loops puts it away at each switch."""
    trace, loop = greenlet.gettrace(), asyncio.new_event_loop()
    gevent_asyncio._install_trace()
    try:
        seen: list[Any] = []
        serve_in_turn(
            pool,
            True,
            lambda: asyncio._set_running_loop(loop),
            lambda: seen.append(asyncio._get_running_loop()),
        )
        assert seen == [None]
    finally:
        greenlet.settrace(trace)
        asyncio._set_running_loop(None)
        loop.close()


def test_an_error_of_the_source_leaves_accepting_to_the_hub(pool, monkeypatch):
    reports = []
    monkeypatch.setattr(greenlet_pool, "report_fault", lambda *arguments: reports.append(arguments))
    connections = [Connection(), Connection()]
    waiting = iter(connections)

    def fail() -> None:
        raise MemoryError

    gevent.get_hub().loop.run_callback(pool.serve_each, lambda: next(waiting, None), fail)
    wait_for(lambda: gevent.sleep(0) or all(c.done for c in connections), "the connections to end")
    assert len(reports) == 2
    assert len(pool) == 1


def test_a_connection_that_waits_does_not_hold_up_those_that_come_with_it(pool):
    go = gevent.event.Event()
    order = []

    def wait() -> None:
        go.wait()
        order.append("waited")

    def last() -> None:
        order.append("last")
        go.set()

    first, *others = serve_in_turn(pool, True, wait, nothing, last)
    assert order == ["last", "waited"]
    assert others[0].greenlet == others[1].greenlet != first.greenlet
    # whoever ends later does not take connections any more, but waits to be given one
    assert len(pool) == 2


def test_an_error_ends_only_its_own_connection(pool, monkeypatch):
    reports = []
    monkeypatch.setattr(greenlet_pool, "report_fault", lambda *arguments: reports.append(arguments))

    def fail() -> None:
        raise RuntimeError("of a connection")

    _, second = serve_in_turn(pool, True, fail, nothing)
    assert second.done
    assert len(reports) == 1


def test_two_connections_at_the_same_time_have_two_greenlets(pool):
    go = gevent.event.Event()
    both = [Connection(go.wait), Connection(go.wait)]
    for connection in both:
        pool.serve(connection)
    gevent.sleep(0)
    assert both[0].greenlet != both[1].greenlet
    go.set()
    wait_for(lambda: gevent.sleep(0) or all(c.done for c in both), "both to end")


@reuses
@together
@pytest.mark.parametrize("keeps_local", [True, False], ids=["a local", "no local"])
def test_the_next_connection_sees_nothing_of_the_previous_one(pool, together, keeps_local):
    def leave() -> None:
        if keeps_local:
            local.value = "left"
        variable.set("left")
        current = gevent.getcurrent()
        current.attribute = "left"
        current.spawn_tree_locals["value"] = "left"

    seen: list[Any] = []

    def look() -> None:
        current = gevent.getcurrent()
        seen.append((getattr(local, "value", None), variable.get(), getattr(current, "attribute", None)))
        seen.append(dict(current.spawn_tree_locals))

    first, second, _ = serve_in_turn(pool, together, leave, look, look)
    # what is kept in a local goes a moment later, so another greenlet serves those that come together with it
    assert (first.greenlet == second.greenlet) is not (together and keeps_local)
    assert seen == [(None, "empty", None), {}] * 2


def test_what_is_left_for_spawned_greenlets_is_not_shared_by_new_ones(pool):
    """gevent shares ``spawn_tree_locals`` with whatever has made a greenlet: here the hub."""
    go = gevent.event.Event()
    seen = []

    def leave() -> None:
        gevent.getcurrent().spawn_tree_locals["value"] = "left"
        go.wait()

    def look() -> None:
        seen.append(dict(gevent.getcurrent().spawn_tree_locals))
        go.wait()

    connections = [Connection(leave), Connection(look), Connection(look)]
    for connection in connections:
        pool.serve(connection)
    wait_for(lambda: gevent.sleep(0) or len(seen) == 2, "both to look")
    go.set()
    wait_for(lambda: gevent.sleep(0) or all(c.done for c in connections), "all to end")
    assert seen == [{}, {}]


def test_what_spawned_greenlets_share_is_not_shared_by_the_next_connection(pool):
    """A greenlet has those of the one that has spawned it, also if they are empty."""
    go, seen = gevent.event.Event(), []

    def background() -> None:
        go.wait()
        seen.append(dict(gevent.getcurrent().spawn_tree_locals))

    def leave() -> None:
        # by way of another one: only what it has spawned itself refers to the connection's greenlet
        gevent.spawn(gevent.spawn, background).join()

    first = serve(pool, leave)
    second = serve(pool, lambda: gevent.getcurrent().spawn_tree_locals.update(value="of the second"))
    assert first.greenlet == second.greenlet
    go.set()
    wait_for(lambda: gevent.sleep(0) or seen, "the greenlet to look")
    assert seen == [{}]


def test_the_references_are_counted_when_a_trace_function_was_set_at_first(pool):
    trace = greenlet.gettrace()
    greenlet.settrace(lambda event, greenlets: None)
    try:
        serve(pool)
    finally:
        greenlet.settrace(trace)
    _, second, third = serve_in_turn(pool, True, leave_reference, nothing, nothing)
    assert second.from_hub
    assert not third.from_hub
    known.clear()


def test_what_is_linked_to_the_end_of_the_greenlet_runs(pool):
    ended = []
    serve(pool, lambda: gevent.getcurrent().rawlink(lambda _greenlet: ended.append(True)))
    wait_for(lambda: gevent.sleep(0) or ended, "the link to be called")
    assert ended == [True]


@together
def test_a_timeout_that_was_never_cancelled_does_not_meet_the_next_connection(pool, together):
    timeouts = []

    def forget_timeout() -> None:
        timeouts.append(gevent.Timeout.start_new(0.02))

    first, second = serve_in_turn(pool, together, forget_timeout, lambda: gevent.sleep(0.05))
    assert second.done
    assert second.greenlet != first.greenlet


@together
def test_a_greenlet_that_other_code_knows_is_not_used_again(pool, together):
    known = []
    first, second = serve_in_turn(pool, together, lambda: known.append(gevent.getcurrent()), nothing)
    assert second.greenlet != first.greenlet
    wait_for(lambda: gevent.sleep(0) or known[0].dead, "the greenlet to end")


def test_a_greenlet_that_ends_before_its_links_are_called_serves_no_other_connection(pool):
    def be_ended_soon() -> None:
        local.value = "kept"  # is linked to the end of the greenlet
        gevent.get_hub().loop.run_callback(gevent.getcurrent().throw)

    serve(pool, be_ended_soon)
    gevent.sleep(0)
    assert len(pool) == 0
    assert serve(pool).done


@together
def test_what_is_kept_for_a_greenlet_by_a_weak_reference_does_not_meet_the_next_connection(pool, together):
    kept: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
    seen = []
    serve_in_turn(
        pool,
        together,
        lambda: kept.setdefault(gevent.getcurrent(), "of the first client"),
        lambda: seen.append(kept.get(gevent.getcurrent())),
    )
    assert seen == [None]


@pytest.mark.parametrize("how", ["kill", "throw", "switch"])
def test_a_waiting_greenlet_that_other_code_wakes_ends(pool, how):
    known = []
    serve(pool, lambda: known.append(gevent.getcurrent()))
    greenlet = known.pop()
    if how == "kill":
        greenlet.kill()
    else:
        gevent.get_hub().loop.run_callback(getattr(greenlet, how))
        gevent.sleep(0)
    assert greenlet.dead
    del greenlet
    assert serve(pool).done


def test_code_that_waits_for_the_end_of_a_greenlet_is_woken(pool):
    """``join()`` while the connection is served, as code does that gives a request some time."""
    go, known = gevent.event.Event(), []

    def work() -> None:
        known.append(gevent.getcurrent())
        go.wait()

    pool.serve(Connection(work))
    gevent.sleep(0)
    waiter = gevent.spawn(known[0].join)
    gevent.sleep(0)
    go.set()
    waiter.get(timeout=5)


def test_code_that_kills_a_request_does_not_wait_for_the_next_connection(pool):
    known = []

    def work() -> None:
        known.append(gevent.getcurrent())
        with contextlib.suppress(gevent.GreenletExit):
            gevent.sleep(60)

    pool.serve(Connection(work))
    gevent.sleep(0)
    with gevent.Timeout(0.5):
        known[0].kill()
    assert known[0].dead


@reuses
def test_the_pool_is_bounded_and_shrinks(pool, monkeypatch):
    monkeypatch.setattr(greenlet_pool, "_MOST", 3)
    go = gevent.event.Event()
    connections = [Connection(go.wait) for _ in range(6)]
    for connection in connections:
        pool.serve(connection)
    gevent.sleep(0)
    go.set()
    wait_for(lambda: gevent.sleep(0) or all(c.done for c in connections), "all to end")
    gevent.sleep(0)
    assert len(pool) == 3
    serve(pool)
    trim(pool)  # none waited all the time since the first one came
    assert len(pool) == 3
    serve(pool)
    trim(pool)  # two did
    assert len(pool) == 1
    trim(pool)
    assert len(pool) == 0
