"""A Flask application that counts its requests, and a metrics page for Prometheus on a port of its own.

export PROMETHEUS_MULTIPROC_DIR=$(mktemp -d)
gunicorn -k gunicorn_passenger.Worker -w 4 -b unix:/tmp/prometheus.sock --umask 007 app:app
"""

import os

from flask import Flask
from prometheus_client import REGISTRY, CollectorRegistry, Counter, multiprocess, start_http_server

app = Flask(__name__)
requests = Counter("hello_requests", "Requests served")

registry = REGISTRY
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    # Every worker keeps its counts in a file in that directory; this registry adds them up. Without it,
    # the page shows only the counts of the worker that serves it.
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)

# The server of prometheus_client is not written for gunicorn. It runs in every worker, and all workers
# share the port.
start_http_server(int(os.environ.get("METRICS_PORT", "9100")), registry=registry)


@app.get("/")
def hello():
    requests.inc()
    return f"Hello from worker {os.getpid()}\n"
