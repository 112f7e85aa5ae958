"""Which sessions of Engine.IO a drain ends, and when."""

import asyncio
from types import SimpleNamespace

import engineio
import pytest

from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.serving.engineio_polling import PollingSessions


class Server(engineio.Server):
    """One whose tasks and pauses are the test's."""

    def __init__(self):
        super().__init__(async_mode="threading")
        self.tasks = []

    def start_background_task(self, target, *args, **kwargs):
        assert not args
        self.tasks.append((target, kwargs))


class Stop(Exception):
    """Ends the looks at the sessions."""


def session(sid="a", **changed):
    states = {
        "queue": None,
        "close": lambda: None,
        "connected": True,
        "upgrading": False,
        "upgraded": False,
        "closing": False,
    }
    return SimpleNamespace(sid=sid, **states | changed)


def look(eio, *between):
    """Look at the sessions, with something between the looks."""
    pauses = iter(between)

    def sleep(seconds):
        for pause in pauses:
            return pause()
        raise Stop

    eio.sleep = sleep
    with pytest.raises(Stop):
        PollingSessions(eio, str, "noop")._end_all()


def test_a_session_has_some_time_to_begin():
    eio = Server()
    eio.sockets["old"] = old = session("old")
    look(eio, lambda: eio.sockets.setdefault("new", session("new")))
    [(close, options)] = eio.tasks
    assert close is old.close
    assert options == {"wait": False, "reason": "transport close"}


def test_a_session_is_ended_once():
    eio = Server()
    eio.sockets["a"] = session()
    look(eio, *[lambda: None] * 3)
    assert len(eio.tasks) == 1


def test_a_poll_that_waits_gets_a_packet_that_the_client_ignores():
    eio = Server()
    eio.sockets["a"] = waiting = engineio.server.socket.Socket(eio, "a")
    waiting.connected = True
    look(eio, lambda: None)
    [(close, options)] = eio.tasks
    close(**options)
    assert waiting.poll() == ["noop"]
    assert waiting.closed


@pytest.mark.parametrize(
    "state", [{"connected": False}, {"upgrading": True}, {"upgraded": True}, {"closing": True}]
)
def test_a_session_that_does_not_poll_is_left_alone(state):
    eio = Server()
    eio.sockets["a"] = session(**state)
    look(eio, lambda: None)
    assert not eio.tasks


def test_the_setting_for_websockets_holds_for_polling_too(monkeypatch):
    eio = Server()
    sessions = PollingSessions(eio, str, "noop")
    monkeypatch.setattr(settings, "closes_websockets_on_exit", lambda: False)
    sessions.end()
    assert not eio.tasks
    monkeypatch.setattr(settings, "closes_websockets_on_exit", lambda: True)
    sessions.end()
    assert eio.tasks


def test_a_server_of_asyncio_that_has_had_no_session_has_nothing_to_end():
    sessions = PollingSessions(engineio.AsyncServer(async_mode="asgi"), str, "noop")
    sessions.end()

    async def begin():
        sessions.generate_id()

    asyncio.run(begin())
    # the loop is closed, as when the application has ended before the drain
    sessions.end()
