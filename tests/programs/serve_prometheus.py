"""prometheus_client.start_http_server, with a metric that carries the worker's pid."""

import os

from answering import PORT, application  # noqa: F401 (what gunicorn serves)
from prometheus_client import Gauge, start_http_server

Gauge("worker_up", "The worker that answers", ["pid"]).labels(os.getpid()).set(1)
server, thread = start_http_server(PORT, "127.0.0.1")

if __name__ == "__main__":
    thread.join()
