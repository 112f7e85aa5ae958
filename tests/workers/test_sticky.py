"""Requests reach the worker that they belong to, on whichever worker's connection they come."""

import json
import os
import re
import signal
import socket
import time

import pytest
from conditions import stop, wait_for
from free_ports import free_port
from http_client import Client, fetch
from processes import starting

WORKERS = 3


class Site:
    """A gunicorn with three workers, which live as long as the tests of this module."""

    def __init__(self, start, *arguments):
        self.home = start.home
        self.sessions, self.keys = free_port(), free_port()
        env = {"P1": self.sessions, "P2": self.keys}
        self.process = start.gunicorn("sticky_app", "--keep-alive", 60, *arguments, workers=WORKERS, env=env)
        self.process.wait_ready()
        self.primary = self.process.socket

    def ask(self, where, path="/", method="GET", body=None, **headers):
        status, text = fetch(where, path, method, body, **headers)
        assert status == 200, text
        return json.loads(text)

    def tags(self):
        """The tag of each worker, by its pid."""
        found = {}

        def all_known():
            answer = self.ask(self.sessions)
            found[answer["pid"]] = answer["tag"]
            alive = set(self.process.workers())
            return len(alive) == WORKERS and alive <= found.keys()

        wait_for(all_known, lambda: f"all workers; seen {found}")
        return {pid: found[pid] for pid in self.process.workers()}


@pytest.fixture(scope="module")
def site():
    with starting() as start:
        yield Site(start)


def sid(tag):
    return f"{tag}0123456789abcdef"


def test_a_session_id_reaches_its_worker_on_new_connections(site):
    for pid, tag in site.tags().items():
        for _ in range(8):
            answer = site.ask(site.sessions, f"/poll?EIO=4&sid={sid(tag)}", "POST", b"x" * 100)
            assert (answer["pid"], answer["body"], answer["path"]) == (pid, 100, "/poll")


def test_one_connection_changes_its_worker_with_each_request(site):
    tags = site.tags()
    client = Client(site.sessions)
    client.connect()
    own_port = str(client.sock.getsockname()[1])
    sock = client.sock
    for pid, tag in [*tags.items()] * 4:
        client.request(
            "POST", f"/x?sid={sid(tag)}", b"y" * 50000, {"X-Long": "z" * 6000, "X-More": "z" * 6000}
        )
        answer = json.loads(client.getresponse().read())
        assert answer["pid"] == pid
        assert (answer["body"], answer["long"], answer["port"]) == (50000, 6000, own_port)
        assert client.sock is sock
    client.close()


def test_pipelined_requests_are_answered_in_their_order(site):
    wanted = [*site.tags().items()] * 3
    with socket.create_connection(("127.0.0.1", site.sessions), 30) as sock:
        sock.sendall(
            b"".join(
                f"GET /{n}?sid={sid(tag)} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
                for n, (_, tag) in enumerate(wanted)
            )
        )
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            text = file.read()
    answers = [json.loads(answer) for answer in re.findall(rb"{.*?}", text)]
    assert [(a["path"], a["pid"]) for a in answers] == [(f"/{n}", pid) for n, (pid, _) in enumerate(wanted)]


@pytest.mark.parametrize(
    "query",
    ["sid=", "sid=short", "sid=%00%ff", f"sid={'A' * 16}rest", f"sid={'A' * 4000}", "xsid=AAAAAAAAAAAAAAAAB"],
)
def test_an_unknown_session_id_is_served_where_it_is_read(site, query):
    assert site.ask(site.sessions, f"/?{query}")["pid"] in site.process.workers()


def test_the_cookie_leads_back_to_the_worker_that_has_set_it(site):
    client = Client(site.primary)
    client.request("GET", "/")
    response = client.getresponse()
    answer, cookie = json.loads(response.read()), response.getheader("Set-Cookie")
    client.close()
    signed, attributes = cookie.split("; ", 1)
    assert re.fullmatch(rf"worker={answer['tag']}\.[\w-]{{24}}", signed)
    assert attributes == "Path=/; HttpOnly; SameSite=Lax"
    for _ in range(12):
        client = Client(site.primary)
        client.request("GET", "/", headers={"Cookie": f"a=b; {signed}; c=d"})
        response = client.getresponse()
        assert json.loads(response.read())["pid"] == answer["pid"]
        assert response.getheader("Set-Cookie") is None
        client.close()


@pytest.mark.parametrize("value", ["", "x", "A" * 16, "A" * 41, "A" * 16 + "." + "A" * 24, "!" * 16])
def test_a_forged_cookie_is_replaced(site, value):
    client = Client(site.primary)
    client.request("GET", "/", headers={"Cookie": f"worker={value}"})
    response = client.getresponse()
    tag = json.loads(response.read())["tag"]
    assert response.getheader("Set-Cookie", "").startswith(f"worker={tag}.")
    client.close()


def test_equal_keys_reach_one_worker(site):
    site.tags()
    by_user = {}
    for user in [*"abcdefghijkl"] * 3:
        by_user.setdefault(user, set()).add(site.ask(site.keys, f"/?user={user}")["pid"])
    assert all(len(pids) == 1 for pids in by_user.values()), by_user
    assert len(set.union(*by_user.values())) > 1
    assert site.ask(site.keys)["pid"] in site.process.workers()
    assert site.ask(site.keys, "/?user=error")["pid"] in site.process.workers()
    assert "the function given as sticky= has failed" in site.process.log()


def test_a_sibling_that_is_blocked_loses_no_request(site):
    (pid, tag), *_ = site.tags().items()
    blocking = Client(site.sessions)
    blocking.request("GET", f"/block?sid={sid(tag)}")
    wait_for((site.home / f"blocked-{pid}").exists)
    began = time.monotonic()
    answer = site.ask(site.sessions, f"/other?sid={sid(tag)}", "POST", b"x" * 10)
    assert answer["pid"] != pid
    assert answer["body"] == 10
    assert time.monotonic() - began > 0.9
    (site.home / "go").touch()
    assert json.loads(blocking.getresponse().read())["pid"] == pid
    blocking.close()
    # the copies in its mailbox are no longer its own
    assert site.ask(site.sessions, f"/?sid={sid(tag)}")["pid"] == pid


def test_a_worker_that_is_killed_loses_no_connection_in_its_mailbox(site):
    (pid, tag), *_ = site.tags().items()
    stop(pid)
    clients = []
    try:
        for n in range(6):
            client = Client(site.sessions)
            client.request("POST", f"/{n}?sid={sid(tag)}", b"x" * n)
            clients.append(client)
    finally:
        os.kill(pid, signal.SIGKILL)
    for n, client in enumerate(clients):
        answer = json.loads(client.getresponse().read())
        assert (answer["path"], answer["body"]) == (f"/{n}", n)
        assert answer["pid"] != pid
        client.close()
    assert tag not in site.tags().values()


def test_a_reload_keeps_clients(site):
    """Old workers serve the requests of their sessions while they drain; later any worker does."""
    tags = site.tags()
    clients = [Client(site.sessions) for _ in tags]
    site.process.signal(signal.SIGHUP)
    try:
        while set(tags) & set(site.process.workers()):
            for client, (_, tag) in zip(clients, tags.items(), strict=True):
                client.request("GET", f"/?sid={sid(tag)}")
                assert client.getresponse().read()
            time.sleep(0.02)
    finally:
        for client in clients:
            client.close()
    assert not set(site.tags().values()) & set(tags.values())
    site.process.wait_log("Booting worker", 2 * WORKERS)
    assert "Traceback" not in site.process.log().replace("ValueError: no key", "").split("no key")[-1]


def test_servers_under_another_worker_class_are_sticky_too(start):
    """There they run in a hub of their own, and the primary is gunicorn's."""
    site = Site(start, "-k", "gthread", "--threads", 4, "-c", "python:gunicorn_passenger.hooks")
    for pid, tag in site.tags().items():
        for _ in range(6):
            answer = site.ask(site.sessions, f"/x?sid={sid(tag)}", "POST", b"x" * 100)
            assert (answer["pid"], answer["body"]) == (pid, 100)
    pids = {site.ask(site.keys, "/?user=a")["pid"] for _ in range(9)}
    assert len(pids) == 1
    assert "configure(sticky='cookie:worker') has no effect: under the worker class" in site.process.log()
    assert "Traceback" not in site.process.log()
