"""gunicorn reads this file by itself when it is started in this directory."""

from gunicorn_passenger import status

worker_class = "gunicorn_passenger.Worker"
workers = 4
umask = 0o007

# A process beside the workers serves /health, so it responds while every worker is busy. Kubernetes reaches
# it at the pod's address: "0.0.0.0:9101".
status.spawn(9101, name="health")
