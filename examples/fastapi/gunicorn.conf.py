import gunicorn_passenger as passenger

bind = "unix:/tmp/fastapi.sock"
umask = 0o007
worker_class = "gunicorn_passenger.Worker"
workers = 4

# the metrics page shows the sums over all workers
passenger.configure(prometheus=True)
