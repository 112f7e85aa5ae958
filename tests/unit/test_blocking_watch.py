"""The watch that names what blocks a worker's event loop."""

import time
from types import SimpleNamespace

import gevent
import pytest

from gunicorn_passenger.ipc.scoreboard import Blocking, Scoreboard
from gunicorn_passenger.serving import blocking_watch

SECONDS = 0.02


@pytest.fixture
def watch(monkeypatch):
    """A watch that runs, its rounds, and the lines that it logs."""
    watched = SimpleNamespace(lines=[], rounds=0, over=False, scoreboard=Scoreboard())

    def sleep(seconds):
        if watched.over:
            raise SystemExit
        time.sleep(seconds)
        watched.rounds += 0.5

    def warning(line, *arguments):
        watched.lines.append(line % arguments)

    monkeypatch.setattr(blocking_watch, "unpatched", lambda *_: sleep)
    blocking_watch.BlockingWatch(SECONDS, SimpleNamespace(warning=warning), watched.scoreboard).start()
    yield watched
    watched.over = True


def hold(watched, lines, rounds):
    while len(watched.lines) < lines or watched.rounds < rounds:
        time.sleep(0.001)


def hold_in_greenlet(watched, lines):
    while len(watched.lines) < lines:
        time.sleep(0.001)


def test_what_blocks_is_named_once(watch):
    hold(watch, 1, 0)
    hold(watch, 1, watch.rounds + 4)
    assert len(watch.lines) == 1
    assert "hold() at " in watch.lines[0]
    assert "test_blocking_watch.py:" in watch.lines[0]
    shown = watch.scoreboard.read_blocking()  # while the loop is still blocked
    assert shown.times == 1
    assert shown.milliseconds >= 4 * SECONDS * 1000
    gevent.spawn(hold_in_greenlet, watch, 2).join()
    assert "hold_in_greenlet() at " in watch.lines[1]


def test_a_loop_that_waits_is_not_blocked(watch):
    last = watch.rounds + 4
    while watch.rounds < last:
        gevent.sleep(0.001)
    assert watch.lines == []
    assert watch.scoreboard.read_blocking() == Blocking()
