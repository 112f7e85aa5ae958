"""The program's servers in this process: how they get a socket, serve, and stop.

Runs in: a worker, or plain Python. Must never: open a port of its own under gunicorn.
"""
