"""This project's proxy, as a program has it that is nothing else."""

import os

import gunicorn_passenger as passenger
from gunicorn_passenger import http_proxy

passenger.configure(auto_install=False)

application = http_proxy.create_server(os.environ["BENCH_TARGET"]).listen("passenger")
