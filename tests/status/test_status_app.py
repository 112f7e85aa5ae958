"""The status application: health, metrics, the report, and what the program counts itself, of all workers."""

import contextlib
import http.client
import json
import re
import select
import socket
import subprocess
import sys
import time

import gevent
import pytest
from conditions import wait_for
from example_sites import Example, assert_shown
from free_ports import free_port, free_range
from http_client import Client, fetch
from processes import GUNICORN, NO_CONTROL, PROGRAMS
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from status_requests import get, ready, samples, value

from gunicorn_passenger import status
from gunicorn_passenger.status import metrics, sources


def wait_greenlets(condition):
    with gevent.Timeout(30):
        while not condition():
            gevent.sleep(0.001)


# --- in the workers ----------------------------------------------------------------------------------


def test_the_module_and_the_function_are_applications(start, port):
    program = start.write(
        "both.py",
        """
        import gunicorn_passenger as passenger
        from gunicorn_passenger import status
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        passenger.listen(PORT, status)
        passenger.create_server(status.application).listen("unix:HOME/s.sock", name="other")
        """.replace("PORT", str(port)).replace("HOME", str(start.home)),
    )
    start.gunicorn("both", "--chdir", program.parent).wait_ready()
    assert get(port, "/health")[0] == 200
    assert get(f"{start.home}/s.sock", "/health")[0] == 200
    report = json.loads(get(port, "/status.json")[2])
    assert {"gunicorn_passenger.status", "other"} <= {server["name"] for server in report["servers"]}


def test_health(start, port):
    start.gunicorn("status_app", workers=3, env={"P1": port}).wait_ready()
    ready(port, 3)
    # a worker answers a moment before the master has heard that it is ready
    whole = {"status": "ok", "workers": {"ready": 3, "leaving": 0, "booting": 0}}
    wait_for(lambda: json.loads(get(port, "/health")[2]) == whole, "three workers")
    code, headers, body = get(port, "/health")
    assert code == 200
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    code, headers, empty = get(port, "/health", "HEAD")
    assert (code, empty) == (200, "")
    assert int(headers["Content-Length"]) == len(body)


def test_what_there_is_not(start, port):
    start.gunicorn("status_app", workers=1, env={"P1": port}).wait_ready()
    for path in ("/nothing", "/health/", "/Health", "/..", "//", "/status.json/x"):
        assert get(port, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        code, headers, _ = get(port, "/health", method)
        assert code == 405
        assert headers["Allow"] == "GET, HEAD"
    assert get(port, "/health?verbose=1")[0] == 200


def test_status_json_is_the_report(start, port):
    process = start.gunicorn("status_app", workers=2, env={"P1": port}).wait_ready()
    ready(port, 2)
    code, headers, body = get(port, "/status.json")
    assert code == 200
    assert headers["Content-Type"] == "application/json"
    report = json.loads(body)
    assert report["pid"] == process.pid
    assert {worker["pid"] for worker in report["workers"]} == set(process.workers())


def test_metrics(start, port):
    second = free_port()
    process = start.gunicorn(
        "status_app", workers=2, env={"P1": port, "P2": second, "NAME": 'a "name" \\ with\ttricks'}
    ).wait_ready()
    ready(port, 2)
    for _ in range(5):
        fetch(second, "/x")
    fetch(second, "/500")
    name = r'a "name" \ with\x09tricks'  # a tab is not printable

    def counted():
        found = samples(port)
        return value(found, "gunicorn_passenger_server_requests_total", server=name) == 6 and found

    found = wait_for(counted, "six requests")
    assert value(found, "gunicorn_passenger_up") == 1
    assert value(found, "gunicorn_passenger_workers", state="ready") == 2
    assert value(found, "gunicorn_passenger_workers", state="booting") == 0
    assert value(found, "gunicorn_passenger_server_accepted_total", server=name) == 6
    assert value(found, "gunicorn_passenger_server_errors_total", server=name) == 1
    assert value(found, "gunicorn_passenger_server_sent_bytes_total", server=name) > 600
    assert (
        value(found, "gunicorn_passenger_server_connections", server=name, address=f"127.0.0.1:{second}") == 0
    )
    assert value(found, "gunicorn_passenger_server_workers", server=name) == 2
    assert value(found, "gunicorn_passenger_memory_bytes", process="master") > 5e6
    assert value(found, "gunicorn_passenger_memory_bytes", process="workers") > 1e7
    assert value(found, "gunicorn_passenger_events_total", kind="reload") == 0
    assert abs(value(found, "gunicorn_passenger_start_time_seconds") - time.time()) < 100
    assert value(found, "gunicorn_passenger_info", version="0.1.0") == 1
    assert "python_info" not in {key for key, _ in found}  # that of one worker among others says nothing

    # the same from each worker, and no step back when workers leave
    process.hup(2)
    ready(port, 2)
    fetch(second, "/x")
    seen = []

    def again():
        found = samples(port)
        seen.append(value(found, "gunicorn_passenger_server_requests_total", server=name))
        return seen[-1] == 7 and value(found, "gunicorn_passenger_events_total", kind="reload") == 1

    wait_for(again, lambda: f"seven requests and a reload, seen {seen}")
    assert seen == sorted(seen)


def test_metrics_are_negotiated(start, port):
    start.gunicorn("status_app", workers=1, env={"P1": port}).wait_ready()
    _, headers, text = get(port, "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=")
    _, headers, text = get(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    found = samples(port, parse=parse_openmetrics, Accept="application/openmetrics-text; version=1.0.0")
    assert value(found, "gunicorn_passenger_up") == 1
    # what prometheus_client itself does not understand is answered all the same
    for odd in (
        "application/openmetrics-text; version=x",
        "application/openmetrics-text; version=1.0.0.0; =",
        ";;",
    ):
        status, headers, text = get(port, "/metrics", Accept=odd)
        assert (status, "gunicorn_passenger_up" in text) == (200, True), odd


def test_spawn_needs_to_know_where():
    for nowhere in (None, []):
        with pytest.raises(ValueError, match="needs to know where to listen"):
            status.spawn(nowhere)


def test_the_rest_of_a_response_to_the_previous_daemon_is_not_used():
    """The daemon was killed while it read a response, and the next daemon reads the rest."""
    ours, theirs = socket.socketpair()
    source = sources.PipeSource(theirs.detach())
    asked = gevent.spawn(source.report)
    wait_greenlets(lambda: select.select([ours], [], [], 0)[0])
    assert ours.recv(100) == b'{"command":"report"}\n'
    ours.sendall(b'1234, "state": "ready"}]}}\n')
    with pytest.raises(sources.ReportUnavailable, match="incomplete"):
        asked.get(timeout=30)
    again = gevent.spawn(source.report)
    wait_greenlets(lambda: select.select([ours], [], [], 0)[0])
    ours.sendall(b'{"report": {"pid": 7}}\n')
    assert again.get(timeout=30) == {"pid": 7}
    ours.close()
    with pytest.raises(sources.ReportUnavailable, match="has exited"):
        gevent.spawn(source.report).get(timeout=30)


def test_metrics_without_prometheus_client(start, port):
    start.write("prometheus_client.py", "raise ImportError('as if it was not installed')")
    process = start.gunicorn(
        "status_app", workers=1, env={"P1": port, "PYTHONPATH": f"{start.home}:{PROGRAMS}"}
    ).wait_ready()
    code, _, text = get(port, "/metrics")
    assert code == 501
    assert text == "/metrics needs: pip install 'gunicorn-passenger[metrics]'\n"
    assert get(port, "/health")[0] == 200
    assert get(port, "/status.json")[0] == 200
    assert "Traceback" not in process.log()


def test_below_a_prefix(start, port):
    start.gunicorn("status_app", workers=1, env={"P2": port}).wait_ready()
    code, headers, _ = get(port, "/ops")
    assert code == 308
    assert headers["Location"] == "./ops/"
    code, _, page = get(port, "/ops/")
    assert code == 200
    assert not re.search(r"(?:href|src)=\"/|fetch\(\"/", page)  # all its addresses are relative
    assert get(port, "/ops/status.json")[0] == 200
    assert get(port, "/ops/metrics")[0] == 200


def test_a_prefix_that_plays_tricks():
    told = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "", "SCRIPT_NAME": "//evil.example/a\r\nb:c"}
    status.application(environ, lambda *args: told.append(args))
    assert dict(told[0][1])["Location"] == "./a%0D%0Ab%3Ac/"


def test_with_plain_python(start, port):
    program = start.write(
        "plain.py",
        f"""
        import gunicorn_passenger as passenger
        from gunicorn_passenger import status
        passenger.listen({port}, status)
        passenger.serve_forever()
        """,
    )
    process = start.python(program)
    wait_for(lambda: answers_health(port), "an answer")
    assert json.loads(get(port, "/health")[2])["workers"] is None
    assert get(port, "/status.json")[0] == 503
    assert value(samples(port), "gunicorn_passenger_up") == 0
    assert get(port, "/")[0] == 200
    assert process.stop() == 0


def answers_health(port):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, "/health")[0]
    return None


def test_a_report_is_used_again_for_a_moment(monkeypatch):
    class Source:
        serves = True
        asked = 0

        def report(self):
            self.asked += 1
            return {"workers": []}

    reports = sources.ReportCache()
    reports.source = Source()
    for _ in range(100):
        reports.get()
    assert reports.source.asked < 20
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    before = reports.source.asked
    reports.get()
    assert reports.source.asked == before + 1


def test_samples_of_the_same_labels_are_added_up(monkeypatch):
    """Two servers of one name and address, or a name twice, must not spoil the page."""
    server = {"name": "x", "address": "a", "connections": 1, "accepted": 2, "requests": None, "bytes": 4,
              "errors": 5, "workers": [1]}  # fmt: skip
    report = {
        "name": "n", "version": "1", "started": 1.0, "memory": None, "totals": {"crash": 2}, "servers": [server] * 2,
        "workers": [{"state": "odd", "memory": None}],
        "daemons": [{"name": "d", "state": "failed", "restarts": 3, "memory": None}],
        "blocking": {"times": 7, "longest": 2.5},
        "mailboxes": {"passed": 1, "kept": 2, "published": 3, "dropped": 4, "unknown": 6, "sessions": 5},
    }  # fmt: skip
    monkeypatch.setattr(sources.reports, "get", lambda: report)
    text = metrics.render("")[1].decode()
    found = {(s.name, frozenset(s.labels.items())): s.value for f in parse_text(text) for s in f.samples}
    assert value(found, "gunicorn_passenger_server_accepted_total", server="x") == 4
    assert not [key for key, _ in found if "requests" in key]
    assert value(found, "gunicorn_passenger_daemon_up", daemon="d") == 0
    assert value(found, "gunicorn_passenger_daemon_restarts_total", daemon="d") == 3
    assert value(found, "gunicorn_passenger_events_total", kind="crash") == 2
    assert value(found, "gunicorn_passenger_blocked_total") == 7
    assert value(found, "gunicorn_passenger_longest_block_seconds") == 2.5
    assert value(found, "gunicorn_passenger_connections_passed_total") == 1
    assert value(found, "gunicorn_passenger_messages_dropped_total") == 4


# --- in a process of its own -------------------------------------------------------------------------


def timed_health(port):
    before = time.monotonic()
    code, _, body = get(port, "/health")
    return code, json.loads(body), time.monotonic() - before


def spinning(where, workers):
    """Have every worker busy with one request for good; the connections."""
    clients = {}

    def busy():
        client = Client(where)
        client.request("GET", "/spin")
        try:
            client.sock.settimeout(1)
            if client.sock.recv(15):
                clients[len(clients)] = client
        except TimeoutError:
            client.close()  # it waits in the queue: all workers are busy
            return len(clients) >= workers
        return len(clients) >= workers

    wait_for(busy, lambda: f"{workers} busy workers, {len(clients)} are")
    return list(clients.values())


def test_health_from_a_process_of_its_own_while_all_workers_are_blocked(start, port):
    enough = start.home / "enough"
    process = start.gunicorn(
        "status_app", "-t", "300", workers=4, env={"SPAWN": port, "ENOUGH": enough}
    ).wait_ready()
    ready(port, 4)
    clients = spinning(process.socket, 4)
    try:
        stuck = Client(process.socket)
        stuck.request("GET", "/")
        stuck.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            stuck.getresponse()
        stuck.close()
        timed_health(port)
        times = []
        for _ in range(20):
            code, body, seconds = timed_health(port)
            assert code == 200
            assert body["workers"]["ready"] == 4
            times.append(seconds)
        # all of them came while no worker could answer; how soon is up to the machine as well, so the best counts
        assert min(times) < 0.1, times
        report = json.loads(get(port, "/status.json")[2])
        assert len(report["workers"]) == 4
        assert get(port, "/")[0] == 200
        assert value(samples(port), "gunicorn_passenger_daemon_up", daemon="health") == 1
    finally:
        enough.touch()
        for client in clients:
            client.close()
    assert process.stop() == 0


def test_health_while_no_worker_serves(start, port):
    """503 from the daemon while the workers boot."""
    start.write(
        "slow.py",
        f"""
        import os, time
        while not os.path.exists("{start.home}/go"):
            time.sleep(0.02)
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        """,
    )
    conf = start.write(
        "g.conf.py",
        f"""
        from gunicorn_passenger import status
        status.spawn({port})
        """,
    )
    process = start.gunicorn("slow", "-c", conf, "--chdir", start.home, workers=2)
    wait_for(lambda: answers_health(port) == 503, lambda: f"a 503:\n{process.log()}")
    _, _, body = get(port, "/health")
    assert json.loads(body) == {"status": "unavailable", "workers": {"ready": 0, "leaving": 0, "booting": 2}}
    (start.home / "go").touch()
    ready(port, 2)
    assert process.stop() == 0


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_with_other_worker_classes(start, port, worker):
    conf = start.write(
        "g.conf.py",
        f"""
        from gunicorn_passenger.hooks import *
        from gunicorn_passenger import status
        status.spawn({port})
        """,
    )
    start.write(
        "plain_app.py",
        """
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        """,
    )
    process = start.python(
        GUNICORN, "-k", worker, "-w", "2", "-c", conf, "-b", f"unix:{start.home}/app.sock", *NO_CONTROL,
        "--chdir", start.home, "plain_app:application",
    ).wait_ready()  # fmt: skip
    ready(port, 2)
    report = json.loads(get(port, "/status.json")[2])
    assert {entry["state"] for entry in report["workers"]} == {"ready"}
    assert value(samples(port), "gunicorn_passenger_workers", state="ready") == 2
    done = subprocess.run(
        [sys.executable, GUNICORN.parent / "gunicorn-passenger", "status", "--json"],
        env=start.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["applications"][0]["pid"] == process.pid
    assert process.stop() == 0


def test_spawn_where_it_may_not_listen_is_one_line_that_names_the_users_file(start):
    conf = start.write(
        "g.conf.py", "from gunicorn_passenger import status\n\nstatus.spawn('nonsense address')\n"
    )
    process = start.gunicorn("status_app", "-c", conf)
    assert process.wait_end() != 0
    (line,) = process.log().strip().splitlines()
    assert re.match(rf"Error: {re.escape(str(conf))}, line 3: .*nonsense", line)


# --- the example -------------------------------------------------------------------------------------


def test_example(start):
    first = free_range(2)
    example = Example(start, "status", {9100: first, 9101: first + 1})
    # not example.serve(): the master has a child for its daemons, too
    process = example.run(example.command("gunicorn -b")).wait_ready(example.socket)
    ready(first, 4)
    already = hello_requests(first)
    output = example.ask("seq 40")
    *shown, _ = example.promises("seq 40")
    assert_shown(shown, output)
    assert output.count("Hello from worker") == 40
    assert hello_requests(first) == already + 40
    ready(first + 1, 4)
    assert_shown(example.promises("/health"), example.ask("/health"))
    done = subprocess.run(
        [sys.executable, GUNICORN.parent / "gunicorn-passenger", "status"],
        env=start.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "health" in done.stdout
    assert process.stop() == 0, process.log()


def hello_requests(port):
    return value(samples(port), "hello_requests_total")
