"""No accepted client is dropped: storms of reloads, deaths and upgrades, with traffic on three servers at once."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import storm_site
from conditions import wait_for
from free_ports import free_range
from load_clients import CONTENT, UPLOAD, Connection, request
from storm_site import Site

STORMS = {
    "HUP": (storm_site.hup, 4, {}),
    "kill -9": (storm_site.kill_9, 6, {}),
    "TTIN and TTOU": (storm_site.ttin_ttou, 2, {}),
    "max_requests": (
        storm_site.max_requests,
        8,
        {"options": ["--max-requests", 100, "--max-requests-jitter", 20]},
    ),
    "USR2 and back": (storm_site.usr2_and_back, 2, {}),
    "USR2": (storm_site.usr2, 1, {}),
    "USR2, WINCH, QUIT": (storm_site.usr2_winch, 1, {"daemon": True}),
}


@pytest.fixture
def ports():
    first = free_range(2)
    return [first, first + 1]


@pytest.mark.parametrize("name", STORMS)
def test_no_accepted_client_is_dropped(home, ports, name):
    storm, times, options = STORMS[name]
    with storm_site.raised(storm, times, home, ports, **options) as (site, traffic, kills):
        outcome = storm_site.finish(site, traffic, kills)
        assert not outcome.faults, "\n".join([str(outcome.report), *outcome.faults, site.log()[-6000:]])
        assert len(kills) == (times if storm is storm_site.kill_9 else 0)
        assert "Traceback" not in site.log(), site.log()
        assert site.log().count(f"Opened 127.0.0.1:{ports[0]}") == 1
        if not kills:
            assert not outcome.allowed


@pytest.mark.parametrize("contestant", storm_site.HOOKED)
def test_the_ports_of_other_worker_classes_lose_nothing_by_a_reload(home, ports, contestant):
    """``bench/storm.py`` has all other storms for them."""
    with storm_site.raised(storm_site.hup, 1, home, ports, contestant, workers=2) as (site, traffic, kills):
        outcome = storm_site.finish(site, traffic, kills)
        assert not outcome.faults, "\n".join([str(outcome.report), *outcome.faults, site.log()[-6000:]])
        assert "Traceback" not in site.log(), site.log()


@pytest.mark.parametrize("contestant", ["sync+hooks", "tornado+hooks", "uvicorn+hooks"])
def test_the_ports_of_other_worker_classes_lose_nothing_by_an_upgrade_that_is_taken_back(
    home, ports, contestant
):
    """The new master is stopped while some of its workers have only just begun to serve."""
    with storm_site.raised(storm_site.usr2_and_back, 1, home, ports, contestant, workers=2) as raised:
        site, traffic, kills = raised
        outcome = storm_site.finish(site, traffic, kills)
        assert not outcome.faults, "\n".join([str(outcome.report), *outcome.faults, site.log()[-6000:]])
        assert "Traceback" not in site.log(), site.log()


def test_the_clients_notice_what_goes_wrong(home, ports):
    """The measure is measured: workers that are killed lose requests, and a port that is closed refuses them."""
    with storm_site.raised(storm_site.kill_9, 4, home, ports) as (site, traffic, kills):
        for pid in site.processes():
            os.kill(pid, signal.SIGKILL)
        site.reap()
        doors = {f"{place}/refused" for place in ("primary", "ours", "unmodified")}
        wait_for(lambda: doors <= set(traffic.failed()), "the clients to meet closed doors everywhere")
        report = traffic.finish()
    lost = [loss for loss in report.failures if not any(kill.covers(loss) for kill in kills)]
    for kind in ("refused", "truncated"):
        assert {loss.place for loss in lost if loss.kind == kind} == {"primary", "ours", "unmodified"}
    assert all(
        kill.unix.keys() == {"primary"} and kill.ports.keys() == {"ours", "unmodified"} for kill in kills
    )


# --- one worker, whose only open request is on one of its servers -------------------------------------


class Half:
    """A download of which one half has come; the worker has to send the other."""

    def __init__(self, address, framing="sized"):
        self.connection = Connection(address)
        self.connection.send(request(f"/held?framing={framing}"))
        self.fields = self.connection.head()

    def rest(self):
        assert self.connection.body(self.fields) == CONTENT


class Upload:
    """A request that is not answered yet; half of its body is still to come."""

    def __init__(self, address):
        self.connection = Connection(address)
        head = request("/held-up", f"Content-Length: {len(UPLOAD)}", "Expect: 100-continue", method="POST")
        self.connection.send(head)
        self.connection.wait_continue()
        self.connection.send(UPLOAD[: len(UPLOAD) // 2])

    def rest(self):
        self.connection.send(UPLOAD[len(UPLOAD) // 2 :])
        answer = json.loads(self.connection.body(self.connection.head()))
        assert answer == {"length": len(UPLOAD), "sha256": hashlib.sha256(UPLOAD).hexdigest()}


@pytest.mark.parametrize("how", ["HUP", "TTOU", "TERM"])
@pytest.mark.parametrize("place", ["primary", "ours", "unmodified"])
@pytest.mark.parametrize("kind", [Half, Upload])
def test_a_worker_finishes_its_only_request_wherever_it_is(home, ports, place, how, kind):
    with Site(home, ports, workers=1) as site:
        (old,) = site.workers()
        open_request = kind(site.places[place])
        if how == "HUP":
            site.signal(signal.SIGHUP)
            wait_for(lambda: len(site.workers()) == 2, "the next worker")
            wait_for(lambda: answered_by_another(site, old), "the next worker to answer")
        elif how == "TTOU":
            # the eldest goes
            site.signal(signal.SIGTTIN)
            wait_for(lambda: len(site.workers()) == 2, "the next worker")
            wait_for(lambda: answered_by_another(site, old), "the next worker to answer")
            site.signal(signal.SIGTTOU)
        else:
            site.signal(signal.SIGTERM)
        wait_for(lambda: not accepts(old, site.places), "the worker to stop accepting")
        assert old in site.workers()
        (home / "go").touch()
        open_request.rest()
        wait_for(lambda: old not in site.workers(), "the worker to leave")
        assert "graceful timeout" not in site.log()
        if how != "TERM":
            site.signal(signal.SIGTERM)
        wait_for(lambda: not (site.reap() or site.processes()), "everything to end")
        assert "Traceback" not in site.log()


def answered_by_another(site, old):
    """Whether another worker than ``old`` answers on every server."""
    for address in site.places.values():
        connection = Connection(address)
        try:
            connection.send(request("/", "Connection: close"))
            connection.body(connection.head())
        finally:
            connection.close()
        if connection.worker == old:
            return False
    return True


def accepts(pid, places):
    """Whether a process has one of the sockets open that listen there."""
    listening = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].split(":")[1], 16) in places.values():
            listening.add(f"socket:[{fields[9]}]")
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[-1] == places["primary"] and fields[5] == "01":
            listening.add(f"socket:[{fields[6]}]")
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return bool(found & listening)


@pytest.mark.parametrize("place", ["primary", "ours", "unmodified"])
def test_a_kept_connection_is_told_to_close_and_the_worker_goes_as_soon_as_it_is_idle(home, ports, place):
    """The leaving worker waits for the request in hand, not for its graceful timeout."""
    with Site(home, ports, workers=1, options=["--keep-alive", 60]) as site:
        (old,) = site.workers()
        connection = Connection(site.places[place])
        connection.send(request("/?first"))
        assert connection.body(connection.head()) == b"first"
        assert connection.worker == old
        site.signal(signal.SIGHUP)

        def told():
            # the connection is in use while the worker leaves
            connection.send(request("/?again"))
            assert connection.body(connection.head()) == b"again"
            return connection.must_close

        wait_for(told, "an answer that says that the connection closes", 20)
        wait_for(lambda: old not in site.workers(), "the worker to leave", 20)
        assert "graceful timeout" not in site.log()
        connection.close()
