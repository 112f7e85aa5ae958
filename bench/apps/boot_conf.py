"""Configuration of gunicorn for listen.py and boot.py: stamps the boots of workers; one boots at a time."""

import json
import os
import time

if os.environ["BENCH_CONTESTANT"] == "hooks":
    from gunicorn_passenger.hooks import *  # noqa: F403


def record(worker, **stamps):
    with open(os.environ["BENCH_RECORDS"], "a") as file:
        file.write(
            json.dumps({**worker.stamps, **stamps, "serving": time.monotonic(), "cpu": time.process_time()})
            + "\n"
        )


def pre_fork(arbiter, worker):
    deadline = time.monotonic() + 60
    while True:
        with open(os.environ["BENCH_RECORDS"]) as file:
            if file.read().count("\n") >= worker.age - 1:
                break
        if time.monotonic() > deadline:
            raise RuntimeError("the worker before this one does not get ready")
        time.sleep(0.01)
    time.sleep(0.1)
    worker.record = record
    worker.stamps = {"age": worker.age, "fork": time.monotonic()}


def post_worker_init(worker):
    worker.stamps["loaded"] = time.monotonic()
    if os.environ["BENCH_CONTESTANT"] not in ("plain", "hooks"):
        return
    notify = worker.notify

    def first_notify():
        """gunicorn's gevent and sync workers report for the first time once they accept."""
        worker.notify = notify
        record(worker)
        notify()

    worker.notify = first_notify
