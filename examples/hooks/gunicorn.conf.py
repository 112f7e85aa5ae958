"""gunicorn reads this file by itself when it is started in this directory."""

import json
import os

import gunicorn_passenger as passenger

worker_class = "gunicorn_passenger.Worker"
workers = 4
umask = 0o007

# The ports that the application may open. The application can narrow this range with a configure() of
# its own, but not widen it.
passenger.configure(ports="9100-9109")


def post_worker_init(worker):
    """gunicorn calls this in every worker, after the worker has loaded the application."""

    def status(environ, start_response):
        report = {"worker": worker.pid, "requests": worker.nr}
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(report).encode() + b"\n"]

    # The master opens the port once and shares it with all four workers.
    passenger.create_server(status).listen(int(os.environ.get("METRICS_PORT", "9100")), name="status")
