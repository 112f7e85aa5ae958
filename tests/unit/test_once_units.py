"""``passenger.once()`` without a master."""

from __future__ import annotations

import gevent
import gevent.event
import pytest

from gunicorn_passenger.serving import once
from gunicorn_passenger.serving.gevent_scheduler import GeventScheduler
from gunicorn_passenger.serving.registry import registry


@pytest.fixture(autouse=True)
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "scheduler", GeventScheduler())


def test_a_function_that_catches_everything_does_not_hold_up_the_drain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(once, "_END_WITHIN", 0.05)
    finish = gevent.event.Event()
    ended = gevent.event.Event()

    def start() -> None:
        while not finish.is_set():
            try:
                finish.wait()
            except BaseException:
                continue
        ended.set()

    task = once.OnceTask("stubborn", start, None)
    task.request(None)
    gevent.sleep(0)
    with gevent.Timeout(10):
        task.end()
    assert not ended.is_set()
    assert "must not catch GreenletExit" in caplog.text
    finish.set()
    assert ended.wait(timeout=10)


def test_a_stop_that_does_not_return_does_not_hold_up_the_drain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(once, "_END_WITHIN", 0.05)
    never = gevent.event.Event()
    task = once.OnceTask("endless", never.wait, never.wait)
    task.request(None)
    gevent.sleep(0)
    with gevent.Timeout(10):
        task.end()
    assert "its stop function has not returned" in caplog.text
    assert "GreenletExit" not in caplog.text  # both have ended


def test_each_end_returns_when_the_function_has_ended() -> None:
    """A drain that comes while an operator stops the function."""
    stopping, finish, ended = gevent.event.Event(), gevent.event.Event(), []

    def start() -> None:
        try:
            gevent.event.Event().wait()
        finally:
            ended.append(True)

    def stop() -> None:
        stopping.set()
        finish.wait()

    task = once.OnceTask("slow", start, stop)
    task.request(None)
    first = gevent.spawn(task.end)
    stopping.wait()
    second = gevent.spawn(task.end)
    gevent.sleep(0)
    assert not second.ready()
    finish.set()
    gevent.joinall([first, second], timeout=10, raise_error=True)
    assert second.successful()
    assert ended == [True]


@pytest.mark.parametrize("error", [SystemExit(1), gevent.Timeout(), ValueError()])
def test_no_error_of_a_function_ends_the_worker(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> None:
        raise error

    task = once.OnceTask("broken", start, start)
    task.request(None)
    gevent.sleep(0)
    task.end()
    assert caplog.text.count("the program's function raised an error") == 2
