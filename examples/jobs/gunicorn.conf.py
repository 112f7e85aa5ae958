"""gunicorn reads this file by itself when it is started in this directory."""

from jobs import work

import gunicorn_passenger as passenger

worker_class = "gunicorn_passenger.Worker"
workers = 4
umask = 0o007

# They stop in reverse order: the job service stores its last result before Redis stops.
passenger.spawn("redis-server --port 9001 --bind 127.0.0.1 --save ''", name="redis")
passenger.spawn(work, args=["redis://127.0.0.1:9001"], name="jobs", on_reload="restart", stop_timeout=60)
