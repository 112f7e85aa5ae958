"""Which workers are started and stopped, decided from their states alone."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from gunicorn.arbiter import Arbiter
from hypothesis import given
from hypothesis import strategies as st

from gunicorn_passenger.arbiter import fork_handlers
from gunicorn_passenger.arbiter.succession import Candidate, OverlappingArbiter, decide
from gunicorn_passenger.master.boot_failures import BootFailures


def serving(age, **fields):
    return Candidate(pid=1000 + age, age=age, serving=True, replaces=True, **fields)


def booting(age, **fields):
    return Candidate(pid=1000 + age, age=age, serving=False, replaces=fields.pop("replaces", False), **fields)


def stopped(workers, wanted):
    return [pid - 1000 for pid in decide(workers, wanted).stop]


def test_at_the_start_all_are_missing():
    assert decide([], 4) == (4, [])
    assert decide([booting(1), booting(2)], 4) == (2, [])


def test_after_a_reload_one_leaves_for_each_that_serves():
    old = [serving(age, retiring=True) for age in (1, 2, 3, 4)]
    assert stopped([*old, *map(booting, (5, 6, 7, 8))], 4) == []
    assert stopped([*old, serving(5), *map(booting, (6, 7, 8))], 4) == [1]
    assert stopped([*old, serving(5), serving(6), serving(7), booting(8)], 4) == [3, 2, 1]
    assert stopped([*old, *map(serving, (5, 6, 7, 8))], 4) == [4, 3, 2, 1]


def test_one_that_was_stopped_is_stopped_again_and_counts_for_nothing():
    assert decide([serving(1, leaving=True), serving(2)], 2) == (1, [1001])


def test_after_the_overlap_one_that_boots_is_enough():
    assert stopped([serving(1, retiring=True), booting(2, replaces=True)], 1) == [1]


def test_one_that_asks_for_a_successor_is_replaced_first():
    assert decide([serving(1, retiring=True)], 1) == (1, [])
    assert decide([serving(1, retiring=True), booting(2)], 1) == (0, [])
    assert decide([serving(1, retiring=True), serving(2)], 1) == (0, [1001])


def test_fewer_workers():
    assert stopped([serving(1), serving(2), serving(3)], 2) == [1]
    assert stopped([serving(1), serving(2)], 0) == [2, 1]


def test_boots_that_a_second_reload_has_overtaken_end_while_others_serve():
    workers = [serving(1, retiring=True), booting(2, retiring=True), booting(3)]
    assert stopped(workers, 1) == [2]
    # nothing serves: the boot that began first is the first to be ready
    workers = [booting(1, retiring=True), booting(2, retiring=True), booting(3)]
    assert stopped(workers, 1) == [2]


WORKERS = st.lists(
    st.builds(
        lambda serves, overdue, retiring, leaving: (serves, overdue, retiring, leaving),
        st.booleans(), st.booleans(), st.booleans(), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


@given(WORKERS, st.integers(0, 5))
def test_a_worker_that_is_needed_is_not_stopped(states, wanted):
    workers = [
        Candidate(1000 + age, age, serves, serves or overdue, retiring, leaving)
        for age, (serves, overdue, retiring, leaving) in enumerate(states)
    ]
    decision = decide(workers, wanted)
    here = [worker for worker in workers if not worker.leaving]
    left = [worker for worker in here if worker.pid not in decision.stop]
    assert {worker.pid for worker in workers if worker.leaving} <= set(decision.stop)
    # enough stay to do the work, or all that could
    kept = sum(worker.replaces and not worker.retiring for worker in left)
    before, after = sum(worker.serving for worker in here), sum(worker.serving for worker in left)
    assert after >= min(before, wanted - kept)
    assert len(left) + decision.missing <= 2 * wanted
    assert len([worker for worker in left if not worker.retiring]) + decision.missing >= wanted


def test_pauses_grow_and_one_attempt_counts_once():
    failures = BootFailures()
    now, pauses = 100.0, []
    for _ in range(8):
        assert failures.record("broken", True, now)
        assert not failures.record("broken", True, now + 0.1)
        pauses.append(failures.retry_at - now)
        now = failures.retry_at
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert failures.text == "reload failed: broken"
    assert failures.retrying
    failures.on_worker_ready()
    assert not failures.retrying
    assert not failures.text


def test_a_failure_is_logged_once_until_the_next_reload():
    failures = BootFailures()
    assert failures.is_new("broken")
    assert not failures.is_new("broken")
    assert failures.is_new("otherwise")
    failures.forget()
    assert failures.is_new("broken")


def test_a_rejected_configuration_stays_reported_until_the_next_reload():
    failures = BootFailures()
    failures.reload_rejected("no such setting")
    failures.on_worker_ready()
    assert failures.text == "reload failed: no such setting"
    failures.forget()
    assert not failures.text


def test_gunicorn_survives_that_the_system_refuses_a_process_while_a_worker_serves(monkeypatch, caplog):
    failures = []
    broker = SimpleNamespace(workers=[SimpleNamespace(serving=True)], on_worker_not_started=failures.append)
    monkeypatch.setattr(Arbiter, "spawn_worker", Mock(side_effect=BlockingIOError("no process")))
    monkeypatch.setattr(fork_handlers, "current_broker", lambda: broker)
    arbiter = object.__new__(OverlappingArbiter)
    arbiter.pid, arbiter.log = os.getpid(), logging.getLogger("test")
    assert arbiter.spawn_worker() is None
    assert "pids.max" in caplog.text
    assert len(failures) == 1
    broker.workers.clear()
    with pytest.raises(BlockingIOError):
        arbiter.spawn_worker()
