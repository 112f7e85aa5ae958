"""The program's servers in this process: how each gets its socket, serves, drains and stops.

Process: a worker, or plain Python without gunicorn.
Never: open a port under gunicorn, where only the master does.
"""
