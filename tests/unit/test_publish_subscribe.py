"""``channel()`` in one process: what is delivered, what is dropped, how an iteration ends, and what is refused."""

import gc
import threading
from types import SimpleNamespace

import pytest
from conditions import wait_for

import gunicorn_passenger as passenger
from gunicorn_passenger import PassengerError, SettingError, channels
from gunicorn_passenger.serving import sibling_messages
from gunicorn_passenger.serving.registry import registry
from gunicorn_passenger.status import control_client


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """This process is not one that an application has started."""
    monkeypatch.setattr(channels, "_sources", {})
    monkeypatch.setattr(control_client, "parent_application", lambda: None)
    monkeypatch.delenv("PASSENGER_DAEMON_KEY", raising=False)


def receivers(topic):
    return sibling_messages._subscribers._by_topic.get(topic, {})


def test_text_and_bytes_reach_all_subscribers_in_their_order():
    news = passenger.channel("order")
    one, other = news.subscribe(), passenger.channel("order").subscribe()
    elsewhere = passenger.channel("elsewhere").subscribe(timeout=0)
    sent = ["a", b"b", "", b"", "ä\n\0", b"\xff"]
    for message in sent:
        news.publish(message)
    for messages in (one, other):
        messages.close()
        assert list(messages) == sent
    assert next(elsewhere) is None
    elsewhere.close()
    assert not receivers("channel order")


def test_a_subscriber_that_is_too_slow_misses_the_newest_messages_and_knows_how_many():
    news = passenger.channel("slow")
    with news.subscribe(max_pending=2) as slow, news.subscribe() as fast:
        for number in range(5):
            news.publish(str(number))
    assert (list(slow), slow.dropped) == (["0", "1"], 3)
    assert (list(fast), fast.dropped) == ([*"01234"], 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_closing_ends_the_threads_that_wait(threads):
    messages = passenger.channel("waiting").subscribe()
    found = []
    waiting = [threading.Thread(target=lambda: found.extend(messages)) for _ in range(threads)]
    for thread in waiting:
        thread.start()
    for number in range(20):
        passenger.channel("waiting").publish(str(number))
    wait_for(lambda: len(found) == 20)
    messages.close()
    messages.close()
    for thread in waiting:
        thread.join(30)
        assert not thread.is_alive()


def test_an_iterator_that_is_forgotten_leaves_nothing():
    messages = passenger.channel("forgotten").subscribe()
    assert receivers("channel forgotten")
    del messages
    gc.collect()
    assert not receivers("channel forgotten")


def test_an_iteration_ends_when_the_worker_drains(monkeypatch):
    messages = passenger.channel("drain").subscribe()
    passenger.channel("drain").publish("last")
    assert channels._end_iterators in registry.before_drain
    channels._end_iterators()
    assert list(messages) == ["last"]
    messages.close()
    monkeypatch.setattr(registry, "draining", True)
    with passenger.channel("drain").subscribe() as late:
        assert list(late) == []


def test_a_function_is_called_with_each_message_and_an_error_is_logged(caplog):
    heard = []

    @passenger.channel("called").on
    def handle(message):
        heard.append(message)
        if message == "bad":
            raise ValueError("the program's fault")

    @passenger.channel("called").on()
    def other(message):
        heard.append(message)

    for message in ("bad", b"good"):
        passenger.channel("called").publish(message)
    wait_for(lambda: len(heard) == 4)
    assert sorted(heard, key=str) == [b"good", b"good", "bad", "bad"]
    assert "function for the channel 'called' raised an error" in caplog.text


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 101, None, 5])
def test_a_name_that_cannot_be_used_is_refused(name):
    with pytest.raises(SettingError, match="a name is a string of 1 to 100 characters"):
        passenger.channel(name)


def test_what_is_not_a_message_is_refused():
    with pytest.raises(TypeError, match=r"takes a str or bytes, not dict; json.dumps\(\)"):
        passenger.channel("x").publish({"a": 1})
    with pytest.raises(TypeError, match="takes a function"):
        passenger.channel("x").on("no function")
    with pytest.raises(SettingError, match="max_pending=0"):
        passenger.channel("x").subscribe(max_pending=0)


def test_in_the_master_handlers_wait_for_the_worker_and_the_rest_is_refused(monkeypatch):
    waiting = []
    monkeypatch.setattr(registry, "_in_master", True)
    monkeypatch.setattr(channels.events, "on", lambda event, start: waiting.append((event, start)))
    heard = []
    passenger.channel("master").on(heard.append)
    with pytest.raises(PassengerError, match="cannot be used in gunicorn's master"):
        passenger.channel("master").publish("x")
    with pytest.raises(PassengerError, match="cannot be used in gunicorn's master"):
        passenger.channel("master").subscribe()
    monkeypatch.setattr(registry, "_in_master", False)
    [(event, start)] = waiting
    assert event == "ready"
    start(None)
    passenger.channel("master").publish("x")
    wait_for(lambda: heard == ["x"])


def test_a_daemon_whose_master_cannot_be_reached_says_so(monkeypatch):
    monkeypatch.setenv("PASSENGER_DAEMON_KEY", "7")
    with pytest.raises(PassengerError, match="must run as the same user"):
        passenger.channel("x").publish("x")


def test_a_worker_class_without_the_hooks_says_so(monkeypatch):
    monkeypatch.setattr(channels.standalone, "worker_class", lambda: "sync")
    with pytest.raises(PassengerError, match="'sync' without the hooks that a channel needs"):
        passenger.channel("x").subscribe()


def test_an_application_that_does_not_run_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PASSENGER_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(PassengerError, match="no application"):
        passenger.channel("x", app="shop").publish("x")
    with pytest.raises(PassengerError, match="no application"):
        passenger.channel("x", app="shop").subscribe()


def test_a_master_that_does_not_respond_is_named(monkeypatch):
    def refuse(*_arguments):
        raise TimeoutError("timed out")

    monkeypatch.setattr(control_client, "parent_application", lambda: SimpleNamespace(pid=7, socket="x"))
    monkeypatch.setattr(control_client, "publish", refuse)
    monkeypatch.setattr(control_client, "subscribe", refuse)
    for use in (lambda: passenger.channel("x").publish("x"), passenger.channel("x").subscribe):
        with pytest.raises(PassengerError, match="pid 7 did not respond"):
            use()
