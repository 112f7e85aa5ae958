"""The application of plain.py as a second server of the program, on the port that ``BENCH_PORT`` names."""

import os

import plain

import gunicorn_passenger as passenger

passenger.create_server(plain.hello).listen(int(os.environ["BENCH_PORT"]))

application = plain.hello
