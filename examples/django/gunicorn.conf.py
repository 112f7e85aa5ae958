"""gunicorn's configuration: a worker class of gunicorn's own, and the hooks that give its workers ports."""

import gunicorn_passenger as passenger
from gunicorn_passenger.hooks import *  # noqa: F403

passenger.configure(prometheus=True)  # the metrics are the sums over all workers

worker_class = "gthread"
workers = 4
threads = 4
preload_app = True
bind = "unix:/tmp/django.sock"
umask = 0o007
