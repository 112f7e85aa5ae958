"""Placements: one worker at a time, or a port for each; from the program, and from outside for unmodified ones."""

import json
import os
import re
import signal
import socket
import threading

import pytest
from conditions import wait_for
from free_ports import free_range
from http_client import Client, fetch, pids_answering, refused
from placement_site import accepting, children, placed, report, sockets_of, upgrade
from processes import COMMAND, descriptors

UNMODIFIED = ["gevent_pywsgi", "http_server", "http_server_threading", "waitress", "flask"]


def pid_at(port):
    status, body = fetch(port)
    assert status == 200, body
    return int(body)


def servers(process):
    return json.loads(fetch(process.socket, "/servers")[1])


# --- one -------------------------------------------------------------------------------------------


def test_one_worker_accepts(start, port):
    process = placed(start, port, "one")
    assert len({pid_at(port) for _ in range(20)}) == 1
    (entry,) = servers(process)[1]
    assert entry[:4] == ["jobs", ["127.0.0.1", port], "one", "listening"]


def test_a_lease_moves_at_once_and_the_old_worker_finishes(start, port):
    process = placed(start, port, "one")
    old = pid_at(port)
    slow = Client(port)
    slow.request("GET", "/slow3")
    wait_for(lambda: connected(old, port), "the slow request to be accepted")
    process.signal(signal.SIGHUP)
    new = wait_for(
        lambda: (pid_at(port) not in before) and pid_at(port) if (before := {old}) else 0, "another"
    )
    assert new != old
    answer = slow.getresponse()
    assert (answer.status, int(answer.read())) == (200, old)
    slow.close()


def connected(pid, port):
    return any(f"socket:[{inode}]" in descriptors(pid) for inode in sockets_of(port, "01"))


def test_when_the_worker_is_killed_another_accepts_and_no_client_is_refused(start, port):
    process = placed(start, port, "one", 4)
    for _ in range(5):
        old = pid_at(port)
        os.kill(old, signal.SIGKILL)
        assert pid_at(port) != old  # it waits in the open socket
    # four workers again, and one of them has it
    wait_for(lambda: len(process.workers()) == 4, "four workers")
    assert "takeover" in json.dumps(report(start))


def test_two_never_accept_at_once_through_reloads_and_an_upgrade(start, port):
    process = placed(start, port, "one")
    (inode,) = sockets_of(port, "0A")
    masters = [process.pid]
    most, samples, end = [0], [0], threading.Event()

    def watch():
        while not end.is_set():
            # processes are looked at one after the other, and the socket may move meanwhile
            seen = set(accepting(inode, masters))
            both = seen.intersection(accepting(inode, masters)) if len(seen) > 1 else seen
            most[0] = max(most[0], len(both))
            samples[0] += 1

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        for _ in range(3):
            process.hup(3)
            pid_at(port)
        second = upgrade(process, masters)
        assert pid_at(port) in process.workers()
        os.kill(second, signal.SIGTERM)  # and back again
        wait_for(lambda: second not in process.workers(), "the end of the next master")
        assert pid_at(port) in process.workers()
        second = upgrade(process, masters)
        process.signal(signal.SIGTERM)
        assert process.wait_end() == 0
        assert pid_at(port) in children(second)
        os.kill(second, signal.SIGTERM)
        wait_for(lambda: not process.session(), "the end of all")
    finally:
        end.set()
        watching.join()
    assert most[0] == 1
    assert samples[0] > 20


# --- each ------------------------------------------------------------------------------------------


def test_each_worker_has_a_port_that_a_successor_takes_over(start):
    first = free_range(3)
    process = placed(start, first, "each", PASSENGER_PORTS=f"{first}-{first + 2}")
    at = {port: pid_at(port) for port in range(first, first + 3)}
    assert set(at.values()) == set(process.workers())
    pid, found = servers(process)
    assert sorted(entry[0] for entry in found) == ["jobs.1", "jobs.2", "jobs.3"]
    assert {entry[1][1]: entry[4] for entry in found} == at
    assert found[0][4] == pid  # its own first
    for name, (_, port), *_ in found:
        client = Client(port)
        client.request("GET", "/")
        answer = client.getresponse()
        assert answer.getheader("X-Name") == name
        client.close()
    os.kill(at[first + 1], signal.SIGKILL)
    successor = pid_at(first + 1)
    assert successor not in at.values()
    assert {port: pid_at(port) for port in (first, first + 2)} == {p: at[p] for p in (first, first + 2)}
    process.hup(3)
    assert {pid_at(port) for port in range(first, first + 3)} == set(process.workers())
    assert "[ERROR]" not in process.log().replace(f"Worker (pid:{at[first + 1]}) was sent SIGKILL!", "")[
        : process.log().find("Handling signal: hup")
    ].replace("[ERROR]", "", 1)


def test_each_with_auto(start):
    first = free_range(2)
    process = placed(start, "auto", "each", workers=2, PASSENGER_PORTS=f"{first}-{first + 1}")
    assert {pid_at(first), pid_at(first + 1)} == set(process.workers())


def test_the_proxy_addresses_each_and_all_of_them(start):
    first = free_range(3)
    process = placed(start, first, "each", PASSENGER_PORTS=f"{first}-{first + 2}")
    at = {port: pid_at(port) for port in range(first, first + 3)}
    for number in (1, 2, 3):
        assert int(fetch(process.socket, f"/to/jobs.{number}")[1]) == at[first + number - 1]
    wait_for(
        lambda: (
            found if len(found := {int(fetch(process.socket, "/to/jobs")[1]) for _ in range(6)}) == 3 else 0
        ),
        "all of them in turn",
    )
    assert fetch(process.socket, "/to/jobs.4")[0] == 502


def test_a_client_stays_with_its_worker(start):
    """Also when a sibling's server goes and another comes: the cookie names the server, not its position."""
    first = free_range(4)
    process = placed(start, first, "each", PASSENGER_PORTS=f"{first}-{first + 3}")
    at = {str(pid_at(port)) for port in range(first, first + 3)}

    def ask(cookie=""):
        client = Client(process.socket)
        client.request("GET", "/sticky/jobs", headers={"Cookie": cookie} if cookie else {})
        answer = client.getresponse()
        body = answer.read().decode()
        client.close()
        return body, answer.getheader("Set-Cookie", "").partition(";")[0]

    cookies = {}
    wait_for(lambda: cookies.update([ask()]) or len(cookies) == 3, "the servers of all workers")
    assert cookies.keys() == at
    assert len(set(cookies.values())) == 3

    def stay():
        return all(ask(cookie) == (pid, "") for pid, cookie in cookies.items() for _ in range(3))

    assert stay()
    process.signal(signal.SIGTTIN)
    wait_for(lambda: len(servers(process)[1]) == 4, "the server of a fourth worker")
    wait_for(lambda: len({ask()[0] for _ in range(8)}) == 4, "its turn")
    assert stay()
    gone = next(iter(cookies))
    os.kill(int(gone), signal.SIGKILL)
    cookie = cookies.pop(gone)
    wait_for(lambda: ask(cookie)[0] not in ("", gone), "another worker")
    assert stay()


def test_each_with_fewer_ports_than_workers(start):
    first = free_range(2)
    process = start.gunicorn(
        "placed",
        workers=3,
        env={"P1": first, "PLACEMENT": "each", "PASSENGER_PORTS": f"{first}-{first + 1}"},
    )
    assert process.wait_end() != 0
    assert (
        process.log().count(
            "placement 'each' needs 3 more ports, one for each worker, but the port allocation "
            f"{first}-{first + 1} (set by PASSENGER_PORTS) has only 2 free"
        )
        == 1
    )
    assert "Traceback" not in process.log()


def test_a_worker_too_many_waits_for_a_port(start):
    first = free_range(2)
    process = placed(start, first, "each", workers=2, PASSENGER_PORTS=f"{first}-{first + 1}")
    at = {port: pid_at(port) for port in (first, first + 1)}
    process.signal(signal.SIGTTIN)
    process.wait_log("a worker waits until another worker's port is free: placement 'each' needs 1 more port")
    wait_for(lambda: len(process.workers()) == 3, "the third worker")
    (third,) = set(process.workers()) - set(at.values())
    os.kill(at[first], signal.SIGTERM)
    assert wait_for(lambda: pid_at(first) if pid_at(first) != at[first] else 0, "the port to move") == third


# --- from outside ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNMODIFIED)
def test_an_unmodified_server_in_one_worker(start, port, kind):
    process = start.gunicorn(
        f"serve_{kind}", workers=3, env={"P1": port, "PASSENGER_PLACEMENT": f"{port}=one"}
    ).wait_ready()
    pids_answering(process.socket, 3)
    wait_for(lambda: not refused(port), "the port")
    first = fetch(port)[1]
    assert {fetch(port)[1] for _ in range(10)} == {first}
    os.kill(int(re.findall(r"\d+", first)[-1]), signal.SIGKILL)
    second = fetch(port)[1]
    assert second != first
    process.hup(3)
    third = fetch(port)[1]
    assert third not in (first, second)
    assert {fetch(port)[1] for _ in range(10)} == {third}


@pytest.mark.parametrize("kind", UNMODIFIED)
def test_an_unmodified_server_in_each_worker(start, kind):
    first = free_range(3)
    start.write("gunicorn.conf.py", f"""
        import gunicorn_passenger as passenger
        passenger.configure(placement={{{first}: "each"}}, ports="{first}-{first + 2}")
        """)  # fmt: skip
    process = start.gunicorn(f"serve_{kind}", workers=3, env={"P1": first}).wait_ready()
    wait_for(lambda: not any(refused(port) for port in range(first, first + 3)), "three ports")
    bodies = {fetch(port)[1] for port in range(first, first + 3)}
    assert len(bodies) == 3
    process.hup(3)
    assert len({fetch(port)[1] for port in range(first, first + 3)} - bodies) == 3


def test_a_server_that_polls_by_itself_hears_of_its_turn(start, port):
    """asyncio's own epoll set: the socket under its descriptor changes, and it is not asked to notice."""
    process = start.gunicorn(
        "serve_asyncio", workers=2, env={"P1": port, "PASSENGER_PLACEMENT": f"{port}=one"}
    ).wait_ready()
    wait_for(lambda: not refused(port), "the port")
    first = fetch(port)[1]
    assert {fetch(port)[1] for _ in range(10)} == {first}
    os.kill(int(re.findall(r"\d+", first)[-1]), signal.SIGKILL)
    assert fetch(port)[1] != first
    assert process.stop() == 0


# --- by an operator --------------------------------------------------------------------------------


def command(start, *arguments):
    done = start.python(COMMAND, *arguments)
    return done.wait_end(), done.log()


@pytest.mark.parametrize("placement", ["shared", "one"])
def test_a_server_is_stopped_and_restarted(start, port, placement):
    process = placed(start, port, placement, workers=2)
    assert command(start, "stop", "jobs") == (0, f"stopped jobs (127.0.0.1:{port})\n")
    wait_for(lambda: refused(port), "the port to be closed")
    process.hup(2)  # what was stopped stays so
    assert refused(port)
    assert [s["state"] for s in report(start)["servers"] if s["name"] == "jobs"] == ["stopped"]
    assert command(start, "restart", "jobs")[0] == 0
    wait_for(lambda: not refused(port), "the port to be open")
    assert pid_at(port) in process.workers()


def test_an_unmodified_server_is_stopped_and_restarted(start, port):
    process = start.gunicorn("serve_gevent_pywsgi", workers=2, env={"P1": port}).wait_ready()
    wait_for(lambda: not refused(port), "the port")
    assert command(start, "stop", f"127.0.0.1:{port}")[0] == 0
    wait_for(lambda: refused(port), "the port to be closed")
    assert command(start, "restart", f"127.0.0.1:{port}")[0] == 0
    wait_for(lambda: not refused(port), "the port to be open")
    assert fetch(port)[0] == 200
    assert process.stop() == 0


def test_a_name_that_there_is_not(start, port):
    placed(start, port, "shared", workers=1)
    status, text = command(start, "restart", "nothing")
    assert status == 1
    assert "this application has no server or daemon 'nothing'" in text


def test_a_connect_finds_an_open_socket_before_anybody_accepts(start, port):
    """With one worker, killed: the connect waits for its successor to boot."""
    process = placed(start, port, "one", workers=1)
    (pid,) = process.workers()
    os.kill(pid, signal.SIGKILL)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        sock.settimeout(30)
        assert sock.recv(100).startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))


def test_free_ports(start):
    """``listen`` finds a foreign process on one of the ports and takes the next."""
    first = free_range(4)
    with socket.create_server(("127.0.0.1", first + 1)):
        placed(start, first, "each", workers=3, PASSENGER_PORTS=f"{first}-{first + 3}")
        assert len({pid_at(port) for port in (first, first + 2, first + 3)}) == 3
