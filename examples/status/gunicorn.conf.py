"""gunicorn reads this by itself."""

import gunicorn_passenger as passenger
from gunicorn_passenger import status

worker_class = "gunicorn_passenger.Worker"
workers = 4
umask = 0o007

# what the program counts with prometheus_client is added up for all workers
passenger.configure(prometheus=True)

# the same again from a process of its own, which answers while every worker is busy
status.spawn(9101, name="health")
