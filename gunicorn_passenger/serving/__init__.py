"""The program's servers in this process: how each gets its socket, serves, drains and stops.

Process: a worker, the status daemon, plain Python without gunicorn, and the master with ``--preload``, where
servers wait for the fork.
Never: open a port under gunicorn, where only the master does.
"""
