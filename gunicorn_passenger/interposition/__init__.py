"""Unmodified servers: Python's ``bind`` and ``listen`` are replaced, so that they get the master's sockets.

Process: a worker; the master creates the locks that the workers share.
Never: change a socket other than a TCP listener, a client's connection to this worker's own server while it
starts, or a listener's connections when the worker has to exit.
"""
