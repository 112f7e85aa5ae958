"""``attach()`` and ``emitter()``: what they take, what they refuse, and what they change without a worker."""

import re
from importlib import metadata
from types import SimpleNamespace

import engineio
import flask
import flask_socketio
import pytest
import socketio

import gunicorn_passenger
from gunicorn_passenger import PassengerError, SettingError
from gunicorn_passenger.config.settings import settings
from gunicorn_passenger.serving import sibling_messages
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.socketio import AsyncLocalManager, LocalManager, attach, emitter
from gunicorn_passenger.status import control_client
from gunicorn_passenger.system.installed import outdated


@pytest.fixture(autouse=True)
def default_sticky(monkeypatch):
    monkeypatch.setattr(settings, "default_sticky", "off")


@pytest.mark.parametrize(
    "make",
    [
        lambda: socketio.Server(async_mode="threading"),
        lambda: engineio.Server(async_mode="threading"),
        lambda: flask_socketio.SocketIO(flask.Flask("x"), async_mode="threading"),
        lambda: socketio.AsyncServer(async_mode="asgi"),
        lambda: engineio.AsyncServer(async_mode="asgi"),
    ],
)
def test_every_kind_of_server_is_attached_once(make):
    sio = make()
    attach(sio)
    assert settings.sticky(is_primary=True) == settings.sticky(is_primary=False) == "socketio"
    eio = getattr(getattr(sio, "server", sio), "eio", sio)
    assert len(eio.generate_id()) == 20  # without a worker there is no tag
    with pytest.raises(SettingError, match="already attached"):
        attach(sio)


def test_a_plain_client_manager_is_replaced_and_another_one_kept():
    plain = socketio.Server(async_mode="threading")
    attach(plain)
    assert isinstance(plain.manager, LocalManager)
    assert plain.manager.server is plain
    asynchronous = socketio.AsyncServer(async_mode="asgi")
    attach(asynchronous)
    assert isinstance(asynchronous.manager, AsyncLocalManager)
    assert asynchronous.manager.server is asynchronous
    own = LocalManager("of its own")
    server = socketio.Server(async_mode="threading", client_manager=own)
    attach(server)
    assert server.manager is own


def test_ids_name_the_machine_where_there_are_several(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "web_1.example.org")
    monkeypatch.setattr(sibling_messages, "tag", lambda: "t" * 16)

    def beginning(manager=None, **arguments):
        server = socketio.Server(async_mode="threading", client_manager=manager)
        attach(server, **arguments)
        new_id = server.eio.generate_id()
        assert re.fullmatch(r"[\w.-]+", new_id)
        return new_id[:-20]

    tag = "t" * 16
    assert beginning() == beginning(LocalManager("other")) == tag
    assert beginning(socketio.PubSubManager()) == f"{tag}.web-1."
    assert beginning(socketio.PubSubManager(), host="a") == beginning(host="a") == f"{tag}.a."
    for bad in ("", "a.b", "a b", "a" * 64, "é"):
        with pytest.raises(SettingError, match="use 1 to 63 letters"):
            beginning(host=bad)


def test_without_siblings_the_manager_serves_its_own_clients():
    server = socketio.Server(async_mode="threading", client_manager=LocalManager())
    server.emit("news", {"a": b"binary"}, room="all")
    server.close_room("all")


@pytest.mark.parametrize(
    ("sio", "error", "text"),
    [
        (flask_socketio.SocketIO(), SettingError, "init_app"),
        (socketio.AsyncServer(async_mode="aiohttp"), SettingError, "async_mode='asgi'"),
        (object(), TypeError, "not object"),
        (None, TypeError, "not NoneType"),
    ],
)
def test_what_cannot_be_attached_is_named(sio, error, text):
    with pytest.raises(error, match=text):
        attach(sio)
    assert settings.default_sticky == "off"


def test_the_admin_interface_comes_after_attach():
    late = socketio.Server(async_mode="threading")
    late.instrument(auth=False)
    with pytest.raises(SettingError, match=r"call attach\(\) before sio.instrument\(\)"):
        attach(late)
    early = socketio.Server(async_mode="threading")
    attach(early)
    early.instrument(auth=False)
    assert early.manager._timestamps == {}


def test_a_server_with_clients_is_refused():
    eio = engineio.Server(async_mode="threading")
    eio.sockets["x"] = object()
    with pytest.raises(SettingError, match="has clients"):
        attach(eio)


def test_an_emitter_does_not_ask_a_slow_master_twice(monkeypatch):
    asked = []

    def publish(path, topic, data):
        asked.append(topic)
        if len(asked) > 1:
            raise TimeoutError("timed out")

    monkeypatch.setattr(control_client, "own_application", lambda app: SimpleNamespace(pid=7, socket="x"))
    monkeypatch.setattr(control_client, "publish", publish)
    manager = emitter()
    manager.emit("news", 1)
    with pytest.raises(PassengerError, match="pid 7 did not respond"):
        manager.emit("news", 2)
    assert asked == ["socketio socketio"] * 2


def test_an_emitter_without_an_application_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(PassengerError, match="no application"):
        emitter().emit("news", 1)


@pytest.mark.parametrize(
    ("version", "older"),
    [("5.16.0", True), ("5.9", True), ("4.16.2", True), ("5.16.1", False), ("6.0", False)],
)
def test_versions_are_compared_as_numbers(monkeypatch, version, older):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert outdated("x", "5.16.1") == (version if older else None)


def test_sessions_are_counted(monkeypatch):
    monkeypatch.setattr(registry.acceptors, "sessions", [])
    eio = engineio.Server(async_mode="threading")
    attach(eio)
    eio.sockets["x"] = object()
    [sessions] = registry.acceptors.sessions
    assert sessions.count() == 1


def test_the_module_is_a_public_name():
    assert gunicorn_passenger.socketio.attach is attach
