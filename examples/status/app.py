"""An application that counts its requests, and shows its status on a second port.

gunicorn -b unix:/tmp/status.sock app
"""

import os

from prometheus_client import Counter

import gunicorn_passenger as passenger
from gunicorn_passenger import status

requests = Counter("hello_requests", "Requests served")


def application(environ, start_response):
    requests.inc()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"Hello from worker {os.getpid()}\n".encode()]


# the workers serve the page, /metrics, /status.json and /health
passenger.listen(9100, status)
