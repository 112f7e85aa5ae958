"""The application whose boots listen.py and boot.py measure; boot_conf.py has the stamps of the worker."""

import os
import time

from plain import hello as application

CONTESTANT = os.environ["BENCH_CONTESTANT"]
stamps = {}

if CONTESTANT in ("without", "with"):
    import gunicorn_passenger as passenger

    @passenger.on("ready")
    def worker_booted(worker):
        worker.record(worker, **stamps)


if CONTESTANT == "with":
    stamps["before"] = time.monotonic()
    passenger.create_server(application).listen(int(os.environ["BENCH_PORT"]))
    stamps["after"] = time.monotonic()
