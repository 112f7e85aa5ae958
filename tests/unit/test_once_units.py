"""``passenger.once()`` without a master."""

from __future__ import annotations

import gevent
import gevent.event
import pytest

from gunicorn_passenger.serving import once


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
