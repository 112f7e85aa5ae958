"""gunicorn's configuration: its own asgi workers, and the hooks that give them ports."""

import gunicorn_passenger as passenger
from gunicorn_passenger.hooks import *  # noqa: F403

passenger.configure(prometheus=True)  # the metrics are the sums over all workers

worker_class = "asgi"
workers = 4
bind = "unix:/tmp/api.sock"
umask = 0o007
