"""The status application: health, metrics, the report, and what the program counts itself, of all workers."""

import contextlib
import fcntl
import http.client
import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import time

import gevent
import pytest
from conftest import (
    GUNICORN,
    NO_CONTROL,
    PROGRAMS,
    Client,
    fetch,
    free_port,
    free_range,
    refused,
    require,
    wait_for,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from test_examples import Example, assert_shown

from gunicorn_passenger import status
from gunicorn_passenger.errors import SettingError
from gunicorn_passenger.status import metrics, prometheus_multiproc, sources

needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")


def get(where, path, method="GET", **headers):
    """Status, headers, body."""
    client = Client(where)
    try:
        client.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = client.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        client.close()


def wait_greenlets(condition):
    with gevent.Timeout(30):
        while not condition():
            gevent.sleep(0.001)


def samples(where, path="/metrics", parse=parse_text, **headers):
    """Each sample of a metrics page: (name, labels as a frozen set) to its value; a name that comes twice fails."""
    code, _, text = get(where, path, **headers)
    assert code == 200, text
    found = {}
    for family in parse(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found, name, **labels):
    """The one sample of a name with these labels among its own."""
    values = [v for (n, own), v in found.items() if n == name and labels.items() <= dict(own).items()]
    assert len(values) == 1, (name, labels, values)
    return values[0]


def ready(port, workers):
    """Wait until so many workers are ready."""

    def look():
        with contextlib.suppress(OSError, http.client.HTTPException):
            code, _, body = get(port, "/health")
            return code == 200 and json.loads(body)["workers"]["ready"] == workers
        return False

    wait_for(look, f"{workers} ready workers")


# --- for which hosts ---------------------------------------------------------------------------


ALLOWED = [
    "localhost", "LOCALHOST:9100", "localhost.", "shop.localhost", "127.0.0.1", "127.8.9.1:80", "[::1]:9100",
    "10.1.2.3:9100", "192.0.2.1", "[2001:db8::1]", "",
]  # fmt: skip
REFUSED = [
    "evil.example", "evil.example:9100", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost",
    "[::1", "::1", "a b", "localhost@evil.example", "evil.example/localhost", "[::1].evil.example",
]  # fmt: skip


def asked(app, host, **more):
    """The status of an answer, and its text."""
    seen = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": "", "HTTP_HOST": host, **more}
    body = b"".join(app(environ, lambda code, headers: seen.append(code)))
    return int(seen[0][:3]), body.decode()


@pytest.mark.parametrize("host", ALLOWED)
def test_hosts_that_are_answered(host):
    assert asked(status, host)[0] == 200


@pytest.mark.parametrize("host", REFUSED)
@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/status.json", "/none"])
def test_hosts_that_are_refused(host, path):
    code, text = asked(status.application, host, PATH_INFO=path)
    assert code == 403
    assert "status(hosts=[...])" in text
    assert "PASSENGER_STATUS_HOSTS" in text
    assert len(text.splitlines()) == 1


def test_without_a_host():
    seen = []
    status({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda code, headers: seen.append(code))
    assert seen == ["200 OK"]


def test_hosts_that_are_set():
    app = status(hosts=["Shop.example.org", ".internal"])
    assert asked(app, "shop.example.org:80")[0] == 200
    assert asked(app, "a.internal")[0] == 200
    assert asked(app, "b.a.internal.")[0] == 200
    assert asked(app, "internal")[0] == 403
    assert asked(app, "xshop.example.org")[0] == 403
    assert asked(app, "localhost")[0] == 200
    assert asked(status(hosts="*"), "evil.example")[0] == 200
    assert asked(status(), "evil.example")[0] == 403


@pytest.mark.parametrize(
    "hosts", [["http://x"], ["x:80"], ["a b"], 7, [7], b"x", ["x/y"], ["-"], [".", "a..b"]]
)
def test_hosts_that_cannot_be_set(hosts):
    with pytest.raises(
        SettingError, match=r"status\(hosts=...\): .* (host name|host names), such as|write names"
    ):
        status(hosts=hosts)


def test_hosts_in_an_answer_are_printable():
    _, text = asked(status, "a\x1b[31m\xc2\x9b\xe2\x80\xae")
    assert text.strip().isprintable()


def test_hosts_over_each_way_in(start, port):
    """A port of the workers' and a daemon's; a UNIX socket, where no browser connects; the environment."""
    start.write(
        "gunicorn.conf.py",
        f"from gunicorn_passenger import status\nstatus.spawn(['localhost:{port}'], hosts=['named.example'])\n",
    )
    second = free_port()
    start.write(
        "own.py",
        f"""
        import gunicorn_passenger as passenger
        from gunicorn_passenger import status
        passenger.listen({second}, status(hosts=["other.example"]))
        application = status
    """,
    )
    process = start.gunicorn(
        "own", "-c", "gunicorn.conf.py", "--chdir", start.home, workers=1,
        env={"PASSENGER_STATUS_HOSTS": "env.example, .below.example"},
    ).wait_ready()  # fmt: skip
    wait_for(lambda: not refused(port), "the daemon")
    for where, own in ((port, "named.example"), (second, "other.example")):
        for host, code in (
            ("evil.example", 403), (own, 200), ("env.example", 200), ("x.below.example", 200), ("127.0.0.1", 200),
        ):  # fmt: skip
            assert get(where, "/status.json", Host=host)[0] == code, (where, host)
    assert get(port, "/health", Host="other.example")[0] == 403
    assert get(process.socket, "/status.json", Host="evil.example")[0] == 200
    assert process.stop() == 0


def test_hosts_in_the_configuration_reach_the_workers_and_the_daemon(start, port):
    second = free_port()
    start.write(
        "gunicorn.conf.py",
        f"""\
        import gunicorn_passenger as passenger
        passenger.configure(status_hosts=["conf.example", ".below.example"])
        passenger.status.spawn({port})
        """,
    )
    start.write(
        "own.py",
        f"""\
        import gunicorn_passenger as passenger
        passenger.listen({second}, passenger.status)
        application = passenger.status
        """,
    )
    process = start.gunicorn("own", "-c", "gunicorn.conf.py", "--chdir", start.home, workers=1).wait_ready()
    wait_for(lambda: not refused(port), "the daemon")
    for where in (port, second):
        for host, code in (("conf.example", 200), ("x.below.example", 200), ("evil.example", 403)):
            assert get(where, "/status.json", Host=host)[0] == code, (where, host)
    assert process.stop() == 0


def test_hosts_in_the_environment_that_cannot_be_used(start, port):
    process = start.gunicorn("status_app", workers=1, env={"P1": port, "PASSENGER_STATUS_HOSTS": "http://x"})
    assert process.wait_end() != 0
    assert "PASSENGER_STATUS_HOSTS: 'http://x' is not a host name" in process.log()


# --- in the workers ----------------------------------------------------------------------------


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
    }  # fmt: skip
    monkeypatch.setattr(sources.reports, "get", lambda: report)
    text = metrics.render("")[1].decode()
    found = {(s.name, frozenset(s.labels.items())): s.value for f in parse_text(text) for s in f.samples}
    assert value(found, "gunicorn_passenger_server_accepted_total", server="x") == 4
    assert not [key for key, _ in found if "requests" in key]
    assert value(found, "gunicorn_passenger_daemon_up", daemon="d") == 0
    assert value(found, "gunicorn_passenger_daemon_restarts_total", daemon="d") == 3
    assert value(found, "gunicorn_passenger_events_total", kind="crash") == 2


# --- in a process of its own -------------------------------------------------------------------


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
            client.close()  # it waits in the queue: nobody is left to accept
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
    assert {entry["state"] for entry in report["workers"]} == {"running"}
    assert value(samples(port), "gunicorn_passenger_workers", state="running") == 2
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


# --- what the program counts itself ------------------------------------------------------------


PROMETHEUS = "import gunicorn_passenger as passenger\npassenger.configure(prometheus=True)\n"


def counting(start, port, *arguments, workers=3, conf=PROMETHEUS, **env):
    path = start.write("prometheus.conf.py", conf)
    process = start.gunicorn(
        "status_app", "-c", path, *arguments, workers=workers, env={"P1": port, "COUNT": 1, **env}
    ).wait_ready()
    ready(port, workers)
    return process


def directories(start):
    return sorted(str(path) for path in start.home.glob("run*/prometheus-*"))


def hello(port):
    return value(samples(port), "hello_total")


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_one_line_serves_the_programs_counters_whole(start, port, preload):
    process = counting(start, port, *preload)
    pids = set()
    for _ in range(30):
        pids.add(fetch(process.socket, "/count")[1])
    assert len(pids) > 1
    assert {hello(port) for _ in range(12)} == {30}
    (directory,) = directories(start)
    assert directory.endswith(f"prometheus-{process.pid}")
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert value(samples(port), "alive") == 3

    # a gone worker's counts stay, its gauge of live processes goes
    victim = process.workers()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(process.workers()) == 3 and victim not in process.workers(), "a new worker")
    ready(port, 3)
    wait_for(lambda: value(samples(port), "alive") == 3, "three live ones")
    assert not [
        name for name in os.listdir(directory) if name.startswith("gauge_live") and str(victim) in name
    ]
    assert hello(port) == 30
    process.hup(3)
    ready(port, 3)
    assert hello(port) == 30
    wait_for(lambda: value(samples(port), "alive") == 3, "three live ones")
    assert process.stop() == 0
    assert directories(start) == []


def test_from_the_environment(start, port):
    process = counting(start, port, conf="", PASSENGER_PROMETHEUS=1)
    for _ in range(12):
        fetch(process.socket, "/count")
    assert hello(port) == 12
    assert process.stop() == 0
    assert directories(start) == []


def test_a_killed_masters_directory_is_removed_at_the_next_start(start, port):
    process = counting(start, port)
    (left,) = directories(start)
    process.signal(signal.SIGKILL)
    process.wait_end()
    wait_for(lambda: not process.session(), "the end of its workers")
    assert directories(start) == [left]
    again = counting(start, port)
    assert [os.path.basename(path) for path in directories(start)] == [f"prometheus-{again.pid}"]


def test_a_directory_that_somebody_holds_is_not_removed(home):
    """Two containers with one runtime directory: the other's pids say nothing here."""
    path = home / f"prometheus-{1 << 22}"
    path.mkdir()
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    prometheus_multiproc._clear(str(home))
    assert path.exists()
    os.close(held)
    prometheus_multiproc._clear(str(home))
    assert not path.exists()


def test_after_usr2_the_new_master_has_its_own(start, port):
    process = counting(start, port, workers=2)
    process.hup(2)  # gunicorn takes the environment of a reload for the original one
    ready(port, 2)
    fetch(process.socket, "/count")
    process.signal(signal.SIGUSR2)
    wait_for(lambda: len(directories(start)) == 2, "two directories")
    new = next(path for path in directories(start) if not path.endswith(f"-{process.pid}"))
    master = int(new.rpartition("-")[2])
    process.signal(signal.SIGTERM)
    process.wait_end()
    assert directories(start) == [new]
    ready(port, 2)
    fetch(process.socket, "/count")
    assert hello(port) == 1
    os.kill(master, signal.SIGTERM)
    wait_for(lambda: not process.session(), "the end")
    assert directories(start) == []


def test_a_directory_of_the_users_own_is_used_and_left(start, port):
    own = start.home / "own"
    own.mkdir()
    process = counting(start, port, PROMETHEUS_MULTIPROC_DIR=own)
    for _ in range(5):
        fetch(process.socket, "/count")
    assert hello(port) == 5
    assert directories(start) == []
    victim = process.workers()[0]
    assert list(own.glob(f"gauge_live*_{victim}.db"))
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not list(own.glob(f"gauge_live*_{victim}.db")), "the end of its gauges")
    assert process.stop() == 0
    assert list(own.glob("counter_*.db"))


def test_imported_too_early_is_said(start, port):
    process = counting(start, port, conf=f"import prometheus_client\n{PROMETHEUS}")
    process.wait_log(
        "prometheus_client was imported in the master too early, so the workers' own counters are not added up"
    )


def test_switched_on_by_a_reload(start, port):
    process = counting(start, port, conf="")
    start.write("prometheus.conf.py", PROMETHEUS)
    process.hup(3)
    ready(port, 3)
    for _ in range(9):
        fetch(process.socket, "/count")
    assert hello(port) == 9
    assert process.stop() == 0
    assert directories(start) == []


def test_not_for_the_program(start, port):
    start.write(
        "wrong.py",
        "import gunicorn_passenger as p\np.configure(prometheus=True)\ndef application(e, s): pass\n",
    )
    process = start.gunicorn("wrong", "--chdir", start.home)
    assert process.wait_end() != 0
    assert "configure(prometheus=...) is for gunicorn.conf.py: the master acts on it" in process.log()


def test_a_file_that_is_broken_costs_the_programs_own_only(start, port):
    process = counting(start, port)
    (directory,) = directories(start)
    with open(f"{directory}/counter_1.db", "wb") as file:
        # 100 bytes are used, it says, and the first entry would be longer
        file.write(b"\x64\0\0\0\0\0\0\0" + b"\x7f" * 92)
    found = samples(port)
    assert value(found, "gunicorn_passenger_up") == 1
    process.wait_log("/metrics omits the program's own metrics: ")


@needs_root
def test_a_master_that_is_root_and_workers_that_are_not(start, port):
    start.home.chmod(0o1777)
    process = counting(start, port, "-u", "nobody", "-g", "nogroup", "--preload")
    for _ in range(12):
        fetch(process.socket, "/count")
    assert hello(port) == 12
    (directory,) = directories(start)
    assert os.path.dirname(directory) == f"{start.home}/run-users"
    info = os.stat(directory)
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (65534, 0o700)
    above = os.stat(os.path.dirname(directory))
    assert (above.st_uid, stat.S_IMODE(above.st_mode)) == (0, 0o711)
    assert stat.S_IMODE(os.stat(start.home / "run").st_mode) == 0o700
    assert process.stop() == 0
    assert directories(start) == []


def as_nobody(*command):
    return subprocess.run(
        [require("setpriv"), "--reuid", "65534", "--regid", "65534", "--clear-groups", *command],
        check=True, timeout=60,
    )  # fmt: skip


@needs_root
def test_root_touches_nothing_that_a_worker_has_put_into_the_directory(start, port):
    """Links to files of root's stay what they are, through a reload, a worker's end and the end of all."""
    start.home.chmod(0o1777)
    process = counting(start, port, "-u", "nobody", "-g", "nogroup", "--preload", workers=2)
    fetch(process.socket, "/count")
    (directory,) = directories(start)
    target = start.home / "roots"
    target.write_text("precious")
    target.chmod(0o666)  # else the system may not let others make a hard link to it (fs.protected_hardlinks)
    above = start.home / "others"
    above.mkdir(mode=0o755)
    for kind, name in (("-s", "counter_1.db"), ("", "histogram_2.db"), ("-s", "gauge_liveall_7.db")):
        as_nobody("ln", *([kind] if kind else []), str(target), f"{directory}/{name}")
    as_nobody("ln", "-s", str(above), f"{directory}/inner")
    # whatever the master has there under its own name may be another's by now
    for path in [p for p in os.listdir(directory) if p.endswith(f"_{process.pid}.db")]:
        as_nobody("rm", f"{directory}/{path}")
        as_nobody("ln", "-s", str(target), f"{directory}/{path}")
    victim = process.workers()[0]
    as_nobody("ln", "-s", str(target), f"{directory}/gauge_liveall_{victim}.db")
    process.hup(2)
    process.hup(2)
    ready(port, 2)
    for path in (target, above):
        assert os.stat(path).st_uid == 0
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o666
    assert stat.S_IMODE(os.stat(above).st_mode) == 0o755
    assert target.read_text() == "precious"
    assert process.stop() == 0
    assert target.read_text() == "precious"
    assert above.is_dir()
    assert directories(start) == []
    assert os.listdir(start.home / "run-users") == []


@needs_root
def test_a_preloaded_program_counts_where_only_root_may_write(start, port):
    start.home.chmod(0o1777)
    process = counting(start, port, "-u", "nobody", "-g", "nogroup", "--preload", workers=2)
    (own,) = start.home.glob("run-users/prometheus.master-*")
    (directory,) = directories(start)
    info = os.stat(own)
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (0, 0o700)
    shared = [name for name in os.listdir(own) if name.endswith(f"_{process.pid}.db")]
    assert shared
    for name in shared:
        info = os.lstat(f"{directory}/{name}")
        # the workers read it, and cannot cut it off under the master
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, grp_of("nogroup"), 0o640)
        assert os.path.samestat(info, os.stat(own / name))
    fetch(process.socket, "/count")
    assert hello(port) == 1
    assert process.stop() == 0
    assert os.listdir(start.home / "run-users") == []


def grp_of(name):
    import grp

    return grp.getgrnam(name).gr_gid


def test_what_is_nested_too_deeply_does_not_end_the_master(home):
    path = home / f"prometheus-{1 << 22}"
    path.mkdir()
    at = os.open(path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=at)
        at, before = os.open("d", os.O_RDONLY, dir_fd=at), at
        os.close(before)
    os.close(at)
    try:
        prometheus_multiproc._clear(str(home))
    finally:
        subprocess.run(["rm", "-rf", str(path)], check=True, timeout=60)


@needs_root
def test_a_way_that_lets_nobody_through_is_said(start, port):
    (start.home / "closed").mkdir(mode=0o700)
    process = counting(start, port, PASSENGER_RUNTIME_DIR=start.home / "closed" / "run")
    process.wait_log(r"own counters are not added up: .*but may not enter .*closed \(its mode is 0700\)")
    assert process.stop() == 0


def test_counters_under_sync_workers(start, port):
    conf = start.write(
        "g.conf.py",
        f"""
        from gunicorn_passenger.hooks import *
        import gunicorn_passenger as passenger
        from gunicorn_passenger import status
        passenger.configure(prometheus=True)
        status.spawn({port})
        """,
    )
    process = start.python(
        GUNICORN, "-k", "sync", "-w", "3", "-c", conf, "-b", f"unix:{start.home}/app.sock", *NO_CONTROL, "status_app",
        env={"COUNT": 1},
    ).wait_ready()  # fmt: skip
    ready(port, 3)
    for _ in range(20):
        fetch(process.socket, "/count")
    assert hello(port) == 20
    assert process.stop() == 0
    assert directories(start) == []


# --- the example -------------------------------------------------------------------------------


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
