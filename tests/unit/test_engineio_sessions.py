"""Which sessions of Engine.IO a drain ends, and when."""

import asyncio
from types import SimpleNamespace

import engineio
import pytest

from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.serving.engineio_sessions import EngineIOSessions


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
        "closed": False,
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
        EngineIOSessions(eio, False, str, "noop")._end_all()


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
    "state", [{"connected": False}, {"upgrading": True}, {"upgraded": True}, {"closed": True}]
)
def test_a_session_that_does_not_poll_is_left_alone(state):
    eio = Server()
    eio.sockets["a"] = session(**state)
    look(eio, lambda: None)
    assert not eio.tasks


def test_the_setting_for_websockets_holds_for_polling_too(monkeypatch):
    eio = Server()
    sessions = EngineIOSessions(eio, False, str, "noop")
    monkeypatch.setattr(settings, "closes_websockets_on_exit", lambda: False)
    sessions.end()
    assert not eio.tasks
    eio.sockets["a"] = session()
    assert not sessions.are_ending()
    monkeypatch.setattr(settings, "closes_websockets_on_exit", lambda: True)
    sessions.end()
    assert eio.tasks
    assert sessions.are_ending()


def test_a_drain_waits_for_the_sessions_that_are_ended():
    """Their clients may be between two polls, and the program's handler has to be called."""
    eio = Server()
    sessions = EngineIOSessions(eio, False, str, "noop")
    eio.sockets["a"] = ended = session()
    eio.sockets["b"] = session("b", upgraded=True)
    assert not sessions.are_ending()
    sessions.end()
    assert sessions.are_ending()
    ended.closing = True
    assert sessions.are_ending()
    ended.closed = True
    assert not sessions.are_ending()


def test_a_thread_that_cannot_be_started_does_not_end_the_drain():
    eio = Server()
    sessions = EngineIOSessions(eio, False, str, "noop")
    eio.sockets["a"] = session()
    start, eio.start_background_task = eio.start_background_task, raise_error
    sessions.end()
    # the worker does not wait for what does not happen
    assert not sessions.are_ending()
    sessions._end_established()
    sessions._end_established()
    eio.start_background_task = start
    sessions._end_established()
    assert len(eio.tasks) == 1


def raise_error(*_, **__):
    raise RuntimeError("can't start new thread")


def test_a_server_of_asyncio_that_has_had_no_session_has_nothing_to_end():
    sessions = EngineIOSessions(engineio.AsyncServer(async_mode="asgi"), True, str, "noop")
    sessions.end()

    async def begin():
        sessions.generate_id()

    asyncio.run(begin())
    # the loop is closed, as when the application has ended before the drain
    sessions.end()
