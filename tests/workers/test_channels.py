"""Channels between the workers, a daemon, children of workers and other processes of the account."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from conditions import wait_for
from free_ports import free_port
from http_client import fetch
from processes import starting
from status_commands import only

WORKERS = 3


#: What :class:`Site` asks until all workers have heard it: the last answers may come later than that.
FIRST = "question-0"
#: Lines of a stream that are not a test's own messages.
NOT_COUNTED = ("", FIRST, f"answer to {FIRST}")


class Listener:
    """A client of /stream."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port), 30)
        self.sock.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        self.file = self.sock.makefile()
        assert any(line == "begun\n" for line in self.file)

    def lines(self, count):
        """The next messages."""
        found = []
        while len(found) < count:
            line = self.file.readline()
            assert line, f"the stream has ended after {found}"
            found += [line.strip()] if line.strip() not in NOT_COUNTED else []
        return found

    def rest(self):
        return self.file.read().split()

    def close(self):
        self.file.close()
        self.sock.close()


class Site:
    def __init__(self, start, *arguments):
        self.start = start
        self.port = free_port()
        self.process = start.gunicorn(
            "channel_app", "--graceful-timeout", 600, *arguments, workers=WORKERS, env={"P1": self.port}
        ).wait_ready(self.port)
        self.runtime = {**os.environ, "PASSENGER_RUNTIME_DIR": str(self.process.home / "run")}
        wait_for(lambda: self.ask(f"/publish?m={FIRST}") and self.everyone(f"answer to {FIRST}"))

    def ask(self, path="/"):
        status, text = fetch(self.port, path)
        assert status == 200, text
        return json.loads(text)

    def everyone(self, message, times=None):
        """Whether each worker has heard a message."""
        found = {}
        for _ in range(WORKERS * 5):
            answer = self.ask()
            found[answer["pid"]] = answer["heard"].count(message)
        counts = set(found.values())
        return set(found) == set(self.process.workers()) and (counts == {times} if times else min(counts) > 0)

    def run(self, program):
        """A process of the same account."""
        return subprocess.Popen(
            [sys.executable, "-c", program], env=self.runtime, stdout=subprocess.PIPE, text=True
        )


@pytest.fixture(scope="module")
def site():
    with starting() as start:
        yield Site(start)


def test_a_message_of_any_process_reaches_every_other_one_once(site):
    outside = f"import gunicorn_passenger as p; news = p.channel('news', app='{site.process.pid}'); "
    listening = site.run(
        outside + "s = news.subscribe(); print('ready', flush=True); "
        "[print(m, flush=True) for m in s if not m.startswith('answer')]; print('end', flush=True)"
    )
    try:
        assert listening.stdout.readline() == "ready\n"
        listeners = [Listener(site.port) for _ in range(2 * WORKERS)]
        site.ask("/publish?m=one&m=question-two")
        site.ask("/child?m=three")
        assert site.run(outside + "news.publish('four'); news.publish('x' * 500_000)").wait(60) == 0
        wanted = ["one", "question-two", "answer to question-two", "three", "four", "x" * 500_000]
        for listener in listeners:
            # the daemon's answer may come at any time after the question
            assert sorted(listener.lines(6)) == sorted(wanted)
            listener.close()
        assert [listening.stdout.readline().strip() for _ in range(5)] == [
            message for message in wanted if not message.startswith("answer")
        ]
        for message in wanted[:-1]:
            wait_for(lambda message=message: site.everyone(message, 1))
    finally:
        listening.kill()
        listening.wait()
        listening.stdout.close()


def test_what_a_slow_subscriber_misses_is_counted(site):
    site.ask("/slow")
    site.ask("/publish?m=kept&m=missed&m=missed")
    wait_for(lambda: site.ask()["dropped"] in ([], [2]))
    wait_for(lambda: only(site.start)["mailboxes"]["dropped"] == 2)
    wait_for(lambda: "a subscriber of 'channel news' is too slow" in site.process.log())
    assert only(site.start)["mailboxes"]["published"] >= 3


def test_a_reload_ends_the_streams_and_keeps_the_daemon(site):
    listeners = [Listener(site.port) for _ in range(4)]
    site.process.hup(WORKERS, site.port)  # it does not wait for the graceful timeout
    for listener in listeners:
        listener.rest()
        listener.close()
    wait_for(lambda: site.ask("/publish?m=question-9") and site.everyone("answer to question-9"))
    listener = Listener(site.port)
    os.kill(site.ask()["pid"], signal.SIGKILL)
    listener.close()
    wait_for(lambda: site.ask("/publish?m=question-10") and site.everyone("answer to question-10"))
    assert "Traceback" not in site.process.log(), site.process.log()


def test_servers_under_another_worker_class_have_channels_too(start):
    site = Site(start, "-k", "gthread", "--threads", 4, "-c", "python:gunicorn_passenger.hooks")
    listeners = [Listener(site.port) for _ in range(3)]
    site.ask("/publish?m=one&m=two")
    for listener in listeners:
        assert listener.lines(2) == ["one", "two"]
    site.process.signal(signal.SIGTERM)
    for listener in listeners:
        listener.rest()
        listener.close()
    assert site.process.wait_end() == 0
    assert "Traceback" not in site.process.log(), site.process.log()
