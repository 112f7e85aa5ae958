"""The metrics that a program counts with prometheus_client, shown by a server that knows nothing of workers."""

import os

import pytest
from conditions import wait_for
from free_ports import free_port, free_range
from http_client import fetch, pids_answering

PROGRAM = """
    import os
    from prometheus_client import REGISTRY, Counter, Gauge, make_wsgi_app, start_http_server
    from prometheus_client.core import GaugeMetricFamily

    orders = Counter("orders", "Orders", ["kind"])
    Gauge("workers_up", "Workers", multiprocess_mode="livesum").set(1)

    class Own:
        def collect(self):
            yield GaugeMetricFamily("stock", "Of a collector of the program's own", value=5)

    REGISTRY.register(Own())
    if "PORT" in os.environ:
        start_http_server(int(os.environ["PORT"]), "127.0.0.1")
    metrics = make_wsgi_app()

    def application(environ, start_response):
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)
        orders.labels("book").inc()
        text = str(os.getpid()).encode()
        start_response("200 OK", [("Content-Length", str(len(text)))])
        return [text]
"""


def value(text, name):
    """The only sample of a name."""
    (found,) = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]
    return float(found)


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
def test_each_worker_shows_the_sums_over_all_workers(start, preload):
    port = free_port()
    start.write("shop.py", PROGRAM)
    env = {"PASSENGER_PROMETHEUS": "1"} | ({} if preload else {"PORT": port})
    process = start.gunicorn("shop", *(["--preload"] if preload else []), workers=3, env=env).wait_ready()
    pids_answering(process.socket, 3)
    orders = value(fetch(process.socket, "/metrics")[1], "orders_total{")
    assert orders >= 3
    places = [(process.socket, "/metrics")] if preload else [(process.socket, "/metrics"), (port, "/metrics")]
    for where, path in places * 8:
        text = fetch(where, path)[1]
        assert value(text, "orders_total{") == orders
        assert value(text, "workers_up") == (1 if preload else 3)  # set once in the master, or in each worker
        assert value(text, "stock") == 5
        assert "process_resident_memory_bytes" not in text
    some = fetch(process.socket, "/metrics?name[]=orders_total&name[]=nothing")[1]
    assert value(some, "orders_total{") == orders
    assert "workers_up" not in some
    assert "PASSENGER_PROMETHEUS" not in process.log()
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("workers", "env", "warned"),
    [
        (2, {}, True),
        (1, {}, False),
        (2, {"PASSENGER_PLACEMENT": "{port}=each"}, False),
        (2, {"PASSENGER_PROMETHEUS": "1"}, False),
    ],
)
def test_the_log_warns_of_a_server_that_shows_one_workers_metrics(start, workers, env, warned):
    first = free_port()
    start.write("shop.py", PROGRAM)
    env = {name: text.format(port=first) for name, text in env.items()}
    process = start.gunicorn(
        "shop", workers=workers, env={**env, "PORT": first, "PASSENGER_PORTS": f"{first}-{first + 50}"}
    ).wait_ready()
    pids_answering(process.socket, workers)
    text = rf"127.0.0.1:{first} shows the metrics of whichever worker responds.*set PASSENGER_PROMETHEUS=1"
    if warned:
        process.wait_log(text, workers)
    else:
        assert "whichever worker" not in process.log()
    assert process.stop() == 0


def test_a_reload_keeps_what_has_been_counted(start):
    start.write("shop.py", PROGRAM)
    port = free_port()
    process = start.gunicorn("shop", env={"PASSENGER_PROMETHEUS": "1", "PORT": port}).wait_ready()
    old = pids_answering(process.socket, 2)
    orders = value(fetch(port)[1], "orders_total{")
    process.signal(1)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in old), process.log)
    assert value(fetch(port)[1], "orders_total{") == orders
    wait_for(lambda: value(fetch(port)[1], "workers_up") == 2, "the new workers alone")
    assert process.stop() == 0


RANGE_SEARCH = """
    import os, threading
    from http.server import HTTPServer
    from prometheus_client import Gauge
    from prometheus_client.exposition import MetricsHandler

    Gauge("pid", "Of the worker").set(os.getpid())
    for port in range(int(os.environ["FIRST"]), int(os.environ["FIRST"]) + 5):
        try:
            server = HTTPServer(("127.0.0.1", port), MetricsHandler)
        except OSError:
            continue
        threading.Thread(target=server.serve_forever, daemon=True).start()
        break

    def application(environ, start_response):
        text = str(os.getpid()).encode()
        start_response("200 OK", [("Content-Length", str(len(text)))])
        return [text]
"""


def test_with_the_placement_each_a_search_for_a_free_port_finds_one_for_each_worker(start):
    """As django-prometheus searches: every worker finds the first port free, since all may share it."""
    first = free_range(5)
    start.write("shop.py", RANGE_SEARCH)
    env = {"FIRST": first, "PASSENGER_PORTS": f"{first}-{first + 4}", "PASSENGER_PLACEMENT": f"{first}=each"}
    process = start.gunicorn("shop", workers=3, env=env).wait_ready()
    pids = pids_answering(process.socket, 3)
    assert {f"{value(fetch(first + n)[1], 'pid '):.0f}" for n in range(3)} == pids
    assert process.stop() == 0
