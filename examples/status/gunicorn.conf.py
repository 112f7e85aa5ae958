"""gunicorn reads this file by itself when it is started in this directory."""

import gunicorn_passenger as passenger
from gunicorn_passenger import status

worker_class = "gunicorn_passenger.Worker"
workers = 4
umask = 0o007

# /metrics sums what the program counts with prometheus_client over all workers
passenger.configure(prometheus=True)

# a process of its own serves the same, and responds while every worker is busy
status.spawn(9101, name="health")
