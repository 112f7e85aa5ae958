# The status application, as a daemon: it responds to probes and to Prometheus while all workers are busy.
from gunicorn_passenger import status

status.spawn("0.0.0.0:9101")
